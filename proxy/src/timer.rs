//! A timer on the clock that deadlines live on. The runtime's own timers stand still while the machine is suspended.

use std::fs::File;
use std::io;

use pgherd_cluster::clock::Boottime;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::net::unix::pipe;

/// The runtime has no safe way to watch any descriptor, but it watches pipes without asking whether they are pipes: a timer
/// is read from, becomes readable and blocks in the same way.
pub(crate) struct BoottimeTimer(pipe::Receiver);

impl BoottimeTimer {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Boottime, flags)?;
        Ok(Self(pipe::Receiver::from_file_unchecked(File::from(timer))?))
    }

    /// Waits until `deadline`; at once when it has passed. May be dropped and called again.
    pub(crate) async fn until(&self, deadline: Boottime) -> io::Result<()> {
        const NANOS: u64 = 1_000_000_000;
        // A value of zero would disarm the timer.
        let nanos = deadline.as_nanos().max(1);
        let seconds = i64::try_from(nanos / NANOS).unwrap_or(i64::MAX);
        let subsecond = i64::try_from(nanos % NANOS).unwrap_or_default();
        let setting = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec {
                tv_sec: seconds,
                tv_nsec: subsecond,
            },
        };
        timerfd_settime(&self.0, TimerfdTimerFlags::ABSTIME, &setting)?;
        loop {
            self.0.readable().await?;
            // Setting the timer has taken back an expiry that nobody read, but not the runtime's memory of it.
            let mut expirations = [0_u8; 8];
            match self.0.try_read(&mut expirations) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return read.map(drop),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn it_ends_at_its_deadline_and_can_be_set_again() {
        let timer = BoottimeTimer::new().expect("a timer");
        let far = timer.until(Boottime::now() + Duration::from_secs(3600));
        assert!(tokio::time::timeout(Duration::from_millis(5), far).await.is_err());
        let deadline = Boottime::now() + Duration::from_millis(20);
        let near = tokio::time::timeout(Duration::from_secs(10), timer.until(deadline)).await;
        near.expect("well before ten seconds").expect("a timer");
        assert!(Boottime::now() >= deadline);
        let past = tokio::time::timeout(Duration::from_secs(10), timer.until(deadline)).await;
        past.expect("well before ten seconds").expect("a timer");
    }
}
