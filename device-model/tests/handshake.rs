//! Interleavings of doorbells, resumptions and runs of one queue, on the device's own code with the atomics of a
//! model checker. Loom would not do: it weakens sequentially consistent accesses, on which the hand-over rests.

use std::sync::Arc;

/// In the place of the standard library's.
mod sync {
    pub use shuttle::sync::atomic;
}
#[path = "../src/pending.rs"]
mod pending;

use pending::Pending;
use sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// A queue, and the condition that holds it back: while `open` is not set, the runner finds nothing that it can do.
#[derive(Default)]
struct Queue {
    pending: Pending,
    open: AtomicBool,
    done: AtomicU32,
    running: AtomicBool,
}

impl Queue {
    /// Who was woken runs until it may rest.
    fn run(&self) {
        loop {
            assert!(!self.running.swap(true, Ordering::SeqCst), "the queue runs twice at once");
            let seen = self.pending.look();
            if self.open.load(Ordering::SeqCst) {
                self.done.store(seen, Ordering::SeqCst);
            }
            self.running.store(false, Ordering::SeqCst);
            if !self.pending.rest(seen) {
                return;
            }
        }
    }
    fn ring(&self, tail: u32) {
        if self.pending.ring(tail) {
            self.run();
        }
    }
    fn open(&self) {
        self.open.store(true, Ordering::SeqCst);
        if self.pending.resume() {
            self.run();
        }
    }
}

/// Runs `threads` on one queue in many orders; nothing of what was posted up to `tail` may be left.
fn check(open: bool, tail: u32, threads: &'static [fn(&Queue)]) {
    let run = move || {
        let queue = Arc::new(Queue::default());
        queue.pending.reset();
        queue.open.store(open, Ordering::SeqCst);
        let started = threads.iter().map(|body| {
            let queue = queue.clone();
            shuttle::thread::spawn(move || body(&queue))
        });
        let started: Vec<_> = started.collect();
        started.into_iter().for_each(|thread| thread.join().expect("no thread panics"));
        assert_eq!(queue.done.load(Ordering::SeqCst), tail, "a wake-up is lost");
    };
    // Orders with few changes of thread at any places, which is what a lost wake-up needs, then any.
    shuttle::check_pct(run, ORDERS, 3);
    shuttle::check_random(run, ORDERS);
}

/// Of each kind: seconds, where all orders would take hours.
const ORDERS: usize = 4000;

#[test]
fn no_doorbell_is_lost_and_no_queue_runs_twice_at_once() {
    // Two threads that ring and run; who finds a runner on the way leaves the queue to it.
    check(true, 2, &[|queue| queue.ring(2), |queue| queue.ring(2)]);
    // A tail that moves while the queue runs.
    check(
        true,
        2,
        &[
            |queue| (1..=2).for_each(|tail| queue.ring(tail)),
            |queue| {
                if queue.pending.resume() {
                    queue.run();
                }
            },
        ],
    );
}

#[test]
fn what_held_a_queue_back_is_not_missed_by_a_runner_that_is_about_to_rest() {
    check(false, 1, &[|queue| queue.ring(1), Queue::open]);
}
