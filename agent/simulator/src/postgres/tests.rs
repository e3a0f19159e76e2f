use super::*;

fn primary() -> Server {
    let mut server = Server {
        data: Some(Data::made(7, 1)),
        ..Server::default()
    };
    assert!(server.start(1));
    server.come_up(1, 2);
    server
}

fn standby_of(primary: &Server) -> Server {
    let mut server = Server {
        data: primary.data.as_ref().map(Data::copied),
        ..Server::default()
    };
    assert!(server.start(2));
    server.come_up(2, 99);
    server
}

fn names() -> Vec<String> {
    ["n1", "n2"].map(str::to_owned).to_vec()
}

#[test]
fn data_without_a_signal_comes_up_writable_and_with_it_as_standby() {
    let primary = primary();
    assert_eq!(primary.mode(), Some(Mode::Primary));
    assert_eq!(primary.writable_run(), Some(1));
    let standby = standby_of(&primary);
    assert_eq!((standby.mode(), standby.writable_run()), (Some(Mode::Standby), None));
}

#[test]
fn a_promotion_forks_where_the_log_ends() {
    let mut standby = standby_of(&primary());
    assert!(!standby.become_primary(2, 50), "not asked for");
    if let Some(run) = &mut standby.run {
        run.mode = Mode::Promoting;
    }
    assert!(standby.become_primary(2, 50));
    let data = standby.data.as_ref().expect("it has data");
    assert_eq!(
        (data.timeline, data.ended.clone(), data.standby_signal),
        (2, vec![(1, 2)], false)
    );
}

#[test]
fn backends_outlive_their_postmaster_and_keep_another_from_starting() {
    let mut server = primary();
    assert!(server.lose_postmaster(Time::millis(4000)));
    assert!(server.session_lives(1) && server.writable_run().is_none() && server.is_left());
    assert!(!server.start(3), "its processes are left");
    server.gone();
    assert!(!server.session_lives(1));
    assert!(server.start(3));
    server.come_up(3, 60);
    let data = server.data.as_ref().expect("it has data");
    assert_eq!(
        (data.timeline, data.log.len()),
        (1, 3),
        "a restart in place stays on its timeline"
    );
}

#[test]
fn a_stop_in_order_leaves_its_checkpoint_as_last_record() {
    let mut server = primary();
    server.write_shutdown(1, 70, true);
    server.gone();
    let data = server.data.as_ref().expect("it has data");
    assert_eq!(data.state, ControlState::ShutDown);
    assert_eq!(data.checkpoint.0, data.log.len() - 1);
}

#[test]
fn a_commit_waits_for_the_standby_that_is_named_and_not_without_a_name() {
    let mut server = primary();
    assert!(server.commit_may_return(5, &names()));
    server.sync_setting = "n2".to_owned();
    assert!(server.commit_may_return(5, &names()), "written, and not read yet");
    server.reload();
    server.reload_checkpointer(1);
    assert!(!server.commit_may_return(5, &names()));
    if let Some(run) = &mut server.run {
        run.senders.insert(1, Sender { flushed: 6 });
    }
    assert!(server.commit_may_return(5, &names()) && !server.commit_may_return(6, &names()));
}

#[test]
fn what_is_replaced_is_kept_aside() {
    let mut server = primary();
    server.gone();
    server.replace_data(Data::made(7, 500));
    assert!(server.aside.iter().any(|old| old.holds(2)));
}

#[test]
fn commits_wait_once_the_checkpointer_has_read_the_setting_too() {
    let mut server = primary();
    let reload = |server: &mut Server, setting: &str| {
        server.sync_setting = setting.to_owned();
        server.reload()
    };
    let seen = |server: &Server| {
        let taken_over = server.run.as_ref().is_some_and(Run::has_taken_over);
        (server.commit_may_return(1, &names()), taken_over)
    };
    assert!(reload(&mut server, "n2"));
    assert_eq!(seen(&server), (true, false));
    server.reload_checkpointer(9);
    assert_eq!(seen(&server), (true, false), "it is another postmaster's");
    server.reload_checkpointer(1);
    assert_eq!(seen(&server), (false, true));
    assert!(!reload(&mut server, "ANY 1 (n2,n3)"), "they wait already");
    assert_eq!(seen(&server), (false, true));
    assert!(!reload(&mut server, ""));
    assert_eq!(seen(&server), (true, true));
}
