//! Packets cost no allocation: a counting allocator watches the paths that run once a packet, a batch or a doorbell.
//!
//! A program of its own, because it replaces the allocator.

use allocation_counter::measure;
use mana_device::doors::{PortCapabilities, RxChecksum};
use mana_test_driver::lean::{Machine, Receive, offered};
use mana_test_driver::packet::{Addresses, Flow, Protocol, tagged};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Several laps of every ring.
const ROUNDS: usize = 100;
const BATCH: usize = 64;

/// Fail if `round` allocates once everything has grown to its size.
fn assert_no_allocation(what: &str, mut round: impl FnMut()) {
    for _ in 0..ROUNDS {
        round();
    }
    let seen = measure(|| (0..ROUNDS).for_each(|_| round()));
    assert_eq!(seen.count_total, 0, "{what}: {seen:?}");
}

#[test]
fn the_count_would_tell() {
    assert_eq!(measure(|| drop(std::hint::black_box(vec![0_u8; 64]))).count_total, 1);
}

#[test]
fn sending_allocates_nothing() {
    let frames = |protocol| -> Vec<Vec<u8>> {
        (0..16).map(|n| Flow::v4(MAC, n).partial_frame(protocol, &vec![7; 80 * usize::from(n)])).collect()
    };
    for capabilities in [PortCapabilities::default(), PortCapabilities { checksum: true, segmentation: true }]
    {
        // Flags of the OOB: nothing, and IPv4 with UDP and with TCP checksum.
        for (flags, offset, protocol) in
            [(0, 0, Protocol::Udp), (1 << 2 | 1 << 6, 0, Protocol::Udp), (1 << 2 | 1 << 5, 34, Protocol::Tcp)]
        {
            let machine = Machine::new(2, capabilities);
            let senders = machine.senders(&frames(protocol));
            let mut senders: Vec<_> =
                senders.into_iter().map(|sender| sender.with_oob(flags, offset)).collect();
            assert_no_allocation("sending", || {
                for sender in &mut senders {
                    sender.post(BATCH);
                    sender.run();
                    sender.reap(BATCH);
                }
            });
            assert_no_allocation("sending with interrupts", || {
                for sender in &mut senders {
                    sender.post(BATCH);
                    sender.run();
                    sender.reap_after_interrupt(BATCH);
                }
            });
        }
    }
}

#[test]
fn segmentation_allocates_nothing() {
    for capabilities in [PortCapabilities::default(), PortCapabilities { checksum: true, segmentation: true }]
    {
        let machine = Machine::new(1, capabilities);
        let sender = machine.senders(&[vec![0; 60]]).pop().unwrap();
        let mut sender = sender.with_oob(1 << 2 | 1 << 4 | 1 << 5, 34);
        let header = machine.placed(&Flow::v4(MAC, 1).partial_frame(Protocol::Tcp, &[]));
        let payload = machine.placed(&vec![7; 60_000]);
        assert_no_allocation("segmentation", || {
            sender.post_large(header, payload, 1448);
            sender.run();
            sender.reap(1);
        });
        assert!(machine.counter("tx_bytes") > 2 * ROUNDS as u64 * 60_000);
    }
}

#[test]
fn receiving_allocates_nothing() {
    let mut frames: Vec<Vec<u8>> = (0..BATCH as u16)
        .map(|n| {
            let flow = if n % 2 == 0 { Flow::v4(MAC, n) } else { Flow::v6(MAC, n) };
            let protocol = if n % 3 == 0 { Protocol::Tcp } else { Protocol::Udp };
            flow.frame(protocol, &vec![7; 20 * usize::from(n)])
        })
        .collect();
    frames[5] = tagged(&frames[5], 7);
    frames[6] = vec![0xff; 60];
    let mut arp = frames[7].clone();
    arp[12..14].copy_from_slice(&[8, 6]);
    frames[7] = arp;
    assert!(matches!(Flow::v6(MAC, 1).addresses, Addresses::V6(..)));
    for queues in [1, 4] {
        let machine = Machine::new(queues, PortCapabilities::default());
        let offered = offered(&frames, RxChecksum::Unknown);
        let mut receivers = machine.receivers();
        assert_no_allocation("receiving", || {
            assert_eq!(machine.deliver(&offered), BATCH);
            let got: u32 = receivers.iter_mut().map(Receive::poll).sum();
            assert_eq!(got as usize, BATCH);
        });
        assert_no_allocation("dropping for want of buffers", || {
            machine.deliver(&offered);
        });
        assert!(machine.counter("rx_discards_nowqe") > 0);
    }
}
