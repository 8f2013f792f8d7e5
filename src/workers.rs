//! The threads that run the device's queues and feed it from its cables.
//!
//! A doorbell only notes that a queue has work ([`Waker`]); a worker then runs it. Each worker is an event loop
//! with a mailbox: pieces of work come from doorbells, cables from their files and kicks, and both from deadlines.
//! A worker takes turns: every piece gets its budget, then goes to the back. It sleeps when its mailbox is empty
//! and is woken by an eventfd only then, so a busy worker costs a doorbell no system call.
//!
//! Each piece belongs to one worker, so it never runs on two at once: worker 0 has the hardware channel and the
//! timers, send queue `n` is with worker `n` modulo their number, and so is the cable of vPort `n`.
//!
//! HWC commands run here and not on the vCPU that rang: the driver sleeps until the answer's interrupt anyway, so
//! the switch to the worker happens while that vCPU has nothing to do, and its other work goes on meanwhile.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, bail};
use arrayvec::ArrayVec;
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use mana_device::doors::{Clock, Waker, Work};
use mana_device::{ManaDevice, Ran};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use crate::net::{Cable, Frame};

/// Requests, packets or frames that a piece may do before the next has its turn.
const BUDGET: usize = 64;

/// What the workers need of a device.
pub trait Function: Send + Sync {
    /// See [`ManaDevice::run`].
    fn run(&self, work: Work, budget: usize) -> Ran;
    /// See [`ManaDevice::run_timers`].
    fn run_timers(&self) -> Option<u64>;
    /// Frames from the cable of `port`.
    fn deliver(&self, port: usize, frames: &[Frame<'_>]);
}

impl Function for ManaDevice {
    fn run(&self, work: Work, budget: usize) -> Ran {
        self.run(work, budget)
    }
    fn run_timers(&self) -> Option<u64> {
        self.run_timers()
    }
    fn deliver(&self, port: usize, frames: &[Frame<'_>]) {
        for batch in frames.chunks(BUDGET) {
            let batch: ArrayVec<_, BUDGET> = batch.iter().map(Frame::received).collect();
            self.deliver(port, &batch);
        }
    }
}

/// One turn of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Task {
    /// A piece of the device.
    Run(Work),
    /// The cable of this vPort.
    Cable(usize),
}

#[derive(Default)]
struct Post {
    tasks: VecDeque<Task>,
    asleep: bool,
    stop: bool,
}

/// Where a worker is told of work.
struct Mailbox {
    post: Mutex<Post>,
    /// Written only when the worker sleeps or is about to.
    bell: EventFd,
}

impl Mailbox {
    fn new() -> anyhow::Result<Self> {
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).context("no eventfd for a device worker")?;
        Ok(Self { post: Mutex::default(), bell })
    }

    fn post(&self) -> MutexGuard<'_, Post> {
        self.post.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Post)) {
        let wake = {
            let mut post = self.post();
            change(&mut post);
            std::mem::take(&mut post.asleep)
        };
        if wake {
            // It can fail only because 2^64 - 2 wakes are pending.
            let _ = self.bell.write(1);
        }
    }

    fn put(&self, task: Task) {
        self.change(|post| post.tasks.push_back(task));
    }

    /// A cable kicks as often as it likes; one turn serves all of its kicks.
    fn put_once(&self, task: Task) {
        self.change(|post| {
            if !post.tasks.contains(&task) {
                post.tasks.push_back(task);
            }
        });
    }
}

/// The doorbells' side of the workers, which exists before the device does: give it to [`mana_device::Host`],
/// then [`start`](Self::start) the workers on the device.
pub struct Mailboxes(Vec<Mailbox>);

impl Mailboxes {
    /// Mailboxes for `workers` threads, at least one.
    ///
    /// # Errors
    /// No file descriptors are left.
    pub fn new(workers: usize) -> anyhow::Result<Arc<Self>> {
        let boxes: anyhow::Result<_> = (0..workers.max(1)).map(|_| Mailbox::new()).collect();
        Ok(Arc::new(Self(boxes?)))
    }

    fn of(&self, task: Task) -> &Mailbox {
        let index = match task {
            Task::Run(Work::Hwc | Work::Timers) => 0,
            Task::Run(Work::Transmit { sq }) => sq as usize,
            Task::Cable(port) => port,
        };
        &self.0[index % self.0.len()]
    }

    /// Start the workers on `device` and its `cables`, one a vPort in index order. They run until the answer is
    /// stopped or dropped.
    ///
    /// # Errors
    /// A thread or a file descriptor can't be had.
    pub fn start<F: Function + 'static>(
        self: &Arc<Self>,
        device: &Arc<F>,
        cables: Vec<Arc<dyn Cable>>,
        clock: &Arc<dyn Clock>,
    ) -> anyhow::Result<Workers> {
        let cables: Arc<[_]> = cables.into();
        for (port, cable) in cables.iter().enumerate() {
            let mailboxes = Arc::clone(self);
            let task = Task::Cable(port);
            cable.on_ready(Box::new(move || mailboxes.of(task).put_once(task)));
        }
        let mut workers =
            Workers { mailboxes: Arc::clone(self), cables: Arc::clone(&cables), threads: Vec::new() };
        for index in 0..self.0.len() {
            let worker =
                Worker::new(index, self, Arc::clone(device), Arc::clone(&cables), Arc::clone(clock))?;
            let thread = std::thread::Builder::new().name(format!("mana-worker{index}"));
            workers
                .threads
                .push(thread.spawn(move || worker.run()).context("no thread for a device worker")?);
        }
        Ok(workers)
    }
}

impl Waker for Mailboxes {
    fn wake(&self, work: Work) {
        let task = Task::Run(work);
        self.of(task).put(task);
    }
}

/// Running workers; dropping them stops them.
pub struct Workers {
    mailboxes: Arc<Mailboxes>,
    cables: Arc<[Arc<dyn Cable>]>,
    threads: Vec<JoinHandle<anyhow::Result<()>>>,
}

impl Workers {
    /// Stop all workers and wait for them; each finishes its current turn.
    ///
    /// # Errors
    /// A worker had failed before.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.join()
    }

    fn join(&mut self) -> anyhow::Result<()> {
        for mailbox in &self.mailboxes.0 {
            mailbox.change(|post| post.stop = true);
        }
        let mut result = Ok(());
        if self.threads.is_empty() {
            return result;
        }
        for thread in self.threads.drain(..) {
            let name = thread.thread().name().unwrap_or_default().to_owned();
            let ended = thread.join().unwrap_or_else(|_| bail!("{name} panicked"));
            result = result.and(ended);
        }
        for (port, cable) in self.cables.iter().enumerate() {
            if let lost @ 1.. = cable.dropped() {
                log::info!("the cable of port {port} has lost {lost} frames for the guest");
            }
        }
        result
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        if let Err(error) = self.join() {
            log::error!("{error:#}");
        }
    }
}

/// The files a worker waits for. Bell and timer are edge-triggered, so that they need no read; a cable's file
/// stays ready until its frames are taken.
struct Sources {
    bell: EventFd,
    timer: TimerFd,
    cables: Vec<(usize, std::os::fd::RawFd)>,
    ready: Vec<usize>,
    failed: Option<event_manager::Error>,
}

impl MutEventSubscriber for Sources {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let own =
            [Events::with_data(&self.bell, u32::MAX, edge), Events::with_data(&self.timer, u32::MAX, edge)];
        let cables =
            self.cables.iter().map(|&(port, file)| Events::with_data_raw(file, port as u32, EventSet::IN));
        self.failed = own.into_iter().chain(cables).find_map(|events| ops.add(events).err());
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.data() == u32::MAX {
            return;
        }
        if events.event_set().intersects(EventSet::ERROR | EventSet::HANG_UP) {
            log::error!("the cable of vPort {} is gone; it brings no more frames", events.data());
            if let Err(error) = ops.remove(events) {
                log::error!("it can't be let go of: {error}");
            }
        }
        self.ready.push(events.data() as usize);
    }
}

/// One event loop.
struct Worker<F> {
    index: usize,
    mailboxes: Arc<Mailboxes>,
    device: Arc<F>,
    cables: Arc<[Arc<dyn Cable>]>,
    clock: Arc<dyn Clock>,
    events: EventManager<Sources>,
    sources: event_manager::SubscriberId,
    /// Deadlines of this worker's cables, by vPort, and of the device.
    cable_deadlines: Vec<Option<u64>>,
    device_deadline: Option<u64>,
    /// What the timer is set to; a deadline that has moved away lets it fire for nothing once.
    armed: Option<u64>,
}

impl<F: Function> Worker<F> {
    fn new(
        index: usize,
        mailboxes: &Arc<Mailboxes>,
        device: Arc<F>,
        cables: Arc<[Arc<dyn Cable>]>,
        clock: Arc<dyn Clock>,
    ) -> anyhow::Result<Self> {
        let own = |&(port, _): &(usize, _)| port % mailboxes.0.len() == index;
        let files = cables.iter().enumerate().filter(own);
        let sources = Sources {
            bell: mailboxes.0[index].bell.try_clone().context("no eventfd for a device worker")?,
            timer: TimerFd::new().context("no timer for a device worker")?,
            cables: files.filter_map(|(port, cable)| Some((port, cable.readable()?))).collect(),
            ready: Vec::new(),
            failed: None,
        };
        let mut events = EventManager::new().context("no epoll for a device worker")?;
        let sources = events.add_subscriber(sources);
        if let Some(error) = events.subscriber_mut(sources)?.failed.take() {
            return Err(error).context("a device worker can't wait for its files");
        }
        let cable_deadlines = vec![None; cables.len()];
        Ok(Self {
            index,
            mailboxes: Arc::clone(mailboxes),
            device,
            cables,
            clock,
            events,
            sources,
            cable_deadlines,
            device_deadline: None,
            armed: None,
        })
    }

    fn run(mut self) -> anyhow::Result<()> {
        let mut turns = VecDeque::new();
        let mut busy = false;
        loop {
            {
                let mut post = self.mailboxes.0[self.index].post();
                if post.stop {
                    return Ok(());
                }
                turns.append(&mut post.tasks);
                post.asleep = turns.is_empty();
            }
            if turns.is_empty() {
                self.arm()?;
                self.wait(-1, &mut turns)?;
                busy = false;
                continue;
            }
            // Work that just woke us needs no look at the files first.
            if std::mem::replace(&mut busy, true) {
                self.wait(0, &mut turns)?;
            }
            for _ in 0..turns.len() {
                let Some(task) = turns.pop_front() else { break };
                if self.turn(task) == Ran::More {
                    turns.push_back(task);
                }
            }
        }
    }

    /// Wait for up to `milliseconds` (-1: for ever), then take what files and deadlines ask for.
    fn wait(&mut self, milliseconds: i32, turns: &mut VecDeque<Task>) -> anyhow::Result<()> {
        self.events.run_with_timeout(milliseconds).context("a device worker can't wait")?;
        let ready = std::mem::take(&mut self.events.subscriber_mut(self.sources)?.ready);
        let files = ready.into_iter().map(Task::Cable);
        for task in files.chain(self.due()) {
            if !turns.contains(&task) {
                turns.push_back(task);
            }
        }
        Ok(())
    }

    /// What has come due.
    fn due(&self) -> Vec<Task> {
        let Some(earliest) = self.earliest() else { return Vec::new() };
        let now = self.clock.now_ns();
        if earliest > now {
            return Vec::new();
        }
        let come = |deadline: Option<u64>| deadline.is_some_and(|deadline| deadline <= now);
        let cables = (0..self.cables.len()).filter(|&port| come(self.cable_deadlines[port])).map(Task::Cable);
        cables.chain(come(self.device_deadline).then_some(Task::Run(Work::Timers))).collect()
    }

    fn earliest(&self) -> Option<u64> {
        self.cable_deadlines.iter().copied().flatten().chain(self.device_deadline).min()
    }

    /// See that the timer fires no later than the next deadline.
    fn arm(&mut self) -> anyhow::Result<()> {
        let Some(deadline) = self.earliest() else { return Ok(()) };
        let now = self.clock.now_ns();
        if self.armed.is_some_and(|armed| armed > now && armed <= deadline) {
            return Ok(());
        }
        // A timer set to 0 would never fire.
        let wait = Duration::from_nanos(deadline.saturating_sub(now).max(1));
        self.armed = Some(deadline);
        let sources = self.events.subscriber_mut(self.sources)?;
        sources.timer.reset(wait, None).context("a device worker's timer can't be set")
    }

    fn turn(&mut self, task: Task) -> Ran {
        match task {
            Task::Run(Work::Timers) => {
                self.device_deadline = self.device.run_timers();
                Ran::Idle
            }
            Task::Run(work) => self.device.run(work, BUDGET),
            Task::Cable(port) => {
                let polled = self.cables[port].poll(BUDGET, &mut |frames| self.device.deliver(port, frames));
                self.cable_deadlines[port] = polled.deadline;
                if polled.more { Ran::More } else { Ran::Idle }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
    use std::sync::{Condvar, OnceLock};
    use std::time::Instant;

    use mana_device::doors::{Port, PortDropped, TxFrame};

    use super::*;
    use crate::clock::MonotonicClock;
    use crate::net::{Deliver, Kick, Polled};

    /// A device that counts: queues hold requests, timers come due, frames arrive.
    #[derive(Default)]
    struct Counter {
        waker: OnceLock<Arc<Mailboxes>>,
        queues: HashMap<Work, Queue>,
        log: Mutex<Vec<Work>>,
        frames: Mutex<Vec<(usize, Vec<u8>)>>,
        timers: Mutex<Vec<Instant>>,
        changed: Condvar,
        clock: Option<Arc<dyn Clock>>,
    }

    #[derive(Default)]
    struct Queue {
        pending: AtomicU64,
        done: AtomicU64,
        running: AtomicBool,
        overlaps: AtomicUsize,
    }

    impl Counter {
        fn with(queues: impl IntoIterator<Item = Work>) -> Self {
            let queues = queues.into_iter().map(|work| (work, Queue::default())).collect();
            Self { queues, ..Self::default() }
        }
        fn ring(&self, work: Work, requests: u64) {
            if self.queues[&work].pending.fetch_add(requests, Ordering::SeqCst) == 0 {
                self.waker.get().unwrap().wake(work);
            }
        }
        fn done(&self) -> u64 {
            self.queues.values().map(|queue| queue.done.load(Ordering::SeqCst)).sum()
        }
        fn await_done(&self, count: u64) {
            let end = Instant::now() + Duration::from_secs(20);
            while self.done() != count {
                assert!(Instant::now() < end, "{} of {count} requests were run", self.done());
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        /// Wait until `seen` finds what it looks for behind `lock`.
        fn await_in<T>(&self, lock: &Mutex<T>, seen: impl Fn(&T) -> bool) {
            let guard = lock.lock().unwrap();
            let waited =
                self.changed.wait_timeout_while(guard, Duration::from_secs(20), |t| !seen(t)).unwrap();
            assert!(!waited.1.timed_out(), "it never came");
        }
    }

    impl Function for Counter {
        fn run(&self, work: Work, budget: usize) -> Ran {
            let queue = &self.queues[&work];
            if queue.running.swap(true, Ordering::SeqCst) {
                queue.overlaps.fetch_add(1, Ordering::SeqCst);
            }
            self.log.lock().unwrap().push(work);
            let taken = queue.pending.load(Ordering::SeqCst).min(budget as u64);
            queue.done.fetch_add(taken, Ordering::SeqCst);
            queue.running.store(false, Ordering::SeqCst);
            match queue.pending.fetch_sub(taken, Ordering::SeqCst) {
                left if left == taken => Ran::Idle,
                _ => Ran::More,
            }
        }
        fn run_timers(&self) -> Option<u64> {
            let mut timers = self.timers.lock().unwrap();
            timers.push(Instant::now());
            self.changed.notify_all();
            (timers.len() < 3).then(|| self.clock.as_ref().unwrap().now_ns() + 30_000_000)
        }
        fn deliver(&self, port: usize, frames: &[Frame<'_>]) {
            let mut seen = self.frames.lock().unwrap();
            seen.extend(frames.iter().map(|frame| (port, frame.bytes.to_vec())));
            self.changed.notify_all();
        }
    }

    fn start(device: Counter, workers: usize, cables: Vec<Arc<dyn Cable>>) -> (Arc<Counter>, Workers) {
        let clock: Arc<dyn Clock> = Arc::new(MonotonicClock::new());
        let mailboxes = Mailboxes::new(workers).unwrap();
        let device = Arc::new(Counter { clock: Some(Arc::clone(&clock)), ..device });
        assert!(device.waker.set(Arc::clone(&mailboxes)).is_ok());
        let workers = mailboxes.start(&device, cables, &clock).unwrap();
        (device, workers)
    }

    #[test]
    fn runs_every_request_and_no_piece_twice_at_once() {
        for workers in [1, 4] {
            let pieces: Vec<_> = (0..8).map(|sq| Work::Transmit { sq }).chain([Work::Hwc]).collect();
            let (device, running) = start(Counter::with(pieces.iter().copied()), workers, Vec::new());
            std::thread::scope(|scope| {
                for chunk in pieces.chunks(3) {
                    let device = &device;
                    scope.spawn(move || {
                        for round in 0..2000 {
                            chunk.iter().for_each(|&work| device.ring(work, 1 + round % 5));
                        }
                    });
                }
            });
            device.await_done(9 * 2000 * 3);
            running.stop().unwrap();
            assert!(device.queues.values().all(|queue| queue.overlaps.load(Ordering::SeqCst) == 0));
        }
    }

    #[test]
    fn takes_turns_when_pieces_have_more_than_their_budget() {
        let (long, short) = (Work::Transmit { sq: 1 }, Work::Transmit { sq: 2 });
        let (device, running) = {
            let device = Counter::with([long, short]);
            device.queues[&long].pending.store(100 * BUDGET as u64, Ordering::SeqCst);
            device.queues[&short].pending.store(3 * BUDGET as u64, Ordering::SeqCst);
            start(device, 1, Vec::new())
        };
        let mailboxes = device.waker.get().unwrap();
        mailboxes.0[0].change(|post| post.tasks.extend([Task::Run(long), Task::Run(short)]));
        device.await_done(103 * BUDGET as u64);
        running.stop().unwrap();
        assert_eq!(device.log.lock().unwrap()[..6], [long, short, long, short, long, short]);
    }

    #[test]
    fn keeps_the_devices_deadlines() {
        let (device, running) = start(Counter::default(), 2, Vec::new());
        device.waker.get().unwrap().wake(Work::Timers);
        device.await_in(&device.timers, |timers| timers.len() == 3);
        running.stop().unwrap();
        let timers = device.timers.lock().unwrap();
        for pair in timers.windows(2) {
            assert!(pair[1] - pair[0] >= Duration::from_millis(30), "too early");
        }
    }

    /// A cable with frames that a file or a kick announces, and one frame that is there from a time on.
    struct Source {
        file: EventFd,
        kick: OnceLock<Kick>,
        waiting: Mutex<Vec<Vec<u8>>>,
        late: Mutex<Option<Instant>>,
        clock: MonotonicClock,
    }

    impl Source {
        fn new() -> Arc<Self> {
            let file = EventFd::new(EFD_NONBLOCK).unwrap();
            Arc::new(Self {
                file,
                kick: OnceLock::new(),
                waiting: Mutex::default(),
                late: Mutex::default(),
                clock: MonotonicClock::new(),
            })
        }
    }

    impl Port for Source {
        fn send(&self, _frame: &TxFrame<'_>) -> Result<(), PortDropped> {
            Ok(())
        }
    }

    impl Cable for Source {
        fn readable(&self) -> Option<std::os::fd::RawFd> {
            Some(std::os::fd::AsRawFd::as_raw_fd(&self.file))
        }
        fn on_ready(&self, kick: Kick) {
            assert!(self.kick.set(kick).is_ok());
        }
        fn poll(&self, _budget: usize, deliver: Deliver<'_>) -> Polled {
            let _ = self.file.read();
            let mut late = self.late.lock().unwrap();
            let wait = late.map(|late| late.saturating_duration_since(Instant::now()));
            let mut waiting = self.waiting.lock().unwrap();
            if wait == Some(Duration::ZERO) {
                *late = None;
                waiting.push(b"deadline".to_vec());
            }
            for bytes in waiting.drain(..) {
                deliver(&[Frame::plain(&bytes, Default::default())]);
            }
            let deadline = late.and(wait).map(|wait| self.clock.now_ns() + wait.as_nanos() as u64);
            Polled { more: false, deadline }
        }
    }

    #[test]
    fn delivers_what_files_kicks_and_deadlines_bring() {
        let cables = [Source::new(), Source::new(), Source::new()];
        let dynamic = cables.iter().map(|cable| Arc::clone(cable) as Arc<dyn Cable>).collect();
        let (device, running) = start(Counter::default(), 2, dynamic);
        let arrives = |frame: &[u8]| {
            let wanted = (2, frame.to_vec());
            device.await_in(&device.frames, |frames| frames.contains(&wanted));
        };
        let cable = &cables[2];
        cable.waiting.lock().unwrap().push(b"file".to_vec());
        cable.file.write(1).unwrap();
        arrives(b"file");
        *cable.late.lock().unwrap() = Some(Instant::now() + Duration::from_millis(50));
        cable.kick.get().unwrap()();
        arrives(b"deadline");
        cable.waiting.lock().unwrap().push(b"kick".to_vec());
        cable.kick.get().unwrap()();
        arrives(b"kick");
        running.stop().unwrap();
    }

    #[test]
    fn reports_a_worker_that_panicked() {
        let (device, running) = start(Counter::default(), 1, Vec::new());
        // No such queue.
        device.waker.get().unwrap().wake(Work::Hwc);
        while !running.threads[0].is_finished() {
            std::thread::yield_now();
        }
        assert_eq!(running.stop().unwrap_err().to_string(), "mana-worker0 panicked");
    }
}
