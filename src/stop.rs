//! How a run ends: the first who has a reason says so, everyone else winds up.

use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use anyhow::Context;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Why the machine stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off, or the user left with Ctrl-A X.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel panicked or oopsed; the text says how we know.
    GuestPanic(String),
    /// `--timeout` is over.
    TimedOut,
    /// The driver broke a rule of a device with `strict=on`.
    RuleBroken(String),
    /// Something of the host's failed.
    HostError(String),
}

impl Outcome {
    /// The exit code that the command line promises. A reset has none of its own: the machine starts again.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::PowerOff | Self::Reset => 0,
            Self::HostError(_) => 1,
            Self::GuestPanic(_) => 2,
            Self::TimedOut => 3,
            Self::RuleBroken(_) => 4,
        })
    }
}

/// Exit code when the guest powered off after its `--exec` command had failed.
pub const EXEC_FAILED: u8 = 5;

/// The one place where the end of a run is announced.
pub struct Stop {
    outcome: OnceLock<Outcome>,
    /// Readable once there is an outcome.
    announced: EventFd,
}

impl Stop {
    /// Nobody has stopped anything yet.
    ///
    /// # Errors
    /// The host has no event descriptor left.
    pub fn new() -> anyhow::Result<Arc<Self>> {
        let announced = EventFd::new(EFD_NONBLOCK).context("no event descriptor")?;
        Ok(Arc::new(Self { outcome: OnceLock::new(), announced }))
    }

    /// End the run with `outcome`, unless it is ending already.
    pub fn request(&self, outcome: Outcome) {
        if self.outcome.set(outcome).is_ok()
            && let Err(error) = self.announced.write(1)
        {
            log::error!("can't announce the end of the run: {error}");
        }
    }

    /// The outcome, once there is one.
    pub fn outcome(&self) -> Option<&Outcome> {
        self.outcome.get()
    }

    /// Readable once there is an outcome.
    pub fn event(&self) -> &EventFd {
        &self.announced
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_outcome_stands() {
        let stop = Stop::new().unwrap();
        assert_eq!(stop.outcome(), None);
        assert!(stop.event().read().is_err());
        stop.request(Outcome::TimedOut);
        stop.request(Outcome::PowerOff);
        assert_eq!(stop.outcome(), Some(&Outcome::TimedOut));
        assert_eq!(stop.event().read().unwrap(), 1);
    }
}
