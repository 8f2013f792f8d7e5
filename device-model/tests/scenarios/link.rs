//! The link: its speed, and the bandwidth clamp that slows a vPort down.

use mana_device::config::{DeviceConfig, VportConfig};
use mana_test_driver::{Driver, Errno, Transmit, V7_3, World};

const SECOND: u64 = 1_000_000_000;

fn two_ports() -> World {
    let vport = |last| VportConfig { mac: [2, 0, 0, 0, 0, last], max_queues: 4 };
    World::new(DeviceConfig { vports: vec![vport(1), vport(2)], ..DeviceConfig::default() }, 4)
}

/// Time for `count` frames of `len` bytes from `port`, the driver keeping every queue full.
fn time_to_send(driver: &mut Driver<'_>, port: usize, count: usize, len: usize) -> u64 {
    let start = driver.world.now();
    let queues = driver.netdevs[port].tx.len();
    let frame = Transmit::plain(&vec![2; len]);
    let mut posted = 0;
    loop {
        for queue in 0..queues {
            while posted < count && driver.in_flight(port, queue) < 100 {
                driver.transmit(port, queue, &frame);
                posted += 1;
            }
        }
        let deadline = driver.service();
        if posted == count && (0..queues).all(|queue| driver.in_flight(port, queue) == 0) {
            return driver.world.now() - start;
        }
        if let Some(deadline) = deadline {
            driver.world.clock.advance(deadline - driver.world.now());
        }
    }
}

#[test]
fn the_clamp_shows_and_really_slows_down_its_port_alone() {
    let world = two_ports();
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    for port in 0..2 {
        driver.netdevs[port].queues = Some(3);
        driver.ifup(port).unwrap();
    }
    let handles = [0, 1].map(|port: usize| driver.netdevs[port].info.handle);
    let link = |driver: &mut Driver<'_>, port: usize| {
        let link = driver.query_link_config(handles[port]).unwrap();
        (link.u32(32), link.u8(36), link.u32(40))
    };
    assert_eq!(link(&mut driver, 0), (200_000, 0, 200_000));
    assert_eq!(time_to_send(&mut driver, 0, 1000, 1500), 0);
    assert_eq!(driver.set_bw_clamp(handles[0], 1, 300).unwrap().u8(32), 0);
    assert_eq!(link(&mut driver, 0), (200_000, 0, 300));
    assert_eq!(link(&mut driver, 1), (200_000, 0, 200_000));

    // 3,000 frames of 1,500 bytes are 36 Mbit.
    let took = time_to_send(&mut driver, 0, 3000, 1500);
    assert!((SECOND * 36 / 300 - 2_000_000..SECOND * 36 / 300).contains(&took), "{took} ns at 300 Mbit/s");
    assert_eq!(world.cables[0].take().len(), 4000);
    assert_eq!(time_to_send(&mut driver, 1, 3000, 1500), 0, "the other port");

    driver.set_bw_clamp(handles[0], u32::MAX, 0).unwrap();
    assert_eq!(link(&mut driver, 0).2, 300, "left as it is");
    driver.set_bw_clamp(handles[0], 0, 0).unwrap();
    assert_eq!(link(&mut driver, 0).2, 200_000);
    assert_eq!(time_to_send(&mut driver, 0, 1000, 1500), 0);
    driver.remove().unwrap();
    world.assert_empty_ledger();
}

#[test]
fn lifting_the_clamp_lets_go_what_it_held_back() {
    let world = two_ports();
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    driver.netdevs[0].queues = Some(2);
    driver.ifup(0).unwrap();
    let handle = driver.netdevs[0].info.handle;
    driver.set_bw_clamp(handle, 1, 100).unwrap();
    for n in 0..100 {
        driver.transmit(0, n % 2, &Transmit::plain(&[2; 1500]));
    }
    assert!(driver.service().is_some());
    assert!(driver.in_flight(0, 0) > 0 && driver.in_flight(0, 1) > 0);
    driver.set_bw_clamp(handle, 0, 0).unwrap();
    driver.service();
    assert_eq!((driver.in_flight(0, 0), driver.in_flight(0, 1)), (0, 0));
}

#[test]
fn impossible_clamps_are_refused_and_a_new_driver_finds_none() {
    let world = two_ports();
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    let handle = driver.netdevs[0].info.handle;
    for (enable, mbps) in [(1, 0), (1, 50), (1, 150), (1, 200_100), (2, 100)] {
        let refused = driver.set_bw_clamp(handle, enable, mbps).unwrap_err();
        assert_eq!(refused.errno, Errno::Eproto, "{enable} {mbps}");
        assert!(refused.status.is_some(), "answered");
    }
    assert!(driver.set_bw_clamp(handle + 2, 1, 100).is_err(), "no such vPort");
    driver.set_bw_clamp(handle, 1, 100).unwrap();
    driver.remove().unwrap();
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    assert_eq!(driver.query_link_config(handle).unwrap().u32(40), 200_000);
}
