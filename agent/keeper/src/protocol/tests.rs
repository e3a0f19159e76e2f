use std::path::PathBuf;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::clock::Boottime;

fn c_string() -> impl Strategy<Value = OsString> {
    prop::collection::vec(1..=255_u8, 0..40).prop_map(OsString::from_vec)
}

fn env_name() -> impl Strategy<Value = OsString> {
    "[A-Z_]{1,12}".prop_map(OsString::from)
}

fn request() -> impl Strategy<Value = Request> {
    let start = (
        any::<bool>(),
        c_string(),
        prop::collection::vec(c_string(), 0..6),
        prop::collection::vec((env_name(), c_string()), 0..6),
    );
    let signal = prop_oneof![
        Just(PostmasterSignal::Reload),
        Just(PostmasterSignal::Promote),
        Just(PostmasterSignal::StopFast),
        Just(PostmasterSignal::StopImmediate),
    ];
    prop_oneof![
        any::<(u64, u64, u64)>().prop_map(|(term, deadline, margin)| Request::Arm {
            term,
            deadline: Boottime::from_nanos(deadline),
            margin: Duration::from_nanos(margin),
        }),
        Just(Request::Disarm),
        start.prop_map(|(writable, program, args, env)| {
            Request::Start(Start {
                writable,
                program: PathBuf::from(program),
                args,
                env,
            })
        }),
        signal.prop_map(Request::Signal),
        Just(Request::End),
        prop::collection::vec(any::<u8>(), 0..=MEMO_BYTES_MAX).prop_map(|memo| Request::Remember { memo }),
        any::<(u8, bool)>().prop_map(|(code, keep_postgres)| Request::Leave { code, keep_postgres }),
        Just(Request::Pause),
        watchdog_settings().prop_map(Request::Watchdog),
        any::<bool>().prop_map(|writable| Request::Adopt { writable }),
    ]
}

fn watchdog_settings() -> impl Strategy<Value = WatchdogSettings> {
    let mode = prop_oneof![
        Just(WatchdogMode::Off),
        Just(WatchdogMode::Automatic),
        Just(WatchdogMode::Required)
    ];
    let driver = prop_oneof![Just(WatchdogDriver::Linux), Just(WatchdogDriver::Testing)];
    (mode, driver, c_string(), any::<(u64, u64)>()).prop_map(|(mode, driver, device, (timeout, least))| {
        WatchdogSettings {
            mode,
            driver,
            device: PathBuf::from(device),
            timeout: Duration::from_nanos(timeout),
            timeout_min: Duration::from_nanos(least),
        }
    })
}

fn watchdog_state() -> impl Strategy<Value = WatchdogState> {
    prop_oneof![
        Just(WatchdogState::Off),
        Just(WatchdogState::Usable),
        Just(WatchdogState::Unusable)
    ]
}

fn some_pid() -> impl Strategy<Value = Pid> {
    (1..i32::MAX).prop_map(|raw| Pid::from_raw(raw).expect("the range starts at one"))
}

fn hello() -> impl Strategy<Value = Report> {
    (
        prop::collection::vec(any::<u8>(), 0..200),
        prop::option::of(any::<(u64, u64)>()),
        prop::option::of(any::<u64>()),
        prop::option::of((some_pid(), any::<bool>())),
        any::<(bool, bool, bool)>(),
        prop::option::of(some_pid()),
        watchdog_state(),
    )
        .prop_map(|(memo, armed, fenced, postmaster, flags, stranger, watchdog)| {
            let (instance_left, stopping, paused) = flags;
            let armed = armed.map(|(term, deadline)| (term, Boottime::from_nanos(deadline)));
            Report::Hello(Hello {
                memo,
                armed,
                fenced,
                postmaster: postmaster.map(|(pid, _)| pid),
                instance_left,
                stopping,
                paused,
                stranger,
                adopted: postmaster.is_some_and(|(_, adopted)| adopted),
                watchdog,
            })
        })
}

fn refusal() -> impl Strategy<Value = Refusal> {
    prop_oneof![
        Just(Refusal::TermIsFinal),
        Just(Refusal::DeadlinePassed),
        Just(Refusal::OtherTermRuns),
        Just(Refusal::InstanceLeft),
        Just(Refusal::NotArmed),
        Just(Refusal::NoPostmaster),
        Just(Refusal::NotPaused),
        Just(Refusal::Stranger),
        Just(Refusal::WatchdogUnusable),
        any::<i32>().prop_map(Refusal::System),
    ]
}

fn report() -> impl Strategy<Value = Report> {
    let kind = prop_oneof![
        Just(RequestKind::Arm),
        Just(RequestKind::Disarm),
        Just(RequestKind::Start),
        Just(RequestKind::Signal),
        Just(RequestKind::Pause),
        Just(RequestKind::Leave),
        Just(RequestKind::Adopt),
    ];
    let exit = prop_oneof![
        any::<i32>().prop_map(ExitKind::Code),
        any::<i32>().prop_map(ExitKind::Signal),
        Just(ExitKind::Unknown),
    ];
    prop_oneof![
        hello(),
        any::<(u64, u64)>().prop_map(|(term, deadline)| Report::Armed {
            term,
            deadline: Boottime::from_nanos(deadline)
        }),
        Just(Report::Disarmed),
        some_pid().prop_map(|pid| Report::Started { pid }),
        (kind, refusal()).prop_map(|(what, why)| Report::Refused { what, why }),
        (some_pid(), exit).prop_map(|(pid, status)| Report::PostmasterExited { pid, status }),
        Just(Report::Ended),
        any::<u64>().prop_map(|term| Report::Fenced { term }),
        Just(Report::Stop),
        Just(Report::Reload),
        watchdog_state().prop_map(|state| Report::Watchdog { state }),
        Just(Report::Paused),
        prop::option::of(some_pid()).prop_map(|pid| Report::Stranger { pid }),
        some_pid().prop_map(|pid| Report::Adopted { pid }),
    ]
}

proptest! {
    #[test]
    fn a_request_comes_back_as_it_was_and_no_prefix_of_it_is_one(request in request(), cut in any::<prop::sample::Index>()) {
        let mut bytes = Vec::new();
        request.encode(&mut bytes).expect("the generator stays within the limits");
        prop_assert_eq!(Request::decode(&bytes), Ok(request));
        prop_assert!(Request::decode(&bytes[..cut.index(bytes.len())]).is_err());
        bytes.push(0);
        prop_assert_eq!(Request::decode(&bytes), Err(Malformed::Trailing { bytes: 1 }));
    }

    #[test]
    fn a_report_comes_back_as_it_was_and_no_prefix_of_it_is_one(report in report(), cut in any::<prop::sample::Index>()) {
        let mut bytes = Vec::new();
        report.encode(&mut bytes).expect("the generator stays within the limits");
        prop_assert_eq!(Report::decode(&bytes), Ok(report));
        prop_assert!(Report::decode(&bytes[..cut.index(bytes.len())]).is_err());
    }

    /// What decodes encodes to the same bytes: there is one spelling of each message, so none slips past a check.
    #[test]
    fn any_bytes_are_an_error_or_the_one_spelling_of_a_message(tag in 0..17_u8, rest in prop::collection::vec(any::<u8>(), 0..64)) {
        let message = [&[VERSION, tag][..], &rest].concat();
        let mut again = Vec::new();
        if let Ok(request) = Request::decode(&message) {
            request.encode(&mut again).expect("it came from a short message");
            prop_assert_eq!(&again, &message);
        }
        if let Ok(report) = Report::decode(&message) {
            report.encode(&mut again).expect("it came from a short message");
            prop_assert_eq!(&again, &message);
        }
    }

    #[test]
    fn a_changed_byte_is_an_error_or_another_message(request in request(), at in any::<prop::sample::Index>(), to in any::<u8>()) {
        let mut bytes = Vec::new();
        request.encode(&mut bytes).expect("the generator stays within the limits");
        let at = at.index(bytes.len());
        let changed = bytes[at] != to;
        bytes[at] = to;
        prop_assert_eq!(Request::decode(&bytes) != Ok(request), changed);
    }
}

#[test]
fn what_cannot_be_meant_is_named() {
    let table: [(&[u8], Malformed); 10] = [
        (&[], Malformed::Short),
        (&[VERSION - 1, 5], Malformed::Version { version: VERSION - 1 }),
        (&[VERSION], Malformed::Short),
        (&[VERSION, 0], Malformed::Tag { tag: 0 }),
        (&[VERSION, 4, 9], Malformed::Value { value: 9 }),
        (&[VERSION, 3, 2], Malformed::Value { value: 2 }),
        (&[VERSION, 3, 0, 1, 0, 0, 0, 0, 0, 0], Malformed::Nul),
        (&[VERSION, 3, 0, 0, 0, 255, 255, 0, 0], Malformed::Short),
        (&[VERSION, 3, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0], Malformed::EnvName),
        (&[VERSION, 6, 5, 0, 1], Malformed::Short),
    ];
    for (bytes, want) in table {
        assert_eq!(Request::decode(bytes), Err(want), "{bytes:?}");
    }
    assert_eq!(
        Report::decode(&[VERSION, 4, 255, 255, 255, 255]),
        Err(Malformed::Value { value: -1 })
    );
}

#[test]
fn limits_hold_on_both_sides() {
    let mut bytes = Vec::new();
    let memo = vec![7; MEMO_BYTES_MAX + 1];
    Request::Remember { memo }
        .encode(&mut bytes)
        .expect("it is the reader who limits a memo");
    assert_eq!(
        Request::decode(&bytes),
        Err(Malformed::Memo {
            bytes: MEMO_BYTES_MAX + 1
        })
    );
    let args = vec![OsString::from("x".repeat(40_000)); 2];
    let start = Start {
        writable: false,
        program: PathBuf::from("/bin/true"),
        args,
        env: Vec::new(),
    };
    assert_eq!(Request::Start(start).encode(&mut bytes), Err(TooLong));
    let memo = vec![7; 70_000];
    assert_eq!(Request::Remember { memo }.encode(&mut bytes), Err(TooLong));
}
