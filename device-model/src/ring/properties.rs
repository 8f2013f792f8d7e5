//! What holds of the rings for every number of entries, every position and every doorbell.

use proptest::prelude::*;

use super::*;
use crate::wire::queue::OWNER_SHIFT;

/// What happens to a ring of entries.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The card posts one, if a slot is free.
    Post,
    /// The driver has taken some of what there is, and rings.
    Take { share: u8, arm: bool },
    /// Somebody asks whether to notify.
    Ask,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Post),
        1 => (any::<u8>(), any::<bool>()).prop_map(|(share, arm)| Step::Take { share, arm }),
        1 => Just(Step::Ask),
    ]
}

proptest! {
    /// A driver that counts from the number of entries on, as Linux does, and a card agree for ever: on slots, owner
    /// bits, what is outstanding, and on one notification for each time that the queue was armed.
    #[test]
    fn driver_and_card_count_alike(
        entries in 1_u32..70,
        steps in proptest::collection::vec(step(), 0..600),
    ) {
        let mut cursor = Cursor::new(entries, false);
        let n = u64::from(entries);
        let (mut posted, mut taken, mut armed) = (n, n, Some(n));
        for step in steps {
            match step {
                Step::Post if posted - taken < n => {
                    let (slot, owner) = cursor.next();
                    prop_assert_eq!(u64::from(slot), posted % n);
                    prop_assert_eq!(u64::from(owner >> OWNER_SHIFT), posted / n % 8);
                    cursor.advance();
                    posted += 1;
                }
                Step::Post => {}
                Step::Take { share, arm } => {
                    taken += (posted - taken) * u64::from(share) / 255;
                    let rung = cursor.ring((taken % (8 * n)) as u32, arm);
                    prop_assert!(!rung.impossible);
                    armed = arm.then_some(taken);
                }
                Step::Ask => {
                    let due = armed.is_some_and(|at| posted > at);
                    prop_assert_eq!(cursor.take_notification(), due);
                    armed = armed.filter(|_| !due);
                }
            }
            prop_assert_eq!(cursor.outstanding(), posted - taken);
        }
    }

    /// Whatever is rung, the consumer is never ahead of the producer, nor goes back.
    #[test]
    fn no_doorbell_moves_the_consumer_where_it_can_not_be(
        entries in 1_u32..5000,
        ahead in any::<bool>(),
        doorbells in proptest::collection::vec((0_u32..300, any::<u32>(), any::<bool>()), 0..50),
    ) {
        let mut cursor = Cursor::new(entries, ahead);
        for (posts, tail, arm) in doorbells {
            (0..posts).for_each(|_| cursor.advance());
            let (consumer, outstanding) = (cursor.consumer, cursor.outstanding());
            let rung = cursor.ring(tail, arm);
            prop_assert!(cursor.consumer >= consumer && cursor.consumer <= cursor.producer);
            prop_assert_eq!(rung.freed, cursor.outstanding() < outstanding);
        }
    }

    /// A tail is what its distance from the head says, over the wrap of 32 bits, too.
    #[test]
    fn a_tail_is_possible_if_whole_units_of_the_ring_lie_before_it(
        head in any::<u32>(),
        distance in prop_oneof![0..=4096_u32, 4000..=4200_u32, any::<u32>()],
    ) {
        let mut queue = WorkQueue::send(RingMemory::page(0));
        queue.discard(head);
        let tail = queue.head().wrapping_add(distance);
        let possible = distance <= 4096 && distance.is_multiple_of(BASIC_UNIT);
        prop_assert_eq!(queue.posted(tail).ok(), possible.then_some(distance));
        if possible {
            queue.discard(tail);
            prop_assert_eq!(queue.posted(tail), Ok(0));
        }
    }
}
