//! A browser without a window, driven by the DevTools protocol over a pipe: one JSON document after another, each ended by
//! a zero byte (`--remote-debugging-pipe`, which reads from descriptor 3 and writes to 4).

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// Far more than anything here takes: it only turns a hang into a failure.
const PATIENCE: Duration = Duration::from_secs(30);

async fn within<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("not within {PATIENCE:?}: {what}"),
    }
}

/// Hands our pipes to the descriptors that the browser looks for, without a line of unsafe code.
const START: &str = "exec chromium --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run \
    --disable-background-networking --disable-component-update --disable-sync --hide-scrollbars --mute-audio \
    --remote-debugging-pipe --user-data-dir=\"$0\" about:blank 3<&0 4>&1 0</dev/null 1>/dev/null";

/// A browser with one page.
pub(crate) struct Browser {
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    next_id: u64,
    session: Option<String>,
    /// What it has told unasked, since it was last looked at.
    told: Vec<Value>,
    _child: Child,
    _directory: tempfile::TempDir,
}

impl Browser {
    pub(crate) async fn start() -> Self {
        let there = Path::new("/usr/bin/chromium").exists();
        assert!(there, "there is no chromium: scripts/deps.sh tests installs it");
        let directory = tempfile::tempdir().expect("a directory");
        let mut child = Command::new("sh")
            .args(["-c", START])
            .arg(directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("a shell");
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let mut browser = Self {
            input: input.expect("a pipe"),
            output: BufReader::new(output.expect("a pipe")),
            next_id: 0,
            session: None,
            told: Vec::new(),
            _child: child,
            _directory: directory,
        };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"})).await;
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let attached = browser.call("Target.attachToTarget", attach).await;
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page.enable", "Runtime.enable", "Log.enable", "Network.enable"] {
            browser.call(domain, json!({})).await;
        }
        browser
    }

    /// Asks for something and waits for the answer.
    pub(crate) async fn call(&mut self, method: &str, params: Value) -> Value {
        self.next_id += 1;
        let id = self.next_id;
        let mut message = json!({"id": id, "method": method, "params": params});
        if let Some(session) = &self.session {
            message["sessionId"] = session.as_str().into();
        }
        let bytes = [message.to_string().as_bytes(), &[0]].concat();
        within("the browser takes a command", self.input.write_all(&bytes))
            .await
            .expect("the browser runs");
        loop {
            let told = self.hear(method).await;
            if told["id"] == id {
                assert!(told["error"].is_null(), "{method}: {told}");
                return told["result"].clone();
            }
            self.told.push(told);
        }
    }

    async fn hear(&mut self, what: &str) -> Value {
        let mut bytes = Vec::new();
        within(what, self.output.read_until(0, &mut bytes))
            .await
            .expect("the browser runs");
        bytes.pop();
        serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("the browser ended, or says {bytes:?}: {error}"))
    }

    /// Opens a page and waits until all of it is there.
    pub(crate) async fn open(&mut self, url: &str) {
        self.told.retain(|told| told["method"] != "Page.loadEventFired");
        let opened = self.call("Page.navigate", json!({"url": url})).await;
        assert!(opened["errorText"].is_null(), "{url}: {opened}");
        self.loaded().await;
    }

    /// Waits until the page that is on its way is there.
    pub(crate) async fn loaded(&mut self) {
        let is_there = |told: &Value| told["method"] == "Page.loadEventFired";
        while !self.told.iter().any(is_there) {
            let told = self.hear("a page is loaded").await;
            self.told.push(told);
        }
        self.told.retain(|told| !is_there(told));
    }

    /// What a line of JavaScript gives.
    pub(crate) async fn evaluate(&mut self, script: &str) -> Value {
        let params = json!({"expression": script, "awaitPromise": true, "returnByValue": true});
        let result = self.call("Runtime.evaluate", params).await;
        assert!(result["exceptionDetails"].is_null(), "{script}: {result}");
        result["result"]["value"].clone()
    }

    /// What is to be read on the page, or on the part of it that `selector` finds.
    pub(crate) async fn text(&mut self, selector: &str) -> String {
        let script = format!("document.querySelector({})?.innerText ?? ''", json!(selector));
        self.evaluate(&script).await.as_str().unwrap_or_default().to_owned()
    }

    /// Waits until a part of the page can be read.
    pub(crate) async fn shows(&mut self, selector: &str, text: &str) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let shown = self.text(selector).await;
            if shown.contains(text) {
                return;
            }
            assert!(
                tokio::time::Instant::now() < deadline,
                "no {text:?} in {selector}: {shown}"
            );
        }
    }

    /// Like a window of this many pixels.
    pub(crate) async fn window(&mut self, width: u32, height: u32, phone: bool) {
        let scale = if phone { 2 } else { 1 };
        let params = json!({"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone});
        self.call("Emulation.setDeviceMetricsOverride", params).await;
    }

    /// `light` or `dark`, as a user's system asks for.
    pub(crate) async fn prefers(&mut self, scheme: &str) {
        let feature = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.call("Emulation.setEmulatedMedia", json!({"features": feature}))
            .await;
    }

    pub(crate) async fn scripts(&mut self, run: bool) {
        self.call("Emulation.setScriptExecutionDisabled", json!({"value": !run}))
            .await;
    }

    /// Presents a name and a password with whatever it asks for.
    pub(crate) async fn log_in(&mut self, authorization: &str) {
        let headers = json!({"Authorization": authorization});
        self.call("Network.setExtraHTTPHeaders", json!({"headers": headers}))
            .await;
    }

    /// Keeps a picture of the whole page in `target/screenshots`.
    pub(crate) async fn screenshot(&mut self, name: &str) {
        let metrics = self.call("Page.getLayoutMetrics", json!({})).await;
        let size = &metrics["cssContentSize"];
        let clip = json!({"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1});
        let params = json!({"format": "png", "captureBeyondViewport": true, "clip": clip});
        let taken = self.call("Page.captureScreenshot", params).await;
        let png = BASE64_STANDARD
            .decode(taken["data"].as_str().expect("a picture"))
            .expect("base64");
        let directory = screenshots();
        std::fs::create_dir_all(&directory).expect("a directory");
        std::fs::write(directory.join(format!("{name}.png")), png).expect("written");
    }

    /// Everything that it has complained of, and everywhere it has asked but at `ours`; both are forgotten then.
    pub(crate) async fn complaints(&mut self, ours: &str) -> Vec<String> {
        let told = std::mem::take(&mut self.told);
        told.iter().filter_map(|told| complaint(told, ours)).collect()
    }
}

fn complaint(told: &Value, ours: &str) -> Option<String> {
    let params = &told["params"];
    let is_bad = match told["method"].as_str()? {
        "Log.entryAdded" => params["entry"]["level"] == "error",
        "Runtime.consoleAPICalled" => params["type"] == "error",
        "Runtime.exceptionThrown" => true,
        "Network.requestWillBeSent" => {
            let url = params["request"]["url"].as_str().unwrap_or_default();
            !url.starts_with(ours)
        }
        _ => false,
    };
    is_bad.then(|| told.to_string())
}

/// Artifacts of a test run.
fn screenshots() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/screenshots")
}
