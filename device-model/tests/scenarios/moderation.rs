//! Interrupt moderation: who is offered it, who gets it, and how long notifications wait.

use mana_test_driver::packet::{Flow, Protocol};
use mana_test_driver::{Driver, Generation, Transmit, V6_12, V7_3, World};

/// `GDMA_PF_CAP_FLAG_1_DYN_INTERRUPT_MODERATION`.
const MODERATION: u64 = 1 << 15;
const USEC: u64 = 1000;

fn up(world: &World) -> Driver<'_> {
    let mut driver = Driver::probe(world, &V7_3).unwrap();
    driver.netdevs[0].queues = Some(1);
    driver.ifup(0).unwrap();
    driver
}

fn arrive(driver: &mut Driver<'_>, frames: usize) {
    let frame = Flow::v4([2; 6], 1).frame(Protocol::Udp, b"x");
    for _ in 0..frames {
        assert!(driver.world.deliver(0, &frame));
        driver.service();
    }
}

#[test]
fn it_is_offered_only_to_drivers_that_know_it() {
    for generation in Generation::ALL {
        let world = World::default();
        let driver = Driver::probe(&world, generation).unwrap();
        let knows = generation.capabilities & 1 << 28 != 0;
        assert_eq!(driver.capabilities & MODERATION != 0, knows, "{}", generation.name);
        assert_eq!(knows, generation.name == "7.3");
    }
}

#[test]
fn what_is_asked_for_at_creation_is_granted_as_far_as_it_goes() {
    for (asked, granted) in [((0, 0), (0, 0)), ((64, 200), (64, 200)), ((5000, 60_000), (255, 1023))] {
        let world = World::default();
        let mut driver = Driver::probe(&world, &V7_3).unwrap();
        driver.netdevs[0].moderation = asked;
        driver.ifup(0).unwrap();
        assert_eq!(driver.netdevs[0].granted, Some(granted));
        driver.remove().unwrap();
        world.assert_empty_ledger();
    }
    let world = World::default();
    let mut driver = Driver::probe(&world, &V6_12).unwrap();
    driver.ifup(0).unwrap();
    assert_eq!(driver.netdevs[0].granted, None, "version 1 has no moderation");
}

#[test]
fn notifications_wait_for_enough_completions_or_long_enough() {
    let world = World::default();
    let mut driver = up(&world);
    driver.moderate(driver.netdevs[0].rx[0].cq, 3, 50);
    let before = world.interrupts.count();
    arrive(&mut driver, 2);
    assert_eq!(world.interrupts.count(), before, "held back");
    assert_eq!(driver.service(), Some(world.now() + 50 * USEC));
    arrive(&mut driver, 1);
    assert_eq!(world.interrupts.count(), before + 1, "three are enough");
    assert_eq!(driver.take_received(0).len(), 3);

    arrive(&mut driver, 1);
    assert_eq!(world.interrupts.count(), before + 1);
    world.clock.advance(49 * USEC);
    driver.service();
    assert_eq!(world.interrupts.count(), before + 1);
    world.clock.advance(USEC);
    driver.service();
    assert_eq!(world.interrupts.count(), before + 2, "fifty microseconds are long enough");
    assert_eq!(driver.take_received(0).len(), 1);

    driver.moderate(driver.netdevs[0].rx[0].cq, 0, 0);
    arrive(&mut driver, 1);
    assert_eq!(driver.take_received(0).len(), 1, "at once");
    driver.remove().unwrap();
    world.assert_empty_ledger();
}

#[test]
fn ending_moderation_notifies_of_what_was_held_back() {
    let world = World::default();
    let mut driver = up(&world);
    let cq = driver.netdevs[0].rx[0].cq;
    driver.moderate(cq, 0, 1023);
    arrive(&mut driver, 5);
    assert!(driver.take_received(0).is_empty());
    driver.moderate(cq, 0, 0);
    driver.service();
    assert_eq!(driver.take_received(0).len(), 5);
}

#[test]
fn a_queue_that_goes_takes_its_deadline_with_it() {
    let world = World::default();
    let mut driver = up(&world);
    driver.moderate(driver.netdevs[0].tx[0].cq, 0, 1000);
    driver.transmit(0, 0, &Transmit::plain(&[2; 60]));
    assert!(driver.service().is_some());
    driver.ifdown(0).unwrap();
    world.clock.advance(2000 * USEC);
    assert_eq!(driver.service(), None);
    assert_eq!(driver.netdevs[0].tx.len(), 0);
    driver.remove().unwrap();
    world.assert_empty_ledger();
}

#[test]
fn a_moderation_doorbell_for_no_queue_is_a_breach() {
    let world = World::default();
    let driver = up(&world);
    let page = driver.netdevs[0].tx[0].wq.page();
    page.ring(&world, mana_test_driver::queues::doorbell::CQ_MODERATION, 0x00ff_ffff);
    assert_eq!(world.counter("doorbell_dead"), 1);
}
