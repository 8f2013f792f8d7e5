//! What is kept of queues, and how they come back. Whether a runner has been woken is not kept: after a restore all
//! run once.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::{Limits, NO_PAGE, Queues, Slot, WqObject};
use crate::config::DeviceConfig;
use crate::doors::Work;
use crate::ring::state::{CompletionQueueState, EventQueueState, WorkQueueState};
use crate::ring::{EventQueue, WorkQueue};
use crate::state::{StateError, check};
use crate::table::{Device, FIRST_FREE_PAGE};
use crate::timers::state::{Restored, TimerState};

/// A send or receive queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WqObjectState {
    ring: WorkQueueState,
    stopped: bool,
    held_for_ns: Option<u64>,
}

impl WqObject {
    /// What is kept at `now_ns`; ids are kept with the object.
    pub fn save(&self, now_ns: u64) -> WqObjectState {
        let Self {
            id: _,
            ring,
            cq: _,
            vport: _,
            mem_key: _,
            room: _,
            stopped,
            scratch: _,
            wqe: _,
            held_until,
        } = self;
        WqObjectState {
            ring: ring.save(),
            stopped: *stopped,
            held_for_ns: held_until.map(|until| until.saturating_sub(now_ns)),
        }
    }
    /// The queue that `state` says, at `now_ns`.
    ///
    /// # Errors
    /// There can't be such a queue.
    pub fn restore(
        state: &WqObjectState,
        (id, cq, vport): (u32, u32, usize),
        ring: fn(&WorkQueueState) -> Result<WorkQueue, StateError>,
        now_ns: u64,
    ) -> Result<Self, StateError> {
        Ok(Self {
            stopped: state.stopped,
            held_until: state.held_for_ns.map(|ns| now_ns.saturating_add(ns)),
            ..Self::new(id, ring(&state.ring)?, cq, vport, Device::Mana.gpa_mkey())
        })
    }
}

/// Whether queues of a card made from `config` can be rung through `page`.
///
/// # Errors
/// They can't.
pub fn check_page(config: &DeviceConfig, page: u32) -> Result<(), StateError> {
    // A device has its page even where the BAR is shorter.
    let pages = u32::from(config.doorbell_pages).max(FIRST_FREE_PAGE);
    check(page < pages, || format!("a queue on doorbell page {page}"))
}

impl<Q> Slot<Q> {
    /// The doorbell page of the queue, if there is one.
    pub fn page(&self) -> Option<u32> {
        Some(self.page.load(Ordering::Acquire)).filter(|&page| page != NO_PAGE)
    }
    /// The latest doorbell said `tail`.
    pub fn load_tail(&self, tail: u32) {
        self.pending.post(tail);
    }
}

impl Queues {
    /// What is kept of event queue `id`.
    pub fn save_eq(&self, id: u32) -> Option<EventQueueState> {
        self.eq(id)?.lock().as_ref().map(EventQueue::save)
    }
    /// What is kept of completion queue `id` at `now_ns`.
    pub fn save_cq(&self, id: u32, now_ns: u64) -> Option<CompletionQueueState> {
        self.cq(id)?.lock().as_ref().map(|cq| cq.save(now_ns))
    }
    /// What is kept of deadlines at `now_ns`.
    pub fn save_timers(&self, now_ns: u64) -> Vec<TimerState> {
        self.core.timers.save(now_ns)
    }
    /// Have the timers run, whatever there is.
    pub fn wake_timers(&self) {
        if self.core.timers.is_to_be_told() {
            self.core.waker.wake(Work::Timers);
        }
    }
    /// Exactly these deadlines.
    pub fn load_timers(&self, timers: Restored) {
        self.core.timers.load(timers);
    }
}

/// Whether `id` is one that commands give out: not the channel's own, and below `limit`.
///
/// # Errors
/// It is not.
pub fn check_id(id: u32, limit: u32) -> Result<(), StateError> {
    check((super::HWC_QUEUE + 1..limit).contains(&id), || format!("a queue with id {id}"))
}

impl Limits {
    /// Whether the ids of a work queue and its completion queue can be.
    ///
    /// # Errors
    /// They can't.
    pub fn check_pair(&self, is_send: bool, wq: u32, cq: u32) -> Result<(), StateError> {
        check_id(wq, if is_send { self.sqs } else { self.rqs })?;
        check_id(cq, self.cqs)
    }
}
