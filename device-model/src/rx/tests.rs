use std::sync::atomic::Ordering;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::doors::PortCapabilities;
use crate::observe::QueueKind;
use crate::testing::rig::{DriverQueue, Rig, pieces, sge};
use crate::testing::{tcp4, tcp6, udp4, udp6};

const KEY: [u8; HASH_KEY_SIZE] = *b"any forty bytes make a key, not a good one".first_chunk().unwrap();

fn rig() -> Rig {
    Rig::new(PortCapabilities::default())
}

/// Everything to queue `rq`, without hashing.
fn to(rq: u32) -> RxUpdate {
    RxUpdate { enable: Some(true), default_rq: Some(rq), ..RxUpdate::default() }
}

/// A WQE with `len` bytes of memory cut at `cuts`.
fn post(rig: &Rig, rq: &mut DriverQueue, len: usize, cuts: &[usize]) -> Vec<Sge> {
    let sgl: Vec<Sge> =
        pieces(len, cuts).map(|range| sge(rig.allocate(range.len() as u32), range.len())).collect();
    rq.post_rx(rig, &sgl);
    sgl
}

/// `len` bytes of what lies in the buffers of `sgl`.
fn read(rig: &Rig, sgl: &[Sge], len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for sge in sgl {
        let at = bytes.len();
        bytes.resize(at + sge.size.get() as usize, 0);
        rig.memory.read_slice(&mut bytes[at..], GuestAddress(sge.address.get())).unwrap();
    }
    bytes.truncate(len);
    bytes
}

fn completions(rig: &Rig, rq: &mut DriverQueue) -> Vec<RxCompletion> {
    rq.reap_all(rig).iter().map(|cqe| zerocopy::transmute!(cqe.data)).collect()
}

/// Type and lengths of each completion.
fn shapes(rig: &Rig, rq: &mut DriverQueue) -> Vec<(u8, Vec<u16>)> {
    let shape = |completion: &RxCompletion| {
        (completion.cqe_type(), completion.packets().map(|(len, _)| len).collect())
    };
    completions(rig, rq).iter().map(shape).collect()
}

fn frames() -> impl Strategy<Value = Vec<u8>> {
    let payload = proptest::collection::vec(any::<u8>(), 0..1400);
    (payload, 0..5).prop_map(|(payload, kind)| match kind {
        0 => tcp4(&payload),
        1 => udp4(&payload),
        2 => tcp6(&payload),
        3 => udp6(&payload),
        _ => [&[0xff; 12], &[0x08, 0x06][..], &payload].concat(),
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_frame_arrives_in_any_buffers_at_any_ring_position(
        frames in proptest::collection::vec(
            (frames(), proptest::collection::vec(any::<usize>(), 0..14), proptest::option::of(any::<u16>())), 1..16),
        position in any::<u32>(),
    ) {
        let rig = rig();
        let mut rq = rig.rq(1, 256);
        rig.vport().configure_rx(&to(1)).unwrap();
        rq.start_at(&rig, position);
        let start = rq.tail;
        let mut buffers = Vec::new();
        for (_, cuts, _) in &frames {
            let offset = rq.tail;
            buffers.push((offset, post(&rig, &mut rq, 1514, cuts)));
        }
        prop_assume!(rq.tail.wrapping_sub(start) <= 256 * 32);
        rq.ring(&rig);
        let wire: Vec<Vec<u8>> = frames.iter().map(|(frame, _, tci)| match tci {
            None => frame.clone(),
            Some(tci) => [&frame[..12], &[0x81, 0], &tci.to_be_bytes(), &frame[12..]].concat(),
        }).collect();
        prop_assert_eq!(rig.deliver(&wire), frames.len());
        let completions = completions(&rig, &mut rq);
        prop_assert_eq!(completions.len(), frames.len());
        for ((completion, (frame, _, tci)), (offset, sgl)) in completions.iter().zip(&frames).zip(&buffers) {
            let packets: Vec<_> = completion.packets().collect();
            prop_assert_eq!(packets, [(frame.len() as u16, 0)]);
            prop_assert_eq!(completion.cqe_type(), RxType::Okay as u8);
            prop_assert_eq!(completion.wqe_offset.get(), *offset);
            prop_assert_eq!(completion.meta().vlan_id(), tci.map(|tci| tci & 0xfff));
            prop_assert_eq!(completion.meta().checksums_ok(), frame[12] != 0x08 || frame[13] == 0);
            prop_assert_eq!(&read(&rig, sgl, frame.len()), frame);
        }
    }

    #[test]
    fn any_frame_and_any_wqe_leave_the_card_standing(
        frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 1..8),
        entries in proptest::collection::vec(any::<(u32, u16, bool)>(), 0..30),
    ) {
        let rig = rig();
        let (mut rq, mut other) = (rig.rq(1, 256), rig.rq(2, 256));
        rig.vport().configure_rx(&to(1)).unwrap();
        let sgl: Vec<Sge> = entries.iter().map(|&(address, len, sane)| {
            sge(if sane { u64::from(address & 0xff_0000) } else { u64::from(address) << 32 }, len.into())
        }).collect();
        rq.post_rx(&rig, &sgl);
        rq.ring(&rig);
        rig.deliver(&frames);
        rig.vport().configure_rx(&to(2)).unwrap();
        post(&rig, &mut other, 1514, &[]);
        other.ring(&rig);
        prop_assert_eq!(rig.deliver(&[[7; 60]]), 1);
    }
}

/// Four queues with 64 buffers each, RSS on.
fn rss(rig: &Rig) -> Vec<DriverQueue> {
    let mut queues: Vec<DriverQueue> = (1..=4).map(|id| rig.rq(id, 64)).collect();
    for rq in &mut queues {
        (0..64).for_each(|_| {
            post(rig, rq, 1514, &[]);
        });
        rq.ring(rig);
    }
    let update = RxUpdate {
        enable: Some(true),
        rss: Some(true),
        default_rq: Some(1),
        key: Some(KEY),
        table: Some((0..64).map(|entry| entry % 4 + 1).collect()),
        ..RxUpdate::default()
    };
    rig.vport().configure_rx(&update).unwrap();
    queues
}

#[test]
fn flows_are_spread_by_hash_and_stay_in_order() {
    let rig = rig();
    let mut queues = rss(&rig);
    let toeplitz = Toeplitz::new(&KEY);
    let frames: Vec<Vec<u8>> = (0..100u8)
        .map(|n| {
            let mut frame = tcp4(&vec![0; n.into()]);
            frame[29] = n % 8; // eight flows, by source address
            frame
        })
        .collect();
    assert_eq!(rig.deliver(&frames), 100);
    let mut expected = vec![Vec::new(); 4];
    for frame in &frames {
        let hash = toeplitz.hash(&frame[26..34], &frame[34..38]);
        expected[(hash % 64 % 4) as usize].push((frame.len() as u16, hash));
    }
    assert!(expected.iter().filter(|queue| !queue.is_empty()).count() > 1);
    for (rq, expected) in queues.iter_mut().zip(expected) {
        let got = completions(&rig, rq);
        assert!(got.iter().all(|completion| completion.meta().hash_type() == HashTypes::TCP_IPV4));
        let got: Vec<_> = got.iter().flat_map(RxCompletion::packets).collect();
        assert_eq!(got, expected);
    }
    // Not hashable: to the default queue.
    rig.deliver(&[[0xff; 60]]);
    assert_eq!(completions(&rig, &mut queues[0])[0].meta().hash_type(), 0);
}

#[test]
fn updates_leave_the_rest_as_it_is() {
    let rig = rig();
    let mut queues = rss(&rig);
    rig.vport().configure_rx(&RxUpdate { default_rq: Some(3), ..RxUpdate::default() }).unwrap();
    rig.deliver(&[[0xff; 60]]);
    assert_eq!(completions(&rig, &mut queues[2]).len(), 1);
    rig.vport().configure_rx(&RxUpdate { table: Some(vec![2]), ..RxUpdate::default() }).unwrap();
    rig.deliver(&[tcp4(b"x")]);
    assert_eq!(completions(&rig, &mut queues[1]).len(), 1);
    rig.deliver(&[[0xff; 60]]);
    assert_eq!(completions(&rig, &mut queues[2]).len(), 1);
    rig.vport().configure_rx(&RxUpdate { rss: Some(false), ..RxUpdate::default() }).unwrap();
    rig.deliver(&[tcp4(b"x")]);
    assert_eq!(completions(&rig, &mut queues[2])[0].meta().hash_type(), 0);
}

#[test]
fn tables_have_one_to_512_entries() {
    let rig = rig();
    let mut queues = rss(&rig);
    let toeplitz = Toeplitz::new(&KEY);
    let frame = tcp4(b"x");
    let hash = toeplitz.hash(&frame[26..34], &frame[34..38]) as usize;
    for entries in (0..=9).map(|bits| 1 << bits) {
        // One entry is queue 3, the one that the hash picks.
        let table = (0..entries).map(|entry| if entry == hash % entries { 3 } else { 1 }).collect();
        rig.vport().configure_rx(&RxUpdate { table: Some(table), ..RxUpdate::default() }).unwrap();
        rig.deliver(&[&frame]);
        assert_eq!(completions(&rig, &mut queues[2]).len(), 1, "{entries} entries");
    }
}

#[test]
fn impossible_tables_change_nothing() {
    let rig = rig();
    let mut rq = rig.rq(1, 64);
    rig.vport().configure_rx(&to(1)).unwrap();
    for (table, error) in [
        (vec![2; 3], RxConfigError::TableSize(3)),
        (vec![], RxConfigError::TableSize(0)),
        (vec![2; 1024], RxConfigError::TableSize(1024)),
        ((0..128).collect(), RxConfigError::TooManyQueues),
    ] {
        let update = RxUpdate { enable: Some(false), table: Some(table), ..RxUpdate::default() };
        assert_eq!(rig.vport().configure_rx(&update), Err(error));
    }
    post(&rig, &mut rq, 1514, &[]);
    rq.ring(&rig);
    assert_eq!(rig.deliver(&[[7; 60]]), 1);
}

#[test]
fn drops_are_counted_by_cause() {
    let rig = rig();
    let counters = rig.counters();
    assert_eq!(rig.deliver(&[[7; 60]; 3]), 0);
    assert_eq!(counters.rx_err_vport_disabled.get(), 3);
    let mut rq = rig.rq(1, 64);
    rig.vport().configure_rx(&to(1)).unwrap();
    post(&rig, &mut rq, 1514, &[]);
    rq.ring(&rig);
    assert_eq!(rig.deliver(&[[7; 60]; 3]), 1);
    assert_eq!(counters.rx_discards_nowqe.get(), 2);
    assert_eq!(rig.deliver(&[[7; 13]]), 0);
    assert_eq!(counters.rx_runts.get(), 1);
    rig.vport().configure_rx(&RxUpdate { enable: Some(false), ..RxUpdate::default() }).unwrap();
    post(&rig, &mut rq, 1514, &[]);
    rq.ring(&rig);
    assert_eq!(rig.deliver(&[[7; 60]]), 0);
    assert_eq!(counters.rx_err_vport_disabled.get(), 4);
    assert_eq!(shapes(&rig, &mut rq), [(1, vec![60])]);
    assert_eq!((counters.rx_bytes.get(), counters.rx_mcast_pkts.get()), (60, 1));
}

#[test]
fn too_long_for_the_buffers_is_truncated() {
    let rig = rig();
    let mut rq = rig.rq(1, 64);
    rig.vport().configure_rx(&to(1)).unwrap();
    let sgl = post(&rig, &mut rq, 100, &[40]);
    post(&rig, &mut rq, 100, &[40]);
    rq.ring(&rig);
    let frame: Vec<u8> = (0..101).collect();
    assert_eq!(rig.deliver(&[frame.clone(), frame[..100].to_vec()]), 1);
    let got = completions(&rig, &mut rq);
    assert_eq!(got.iter().map(RxCompletion::cqe_type).collect::<Vec<_>>(), [4, 1]);
    assert_eq!(read(&rig, &sgl, 100), frame[..100]);
    assert_eq!(rig.counters().rx_truncated.get(), 1);
}

#[test]
fn fence_comes_after_the_packets_and_consumes_nothing() {
    let rig = rig();
    let mut rq = rig.rq(1, 64);
    rig.vport().configure_rx(&to(1)).unwrap();
    (0..3).for_each(|_| {
        post(&rig, &mut rq, 1514, &[]);
    });
    rq.ring(&rig);
    rig.deliver(&[[7; 60], [8; 60]]);
    fence(&rig.queues, &GuestRam::new(&rig.memory), rig.vport(), 1).unwrap();
    rig.deliver(&[[9; 61]]);
    assert_eq!(shapes(&rig, &mut rq), [(1, vec![60]), (1, vec![60]), (3, vec![]), (1, vec![61])]);
}

#[test]
fn fence_waits_for_a_slot_in_a_full_completion_queue() {
    let rig = rig();
    let mut rq = rig.rq(1, 64);
    rig.vport().configure_rx(&to(1)).unwrap();
    (0..64).for_each(|_| {
        post(&rig, &mut rq, 1514, &[]);
    });
    rq.ring(&rig);
    assert_eq!(rig.deliver(&[[7; 60]; 64]), 64);
    fence(&rig.queues, &GuestRam::new(&rig.memory), rig.vport(), 1).unwrap();
    let first: Vec<_> = shapes(&rig, &mut rq);
    assert_eq!((first.len(), first.iter().filter(|(kind, _)| *kind == 3).count()), (64, 0));
    rq.ring_cq(&rig, true);
    assert_eq!(shapes(&rig, &mut rq), [(3, vec![])]);
}

#[test]
fn equal_packets_share_a_completion_when_asked_for() {
    for (coalescing, expected) in [
        (Coalescing::Off, vec![1; 11]),
        (Coalescing::Four, vec![2, 2, 1, 2]),
        (Coalescing::Eight, vec![7, 1, 2]),
    ] {
        let rig = rig();
        let mut rq = rig.rq(1, 64);
        rig.vport().configure_rx(&RxUpdate { coalescing: Some(coalescing), ..to(1) }).unwrap();
        (0..11).for_each(|_| {
            post(&rig, &mut rq, 1514, &[]);
        });
        rq.ring(&rig);
        // Eight alike, one of another kind, two alike.
        let mut frames: Vec<Vec<u8>> = (1..=8).map(|n| tcp4(&vec![0; n])).collect();
        frames.push(vec![0xff; 60]);
        frames.extend([udp4(&[1]), udp4(&[2, 3])]);
        assert_eq!(rig.deliver(&frames), 11);
        let got = completions(&rig, &mut rq);
        assert_eq!(got.iter().map(RxCompletion::cqe_type).collect::<Vec<_>>(), expected);
        let lengths: Vec<_> = got.iter().flat_map(RxCompletion::packets).map(|(len, _)| len).collect();
        assert_eq!(lengths, frames.iter().map(|frame| frame.len() as u16).collect::<Vec<_>>());
    }
}

#[test]
fn broken_wqes_stop_only_their_queue() {
    type Post = fn(&Rig, &mut DriverQueue);
    let breaks: [(&str, &str, Post); 8] = [
        ("no memory", "wqe-shape", |rig, rq| rq.post_rx(rig, &[sge(1 << 40, 1514)])),
        ("end of the address space", "wqe-shape", |rig, rq| rq.post_rx(rig, &[sge(u64::MAX - 8, 1514)])),
        ("second entry without memory", "wqe-shape", |rig, rq| {
            rq.post_rx(rig, &[sge(rig.allocate(30), 30), sge(1 << 40, 1514)]);
        }),
        ("wrong key", "memory-key", |rig, rq| {
            rq.post_rx(rig, &[Sge { mem_key: 1.into(), ..sge(rig.allocate(1514), 1514) }]);
        }),
        ("wrong key of the second entry", "memory-key", |rig, rq| {
            let entry = |key: u32| Sge { mem_key: key.into(), ..sge(rig.allocate(30), 30) };
            rq.post_rx(rig, &[entry(crate::testing::rig::MEM_KEY), entry(2)]);
        }),
        ("more entries than fit", "wqe-shape", |rig, rq| rq.post_rx(rig, &[sge(0, 100); 16])),
        ("a tail beyond the ring", "doorbell-tail", |_, rq| rq.tail = 65 * 32),
        ("a tail inside a WQE", "doorbell-tail", |_, rq| rq.tail = 33),
    ];
    for (what, rule, post_broken) in breaks {
        let rig = rig();
        let mut queues = rss(&rig);
        let mut broken = rig.rq(5, 64);
        post_broken(&rig, &mut broken);
        broken.ring(&rig);
        rig.vport().configure_rx(&RxUpdate { default_rq: Some(5), ..RxUpdate::default() }).unwrap();
        assert_eq!(rig.deliver(&[vec![0xff; 60], tcp4(b"x"), vec![0xff; 60]]), 1, "{what}");
        let counters = rig.counters();
        assert_eq!((counters.rx_err_gdma.get(), counters.rx_discards_nowqe.get()), (1, 2), "{what}");
        assert_eq!(rig.queues.core().rules.fields().0, [(rule, 1)], "{what}");
        assert!(completions(&rig, &mut broken).is_empty(), "{what}");
        // Stopped for good, and everybody else goes on.
        let buffer = sge(rig.allocate(1514), 1514);
        broken.post_rx(&rig, &[buffer]);
        broken.ring(&rig);
        assert_eq!(rig.deliver(&[vec![0xff; 60], tcp4(b"y")]), 1, "{what}");
        assert_eq!(counters.rx_err_gdma.get(), 1, "{what}");
        let others: usize = queues.iter_mut().map(|rq| completions(&rig, rq).len()).sum();
        assert_eq!(others, 2, "{what}");
    }
}

#[test]
fn buffers_of_no_bytes_truncate_everything() {
    let rig = rig();
    let mut rq = rig.rq(1, 64);
    rig.vport().configure_rx(&to(1)).unwrap();
    rq.post_rx(&rig, &[]);
    rq.post_rx(&rig, &[sge(1, 0)]);
    post(&rig, &mut rq, 1514, &[]);
    rq.ring(&rig);
    assert_eq!(rig.deliver(&[[7; 60]; 3]), 1);
    assert_eq!(shapes(&rig, &mut rq), [(4, vec![]), (4, vec![]), (1, vec![60])]);
    assert_eq!(rig.counters().rx_truncated.get(), 2);
}

#[test]
fn queues_that_are_gone_get_nothing() {
    let rig = rig();
    let mut rq = rig.rq(1, 64);
    rig.vport().configure_rx(&to(1)).unwrap();
    post(&rig, &mut rq, 1514, &[]);
    rq.ring(&rig);
    rig.vport().receive.close(1);
    assert_eq!(rig.deliver(&[[7; 60]]), 0);
    rig.queues.close(QueueKind::Rq, 1);
    // Another queue with that id is not meant by what was configured before.
    let mut again = rig.rq(1, 64);
    post(&rig, &mut again, 1514, &[]);
    again.ring(&rig);
    assert_eq!(rig.deliver(&[[7; 60]]), 0);
    rig.vport().configure_rx(&to(1)).unwrap();
    assert_eq!(rig.deliver(&[[7; 60]]), 1);
    rig.vport().configure_rx(&to(u32::MAX)).unwrap();
    assert_eq!(rig.deliver(&[[7; 60]]), 0);
    assert_eq!(rig.counters().rx_discards_nowqe.get(), 3);
    rig.bus_master.store(false, Ordering::SeqCst);
    assert_eq!(rig.deliver(&[[7; 60]]), 0);
}

#[test]
fn one_event_for_a_batch() {
    let rig = rig();
    let mut rq = rig.rq(1, 64);
    rig.vport().configure_rx(&to(1)).unwrap();
    (0..64).for_each(|_| {
        post(&rig, &mut rq, 1514, &[]);
    });
    rq.ring(&rig);
    rig.deliver(&[[7; 60]; 40]);
    assert_eq!(rig.events(), 1);
}
