//! Many ports with many queues, their vectors, and their statistics.

use std::collections::BTreeSet;

use mana_device::config::{DeviceConfig, VportConfig};
use mana_test_driver::packet::{Flow, Protocol};
use mana_test_driver::{Driver, Transmit, V6_12, V7_3, World};

fn world(ports: u8, cpus: u32, max_msix: u32) -> World {
    let vports = (0..ports).map(|port| VportConfig { mac: [2, 0, 0, 0, 1, port], max_queues: 64 }).collect();
    let config = DeviceConfig { vports, max_msix, msix_table_size: 1024, ..DeviceConfig::default() };
    World::new(config, cpus)
}

fn counter(world: &World, port: usize, name: &str) -> u64 {
    let counters = world.device.port_counters(port).unwrap();
    counters.0.iter().find(|(known, _)| *known == name).unwrap().1
}

/// A frame to and from each queue of each port.
fn exercise(driver: &mut Driver<'_>) {
    for port in 0..driver.netdevs.len() {
        let queues = driver.netdevs[port].tx.len();
        for queue in 0..queues {
            driver.transmit(port, queue, &Transmit::plain(&[port as u8 * 2; 60]));
        }
        driver.service();
        assert_eq!(driver.world.cables[port].take().len(), queues);
        let mac = driver.netdevs[port].info.mac;
        let mut reached = BTreeSet::new();
        for flow in 0..queues as u16 * 8 {
            driver.world.deliver(port, &Flow::v4(mac, flow).frame(Protocol::Udp, b"payload"));
        }
        driver.service();
        reached.extend(driver.take_received(port).into_iter().map(|received| received.queue));
        assert!(reached.len() * 2 > queues, "{} of {queues} queues of port {port}", reached.len());
    }
}

#[test]
fn sixteen_ports_of_sixty_four_queues() {
    for generation in [&V6_12, &V7_3] {
        let world = world(16, 64, 1024);
        let mut driver = Driver::probe(&world, generation).unwrap();
        driver.checks_buffers = false;
        for port in 0..16 {
            driver.netdevs[port].queues = Some(64);
            driver.netdevs[port].rx_entries = 128;
            driver.netdevs[port].rx_cq_bytes = 16384;
            driver.ifup(port).unwrap();
            assert_eq!(driver.netdevs[port].tx.len(), 64);
        }
        exercise(&mut driver);
        driver.remove().unwrap();
        world.assert_empty_ledger();
        assert_eq!(world.device.violations().0, []);
    }
}

#[test]
fn the_last_of_256_ports_works() {
    let vport = |index: u16| {
        let [high, low] = index.to_be_bytes();
        VportConfig { mac: [2, 0, 0, 1, high, low], max_queues: 1 }
    };
    let vports = (0..256).map(vport).collect();
    let world = World::new(DeviceConfig { vports, ..DeviceConfig::default() }, 2);
    let mut driver = Driver::probe(&world, &V6_12).unwrap();
    driver.ifup(255).unwrap();
    // 255 is the last that fits the short form; the driver asks for the long one above.
    assert_eq!(driver.netdevs[255].vport_offset, 255);
    driver.transmit(255, 0, &Transmit::plain(&[2; 60]));
    driver.service();
    assert_eq!(world.cables[255].take().len(), 1);
    driver.remove().unwrap();
}

#[test]
fn vectors_are_each_ports_own_while_they_last() {
    let world = world(4, 64, 128);
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    driver.checks_buffers = false;
    for port in 0..4 {
        assert_eq!(driver.queue_count(port), (16, false));
        driver.netdevs[port].rx_entries = 128;
        driver.ifup(port).unwrap();
    }
    let before = driver.interrupts_seen.clone();
    for port in 0..4 {
        for queue in 0..16 {
            driver.transmit(port, queue, &Transmit::plain(&[2; 60]));
            driver.service();
        }
    }
    driver.world.cables.iter().for_each(|cable| drop(cable.take()));
    let hit = (1..=64).filter(|vector| driver.interrupts_seen.get(vector) > before.get(vector)).count();
    assert_eq!(hit, 64, "a vector for each queue of each port");
    exercise(&mut driver);
    driver.remove().unwrap();
    world.assert_empty_ledger();
}

#[test]
fn ports_share_vectors_when_there_are_too_few() {
    let world = world(4, 16, 9);
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    driver.checks_buffers = false;
    for port in 0..4 {
        assert_eq!(driver.queue_count(port), (8, true));
        driver.netdevs[port].rx_entries = 128;
        driver.ifup(port).unwrap();
    }
    exercise(&mut driver);
    let vectors: BTreeSet<_> = driver.interrupts_seen.keys().copied().collect();
    assert_eq!(vectors, (0..9).collect());
    driver.remove().unwrap();
    world.assert_empty_ledger();
}

#[test]
fn each_port_counts_its_own_and_the_function_counts_all() {
    let world = world(3, 2, 64);
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    for port in 0..3 {
        driver.ifup(port).unwrap();
    }
    let to = |first: u8, len: usize| [&[first; 6][..], &vec![0; len - 6]].concat();
    for (port, first, len) in [(0, 2, 60), (0, 3, 70), (1, 0xff, 80), (2, 2, 1514), (2, 2, 1515)] {
        driver.transmit(port, 0, &Transmit::plain(&to(first, len)));
        driver.service();
    }
    for (port, first, len) in [(0, 2, 61), (1, 3, 71), (2, 0xff, 81), (2, 2, 13)] {
        world.deliver(port, &to(first, len));
        driver.service();
    }
    world.cables[1].unplug(true);
    driver.transmit(1, 0, &Transmit::plain(&to(2, 60)));
    driver.service();
    let sent: Vec<_> = (0..3).map(|port| counter(&world, port, "tx_bytes")).collect();
    assert_eq!(sent, [130, 80, 1514]);
    let received: Vec<_> = (0..3).map(|port| counter(&world, port, "rx_bytes")).collect();
    assert_eq!(received, [61, 71, 81]);
    assert_eq!(counter(&world, 2, "tx_err_mtu_violation"), 1);
    assert!(world.device.port_counters(3).is_none());

    let stat = driver.query_gf_stat().unwrap();
    let at = |offset| stat.u64(offset);
    assert_eq!(at(32), (1 << 27) - 1);
    assert_eq!([56, 64, 72, 80, 88, 96, 104].map(at), [213, 1, 61, 1, 81, 1, 71], "received");
    assert_eq!([192, 200, 208, 216, 224, 232, 240].map(at), [1724, 2, 1574, 1, 80, 1, 70], "sent");
    assert_eq!(at(176), 1, "MTU violation");

    let phy = driver.query_phy_stat().unwrap();
    assert_eq!([40, 48].map(|offset| phy.u64(offset)), [1, 1], "a runt, a frame that the cable refused");
    assert_eq!([56, 64].map(|offset| phy.u64(offset)), [3, 4], "packets of traffic class 0");
    assert_eq!([184, 192].map(|offset| phy.u64(offset)), [213, 1724], "bytes of traffic class 0");
}
