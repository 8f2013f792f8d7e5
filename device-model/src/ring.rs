//! The rings: work queues that the driver fills, completion and event queues that the card fills.
//!
//! A work queue is a ring of bytes; driver and card count them modulo 2^32. Completion and event queues are rings
//! of entries. The card's count of them starts at the number of entries N; entry i lies in slot i mod N and carries
//! (i / N) mod 8 in its three owner bits, so that the first lap differs from zeroed memory. The driver tells
//! by doorbell how many it has taken, modulo 8 N, and whether it wants to be notified of the next one.
//!
//! Source: `mana_gd_ring_doorbell`, `mana_gd_read_cqe`, `mana_gd_process_eq_events` in gdma_main.c; the sheet's
//! sections 2.5 and 5.

pub mod state;

use std::collections::VecDeque;

use zerocopy::FromBytes;

use crate::dma::{DmaError, GuestRam};
use crate::region::{RingMemory, RingView};
use crate::wire::queue::{
    BASIC_UNIT, Cqe, Eqe, EventEntry, MAX_RQ_WQE, MAX_SQ_WQE, OWNER_SHIFT, Sge, WqeHeader,
};

/// Owner bits count laps modulo this.
const LAPS: u64 = 8;

/// Why a WQE can't be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WqeError {
    /// The doorbell's tail is not on a WQE boundary or further ahead than the ring is long.
    #[error("doorbell tail {tail:#x} is impossible with the queue's head at {head:#x}")]
    Tail {
        /// What the doorbell said, bytes.
        tail: u32,
        /// First byte not yet consumed.
        head: u32,
    },
    /// The header's counts make the WQE longer than the queue's kind allows or than what was posted.
    #[error("a WQE of {len} bytes where {available} are possible")]
    Length {
        /// Bytes by the header's counts.
        len: usize,
        /// Bytes that there are.
        available: usize,
    },
    /// The ring is not guest memory.
    #[error(transparent)]
    Dma(#[from] DmaError),
}

/// Bytes of a WQE that are read before its length is known, if as many were posted: most WQEs have no more.
const FIRST_READ: usize = 2 * BASIC_UNIT as usize;

/// A WQE as it was when read: the guest can change it no more. Reuse one for many.
#[derive(Debug)]
pub struct Wqe {
    raw: [u8; MAX_SQ_WQE],
    header: WqeHeader,
}

/// A buffer for WQEs holds the smallest.
const NO_ROOM: WqeError = WqeError::Length { len: MAX_SQ_WQE, available: 0 };

impl Default for Wqe {
    fn default() -> Self {
        Self { raw: [0; MAX_SQ_WQE], header: WqeHeader::default() }
    }
}

impl Wqe {
    /// Counts and flags.
    pub fn header(&self) -> WqeHeader {
        self.header
    }
    /// The inline OOB: 8, 24 or 32 bytes.
    pub fn oob(&self) -> &[u8] {
        let start = size_of::<WqeHeader>();
        self.raw.get(start..start + self.header.oob_len()).unwrap_or_default()
    }
    /// The scatter/gather list.
    pub fn sgl(&self) -> &[Sge] {
        let list = self.raw.get(self.header.sgl_offset()..).unwrap_or_default();
        <[Sge]>::ref_from_prefix_with_elems(list, self.header.num_sge())
            .map(|(sgl, _)| sgl)
            .unwrap_or_default()
    }
    /// Bytes in the ring.
    pub fn len(&self) -> u32 {
        self.header.wqe_len() as u32
    }
}

/// A send or receive queue's ring.
#[derive(Debug)]
pub struct WorkQueue {
    memory: RingMemory,
    head: u32,
    max_wqe: usize,
}

impl WorkQueue {
    /// Whether a work queue can be `bytes` long: a power of two, so that offsets modulo 2^32 stay in step, and no
    /// shorter than the longest WQE.
    pub fn is_valid_size(bytes: u32) -> bool {
        bytes.is_power_of_two() && bytes as usize >= MAX_SQ_WQE
    }
    /// An empty send queue.
    pub fn send(memory: RingMemory) -> Self {
        Self { memory, head: 0, max_wqe: MAX_SQ_WQE }
    }
    /// An empty receive queue.
    pub fn receive(memory: RingMemory) -> Self {
        Self { memory, head: 0, max_wqe: MAX_RQ_WQE }
    }
    /// Bytes of the ring.
    pub fn size(&self) -> u32 {
        self.memory.size()
    }
    /// Basic units of the ring: most WQEs it can hold.
    pub fn entries(&self) -> u32 {
        self.size() / BASIC_UNIT
    }
    /// First byte not yet consumed, free running. A WQE's offset is this before [`advance`](Self::advance).
    pub fn head(&self) -> u32 {
        self.head
    }
    /// Bytes posted and not consumed, given the doorbell's `tail`.
    ///
    /// # Errors
    /// [`WqeError::Tail`] if the tail is impossible.
    pub fn posted(&self, tail: u32) -> Result<u32, WqeError> {
        let posted = tail.wrapping_sub(self.head);
        if posted > self.size() || !posted.is_multiple_of(BASIC_UNIT) {
            return Err(WqeError::Tail { tail, head: self.head });
        }
        Ok(posted)
    }
    /// The ring in `ram`, for a batch of [`fetch`](Self::fetch)es.
    #[inline]
    pub fn view<'v, 'm>(&self, ram: &'v GuestRam<'m>) -> RingView<'v, 'm> {
        self.memory.view(ram)
    }
    /// Read the WQE at the head into `wqe`; `false` if there is none. The head stays where it is.
    ///
    /// # Errors
    /// [`WqeError`]; what follows the head can't be told apart then: [`discard`](Self::discard) it.
    #[inline]
    pub fn fetch(&self, view: &RingView<'_, '_>, tail: u32, wqe: &mut Wqe) -> Result<bool, WqeError> {
        let posted = self.posted(tail)? as usize;
        if posted == 0 {
            return Ok(false);
        }
        let (first, rest) = wqe.raw.split_first_chunk_mut::<FIRST_READ>().ok_or(NO_ROOM)?;
        let read = if posted >= FIRST_READ {
            self.memory.load(view, self.head, first)?;
            FIRST_READ
        } else {
            let only = first.first_chunk_mut::<{ BASIC_UNIT as usize }>().ok_or(NO_ROOM)?;
            self.memory.load(view, self.head, only)?;
            BASIC_UNIT as usize
        };
        wqe.header = WqeHeader::read_from_prefix(first).map(|(header, _)| header).unwrap_or_default();
        let len = wqe.header.wqe_len();
        let available = posted.min(self.max_wqe);
        if len > available {
            // Nothing of the list may be believed.
            wqe.header = WqeHeader::default();
            return Err(WqeError::Length { len, available });
        }
        if let Some(missing @ 1..) = len.checked_sub(read) {
            let rest = rest.get_mut(..missing).unwrap_or_default();
            self.memory.read(view, self.head.wrapping_add(read as u32), rest)?;
        }
        Ok(true)
    }
    /// The WQE just fetched is consumed.
    pub fn advance(&mut self, wqe: &Wqe) {
        self.head = self.head.wrapping_add(wqe.len());
    }
    /// Drop everything up to `tail`, after an error that leaves no other way.
    pub fn discard(&mut self, tail: u32) {
        self.head = tail & !(BASIC_UNIT - 1);
    }
}

/// What a doorbell meant for the ring's owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Rung {
    /// The driver has taken entries: there is more room.
    pub freed: bool,
    /// The tail makes no sense: overflow, or the driver counts differently.
    pub impossible: bool,
    /// The tail is one that the driver had passed already.
    pub backward: bool,
}

/// Producer, consumer and arm state that completion and event queues share.
#[derive(Debug)]
struct Cursor {
    entries: u64,
    producer: u64,
    /// Slot of the next entry, and its lap modulo 8: the producer's index, without the divisions.
    slot: u32,
    lap: u32,
    consumer: u64,
    /// Notify once the producer passes this.
    armed_at: Option<u64>,
    /// May be armed for entries that are still to come.
    arms_ahead: bool,
}

impl Cursor {
    /// Queues are born armed: the driver waits for the first event of a queue that it has never rung.
    fn new(entries: u32, arms_ahead: bool) -> Self {
        let entries = u64::from(entries.max(1));
        Self {
            entries,
            producer: entries,
            slot: 0,
            lap: 1,
            consumer: entries,
            armed_at: Some(entries),
            arms_ahead,
        }
    }
    /// Entries that the driver is not known to have taken.
    fn outstanding(&self) -> u64 {
        self.producer - self.consumer
    }
    /// Slot and owner bits of the next entry.
    fn next(&self) -> (u32, u32) {
        (self.slot, self.lap << OWNER_SHIFT)
    }
    /// The next entry has been written.
    fn advance(&mut self) {
        self.producer += 1;
        self.slot += 1;
        if u64::from(self.slot) == self.entries {
            self.slot = 0;
            self.lap = (self.lap + 1) % LAPS as u32;
        }
    }
    /// Entries that an armed queue has not notified of.
    fn unannounced(&self) -> u64 {
        self.armed_at.map_or(0, |at| self.producer.saturating_sub(at))
    }
    /// Take the armed state if the producer has passed it.
    fn take_notification(&mut self) -> bool {
        let due = self.unannounced() > 0;
        if due {
            self.armed_at = None;
        }
        due
    }
    /// A doorbell: `tail` entries taken, modulo eight laps.
    fn ring(&mut self, tail: u32, arm: bool) -> Rung {
        let modulus = self.entries * LAPS;
        // The producer modulo eight laps, without a division.
        let producer = u64::from(self.lap) * self.entries + u64::from(self.slot);
        let tail = match u64::from(tail) {
            tail if tail < modulus => tail,
            tail => tail % modulus,
        };
        let behind = if producer >= tail { producer - tail } else { producer + modulus - tail };
        if behind > self.entries {
            return self.ring_ahead(modulus - behind, arm);
        }
        let consumer = self.producer - behind;
        let (freed, backward) = (consumer > self.consumer, consumer < self.consumer);
        self.consumer = self.consumer.max(consumer);
        self.armed_at = arm.then_some(consumer);
        Rung { freed, impossible: false, backward }
    }
    /// A tail `ahead` of the producer: rdma-core arms a completion queue so for an entry that is still to come.
    fn ring_ahead(&mut self, ahead: u64, arm: bool) -> Rung {
        let impossible = !self.arms_ahead || !arm || ahead > self.entries;
        if !impossible {
            self.armed_at = Some(self.producer + ahead);
        }
        Rung { impossible, ..Rung::default() }
    }
}

/// The queue has no room for an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PostError {
    /// Full: the driver must take entries first.
    #[error("the queue is full")]
    Full,
    /// The ring is not guest memory.
    #[error(transparent)]
    Dma(#[from] DmaError),
}

/// Interrupt moderation of a completion queue: a notification waits until enough completions are there, or long enough.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moderation {
    /// Microseconds from the first completion on; 0 is no moderation.
    pub usec: u16,
    /// Completions; 0 is as many as come.
    pub completions: u16,
}

impl Moderation {
    /// Longest wait that a doorbell can ask for, microseconds.
    pub const MAX_USEC: u16 = 0x3ff;
    /// Most completions that a doorbell can ask for.
    pub const MAX_COMPLETIONS: u16 = 0xff;
}

/// Whether [`EventEntry::Completion`] is to be posted to a completion queue's event queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Notify {
    /// No, or somebody takes care of it already.
    No,
    /// Yes.
    Now,
    /// Not yet: call [`CompletionQueue::expire`] at this time, nanoseconds of the device's clock.
    At(u64),
}

/// A completion queue.
#[derive(Debug)]
pub struct CompletionQueue {
    memory: RingMemory,
    cursor: Cursor,
    parent_eq: u32,
    held: VecDeque<Cqe>,
    waiter: Option<u32>,
    moderation: Moderation,
    /// When the notification that is being held back is due.
    due_ns: Option<u64>,
    /// Somebody will call [`expire`](Self::expire).
    timed: bool,
    /// Changes what is posted.
    tamper: Option<Box<dyn Tamper>>,
}

impl std::fmt::Debug for dyn Tamper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tamper")
    }
}

/// Has its way with completions before they are posted.
pub trait Tamper: Send {
    /// What is to be posted for `cqe`. Called with the queue's lock held.
    fn tamper(&self, cqe: Cqe) -> Posted;
}

/// A completion as it is posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Posted {
    /// The completion. Owner bits that are set turn the ring's over.
    pub cqe: Cqe,
    /// How often.
    pub copies: usize,
}

impl CompletionQueue {
    /// Most completions that [`post_or_hold`](Self::post_or_hold) keeps.
    const MAX_HELD: usize = 16;

    /// Whether a completion queue can be `bytes` long.
    pub fn is_valid_size(bytes: u32) -> bool {
        bytes != 0 && (bytes as usize).is_multiple_of(size_of::<Cqe>())
    }
    /// An empty, armed queue that notifies through event queue `parent_eq`.
    pub fn new(memory: RingMemory, parent_eq: u32) -> Self {
        let entries = memory.size() / size_of::<Cqe>() as u32;
        Self {
            memory,
            cursor: Cursor::new(entries, true),
            parent_eq,
            held: VecDeque::new(),
            waiter: None,
            moderation: Moderation::default(),
            due_ns: None,
            timed: false,
            tamper: None,
        }
    }
    /// Moderate notifications as `moderation` says.
    pub fn moderate(&mut self, moderation: Moderation) {
        self.moderation = moderation;
        self.due_ns = None;
    }
    /// How notifications are moderated.
    pub fn moderation(&self) -> Moderation {
        self.moderation
    }
    /// Id of the event queue that is told.
    pub fn parent_eq(&self) -> u32 {
        self.parent_eq
    }
    /// Entries of the ring.
    pub fn entries(&self) -> u32 {
        self.cursor.entries as u32
    }
    /// Completions that may be posted on the strength of WQEs: a driver posts no more WQEs than its completion queue
    /// has entries, but need ring the completion queue only once in eight laps. Check before a WQE is consumed.
    pub fn room(&self) -> u32 {
        self.capacity().saturating_sub(self.cursor.outstanding() + self.held.len() as u64) as u32
    }
    /// The driver has not rung for as many laps as there can be.
    #[inline]
    pub fn is_overdue(&self) -> bool {
        self.cursor.outstanding() >= self.capacity()
    }
    /// Most completions that the driver may not have told of.
    fn capacity(&self) -> u64 {
        self.cursor.entries * (LAPS - 1)
    }
    /// Slots that the driver is known to have emptied: what a completion without a WQE needs.
    pub fn free(&self) -> u32 {
        self.cursor.entries.saturating_sub(self.cursor.outstanding()) as u32
    }
    /// The ring in `ram`, for a batch of [`post`](Self::post)s.
    #[inline]
    pub fn view<'v, 'm>(&self, ram: &'v GuestRam<'m>) -> RingView<'v, 'm> {
        self.memory.view(ram)
    }
    /// Write the completion `data` of work queue `wq`. Many may be posted before one
    /// [`notification`](Self::notification).
    ///
    /// # Errors
    /// [`PostError::Full`] if there is no [`room`](Self::room), else the ring is not guest memory.
    #[inline]
    pub fn post(
        &mut self,
        view: &RingView<'_, '_>,
        data: &[u8; Cqe::DATA],
        wq: u32,
        is_sq: bool,
    ) -> Result<(), PostError> {
        if self.tamper.is_some() {
            return self.post_tampered(view, Cqe { data: *data, info: Cqe::info(wq, is_sq).into() });
        }
        self.write(view, data, Cqe::info(wq, is_sq))
    }
    #[inline]
    fn write(&mut self, view: &RingView<'_, '_>, data: &[u8; Cqe::DATA], info: u32) -> Result<(), PostError> {
        if self.cursor.outstanding() >= self.capacity() {
            return Err(PostError::Full);
        }
        let (slot, owner) = self.cursor.next();
        self.memory.publish(view, slot * size_of::<Cqe>() as u32, data, info ^ owner)?;
        self.cursor.advance();
        Ok(())
    }
    #[cold]
    fn post_tampered(&mut self, view: &RingView<'_, '_>, cqe: Cqe) -> Result<(), PostError> {
        let whole = Posted { cqe, copies: 1 };
        let Posted { cqe, copies } = self.tamper.as_ref().map_or(whole, |tamper| tamper.tamper(cqe));
        (0..copies).try_for_each(|_| self.post_raw(view, &cqe))
    }
    /// Post `cqe` as it is; owner bits that are set turn the ring's over.
    ///
    /// # Errors
    /// As [`post`](Self::post).
    pub fn post_raw(&mut self, view: &RingView<'_, '_>, cqe: &Cqe) -> Result<(), PostError> {
        self.write(view, &cqe.data, cqe.info.get())
    }
    /// Somebody changes what is posted.
    #[inline]
    pub fn is_tampered(&self) -> bool {
        self.tamper.is_some()
    }
    /// `tamper` changes what is posted from now on.
    pub fn set_tamper(&mut self, tamper: Option<Box<dyn Tamper>>) {
        self.tamper = tamper;
    }
    /// As [`post`](Self::post) for a completion that no WQE stands for (the receive fence): while no slot is known
    /// to be [`free`](Self::free) it is kept, and posted when the driver has taken entries.
    ///
    /// # Errors
    /// [`PostError::Full`] if too many are kept already, else the ring is not guest memory.
    pub fn post_or_hold(
        &mut self,
        ram: &GuestRam<'_>,
        data: &[u8; Cqe::DATA],
        wq: u32,
        is_sq: bool,
    ) -> Result<(), PostError> {
        if self.free() > 0 && self.held.is_empty() {
            return self.post(&self.view(ram), data, wq, is_sq);
        }
        if self.held.len() >= Self::MAX_HELD {
            return Err(PostError::Full);
        }
        self.held.push_back(Cqe { data: *data, info: Cqe::info(wq, is_sq).into() });
        Ok(())
    }
    /// Send queue `sq` found no room and stopped: it is to run again when there is some.
    pub fn wait_for_room(&mut self, sq: u32) {
        self.waiter = Some(sq);
    }
    /// The send queue that waited for room, if there is some now.
    #[must_use]
    pub fn take_waiter(&mut self) -> Option<u32> {
        if self.free() == 0 { None } else { self.waiter.take() }
    }
    /// Completions are kept for want of a slot.
    pub fn is_holding(&self) -> bool {
        !self.held.is_empty()
    }
    /// Post what was kept, as far as there are slots now.
    ///
    /// # Errors
    /// The ring is not guest memory; one is lost.
    pub fn post_held(&mut self, ram: &GuestRam<'_>) -> Result<(), PostError> {
        let view = self.view(ram);
        while self.free() > 0 {
            let Some(cqe) = self.held.pop_front() else { break };
            self.post(&view, &cqe.data, cqe.wq_num(), cqe.is_sq())?;
        }
        Ok(())
    }
    /// Whether to notify, after entries were posted or a doorbell has come: once for each time that the queue was
    /// armed. The clock is asked only under moderation.
    #[inline]
    pub fn notification(&mut self, now_ns: impl FnOnce() -> u64) -> Notify {
        let Moderation { usec, completions } = self.moderation;
        let unannounced = self.cursor.unannounced();
        if unannounced == 0 {
            return Notify::No;
        }
        if usec == 0 || completions != 0 && unannounced >= u64::from(completions) {
            self.due_ns = None;
            let _ = self.cursor.take_notification();
            return Notify::Now;
        }
        if self.due_ns.is_some() {
            return Notify::No;
        }
        let due_ns = now_ns().saturating_add(u64::from(usec) * 1000);
        self.due_ns = Some(due_ns);
        if std::mem::replace(&mut self.timed, true) { Notify::No } else { Notify::At(due_ns) }
    }
    /// The time that [`Notify::At`] named has come.
    pub fn expire(&mut self, now_ns: u64) -> Notify {
        self.timed = false;
        match self.due_ns {
            Some(due_ns) if due_ns > now_ns => {
                self.timed = true;
                Notify::At(due_ns)
            }
            Some(_) => {
                self.due_ns = None;
                if self.cursor.take_notification() { Notify::Now } else { Notify::No }
            }
            None => Notify::No,
        }
    }
    /// A doorbell: `tail` entries taken, modulo eight laps; notify of the next one if `arm`. Where entries were taken,
    /// [`post_held`](Self::post_held) is due, then [`notification`](Self::notification).
    pub fn ring(&mut self, tail: u32, arm: bool) -> Rung {
        // What was held back until now was for entries that the driver has seen without being told.
        self.due_ns = None;
        self.cursor.ring(tail, arm)
    }
}

/// An event queue.
#[derive(Debug)]
pub struct EventQueue {
    memory: RingMemory,
    cursor: Cursor,
    msix: u16,
    held: VecDeque<Eqe>,
}

impl EventQueue {
    /// Most events kept while the ring is full: each completion queue can have one on the way.
    const MAX_HELD: usize = 4096;

    /// Whether an event queue can be `bytes` long.
    pub fn is_valid_size(bytes: u32) -> bool {
        bytes != 0 && (bytes as usize).is_multiple_of(size_of::<Eqe>())
    }
    /// An empty, armed queue that interrupts through MSI-X vector `msix`.
    pub fn new(memory: RingMemory, msix: u16) -> Self {
        let entries = memory.size() / size_of::<Eqe>() as u32;
        Self { memory, cursor: Cursor::new(entries, false), msix, held: VecDeque::new() }
    }
    /// MSI-X vector.
    pub fn msix(&self) -> u16 {
        self.msix
    }
    /// Entries of the ring.
    pub fn entries(&self) -> u32 {
        self.cursor.entries as u32
    }
    /// Post `event`, or keep it while the ring is full; `true` if the vector is to be signalled.
    ///
    /// # Errors
    /// [`PostError::Full`] if too many are kept already, else the ring is not guest memory.
    pub fn post(&mut self, ram: &GuestRam<'_>, event: EventEntry) -> Result<bool, PostError> {
        if self.held.is_empty() && self.has_slot() {
            self.write(&self.memory.view(ram), event.entry())?;
            return Ok(self.cursor.take_notification());
        }
        if self.held.len() >= Self::MAX_HELD {
            return Err(PostError::Full);
        }
        self.held.push_back(event.entry());
        Ok(false)
    }
    /// The driver rings after every few events, so a slot it has not rung for is not free.
    fn has_slot(&self) -> bool {
        self.cursor.outstanding() < self.cursor.entries
    }
    fn write(&mut self, view: &RingView<'_, '_>, eqe: Eqe) -> Result<(), PostError> {
        let (slot, owner) = self.cursor.next();
        let details: [u8; Eqe::DETAILS] = zerocopy::transmute!(eqe.details);
        self.memory.publish(view, slot * size_of::<Eqe>() as u32, &details, eqe.info.get() ^ owner)?;
        self.cursor.advance();
        Ok(())
    }
    /// Events are kept for want of a slot.
    pub fn is_holding(&self) -> bool {
        !self.held.is_empty()
    }
    /// Post what was kept, as far as there are slots now.
    ///
    /// # Errors
    /// The ring is not guest memory; one is lost.
    pub fn post_held(&mut self, ram: &GuestRam<'_>) -> Result<(), PostError> {
        let view = self.memory.view(ram);
        while self.has_slot() {
            let Some(eqe) = self.held.pop_front() else { break };
            self.write(&view, eqe)?;
        }
        Ok(())
    }
    /// A doorbell: `tail` entries taken, modulo eight laps; interrupt on the next one if `arm`. Where entries were
    /// taken, [`post_held`](Self::post_held) is due, then [`take_notification`](Self::take_notification).
    pub fn ring(&mut self, tail: u32, arm: bool) -> Rung {
        self.cursor.ring(tail, arm)
    }
    /// `true` once after entries were posted to an armed queue: signal the vector.
    #[must_use]
    pub fn take_notification(&mut self) -> bool {
        self.cursor.take_notification()
    }
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
