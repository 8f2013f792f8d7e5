//! The threads that run a device's queues and feed it from its cables.
//!
//! A doorbell only notes that a queue has work ([`Waker`]); a worker then runs it. Each worker is an event loop
//! with a mailbox: pieces of work come from doorbells, cables from their files and kicks, and both from deadlines.
//! A doorbell may also be a file, which KVM writes without us ([`Function::doorbells`]).
//! A worker takes turns: every piece gets its budget, then goes to the back. It sleeps when its mailbox is empty
//! and is woken by an eventfd only then, so a busy worker costs a doorbell no system call.
//!
//! Each piece belongs to one worker, so it never runs on two at once: worker 0 has the control channel and the
//! timers, queue `n` is with worker `n` modulo their number, and so is the cable of port `n`.
//!
//! HWC commands run here and not on the vCPU that rang: the driver sleeps until the answer's interrupt anyway, so
//! the switch to the worker happens while that vCPU has nothing to do, and its other work goes on meanwhile.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
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
use crate::seccomp::{self, Role};

/// Requests, packets or frames that a piece may do before the next has its turn.
const BUDGET: usize = 64;

/// A piece of a function that is run on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Piece {
    /// The control channel.
    Control,
    /// What waits for a time.
    Timers,
    /// The queue with this number.
    Queue(u32),
}

impl From<Work> for Piece {
    fn from(work: Work) -> Self {
        match work {
            Work::Hwc => Self::Control,
            Work::Timers => Self::Timers,
            Work::Transmit { sq } => Self::Queue(sq),
        }
    }
}

/// What the workers need of a device.
pub trait Function: Send + Sync {
    /// Do up to `budget` requests or packets of `piece`. Never called twice at once for one piece.
    fn run(&self, piece: Piece, budget: usize) -> Ran;
    /// Do what has come due; the answer is when to call again.
    fn run_timers(&self) -> Option<u64> {
        None
    }
    /// Frames from the cable of `port`.
    fn deliver(&self, port: usize, frames: &[Frame<'_>]);
    /// Queues that are rung by a file. Asked for once.
    fn doorbells(&self) -> Vec<(u32, EventFd)> {
        Vec::new()
    }
}

impl Function for ManaDevice {
    fn run(&self, piece: Piece, budget: usize) -> Ran {
        let work = match piece {
            Piece::Control => Work::Hwc,
            Piece::Timers => Work::Timers,
            Piece::Queue(sq) => Work::Transmit { sq },
        };
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
    Run(Piece),
    /// The cable of this port.
    Cable(usize),
}

#[derive(Default)]
struct Post {
    tasks: VecDeque<Task>,
    asleep: bool,
    stop: bool,
    /// The worker is to do nothing.
    hold: bool,
    /// It does nothing.
    held: bool,
}

/// Where a worker is told of work.
struct Mailbox {
    post: Mutex<Post>,
    /// Written only when the worker sleeps or is about to.
    bell: EventFd,
    /// `hold`, `held` or `stop` have changed.
    changed: Condvar,
}

impl Mailbox {
    fn new() -> anyhow::Result<Self> {
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).context("no eventfd for a device worker")?;
        Ok(Self { post: Mutex::default(), bell, changed: Condvar::new() })
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

    /// Let the worker finish its turn and do nothing more, or go on. It does so when this returns.
    fn hold(&self, hold: bool) {
        self.change(|post| post.hold = hold);
        self.changed.notify_all();
        let mut post = self.post();
        while hold && !post.held && !post.stop {
            post = self.changed.wait(post).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The worker's side: wait for as long as it is held.
    fn wait_while_held<'a>(&'a self, mut post: MutexGuard<'a, Post>) -> MutexGuard<'a, Post> {
        while post.hold && !post.stop {
            post.held = true;
            self.changed.notify_all();
            post = self.changed.wait(post).unwrap_or_else(PoisonError::into_inner);
        }
        post.held = false;
        post
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
pub struct Mailboxes {
    /// What the threads are called.
    name: String,
    boxes: Vec<Mailbox>,
    /// Workers don't interrupt CPUs of the guest.
    patient: bool,
}

impl Mailboxes {
    /// Mailboxes for `workers` threads, at least one.
    ///
    /// # Errors
    /// No file descriptors are left.
    pub fn new(workers: usize) -> anyhow::Result<Arc<Self>> {
        Self::build("mana", workers, true)
    }

    /// Mailboxes for `workers` threads of the device `name`, at least one.
    ///
    /// # Errors
    /// No file descriptors are left.
    pub fn named(name: &str, workers: usize) -> anyhow::Result<Arc<Self>> {
        Self::build(name, workers, false)
    }

    fn build(name: &str, workers: usize, patient: bool) -> anyhow::Result<Arc<Self>> {
        let boxes: anyhow::Result<_> = (0..workers.max(1)).map(|_| Mailbox::new()).collect();
        Ok(Arc::new(Self { name: name.to_owned(), boxes: boxes?, patient }))
    }

    /// `piece` is to be run soon.
    pub fn ring(&self, piece: Piece) {
        self.of(Task::Run(piece)).put(Task::Run(piece));
    }

    /// The same where it may be waiting for its run already.
    pub fn ring_once(&self, piece: Piece) {
        self.of(Task::Run(piece)).put_once(Task::Run(piece));
    }

    fn of(&self, task: Task) -> &Mailbox {
        &self.boxes[self.owner(task)]
    }

    /// The worker that `task` belongs to.
    fn owner(&self, task: Task) -> usize {
        let index = match task {
            Task::Run(Piece::Control | Piece::Timers) => 0,
            Task::Run(Piece::Queue(queue)) => queue as usize,
            Task::Cable(port) => port,
        };
        index % self.boxes.len()
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
        let doorbells = device.doorbells();
        for index in 0..self.boxes.len() {
            let worker = Worker::new(
                index,
                self,
                Arc::clone(device),
                Arc::clone(&cables),
                &doorbells,
                Arc::clone(clock),
            )?;
            let patient = self.patient;
            let thread = std::thread::Builder::new().name(format!("{}-worker{index}", self.name));
            workers.threads.push(
                thread
                    .spawn(move || {
                        if patient {
                            wait_for_turns();
                        }
                        seccomp::enter(Role::Worker).and_then(|()| worker.run())
                    })
                    .context("no thread for a device worker")?,
            );
        }
        Ok(workers)
    }
}

impl Waker for Mailboxes {
    fn wake(&self, work: Work) {
        self.ring(work.into());
    }
}

/// Running workers; dropping them stops them.
pub struct Workers {
    mailboxes: Arc<Mailboxes>,
    cables: Arc<[Arc<dyn Cable>]>,
    threads: Vec<JoinHandle<anyhow::Result<()>>>,
}

impl Workers {
    /// Let all workers do nothing until [`resume`](Self::resume); each finishes its current turn first.
    pub fn pause(&self) {
        self.mailboxes.boxes.iter().for_each(|mailbox| mailbox.hold(true));
    }

    /// Let them go on with what has come in meanwhile.
    pub fn resume(&self) {
        self.mailboxes.boxes.iter().for_each(|mailbox| mailbox.hold(false));
    }

    /// Stop all workers and wait for them; each finishes its current turn.
    ///
    /// # Errors
    /// A worker had failed before.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.join()
    }

    fn join(&mut self) -> anyhow::Result<()> {
        for mailbox in &self.mailboxes.boxes {
            mailbox.change(|post| post.stop = true);
            mailbox.changed.notify_all();
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

/// From now on the calling thread, when it is woken on a CPU that is busy, waits for its turn instead of interrupting
/// who runs there (SCHED_BATCH). What wakes a worker is a CPU of the guest that rings: if it goes on, it rings again and
/// all that becomes one batch with one interrupt; if it has nothing else to do it halts, and the turn has come anyway.
pub(crate) fn wait_for_turns() {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: changes only how the calling thread is scheduled; the parameters outlive the call.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameters) } < 0 {
        log::debug!("SCHED_BATCH: {}", std::io::Error::last_os_error());
    }
}

/// Marks an event as a queue's doorbell; the rest of its number is the queue's.
const DOORBELL: u32 = 1 << 31;

/// The files a worker waits for. Bell, timer and doorbells are edge-triggered, so that they need no read; a cable's file
/// stays ready until its frames are taken.
struct Sources {
    bell: EventFd,
    timer: TimerFd,
    cables: Vec<(usize, std::os::fd::RawFd)>,
    doorbells: Vec<(u32, EventFd)>,
    ready: Vec<Task>,
    failed: Option<event_manager::Error>,
}

impl MutEventSubscriber for Sources {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let own =
            [Events::with_data(&self.bell, u32::MAX, edge), Events::with_data(&self.timer, u32::MAX, edge)];
        let cables =
            self.cables.iter().map(|&(port, file)| Events::with_data_raw(file, port as u32, EventSet::IN));
        let doorbells =
            self.doorbells.iter().map(|(queue, file)| Events::with_data(file, DOORBELL | queue, edge));
        self.failed = own.into_iter().chain(cables).chain(doorbells).find_map(|events| ops.add(events).err());
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.data() == u32::MAX {
            return;
        }
        if events.data() & DOORBELL != 0 {
            self.ready.push(Task::Run(Piece::Queue(events.data() & !DOORBELL)));
            return;
        }
        if events.event_set().intersects(EventSet::ERROR | EventSet::HANG_UP) {
            log::error!("the cable of port {} is gone; it brings no more frames", events.data());
            if let Err(error) = ops.remove(events) {
                log::error!("it can't be let go of: {error}");
            }
        }
        self.ready.push(Task::Cable(events.data() as usize));
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
    /// An empty list whose memory is used again.
    ready: Vec<Task>,
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
        doorbells: &[(u32, EventFd)],
        clock: Arc<dyn Clock>,
    ) -> anyhow::Result<Self> {
        let own = |task: Task| mailboxes.owner(task) == index;
        let files = cables.iter().enumerate().filter(|&(port, _)| own(Task::Cable(port)));
        let doorbells = doorbells.iter().filter(|(queue, _)| own(Task::Run(Piece::Queue(*queue))));
        let doorbells = doorbells.map(|(queue, file)| Ok((*queue, file.try_clone()?)));
        let doorbells =
            doorbells.collect::<std::io::Result<_>>().context("no eventfd for a device worker")?;
        let sources = Sources {
            bell: mailboxes.boxes[index].bell.try_clone().context("no eventfd for a device worker")?,
            timer: TimerFd::new().context("no timer for a device worker")?,
            cables: files.filter_map(|(port, cable)| Some((port, cable.readable()?))).collect(),
            doorbells,
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
            ready: Vec::new(),
            cable_deadlines,
            device_deadline: None,
            armed: None,
        })
    }

    fn run(self) -> anyhow::Result<()> {
        let mailboxes = Arc::clone(&self.mailboxes);
        let mailbox = &mailboxes.boxes[self.index];
        let result = self.serve(mailbox);
        // Nobody waits for it any more.
        mailbox.post().stop = true;
        mailbox.changed.notify_all();
        result
    }

    fn serve(mut self, mailbox: &Mailbox) -> anyhow::Result<()> {
        let mut turns = VecDeque::new();
        let mut busy = false;
        loop {
            {
                let mut post = mailbox.wait_while_held(mailbox.post());
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
        let mut ready = std::mem::take(&mut self.ready);
        std::mem::swap(&mut self.events.subscriber_mut(self.sources)?.ready, &mut ready);
        for task in ready.drain(..).chain(self.due()) {
            if !turns.contains(&task) {
                turns.push_back(task);
            }
        }
        self.ready = ready;
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
        cables.chain(come(self.device_deadline).then_some(Task::Run(Piece::Timers))).collect()
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
            Task::Run(Piece::Timers) => {
                self.device_deadline = self.device.run_timers();
                Ran::Idle
            }
            Task::Run(piece) => self.device.run(piece, BUDGET),
            Task::Cable(port) => {
                let polled = self.cables[port].poll(BUDGET, &mut |frames| self.device.deliver(port, frames));
                self.cable_deadlines[port] = polled.deadline;
                if polled.more { Ran::More } else { Ran::Idle }
            }
        }
    }
}

#[cfg(test)]
mod tests;
