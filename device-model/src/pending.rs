//! The hand-over of a work queue from whoever rings to whoever runs it, without a lock.
//!
//! Rings store the tail, then look whether somebody is on the way; the runner puts its flag down, then looks whether the
//! tail has moved. Each of the two writes before it reads, and all of it is sequentially consistent: one of them sees
//! the other, so that no doorbell is lost, and the flag is taken by one only, so that the queue never runs twice at
//! once.

use crate::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// What is posted to a work queue, and whether somebody is to run it.
#[derive(Default)]
pub struct Pending {
    tail: AtomicU32,
    scheduled: AtomicBool,
    /// What held the queue back is gone, though nothing new was posted.
    resumed: AtomicBool,
}

impl Pending {
    /// Nothing is posted.
    pub fn reset(&self) {
        self.tail.store(0, Ordering::SeqCst);
        self.resumed.store(false, Ordering::SeqCst);
        self.scheduled.store(false, Ordering::SeqCst);
    }
    /// The tail of the latest doorbell, bytes.
    pub fn tail(&self) -> u32 {
        self.tail.load(Ordering::SeqCst)
    }
    /// As [`tail`](Self::tail), for the runner before it looks at anything else: what held the queue back until now, and
    /// does no longer, it will see.
    #[inline]
    pub fn look(&self) -> u32 {
        if self.resumed.load(Ordering::SeqCst) {
            self.resumed.store(false, Ordering::SeqCst);
        }
        self.tail()
    }
    /// A doorbell for a queue that nobody is woken for.
    pub fn post(&self, tail: u32) {
        self.tail.store(tail, Ordering::SeqCst);
    }
    /// A doorbell. `true` if whoever runs the queue must be woken.
    #[must_use]
    #[inline]
    pub fn ring(&self, tail: u32) -> bool {
        self.post(tail);
        self.schedule()
    }
    /// What the queue waited for has come, other than a doorbell. `true` if whoever runs it must be woken. A runner that is
    /// about to rest for want of it runs once more.
    #[must_use]
    pub fn resume(&self) -> bool {
        self.resumed.store(true, Ordering::SeqCst);
        self.schedule()
    }
    fn schedule(&self) -> bool {
        !self.scheduled.load(Ordering::SeqCst) && !self.scheduled.swap(true, Ordering::SeqCst)
    }
    /// The runner has found nothing that it can do up to `seen`. `true` if something came meanwhile and the runner must
    /// go on.
    #[must_use]
    #[inline]
    pub fn rest(&self, seen: u32) -> bool {
        self.scheduled.store(false, Ordering::SeqCst);
        let resumed = self.resumed.load(Ordering::SeqCst) && self.resumed.swap(false, Ordering::SeqCst);
        (resumed || self.tail() != seen) && !self.scheduled.swap(true, Ordering::SeqCst)
    }
}
