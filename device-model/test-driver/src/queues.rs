//! Rings and doorbells from the driver's side: it produces work queues and consumes completion and event queues.

use crate::memory::{GuestMemory, RingMemory};
use crate::world::World;

/// Bytes of a WQE basic unit.
pub const BASIC_UNIT: u32 = 32;
/// Bytes of a CQE.
pub const CQE: u32 = 64;
/// Bytes of an EQE.
pub const EQE: u32 = 16;

/// Offsets of the doorbells in a doorbell page.
pub mod doorbell {
    /// Send queues.
    pub const SQ: u64 = 0x000;
    /// Receive queues.
    pub const RQ: u64 = 0x400;
    /// Completion queues.
    pub const CQ: u64 = 0x800;
    /// Moderation of completion queues.
    pub const CQ_MODERATION: u64 = 0x820;
    /// Event queues.
    pub const EQ: u64 = 0xff8;
}

/// One doorbell page of BAR0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DoorbellPage {
    /// Bytes from the start of BAR0.
    pub offset: u64,
}

impl DoorbellPage {
    /// One 8-byte store to `register` of the page.
    ///
    /// # Panics
    /// The device does not take it.
    pub fn ring(self, world: &World, register: u64, value: u64) {
        let address = self.offset + register;
        if let Err(error) = world.device.bar_write(0, address, &value.to_le_bytes()) {
            panic!("doorbell {register:#x} of the page at {:#x}: {error}", self.offset);
        }
    }
}

/// What the consumer found in the next slot of a completion or event queue.
enum Slot<const N: usize> {
    Empty,
    Valid([u8; N]),
}

/// Consumer's side of a ring with owner bits: `N` bytes an entry, the owner in the top three bits of the last byte.
#[derive(Clone, Debug)]
struct Consumer<const N: usize> {
    ring: RingMemory,
    /// Entries consumed, counted from one lap on.
    head: u32,
    entries: u32,
}

impl<const N: usize> Consumer<N> {
    fn new(ring: RingMemory) -> Self {
        let entries = ring.len() / u32::try_from(N).expect("an entry is small");
        Self { ring, head: entries, entries }
    }

    fn next(&mut self, memory: &GuestMemory, what: &str) -> Slot<N> {
        let mut entry = [0; N];
        let offset = (self.head % self.entries) * u32::try_from(N).expect("an entry is small");
        self.ring.read(memory, offset, &mut entry);
        let owner = u32::from(entry[N - 1] >> 5);
        let lap = self.head / self.entries;
        if owner == lap.wrapping_sub(1) & 7 {
            return Slot::Empty;
        }
        assert_eq!(
            owner,
            lap & 7,
            "{what}: overflow, owner bits of entry {} are neither old nor new",
            self.head
        );
        self.head = self.head.wrapping_add(1);
        Slot::Valid(entry)
    }

    /// Doorbell tail: the consumer index modulo 8 laps.
    fn tail(&self) -> u64 {
        u64::from(self.head % (self.entries * 8))
    }
}

fn arm_value(id: u32, tail: u64, arm: bool) -> u64 {
    u64::from(id) | tail << 32 | u64::from(arm) << 63
}

/// An event as it lay in an event queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Eqe {
    /// `details`.
    pub details: [u32; 3],
    /// Type.
    pub kind: u8,
}

/// An event queue of the driver.
#[derive(Clone, Debug)]
pub struct EventQueue {
    /// Id that the device gave it.
    pub id: u32,
    consumer: Consumer<16>,
    page: DoorbellPage,
}

impl EventQueue {
    /// An empty queue in `ring`.
    pub fn new(id: u32, ring: RingMemory, page: DoorbellPage) -> Self {
        Self { id, consumer: Consumer::new(ring), page }
    }
    /// Learn id and doorbell page from event 129.
    pub fn set_identity(&mut self, id: u32, page: DoorbellPage) {
        (self.id, self.page) = (id, page);
    }
    /// The next event, if there is one.
    ///
    /// # Panics
    /// Overflow.
    pub fn poll(&mut self, memory: &GuestMemory) -> Option<Eqe> {
        match self.consumer.next(memory, &format!("EQ {}", self.id)) {
            Slot::Empty => None,
            Slot::Valid(entry) => {
                let word =
                    |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
                assert_eq!(word(12) & 0x1fff_ff00, 0, "EQ {}: reserved bits of an EQE are set", self.id);
                Some(Eqe { details: [word(0), word(4), word(8)], kind: entry[12] })
            }
        }
    }
    /// Tell the device how far it was read, and arm it.
    pub fn doorbell(&self, world: &World, arm: bool) {
        self.page.ring(world, doorbell::EQ, arm_value(self.id & 0xffff, self.consumer.tail(), arm));
    }
    /// Entries consumed, the first lap included.
    pub fn head(&self) -> u32 {
        self.consumer.head
    }
    /// Entries.
    pub fn entries(&self) -> u32 {
        self.consumer.entries
    }
    /// The ring.
    pub fn ring(&self) -> &RingMemory {
        &self.consumer.ring
    }
    /// Give up the ring.
    pub fn into_ring(self) -> RingMemory {
        self.consumer.ring
    }
}

/// A completion as it lay in a completion queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cqe {
    bytes: [u8; 64],
}

impl Cqe {
    /// Work queue that it is about.
    pub fn wq(&self) -> u32 {
        self.u32(60) & 0xff_ffff
    }
    /// A send queue's.
    pub fn is_sq(&self) -> bool {
        self.u32(60) >> 24 & 1 == 1
    }
    /// The u32 at `offset` of the 60 data bytes.
    pub fn u32(&self, offset: usize) -> u32 {
        let byte = |i: usize| u32::from(self.bytes[offset + i]);
        byte(0) | byte(1) << 8 | byte(2) << 16 | byte(3) << 24
    }
    /// The u16 at `offset` of the 60 data bytes.
    pub fn u16(&self, offset: usize) -> u16 {
        u16::from(self.bytes[offset]) | u16::from(self.bytes[offset + 1]) << 8
    }
    /// `cqe_type` of Ethernet completions.
    pub fn kind(&self) -> u8 {
        self.bytes[0] & 0x3f
    }
    /// `client_type` of Ethernet completions.
    pub fn client(&self) -> u8 {
        self.bytes[0] >> 6
    }
}

/// A completion queue of the driver.
#[derive(Clone, Debug)]
pub struct CompletionQueue {
    /// Id that the device gave it.
    pub id: u32,
    consumer: Consumer<64>,
    page: DoorbellPage,
}

impl CompletionQueue {
    /// An empty queue in `ring`.
    pub fn new(id: u32, ring: RingMemory, page: DoorbellPage) -> Self {
        Self { id, consumer: Consumer::new(ring), page }
    }
    /// The next completion, if there is one.
    ///
    /// # Panics
    /// Overflow.
    pub fn poll(&mut self, memory: &GuestMemory) -> Option<Cqe> {
        match self.consumer.next(memory, "CQ") {
            Slot::Empty => None,
            Slot::Valid(bytes) => Some(Cqe { bytes }),
        }
    }
    /// DIM: events wait for `completions` or for `usec` microseconds.
    pub fn moderate(&self, world: &World, completions: u16, usec: u16) {
        let value =
            u64::from(self.id) | u64::from(usec) << 32 | 1 << 47 | u64::from(completions) << 48 | 1 << 63;
        self.page.ring(world, doorbell::CQ_MODERATION, value);
    }
    /// Tell the device how far it was read; `arm` asks for an event at the next completion.
    pub fn doorbell(&self, world: &World, arm: bool) {
        self.page.ring(world, doorbell::CQ, arm_value(self.id, self.consumer.tail(), arm));
    }
    /// Entries consumed, the first lap included.
    pub fn head(&self) -> u32 {
        self.consumer.head
    }
    /// Entries.
    pub fn entries(&self) -> u32 {
        self.consumer.entries
    }
    /// The ring.
    pub fn ring(&self) -> &RingMemory {
        &self.consumer.ring
    }
    /// Give up the ring.
    pub fn into_ring(self) -> RingMemory {
        self.consumer.ring
    }
}

/// A piece of memory that a WQE names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sge {
    /// Bus address.
    pub address: u64,
    /// `mem_key`.
    pub key: u32,
    /// Bytes.
    pub size: u32,
}

/// A work request: what goes into a WQE.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wqe {
    /// Inline OOB: 8, 24 or 32 bytes.
    pub oob: Vec<u8>,
    /// Scatter-gather list.
    pub sgl: Vec<Sge>,
    /// `last_vbytes`.
    pub last_vbytes: u8,
    /// `client_oob_in_sgl`.
    pub client_oob_in_sgl: bool,
    /// `client_data_unit`, 14 bits.
    pub client_data_unit: u16,
}

impl Wqe {
    /// The bytes of the WQE, whole basic units.
    ///
    /// # Panics
    /// The OOB has a length that no WQE can have.
    pub fn encode(&self) -> Vec<u8> {
        let oob_div4 = match self.oob.len() {
            8 => 2,
            24 => 6,
            32 => 7,
            other => panic!("no inline OOB has {other} bytes"),
        };
        let first = u32::from(self.last_vbytes) << 24;
        let second = u32::try_from(self.sgl.len() & 0xff).expect("masked")
            | oob_div4 << 8
            | u32::from(self.client_oob_in_sgl) << 11
            | u32::from(self.client_data_unit) << 16;
        let mut bytes = [first.to_le_bytes(), second.to_le_bytes()].concat();
        bytes.extend(&self.oob);
        bytes.resize(bytes.len().next_multiple_of(16), 0);
        for sge in &self.sgl {
            bytes.extend(sge.address.to_le_bytes());
            bytes.extend(sge.key.to_le_bytes());
            bytes.extend(sge.size.to_le_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(BASIC_UNIT as usize), 0);
        bytes
    }
}

/// Which kind of work queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WqKind {
    /// Send queue.
    Sq,
    /// Receive queue.
    Rq,
}

/// A work queue of the driver.
#[derive(Clone, Debug)]
pub struct WorkQueue {
    /// Id that the device gave it.
    pub id: u32,
    kind: WqKind,
    ring: RingMemory,
    page: DoorbellPage,
    /// Basic units produced; runs on past the ring's end.
    produced: u32,
    /// Basic units known to be consumed.
    consumed: u32,
}

impl WorkQueue {
    /// An empty queue in `ring`.
    pub fn new(kind: WqKind, id: u32, ring: RingMemory, page: DoorbellPage) -> Self {
        Self { id, kind, ring, page, produced: 0, consumed: 0 }
    }

    /// Write a WQE without ringing; returns where it starts (bytes, running) and its basic units, or `None` if the
    /// ring has no room.
    pub fn post(&mut self, memory: &GuestMemory, wqe: &Wqe) -> Option<(u32, u32)> {
        self.post_bytes(memory, &wqe.encode())
    }

    /// As [`post`](Self::post), with any bytes in whole basic units.
    ///
    /// # Panics
    /// They aren't whole basic units.
    pub fn post_bytes(&mut self, memory: &GuestMemory, bytes: &[u8]) -> Option<(u32, u32)> {
        let len = u32::try_from(bytes.len()).expect("a WQE is short");
        assert_eq!(len % BASIC_UNIT, 0, "a WQE is made of basic units");
        let units = len / BASIC_UNIT;
        if units > self.room() {
            return None;
        }
        let start = self.produced.wrapping_mul(BASIC_UNIT);
        self.ring.write(memory, start % self.ring.len(), bytes);
        self.produced = self.produced.wrapping_add(units);
        Some((start, units))
    }

    /// Ring the doorbell with the current tail.
    pub fn doorbell(&self, world: &World) {
        let register = match self.kind {
            WqKind::Sq => doorbell::SQ,
            WqKind::Rq => doorbell::RQ,
        };
        let tail = u64::from(self.produced.wrapping_mul(BASIC_UNIT));
        self.page.ring(world, register, u64::from(self.id) | tail << 32);
    }

    /// The device has completed `units` basic units, in order.
    ///
    /// # Panics
    /// More than were posted.
    pub fn complete(&mut self, units: u32) {
        self.consumed = self.consumed.wrapping_add(units);
        let outstanding = self.produced.wrapping_sub(self.consumed);
        assert!(outstanding <= self.units(), "{:?} {}: more was completed than posted", self.kind, self.id);
    }

    /// Basic units that fit.
    pub fn room(&self) -> u32 {
        self.units() - self.produced.wrapping_sub(self.consumed)
    }
    /// Basic units of the whole ring.
    pub fn units(&self) -> u32 {
        self.ring.len() / BASIC_UNIT
    }
    /// Learn the id (HWC queues get theirs by event).
    pub fn set_identity(&mut self, id: u32, page: DoorbellPage) {
        (self.id, self.page) = (id, page);
    }
    /// Give up the ring.
    pub fn into_ring(self) -> RingMemory {
        self.ring
    }
    /// The ring.
    pub fn ring(&self) -> &RingMemory {
        &self.ring
    }
    /// The doorbell page it was made on.
    pub fn page(&self) -> DoorbellPage {
        self.page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wqe_has_the_sizes_of_the_interface() {
        let sge = Sge { address: 0x1234_5000, key: 7, size: 64 };
        let sized = |oob: usize, sges: usize| {
            Wqe { oob: vec![0; oob], sgl: vec![sge; sges], ..Wqe::default() }.encode()
        };
        assert_eq!(sized(8, 1).len(), 32);
        assert_eq!(sized(24, 1).len(), 64);
        assert_eq!(sized(8, 30).len(), 512);
        assert_eq!(sized(24, 1)[32..40], sge.address.to_le_bytes());
        assert_eq!(sized(8, 1)[16..24], sge.address.to_le_bytes());
        assert_eq!(sized(24, 1)[4..8], (1_u32 | 6 << 8).to_le_bytes());
    }
}
