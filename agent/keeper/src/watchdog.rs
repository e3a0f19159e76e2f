//! The kernel's watchdog: resets the machine when deadlines are no longer confirmed and PostgreSQL is not known to have
//! ended. It is the last resort, for the case that neither keeper nor sentinel runs.
//!
//! It is opened when a deadline is confirmed for the first time, pinged when one is confirmed that lies further ahead, and
//! stopped when no deadline is in force and PostgreSQL has ended or is left alone. The fence begins before it would fire,
//! so that losing etcd ends PostgreSQL and not the machine.

mod device;
mod ioctl;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use device::{Device, exists, is_promising};
use rustix::io::Errno;

use crate::clock::{Boottime, nanos};
use crate::log::Log;
use crate::protocol::{Malformed, WatchdogMode, WatchdogSettings, WatchdogState};
use crate::wire::{Reader, Writer};

/// How long a device that has failed is not tried again.
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// A watchdog is required, and there is none that would fire in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unusable;

/// Why a device is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The system refused.
    System(Errno),
    /// There is no time between the renewals.
    TooShort {
        timeout: Duration,
    },
    /// It would fire after the deadline.
    TooLong {
        timeout: Duration,
    },
    NoTimer,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::System(error) => write!(out, "{error}"),
            Self::TooShort { timeout } => write!(out, "a timeout of {timeout:?} leaves no time to renew a deadline"),
            Self::TooLong { timeout } => write!(out, "its timeout of {timeout:?} is longer than a deadline lasts"),
            Self::NoTimer => write!(out, "there is no timer behind it"),
        }
    }
}

/// A device in use, with the settings that have been applied to it.
#[derive(Debug)]
struct Running {
    device: Device,
    applied: WatchdogSettings,
    /// How long after a ping it fires; `None` for a file that only looks like one.
    timeout: Option<Duration>,
}

/// The watchdog as one keeper writes it down for the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct WatchdogRecord {
    settings: Option<WatchdogSettings>,
    running: Option<(WatchdogSettings, Option<Duration>)>,
}

impl WatchdogRecord {
    /// Whether the open device is handed over too.
    pub(crate) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    pub(crate) fn encode(&self, writer: &mut Writer<'_>) {
        writer.option(self.settings.as_ref(), |writer, settings| settings.encode(writer));
        writer.option(self.running.as_ref(), |writer, (applied, timeout)| {
            applied.encode(writer);
            writer.option(*timeout, |writer, timeout| writer.u64(nanos(timeout)));
        });
    }

    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            settings: reader.option(WatchdogSettings::decode)?,
            running: reader.option(|reader| {
                let applied = WatchdogSettings::decode(reader)?;
                Ok((applied, reader.option(|reader| reader.u64().map(Duration::from_nanos))?))
            })?,
        })
    }
}

/// The watchdog, whether it is used or not.
#[derive(Debug)]
pub(crate) struct Watchdog {
    settings: Option<WatchdogSettings>,
    running: Option<Running>,
    retry_at: Option<Boottime>,
    /// What was said about it last, so that it is said once.
    fault: Option<Fault>,
}

impl Watchdog {
    /// None is used until an agent has said how.
    pub(crate) fn new() -> Self {
        Self {
            settings: None,
            running: None,
            retry_at: None,
            fault: None,
        }
    }

    /// The watchdog of the keeper before an upgrade, with its open device. It has run on meanwhile, so that it fires if
    /// the new program hangs, and nobody else could open it.
    pub(crate) fn take_over(record: WatchdogRecord, device: Option<OwnedFd>) -> Self {
        let running = record.running.zip(device).map(|((applied, timeout), file)| Running {
            device: Device::taken(file, applied.driver),
            applied,
            timeout,
        });
        Self {
            settings: record.settings,
            running,
            ..Self::new()
        }
    }

    /// What `take_over` needs.
    pub(crate) fn record(&self) -> WatchdogRecord {
        let running = self.running.as_ref();
        WatchdogRecord {
            settings: self.settings.clone(),
            running: running.map(|running| (running.applied.clone(), running.timeout)),
        }
    }

    /// The open device.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.running.as_ref().map(|running| running.device.as_fd())
    }

    /// New settings count from the next renewal on, but to be switched off counts at once.
    pub(crate) fn set(&mut self, settings: WatchdogSettings, log: &Log) {
        if settings.mode == WatchdogMode::Off {
            self.stop(log);
        }
        if self.settings.as_ref() != Some(&settings) {
            (self.retry_at, self.fault) = (None, None);
        }
        self.settings = Some(settings);
    }

    /// Starts or pings it, for a deadline that is about to be confirmed. Returns when it will fire, if it will.
    pub(crate) fn renew(&mut self, now: Boottime, log: &Log) -> Result<Option<Boottime>, Unusable> {
        let Some(settings) = self.settings.clone() else {
            return Ok(None);
        };
        if settings.mode == WatchdogMode::Off {
            return Ok(None);
        }
        match self.start_or_ping(&settings, now, log) {
            Ok(timeout) => Ok(timeout.map(|timeout| now.plus(timeout))),
            Err(fault) => {
                if self.fault != Some(fault) {
                    let device = settings.device.display();
                    log.line(format_args!("the watchdog {device} is not used: {fault}"));
                }
                self.fault = Some(fault);
                match settings.mode {
                    WatchdogMode::Required => Err(Unusable),
                    WatchdogMode::Automatic | WatchdogMode::Off => Ok(None),
                }
            }
        }
    }

    /// Stops it: PostgreSQL has ended, or nobody is to watch it.
    pub(crate) fn stop(&mut self, log: &Log) {
        let Some(running) = self.running.take() else { return };
        match running.device.stop() {
            Ok(()) => log.line(format_args!("the watchdog is stopped")),
            Err(error) => log.line(format_args!("the watchdog could not be stopped: {error}")),
        }
    }

    /// Whether a deadline would be guarded.
    pub(crate) fn state(&self, now: Boottime) -> WatchdogState {
        let settings = match &self.settings {
            Some(settings) if settings.mode != WatchdogMode::Off => settings,
            Some(_) | None => return WatchdogState::Off,
        };
        let resting = self.retry_at.is_some_and(|retry_at| now < retry_at);
        let promising = || !resting && wanted_timeout(settings).is_ok() && is_promising(settings);
        if self.running.is_some() || promising() {
            WatchdogState::Usable
        } else {
            WatchdogState::Unusable
        }
    }

    fn start_or_ping(
        &mut self,
        settings: &WatchdogSettings,
        now: Boottime,
        log: &Log,
    ) -> Result<Option<Duration>, Fault> {
        let pinged = self.running.as_ref().map(|running| {
            let usual = running.applied == *settings;
            (usual, running.device.ping())
        });
        match pinged {
            Some((true, Ok(()))) => return Ok(self.running.as_ref().and_then(|running| running.timeout)),
            Some((false, Ok(()))) => {}
            // It runs on and will fire, unless it can be opened again.
            Some((_, Err(error))) => {
                log.line(format_args!("the watchdog could not be pinged: {error}"));
                self.running = None;
            }
            None => {}
        }
        if let (Some(retry_at), Some(fault)) = (self.retry_at, self.fault)
            && now < retry_at
        {
            return Err(fault);
        }
        match self.start(settings, log) {
            Ok(timeout) => {
                (self.retry_at, self.fault) = (None, None);
                Ok(timeout)
            }
            Err(fault) => {
                self.stop(log);
                self.retry_at = Some(now.plus(RETRY_AFTER));
                Err(fault)
            }
        }
    }

    /// Opens it unless it is open, and sets it.
    fn start(&mut self, settings: &WatchdogSettings, log: &Log) -> Result<Option<Duration>, Fault> {
        // That there is none says more than that it could not be set.
        exists(settings).map_err(Fault::System)?;
        let wanted = wanted_timeout(settings)?;
        let same =
            |running: &Running| running.applied.device == settings.device && running.device.driver() == settings.driver;
        if !self.running.as_ref().is_some_and(same) {
            // Two names may lead to one device, which can be open once only.
            self.stop(log);
            let device = Device::open(settings).map_err(Fault::System)?;
            self.running = Some(Running {
                device,
                applied: settings.clone(),
                timeout: None,
            });
        }
        let Some(running) = &mut self.running else {
            return Err(Fault::NoTimer);
        };
        let timeout = running.device.set_timeout(wanted).map_err(Fault::System)?;
        running.timeout = timeout;
        running.applied = settings.clone();
        check(settings, timeout)?;
        running.device.ping().map_err(Fault::System)?;
        match timeout {
            Some(timeout) => log.line(format_args!(
                "the watchdog {} fires {timeout:?} after a ping",
                settings.device.display()
            )),
            None => log.line(format_args!(
                "{} is pinged as a watchdog, but nothing says that it is one",
                settings.device.display()
            )),
        }
        Ok(timeout)
    }
}

/// Whole seconds, which is what devices count in.
fn wanted_timeout(settings: &WatchdogSettings) -> Result<Duration, Fault> {
    let timeout = Duration::from_secs(settings.timeout.as_secs());
    if timeout.is_zero() || timeout < settings.timeout_min {
        return Err(Fault::TooShort { timeout });
    }
    Ok(timeout)
}

/// Whether a device does that has this timeout. One that fires too late is better than none, unless it must be sure.
fn check(settings: &WatchdogSettings, timeout: Option<Duration>) -> Result<(), Fault> {
    let required = settings.mode == WatchdogMode::Required;
    match timeout {
        None if required => Err(Fault::NoTimer),
        Some(timeout) if timeout < settings.timeout_min => Err(Fault::TooShort { timeout }),
        Some(timeout) if required && timeout > settings.timeout => Err(Fault::TooLong { timeout }),
        None | Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use proptest::prelude::*;

    use super::*;
    use crate::protocol::WatchdogDriver;

    const TWENTY_FIVE: Duration = Duration::from_secs(25);

    fn at(seconds: u64) -> Boottime {
        Boottime::from_nanos(seconds * 1_000_000_000)
    }

    fn settings(mode: WatchdogMode, driver: WatchdogDriver, device: &Path) -> WatchdogSettings {
        WatchdogSettings {
            mode,
            driver,
            device: device.to_owned(),
            timeout: TWENTY_FIVE,
            timeout_min: Duration::from_secs(13),
        }
    }

    fn told(settings: WatchdogSettings) -> Watchdog {
        let mut watchdog = Watchdog::new();
        watchdog.set(settings, &Log::new());
        watchdog
    }

    fn file() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a directory for the test");
        let path = dir.path().join("watchdog");
        fs::write(&path, "").expect("the directory can be written");
        (dir, path)
    }

    fn written(path: &Path) -> String {
        fs::read_to_string(path).expect("only text is written")
    }

    #[test]
    fn a_device_is_opened_set_pinged_and_stopped() {
        let (_dir, path) = file();
        let mut watchdog = told(settings(WatchdogMode::Required, WatchdogDriver::Testing, &path));
        assert_eq!(
            (watchdog.state(at(1)), written(&path).as_str()),
            (WatchdogState::Usable, "")
        );
        assert_eq!(watchdog.renew(at(1), &Log::new()), Ok(Some(at(26))));
        assert_eq!(watchdog.renew(at(11), &Log::new()), Ok(Some(at(36))));
        watchdog.stop(&Log::new());
        watchdog.stop(&Log::new());
        assert_eq!(written(&path), "V25\n11V");
    }

    #[test]
    fn a_changed_time_is_set_by_the_next_renewal_and_another_device_takes_the_place() {
        let ((_dir, first), (_other_dir, second)) = (file(), file());
        let mut watchdog = told(settings(WatchdogMode::Automatic, WatchdogDriver::Testing, &first));
        watchdog.renew(at(1), &Log::new()).expect("it is not required");
        let mut longer = settings(WatchdogMode::Automatic, WatchdogDriver::Testing, &first);
        longer.timeout = Duration::from_millis(55_900);
        watchdog.set(longer.clone(), &Log::new());
        assert_eq!(written(&first), "V25\n1");
        assert_eq!(watchdog.renew(at(10), &Log::new()), Ok(Some(at(65))));
        assert_eq!(written(&first), "V25\n11V55\n1");
        longer.device.clone_from(&second);
        watchdog.set(longer.clone(), &Log::new());
        watchdog.renew(at(20), &Log::new()).expect("it is not required");
        assert_eq!(
            (written(&first), written(&second)),
            ("V25\n11V55\n11V".into(), "V55\n1".into())
        );
        longer.mode = WatchdogMode::Off;
        watchdog.set(longer, &Log::new());
        assert_eq!(written(&second), "V55\n1V");
        assert_eq!(watchdog.renew(at(30), &Log::new()), Ok(None));
        assert_eq!(watchdog.state(at(30)), WatchdogState::Off);
    }

    #[test]
    fn a_file_without_a_timer_is_tolerated_unless_a_watchdog_is_required() {
        let (_dir, path) = file();
        let mut watchdog = told(settings(WatchdogMode::Automatic, WatchdogDriver::Linux, &path));
        assert_eq!(watchdog.state(at(1)), WatchdogState::Usable);
        assert_eq!(watchdog.renew(at(1), &Log::new()), Ok(None));
        assert_eq!(written(&path), "1");
        let mut watchdog = told(settings(WatchdogMode::Required, WatchdogDriver::Linux, &path));
        assert_eq!(watchdog.state(at(1)), WatchdogState::Unusable);
        assert_eq!(watchdog.renew(at(1), &Log::new()), Err(Unusable));
    }

    #[test]
    fn a_device_that_fails_is_not_tried_again_for_a_while() {
        let (dir, path) = file();
        let gone = dir.path().join("nothing");
        let mut watchdog = told(settings(WatchdogMode::Required, WatchdogDriver::Testing, &gone));
        assert_eq!(watchdog.state(at(1)), WatchdogState::Unusable);
        assert_eq!(watchdog.renew(at(1), &Log::new()), Err(Unusable));
        fs::rename(&path, &gone).expect("both lie in one directory");
        assert_eq!(watchdog.renew(at(60), &Log::new()), Err(Unusable));
        assert_eq!(watchdog.state(at(60)), WatchdogState::Unusable);
        assert_eq!(watchdog.state(at(61)), WatchdogState::Usable);
        assert_eq!(watchdog.renew(at(61), &Log::new()), Ok(Some(at(86))));
        let mut watchdog = told(settings(WatchdogMode::Automatic, WatchdogDriver::Linux, &path));
        assert_eq!(watchdog.renew(at(1), &Log::new()), Ok(None), "it is not required");
    }

    #[test]
    fn a_timeout_has_to_leave_time_to_renew_and_to_come_before_the_deadline() {
        let seconds = Duration::from_secs;
        let with = |mode| settings(mode, WatchdogDriver::Linux, Path::new("/dev/watchdog"));
        let (automatic, required) = (with(WatchdogMode::Automatic), with(WatchdogMode::Required));
        assert_eq!(check(&required, Some(seconds(25))), Ok(()));
        assert_eq!(check(&required, Some(seconds(13))), Ok(()));
        assert_eq!(
            check(&required, Some(seconds(26))),
            Err(Fault::TooLong { timeout: seconds(26) })
        );
        assert_eq!(
            check(&automatic, Some(seconds(60))),
            Ok(()),
            "late is better than never"
        );
        let too_short = Err(Fault::TooShort { timeout: seconds(12) });
        assert_eq!(check(&automatic, Some(seconds(12))), too_short);
        let mut hasty = automatic;
        hasty.timeout = Duration::from_millis(12_900);
        assert_eq!(wanted_timeout(&hasty), Err(Fault::TooShort { timeout: seconds(12) }));
    }

    proptest! {
        #[test]
        fn a_record_comes_back_as_it_was(timeouts in any::<(u64, u64)>(), running in prop::option::of(prop::option::of(any::<u64>()))) {
            let mut settings = settings(WatchdogMode::Automatic, WatchdogDriver::Testing, Path::new("/x"));
            settings.timeout = Duration::from_nanos(timeouts.0);
            settings.timeout_min = Duration::from_nanos(timeouts.1);
            let record = WatchdogRecord {
                settings: Some(settings.clone()),
                running: running.map(|timeout| (settings, timeout.map(Duration::from_nanos))),
            };
            let mut bytes = Vec::new();
            let mut writer = Writer::new(&mut bytes);
            record.encode(&mut writer);
            prop_assert_eq!(writer.finish(), Ok(()));
            let mut reader = Reader::new(&bytes);
            prop_assert_eq!(WatchdogRecord::decode(&mut reader), Ok(record));
            prop_assert_eq!(reader.end(), Ok(()));
        }
    }
}
