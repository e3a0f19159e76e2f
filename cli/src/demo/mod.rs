//! `pgherd demo`: a whole cluster on this machine, of real parts: etcd, members under their keepers, a proxy. Says what
//! happens, and leaves nothing behind.

mod descendants;
mod events;
mod files;
mod guide;
mod household;
mod machine;
mod plan;

use std::path::Path;
use std::time::Duration;

use pgherd_cluster::etcd::{Etcd, EtcdConfig};
use pgherd_cluster::http::{Ask, ask};
use pgherd_cluster::key::Keys;
use pgherd_cluster::name::Scope;
use pgherd_cluster::record::Address;
use pgherd_cluster::source::{EtcdSource, ViewHandle};
use pgherd_cluster::view::View;
use rustix::process::{getpid, set_child_subreaper};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use self::files::Layout;
use self::household::{Household, Turn, Who};
use self::machine::Site;
use self::plan::Plan;
use crate::args::DemoArgs;
use crate::command::utc_now;
use crate::failure::Failure;
use crate::preflight::port;
use crate::terminal::say;

/// How long the cluster may take to come up.
const START_MAX: Duration = Duration::from_secs(60);
/// How often the proxy's health is looked at until it is well; everything else is told by events.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Runs the demo until it is told to end.
///
/// # Errors
/// When something that it needs is not there, or the cluster does not come up.
pub(crate) async fn run(args: &DemoArgs) -> Result<(), Failure> {
    let tools = machine::tools()?;
    let user = machine::user()?;
    let plan = plan::choose(args.members, taken).map_err(Failure::Unavailable)?;
    // What a killed keeper leaves behind becomes ours, so that it is found at the end.
    set_child_subreaper(Some(getpid()))
        .map_err(|error| Failure::Unavailable(format!("becoming the parent of orphans: {error}")))?;
    let mut stop = Stop::new()?;

    let site = Site::make(args.keep.as_deref(), user)?;
    let layout = Layout {
        dir: site.dir().to_owned(),
        bin_dir: tools.bin_dir.clone(),
        passwords: machine::passwords()?,
    };
    say(format!(
        "Logs, configurations and data are in {}.",
        layout.dir.display()
    ));
    if let Some(user) = site.user() {
        say(format!(
            "PostgreSQL refuses to run as root, so everything runs as {}.",
            user.name
        ));
    }
    plan.moved.iter().for_each(|sentence| say(format!("{sentence}.")));

    let household = Household::new(site, layout.clone(), plan.clone(), &tools)?;
    let mut demo = Demo::new(household, plan, layout)?;
    let outcome = demo.live(&mut stop, &tools.pgherd).await;
    say("Ending everything; Ctrl-C again hurries.");
    demo.stop.cancel();
    let ended = demo.household.end(stop.asked()).await;
    outcome.and(ended)
}

/// Who listens on a port, in words, if anybody does.
fn taken(port: u16) -> Option<String> {
    let address = Address {
        host: "127.0.0.1".to_owned(),
        port,
    };
    Some(match port::probe(&address).err()? {
        port::Taken::By(holders) => holders.first().map_or_else(
            || "a process that this user may not see".to_owned(),
            ToString::to_string,
        ),
        port::Taken::Impossible(error) => format!("nobody, but cannot be used ({error})"),
    })
}

/// The ways to be told to end.
struct Stop(Vec<Signal>);

impl Stop {
    fn new() -> Result<Self, Failure> {
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let signals: std::io::Result<Vec<Signal>> = kinds.into_iter().map(signal).collect();
        signals
            .map(Self)
            .map_err(|error| Failure::Unavailable(format!("listening for signals: {error}")))
    }

    /// Comes back when told to. Cancel safe.
    async fn asked(&mut self) {
        std::future::poll_fn(|context| {
            let told = self.0.iter_mut().any(|signal| signal.poll_recv(context).is_ready());
            if told {
                std::task::Poll::Ready(())
            } else {
                std::task::Poll::Pending
            }
        })
        .await;
    }
}

struct Demo {
    household: Household,
    plan: Plan,
    layout: Layout,
    view: ViewHandle,
    stop: CancellationToken,
    _source: JoinSet<()>,
}

impl Demo {
    fn new(household: Household, plan: Plan, layout: Layout) -> Result<Self, Failure> {
        let scope = Scope::new("demo").map_err(|error| Failure::Defect(error.to_string()))?;
        let config = EtcdConfig {
            endpoints: vec![format!("http://127.0.0.1:{}", plan.etcd_client)],
            ..EtcdConfig::default()
        };
        let keys = Keys::new("service", &scope);
        let (source, view) = EtcdSource::new(Etcd::new(config), keys, scope, false);
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(source.run(stop.clone()));
        Ok(Self {
            household,
            plan,
            layout,
            view,
            stop,
            _source: tasks,
        })
    }

    /// From the first start until told to end.
    async fn live(&mut self, stop: &mut Stop, pgherd: &Path) -> Result<(), Failure> {
        for who in self.household.everybody() {
            self.household.start(&who)?;
        }
        let mut changes = self.view.subscribe();
        let mut seen = self.view.load_full();
        let mut look = interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let deadline = Instant::now() + START_MAX;
        let mut start = Start::default();
        loop {
            tokio::select! {
                () = stop.asked() => return Ok(()),
                turn = self.household.turn() => self.take_turn(turn, start.is_over)?,
                changed = changes.changed() => {
                    if changed.is_err() {
                        return Err(Failure::Defect("the view ended".to_owned()));
                    }
                    let view = changes.borrow_and_update().clone();
                    for event in events::events(&seen, &view) {
                        tell(&event);
                    }
                    if start.is_over && view.writable_leader().map(|leader| &leader.name) != seen.writable_leader().map(|leader| &leader.name) {
                        self.tell_leader(&view);
                    }
                    seen = view;
                }
                _ = look.tick() => {
                    self.household.bury_adopted();
                    if start.is_over {
                        continue;
                    }
                    let missing = self.missing(&seen).await;
                    start.look(&missing);
                    if missing.is_empty() {
                        start.is_over = true;
                        let leader = seen.epoch().map(|epoch| epoch.holder.to_string()).unwrap_or_default();
                        say(guide::guide(&self.plan, &self.layout, pgherd, &leader, self.postmaster(&leader)));
                    } else if Instant::now() > deadline {
                        return Err(self.not_up(&missing));
                    }
                }
            }
        }
    }

    async fn missing(&self, view: &View) -> Vec<String> {
        let mut missing = events::missing(view, self.plan.members.iter().map(|member| member.name.as_str()));
        let stats = Address {
            host: "127.0.0.1".to_owned(),
            port: self.plan.stats,
        };
        let healthy = ask(&stats, Ask::get("/healthz"), LOOK_EVERY)
            .await
            .is_ok_and(|answer| answer.status == 200);
        if !healthy {
            missing.push("the proxy".to_owned());
        }
        missing
    }

    fn take_turn(&mut self, turn: Turn, is_up: bool) -> Result<(), Failure> {
        match turn {
            Turn::Ended(who, status) => {
                // What cannot be configured will not mend itself.
                if !is_up && status.code() == Some(64) {
                    return Err(Failure::Defect(format!(
                        "{who} refuses its configuration:\n{}",
                        self.household.log_tail(&who)
                    )));
                }
                tell(&format!(
                    "{who} ended ({status}); it is started again, as a service manager would"
                ));
                self.household.start_later(who);
                Ok(())
            }
            Turn::Due(who) => self.household.start(&who),
        }
    }

    fn not_up(&self, missing: &[String]) -> Failure {
        let mut text = format!(
            "the cluster is not up after {} s; missing: {}",
            START_MAX.as_secs(),
            missing.join(", ")
        );
        if !self.household.all_running() {
            text.push_str("; not all processes run");
        }
        for who in self.household.everybody() {
            let concerned = missing.iter().any(|what| what.contains(&who.to_string()));
            if concerned || who == Who::Etcd && missing.len() > self.plan.members.len() {
                text.push_str(&format!(
                    "\nthe end of {}:\n{}",
                    self.layout.log_file(&who.to_string()).display(),
                    self.household.log_tail(&who)
                ));
            }
        }
        Failure::Unavailable(text)
    }

    fn tell_leader(&self, view: &View) {
        let Some(leader) = view.writable_leader() else { return };
        if let Some(pid) = self.postmaster(leader.name.as_str()) {
            tell(&format!("to do it again: kill -9 {pid} ({}'s PostgreSQL)", leader.name));
        }
    }

    fn postmaster(&self, member: &str) -> Option<u32> {
        let file = self.layout.data_dir(member).join("postmaster.pid");
        std::fs::read_to_string(file).ok()?.lines().next()?.trim().parse().ok()
    }
}

/// How the start goes, told when it changes.
#[derive(Default)]
struct Start {
    is_over: bool,
    told: Vec<String>,
}

impl Start {
    fn look(&mut self, missing: &[String]) {
        if !missing.is_empty() && self.told != missing {
            tell(&format!("waiting for {}", missing.join(", ")));
            self.told = missing.to_vec();
        }
    }
}

fn tell(event: &str) {
    say(format!("{} {event}", utc_now("%H:%M:%S%.3fZ")));
}
