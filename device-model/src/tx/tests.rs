use std::sync::atomic::Ordering;

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::*;
use crate::doors::{PartialChecksum, PortCapabilities, Work};
use crate::offload::{store_be16, verify};
use crate::packet::Headers;
use crate::testing::rig::{DriverQueue, Rig, sge};
use crate::testing::{OobBuilder, oob, tcp4, tcp6, udp4, udp6};
use crate::wire::rx::RxMeta;

const NOTHING: PortCapabilities = PortCapabilities { checksum: false, segmentation: false };
const EVERYTHING: PortCapabilities = PortCapabilities { checksum: true, segmentation: true };

/// Header bits of a segmentation request.
fn lso(mss: u32) -> u32 {
    1 << 11 | mss << 16
}

/// `(type, offset in basic units)` of each completion.
fn completions(rig: &Rig, sq: &mut DriverQueue) -> Vec<(u8, u32)> {
    sq.reap_all(rig)
        .iter()
        .map(|cqe| {
            let completion: TxCompletion = zerocopy::transmute!(cqe.data);
            assert_eq!(completion.header.get() >> 6 & 3, 1, "client type");
            (completion.cqe_type(), completion.wqe_offset.get() >> 5)
        })
        .collect()
}

/// Sum of the pseudo-header in place of the checksum.
fn partial(mut frame: Vec<u8>) -> Vec<u8> {
    let ip = Headers::parse(&frame).ip.unwrap();
    let transport = ip.transport.unwrap();
    let len = ip.end() - transport.offset;
    let sum = crate::checksum::pseudo_header(&frame, &ip, transport.protocol, len).unwrap();
    store_be16(&mut frame, transport.offset + transport.protocol.checksum_offset(), sum.fold()).unwrap();
    frame
}

fn cuts() -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(any::<usize>(), 0..18)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_frame_in_any_pieces_at_any_ring_position_comes_out(
        frames in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 14..1514), cuts()), 1..12),
        position in any::<u32>(),
        tci in proptest::option::of(0u16..0xfff),
    ) {
        let rig = Rig::new(NOTHING);
        let mut sq = rig.sq(1, 256);
        sq.start_at(&rig, position);
        let start = sq.tail;
        let mut offsets = Vec::new();
        for (frame, cuts) in &frames {
            offsets.push((32, sq.tail / 32));
            let sgl = rig.scatter(frame, cuts);
            sq.post(&rig, &oob().of(&sq).maybe_vlan(tci).bytes(), 0, &sgl);
        }
        prop_assume!(sq.tail.wrapping_sub(start) <= 256 * 32);
        sq.ring(&rig);
        rig.transmit(&sq);
        let sent: Vec<Vec<u8>> = rig.sent().into_iter().map(|(bytes, _)| bytes).collect();
        let expected: Vec<Vec<u8>> = frames
            .iter()
            .map(|(frame, _)| match tci {
                None => frame.clone(),
                Some(tci) => [&frame[..12], &[0x81, 0], &tci.to_be_bytes(), &frame[12..]].concat(),
            })
            .collect();
        prop_assert_eq!(sent, expected);
        prop_assert_eq!(completions(&rig, &mut sq), offsets);
    }

    #[test]
    fn checksums_are_made_or_left_to_the_port(
        payload in proptest::collection::vec(any::<u8>(), 0..1400), cuts in cuts(), position in any::<u32>(),
    ) {
        for capabilities in [NOTHING, EVERYTHING] {
            let rig = Rig::new(capabilities);
            let mut sq = rig.sq(1, 256);
            sq.start_at(&rig, position);
            let cases = [
                (tcp4(&payload), oob().ipv4().tcp(34), 34, 16),
                (udp4(&payload), oob().ipv4().udp(), 34, 6),
                (tcp6(&payload), oob().ipv6().tcp(54), 54, 16),
                (udp6(&payload), oob().ipv6().udp(), 54, 6),
            ];
            for (right, oob, start, offset) in cases {
                let frame = partial(right.clone());
                let sgl = rig.scatter(&frame, &cuts);
                sq.post(&rig, &oob.of(&sq).bytes(), 0, &sgl);
                sq.ring(&rig);
                rig.transmit(&sq);
                let (sent, offload) = rig.sent().pop().unwrap();
                let left = Some(PartialChecksum { start, offset });
                prop_assert_eq!(offload.checksum, left.filter(|_| capabilities.checksum));
                prop_assert_eq!(sent, if capabilities.checksum { frame } else { right });
            }
            prop_assert_eq!(completions(&rig, &mut sq).len(), 4);
        }
    }

    #[test]
    fn super_frames_are_cut(
        payload in proptest::collection::vec(any::<u8>(), 1..40_000),
        cuts in cuts(), mss in 100u32..1440, v6 in any::<bool>(), tci in proptest::option::of(0u16..0xfff),
        position in any::<u32>(),
    ) {
        let rig = Rig::new(NOTHING);
        let mut sq = rig.sq(1, 256);
        sq.start_at(&rig, position);
        let at = sq.tail / 32;
        let (header, oob) = super_header(v6);
        let mut sgl = vec![sge(rig.place(&header), header.len())];
        sgl.extend(rig.scatter(&payload, &cuts));
        sq.post(&rig, &oob.of(&sq).maybe_vlan(tci).bytes(), lso(mss), &sgl);
        sq.ring(&rig);
        rig.transmit(&sq);
        let mut joined = Vec::new();
        for (segment, offload) in rig.sent() {
            prop_assert_eq!(offload, TxOffload::default());
            let headers = Headers::parse(&segment);
            prop_assert_eq!(headers.vlan, tci);
            prop_assert!(verify(&segment, &headers, false, RxMeta::default()).checksums_ok());
            let packet = SlicedPacket::from_ethernet(&segment).unwrap();
            let Some(TransportSlice::Tcp(tcp)) = packet.transport else { panic!("no TCP") };
            joined.extend_from_slice(tcp.payload());
        }
        prop_assert_eq!(joined, payload);
        prop_assert_eq!(completions(&rig, &mut sq), [(32, at)]);
    }

    #[test]
    fn super_frames_in_tunnels_are_cut(
        payload in proptest::collection::vec(any::<u8>(), 1..20_000),
        cuts in cuts(), mss in 100u32..1300, outer_v6 in any::<bool>(), v6 in any::<bool>(),
        outer_checksum in any::<bool>(), tell in any::<bool>(),
    ) {
        let rig = Rig::new(EVERYTHING);
        let mut sq = rig.sq(1, 256);
        let (header, oob) = tunnel(outer_v6, v6, outer_checksum, tell);
        let mut sgl = vec![sge(rig.place(&header), header.len())];
        sgl.extend(rig.scatter(&payload, &cuts));
        sq.post(&rig, &oob.of(&sq).bytes(), lso(mss), &sgl);
        sq.ring(&rig);
        rig.transmit(&sq);
        let mut joined = Vec::new();
        for (index, (segment, offload)) in rig.sent().into_iter().enumerate() {
            prop_assert_eq!(offload, TxOffload::default(), "no port cuts what is in a tunnel");
            let outer = SlicedPacket::from_ethernet(&segment).unwrap();
            let Some(TransportSlice::Udp(udp)) = &outer.transport else { panic!("no UDP") };
            prop_assert_eq!(usize::from(udp.length()), 8 + udp.payload().len());
            let udp_header = udp.to_header();
            let right = match outer.net.as_ref().unwrap() {
                NetSlice::Ipv4(ip) => {
                    let ip = ip.header();
                    prop_assert_eq!(usize::from(ip.total_len()), segment.len() - 14);
                    prop_assert_eq!(ip.header_checksum(), ip.to_header().calc_header_checksum());
                    prop_assert_eq!(ip.identification(), 0xfff0_u16.wrapping_add(index as u16));
                    udp_header.calc_checksum_ipv4_raw(ip.source(), ip.destination(), udp.payload())
                }
                NetSlice::Ipv6(ip) => {
                    prop_assert_eq!(usize::from(ip.header().payload_length()), segment.len() - 54);
                    let ip = ip.header();
                    udp_header.calc_checksum_ipv6_raw(ip.source(), ip.destination(), udp.payload())
                }
                NetSlice::Arp(_) => unreachable!(),
            };
            prop_assert_eq!(udp.checksum(), if outer_checksum { right.unwrap() } else { 0 });
            // Behind eight bytes of the tunnel's own.
            let inner = &udp.payload()[8..];
            prop_assert!(verify(inner, &Headers::parse(inner), false, RxMeta::default()).checksums_ok());
            let inner = SlicedPacket::from_ethernet(inner).unwrap();
            let Some(TransportSlice::Tcp(tcp)) = inner.transport else { panic!("no TCP") };
            prop_assert_eq!(tcp.sequence_number(), 7 + joined.len() as u32);
            joined.extend_from_slice(tcp.payload());
        }
        prop_assert_eq!(joined, payload);
        prop_assert_eq!(completions(&rig, &mut sq), [(32, 0)]);
    }

    #[test]
    fn checksums_in_tunnels_are_made_or_left_to_the_port(
        payload in proptest::collection::vec(any::<u8>(), 0..1200), cuts in cuts(), outer_v6 in any::<bool>(),
        v6 in any::<bool>(), tcp in any::<bool>(), tell in any::<bool>(),
    ) {
        for capabilities in [NOTHING, EVERYTHING] {
            let rig = Rig::new(capabilities);
            let mut sq = rig.sq(1, 256);
            let inner = match (v6, tcp) {
                (false, false) => udp4(&payload),
                (false, true) => tcp4(&payload),
                (true, false) => udp6(&payload),
                (true, true) => tcp6(&payload),
            };
            let right = enclose(outer_v6, &inner);
            let frame = enclose(outer_v6, &partial(inner.clone()));
            let at = (frame.len() - inner.len()) as u32;
            let transport = at + if v6 { 54 } else { 34 };
            let oob = if outer_v6 { oob().ipv6() } else { oob().ipv4() }.inner(at + 14, v6);
            let oob = match tcp {
                true => oob.tcp(if tell { transport } else { 0 }),
                false => oob.udp(),
            };
            let sgl = rig.scatter(&frame, &cuts);
            sq.post(&rig, &oob.of(&sq).bytes(), 0, &sgl);
            sq.ring(&rig);
            rig.transmit(&sq);
            let (sent, offload) = rig.sent().pop().unwrap();
            let left = PartialChecksum { start: transport as u16, offset: if tcp { 16 } else { 6 } };
            prop_assert_eq!(offload.checksum, Some(left).filter(|_| capabilities.checksum));
            // The outer UDP checksum is over what the driver has written.
            let tunnel = at as usize;
            prop_assert_eq!(&sent[tunnel..], if capabilities.checksum { &frame[tunnel..] } else { &right[tunnel..] });
            prop_assert_eq!(&sent[..tunnel], &frame[..tunnel]);
        }
    }

    #[test]
    fn any_wqe_leaves_the_card_standing(words in proptest::collection::vec(any::<u32>(), 16..128), sane in any::<bool>()) {
        let rig = Rig::new(NOTHING);
        let mut sq = rig.sq(1, 256);
        let mut other = rig.sq(2, 256);
        let sgl: Vec<Sge> = words.chunks_exact(4).take(20).map(|word| Sge {
            address: if sane { u64::from(word[0] & 0xff_ffff) } else { u64::from(word[0]) << 32 | u64::from(word[1]) }.into(),
            mem_key: if sane { crate::testing::rig::MEM_KEY } else { word[2] }.into(),
            size: if sane { word[3] & 0x7ff } else { word[3] }.into(),
        }).collect();
        let mut oob: Vec<u8> = words.iter().take(6).flat_map(|word| word.to_le_bytes()).collect();
        if sane {
            oob[1..4].copy_from_slice(&sq.cq.to_le_bytes()[..3]);
            oob[5] &= 3;
            oob[6..8].fill(0);
            oob[14..16].fill(0);
        }
        sq.post(&rig, &oob, words[7] & 0x3fff_0800, &sgl);
        sq.ring(&rig);
        rig.transmit(&sq);
        rig.sent();
        let frame = [7; 60];
        other.post(&rig, &crate::testing::oob().of(&other).bytes(), 0, &rig.scatter(&frame, &[]));
        other.ring(&rig);
        rig.transmit(&other);
        prop_assert_eq!(rig.sent().len(), 1);
        prop_assert_eq!(completions(&rig, &mut other), [(32, 0)]);
    }
}

/// `inner` behind eight bytes of a tunnel's own, in UDP.
fn enclose(v6: bool, inner: &[u8]) -> Vec<u8> {
    let payload = [&[8, 0, 0, 0, 0, 0, 5, 0], inner].concat();
    if v6 { udp6(&payload) } else { udp4(&payload) }
}

/// Headers of a tunnel as the driver hands them over for segmentation, and their OOB, which tells where the inner TCP
/// header is if `tell`.
fn tunnel(outer_v6: bool, v6: bool, outer_checksum: bool, tell: bool) -> (Vec<u8>, OobBuilder) {
    let (inner, _) = super_header(v6);
    let mut header = enclose(outer_v6, &inner);
    let udp = if outer_v6 { 54 } else { 34 };
    if outer_v6 {
        header[18..20].fill(0);
    } else {
        header[16..18].fill(0);
        header[18..20].copy_from_slice(&[0xff, 0xf0]);
        header[24..26].fill(0);
    }
    header[udp + 4..udp + 6].fill(0);
    header[udp + 6..udp + 8].fill(if outer_checksum { 0x55 } else { 0 });
    let at = (header.len() - inner.len()) as u32;
    let transport = if tell { at + if v6 { 54 } else { 34 } } else { 0 };
    let oob = if outer_v6 { oob().ipv6() } else { oob().ipv4() };
    (header, oob.ip_checksum().inner(at + 14, v6).tcp(transport))
}

/// A TCP header as the driver hands it over for segmentation, and its OOB.
fn super_header(v6: bool) -> (Vec<u8>, OobBuilder) {
    let mut header = if v6 { tcp6(&[]) } else { tcp4(&[]) };
    if v6 {
        header[18..20].fill(0);
        (header, oob().ipv6().ip_checksum().tcp(54))
    } else {
        header[16..18].fill(0);
        header[24..26].fill(0);
        (header, oob().ipv4().ip_checksum().tcp(34))
    }
}

#[test]
fn super_frames_are_left_to_a_port_that_segments() {
    let rig = Rig::new(EVERYTHING);
    let mut sq = rig.sq(1, 256);
    let payload = [5; 10_000];
    for (v6, tci) in [(false, None), (true, None), (false, Some(7))] {
        let (header, oob) = super_header(v6);
        let mut sgl = vec![sge(rig.place(&header), header.len())];
        sgl.extend(rig.scatter(&payload, &[3000, 4096]));
        sq.post(&rig, &oob.of(&sq).maybe_vlan(tci).bytes(), lso(1400), &sgl);
        sq.ring(&rig);
        rig.transmit(&sq);
        let (mut frame, offload) = rig.sent().pop().unwrap();
        let tag = if tci.is_some() { 4 } else { 0 };
        let start = if v6 { 54 } else { 34 } + tag;
        assert_eq!(offload.checksum, Some(PartialChecksum { start, offset: 16 }));
        let segmentation = Segmentation { mss: 1400, header_len: start + 20, ipv6: v6 };
        assert_eq!(offload.segmentation, Some(segmentation));
        let sum = crate::checksum::Sum::default().add_bytes(&frame[usize::from(start)..]).checksum();
        store_be16(&mut frame, usize::from(start) + 16, sum).unwrap();
        let headers = Headers::parse(&frame);
        assert_eq!(headers.vlan, tci);
        assert!(verify(&frame, &headers, false, RxMeta::default()).checksums_ok());
    }
}

#[test]
fn big_tcp_is_cut_even_for_a_port_that_segments() {
    let rig = Rig::new(EVERYTHING);
    let mut sq = rig.sq(1, 256);
    let (header, oob) = super_header(true);
    let payload = vec![9; MAX_LSO_PAYLOAD];
    let sgl = [sge(rig.place(&header), header.len()), sge(rig.place(&payload), payload.len())];
    sq.post(&rig, &oob.of(&sq).bytes(), lso(1440), &sgl);
    sq.ring(&rig);
    rig.transmit(&sq);
    let sent = rig.sent();
    assert_eq!(sent.len(), payload.len().div_ceil(1440));
    assert!(sent.iter().all(|(frame, _)| {
        verify(frame, &Headers::parse(frame), false, RxMeta::default()).checksums_ok()
    }));
}

/// Post one WQE on queue 1 of a fresh card and run it: completion type, and whether the queue still works.
fn one(rig: &Rig, oob: &[u8], flags: u32, sgl: &[Sge]) -> (Option<u8>, bool) {
    let mut sq = rig.sq(1, 256);
    sq.post(rig, oob, flags, sgl);
    sq.ring(rig);
    rig.transmit(&sq);
    let first = completions(rig, &mut sq).first().map(|&(kind, _)| kind);
    rig.sent();
    let good = crate::testing::oob().of(&sq).bytes();
    sq.post(rig, &good, 0, &rig.scatter(&[1; 60], &[]));
    sq.ring(rig);
    rig.transmit(&sq);
    (first, rig.sent().len() == 1)
}

#[test]
fn each_refusal_has_its_type_and_counter_and_the_queue_goes_on() {
    let queue = Rig::new(NOTHING).sq(1, 256);
    let oob = || oob().of(&queue);
    let tagged = |len: usize| [&[2; 12][..], &[0x81, 0, 0, 5], &vec![0; len - 16]].concat();
    let cases: [(&str, Vec<u8>, Vec<u8>, u8); 13] = [
        ("tx_err_mtu_violation", oob().bytes(), vec![2; 1515], 34),
        ("tx_err_mtu_violation", oob().bytes(), tagged(1519), 34),
        ("tx_err_mtu_violation", oob().vlan(5).bytes(), vec![2; 1515], 34),
        ("", oob().bytes(), tagged(1518), 32),
        ("", oob().vlan(5).bytes(), vec![2; 1514], 32),
        ("tx_err_inval_oob", crate::testing::oob().bytes(), vec![2; 60], 35),
        ("tx_err_inval_oob", vec![3; 8], vec![2; 60], 35),
        ("tx_err_inval_vport_offset", oob().vport_offset(1).bytes(), vec![2; 60], 39),
        ("tx_err_vlan_enforcement", oob().vlan(0xfff).bytes(), vec![2; 60], 41),
        ("tx_err_header", oob().bytes(), vec![2; 13], 37),
        ("tx_err_header", oob().ipv4().udp().bytes(), tcp4(b"x"), 37),
        ("tx_err_header", oob().ipv4().tcp(1000).bytes(), tcp4(b"x"), 37),
        ("tx_err_header", oob().ipv4().tcp(34).bytes(), udp4(&[]), 37),
    ];
    for (capabilities, (counter, oob, frame, kind)) in
        [NOTHING, EVERYTHING].into_iter().flat_map(|does| cases.iter().map(move |case| (does, case)))
    {
        let rig = Rig::new(capabilities);
        assert_eq!(one(&rig, oob, 0, &rig.scatter(frame, &[])), (Some(*kind), true), "{counter}");
        for (name, count) in rig.counters().fields().0 {
            if name.starts_with("tx_err") {
                assert_eq!(count, u64::from(name == *counter), "{name} for {counter}");
            }
        }
    }
}

#[test]
fn vport_that_is_not_configured_sends_nothing() {
    let rig = Rig::new(NOTHING);
    rig.vport().configure_tx(None);
    let queue = Rig::new(NOTHING).sq(1, 256);
    let sgl = rig.scatter(&[2; 60], &[]);
    assert_eq!(one(&rig, &oob().of(&queue).bytes(), 0, &sgl), (Some(40), false));
    assert_eq!(rig.counters().tx_err_vport_disabled.get(), 2);
}

#[test]
fn broken_wqes_stop_the_queue_with_a_gdma_error() {
    let queue = Rig::new(NOTHING).sq(1, 256);
    let oob = || oob().of(&queue).bytes();
    let rig = || Rig::new(NOTHING);
    let good = |rig: &Rig| rig.scatter(&[2; 60], &[]);
    let broken = |rig: &Rig, oob: &[u8], flags: u32, sgl: &[Sge]| {
        assert_eq!(one(rig, oob, flags, sgl), (Some(42), false));
        assert_eq!(rig.counters().tx_err_gdma.get(), 1);
        assert_eq!(rig.queues.core().counters.rule_violations.get(), 1);
    };
    let wrong_key = |rig: &Rig| vec![Sge { mem_key: 1.into(), ..good(rig)[0] }];
    let card = rig();
    broken(&card, &oob(), 0, &wrong_key(&card));
    broken(&rig(), &oob(), 0, &[sge(1 << 40, 60)]);
    broken(&rig(), &oob(), 0, &[sge(u64::MAX - 10, 60)]);
    broken(&rig(), &oob(), 0, &[]);
    let many = [sge(0, 60); 32];
    broken(&rig(), &oob(), 0, &many);
    let card = rig();
    broken(&card, &oob(), lso(1000), &good(&card));
    let card = rig();
    broken(&card, &oob(), lso(1000), &[sge(0, 257), good(&card)[0]]);
}

#[test]
fn entries_of_no_bytes_are_no_part_of_the_frame() {
    let rig = Rig::new(NOTHING);
    let mut sq = rig.sq(1, 256);
    let piece = |len: usize| sge(rig.place(&vec![2; len]), len);
    let nothing = sge(1, 0);
    for (sgl, kind) in [
        (vec![nothing, piece(40), nothing, nothing, piece(20), nothing], 32),
        (vec![nothing], 37),
        (vec![nothing; 30], 37),
    ] {
        sq.post(&rig, &oob().of(&sq).bytes(), 0, &sgl);
        sq.ring(&rig);
        rig.transmit(&sq);
        assert_eq!(completions(&rig, &mut sq)[0].0, kind);
        assert!(rig.sent().iter().all(|(frame, _)| frame[..] == [2; 60]));
    }
}

#[test]
fn impossible_tail_stops_only_that_queue() {
    let rig = Rig::new(NOTHING);
    let (mut sq, mut other) = (rig.sq(1, 256), rig.sq(2, 256));
    sq.tail = 257 * 32;
    sq.ring(&rig);
    rig.transmit(&sq);
    assert_eq!(completions(&rig, &mut sq), [(42, 0)]);
    other.post(&rig, &oob().of(&other).bytes(), 0, &rig.scatter(&[1; 60], &[]));
    other.ring(&rig);
    rig.transmit(&other);
    assert_eq!(completions(&rig, &mut other), [(32, 0)]);
}

#[test]
fn suppressed_completions_are_for_successes_only() {
    let rig = Rig::new(NOTHING);
    let mut sq = rig.sq(1, 256);
    let quiet = oob().of(&sq).suppress().bytes();
    for len in [60, 1515, 61] {
        sq.post(&rig, &quiet, 0, &rig.scatter(&vec![2; len], &[]));
    }
    sq.post(&rig, &oob().of(&sq).bytes(), 0, &rig.scatter(&[2; 62], &[]));
    sq.ring(&rig);
    rig.transmit(&sq);
    assert_eq!(completions(&rig, &mut sq), [(34, 1), (32, 3)]);
    assert_eq!(rig.sent().len(), 3);
}

#[test]
fn one_event_for_a_batch_and_one_wake_for_many_doorbells() {
    let rig = Rig::new(NOTHING);
    let mut sq = rig.sq(1, 256);
    for _ in 0..50 {
        sq.post(&rig, &oob().of(&sq).bytes(), 0, &rig.scatter(&[2; 60], &[]));
        sq.ring(&rig);
    }
    assert_eq!(*rig.woken.0.lock().unwrap(), [Work::Transmit { sq: 1 }]);
    rig.transmit(&sq);
    assert_eq!(rig.events(), 1);
    assert_eq!(completions(&rig, &mut sq).len(), 50);
    sq.ring_cq(&rig, true);
    assert_eq!(rig.events(), 1);
}

#[test]
fn budget_is_kept() {
    let rig = Rig::new(NOTHING);
    let mut sq = rig.sq(1, 256);
    for _ in 0..100 {
        sq.post(&rig, &oob().of(&sq).bytes(), 0, &rig.scatter(&[2; 60], &[]));
    }
    sq.ring(&rig);
    assert_eq!(run(&rig.queues, &rig.vports, 1, 70), Ran::More);
    assert_eq!(rig.sent().len(), 70);
    assert_eq!(run(&rig.queues, &rig.vports, 1, 70), Ran::Idle);
    assert_eq!(rig.sent().len(), 30);
}

#[test]
fn full_completion_queue_holds_the_send_queue_back() {
    let rig = Rig::new(NOTHING);
    let mut sq = rig.sq(1, 64);
    let mut sent = 0;
    // The driver takes completions but never says so: after seven laps the card can't know of room.
    loop {
        sq.post(&rig, &oob().of(&sq).bytes(), 0, &rig.scatter(&[2; 60], &[]));
        sq.ring(&rig);
        rig.transmit(&sq);
        match completions(&rig, &mut sq).len() {
            0 => break,
            n => sent += n,
        }
    }
    assert_eq!(sent, 7 * 64);
    assert_eq!(rig.queues.core().rules.fields().0, [("consumer-laps", 1)]);
    rig.woken.0.lock().unwrap().clear();
    sq.ring_cq(&rig, true);
    assert_eq!(*rig.woken.0.lock().unwrap(), [Work::Transmit { sq: 1 }]);
    rig.transmit(&sq);
    assert_eq!(completions(&rig, &mut sq).len(), 1);
}

#[test]
fn dead_queues_and_lost_bus_mastering_are_harmless() {
    let rig = Rig::new(NOTHING);
    let mut sq = rig.sq(1, 256);
    sq.post(&rig, &oob().of(&sq).bytes(), 0, &rig.scatter(&[2; 60], &[]));
    sq.ring(&rig);
    rig.bus_master.store(false, Ordering::SeqCst);
    rig.transmit(&sq);
    assert!(rig.sent().is_empty());
    rig.bus_master.store(true, Ordering::SeqCst);
    rig.queues.resume_all();
    rig.transmit(&sq);
    assert_eq!(rig.sent().len(), 1);
    rig.queues.close(crate::observe::QueueKind::Cq, sq.cq);
    sq.post(&rig, &oob().of(&sq).bytes(), 0, &rig.scatter(&[2; 60], &[]));
    sq.ring(&rig);
    rig.transmit(&sq);
    rig.queues.close(crate::observe::QueueKind::Sq, sq.id);
    rig.transmit(&sq);
    assert_eq!(run(&rig.queues, &rig.vports, u32::MAX, 1), Ran::Idle);
}

#[test]
fn traffic_and_port_drops_are_counted() {
    let rig = Rig::new(NOTHING);
    let mut sq = rig.sq(1, 256);
    let mut frame = [2; 60];
    for first in [[2; 6], [3; 6], [0xff; 6]] {
        frame[..6].copy_from_slice(&first);
        sq.post(&rig, &oob().of(&sq).bytes(), 0, &rig.scatter(&frame, &[3]));
    }
    sq.ring(&rig);
    rig.transmit(&sq);
    let counters = rig.counters();
    assert_eq!(counters.tx_bytes.get(), 180);
    let by_class = [&counters.tx_ucast_pkts, &counters.tx_mcast_pkts, &counters.tx_bcast_pkts];
    assert_eq!(by_class.map(Counter::get), [1; 3]);
    rig.port.full.store(true, Ordering::Relaxed);
    sq.post(&rig, &oob().of(&sq).bytes(), 0, &rig.scatter(&frame, &[]));
    sq.ring(&rig);
    rig.transmit(&sq);
    assert_eq!(counters.tx_port_dropped.get(), 1);
    assert_eq!(counters.tx_bytes.get(), 180);
    assert_eq!(completions(&rig, &mut sq).len(), 4);
}

#[test]
fn buffer_may_straddle_regions_of_memory() {
    let rig = Rig::new(NOTHING);
    let mut sq = rig.sq(1, 256);
    let at = rig.straddle(20);
    let frame: Vec<u8> = (0..60).collect();
    vm_memory::Bytes::write_slice(&rig.memory, &frame, vm_memory::GuestAddress(at)).unwrap();
    sq.post(&rig, &oob().of(&sq).bytes(), 0, &[sge(at, 60)]);
    sq.ring(&rig);
    rig.transmit(&sq);
    assert_eq!(rig.sent().pop().unwrap().0, frame);
}
