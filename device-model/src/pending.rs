//! The hand-over of a work queue from whoever rings to whoever runs it, without a lock.
//!
//! Rings store the tail, then look whether somebody is on the way; the runner puts its flag down, then looks whether the
//! tail has moved. Each of the two writes before it reads, and all of it is sequentially consistent: one of them sees
//! the other, so that no doorbell is lost, and the flag is taken by one only, so that the queue never runs twice at
//! once.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wakes_once_and_rests_when_nothing_came() {
        let pending = Pending::default();
        assert!(pending.ring(32));
        assert!(!pending.ring(64), "somebody is on the way");
        let seen = pending.tail();
        assert!(!pending.rest(seen));
        assert!(pending.ring(64), "a repeated tail is a doorbell, too");
    }

    #[test]
    fn a_doorbell_between_the_last_look_and_the_rest_is_not_lost() {
        let pending = Pending::default();
        assert!(pending.ring(32));
        let seen = pending.tail();
        assert!(!pending.ring(64));
        assert!(pending.rest(seen), "the runner goes on");
        assert!(!pending.rest(64));
    }

    /// The completion queue had no room when the runner looked; before it rests, the driver makes some.
    #[test]
    fn a_resumption_between_the_last_look_and_the_rest_is_not_lost() {
        let pending = Pending::default();
        assert!(pending.ring(32));
        let seen = pending.look();
        assert!(!pending.resume(), "somebody is on the way");
        assert!(pending.rest(seen), "the runner looks once more");
        assert!(!pending.rest(seen), "but not for ever");
        assert!(pending.resume());
        let seen = pending.look();
        assert!(!pending.rest(seen), "this run has seen it");
    }

    /// Four threads ring, resume and run: nobody runs beside another, and at the end all is done.
    #[test]
    fn keeps_every_doorbell_among_many_threads() {
        const RINGS: u32 = 20_000;
        let (pending, done, running) = (Pending::default(), AtomicU32::new(0), AtomicBool::new(false));
        let posted = AtomicU32::new(0);
        let run = || loop {
            assert!(!running.swap(true, Ordering::SeqCst), "the queue runs twice at once");
            let seen = pending.look();
            done.store(seen, Ordering::SeqCst);
            running.store(false, Ordering::SeqCst);
            if !pending.rest(seen) {
                break;
            }
        };
        std::thread::scope(|scope| {
            for resumes in [false, false, true, true] {
                let (pending, posted, run) = (&pending, &posted, &run);
                scope.spawn(move || {
                    for _ in 0..RINGS {
                        let wake = match resumes {
                            true => pending.resume(),
                            false => pending.ring(posted.fetch_add(1, Ordering::SeqCst) + 1),
                        };
                        if wake {
                            run();
                        }
                    }
                });
            }
        });
        assert_eq!(done.load(Ordering::SeqCst), pending.tail());
    }
}
