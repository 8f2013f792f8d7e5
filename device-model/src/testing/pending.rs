//! The hand-over of a work queue. Not beside its code, which `tests/handshake.rs` has a model checker run.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::pending::Pending;

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
