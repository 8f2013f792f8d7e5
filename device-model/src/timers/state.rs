//! What is kept of deadlines.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{Timer, Timers};
use crate::queues::Limits;
use crate::state::{StateError, check};
use crate::sync::lock;

/// Most deadlines, those of queues that are gone included.
const MAX_TIMERS: usize = 1 << 16;

/// A deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimerState {
    in_ns: u64,
    what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum What {
    Moderation(u32),
    Shaping(u32),
    Host,
}

/// Deadlines, checked.
pub struct Restored(Vec<(u64, Timer)>);

impl Restored {
    /// Completion queues that one belongs to.
    pub fn moderated(&self) -> BTreeSet<u32> {
        let cq = |(_, timer): &(u64, Timer)| match timer {
            Timer::Moderation { cq } => Some(*cq),
            Timer::Shaping { .. } | Timer::Host => None,
        };
        self.0.iter().filter_map(cq).collect()
    }
}

impl TimerState {
    /// The deadlines that `states` say, at `now_ns`.
    ///
    /// # Errors
    /// One is of a queue that can't be, or there are too many.
    pub fn restore_all(states: &[Self], limits: Limits, now_ns: u64) -> Result<Restored, StateError> {
        check(states.len() <= MAX_TIMERS, || format!("{} deadlines", states.len()))?;
        let restore = |state: &Self| {
            let (timer, known) = match state.what {
                What::Moderation(cq) => (Timer::Moderation { cq }, cq < limits.cqs),
                What::Shaping(sq) => (Timer::Shaping { sq }, sq < limits.sqs),
                What::Host => (Timer::Host, true),
            };
            check(known, || format!("a deadline of {timer:?}"))?;
            Ok((now_ns.saturating_add(state.in_ns), timer))
        };
        Ok(Restored(states.iter().map(restore).collect::<Result<_, StateError>>()?))
    }
}

impl Timers {
    /// What is kept at `now_ns`, in order. Beyond the most that can be restored, those of the far future are left out:
    /// only queues that are gone have so many.
    pub fn save(&self, now_ns: u64) -> Vec<TimerState> {
        let mut all: Vec<_> = lock(&self.due).iter().map(|Reverse(entry)| *entry).collect();
        all.sort_unstable();
        let save = |(at_ns, timer): (u64, Timer)| TimerState {
            in_ns: at_ns.saturating_sub(now_ns),
            what: match timer {
                Timer::Moderation { cq } => What::Moderation(cq),
                Timer::Shaping { sq } => What::Shaping(sq),
                Timer::Host => What::Host,
            },
        };
        all.into_iter().take(MAX_TIMERS).map(save).collect()
    }
    /// Exactly these deadlines.
    pub fn load(&self, restored: Restored) {
        *lock(&self.due) = restored.0.into_iter().map(Reverse).collect();
        self.begin();
    }
}
