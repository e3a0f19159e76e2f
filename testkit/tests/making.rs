//! Clusters and members that operators' own programs make, and what those programs are told.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgherd_testkit::config::PREFIX;
use pgherd_testkit::process::Signal;
use pgherd_testkit::{Cluster, Member, Postgres, VolumeKind, eventually};
use rustix::process::geteuid;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(30);

/// What is published of a member.
async fn state(cluster: &Cluster, name: &str) -> Result<String> {
    let entry = cluster.etcd().entry(&format!("{PREFIX}members/{name}")).await?;
    let record: Value = serde_json::from_str(&entry.context("no member key")?.value)?;
    Ok(record["state"].as_str().unwrap_or_default().to_owned())
}

async fn wait_for_state(cluster: &Cluster, name: &str, wanted: &str) -> Result<()> {
    eventually(&format!("{name} says {wanted:?}"), SOON, async || {
        let state = state(cluster, name).await?;
        ensure!(state == wanted, "{state:?}");
        Ok(())
    })
    .await
}

fn lines(cluster: &Cluster, file: &str) -> Result<Vec<String>> {
    let text = fs::read_to_string(cluster.site().dir().join(file)).unwrap_or_default();
    Ok(text.lines().map(str::to_owned).collect())
}

async fn wait_for_lines(cluster: &Cluster, file: &str, wanted: &[&str]) -> Result<()> {
    eventually(&format!("{file} is as it should be"), SOON, async || {
        let lines = lines(cluster, file)?;
        ensure!(lines == wanted, "{lines:?}, not {wanted:?}");
        Ok(())
    })
    .await
}

/// Writes its arguments down, makes the beginning of a data directory, waits until a file called `go` is there, and copies
/// the backup.
const RESTORE: &str = "for word; do case $word in --datadir=*) to=${word#--datadir=} ;; esac; echo \"$word\" >> $0.log; done\n\
                       mkdir -p \"$to\" && chmod 700 \"$to\" && cp backup/data/PG_VERSION \"$to\"\n\
                       i=0; while [ ! -e go ] && [ $i -lt 600 ]; do sleep 0.1; i=$((i+1)); done\n\
                       cp -a backup/data/. \"$to\"\n";

#[tokio::test]
async fn a_cluster_is_restored_from_a_backup_and_a_replica_made_from_it_while_the_states_say_so() -> Result<()> {
    let bootstrap = json!({
        "method": "restore",
        "restore": {
            "command": "sh restore.sh -v", "from": "a backup",
            "recovery_conf": {"restore_command": "false", "recovery_target_timeline": "latest"},
        },
    });
    let replica = json!({
        "create_replica_methods": ["copy"],
        "copy": {"command": "sh copy.sh", "keep_data": false, "no_leader": 1, "extra": 7},
    });
    let cluster = Cluster::builder()
        .members(2)
        .config_of("m1", json!({"bootstrap": bootstrap}))
        .config_of("m2", json!({"postgresql": replica}))
        .prepare()
        .await?;
    let site = cluster.site();
    site.write_file("restore.sh", RESTORE)?;
    site.write_file("copy.sh", RESTORE)?;
    make_backup(&cluster).await?;
    restore(&cluster).await?;
    make_replica(&cluster).await?;
    cluster.pass();
    Ok(())
}

/// A data directory that was stopped in order, and whose superuser has another password.
async fn make_backup(cluster: &Cluster) -> Result<()> {
    let site = cluster.site();
    let source = Postgres::start(site, "backup", site.addresses().proxy(7)).await?;
    let client = pgherd_testkit::Sql::connect(source.address(), SOON).await?;
    for sql in [
        "CREATE TABLE kept AS SELECT generate_series(1, 1000) AS n",
        "ALTER ROLE postgres PASSWORD 'forgotten'",
    ] {
        client.rows(sql, SOON).await?;
    }
    source.end(Signal::INT).await
}

async fn restore(cluster: &Cluster) -> Result<()> {
    let (site, m1) = (cluster.site(), cluster.member("m1")?);
    m1.start().await?;
    wait_for_state(cluster, "m1", "running custom bootstrap script").await?;
    let claim = cluster.etcd().entry(&format!("{PREFIX}initialize")).await?;
    ensure!(
        claim
            .as_ref()
            .is_some_and(|claim| claim.lease != 0 && claim.value.is_empty()),
        "{claim:?}"
    );
    // Its agent dies and the next one has the same lease: the program is ended, and run again.
    m1.kill_agent().await?;
    eventually("it was run again", SOON, async || {
        let told = lines(cluster, "restore.sh.log")?;
        ensure!(told.len() == 8, "{told:?}");
        Ok(())
    })
    .await?;
    site.write_file("go", "")?;
    cluster.start_proxy().await?;
    cluster.settled_with(1).await?;
    ensure!(m1.sql("SELECT count(*) FROM kept").await? == "1000");
    // It has recovered as it was told: the end of a recovery begins a timeline.
    ensure!(m1.sql("SELECT timeline_id FROM pg_control_checkpoint()").await? == "2");
    let data_dir = m1.data_dir().display().to_string();
    let told = [
        "-v",
        "--from=a backup",
        "--scope=testkit",
        &format!("--datadir={data_dir}"),
    ];
    let log = lines(cluster, "restore.sh.log")?;
    ensure!(log == [told, told].concat(), "{log:?}");
    let hba = fs::read_to_string(m1.data_dir().join("pg_hba.conf"))?;
    ensure!(
        hba.contains("scram-sha-256") && !hba.contains("host all \"postgres\""),
        "{hba}"
    );
    let initialize = cluster.etcd().entry(&format!("{PREFIX}initialize")).await?;
    let initialize = initialize.context("no initialize key")?;
    ensure!(
        initialize.lease == 0
            && initialize.value == m1.sql("SELECT system_identifier FROM pg_control_system()").await?,
        "{initialize:?}"
    );
    Ok(())
}

async fn make_replica(cluster: &Cluster) -> Result<()> {
    let (site, m1, m2) = (cluster.site(), cluster.member("m1")?, cluster.member("m2")?);
    fs::remove_file(site.dir().join("go"))?;
    m2.start().await?;
    wait_for_state(cluster, "m2", "creating replica").await?;
    let begun = m2.data_dir().join("PG_VERSION");
    eventually("half of it is there", SOON, async || {
        ensure!(begun.exists());
        Ok(())
    })
    .await?;
    // That is none: the member dies, and begins anew.
    m2.kill_everything().await?;
    fs::remove_file(site.dir().join("copy.sh.log"))?;
    m2.start().await?;
    wait_for_state(cluster, "m2", "creating replica").await?;
    site.write_file("go", "")?;
    cluster.settled().await?;
    let told = lines(cluster, "copy.sh.log")?;
    let starts = [
        "--keep_data=False".to_owned(),
        "--no_leader=1".to_owned(),
        "--extra=7".to_owned(),
        "--scope=testkit".to_owned(),
        "--role=replica".to_owned(),
        format!("--datadir={}", m2.data_dir().display()),
        format!(
            "--connstring=dbname=postgres user=replicator host={} port=",
            m1.postgres().ip()
        ),
    ];
    let as_told = told.len() == starts.len() && told.iter().zip(&starts).all(|(told, start)| told.starts_with(start));
    ensure!(as_told && !told.concat().contains("secret"), "{told:?}");

    // The same while nobody leads.
    m2.stop().await?;
    m2.wipe().await?;
    m1.stop().await?;
    // A new backup, with a password that is known: a standby cannot change it.
    let mut copy = site.command("sh");
    copy.arg("-c").arg(format!(
        "rm -r backup/data && cp -a {} backup/data",
        m1.data_dir().display()
    ));
    site.run(copy, SOON).await?.success()?;
    fs::remove_file(site.dir().join("copy.sh.log"))?;
    m2.start().await?;
    eventually("it was made from the backup alone", SOON, async || {
        let output = m2.output().await;
        ensure!(output.contains("the data directory was made by copy"), "{output}");
        Ok(())
    })
    .await?;
    let told = lines(cluster, "copy.sh.log")?;
    ensure!(told.last().is_some_and(|last| last == "--connstring="), "{told:?}");
    m1.start().await?;
    cluster.settled().await?;
    Ok(())
}

/// `sh hook.sh NAME ...` writes the rest of its arguments down under that name.
const HOOK: &str = "name=$1; shift; echo \"$*\" >> $name.log\n";

#[tokio::test]
async fn callbacks_hear_of_each_change_and_pre_promote_may_refuse() -> Result<()> {
    let scripts = |name: &str| {
        let hook = format!("sh hook.sh {name}");
        json!({"postgresql": {
            "callbacks": {
                "on_start": hook, "on_stop": hook, "on_restart": hook, "on_role_change": hook,
                "on_reload": format!("{hook}-reload"),
            },
            "pre_promote": "sh -c 'test ! -e refuse'",
            "before_stop": format!("sh hook.sh {name} before"),
        }})
    };
    let cluster = Cluster::builder()
        .members(2)
        .config_of("m1", scripts("m1"))
        .config_of("m2", scripts("m2"))
        .prepare()
        .await?;
    cluster.site().write_file("hook.sh", HOOK)?;
    cluster.site().write_file("refuse", "")?;
    let (m1, m2) = (cluster.member("m1")?, cluster.member("m2")?);
    m1.start().await?;
    cluster.start_proxy().await?;
    cluster.settled_with(1).await?;
    m2.start().await?;
    cluster.settled().await?;
    wait_for_lines(&cluster, "m1.log", &["on_start primary testkit"]).await?;
    wait_for_lines(&cluster, "m2.log", &["on_start replica testkit"]).await?;
    reload_and_restart(&cluster, m1).await?;

    m1.stop().await?;
    let stopped = ["before", "on_stop primary testkit"];
    ensure!(
        lines(&cluster, "m1.log")?.ends_with(&stopped.map(str::to_owned)),
        "{:?}",
        lines(&cluster, "m1.log")?
    );
    let refused = [
        "on_start replica testkit",
        "on_stop replica testkit",
        "on_start replica testkit",
    ];
    wait_for_lines(&cluster, "m2.log", &refused).await?;
    let holder = cluster.lease_holder().await;
    ensure!(
        holder.is_err() && !m2.is_primary().await?,
        "{holder:?} leads although pre_promote refuses"
    );
    fs::remove_file(cluster.site().dir().join("refuse"))?;
    let leader = cluster.next_leader("m1").await?;
    ensure!(leader.name() == "m2");
    let promoted: Vec<&str> = refused.into_iter().chain(["on_role_change primary testkit"]).collect();
    wait_for_lines(&cluster, "m2.log", &promoted).await?;

    m1.start().await?;
    cluster.settled().await?;
    let switchover = json!({"leader": "m2", "candidate": "m1"});
    ensure!(m2.ask("POST", "/switchover", Some(&switchover)).await?.status == 200);
    cluster.settled().await?;
    let demoted = ["before", "on_stop primary testkit", "on_role_change replica testkit"];
    let all: Vec<&str> = promoted.into_iter().chain(demoted).collect();
    wait_for_lines(&cluster, "m2.log", &all).await?;
    cluster.pass();
    Ok(())
}

/// A reload tells every member, a restart its own.
async fn reload_and_restart(cluster: &Cluster, m1: &Member) -> Result<()> {
    let change = json!({"postgresql": {"parameters": {"work_mem": "5MB"}}});
    ensure!(m1.ask("PATCH", "/config", Some(&change)).await?.status == 200);
    eventually("both were told of the reload", SOON, async || {
        for (name, role) in [("m1", "primary"), ("m2", "replica")] {
            let last = lines(cluster, &format!("{name}-reload.log"))?.pop();
            ensure!(last == Some(format!("on_reload {role} testkit")), "{name}: {last:?}");
        }
        Ok(())
    })
    .await?;
    ensure!(m1.ask("POST", "/restart", Some(&json!({}))).await?.status == 200);
    let restarted = ["on_start primary testkit", "before", "on_restart primary testkit"];
    wait_for_lines(cluster, "m1.log", &restarted).await?;
    cluster.settled().await?;
    Ok(())
}

#[tokio::test]
async fn a_bootstrap_that_dies_or_fails_on_the_way_leaves_the_cluster_to_others() -> Result<()> {
    let post = |what: &str| json!({"bootstrap": {"post_init": what}});
    let cluster = Cluster::builder()
        .members(2)
        .member_config(json!({"pgherd": {"initdb_d": "initdb.d"}}))
        .config_of("m1", post("sh -c 'sleep 600'"))
        .config_of("m2", post("sh -c 'echo told >> post.log; exit 3'"))
        .prepare()
        .await?;
    let site = cluster.site();
    site.make_dir("initdb.d")?;
    site.write_file(
        "initdb.d/20-again.sh",
        "psql -X -d \"$POSTGRES_DB\" -c \"INSERT INTO first VALUES ('sh')\"\n",
    )?;
    site.write_file(
        "initdb.d/10-first.sql",
        "CREATE TABLE first (who text);\nINSERT INTO first VALUES ('sql');\n",
    )?;
    site.write_file("initdb.d/README", "not run\n")?;
    let (m1, m2) = (cluster.member("m1")?, cluster.member("m2")?);
    m1.start().await?;
    eventually("m1 is in the middle of it", SOON, async || {
        let output = m1.output().await;
        ensure!(
            output.contains("running sh, as bootstrap.post_bootstrap says"),
            "{output}"
        );
        Ok(())
    })
    .await?;
    m1.kill_everything().await?;

    m2.start().await?;
    let status = m2.wait_ended(Duration::from_secs(60)).await?;
    ensure!(status.code() == Some(64), "{status}");
    ensure!(!m2.data_dir().exists(), "what failed is still in place");
    let keys = cluster.etcd().entries(PREFIX).await?;
    let left: Vec<&str> = keys.iter().map(|entry| &entry.key[PREFIX.len()..]).collect();
    ensure!(
        !left.contains(&"initialize") && !left.contains(&"leader") && !left.contains(&"config"),
        "{left:?}"
    );

    m2.alter_config(post("sh -c 'echo \"$0 $PGPASSFILE\" >> post.log'"))?;
    m2.start().await?;
    cluster.start_proxy().await?;
    cluster.settled_with(1).await?;
    ensure!(m2.sql("SELECT string_agg(who, ' ') FROM first").await? == "sql sh");
    let told = lines(&cluster, "post.log")?;
    let expected = format!("dbname=postgres user=postgres host={} port=", m2.postgres().ip());
    ensure!(
        told.len() == 2 && told[1].starts_with(&expected) && told[1].ends_with("pgpass.bootstrap"),
        "{told:?}"
    );
    ensure!(!m2.output().await.contains("super-secret-of-tests"));

    m1.start().await?;
    let leader = cluster.settled().await?;
    ensure!(leader.name() == "m2" && m1.output().await.contains("moves its own beginnings aside"));
    cluster.pass();
    Ok(())
}

/// Mounting needs root, and a kernel that has loop devices. Elsewhere this test shows nothing.
fn may_mount() -> bool {
    let possible = geteuid().is_root() && Path::new("/dev/loop-control").exists();
    if !possible {
        println!("skipped: filesystems of one's own need root and loop devices");
    }
    possible
}

/// What is kept of former data within a data directory.
fn kept_within(data_dir: &Path) -> Result<Vec<PathBuf>> {
    let mut kept = Vec::new();
    for entry in fs::read_dir(data_dir)? {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        if name.is_some_and(|name| name.starts_with("pgherd-aside-")) {
            kept.push(path);
        }
    }
    Ok(kept)
}

#[tokio::test]
#[ignore = "long: filesystems of their own, and a clone over former data"]
async fn a_data_directory_that_is_a_mount_point_changes_its_contents_and_keeps_the_former_ones() -> Result<()> {
    if !may_mount() {
        return Ok(());
    }
    let cluster = Cluster::builder()
        .members(2)
        .volumes(VolumeKind::Disk)
        .dcs(json!({"postgresql": {"use_pg_rewind": false}}))
        .prepare()
        .await?;
    let mount = |member: &Member| member.data_dir().parent().map(Path::to_owned).context("a parent");
    for member in cluster.members() {
        // PostgreSQL backs up all that lies there, and may not read what is root's.
        fs::remove_dir(mount(member)?.join("lost+found"))?;
        member.alter_config(json!({"postgresql": {"data_dir": mount(member)?}}))?;
        member.start().await?;
    }
    cluster.start_proxy().await?;
    let former = cluster.settled().await?;
    former
        .sql("CREATE TABLE kept AS SELECT generate_series(1, 1000) AS n")
        .await?;
    former.kill_everything().await?;
    cluster.next_leader(former.name()).await?;
    former.start().await?;
    let leader = cluster.settled().await?;
    ensure!(leader.name() != former.name() && former.sql("SELECT count(*) FROM kept").await? == "1000");
    let kept = kept_within(&mount(former)?)?;
    ensure!(
        kept.len() == 1 && kept.iter().all(|kept| kept.join("PG_VERSION").exists()),
        "{kept:?}"
    );
    cluster.pass();
    Ok(())
}
