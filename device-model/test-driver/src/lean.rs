//! A driver that spends as little as a driver can, for benchmarks and for tests with many threads.
//!
//! The card is brought up by [`Driver`], command by command. Then [`Send`], [`Receive`] and [`Channel`] take its rings
//! over: they write WQEs and read completions in guest memory, byte for byte what `mana.ko` writes and reads, and
//! nothing else, so that what is timed is the card.

use mana_device::config::{DeviceConfig, VportConfig};
use mana_device::doors::{PortCapabilities, RxChecksum, RxFrame, Work};
use mana_device::{ManaDevice, Ran};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use crate::driver::Driver;
use crate::gdma::DeviceId;
use crate::generation::V6_12;
use crate::mana::RxSteering;
use crate::memory::RingMemory;
use crate::message::{Request, Response};
use crate::netdev::{RxRing, TxRing};
use crate::queues::DoorbellPage;
use crate::queues::doorbell::{CQ, EQ, RQ, SQ};
use crate::smc::Establish;
use crate::world::World;

/// What a worker lets a queue do before the next has its turn (`BUDGET` of the VMM's workers).
const BUDGET: usize = 64;
/// Bytes of a WQE with one scatter/gather entry.
const WQE: u32 = 32;
/// Bytes of a completion.
const CQE: u32 = 64;
/// Bytes of an event.
const EQE: u32 = 16;

/// A machine with one port whose cable takes every frame and looks at none.
pub struct Machine {
    world: &'static World,
    memory: &'static GuestMemoryMmap,
    driver: Driver<'static>,
}

impl Machine {
    /// The port is up with `queues` queue pairs and RSS on; its cable does what `capabilities` say.
    pub fn new(queues: u32, capabilities: PortCapabilities) -> Self {
        Self::with_buffers(queues, V6_12.rx_entries, capabilities)
    }
    /// As [`new`](Self::new), with `entries` buffers in each receive queue.
    pub fn with_buffers(queues: u32, entries: u32, capabilities: PortCapabilities) -> Self {
        let vports = vec![VportConfig { mac: [2, 0, 0, 0, 0, 1], max_queues: 64 }];
        let config = DeviceConfig { vports, ..DeviceConfig::default() };
        // A benchmark ends with the process, and so does its machine.
        let world: &'static World = Box::leak(Box::new(World::unobserved(config, queues, capabilities)));
        let memory = Box::leak(Box::new(world.memory.mmap()));
        let mut driver = Driver::probe(world, &V6_12).expect("the driver loads");
        driver.checks_buffers = false;
        driver.netdevs[0].rx_entries = entries;
        driver.netdevs[0].rx_cq_bytes = entries * CQE;
        driver.ifup(0).expect("the port comes up");
        assert_eq!(driver.netdevs[0].tx.len(), queues as usize);
        // Linux leaves RSS off with one queue.
        let netdev = &driver.netdevs[0];
        let (vport, table) = (netdev.info.handle, netdev.info.indirection);
        let rss_on = RxSteering { enable: 1, rss: 1, ..RxSteering::default() };
        driver.config_vport_rx(vport, table, &rss_on).expect("RSS goes on");
        world.run_by_hand();
        Self { world, memory, driver }
    }
    /// The card.
    pub fn device(&self) -> &'static ManaDevice {
        &self.world.device
    }
    /// The card, for somebody in front of it.
    pub fn shared_device(&self) -> Arc<ManaDevice> {
        self.world.device.card().clone()
    }
    /// Interrupts so far.
    pub fn interrupts(&self) -> u64 {
        self.world.interrupts.count()
    }
    /// A counter of the card.
    pub fn counter(&self, name: &str) -> u64 {
        self.world.counter(name)
    }
    /// Put `bytes` somewhere into guest memory; the answer is where and how many.
    pub fn placed(&self, bytes: &[u8]) -> (u64, u32) {
        (self.place(bytes), bytes.len() as u32)
    }
    fn place(&self, bytes: &[u8]) -> u64 {
        let at = self.world.memory.alloc(bytes.len() as u64).address();
        self.world.memory.write(at, bytes);
        at
    }
    /// The send queues; each sends its share of `frames` again and again.
    pub fn senders(&self, frames: &[Vec<u8>]) -> Vec<Send> {
        let key = self.driver.registration.gpa_mkey;
        let netdev = &self.driver.netdevs[0];
        let sender = |(queue, (frames, ring)): (usize, (&[Vec<u8>], &TxRing))| {
            let oob = u64::from(ring.cq) << 8 | u64::from(netdev.vport_offset) << 56;
            let oob = oob | u64::from(ring.wq.id >> 10 & 0x3fff) << 42;
            let wqes = frames.iter().map(|frame| wqe(oob, self.place(frame), key, frame.len() as u32));
            Send {
                device: self.device(),
                work: Work::Transmit { sq: ring.wq.id },
                ring: self.ring(ring.wq.ring()),
                tail: 0,
                oob,
                key,
                wqes: wqes.collect(),
                next: 0,
                id: ring.wq.id,
                page: ring.wq.page(),
                completions: self.completions(ring.cq, ring.wq.page()),
                events: self.events(queue, ring.wq.page()),
            }
        };
        let share = frames.len().div_ceil(netdev.tx.len());
        frames.chunks(share).zip(&netdev.tx).enumerate().map(sender).collect()
    }
    /// The receive queues, their rings full of buffers.
    pub fn receivers(&self) -> Vec<Receive> {
        let receiver = |ring: &RxRing| {
            let memory = self.ring(ring.wq.ring());
            let wqes = (0..memory.len() as u32 / WQE).map(|slot| {
                let mut wqe = [0; WQE as usize];
                memory.read_slice(&mut wqe, (slot * WQE) as usize).expect("inside");
                wqe
            });
            Receive {
                device: self.device(),
                wqes: wqes.collect(),
                ring: memory,
                posted: ring.wq.units(),
                id: ring.wq.id,
                page: ring.wq.page(),
                completions: self.completions(ring.cq, ring.wq.page()),
            }
        };
        self.driver.netdevs[0].rx.iter().map(receiver).collect()
    }
    /// The buffers that a receive queue's WQEs name.
    pub fn buffers(&self, receive: &Receive) -> Vec<VolatileSlice<'static>> {
        let buffer = |wqe: &[u8; 32]| {
            let address = u64::from_le_bytes(*wqe[16..].first_chunk().expect("8 bytes"));
            self.memory.get_slice(GuestAddress(address), 1514).expect("RAM")
        };
        receive.wqes.iter().map(buffer).collect()
    }
    /// Frames from the cable, delivered as a worker does that takes them from a socket.
    pub fn deliver(&self, frames: &[RxFrame<'_>]) -> usize {
        frames.chunks(BUDGET).map(|frames| self.device().deliver(0, frames)).sum()
    }
    /// Index of the receive queue that gets a flow whose hash input is `input`.
    pub fn queue_of(&self, input: &[u8]) -> usize {
        let netdev = &self.driver.netdevs[0];
        let hash = crate::packet::toeplitz(&netdev.key, input) as usize;
        netdev.table[hash % netdev.table.len()]
    }
    fn ring(&self, ring: &RingMemory) -> VolatileSlice<'static> {
        let address = GuestAddress(ring.dma().address());
        self.memory.get_slice(address, ring.len() as usize).expect("the ring is in one piece")
    }
    fn events(&self, queue: usize, page: DoorbellPage) -> Events {
        let queue = self.driver.event_queue(0, queue);
        Events {
            device: self.device(),
            ring: self.ring(queue.ring()),
            entries: queue.entries(),
            head: queue.head(),
            id: queue.id,
            page,
        }
    }
    fn completions(&self, cq: u32, page: DoorbellPage) -> Completions {
        let queue = self.driver.completion_queue(cq);
        Completions {
            device: self.device(),
            ring: self.ring(queue.ring()),
            entries: queue.entries(),
            head: queue.head(),
            id: cq,
            page,
        }
    }
}

/// A WQE with one scatter/gather entry.
fn wqe(oob: u64, address: u64, key: u32, len: u32) -> [u8; 32] {
    let mut wqe = [0; 32];
    wqe[4..8].copy_from_slice(&(1_u32 | 2 << 8).to_le_bytes());
    wqe[8..16].copy_from_slice(&oob.to_le_bytes());
    wqe[16..24].copy_from_slice(&address.to_le_bytes());
    wqe[24..28].copy_from_slice(&key.to_le_bytes());
    wqe[28..32].copy_from_slice(&len.to_le_bytes());
    wqe
}

/// One doorbell: a write to BAR0 through the card's door.
#[inline]
fn ring(device: &ManaDevice, page: DoorbellPage, register: u64, id: u32, value: u32) {
    let value = doorbell(id, value);
    device.bar_write(0, page.offset + register, &value.to_le_bytes()).expect("a doorbell");
}

#[inline]
fn doorbell(id: u32, value: u32) -> u64 {
    u64::from(id) | u64::from(value) << 32
}

/// A completion queue from its driver's side.
pub struct Completions {
    device: &'static ManaDevice,
    ring: VolatileSlice<'static>,
    entries: u32,
    head: u32,
    id: u32,
    page: DoorbellPage,
}

impl Completions {
    /// The type of the next completion, and where it lies.
    #[inline]
    fn next(&mut self) -> Option<(u32, usize)> {
        let at = ((self.head & (self.entries - 1)) * CQE) as usize;
        let word: u32 = self.ring.load(at + 60, Acquire).expect("inside");
        if word >> 29 != (self.head / self.entries) & 7 {
            return None;
        }
        self.head += 1;
        let kind: u32 = self.ring.load(at, Relaxed).expect("inside");
        Some((kind & 0x3f, at))
    }
    /// The doorbell: all that was taken.
    #[inline]
    fn ring(&self, arm: bool) {
        let tail = self.head & (self.entries * 8 - 1);
        ring(self.device, self.page, CQ, self.id, tail | u32::from(arm) << 31);
    }
}

/// An event queue from its driver's side.
pub struct Events {
    device: &'static ManaDevice,
    ring: VolatileSlice<'static>,
    entries: u32,
    head: u32,
    id: u32,
    page: DoorbellPage,
}

impl Events {
    /// Take the next event, if there is one.
    fn next(&mut self) -> Option<u32> {
        let at = ((self.head & (self.entries - 1)) * EQE) as usize;
        let word: u32 = self.ring.load(at + 12, Acquire).expect("inside");
        if word >> 29 != (self.head / self.entries) & 7 {
            return None;
        }
        self.head += 1;
        Some(word & 0xff)
    }
    /// The interrupt handler: take what is there, arm.
    fn handle(&mut self) {
        while self.next().is_some() {}
        ring(self.device, self.page, EQ, self.id, self.head & (self.entries * 8 - 1) | 1 << 31);
    }
}

/// A send queue from its driver's side.
pub struct Send {
    device: &'static ManaDevice,
    work: Work,
    ring: VolatileSlice<'static>,
    tail: u32,
    oob: u64,
    key: u32,
    wqes: Vec<[u8; 32]>,
    next: usize,
    id: u32,
    page: DoorbellPage,
    completions: Completions,
    events: Events,
}

impl Send {
    /// Ask for `flags` of the OOB's first byte and for `trans_off` in every WQE.
    pub fn with_oob(mut self, flags: u64, transport_offset: u64) -> Self {
        self.oob |= flags | transport_offset << 32;
        for wqe in &mut self.wqes {
            wqe[8..16].copy_from_slice(&self.oob.to_le_bytes());
        }
        self
    }
    /// Write `count` WQEs and ring.
    #[inline]
    pub fn post(&mut self, count: usize) {
        for _ in 0..count {
            let wqe = &self.wqes[self.next];
            self.next = if self.next + 1 == self.wqes.len() { 0 } else { self.next + 1 };
            let at = self.tail as usize & (self.ring.len() - 1);
            self.ring.subslice(at, wqe.len()).expect("inside").copy_from(wqe);
            self.tail = self.tail.wrapping_add(WQE);
        }
        self.ring();
    }
    /// Write the WQE of a segmentation request, its header at `header` and its payload at `payload`, and ring.
    pub fn post_large(&mut self, header: (u64, u32), payload: (u64, u32), mss: u32) {
        let mut large = [0; 64];
        large[..32].copy_from_slice(&wqe(self.oob, header.0, self.key, header.1));
        large[4..8].copy_from_slice(&(2 | 2 << 8 | 1 << 11 | mss << 16).to_le_bytes());
        large[32..48].copy_from_slice(&wqe(0, payload.0, self.key, payload.1)[16..]);
        for unit in large.chunks(WQE as usize) {
            let at = self.tail as usize & (self.ring.len() - 1);
            self.ring.subslice(at, unit.len()).expect("inside").copy_from(unit);
            self.tail = self.tail.wrapping_add(WQE);
        }
        self.ring();
    }
    /// The doorbell alone.
    #[inline]
    pub fn ring(&self) {
        ring(self.device, self.page, SQ, self.id, self.tail);
    }
    /// The doorbell that [`ring`](Self::ring) writes: offset in BAR0, and value.
    pub fn doorbell(&self) -> (u64, u64) {
        (self.page.offset + SQ, doorbell(self.id, self.tail))
    }
    /// What the card's worker does.
    #[inline]
    pub fn run(&self) {
        while self.device.run(self.work, BUDGET) == Ran::More {}
    }
    /// Take `count` completions, which must be there, and ring.
    #[inline]
    pub fn reap(&mut self, count: usize) {
        for _ in 0..count {
            let (kind, _) = self.completions.next().expect("a completion for each WQE");
            assert_eq!(kind, 32, "sent");
        }
        self.completions.ring(false);
    }
    /// As [`reap`](Self::reap) after an interrupt: take the event and arm the event queue; at last arm the
    /// completion queue.
    pub fn reap_after_interrupt(&mut self, count: usize) {
        self.events.handle();
        for _ in 0..count {
            let (kind, _) = self.completions.next().expect("a completion for each WQE");
            assert_eq!(kind, 32, "sent");
        }
        self.completions.ring(true);
    }
    /// Wait for one completion, take it and ring.
    pub fn reap_one_waiting(&mut self) {
        while self.completions.next().is_none() {
            std::hint::spin_loop();
        }
        self.completions.ring(false);
    }
    /// The work that a doorbell of this queue asks for.
    pub fn work(&self) -> Work {
        self.work
    }
}

/// A receive queue from its driver's side.
pub struct Receive {
    device: &'static ManaDevice,
    ring: VolatileSlice<'static>,
    /// The WQE of each slot.
    wqes: Vec<[u8; 32]>,
    /// WQEs posted since the queue was made.
    posted: u32,
    id: u32,
    page: DoorbellPage,
    completions: Completions,
}

impl Receive {
    /// Take what is there, post as many buffers, ring both doorbells. The answer is how many packets there were.
    #[inline]
    pub fn poll(&mut self) -> u32 {
        let mut packets = 0;
        while let Some((kind, at)) = self.completions.next() {
            packets += match kind {
                // CQE_RX_COALESCED_4
                2 => (0..4).filter(|ppi| self.len_at(at + 8 + 12 * ppi) != 0).count() as u32,
                1 => {
                    assert_ne!(self.len_at(at + 8), 0, "a packet has bytes");
                    1
                }
                other => panic!("a completion of type {other}"),
            };
        }
        if packets == 0 {
            return 0;
        }
        for _ in 0..packets {
            let slot = self.posted as usize & (self.wqes.len() - 1);
            let wqe = &self.wqes[slot];
            self.ring.subslice(slot * WQE as usize, wqe.len()).expect("inside").copy_from(wqe);
            self.posted = self.posted.wrapping_add(1);
        }
        ring(self.device, self.page, RQ, self.id, self.posted.wrapping_mul(WQE));
        self.completions.ring(false);
        packets
    }
    #[inline]
    fn len_at(&self, at: usize) -> u16 {
        self.ring_of_completions().load(at, Relaxed).expect("inside")
    }
    #[inline]
    fn ring_of_completions(&self) -> &VolatileSlice<'static> {
        &self.completions.ring
    }
}

/// Frames as a port offers them, on which nobody has checked anything.
pub fn offered(frames: &[Vec<u8>], checksum: RxChecksum) -> Vec<RxFrame<'_>> {
    frames.iter().map(|bytes| RxFrame { bytes, checksum }).collect()
}

/// The hardware channel from its driver's side.
pub struct Channel {
    device: &'static ManaDevice,
    sq: VolatileSlice<'static>,
    sq_tail: u32,
    rq: VolatileSlice<'static>,
    rq_tail: u32,
    key: u32,
    request: VolatileSlice<'static>,
    request_address: u64,
    response: VolatileSlice<'static>,
    response_len: usize,
    buffer: [u8; 32],
    wqe: [u8; 64],
    page: DoorbellPage,
    events: Events,
    completions: Completions,
}

impl Channel {
    /// Bytes of each ring.
    const RING: u32 = 4096;

    /// A channel of its own to the card of `world`, established over the test driver's; nothing else is there. The
    /// caller runs the card from now on.
    ///
    /// # Panics
    /// The card does not do as a card does.
    pub fn establish(world: &'static World) -> Self {
        let memory = Box::leak(Box::new(world.memory.mmap()));
        let driver = Driver::probe_hwc(world, &V6_12).expect("the driver loads");
        let key = driver.init_data().gpa_mkey.expect("a memory key");
        world.run_by_hand();
        let [eq, cq, rq, sq, request, response] =
            std::array::from_fn(|_| world.memory.alloc(u64::from(Self::RING)).address());
        driver.smc().establish(&Establish { eq, cq, rq, sq, msix: 0 }).expect("a second channel");
        std::mem::forget(driver);
        let slice = |address| {
            let memory: &'static GuestMemoryMmap = memory;
            memory.get_slice(GuestAddress(address), Self::RING as usize).expect("RAM")
        };
        let device = &world.device;
        let page = DoorbellPage { offset: read_register(device, 0x08) };
        let entries = Self::RING / CQE;
        let events = Events {
            device,
            ring: slice(eq),
            entries: Self::RING / EQE,
            head: Self::RING / EQE,
            id: 0,
            page,
        };
        let mut channel = Self {
            device,
            sq: slice(sq),
            sq_tail: 0,
            rq: slice(rq),
            rq_tail: 0,
            key,
            request: slice(request),
            request_address: request,
            response: slice(response),
            response_len: 0,
            buffer: wqe(0, response, key, 4096),
            wqe: [0; 64],
            page,
            events,
            completions: Completions { device, ring: slice(cq), entries, head: entries, id: 0, page },
        };
        channel.events.handle();
        channel.post_buffer();
        channel.prepare(&Request::new(crate::gdma::code::QUERY_MAX_RESOURCES, DeviceId::NONE, 40, 72));
        channel
    }
    fn post_buffer(&mut self) {
        let at = (self.rq_tail & (Self::RING - 1)) as usize;
        self.rq.subslice(at, self.buffer.len()).expect("inside").copy_from(&self.buffer);
        self.rq_tail = self.rq_tail.wrapping_add(WQE);
        ring(self.device, self.page, RQ, 0, self.rq_tail);
    }
    /// Have `request` ready to be posted, again and again.
    ///
    /// # Panics
    /// It is longer than a page.
    pub fn prepare(&mut self, request: &Request) {
        let bytes = request.bytes();
        self.request.write_slice(bytes, 0).expect("a request fits a page");
        self.response_len = request.response_len();
        self.wqe[4..8].copy_from_slice(&(1_u32 | 6 << 8).to_le_bytes());
        let sge = wqe(0, self.request_address, self.key, bytes.len() as u32);
        self.wqe[32..48].copy_from_slice(&sge[16..]);
    }
    /// Write the send WQE and ring.
    pub fn post(&mut self) {
        let at = (self.sq_tail & (Self::RING - 1)) as usize;
        self.sq.subslice(at, self.wqe.len()).expect("inside").copy_from(&self.wqe);
        self.sq_tail = self.sq_tail.wrapping_add(self.wqe.len() as u32);
        ring(self.device, self.page, SQ, 0, self.sq_tail);
    }
    /// What the card's worker does.
    pub fn run(&self) {
        while self.device.run(Work::Hwc, BUDGET) == Ran::More {}
    }
    /// Wait for the event and both completions, give the buffer back, arm both queues.
    pub fn reap(&mut self) {
        self.reap_waiting(std::hint::spin_loop);
    }
    fn reap_waiting(&mut self, wait: fn()) {
        let mut seen = 0;
        while seen < 2 {
            match self.completions.next() {
                Some(_) => seen += 1,
                None => wait(),
            }
        }
        while self.events.next().is_none() {
            wait();
        }
        self.post_buffer();
        self.completions.ring(true);
        self.events.handle();
    }
    /// Send `request`, which somebody else's thread answers, and wait for the response.
    ///
    /// # Panics
    /// It is longer than a page.
    pub fn exchange(&mut self, request: &Request) -> Response {
        self.prepare(request);
        self.post();
        self.reap_waiting(std::thread::yield_now);
        self.answer()
    }
    /// Send `request`, answer it as a worker does, and take the response.
    ///
    /// # Panics
    /// It is longer than a page.
    pub fn ask(&mut self, request: &Request) -> Response {
        self.prepare(request);
        self.post();
        self.run();
        self.reap();
        self.answer()
    }
    fn answer(&self) -> Response {
        let mut bytes = vec![0; self.response_len];
        self.response.read_slice(&mut bytes, 0).expect("a response fits a page");
        Response::new(bytes, self.response_len)
    }
    /// The card.
    pub fn device(&self) -> &'static ManaDevice {
        self.device
    }
    /// Doorbell page `index`.
    pub fn doorbell_page(&self, index: u32) -> DoorbellPage {
        DoorbellPage { offset: self.page.offset + 4096 * u64::from(index) }
    }
}

/// An 8-byte register of BAR0.
fn read_register(device: &ManaDevice, offset: u64) -> u64 {
    let mut data = [0; 8];
    device.bar_read(0, offset, &mut data).expect("a register");
    u64::from_le_bytes(data)
}
