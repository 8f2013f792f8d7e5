//! The machine around the card: guest memory, the interrupt controller, the clock, the worker and the cables, each
//! a recorder that a test can look into.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use mana_device::config::DeviceConfig;
use mana_device::doors::{
    Clock, Memory, MsiMessage, MsiSink, Port, PortCapabilities, PortDropped, RxChecksum, RxFrame, TxFrame,
    TxOffload, Waker, Work,
};
use mana_device::observe::{Event, Fields, Observer};
use mana_device::state::State;
use mana_device::{Host, ManaDevice, Ran};
use vm_memory::Bytes as _;

use crate::memory::GuestMemory;

/// Requests or packets in one go, small enough that tests see [`Ran::More`].
const BUDGET: usize = 64;
/// A device that is still busy after this many goes will never be idle.
const MAX_GOES: usize = 1_000_000;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A clock that moves when the test says so.
#[derive(Default)]
pub struct ManualClock(AtomicU64);

impl ManualClock {
    /// Move on by `ns` nanoseconds.
    pub fn advance(&self, ns: u64) {
        self.0.fetch_add(ns, Ordering::Relaxed);
    }
}

impl Clock for ManualClock {
    fn now_ns(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A card's clock, which started at another time than the machine's.
struct CardClock {
    clock: Arc<ManualClock>,
    ahead_ns: u64,
}

impl Clock for CardClock {
    fn now_ns(&self) -> u64 {
        self.clock.now_ns() + self.ahead_ns
    }
}

/// The interrupt controller: remembers what is routed and what has fired.
#[derive(Default)]
pub struct Interrupts {
    routes: Mutex<BTreeMap<u16, MsiMessage>>,
    fired: Mutex<VecDeque<MsiMessage>>,
    count: AtomicU64,
    only_counts: AtomicBool,
}

impl Interrupts {
    /// Messages that arrived since the last call, oldest first.
    pub fn take(&self) -> VecDeque<MsiMessage> {
        std::mem::take(&mut *lock(&self.fired))
    }
    /// Messages that arrived since the world began.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
    /// Count messages without keeping them (benchmarks).
    pub fn only_count(&self) {
        self.only_counts.store(true, Ordering::Relaxed);
    }
    fn forget_routes(&self) {
        lock(&self.routes).clear();
    }
    /// Vectors for which a route was ever made, with their current message.
    pub fn routes(&self) -> BTreeMap<u16, MsiMessage> {
        lock(&self.routes).clone()
    }
}

impl MsiSink for Interrupts {
    fn route(&self, vector: u16, message: MsiMessage) {
        lock(&self.routes).insert(vector, message);
    }
    fn fire(&self, vector: u16) {
        if self.only_counts.load(Ordering::Relaxed) {
            self.count.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let Some(message) = lock(&self.routes).get(&vector).copied() else {
            panic!("the device fired vector {vector}, which it never routed");
        };
        self.count.fetch_add(1, Ordering::Relaxed);
        lock(&self.fired).push_back(message);
    }
}

/// The worker's list of what is due.
#[derive(Default)]
pub struct Worker {
    due: Mutex<VecDeque<Work>>,
    away: AtomicBool,
}

impl Worker {
    fn next(&self) -> Option<Work> {
        lock(&self.due).pop_front()
    }
}

impl Worker {
    fn forget(&self) {
        lock(&self.due).clear();
    }
}

impl Waker for Worker {
    fn wake(&self, work: Work) {
        if self.away.load(Ordering::Relaxed) {
            return;
        }
        let mut due = lock(&self.due);
        assert!(!due.contains(&work), "the device woke {work:?} twice without a run in between");
        due.push_back(work);
    }
}

/// Keeps the events of a run, from [`start`](Self::start) on.
#[derive(Default)]
pub struct Recorder {
    on: AtomicBool,
    events: Mutex<Vec<Event>>,
}

impl Recorder {
    /// Forget what there was and keep what comes.
    pub fn start(&self) {
        lock(&self.events).clear();
        self.on.store(true, Ordering::Relaxed);
    }
    /// The events since [`start`](Self::start).
    pub fn events(&self) -> Vec<Event> {
        lock(&self.events).clone()
    }
    /// Names of the commands that arrived since [`start`](Self::start), in order.
    pub fn commands(&self) -> Vec<&'static str> {
        let name = |event: &Event| match event {
            Event::HwcRequest { command, .. } => Some(*command),
            _ => None,
        };
        lock(&self.events).iter().filter_map(name).collect()
    }
    /// Index of the first event for which `what` holds.
    ///
    /// # Panics
    /// There is none.
    pub fn position(&self, name: &str, what: impl Fn(&Event) -> bool) -> usize {
        lock(&self.events).iter().position(what).unwrap_or_else(|| panic!("no event: {name}"))
    }
}

impl Observer for Recorder {
    fn event(&self, _t_ns: u64, event: &Event) {
        if self.on.load(Ordering::Relaxed) {
            lock(&self.events).push(event.clone());
        }
    }
}

/// A frame that the device sent, as the cable saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SentFrame {
    /// The bytes from the Ethernet header on.
    pub bytes: Vec<u8>,
    /// What the device left for the port to do.
    pub offload: TxOffload,
}

/// The far end of a cable: keeps what the device sends.
#[derive(Default)]
pub struct Cable {
    capabilities: PortCapabilities,
    unplugged: AtomicBool,
    keep: AtomicBool,
    frames: AtomicU64,
    sent: Mutex<VecDeque<SentFrame>>,
}

impl Cable {
    fn new(capabilities: PortCapabilities) -> Self {
        Self { capabilities, keep: AtomicBool::new(true), ..Self::default() }
    }
    /// Frames since the last call, oldest first.
    pub fn take(&self) -> Vec<SentFrame> {
        lock(&self.sent).drain(..).collect()
    }
    /// Frames since the world began.
    pub fn frames(&self) -> u64 {
        self.frames.load(Ordering::Relaxed)
    }
    /// Refuse frames, as a full port does.
    pub fn unplug(&self, unplugged: bool) {
        self.unplugged.store(unplugged, Ordering::Relaxed);
    }
    /// Take frames without looking at them (benchmarks).
    pub fn look_away(&self) {
        self.keep.store(false, Ordering::Relaxed);
    }
}

impl Port for Cable {
    fn capabilities(&self) -> PortCapabilities {
        self.capabilities
    }
    fn send(&self, frame: &TxFrame<'_>) -> Result<(), PortDropped> {
        if !self.keep.load(Ordering::Relaxed) {
            return Ok(());
        }
        if self.unplugged.load(Ordering::Relaxed) {
            return Err(PortDropped);
        }
        self.frames.fetch_add(1, Ordering::Relaxed);
        let mut bytes = vec![0; frame.len];
        let mut at = 0;
        for slice in frame.slices {
            let part = &mut bytes[at..at + slice.len()];
            slice.read_slice(part, 0).expect("a slice holds its own length");
            at += slice.len();
        }
        assert_eq!(at, frame.len, "a frame's length is the sum of its slices");
        lock(&self.sent).push_back(SentFrame { bytes, offload: frame.offload });
        Ok(())
    }
}

/// Most cards that are put into one machine.
const MAX_CARDS: usize = 4096;
/// How far the clock of a card that takes another's place is ahead of that one's, nanoseconds: far more than any
/// deadline.
const REPLACEMENT_NS: u64 = 3_600_000_000_000;

/// Where the card is, and another can be put in its place. Cards that were taken out are kept until the machine goes.
pub struct Slot {
    cards: Box<[OnceLock<Arc<ManaDevice>>]>,
    current: AtomicUsize,
}

impl Slot {
    fn new(card: ManaDevice) -> Self {
        let cards: Box<[_]> = (0..MAX_CARDS).map(|_| OnceLock::new()).collect();
        cards[0].get_or_init(|| Arc::new(card));
        Self { cards, current: AtomicUsize::new(0) }
    }
    fn put(&self, card: ManaDevice) {
        let next = self.current.load(Ordering::Relaxed) + 1;
        self.cards[next].get_or_init(|| Arc::new(card));
        self.current.store(next, Ordering::Release);
    }
}

impl Slot {
    /// The card that is in it, for somebody else in front of it (a server).
    pub fn card(&self) -> &Arc<ManaDevice> {
        self.cards[self.current.load(Ordering::Acquire)].get().expect("a card is in the slot")
    }
}

impl Deref for Slot {
    type Target = ManaDevice;
    fn deref(&self) -> &ManaDevice {
        self.card()
    }
}

/// The machine: the card in it, and everything the card reaches.
pub struct World {
    /// The card.
    pub device: Slot,
    /// Guest memory and its DMA allocator.
    pub memory: GuestMemory,
    /// Interrupt controller.
    pub interrupts: Arc<Interrupts>,
    /// The device's only clock.
    pub clock: Arc<ManualClock>,
    /// What happened.
    pub recorder: Arc<Recorder>,
    /// Cables in vPort order.
    pub cables: Vec<Arc<Cable>>,
    /// Online CPUs of the guest.
    pub cpus: u32,
    worker: Arc<Worker>,
    observed: bool,
    /// Pieces of work until the card is replaced.
    replace_in: Cell<Option<u64>>,
    /// How far the card's clock is ahead of the machine's.
    ahead_ns: Cell<u64>,
}

impl Default for World {
    /// Two CPUs and the device's default configuration.
    fn default() -> Self {
        Self::new(DeviceConfig::default(), 2)
    }
}

impl World {
    /// A machine with `cpus` CPUs and a card made from `config`, on cables that do no offloads.
    ///
    /// # Panics
    /// The device refuses `config`.
    pub fn new(config: DeviceConfig, cpus: u32) -> Self {
        Self::with_ports(config, cpus, PortCapabilities::default())
    }

    /// As [`new`](Self::new), on cables with these capabilities.
    ///
    /// # Panics
    /// The device refuses `config`.
    pub fn with_ports(config: DeviceConfig, cpus: u32, capabilities: PortCapabilities) -> Self {
        Self::build(config, cpus, capabilities, true)
    }

    /// As [`with_ports`](Self::with_ports), with no observer attached and cables that take frames without
    /// looking at them: what benchmarks time.
    ///
    /// # Panics
    /// The device refuses `config`.
    pub fn unobserved(config: DeviceConfig, cpus: u32, capabilities: PortCapabilities) -> Self {
        let world = Self::build(config, cpus, capabilities, false);
        world.cables.iter().for_each(|cable| cable.look_away());
        world
    }

    fn build(config: DeviceConfig, cpus: u32, capabilities: PortCapabilities, observed: bool) -> Self {
        let memory = GuestMemory::new();
        let interrupts = Arc::new(Interrupts::default());
        let clock = Arc::new(ManualClock::default());
        let worker = Arc::new(Worker::default());
        let recorder = Arc::new(Recorder::default());
        let cables: Vec<_> = config.vports.iter().map(|_| Arc::new(Cable::new(capabilities))).collect();
        let host = Host {
            memory: Memory::new(memory.mmap()),
            msi: interrupts.clone(),
            clock: clock.clone(),
            waker: worker.clone(),
            ports: cables.iter().map(|cable| cable.clone() as Arc<dyn Port>).collect(),
            observer: observed.then(|| recorder.clone() as Arc<dyn Observer>),
        };
        let device = ManaDevice::new(config, host).expect("the device takes this configuration");
        let (device, replace_in, ahead_ns) = (Slot::new(device), Cell::new(None), Cell::new(0));
        Self {
            device,
            memory,
            interrupts,
            clock,
            recorder,
            cables,
            cpus,
            worker,
            observed,
            replace_in,
            ahead_ns,
        }
    }

    fn host(&self) -> Host {
        Host {
            memory: Memory::new(self.memory.mmap()),
            msi: self.interrupts.clone(),
            clock: Arc::new(CardClock { clock: self.clock.clone(), ahead_ns: self.ahead_ns.get() }),
            waker: self.worker.clone(),
            ports: self.cables.iter().map(|cable| cable.clone() as Arc<dyn Port>).collect(),
            observer: self.observed.then(|| self.recorder.clone() as Arc<dyn Observer>),
        }
    }

    /// Save the card's state, put a new card made from it in its place, whose clock shows another time, and go on with that: the driver
    /// must not notice. The new card's state is the same. Returns the state as bytes.
    ///
    /// # Panics
    /// The state is refused, or the new card's is another.
    pub fn replace_card(&self) -> Vec<u8> {
        let saved = self.device.save();
        let bytes = saved.to_bytes().expect("the state has an encoding");
        self.ahead_ns.set(self.ahead_ns.get() + REPLACEMENT_NS);
        self.interrupts.forget_routes();
        self.worker.forget();
        let state = State::from_bytes(&bytes).expect("the bytes are a state");
        assert_eq!(state, saved, "the bytes are the state");
        let card = ManaDevice::restore(state.config().clone(), self.host(), &state);
        let card = card.expect("a saved state can be restored");
        assert_eq!(card.save(), saved, "the restored card is in the state that was saved");
        self.device.put(card);
        self.device.resume();
        bytes
    }

    /// Replace the card before it does its `n`-th piece of work from now on.
    pub fn replace_card_in(&self, n: u64) {
        self.replace_in.set(Some(n));
    }

    /// Whether the card has just been replaced, so that what it was woken for is to be asked anew.
    fn replaced(&self) -> bool {
        match self.replace_in.get() {
            Some(0) => {
                self.replace_in.set(None);
                self.replace_card();
                true
            }
            Some(n) => {
                self.replace_in.set(Some(n - 1));
                false
            }
            None => false,
        }
    }

    /// From now on the caller runs the device by itself ([`ManaDevice::run`]) and interrupts are only counted: what
    /// benchmarks time.
    pub fn run_by_hand(&self) {
        self.worker.away.store(true, Ordering::Relaxed);
        self.interrupts.only_count();
    }

    /// Let the device do everything it was woken for, and what has come due; time stands still.
    ///
    /// Returns the device's next deadline.
    ///
    /// # Panics
    /// The device never becomes idle.
    pub fn settle(&self) -> Option<u64> {
        for _ in 0..MAX_GOES {
            match self.worker.next() {
                Some(Work::Timers) => (),
                Some(work) => self.run_to_idle(work),
                None => match self.device.run_timers().map(|at_ns| at_ns - self.ahead_ns.get()) {
                    Some(deadline) if deadline <= self.now() && lock(&self.worker.due).is_empty() => {
                        panic!("run_timers leaves a deadline behind that has already passed")
                    }
                    deadline if lock(&self.worker.due).is_empty() => return deadline,
                    _ => (),
                },
            }
        }
        panic!("the device is still busy after {MAX_GOES} goes");
    }

    fn run_to_idle(&self, work: Work) {
        for _ in 0..MAX_GOES {
            if self.replaced() || self.device.run(work, BUDGET) == Ran::Idle {
                return;
            }
        }
        panic!("{work:?} never becomes idle");
    }

    /// Now, in nanoseconds.
    pub fn now(&self) -> u64 {
        self.clock.now_ns()
    }

    /// A frame arrives on the cable of vPort `port`; false if the device dropped it.
    pub fn deliver(&self, port: usize, frame: &[u8]) -> bool {
        self.deliver_all(port, &[frame]) == 1
    }

    /// Frames arrive in one batch on the cable of vPort `port`; returns how many were not dropped.
    pub fn deliver_all(&self, port: usize, frames: &[&[u8]]) -> usize {
        let frames: Vec<_> =
            frames.iter().map(|&bytes| RxFrame { bytes, checksum: RxChecksum::Unknown }).collect();
        self.device.deliver(port, &frames)
    }

    /// The counter `name` of the device.
    ///
    /// # Panics
    /// There is no such counter.
    pub fn counter(&self, name: &str) -> u64 {
        let counters = self.device.counters();
        let found = counters.0.iter().find(|(known, _)| *known == name);
        found.unwrap_or_else(|| panic!("no counter {name} among {counters:?}")).1
    }

    /// Nothing that a driver made may be left.
    ///
    /// # Panics
    /// Something is left; the message lists it.
    pub fn assert_empty_ledger(&self) {
        let Fields(live) = self.device.ledger();
        assert!(!live.is_empty(), "a ledger without kinds proves nothing");
        let mut left = String::new();
        for (kind, count) in live.iter().filter(|(_, count)| *count != 0) {
            let _ = write!(left, " {kind}: {count}");
        }
        assert!(left.is_empty(), "left in the ledger:{left}");
    }
}
