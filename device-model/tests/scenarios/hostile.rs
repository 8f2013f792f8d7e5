//! A host that lies: the same seed tells the same lies, and whatever it says, the card stays whole.

use std::panic::{AssertUnwindSafe, catch_unwind};

use mana_device::config::DeviceConfig;
use mana_device::host::{Hostility, Where};
use mana_device::observe::Event;
use mana_test_driver::packet::{Flow, Protocol};
use mana_test_driver::{Driver, Transmit, V7_3, World};

fn world(seed: u64, rate: u32, at: Where) -> World {
    let hostile = Some(Hostility { rate, at: vec![at], ..Hostility::new(seed) });
    let world = World::new(DeviceConfig { hostile, ..DeviceConfig::default() }, 2);
    world.recorder.start();
    world
}

/// What a driver does until it gives up: probe, packets, the end. Where Linux would WARN it panics.
fn live(world: &World) {
    let life = || {
        let mut driver = Driver::probe(world, &V7_3)?;
        driver.checks_buffers = false;
        driver.ifup(0)?;
        let mac = driver.netdevs[0].info.mac;
        for flow in 0..200 {
            let _ = driver.try_transmit(0, usize::from(flow % 2), &Transmit::plain(&[2; 60]));
            world.deliver(0, &Flow::v4(mac, flow).frame(Protocol::Udp, b"payload"));
            driver.service();
        }
        driver.remove()
    };
    let _ = catch_unwind(AssertUnwindSafe(life));
}

/// The lies that were told.
fn lies(world: &World) -> Vec<String> {
    let lie = |event: Event| match event {
        Event::Fault { detail } => Some(detail),
        _ => None,
    };
    world.recorder.events().into_iter().filter_map(lie).collect()
}

#[test]
fn the_same_seed_tells_the_same_lies() {
    for at in [Where::Completions, Where::Events, Where::Messages, Where::Registers] {
        let told = |seed| {
            let world = world(seed, 7, at);
            live(&world);
            lies(&world)
        };
        let told_by = (1..20).map(told).collect::<Vec<_>>();
        assert!(told_by.iter().any(|lies| !lies.is_empty()), "{at:?}: nobody lied");
        for (seed, lies) in (1..20).zip(&told_by) {
            assert_eq!(told(seed), *lies, "{at:?}");
        }
        let lie = told_by.iter().flatten().next().unwrap();
        assert!(lie.starts_with("lie 1: "), "{lie}");
    }
}

#[test]
fn whatever_was_said_the_next_driver_finds_a_card_that_works() {
    for at in [Where::Completions, Where::Events, Where::Messages, Where::Registers] {
        for seed in 0..40 {
            let world = world(seed, 10, at);
            live(&world);
            world.device.control(&["hostile", "stop"]).unwrap();
            world.device.control(&["fault", "clear"]).unwrap();
            world.device.reset();
            world.memory.free_all();
            world.interrupts.take();
            let mut driver = Driver::probe(&world, &V7_3).unwrap();
            driver.ifup(0).unwrap();
            driver.transmit(0, 0, &Transmit::plain(&[2; 60]));
            driver.service();
            assert_eq!(driver.in_flight(0, 0), 0, "{at:?} {seed}");
            driver.remove().unwrap();
            world.assert_empty_ledger();
        }
    }
}

#[test]
fn a_host_lies_from_when_it_is_told_to() {
    let world = World::default();
    world.recorder.start();
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    driver.ifup(0).unwrap();
    assert_eq!(lies(&world).len(), 0);
    world.device.control(&["hostile", "3", "rate=1", "at=completions"]).unwrap();
    let _ = catch_unwind(AssertUnwindSafe(|| {
        driver.transmit(0, 0, &Transmit::plain(&[2; 60]));
        driver.service();
    }));
    assert!(!lies(&world).is_empty());
    assert!(world.counter("faults") > 0);
}
