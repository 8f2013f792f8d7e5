//! What is kept of rings.

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, IntoBytes};

use super::{CompletionQueue, Cursor, EventQueue, LAPS, Moderation, WorkQueue};
use crate::queues::Limits;
use crate::region::RingMemory;
use crate::region::state::RingState;
use crate::state::{MAX_COUNT, StateError, check, impossible};
use crate::wire::queue::{BASIC_UNIT, Cqe, Eqe, OWNER_SHIFT};

/// A work queue's ring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkQueueState {
    memory: RingState,
    head: u32,
}

impl WorkQueue {
    /// What is kept.
    pub fn save(&self) -> WorkQueueState {
        WorkQueueState { memory: self.memory.save(), head: self.head }
    }
    fn restore(state: &WorkQueueState, make: impl FnOnce(RingMemory) -> Self) -> Result<Self, StateError> {
        let memory = RingMemory::restore(&state.memory)?;
        check(Self::is_valid_size(memory.size()), || format!("a work queue of {} bytes", memory.size()))?;
        check(state.head.is_multiple_of(BASIC_UNIT), || format!("a WQE at byte {}", state.head))?;
        Ok(Self { head: state.head, ..make(memory) })
    }
    /// The send queue that `state` says.
    ///
    /// # Errors
    /// There can't be such a queue.
    pub fn restore_send(state: &WorkQueueState) -> Result<Self, StateError> {
        Self::restore(state, Self::send)
    }
    /// The receive queue that `state` says.
    ///
    /// # Errors
    /// There can't be such a queue.
    pub fn restore_receive(state: &WorkQueueState) -> Result<Self, StateError> {
        Self::restore(state, Self::receive)
    }
    /// Where the ring is.
    pub fn memory(&self) -> &RingMemory {
        &self.memory
    }
}

/// Counts of a ring of entries; slot and lap follow from the producer's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct CursorState {
    producer: u64,
    consumer: u64,
    armed_at: Option<u64>,
}

impl Cursor {
    fn save(&self) -> CursorState {
        let Self { entries: _, producer, slot: _, lap: _, consumer, armed_at, arms_ahead: _ } = *self;
        CursorState { producer, consumer, armed_at }
    }
    /// Go on from `state`, with at most `most` entries outstanding.
    fn restored(self, state: &CursorState, most: u64) -> Result<Self, StateError> {
        let CursorState { producer, consumer, armed_at } = *state;
        let entries = self.entries;
        let possible = (entries..MAX_COUNT).contains(&producer)
            && (entries..=producer).contains(&consumer)
            && producer - consumer <= most
            && armed_at.is_none_or(|at| at <= producer + if self.arms_ahead { entries } else { 0 });
        check(possible, || {
            format!("{producer} entries made, {consumer} taken, armed at {armed_at:?} of {entries}")
        })?;
        let (slot, lap) = ((producer % entries) as u32, (producer / entries % LAPS) as u32);
        Ok(Self { producer, slot, lap, consumer, armed_at, ..self })
    }
}

/// A completion queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompletionQueueState {
    memory: RingState,
    cursor: CursorState,
    parent_eq: u32,
    /// Entries that wait for a slot, 64 bytes each.
    held: Vec<u8>,
    waiter: Option<u32>,
    usec: u16,
    completions: u16,
    due_in_ns: Option<u64>,
    timed: bool,
}

impl CompletionQueue {
    /// What is kept at `now_ns`.
    pub fn save(&self, now_ns: u64) -> CompletionQueueState {
        let Self { memory, cursor, parent_eq, held, waiter, moderation, due_ns, timed, tamper: _ } = self;
        CompletionQueueState {
            memory: memory.save(),
            cursor: cursor.save(),
            parent_eq: *parent_eq,
            held: held.iter().flat_map(IntoBytes::as_bytes).copied().collect(),
            waiter: *waiter,
            usec: moderation.usec,
            completions: moderation.completions,
            due_in_ns: due_ns.map(|due_ns| due_ns.saturating_sub(now_ns)),
            timed: *timed,
        }
    }
    /// The queue that `state` says, at `now_ns`; `has_timer` if its deadline is among the timers.
    ///
    /// # Errors
    /// There can't be such a queue.
    pub fn restore(
        state: &CompletionQueueState,
        limits: Limits,
        has_timer: bool,
        now_ns: u64,
    ) -> Result<Self, StateError> {
        let memory = RingMemory::restore(&state.memory)?;
        check(Self::is_valid_size(memory.size()), || format!("a CQ of {} bytes", memory.size()))?;
        check(state.parent_eq < limits.eqs, || format!("a CQ of EQ {}", state.parent_eq))?;
        let waiter = state.waiter;
        check(waiter.is_none_or(|sq| sq < limits.sqs), || format!("SQ {waiter:?} waits for room"))?;
        let moderation = Moderation { usec: state.usec, completions: state.completions };
        let moderates =
            moderation.usec <= Moderation::MAX_USEC && moderation.completions <= Moderation::MAX_COMPLETIONS;
        check(moderates, || format!("{moderation:?}"))?;
        check(has_timer || !state.timed, || "a notification that nobody sends".into())?;
        check(state.timed || state.due_in_ns.is_none(), || "a notification that nobody waits for".into())?;
        let held = <[Cqe]>::ref_from_bytes(&state.held).ok().filter(|held| held.len() <= Self::MAX_HELD);
        let held = held.filter(|held| held.iter().all(|cqe| cqe.info.get() >> OWNER_SHIFT == 0));
        let held = held.ok_or_else(|| impossible("completions that can't be waiting for a slot"))?;
        let new = Self::new(memory, state.parent_eq);
        let most = new.capacity();
        Ok(Self {
            held: held.iter().copied().collect(),
            waiter,
            moderation,
            due_ns: state.due_in_ns.map(|ns| now_ns.saturating_add(ns)),
            timed: state.timed,
            tamper: None,
            cursor: new.cursor.restored(&state.cursor, most)?,
            ..new
        })
    }
    /// Where the ring is.
    pub fn memory(&self) -> &RingMemory {
        &self.memory
    }
}

/// An event queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventQueueState {
    memory: RingState,
    cursor: CursorState,
    msix: u16,
    /// Entries that wait for a slot, 16 bytes each.
    held: Vec<u8>,
}

impl EventQueue {
    /// What is kept.
    pub fn save(&self) -> EventQueueState {
        let Self { memory, cursor, msix, held } = self;
        EventQueueState {
            memory: memory.save(),
            cursor: cursor.save(),
            msix: *msix,
            held: held.iter().flat_map(IntoBytes::as_bytes).copied().collect(),
        }
    }
    /// The queue that `state` says, of a function with `vectors` vectors.
    ///
    /// # Errors
    /// There can't be such a queue.
    pub fn restore(state: &EventQueueState, vectors: u16) -> Result<Self, StateError> {
        let memory = RingMemory::restore(&state.memory)?;
        check(Self::is_valid_size(memory.size()), || format!("an EQ of {} bytes", memory.size()))?;
        check(state.msix < vectors, || format!("an EQ of vector {}", state.msix))?;
        let held = <[Eqe]>::ref_from_bytes(&state.held).ok().filter(|held| held.len() <= Self::MAX_HELD);
        let held = held.filter(|held| held.iter().all(|eqe| eqe.info.get() >> OWNER_SHIFT == 0));
        let held = held.ok_or_else(|| impossible("events that can't be waiting for a slot"))?;
        let new = Self::new(memory, state.msix);
        let most = new.cursor.entries;
        let cursor = new.cursor.restored(&state.cursor, most)?;
        Ok(Self { held: held.iter().copied().collect(), cursor, ..new })
    }
    /// Where the ring is.
    pub fn memory(&self) -> &RingMemory {
        &self.memory
    }
}
