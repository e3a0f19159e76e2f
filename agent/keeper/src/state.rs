//! What one keeper tells the next in an upgrade. Pure: it is written to bytes and read from them.
//!
//! Reading is total, as with messages: whatever the bytes are, it returns a state or says what is wrong.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use crate::child::{ChildRecord, ServiceRecord};
use crate::clock::{Boottime, nanos};
use crate::fence::Fence;
use crate::instance::InstanceRecord;
use crate::keeper::KeeperConfig;
use crate::lock_file::Segment;
use crate::postmaster::PostmasterRecord;
use crate::protocol::{self, Malformed, TooLong, memo, os_string, pid};
use crate::seat::OUTBOX_MAX;
use crate::surroundings::Surroundings;
use crate::watchdog::WatchdogRecord;
use crate::wire::{Reader, Writer};

/// The version of all that keepers before and after an upgrade have to agree on: this state, the layout of the shared
/// word, which the sentinel goes on reading, and how the state is handed over.
pub(crate) const STATE_VERSION: u8 = 2;
/// The longest state, in bytes: an outbox of the longest reports, the memo and arguments of any sensible length.
pub(crate) const STATE_BYTES_MAX: usize = 1024 * 1024;

/// Everything that the keeper knows while nothing is under way: no end, no fence that has begun, no stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    /// What the keeper was started with. Configuration that has changed since, or become wrong, changes nothing.
    pub(crate) config: KeeperConfig,
    pub(crate) memo: Vec<u8>,
    pub(crate) fence: Fence,
    pub(crate) postmaster: Option<PostmasterRecord>,
    pub(crate) instance: InstanceRecord,
    pub(crate) watchdog: WatchdogRecord,
    pub(crate) surroundings: Surroundings,
    pub(crate) agent: ServiceRecord,
    pub(crate) proxy: Option<ServiceRecord>,
    pub(crate) sentinel: ServiceRecord,
    /// Whether the agent's socket is handed over too.
    pub(crate) linked: bool,
    /// Reports that the agent's socket has not taken yet.
    pub(crate) outbox: Vec<Vec<u8>>,
}

impl State {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, TooLong> {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes);
        writer.u8(STATE_VERSION);
        // The agent stays, and speaks the protocol that it was started with.
        writer.u8(protocol::VERSION);
        encode_config(&self.config, &mut writer);
        writer.bytes(&self.memo);
        self.fence.encode(&mut writer);
        writer.option(self.postmaster, encode_postmaster);
        encode_instance(&mut writer, &self.instance);
        self.watchdog.encode(&mut writer);
        self.surroundings.encode(&mut writer);
        encode_service(&mut writer, self.agent);
        writer.option(self.proxy, encode_service);
        encode_service(&mut writer, self.sentinel);
        writer.u8(u8::from(self.linked));
        writer.count(self.outbox.len());
        for report in &self.outbox {
            writer.bytes(report);
        }
        writer.finish_within(STATE_BYTES_MAX)?;
        Ok(bytes)
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        for ours in [STATE_VERSION, protocol::VERSION] {
            let version = reader.u8()?;
            if version != ours {
                return Err(Malformed::Version { version });
            }
        }
        let state = Self {
            config: decode_config(&mut reader)?,
            memo: memo(&mut reader)?,
            fence: Fence::decode(&mut reader)?,
            postmaster: reader.option(decode_postmaster)?,
            instance: decode_instance(&mut reader)?,
            watchdog: WatchdogRecord::decode(&mut reader)?,
            surroundings: Surroundings::decode(&mut reader)?,
            agent: decode_service(&mut reader)?,
            proxy: reader.option(decode_service)?,
            sentinel: decode_service(&mut reader)?,
            linked: reader.flag()?,
            outbox: (0..reader.count_within(2, OUTBOX_MAX)?)
                .map(|_| reader.bytes().map(<[u8]>::to_vec))
                .collect::<Result<_, _>>()?,
        };
        reader.end()?;
        Ok(state)
    }
}

fn encode_config(config: &KeeperConfig, writer: &mut Writer<'_>) {
    for path in [&config.program, &config.data_dir, &config.runtime_dir] {
        writer.bytes(path.as_os_str().as_bytes());
    }
    for args in [&config.keeper_args, &config.agent_args, &config.sentinel_args] {
        encode_args(writer, args);
    }
    writer.option(config.proxy_args.as_deref(), encode_args);
    writer.u64(nanos(config.stop_timeout));
}

fn decode_config(reader: &mut Reader<'_>) -> Result<KeeperConfig, Malformed> {
    Ok(KeeperConfig {
        program: path(reader)?,
        data_dir: path(reader)?,
        runtime_dir: path(reader)?,
        keeper_args: decode_args(reader)?,
        agent_args: decode_args(reader)?,
        sentinel_args: decode_args(reader)?,
        proxy_args: reader.option(decode_args)?,
        stop_timeout: Duration::from_nanos(reader.u64()?),
    })
}

fn encode_args(writer: &mut Writer<'_>, args: &[OsString]) {
    writer.count(args.len());
    for arg in args {
        writer.bytes(arg.as_bytes());
    }
}

fn decode_args(reader: &mut Reader<'_>) -> Result<Vec<OsString>, Malformed> {
    (0..reader.count(2)?).map(|_| os_string(reader)).collect()
}

fn path(reader: &mut Reader<'_>) -> Result<PathBuf, Malformed> {
    reader.c_bytes().map(|bytes| PathBuf::from(OsStr::from_bytes(bytes)))
}

fn encode_child(writer: &mut Writer<'_>, child: ChildRecord) {
    writer.i32(child.pid.as_raw_nonzero().get());
    writer.u64(child.born);
    writer.u64(child.started.as_nanos());
}

fn decode_child(reader: &mut Reader<'_>) -> Result<ChildRecord, Malformed> {
    Ok(ChildRecord {
        pid: pid(reader)?,
        born: reader.u64()?,
        started: Boottime::from_nanos(reader.u64()?),
    })
}

fn encode_postmaster(writer: &mut Writer<'_>, postmaster: PostmasterRecord) {
    encode_child(writer, postmaster.process);
    writer.u8(u8::from(postmaster.adopted));
}

fn decode_postmaster(reader: &mut Reader<'_>) -> Result<PostmasterRecord, Malformed> {
    Ok(PostmasterRecord {
        process: decode_child(reader)?,
        adopted: reader.flag()?,
    })
}

fn encode_instance(writer: &mut Writer<'_>, instance: &InstanceRecord) {
    writer.count(instance.known.len());
    for (pid, born) in &instance.known {
        writer.i32(*pid);
        writer.u64(*born);
    }
    writer.option(instance.segment, |writer, segment| {
        writer.i32(segment.id);
        writer.i32(segment.creator);
    });
}

fn decode_instance(reader: &mut Reader<'_>) -> Result<InstanceRecord, Malformed> {
    Ok(InstanceRecord {
        known: (0..reader.count(12)?)
            .map(|_| Ok((reader.i32()?, reader.u64()?)))
            .collect::<Result<_, _>>()?,
        segment: reader.option(|reader| {
            Ok(Segment {
                id: reader.i32()?,
                creator: reader.i32()?,
            })
        })?,
    })
}

fn encode_service(writer: &mut Writer<'_>, service: ServiceRecord) {
    writer.option(service.child, encode_child);
    writer.u64(service.start_at.as_nanos());
    writer.u64(nanos(service.pause));
}

fn decode_service(reader: &mut Reader<'_>) -> Result<ServiceRecord, Malformed> {
    Ok(ServiceRecord {
        child: reader.option(decode_child)?,
        start_at: Boottime::from_nanos(reader.u64()?),
        pause: Duration::from_nanos(reader.u64()?),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use proptest::prelude::*;
    use rustix::process::Pid;

    use super::*;
    use crate::fence::Armed;

    fn c_string() -> impl Strategy<Value = OsString> {
        prop::collection::vec(1..=255_u8, 0..20).prop_map(OsString::from_vec)
    }

    fn args() -> impl Strategy<Value = Vec<OsString>> {
        prop::collection::vec(c_string(), 0..4)
    }

    fn config() -> impl Strategy<Value = KeeperConfig> {
        let paths = (c_string(), c_string(), c_string());
        let lists = (args(), args(), args(), prop::option::of(args()));
        (paths, lists, any::<u64>()).prop_map(|(paths, lists, stop_timeout)| KeeperConfig {
            program: paths.0.into(),
            data_dir: paths.1.into(),
            runtime_dir: paths.2.into(),
            keeper_args: lists.0,
            agent_args: lists.1,
            sentinel_args: lists.2,
            proxy_args: lists.3,
            stop_timeout: Duration::from_nanos(stop_timeout),
        })
    }

    fn child() -> impl Strategy<Value = ChildRecord> {
        (1..i32::MAX, any::<u64>(), any::<u64>()).prop_map(|(pid, born, started)| ChildRecord {
            pid: Pid::from_raw(pid).expect("the range starts at one"),
            born,
            started: Boottime::from_nanos(started),
        })
    }

    fn service() -> impl Strategy<Value = ServiceRecord> {
        (prop::option::of(child()), any::<u64>(), any::<u64>()).prop_map(|(child, start_at, pause)| ServiceRecord {
            child,
            start_at: Boottime::from_nanos(start_at),
            pause: Duration::from_nanos(pause),
        })
    }

    /// Fences as they come about: terms that have become final one after the other, then perhaps one that is in force.
    fn fence() -> impl Strategy<Value = Fence> {
        (0..80_u64, any::<(bool, bool, bool)>()).prop_map(|(finals, (armed, paused, adopted))| {
            let mut fence = Fence::new();
            let start = Boottime::from_nanos(1);
            let margin = Duration::from_nanos(1);
            for term in 0..=finals {
                let deadline = start.plus(Duration::from_nanos(term + 2));
                if term < finals || armed {
                    let asked = Armed { term, deadline, margin };
                    fence.arm(asked, start, || false).expect("each term is new");
                }
                if term < finals {
                    fence.begin(deadline).expect("it is due");
                    fence.instance_ended();
                }
            }
            fence.instance_adopted(adopted);
            if paused {
                fence.pause(start).expect("none has begun");
            }
            fence
        })
    }

    fn postmaster() -> impl Strategy<Value = PostmasterRecord> {
        (child(), any::<bool>()).prop_map(|(process, adopted)| PostmasterRecord { process, adopted })
    }

    fn instance() -> impl Strategy<Value = InstanceRecord> {
        let segment = prop::option::of(any::<(i32, i32)>());
        (prop::collection::vec(any::<(i32, u64)>(), 0..9), segment).prop_map(|(known, segment)| InstanceRecord {
            known,
            segment: segment.map(|(id, creator)| Segment { id, creator }),
        })
    }

    fn state() -> impl Strategy<Value = State> {
        let memo = prop::collection::vec(any::<u8>(), 0..60);
        let outbox = prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..=OUTBOX_MAX);
        let services = (service(), prop::option::of(service()), service());
        (
            config(),
            memo,
            fence(),
            (prop::option::of(postmaster()), instance()),
            services,
            any::<bool>(),
            outbox,
        )
            .prop_map(
                |(config, memo, fence, (postmaster, instance), (agent, proxy, sentinel), linked, outbox)| State {
                    config,
                    memo,
                    fence,
                    postmaster,
                    instance,
                    watchdog: WatchdogRecord::default(),
                    surroundings: Surroundings::default(),
                    agent,
                    proxy,
                    sentinel,
                    linked,
                    outbox,
                },
            )
    }

    proptest! {
        #[test]
        fn a_state_comes_back_as_it_was_and_no_prefix_of_it_is_one(state in state(), cut in any::<prop::sample::Index>()) {
            let mut bytes = state.encode().expect("the generator stays within the limits");
            prop_assert_eq!(State::decode(&bytes), Ok(state));
            prop_assert!(State::decode(&bytes[..cut.index(bytes.len())]).is_err());
            bytes.push(0);
            prop_assert_eq!(State::decode(&bytes), Err(Malformed::Trailing { bytes: 1 }));
        }

        #[test]
        fn a_changed_byte_is_an_error_or_another_state(state in state(), at in any::<prop::sample::Index>(), to in any::<u8>()) {
            let mut bytes = state.encode().expect("the generator stays within the limits");
            let at = at.index(bytes.len());
            let changed = bytes[at] != to;
            bytes[at] = to;
            prop_assert_eq!(State::decode(&bytes) != Ok(state), changed);
        }

        #[test]
        fn any_bytes_are_an_error_or_a_state(rest in prop::collection::vec(any::<u8>(), 0..400)) {
            let bytes = [&[STATE_VERSION, protocol::VERSION][..], &rest].concat();
            if let Ok(state) = State::decode(&bytes) {
                prop_assert_eq!(state.encode(), Ok(bytes));
            }
        }
    }

    #[test]
    fn another_release_may_be_unable_to_go_on() {
        for bytes in [
            [STATE_VERSION + 1, protocol::VERSION],
            [STATE_VERSION, protocol::VERSION + 1],
        ] {
            let refused = State::decode(&bytes);
            assert!(matches!(refused, Err(Malformed::Version { .. })), "{refused:?}");
        }
    }
}
