//! Receive: tables of every size, coalesced completions, jumbo frames, fences, drops.

use mana_device::config::{DeviceConfig, VportConfig};
use mana_test_driver::packet::{Flow, Protocol, tagged, toeplitz};
use mana_test_driver::{Driver, V6_12, V7_3, World};

fn port(indirection_entries: u16, mtu: u16) -> World {
    let vports = vec![VportConfig { mac: [2, 0, 0, 0, 0, 1], max_queues: 8 }];
    World::new(DeviceConfig { vports, indirection_entries, mtu, ..DeviceConfig::default() }, 8)
}

#[test]
fn tables_of_every_size_spread_by_the_low_bits_of_the_hash() {
    // 512 do not fit into a request of a page.
    for entries in [1, 2, 4, 8, 16, 32, 64, 128, 256] {
        let world = port(entries, 1500);
        let mut driver = Driver::probe(&world, &V7_3).unwrap();
        driver.ifup(0).unwrap();
        let netdev = &mut driver.netdevs[0];
        assert_eq!((netdev.rx.len(), netdev.table.len()), (8, usize::from(entries)));
        netdev.table.iter_mut().enumerate().for_each(|(entry, queue)| *queue = entry * 5 % 8);
        driver.steer(0).unwrap();
        for n in 0..200 {
            let flow = if n % 2 == 0 { Flow::v4([2; 6], n) } else { Flow::v6([2; 6], n) };
            let protocol = if n % 3 == 0 { Protocol::Tcp } else { Protocol::Udp };
            let frame = flow.frame(protocol, &[n as u8; 9]);
            assert!(world.deliver(0, &frame));
            driver.service();
            let got = driver.take_received(0).pop().unwrap();
            let netdev = &driver.netdevs[0];
            let hash = toeplitz(&netdev.key, &flow.hash_input(true));
            assert_eq!(got.hash, hash);
            assert_eq!(got.queue, netdev.table[hash as usize % netdev.table.len()], "{entries} entries");
            let (v6, udp) = (n % 2 == 1, n % 3 != 0);
            assert_eq!(got.hash_type, 1 << (1 + 3 * u16::from(v6) + u16::from(udp)));
            assert!(got.ip_ok && got.tcp_ok != udp && got.udp_ok == udp && !got.csum_failed);
            assert_eq!(got.bytes, frame);
        }
    }
}

#[test]
fn completions_hold_as_many_packets_as_were_asked_for() {
    for (four, eight, completions) in
        [(false, false, 16), (true, false, 4), (false, true, 2), (true, true, 2)]
    {
        let world = port(64, 1500);
        let mut driver = Driver::probe(&world, &V7_3).unwrap();
        assert_eq!(driver.config.flags & 1 << 5, 1 << 5, "eight are offered");
        (driver.netdevs[0].coalescing, driver.netdevs[0].coalescing8) = (four, eight);
        driver.ifup(0).unwrap();
        // One flow, sizes that differ.
        let frames: Vec<_> = (0..16)
            .map(|n| Flow::v4([2; 6], 1).frame(Protocol::Tcp, &vec![n; usize::from(n) * 80]))
            .collect();
        let slices: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
        assert_eq!(world.deliver_all(0, &slices), 16);
        driver.service();
        let got: Vec<_> = driver.take_received(0).into_iter().map(|received| received.bytes).collect();
        assert_eq!(got, frames);
        assert_eq!(driver.netdevs[0].rx_completions, completions, "{four} {eight}");
        driver.remove().unwrap();
    }
}

#[test]
fn nobody_who_does_not_ask_gets_coalesced_completions() {
    let world = port(64, 1500);
    let mut driver = Driver::probe(&world, &V6_12).unwrap();
    driver.ifup(0).unwrap();
    let frame = Flow::v4([2; 6], 1).frame(Protocol::Tcp, b"x");
    world.deliver_all(0, &[frame.as_slice(); 64]);
    driver.service();
    assert_eq!(driver.netdevs[0].rx_completions, 64);
}

#[test]
fn jumbo_frames_arrive_and_leave_whole() {
    for mtu in [4000, 9000, 9216] {
        let world = port(64, mtu);
        let mut driver = Driver::probe(&world, &V7_3).unwrap();
        assert_eq!(driver.config.adapter_mtu, mtu + 14);
        driver.netdevs[0].mtu = mtu.into();
        driver.netdevs[0].rx_entries = 128;
        driver.ifup(0).unwrap();
        for len in [mtu - 28, mtu - 1000] {
            let frame = Flow::v4([2; 6], 1).frame(Protocol::Udp, &vec![7; len.into()]);
            assert!(world.deliver(0, &tagged(&frame, 5)));
            driver.service();
            let got = driver.take_received(0).pop().unwrap();
            assert_eq!((got.vlan, got.udp_ok), (Some(5), true));
            assert_eq!(got.bytes, frame);
            driver.transmit(0, 0, &mana_test_driver::Transmit::plain(&frame));
            driver.service();
            assert_eq!(world.cables[0].take().pop().unwrap().bytes, frame);
        }
        let long = Flow::v4([2; 6], 1).frame(Protocol::Udp, &vec![7; usize::from(mtu) - 27]);
        world.deliver(0, &long);
        driver.service();
        assert_eq!((driver.netdevs[0].truncated, world.counter("rx_truncated")), (1, 1));
        driver.transmit(0, 0, &mana_test_driver::Transmit::plain(&long));
        driver.service();
        assert_eq!(driver.netdevs[0].tx[0].completions.last(), Some(&34));
    }
}

#[test]
fn every_fence_comes_after_all_packets_before_it() {
    let world = port(64, 1500);
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    driver.ifup(0).unwrap();
    let mac = driver.netdevs[0].info.mac;
    for round in 0..20 {
        let frames: Vec<_> = (0..40).map(|n| Flow::v4(mac, n).frame(Protocol::Udp, &[round])).collect();
        let slices: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
        assert_eq!(world.deliver_all(0, &slices), 40);
        // The wait for the fences ends with the last of them.
        driver.fence_all(0).unwrap();
        let got = driver.take_received(0);
        assert_eq!(got.len(), 40);
        assert!(got.iter().all(|received| received.bytes.last() == Some(&round)));
    }
    assert!(driver.netdevs[0].rx.iter().all(|ring| ring.fences == 21));
}

#[test]
fn without_buffers_frames_are_dropped_and_counted_until_there_are_some() {
    let world = port(64, 1500);
    let mut driver = Driver::probe(&world, &V6_12).unwrap();
    driver.netdevs[0].queues = Some(1);
    driver.ifup(0).unwrap();
    driver.napi = false;
    let frame = Flow::v4([2; 6], 1).frame(Protocol::Tcp, b"x");
    let delivered = (0..600).filter(|_| world.deliver(0, &frame)).count();
    assert_eq!((delivered, world.counter("rx_discards_nowqe")), (512, 88));
    assert_eq!(driver.query_gf_stat().unwrap().u64(40), 88);
    driver.napi = true;
    driver.service();
    assert_eq!(driver.take_received(0).len(), 512);
    assert!(world.deliver(0, &frame));
    driver.service();
    assert_eq!(driver.take_received(0).len(), 1);
}
