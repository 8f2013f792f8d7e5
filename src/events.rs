//! What the main thread waits for while the CPUs run: the end of the run, and the outer reasons for it.

use std::fs::File;
use std::io::Read;
use std::os::fd::FromRawFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use event_manager::{EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::signal::{block_signal, create_sigset};
use vmm_sys_util::timerfd::TimerFd;

use crate::control::desk::Desk;
use crate::legacy::AgentPort;
use crate::stop::{Outcome, Stop};

/// An event loop of subscribers of any kind.
pub type EventLoop = event_manager::EventManager<Box<dyn MutEventSubscriber>>;

/// A loop that ends its wait when `stop` has an outcome, and gives it one on a signal and after `timeout`. Signals are
/// held from now on: make it before any thread starts.
///
/// # Errors
/// The host has no descriptors left.
pub fn until_stopped(stop: &Arc<Stop>, timeout: Option<Duration>) -> anyhow::Result<EventLoop> {
    let mut events = EventLoop::new().context("no event loop")?;
    events.add_subscriber(Box::new(StopListener(stop.clone())));
    events.add_subscriber(Box::new(Signals::new(stop.clone())?));
    if let Some(after) = timeout {
        events.add_subscriber(Box::new(Timeout::new(after, stop.clone())?));
    }
    Ok(events)
}

/// Ends a wait once [`Stop`] has an outcome.
pub struct StopListener(pub Arc<Stop>);

impl MutEventSubscriber for StopListener {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, self.0.event());
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {}
}

/// Ends a wait when somebody wishes something of the machine.
pub struct WishListener(pub Arc<Desk>);

impl MutEventSubscriber for WishListener {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, self.0.bell());
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        let _how_often = self.0.bell().read();
    }
}

/// `--timeout`.
pub struct Timeout {
    timer: TimerFd,
    stop: Arc<Stop>,
}

impl Timeout {
    /// Stop the run `after` now.
    ///
    /// # Errors
    /// The host has no timer left.
    pub fn new(after: Duration, stop: Arc<Stop>) -> anyhow::Result<Self> {
        let mut timer = TimerFd::new().context("no timer descriptor")?;
        // A timer of zero would never expire.
        timer.reset(after.max(Duration::from_nanos(1)), None).context("can't set a timer")?;
        Ok(Self { timer, stop })
    }
}

impl MutEventSubscriber for Timeout {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, &self.timer);
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        self.stop.request(Outcome::TimedOut);
    }
}

/// `--boot-timeout`.
pub struct BootTimeout {
    timer: Timeout,
    agent: Arc<AgentPort>,
}

impl BootTimeout {
    /// Stop the run unless `agent` has heard from its guest `after` now.
    ///
    /// # Errors
    /// The host has no timer left.
    pub fn new(after: Duration, agent: Arc<AgentPort>, stop: Arc<Stop>) -> anyhow::Result<Self> {
        Ok(Self { timer: Timeout::new(after, stop)?, agent })
    }
}

impl MutEventSubscriber for BootTimeout {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.timer.init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if !self.agent.has_spoken() {
            eprintln!("mana-vmm: --boot-timeout: the guest has not come up");
            return self.timer.process(events, ops);
        }
        if let Err(error) = self.timer.timer.clear() {
            log::error!("event loop: {error}");
        }
    }
}

/// Signals that ask this process to end, so that it ends in order and leaves the terminal as it was.
pub struct Signals {
    received: File,
    stop: Arc<Stop>,
}

impl Signals {
    const ENDING: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

    /// Keep the signals waiting, for this thread and those it starts from now on: a single one without it would let
    /// them end the process at once.
    ///
    /// # Errors
    /// The host refuses.
    pub fn hold() -> anyhow::Result<()> {
        for signal in Self::ENDING {
            match block_signal(signal) {
                Ok(()) | Err(vmm_sys_util::signal::Error::SignalAlreadyBlocked(_)) => {}
                Err(error) => anyhow::bail!("can't block signal {signal}: {error}"),
            }
        }
        Ok(())
    }

    /// Take the signals over from their default.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new(stop: Arc<Stop>) -> anyhow::Result<Self> {
        Self::hold()?;
        let signals = create_sigset(&Self::ENDING).context("no set of signals")?;
        // SAFETY: `signals` is initialised, and -1 asks for a new descriptor.
        let descriptor = unsafe { libc::signalfd(-1, &signals, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if descriptor < 0 {
            return Err(std::io::Error::last_os_error()).context("no signal descriptor");
        }
        // SAFETY: the descriptor was just made and nobody else has it.
        let received = unsafe { File::from_raw_fd(descriptor) };
        Ok(Self { received, stop })
    }
}

impl MutEventSubscriber for Signals {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, &self.received);
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        if self.received.read(&mut info).is_ok() {
            let [signal, ..] = info;
            self.stop.request(Outcome::HostError(format!("ended by signal {signal}")));
        }
    }
}

fn watch(ops: &mut EventOps<'_>, source: &impl std::os::fd::AsRawFd) {
    if let Err(error) = ops.add(Events::new(source, EventSet::IN)) {
        log::error!("event loop: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_ends_the_wait() {
        let stop = Stop::new().unwrap();
        let mut events = EventLoop::new().unwrap();
        events.add_subscriber(Box::new(StopListener(stop.clone())));
        events.add_subscriber(Box::new(Timeout::new(Duration::ZERO, stop.clone()).unwrap()));
        while stop.outcome().is_none() {
            assert!(events.run_with_timeout(5000).unwrap() > 0);
        }
        assert_eq!(stop.outcome(), Some(&Outcome::TimedOut));
    }

    #[test]
    fn a_guest_that_has_come_up_is_left_alone() {
        use vm_device::DevicePio;
        use vm_device::bus::PioAddress;

        let (stop, agent) = (Stop::new().unwrap(), Arc::new(AgentPort::default()));
        let timeout = || Box::new(BootTimeout::new(Duration::ZERO, agent.clone(), stop.clone()).unwrap());
        // A frame without a payload.
        agent.pio_write(PioAddress(0xe9), 0, b"L\0\0");
        let mut events = EventLoop::new().unwrap();
        events.add_subscriber(timeout());
        assert_eq!(events.run_with_timeout(5000).unwrap(), 1);
        assert_eq!(events.run_with_timeout(50).unwrap(), 0, "it comes once");
        assert_eq!(stop.outcome(), None);
    }

    #[test]
    fn a_guest_that_does_not_come_up_ends_the_run() {
        let (stop, agent) = (Stop::new().unwrap(), Arc::new(AgentPort::default()));
        let mut events = EventLoop::new().unwrap();
        events.add_subscriber(Box::new(BootTimeout::new(Duration::ZERO, agent, stop.clone()).unwrap()));
        assert_eq!(events.run_with_timeout(5000).unwrap(), 1);
        assert_eq!(stop.outcome(), Some(&Outcome::TimedOut));
    }
}
