//! Send: what the host allows, and that a queue in trouble leaves the others alone.

use mana_device::config::TxPolicy;
use mana_test_driver::memory::GuestMemory;
use mana_test_driver::packet::{Flow, Protocol, tagged};
use mana_test_driver::queues::Sge;
use mana_test_driver::{Driver, Transmit, V7_3, World};

fn up(world: &World) -> Driver<'_> {
    let mut driver = Driver::probe(world, &V7_3).unwrap();
    driver.ifup(0).unwrap();
    assert_eq!(driver.netdevs[0].tx.len(), 2);
    driver
}

fn send(driver: &mut Driver<'_>, packet: &Transmit) -> u8 {
    driver.transmit(0, 0, packet);
    driver.service();
    *driver.netdevs[0].tx[0].completions.last().unwrap()
}

/// Queue 1 of port 0 sends and receives as if nothing had happened.
fn assert_others_work(driver: &mut Driver<'_>) {
    driver.world.cables[0].take();
    driver.transmit(0, 1, &Transmit::plain(&[2; 60]));
    driver.service();
    assert_eq!(driver.netdevs[0].tx[1].completions.last(), Some(&32));
    assert_eq!(driver.world.cables[0].take().len(), 1);
}

#[test]
fn the_host_allows_what_it_wants() {
    let world = World::default();
    let mut driver = up(&world);
    let mac = driver.netdevs[0].info.mac;
    let own = Flow { source_mac: mac, ..Flow::v4([2; 6], 1) }.frame(Protocol::Udp, b"x");
    let foreign = Flow::v4([2; 6], 1).frame(Protocol::Udp, b"x");
    let other_type = [&own[..12], &[0x88, 0xcc], &own[14..]].concat();
    let plain = |frame: &[u8]| Transmit::plain(frame);
    let inserted = Transmit { vlan: Some(7), ..plain(&own) };
    let all = TxPolicy::default();
    let own_source_only = TxPolicy { own_source_only: true, ..all };
    let ip_only = TxPolicy { ip_only: true, ..all };
    let untagged_only = TxPolicy { untagged_only: true, ..all };
    let disabled = TxPolicy { disabled: true, ..all };
    let cases = [
        (own_source_only, plain(&own), 32, ""),
        (own_source_only, plain(&foreign), 33, "tx_err_sa_enforcement"),
        (ip_only, plain(&own), 32, ""),
        (ip_only, plain(&tagged(&own, 5)), 32, ""),
        (ip_only, plain(&other_type), 36, "tx_err_ethtype_enforcement"),
        (ip_only, plain(&tagged(&other_type, 5)), 36, "tx_err_ethtype_enforcement"),
        (untagged_only, plain(&own), 32, ""),
        (untagged_only, plain(&tagged(&own, 5)), 41, "tx_err_vlan_enforcement"),
        (untagged_only, inserted.clone(), 41, "tx_err_vlan_enforcement"),
        (disabled, plain(&own), 38, "tx_err_gf_disabled"),
        (all, plain(&foreign), 32, ""),
        (all, plain(&other_type), 32, ""),
        (all, inserted, 32, ""),
    ];
    for (policy, packet, kind, counter) in cases {
        assert!(world.device.set_tx_policy(0, policy));
        let before = (!counter.is_empty()).then(|| world.counter(counter));
        assert_eq!(send(&mut driver, &packet), kind, "{policy:?} {packet:?}");
        assert_eq!(before.map(|count| count + 1), (!counter.is_empty()).then(|| world.counter(counter)));
        assert_eq!(world.cables[0].take().len(), usize::from(kind == 32));
    }
    assert!(!world.device.set_tx_policy(1, all), "there is no port 1");
    let stat = driver.query_gf_stat().unwrap();
    assert_eq!([112, 136, 144, 152].map(|at| stat.u64(at)), [1, 2, 2, 1]);
}

#[test]
fn broken_wqes_end_their_queue_and_no_other() {
    type Break = fn(&mut Transmit, &mut Vec<Sge>);
    let breaks: [(&str, Break); 10] = [
        ("wrong key", |_, sgl| sgl[0].key += 1),
        ("the channel's key", |_, sgl| sgl[0].key = 0x100),
        ("no memory", |_, sgl| sgl[0].address = GuestMemory::hole()),
        ("end of the address space", |_, sgl| sgl[0].address = u64::MAX - 8),
        ("giant length", |_, sgl| sgl[0].size = u32::MAX),
        ("second entry without memory", |_, sgl| {
            sgl.push(Sge { address: GuestMemory::hole(), ..sgl[0] });
        }),
        ("no entries", |_, sgl| sgl.clear()),
        ("too many entries", |_, sgl| *sgl = vec![sgl[0]; 32]),
        ("segmentation of one entry", |packet, _| packet.mss = Some(1000)),
        ("segmentation with a header of 257 bytes", |packet, sgl| {
            packet.mss = Some(1000);
            sgl[0].size = 257;
            sgl.push(sgl[0]);
        }),
    ];
    for (what, change) in breaks {
        let world = World::default();
        let mut driver = up(&world);
        let key = driver.registration.gpa_mkey;
        let good = vec![Sge { address: world.memory.alloc(4096).address(), key, size: 60 }];
        let (mut packet, mut sgl) = (Transmit::default(), good.clone());
        change(&mut packet, &mut sgl);
        assert!(driver.post_sgl(0, 0, &packet, sgl));
        driver.netdevs[0].tx[0].wq.doorbell(&world);
        driver.service();
        assert_eq!(driver.netdevs[0].tx[0].completions, [42], "{what}");
        assert_eq!(world.counter("tx_err_gdma"), 1, "{what}");
        assert_eq!(world.device.violations().0.len(), 1, "{what}");
        assert_others_work(&mut driver);
        // Nothing more comes from the queue that stopped, until it is made anew.
        assert!(driver.post_sgl(0, 0, &Transmit::default(), good));
        driver.netdevs[0].tx[0].wq.doorbell(&world);
        driver.service();
        assert_eq!(driver.netdevs[0].tx[0].completions, [42], "{what}");
        assert!(world.cables[0].take().is_empty(), "{what}");
        assert_eq!(driver.query_gf_stat().unwrap().u64(248), 1, "{what}");
        world.device.reset();
        driver.abandon();
        world.assert_empty_ledger();
    }
}

#[test]
fn nonsense_in_headers_is_refused_and_the_queue_goes_on() {
    let header = Flow::v4([2; 6], 1).partial_frame(Protocol::Tcp, &[]);
    let v6 = Flow::v6([2; 6], 1).partial_frame(Protocol::Tcp, &[]);
    let udp = Flow::v4([2; 6], 1).partial_frame(Protocol::Udp, &[]);
    let lso = |header: &[u8]| Transmit {
        pieces: vec![header.to_vec(), vec![7; 3000]],
        ipv4: true,
        ip_csum: true,
        tcp_csum: true,
        transport_offset: 34,
        mss: Some(1000),
        ..Transmit::default()
    };
    let garbage = vec![0xa5; 54];
    let mut short_ip = header.clone();
    short_ip[14] = 0x44;
    let mut options = header.clone();
    options[46] = 0xf0;
    let cases: [(&str, Transmit, u8); 13] = [
        ("good", lso(&header), 32),
        ("garbage", lso(&garbage), 37),
        ("an IP header of 16 bytes", lso(&short_ip), 37),
        ("TCP options beyond the header", lso(&options), 37),
        ("UDP", lso(&udp), 37),
        ("IPv6 that is said to be IPv4", lso(&v6), 37),
        ("a header that is too short", lso(&header[..40]), 37),
        ("an MSS of 0", Transmit { mss: Some(0), ..lso(&header) }, 37),
        ("TCP somewhere else", Transmit { transport_offset: 38, ..lso(&header) }, 37),
        ("no TCP checksum", Transmit { tcp_csum: false, ..lso(&header) }, 35),
        ("segments longer than the MTU", Transmit { mss: Some(1461), ..lso(&header) }, 34),
        ("UDP checksum of TCP", Transmit { udp_csum: true, ipv4: true, ..Transmit::plain(&header) }, 37),
        (
            "TCP header beyond the frame",
            Transmit { tcp_csum: true, ipv4: true, transport_offset: 1000, ..Transmit::plain(&header) },
            37,
        ),
    ];
    let world = World::default();
    let mut driver = up(&world);
    for (what, packet, kind) in cases {
        assert_eq!(send(&mut driver, &packet), kind, "{what}");
        world.cables[0].take();
    }
    assert_eq!(send(&mut driver, &Transmit::plain(&header)), 32);
    let counts =
        ["tx_err_header", "tx_err_inval_oob", "tx_err_mtu_violation"].map(|name| world.counter(name));
    assert_eq!(counts, [10, 1, 1]);
    assert_others_work(&mut driver);
}

#[test]
fn doorbells_backwards_and_for_dead_queues_harm_nobody_else() {
    let world = World::default();
    let mut driver = up(&world);
    let (id, page) = (driver.netdevs[0].tx[0].wq.id, driver.netdevs[0].tx[0].wq.page());
    assert_eq!(send(&mut driver, &Transmit::plain(&[2; 60])), 32);
    let ring = |register, id: u32, tail: u32| {
        page.ring(&world, register, u64::from(id) | u64::from(tail) << 32);
        world.settle();
    };
    let dead = world.counter("doorbell_dead");
    ring(0x000, 0xff_ffff, 32);
    ring(0x400, 12_345, 32);
    ring(0x800, 12_345, 32);
    ring(0xff8, 12_345, 32);
    // The channel's queues are not rung through this page.
    ring(0x000, 0, 32);
    assert_eq!(world.counter("doorbell_dead"), dead + 5);
    // One WQE has been consumed: a tail of 0 takes it back.
    driver.post(0, 0, &Transmit::plain(&[2; 60]));
    ring(0x000, id, 0);
    driver.service();
    assert_eq!(driver.netdevs[0].tx[0].completions, [32, 42]);
    assert_eq!(world.counter("tx_err_gdma"), 1);
    assert_others_work(&mut driver);
    // The completion queue's tail, taken back by one entry.
    let cq = driver.completion_queue(driver.netdevs[0].tx[1].cq);
    ring(0x800, cq.id, cq.head() - 1);
    let violations = world.device.violations().0;
    assert_eq!(violations, [("doorbell-live-queue", 5), ("doorbell-tail", 1), ("consumer-forward", 1)]);
}

/// The handler of the test event that the destruction of an event queue waits for rings after the queue is gone.
#[test]
fn an_event_queue_may_be_armed_once_after_its_end() {
    let world = World::default();
    let mut driver = up(&world);
    let page = driver.netdevs[0].tx[0].wq.page();
    let ids: Vec<_> = driver.port_eqs(0).into_iter().map(|key| driver.eq_id(key)).collect();
    driver.ifdown(0).unwrap();
    let dead = world.counter("doorbell_dead");
    let arm = |id: u32| page.ring(&world, 0xff8, u64::from(id) | 1 << 63);
    ids.iter().for_each(|&id| arm(id));
    assert_eq!(world.counter("doorbell_dead"), dead + ids.len() as u64);
    assert_eq!(world.device.violations().0, []);
    arm(ids[0]);
    assert_eq!(world.device.violations().0, [("doorbell-live-queue", 1)]);
}

#[test]
fn rings_may_be_destroyed_while_busy() {
    let world = World::default();
    let mut driver = up(&world);
    for _ in 0..200 {
        driver.post(0, 0, &Transmit::plain(&[2; 60]));
        driver.post(0, 1, &Transmit::plain(&[2; 60]));
    }
    let object = driver.netdevs[0].tx[0].object;
    driver.netdevs[0].tx[0].wq.doorbell(&world);
    // The worker does not get to run before the queue goes.
    driver.destroy_wq_obj(1, object).unwrap();
    driver.netdevs[0].tx[0].wq.doorbell(&world);
    driver.netdevs[0].tx[1].wq.doorbell(&world);
    driver.service();
    assert_eq!(driver.in_flight(0, 1), 0, "the other queue has sent all");
    assert!(world.counter("doorbell_dead") > 0);
    driver.abandon();
    world.device.reset();
    world.assert_empty_ledger();
    world.memory.check_freed();
}
