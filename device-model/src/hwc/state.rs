//! What is kept of the hardware channel: its four queues. A request is answered as a whole or not begun.

use serde::{Deserialize, Serialize};

use super::Hwc;
use super::faults::Late;
use super::faults::state::LetterState;
use crate::card::Card;
use crate::command::Request;
use crate::queues::{HWC_QUEUE, Slot};
use crate::ring::state::{CompletionQueueState, EventQueueState, WorkQueueState};
use crate::ring::{CompletionQueue, EventQueue, WorkQueue, Wqe};
use crate::state::{StateError, check};
use crate::table::Device;
use crate::wire::hwc::MAX_MESSAGE;

/// An established channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HwcState {
    sq: WorkQueueState,
    sq_tail: u32,
    rq: WorkQueueState,
    rq_tail: u32,
    cq: CompletionQueueState,
    eq: EventQueueState,
    late: Vec<LetterState>,
}

/// A channel's state, checked.
pub struct Restored {
    channel: Hwc,
    sq_tail: u32,
    rq_tail: u32,
    cq: CompletionQueue,
    eq: EventQueue,
}

impl Hwc {
    /// What is kept at `now_ns`.
    pub fn save(&self, card: &Card, now_ns: u64) -> Option<HwcState> {
        let queues = &card.queues;
        let Self { sq, rq, request: _, response: _, wqe: _, buffer: _, late } = self;
        Some(HwcState {
            sq: sq.save(),
            sq_tail: queues.sq(HWC_QUEUE).map_or(0, Slot::tail),
            rq: rq.save(),
            rq_tail: queues.rq(HWC_QUEUE).map_or(0, Slot::tail),
            cq: queues.save_cq(HWC_QUEUE, now_ns)?,
            eq: queues.save_eq(HWC_QUEUE)?,
            late: late.save(now_ns),
        })
    }
    /// Become what was checked, with all queues.
    pub fn load(card: &Card, restored: Restored) -> Self {
        let Restored { channel, sq_tail, rq_tail, cq, eq } = restored;
        let (page, queues) = (Device::Hwc.doorbell_page(), &card.queues);
        queues.open_eq(HWC_QUEUE, page, eq);
        queues.open_cq(HWC_QUEUE, page, cq);
        queues.open_hwc(page);
        queues.sq(HWC_QUEUE).into_iter().for_each(|slot| slot.load_tail(sq_tail));
        queues.rq(HWC_QUEUE).into_iter().for_each(|slot| slot.load_tail(rq_tail));
        channel
    }
}

impl HwcState {
    /// Check everything, at `now_ns`; `has_timer` if the completion queue's deadline is among the timers.
    ///
    /// # Errors
    /// There can't be such a channel.
    pub fn build(&self, card: &Card, has_timer: bool, now_ns: u64) -> Result<Restored, StateError> {
        let cq = CompletionQueue::restore(&self.cq, card.queues.limits(), has_timer, now_ns)?;
        check(cq.parent_eq() == HWC_QUEUE, || "the channel's CQ has another EQ".into())?;
        let late = Late::restore(&self.late, now_ns)?;
        let channel = Self::channel(&self.sq, &self.rq, late)?;
        let eq = EventQueue::restore(&self.eq, card.config.msix_table_size)?;
        let rings = [channel.sq.memory(), channel.rq.memory(), cq.memory(), eq.memory()];
        let whole = rings.iter().all(|ring| ring.page_addresses() == 1);
        check(whole, || "the channel's rings are a page each".into())?;
        Ok(Restored { channel, sq_tail: self.sq_tail, rq_tail: self.rq_tail, cq, eq })
    }
    fn channel(sq: &WorkQueueState, rq: &WorkQueueState, late: Late) -> Result<Hwc, StateError> {
        Ok(Hwc {
            sq: WorkQueue::restore_send(sq)?,
            rq: WorkQueue::restore_receive(rq)?,
            request: Request::new(),
            response: Box::new([0; MAX_MESSAGE]),
            wqe: Wqe::default(),
            buffer: Wqe::default(),
            late,
        })
    }
}
