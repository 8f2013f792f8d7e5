//! Deadlines on the device's clock: what is to be done later, by whoever runs [`crate::ManaDevice::run_timers`].

pub mod state;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::sync::lock;

/// What comes due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Timer {
    /// A moderated completion queue notifies.
    Moderation {
        /// Completion queue id.
        cq: u32,
    },
    /// A send queue may send again that was held back by its vPort's bandwidth clamp.
    Shaping {
        /// Send queue id.
        sq: u32,
    },
    /// Something that the simulated host has put off.
    Host,
}

/// All deadlines. A queue has one at a time, but for those of queues that are gone and had the same id; whoever it
/// concerns checks whether it is still meant.
pub struct Timers {
    due: Mutex<BinaryHeap<Reverse<(u64, Timer)>>>,
    woken: AtomicBool,
}

impl Timers {
    /// None, with room for `capacity`.
    pub fn new(capacity: usize) -> Self {
        Self { due: Mutex::new(BinaryHeap::with_capacity(capacity)), woken: AtomicBool::new(false) }
    }
    /// `timer` comes due at `at_ns`. `true` if that is sooner than anything so far and nobody has been told yet that
    /// something came closer: call the waker.
    #[must_use]
    pub fn add(&self, at_ns: u64, timer: Timer) -> bool {
        let mut due = lock(&self.due);
        let sooner = due.peek().is_none_or(|Reverse((earliest, _))| at_ns < *earliest);
        due.push(Reverse((at_ns, timer)));
        drop(due);
        sooner && self.is_to_be_told()
    }
    /// Whoever runs the timers is to be told of a change, and has not been yet.
    #[must_use]
    pub fn is_to_be_told(&self) -> bool {
        !self.woken.swap(true, Ordering::SeqCst)
    }
    /// A run begins: what is added from now on must be told anew.
    pub fn begin(&self) {
        self.woken.store(false, Ordering::SeqCst);
    }
    /// Take one that is due at `now_ns`.
    pub fn pop(&self, now_ns: u64) -> Option<Timer> {
        let mut due = lock(&self.due);
        due.peek().filter(|Reverse((at_ns, _))| *at_ns <= now_ns)?;
        due.pop().map(|Reverse((_, timer))| timer)
    }
    /// The next deadline.
    pub fn earliest(&self) -> Option<u64> {
        lock(&self.due).peek().map(|Reverse((at_ns, _))| *at_ns)
    }
    /// Forget all but the host's, which outlast what a driver has made.
    pub fn clear(&self) {
        lock(&self.due).retain(|Reverse((_, timer))| *timer == Timer::Host);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_comes_closer_is_told_and_only_once() {
        let timers = Timers::new(4);
        let sq = |sq| Timer::Shaping { sq };
        assert!(timers.add(100, sq(1)));
        assert!(!timers.add(50, sq(2)), "told already");
        timers.begin();
        assert!(!timers.add(70, sq(3)), "not the first");
        assert!(timers.add(10, sq(4)));
        assert_eq!(timers.pop(9), None);
        assert_eq!((timers.pop(60), timers.pop(60), timers.pop(60)), (Some(sq(4)), Some(sq(2)), None));
        assert_eq!(timers.earliest(), Some(70));
        timers.clear();
        assert_eq!(timers.earliest(), None);
    }
}
