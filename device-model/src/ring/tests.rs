use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::region::PAGE_SIZE;

const RING: u64 = 0x1_0000;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).expect("guest memory")
}

/// A work queue of one page with a 64-byte WQE (24 bytes of OOB, one SGE) written at `offset`.
fn with_wqe(memory: &GuestMemoryMmap, offset: u64, num_sge: u32) -> WorkQueue {
    let ring = RingMemory::page(RING);
    memory.write_obj(num_sge | 6 << 8, GuestAddress(RING + offset + 4)).expect("header");
    memory.write_slice(&[0xaa; 24], GuestAddress(RING + offset + 8)).expect("oob");
    let sge = RING + (offset + 32) % u64::from(PAGE_SIZE);
    memory.write_obj(0x1234_u64, GuestAddress(sge)).expect("address");
    memory.write_obj(60_u32, GuestAddress(sge + 12)).expect("size");
    WorkQueue::send(ring)
}

#[test]
fn wqe_is_read_whole_and_consumed_once() {
    let memory = memory();
    let mut queue = with_wqe(&memory, 0, 1);
    let mut wqe = Wqe::default();
    assert!(!queue.fetch(&queue.view(&GuestRam::new(&memory)), 0, &mut wqe).expect("empty"));
    assert!(queue.fetch(&queue.view(&GuestRam::new(&memory)), 64, &mut wqe).expect("one"));
    assert_eq!(wqe.oob(), [0xaa; 24]);
    assert_eq!(wqe.sgl().len(), 1);
    assert_eq!(wqe.sgl()[0].address.get(), 0x1234);
    queue.advance(&wqe);
    assert_eq!(queue.head(), 64);
    assert!(!queue.fetch(&queue.view(&GuestRam::new(&memory)), 64, &mut wqe).expect("empty"));
}

#[test]
fn scatter_list_wraps_at_the_end_of_the_ring() {
    let memory = memory();
    let mut queue = with_wqe(&memory, 4064, 1);
    queue.discard(0xffff_ffe0);
    let mut wqe = Wqe::default();
    assert!(queue.fetch(&queue.view(&GuestRam::new(&memory)), 32, &mut wqe).expect("one"));
    assert_eq!(wqe.sgl()[0].size.get(), 60);
    queue.advance(&wqe);
    assert_eq!(queue.head(), 32);
}

#[test]
fn impossible_tails_and_lengths_are_errors() {
    let memory = memory();
    let queue = with_wqe(&memory, 0, 200);
    let mut wqe = Wqe::default();
    assert_eq!(
        queue.fetch(&queue.view(&GuestRam::new(&memory)), 4128, &mut wqe),
        Err(WqeError::Tail { tail: 4128, head: 0 })
    );
    assert_eq!(
        queue.fetch(&queue.view(&GuestRam::new(&memory)), 33, &mut wqe),
        Err(WqeError::Tail { tail: 33, head: 0 })
    );
    let too_long = queue.fetch(&queue.view(&GuestRam::new(&memory)), 4096, &mut wqe);
    assert!(matches!(too_long, Err(WqeError::Length { available: 512, .. })));
    assert!(wqe.sgl().is_empty());
    let queue = with_wqe(&memory, 0, 1);
    let beyond = queue.fetch(&queue.view(&GuestRam::new(&memory)), 32, &mut wqe);
    assert_eq!(beyond, Err(WqeError::Length { len: 64, available: 32 }));
}

/// Without moderation nobody asks what time it is.
fn no_clock() -> u64 {
    unreachable!()
}

#[test]
fn moderated_queue_waits_for_enough_completions_or_long_enough() {
    let memory = memory();
    let mut queue = CompletionQueue::new(RingMemory::page(RING), 0);
    let post = |queue: &mut CompletionQueue| {
        queue.post(&queue.view(&GuestRam::new(&memory)), &[0; 60], 5, true).expect("room");
    };
    queue.moderate(Moderation { usec: 10, completions: 3 });
    post(&mut queue);
    assert_eq!(queue.notification(|| 1000), Notify::At(11_000));
    post(&mut queue);
    assert_eq!(queue.notification(|| 2000), Notify::No, "the time is set");
    post(&mut queue);
    assert_eq!(queue.notification(|| 3000), Notify::Now, "three completions");
    assert_eq!(queue.expire(11_000), Notify::No, "told already");
    let _ = queue.ring(67, true);
    post(&mut queue);
    assert_eq!(queue.notification(|| 20_000), Notify::At(30_000));
    // Polled, and armed again: the wait begins anew, with the timer that is set.
    let _ = queue.ring(68, true);
    post(&mut queue);
    assert_eq!(queue.notification(|| 25_000), Notify::No);
    assert_eq!(queue.expire(30_000), Notify::At(35_000));
    assert_eq!(queue.expire(35_000), Notify::Now);
    let _ = queue.ring(69, true);
    post(&mut queue);
    assert_eq!(queue.notification(|| 40_000), Notify::At(50_000));
    queue.moderate(Moderation::default());
    assert_eq!(queue.notification(no_clock), Notify::Now, "moderation ends");
}

fn owner(memory: &GuestMemoryMmap, slot: u64) -> u32 {
    memory.read_obj::<u32>(GuestAddress(RING + slot * 64 + 60)).expect("word") >> OWNER_SHIFT
}

#[test]
fn owner_bits_count_laps_and_doorbells_free_slots() {
    let memory = memory();
    let mut queue = CompletionQueue::new(RingMemory::page(RING), 0);
    for lap in 0..20_u32 {
        for slot in 0..64_u32 {
            queue.post(&queue.view(&GuestRam::new(&memory)), &[0; 60], 5, true).expect("room");
            assert_eq!(owner(&memory, slot.into()), (lap + 1) % 8);
        }
        assert_eq!(queue.free(), 0);
        let rung = queue.ring((lap + 2) * 64 % 512, false);
        assert!(rung.freed && !rung.impossible);
        assert_eq!(queue.free(), 64);
    }
}

#[test]
fn a_tail_that_goes_back_takes_nothing_back() {
    let memory = memory();
    let mut queue = CompletionQueue::new(RingMemory::page(RING), 0);
    for _ in 0..10 {
        queue.post(&queue.view(&GuestRam::new(&memory)), &[0; 60], 5, true).expect("room");
    }
    let rung = |freed, backward| Rung { freed, impossible: false, backward };
    assert_eq!(queue.ring(64 + 7, false), rung(true, false));
    assert_eq!(queue.ring(64 + 7, true), rung(false, false), "rung once more, to be armed");
    assert_eq!(queue.ring(64 + 3, false), rung(false, true));
    assert_eq!(queue.free(), 61);
}

#[test]
fn completions_stop_before_laps_become_ambiguous() {
    let memory = memory();
    let mut queue = CompletionQueue::new(RingMemory::page(RING), 0);
    for _ in 0..7 * 64 {
        queue.post(&queue.view(&GuestRam::new(&memory)), &[0; 60], 5, true).expect("room");
    }
    assert_eq!(queue.post(&queue.view(&GuestRam::new(&memory)), &[0; 60], 5, true), Err(PostError::Full));
}

#[test]
fn armed_queue_notifies_once_and_again_after_a_late_arm() {
    let memory = memory();
    let mut queue = CompletionQueue::new(RingMemory::page(RING), 0);
    queue.post(&queue.view(&GuestRam::new(&memory)), &[0; 60], 5, true).expect("room");
    queue.post(&queue.view(&GuestRam::new(&memory)), &[0; 60], 5, true).expect("room");
    assert_eq!(queue.notification(no_clock), Notify::Now);
    queue.post(&queue.view(&GuestRam::new(&memory)), &[0; 60], 5, true).expect("room");
    assert_eq!(queue.notification(no_clock), Notify::No);
    assert!(queue.ring(66, true).freed);
    assert_eq!(queue.notification(no_clock), Notify::Now);
    assert!(queue.ring(67, true).freed);
    assert_eq!(queue.notification(no_clock), Notify::No);
    queue.post(&queue.view(&GuestRam::new(&memory)), &[0; 60], 5, true).expect("room");
    assert_eq!(queue.notification(no_clock), Notify::Now);
}

#[test]
fn arming_ahead_waits_for_that_entry() {
    let memory = memory();
    let mut queue = CompletionQueue::new(RingMemory::page(RING), 0);
    assert!(!queue.ring(65, true).impossible);
    assert_eq!(queue.notification(no_clock), Notify::No);
    queue.post(&queue.view(&GuestRam::new(&memory)), &[0; 60], 5, true).expect("room");
    assert_eq!(queue.notification(no_clock), Notify::No);
    queue.post(&queue.view(&GuestRam::new(&memory)), &[0; 60], 5, true).expect("room");
    assert_eq!(queue.notification(no_clock), Notify::Now);
}

#[test]
fn fence_waits_for_a_free_slot() {
    let memory = memory();
    let mut queue = CompletionQueue::new(RingMemory::page(RING), 0);
    for _ in 0..64 {
        queue.post(&queue.view(&GuestRam::new(&memory)), &[1; 60], 5, false).expect("room");
    }
    assert_eq!(queue.notification(no_clock), Notify::Now);
    queue.post_or_hold(&GuestRam::new(&memory), &[3; 60], 5, false).expect("held");
    assert_eq!(owner(&memory, 0), 1);
    assert!(queue.is_holding() && queue.ring(128, true).freed);
    queue.post_held(&GuestRam::new(&memory)).expect("posted");
    assert_eq!(queue.notification(no_clock), Notify::Now);
    assert_eq!(owner(&memory, 0), 2);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(RING)).expect("data"), 3);
}

#[test]
fn full_event_queue_keeps_events_until_the_driver_rings() {
    let memory = memory();
    let mut queue = EventQueue::new(RingMemory::page(RING), 0);
    assert!(queue.post(&GuestRam::new(&memory), EventEntry::Test).expect("room"));
    for _ in 0..256 {
        assert!(!queue.post(&GuestRam::new(&memory), EventEntry::Completion(9)).expect("kept"));
    }
    assert!(queue.is_holding() && queue.ring(261, true).freed);
    queue.post_held(&GuestRam::new(&memory)).expect("posted");
    assert!(queue.take_notification());
    let word = memory.read_obj::<u32>(GuestAddress(RING + 12)).expect("word");
    assert_eq!(word, 3 | 2 << OWNER_SHIFT);
}
