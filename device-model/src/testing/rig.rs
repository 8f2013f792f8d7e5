//! A card without its hardware channel: queues are opened directly, a driver's end of each is played by hand.

use std::cell::Cell;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

use crate::bar0::Doorbell;
use crate::counters::{Counters, VportCounters};
use crate::dma::Dma;
use crate::doors::{
    MsiMessage, MsiSink, Port, PortCapabilities, PortDropped, RxChecksum, RxFrame, TxFrame, TxOffload, Waker,
    Work,
};
use crate::observe::Tracer;
use crate::pci::msix::Msix;
use crate::queues::{Core, FirstIds, Limits, Queues, WqObject};
use crate::region::{PAGE_SIZE, Region, RingMemory};
use crate::ring::{CompletionQueue, EventQueue, WorkQueue};
use crate::rules::Rules;
use crate::timers::Timers;
use crate::vport::Vport;
use crate::wire::queue::{BASIC_UNIT, Cqe, Sge, WqeHeader};

/// The card's memory key.
pub const MEM_KEY: u32 = 0x77;
/// Doorbell page of every queue.
const PAGE: u32 = 1;
/// Guest memory: two adjacent regions, so that buffers can straddle them.
const REGION: usize = 8 << 20;
const EQ: u32 = 1;

/// A port that keeps what it is given.
#[derive(Default)]
pub struct TestPort {
    /// What it claims to do.
    pub capabilities: PortCapabilities,
    /// Frames it has taken.
    pub sent: Mutex<Vec<(Vec<u8>, TxOffload)>>,
    /// It takes no more.
    pub full: AtomicBool,
}

impl Port for TestPort {
    fn capabilities(&self) -> PortCapabilities {
        self.capabilities
    }
    fn send(&self, frame: &TxFrame<'_>) -> Result<(), PortDropped> {
        if self.full.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(PortDropped);
        }
        let mut bytes = Vec::new();
        for slice in frame.slices {
            assert!(!slice.is_empty());
            let at = bytes.len();
            bytes.resize(at + slice.len(), 0);
            slice.copy_to(&mut bytes[at..]);
        }
        assert_eq!(bytes.len(), frame.len);
        self.sent.lock().unwrap().push((bytes, frame.offload));
        Ok(())
    }
}

#[derive(Default)]
struct Silent;

impl MsiSink for Silent {
    fn route(&self, _: u16, _: MsiMessage) {}
    fn fire(&self, _: u16) {}
}

/// Remembers what is to be run.
#[derive(Default)]
pub struct Woken(pub Mutex<Vec<Work>>);

impl Waker for Woken {
    fn wake(&self, work: Work) {
        self.0.lock().unwrap().push(work);
    }
}

/// The card.
pub struct Rig {
    /// Guest memory.
    pub memory: GuestMemoryMmap,
    /// All queues.
    pub queues: Queues,
    /// One vPort.
    pub vports: [Vport; 1],
    /// Its cable.
    pub port: Arc<TestPort>,
    /// What was woken.
    pub woken: Arc<Woken>,
    /// Bus Master Enable.
    pub bus_master: Arc<AtomicBool>,
    eq_ring: u64,
    allocated: Cell<u64>,
}

impl Rig {
    /// A card whose port does `capabilities`, transmit side configured with vPort offset 0.
    pub fn new(capabilities: PortCapabilities) -> Self {
        let regions = [(GuestAddress(0), REGION), (GuestAddress(REGION as u64), REGION)];
        let memory = GuestMemoryMmap::from_ranges(&regions).unwrap();
        let bus_master = Arc::new(AtomicBool::new(true));
        let (tracer, counters) = (Tracer::silent(), Arc::new(Counters::default()));
        let woken = Arc::new(Woken::default());
        let core = Core {
            tracer: tracer.clone(),
            counters: counters.clone(),
            rules: Rules::default(),
            dma: Dma::new(GuestMemoryAtomic::new(memory.clone()), bus_master.clone()),
            msix: Msix::new(1, Arc::new(Silent), bus_master.clone(), tracer, counters),
            waker: woken.clone(),
            host: Arc::default(),
            timers: Timers::new(0),
        };
        let limits = Limits { eqs: 2, cqs: 4096, sqs: 4096, rqs: 4096, first: FirstIds::default() };
        let queues = Queues::new(Arc::new(core), limits);
        let port = Arc::new(TestPort { capabilities, ..TestPort::default() });
        let vports = [Vport::new([2, 0, 0, 0, 0, 1], port.clone(), 1500)];
        vports[0].configure_tx(Some(0));
        let allocated = Cell::new(u64::from(PAGE_SIZE));
        let mut rig = Self { memory, queues, vports, port, woken, bus_master, eq_ring: 0, allocated };
        rig.eq_ring = rig.allocate(PAGE_SIZE);
        rig.queues.open_eq(EQ, PAGE, EventQueue::new(RingMemory::page(rig.eq_ring), 0));
        rig
    }
    /// The vPort.
    pub fn vport(&self) -> &Vport {
        &self.vports[0]
    }
    /// The vPort's counters.
    pub fn counters(&self) -> &VportCounters {
        &self.vports[0].counters
    }
    /// Zeroed pages of guest memory.
    pub fn allocate(&self, len: u32) -> u64 {
        let at = self.allocated.get();
        self.allocated.set(at + u64::from(len.next_multiple_of(PAGE_SIZE)));
        at
    }
    /// Put `bytes` somewhere into guest memory.
    pub fn place(&self, bytes: &[u8]) -> u64 {
        let at = self.allocate(bytes.len() as u32);
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        at
    }
    /// An address whose `before`-th byte is the last of the first region.
    pub fn straddle(&self, before: u64) -> u64 {
        REGION as u64 - before
    }
    /// Events posted so far (the ring is never rung, so it holds the first 256).
    pub fn events(&self) -> usize {
        let mut eqes = [0; PAGE_SIZE as usize];
        self.memory.read_slice(&mut eqes, GuestAddress(self.eq_ring)).unwrap();
        eqes.chunks(16).filter(|eqe| eqe[15] != 0).count()
    }
    /// A send queue of `entries` basic units and as many completions.
    pub fn sq(&self, id: u32, entries: u32) -> DriverQueue {
        let (driver, ring) = self.wq(id, true, entries, entries);
        self.queues.open_sq(PAGE, WqObject::new(id, WorkQueue::send(ring), driver.cq, 0, MEM_KEY));
        driver
    }
    /// A receive queue of `entries` basic units and as many completions.
    pub fn rq(&self, id: u32, entries: u32) -> DriverQueue {
        let (driver, ring) = self.wq(id, false, entries, entries);
        self.queues.open_rq(PAGE, id, entries);
        self.vport().receive.open(WqObject::new(id, WorkQueue::receive(ring), driver.cq, 0, MEM_KEY));
        driver
    }
    fn wq(&self, id: u32, is_sq: bool, entries: u32, cqes: u32) -> (DriverQueue, RingMemory) {
        let (wq_bytes, cq_bytes) = (entries * BASIC_UNIT, cqes * size_of::<Cqe>() as u32);
        let (wq_pages, wq_ring) = self.scattered(wq_bytes);
        let cq_base = self.allocate(cq_bytes);
        let mut region =
            Region::new(cq_bytes.max(PAGE_SIZE).into(), 0, 0, cq_bytes.div_ceil(PAGE_SIZE)).unwrap();
        let pages = (0..cq_bytes.div_ceil(PAGE_SIZE)).map(|n| cq_base + u64::from(n * PAGE_SIZE));
        region.add_pages(pages).unwrap();
        let cq = if is_sq { id } else { 2048 + id };
        self.queues.open_cq(cq, PAGE, CompletionQueue::new(region.ring(cq_bytes).unwrap(), EQ));
        let driver = DriverQueue {
            id,
            cq,
            is_sq,
            wq_pages,
            wq_bytes,
            tail: 0,
            cq_base,
            entries: u64::from(cqes),
            head: u64::from(cqes),
        };
        (driver, wq_ring)
    }
    /// A ring whose pages are not in order.
    fn scattered(&self, bytes: u32) -> (Vec<u64>, RingMemory) {
        let pages = bytes.div_ceil(PAGE_SIZE);
        let base = self.allocate(bytes);
        let addresses: Vec<u64> = (0..pages).rev().map(|n| base + u64::from(n * PAGE_SIZE)).collect();
        let mut region = Region::new(u64::from(pages * PAGE_SIZE), 0, 0, pages).unwrap();
        region.add_pages(addresses.iter().copied()).unwrap();
        (addresses, region.ring(bytes).unwrap())
    }
    /// Run a send queue until it has nothing left.
    pub fn transmit(&self, sq: &DriverQueue) {
        while crate::tx::run(&self.queues, &self.vports, sq.id, 1000) == crate::Ran::More {}
    }
    /// Frames from the cable.
    pub fn deliver<B: AsRef<[u8]>>(&self, frames: &[B]) -> usize {
        let frames: Vec<RxFrame<'_>> = frames
            .iter()
            .map(|bytes| RxFrame { bytes: bytes.as_ref(), checksum: RxChecksum::Unknown })
            .collect();
        crate::rx::deliver(&self.queues, self.vport(), &frames)
    }
    /// The frames that the port has taken since the last call.
    pub fn sent(&self) -> Vec<(Vec<u8>, TxOffload)> {
        std::mem::take(&mut self.port.sent.lock().unwrap())
    }
    /// Scatter/gather entries for `bytes`, cut at `cuts`, each piece in memory of its own.
    pub fn scatter(&self, bytes: &[u8], cuts: &[usize]) -> Vec<Sge> {
        pieces(bytes.len(), cuts).map(|range| sge(self.place(&bytes[range.clone()]), range.len())).collect()
    }
}

/// `0..len` cut at `cuts`.
pub fn pieces(len: usize, cuts: &[usize]) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut edges: Vec<usize> = cuts.iter().map(|cut| cut % (len + 1)).chain([0, len]).collect();
    edges.sort_unstable();
    edges.dedup();
    let next = edges.clone().into_iter().skip(1);
    edges.into_iter().zip(next).map(|(from, to)| from..to)
}

/// A scatter/gather entry with the card's key.
pub fn sge(address: u64, len: usize) -> Sge {
    Sge { address: address.into(), mem_key: MEM_KEY.into(), size: (len as u32).into() }
}

/// A driver's end of a work queue and its completion queue.
pub struct DriverQueue {
    /// Queue id.
    pub id: u32,
    /// Completion queue id.
    pub cq: u32,
    is_sq: bool,
    wq_pages: Vec<u64>,
    wq_bytes: u32,
    /// Bytes posted, free running.
    pub tail: u32,
    cq_base: u64,
    entries: u64,
    head: u64,
}

impl DriverQueue {
    /// Move the empty ring on both sides to `position`.
    pub fn start_at(&mut self, rig: &Rig, position: u32) {
        self.tail = position & !(BASIC_UNIT - 1);
        let (id, tail) = (self.id, self.tail);
        if self.is_sq {
            rig.queues.sq(id).unwrap().lock().as_mut().unwrap().ring.discard(tail);
        } else {
            rig.vport().receive.with_queue(id, |wq| wq.ring.discard(tail)).unwrap();
        }
        self.ring(rig);
    }
    /// Write a WQE. `flags` are the header's second word apart from the counts.
    pub fn post(&mut self, rig: &Rig, oob: &[u8], flags: u32, sgl: &[Sge]) {
        let div4 = if oob.len() == 24 { 6 } else { 2 };
        let high = sgl.len() as u32 | div4 << 8 | flags;
        let header = WqeHeader { low: 0.into(), high: high.into() };
        let mut wqe = header.as_bytes().to_vec();
        wqe.extend_from_slice(oob);
        wqe.resize(header.sgl_offset(), 0xee);
        wqe.extend_from_slice(sgl.as_bytes());
        wqe.resize(header.wqe_len(), 0xee);
        for (at, unit) in wqe.chunks(BASIC_UNIT as usize).enumerate() {
            let offset = self.tail.wrapping_add(at as u32 * BASIC_UNIT) % self.wq_bytes;
            let page = self.wq_pages[(offset / PAGE_SIZE) as usize];
            rig.memory.write_slice(unit, GuestAddress(page + u64::from(offset % PAGE_SIZE))).unwrap();
        }
        self.tail = self.tail.wrapping_add(wqe.len() as u32);
    }
    /// Write a receive WQE over `sgl`.
    pub fn post_rx(&mut self, rig: &Rig, sgl: &[Sge]) {
        self.post(rig, &[0xee; 8], 0, sgl);
    }
    /// Ring the doorbell of the work queue.
    pub fn ring(&self, rig: &Rig) {
        let (id, tail) = (self.id, self.tail);
        let doorbell =
            if self.is_sq { Doorbell::Sq { id, tail } } else { Doorbell::Rq { id, tail, wqe_count: 0 } };
        rig.queues.doorbell(PAGE, doorbell);
    }
    /// The next completion.
    pub fn reap(&mut self, rig: &Rig) -> Option<Cqe> {
        let slot = self.head % self.entries;
        let mut bytes = [0; size_of::<Cqe>()];
        let address = self.cq_base + slot * size_of::<Cqe>() as u64;
        rig.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        let cqe = Cqe::read_from_bytes(&bytes).unwrap();
        let owner = u64::from(cqe.info.get() >> 29);
        if owner != self.head / self.entries % 8 {
            assert_eq!(owner, (self.head / self.entries + 7) % 8, "overflow");
            return None;
        }
        assert_eq!((cqe.wq_num(), cqe.is_sq()), (self.id, self.is_sq));
        self.head += 1;
        Some(cqe)
    }
    /// All completions that are there.
    pub fn reap_all(&mut self, rig: &Rig) -> Vec<Cqe> {
        std::iter::from_fn(|| self.reap(rig)).collect()
    }
    /// Ring the doorbell of the completion queue.
    pub fn ring_cq(&self, rig: &Rig, arm: bool) {
        let tail = (self.head % (self.entries * 8)) as u32;
        rig.queues.doorbell(PAGE, Doorbell::Cq { id: self.cq, tail, arm });
    }
}
