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
    queues: HashMap<Piece, Queue>,
    log: Mutex<Vec<Piece>>,
    frames: Mutex<Vec<(usize, Vec<u8>)>>,
    timers: Mutex<Vec<Instant>>,
    changed: Condvar,
    clock: Option<Arc<dyn Clock>>,
    doorbells: Mutex<Vec<(u32, EventFd)>>,
}

#[derive(Default)]
struct Queue {
    pending: AtomicU64,
    done: AtomicU64,
    running: AtomicBool,
    overlaps: AtomicUsize,
}

impl Counter {
    fn with(queues: impl IntoIterator<Item = Piece>) -> Self {
        let queues = queues.into_iter().map(|piece| (piece, Queue::default())).collect();
        Self { queues, ..Self::default() }
    }
    fn ring(&self, piece: Piece, requests: u64) {
        if self.queues[&piece].pending.fetch_add(requests, Ordering::SeqCst) == 0 {
            self.waker.get().unwrap().ring(piece);
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
        let waited = self.changed.wait_timeout_while(guard, Duration::from_secs(20), |t| !seen(t)).unwrap();
        assert!(!waited.1.timed_out(), "it never came");
    }
}

impl Function for Counter {
    fn run(&self, piece: Piece, budget: usize) -> Ran {
        let queue = &self.queues[&piece];
        if queue.running.swap(true, Ordering::SeqCst) {
            queue.overlaps.fetch_add(1, Ordering::SeqCst);
        }
        self.log.lock().unwrap().push(piece);
        let taken = queue.pending.load(Ordering::SeqCst).min(budget as u64);
        queue.done.fetch_add(taken, Ordering::SeqCst);
        queue.running.store(false, Ordering::SeqCst);
        match queue.pending.fetch_sub(taken, Ordering::SeqCst) {
            left if left == taken => Ran::Idle,
            _ => Ran::More,
        }
    }
    fn doorbells(&self) -> Vec<(u32, EventFd)> {
        std::mem::take(&mut self.doorbells.lock().unwrap())
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
        let pieces: Vec<_> = (0..8).map(Piece::Queue).chain([Piece::Control]).collect();
        let (device, running) = start(Counter::with(pieces.iter().copied()), workers, Vec::new());
        std::thread::scope(|scope| {
            for chunk in pieces.chunks(3) {
                let device = &device;
                scope.spawn(move || {
                    for round in 0..2000 {
                        chunk.iter().for_each(|&piece| device.ring(piece, 1 + round % 5));
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
    let (long, short) = (Piece::Queue(1), Piece::Queue(2));
    let (device, running) = {
        let device = Counter::with([long, short]);
        device.queues[&long].pending.store(100 * BUDGET as u64, Ordering::SeqCst);
        device.queues[&short].pending.store(3 * BUDGET as u64, Ordering::SeqCst);
        start(device, 1, Vec::new())
    };
    let mailboxes = device.waker.get().unwrap();
    mailboxes.boxes[0].change(|post| post.tasks.extend([Task::Run(long), Task::Run(short)]));
    device.await_done(103 * BUDGET as u64);
    running.stop().unwrap();
    assert_eq!(device.log.lock().unwrap()[..6], [long, short, long, short, long, short]);
}

#[test]
fn keeps_the_devices_deadlines() {
    let (device, running) = start(Counter::default(), 2, Vec::new());
    device.waker.get().unwrap().ring(Piece::Timers);
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
    device.waker.get().unwrap().ring(Piece::Control);
    while !running.threads[0].is_finished() {
        std::thread::yield_now();
    }
    assert_eq!(running.stop().unwrap_err().to_string(), "mana-worker0 panicked");
}

#[test]
fn doorbells_that_are_files_run_their_queues() {
    let files: Vec<_> = (0..4).map(|queue| (queue, EventFd::new(EFD_NONBLOCK).unwrap())).collect();
    let device = Counter::with((0..4).map(Piece::Queue));
    let bells = files.iter().map(|(queue, file)| (*queue, file.try_clone().unwrap())).collect();
    let device = Counter { doorbells: Mutex::new(bells), ..device };
    let (device, running) = start(device, 2, Vec::new());
    // Nobody ever reads the files: each write counts all the same.
    for round in 1..=100 {
        for (queue, file) in &files {
            device.queues[&Piece::Queue(*queue)].pending.fetch_add(3, Ordering::SeqCst);
            file.write(1).unwrap();
        }
        device.await_done(round * 4 * 3);
    }
    running.stop().unwrap();
}

/// CPU time that the workers have used, to the nanosecond: waking up shows.
fn effort(running: &Workers) -> Duration {
    use std::os::unix::thread::JoinHandleExt;
    let mut time = Duration::ZERO;
    for thread in &running.threads {
        let mut clock = 0;
        // SAFETY: the thread has not been joined, and `clock` outlives the call.
        assert_eq!(unsafe { libc::pthread_getcpuclockid(thread.as_pthread_t(), &raw mut clock) }, 0);
        let mut used = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `used` outlives the call.
        assert_eq!(unsafe { libc::clock_gettime(clock, &raw mut used) }, 0);
        time += Duration::new(used.tv_sec as u64, used.tv_nsec as u32);
    }
    time
}

#[test]
fn an_idle_device_takes_no_cpu() {
    let cable: Arc<dyn Cable> = Source::new();
    let (device, running) = start(Counter::with([Piece::Queue(0)]), 2, vec![cable]);
    device.ring(Piece::Queue(0), 1000);
    device.await_done(1000);
    std::thread::sleep(Duration::from_millis(100));
    let before = effort(&running);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(effort(&running), before, "a worker woke up for nothing");
    running.stop().unwrap();
}

/// vCPUs ring doorbells while cables bring frames, timers move and somebody changes the device as control commands do.
#[test]
fn keeps_every_request_under_stress() {
    const THREADS: u64 = 12;
    const ROUNDS: u64 = 3000;
    for workers in [1, 2, 7] {
        let pieces: Vec<_> = (0..24).map(Piece::Queue).chain([Piece::Control]).collect();
        let sources: Vec<_> = (0..3).map(|_| Source::new()).collect();
        let cables = sources.iter().map(|source| Arc::clone(source) as Arc<dyn Cable>).collect();
        let (device, running) = start(Counter::with(pieces.iter().copied()), workers, cables);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (device, pieces) = (&device, &pieces);
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        device
                            .ring(pieces[(thread * 7 + round * 11) as usize % pieces.len()], 1 + round % 90);
                    }
                });
            }
            for source in &sources {
                scope.spawn(move || {
                    for number in 0..ROUNDS {
                        source.waiting.lock().unwrap().push(number.to_be_bytes().to_vec());
                        if number % 2 == 0 {
                            source.kick.get().unwrap()();
                        } else {
                            source.file.write(1).unwrap();
                        }
                    }
                });
            }
            scope.spawn(|| (0..ROUNDS).for_each(|_| device.waker.get().unwrap().ring_once(Piece::Timers)));
        });
        device.await_done(THREADS * (0..ROUNDS).map(|round| 1 + round % 90).sum::<u64>());
        device.await_in(&device.frames, |frames| frames.len() as u64 == 3 * ROUNDS);
        running.stop().unwrap();
        assert!(device.queues.values().all(|queue| queue.overlaps.load(Ordering::SeqCst) == 0));
        for port in 0..3 {
            let frames = device.frames.lock().unwrap();
            let numbers = frames.iter().filter(|(of, _)| *of == port).map(|(_, bytes)| bytes.clone());
            assert!(numbers.eq((0..ROUNDS).map(|number| number.to_be_bytes().to_vec())), "out of order");
        }
    }
}

#[test]
fn a_busy_queue_does_not_hold_up_cables_and_timers() {
    let source = Source::new();
    let (device, running) = start(Counter::with([Piece::Queue(0)]), 1, vec![source.clone()]);
    // Work for longer than the test takes.
    device.ring(Piece::Queue(0), u64::MAX / 2);
    for number in 0..50_u8 {
        source.waiting.lock().unwrap().push(vec![number]);
        source.file.write(1).unwrap();
        device.await_in(&device.frames, |frames| frames.len() == usize::from(number) + 1);
    }
    device.waker.get().unwrap().ring(Piece::Timers);
    device.await_in(&device.timers, |timers| timers.len() == 3);
    running.stop().unwrap();
}
