//! Where the guest's console goes: a terminal or a file, with an eye on what it says.
//!
//! A UART hands out single bytes. They are written a line at a time, or after a moment if the line stays open (a
//! prompt), since a write for each byte costs more than the guest's own access.

use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::panic_watch::PanicWatch;
use crate::stop::{Outcome, Stop};

/// How long a line may stay open before what there is of it is written.
const OPEN_LINE: Duration = Duration::from_millis(10);
/// How long the console must be silent after a panic or an oops, so that the trace is whole.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// An oopsed guest that keeps talking is stopped after this long.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of one write.
const CHUNK: usize = 4096;

/// The console's output.
pub struct Console {
    state: Mutex<State>,
    stop: Arc<Stop>,
}

struct State {
    output: Box<dyn Write + Send>,
    open_line: Vec<u8>,
    line_timer: TimerFd,
    watch: PanicWatch,
    /// Since when the guest's kernel is in trouble.
    trouble: Option<Instant>,
    trouble_timer: TimerFd,
}

impl Console {
    /// Write to `output`; tell `stop` when the guest's kernel has panicked or oopsed.
    ///
    /// # Errors
    /// The host has no timer left.
    pub fn new(output: Box<dyn Write + Send>, stop: Arc<Stop>) -> anyhow::Result<Arc<Self>> {
        let timer = || TimerFd::new().context("no timer descriptor");
        let state = State {
            output,
            open_line: Vec::with_capacity(CHUNK),
            line_timer: timer()?,
            watch: PanicWatch::default(),
            trouble: None,
            trouble_timer: timer()?,
        };
        Ok(Arc::new(Self { state: Mutex::new(state), stop }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One byte from the guest.
    pub(super) fn byte(&self, byte: u8) {
        let mut state = self.state();
        state.open_line.push(byte);
        if byte == b'\n' || state.open_line.len() == CHUNK {
            state.write_out();
        } else if state.open_line.len() == 1 {
            arm(&mut state.line_timer, OPEN_LINE);
        }
        if state.watch.byte(byte) {
            state.trouble = Some(Instant::now());
        }
        if byte == b'\n' && state.trouble.is_some_and(|since| since.elapsed() < PATIENCE) {
            arm(&mut state.trouble_timer, LAST_WORDS);
        }
    }

    /// What the guest's kernel said, if it is in trouble.
    pub fn trouble(&self) -> Option<String> {
        self.state().watch.trouble().map(str::to_owned)
    }

    /// A bug that the guest's kernel has reported and survived, of KFENCE or KASAN for one.
    pub fn bug(&self) -> Option<String> {
        self.state().watch.bug().map(str::to_owned)
    }

    /// Write what is still held back.
    pub fn flush(&self) {
        self.state().write_out();
    }

    fn trouble_is_over(&self) {
        if let Some(line) = self.trouble() {
            self.stop.request(Outcome::GuestPanic(line));
        }
    }
}

impl State {
    fn write_out(&mut self) {
        let _ = self.line_timer.clear();
        // A terminal that is gone or a disk that is full is no reason to stop the guest.
        let written = self.output.write_all(&self.open_line).and_then(|()| self.output.flush());
        if let Err(error) = written {
            crate::warn_limited!("guest console: {error}");
        }
        self.open_line.clear();
    }
}

fn arm(timer: &mut TimerFd, delay: Duration) {
    if let Err(error) = timer.reset(delay, None) {
        crate::warn_limited!("guest console: no timer: {error}");
    }
}

/// The console's timers, for the event loop.
pub struct ConsoleTimers {
    console: Arc<Console>,
    line: RawFd,
    trouble: RawFd,
}

impl ConsoleTimers {
    /// The timers of `console`.
    pub fn new(console: Arc<Console>) -> Self {
        let (line, trouble) = {
            let state = console.state();
            (state.line_timer.as_raw_fd(), state.trouble_timer.as_raw_fd())
        };
        Self { console, line, trouble }
    }
}

impl MutEventSubscriber for ConsoleTimers {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for timer in [self.line, self.trouble] {
            if let Err(error) = ops.add(Events::new_raw(timer, EventSet::IN)) {
                log::error!("guest console: no timer: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        if events.fd() == self.line {
            self.console.flush();
        } else {
            self.console.trouble_is_over();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<Vec<u8>>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().push(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_are_written_whole_and_prompts_a_moment_later() {
        let written = Written::default();
        let console = Console::new(Box::new(written.clone()), Stop::new().unwrap()).unwrap();
        let mut events = event_manager::EventManager::<ConsoleTimers>::new().unwrap();
        event_manager::SubscriberOps::add_subscriber(&mut events, ConsoleTimers::new(console.clone()));
        "one\n# ".bytes().for_each(|byte| console.byte(byte));
        assert_eq!(*written.0.lock().unwrap(), [b"one\n"]);
        events.run_with_timeout(1000).unwrap();
        assert_eq!(*written.0.lock().unwrap(), [&b"one\n"[..], b"# "]);
    }

    #[test]
    fn a_panic_ends_the_run_once_the_guest_is_silent() {
        let stop = Stop::new().unwrap();
        let console = Console::new(Box::new(std::io::sink()), stop.clone()).unwrap();
        let mut events = event_manager::EventManager::<ConsoleTimers>::new().unwrap();
        event_manager::SubscriberOps::add_subscriber(&mut events, ConsoleTimers::new(console.clone()));
        "Kernel panic - not syncing: x\nCPU: 0\n".bytes().for_each(|byte| console.byte(byte));
        assert_eq!(stop.outcome(), None);
        events.run_with_timeout(5000).unwrap();
        assert_eq!(stop.outcome(), Some(&Outcome::GuestPanic("Kernel panic - not syncing: x".into())));
    }
}
