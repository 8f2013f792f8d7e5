//! Hosts of all kinds: what a driver makes of what they show, and limits that change from one channel to the next.

use mana_device::config::{DeviceConfig, VportConfig};
use mana_device::host::Profile;
use mana_test_driver::packet::{Flow, Protocol};
use mana_test_driver::{Driver, Errno, Generation, Transmit, V6_1, V6_12, V6_17, V7_3, World};

const ALL: [&Generation; 4] = [&V6_1, &V6_12, &V6_17, &V7_3];

/// A machine with 4 CPUs whose host is `profile`, with `ports` ports.
fn world(profile: &str, ports: u8) -> World {
    let vports = (0..ports).map(|port| VportConfig { mac: [2, 0, 0, 0, 1, port], max_queues: 64 }).collect();
    let profile = Profile::named(profile).unwrap();
    World::new(DeviceConfig { vports, profile, ..DeviceConfig::default() }, 4)
}

fn host(world: &World, words: &str) {
    let words: Vec<&str> = words.split(' ').collect();
    world.device.control(&words).unwrap();
}

/// Packets both ways on every queue.
fn exercise(driver: &mut Driver<'_>) {
    for port in 0..driver.netdevs.len() {
        driver.ifup(port).unwrap();
        let queues = driver.netdevs[port].tx.len();
        for queue in 0..queues {
            driver.transmit(port, queue, &Transmit::plain(&[2; 60]));
        }
        driver.service();
        assert_eq!(driver.world.cables[port].take().len(), queues);
        let mac = driver.netdevs[port].info.mac;
        assert!(driver.world.deliver(port, &Flow::v4(mac, 1).frame(Protocol::Udp, b"payload")));
        driver.service();
        assert_eq!(driver.take_received(port).len(), 1);
    }
}

#[test]
fn every_driver_works_on_every_host_that_means_well() {
    for name in
        ["default", "azure-old", "azure-new", "minimal", "holes", "jumbo", "few-eqs", "high-ids", "pf-like"]
    {
        for generation in ALL {
            let world = world(name, 1);
            let mut driver = Driver::probe(&world, generation)
                .unwrap_or_else(|error| panic!("{name}, {}: {error}", generation.name));
            exercise(&mut driver);
            driver.remove().unwrap();
            world.assert_empty_ledger();
            assert_eq!(world.device.violations().0, [], "{name}, {}", generation.name);
        }
    }
}

#[test]
fn limits_and_ids_are_what_the_profile_says() {
    let small = world("few-eqs", 1);
    let driver = Driver::probe(&small, &V7_3).unwrap();
    assert_eq!((driver.resources.max_eq, driver.max_queues), (2, 2));
    let high = world("high-ids", 1);
    let mut driver = Driver::probe(&high, &V7_3).unwrap();
    exercise(&mut driver);
    let (tx, rx) = (&driver.netdevs[0].tx[1], &driver.netdevs[0].rx[0]);
    assert_eq!((tx.wq.id, rx.wq.id), (7001, 2500));
    assert!(tx.cq >= 5000 && rx.cq >= 5000);
    assert!(driver.init_data().max_cqs.unwrap() > 5000 + 8);
    assert_eq!(driver.netdevs[0].info.handle, 0xdead_beef_0000_0000);
}

#[test]
fn hosts_that_make_no_sense_are_refused() {
    for (name, generation, errno) in [
        ("no-device", &V6_12, Errno::Enodev),
        ("no-device", &V7_3, Errno::Enodev),
        ("hostile-zero", &V7_3, Errno::Eproto),
        ("hostile-registers", &V7_3, Errno::Eproto),
    ] {
        let world = world(name, 1);
        let error = Driver::probe(&world, generation).err().unwrap_or_else(|| panic!("{name} is taken"));
        assert_eq!(error.errno, errno, "{name}: {error}");
    }
}

#[test]
fn limits_change_from_one_channel_to_the_next() {
    let world = world("default", 3);
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    assert_eq!((driver.config.vports, driver.max_queues), (3, 4));
    host(&world, "limits max-msix=3 max-queues=1 ports=2");
    exercise(&mut driver);
    assert_eq!(driver.netdevs[0].tx.len(), 4, "nothing changes under a channel");
    driver.remove().unwrap();
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    assert_eq!((driver.resources.max_msix, driver.config.vports), (3, 2));
    exercise(&mut driver);
    assert_eq!(driver.netdevs[0].tx.len(), 1);
    driver.remove().unwrap();
    // As a whole, and back.
    host(&world, "profile minimal");
    let driver = Driver::probe(&world, &V6_12).unwrap();
    assert_eq!((driver.resources.max_msix, driver.max_queues), (2, 1));
    driver.remove().unwrap();
    host(&world, "profile default");
    let driver = Driver::probe(&world, &V6_12).unwrap();
    assert_eq!((driver.resources.max_msix, driver.config.vports), (64, 3));
    driver.remove().unwrap();
    world.assert_empty_ledger();
}

#[test]
fn what_can_not_change_is_told() {
    let world = world("default", 1);
    let refused = |words: &[&str]| world.device.control(words).unwrap_err();
    assert!(refused(&["profile", "high-ids"]).contains("ids can't change"));
    assert!(refused(&["profile", "none"]).contains("there is no profile `none`"));
    assert!(refused(&["limits", "max-fun=3"]).contains("there is no limit max-fun=3, but max-msix"));
    assert!(refused(&["limits", "ports=70000"]).contains("ports=70000"));
    assert!(refused(&["limits"]).contains("wants max-msix=N"));
    assert!(refused(&["limits", "max-msix"]).contains("limit=value"));
}
