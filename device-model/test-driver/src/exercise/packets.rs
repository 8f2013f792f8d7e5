//! Frames from the cable, to a port with two queue pairs.
//!
//! The first four bytes say what the port is like: coalescing, RSS, length and number of the buffers. A step is a batch:
//! a byte for the number of frames and what the port vouches for, then each frame's length and bytes.

use arbitrary::{Result, Unstructured};
use arrayvec::ArrayVec;
use mana_device::doors::{RxChecksum, RxFrame};

use super::machine::{Machine, TABLE};
use super::message;
use super::model::dword;
use super::port::Registration;
use super::queues::buffer;
use super::ram::PAGE;

/// Frames of a batch at most.
const BATCH: usize = 8;
/// Longest frame: more than any MTU.
const LONGEST: usize = 2047;
/// The receive queues.
const RECEIVE: [usize; 2] = [1, 3];

/// Play `input`.
///
/// # Panics
/// The card breaks a promise.
pub fn play(machine: &mut Machine, input: &[u8]) {
    let mut input = Unstructured::new(input);
    let [first, rss, len, more]: [u8; 4] = input.arbitrary().unwrap_or_default();
    let port = u32::from(first & 1);
    let registration = machine.bring_up(port);
    if first & 0xe != 0 {
        let queues = RECEIVE.map(|index| machine.model.wqs[index].handle);
        let steering = message::config_rx(port, true, rss & 1 != 0, &queues, TABLE, first >> 1 & 3);
        let mut steering = if first & 8 != 0 { message::with_key(steering) } else { steering };
        steering.put(116, &[rss >> 1]);
        machine.command(steering.bytes());
    }
    let len = 1 + u16::from(len) * 8;
    for index in RECEIVE {
        for number in 0..more & 15 {
            machine.post_buffer(
                index,
                buffer(number, u16::from(more >> 4) * 256),
                registration.key,
                len.into(),
            );
        }
        machine.ring_wq(index, registration.page);
    }
    // Only an input that has ended is an error, and that is no error.
    let _ = steps(machine, &mut input, &registration, port);
}

fn steps(
    machine: &mut Machine,
    input: &mut Unstructured<'_>,
    registration: &Registration,
    port: u32,
) -> Result<()> {
    while !input.is_empty() {
        let step: u8 = input.arbitrary()?;
        let mut frames = ArrayVec::<RxFrame<'_>, BATCH>::new();
        for number in 0..=usize::from(step & 7) {
            if input.is_empty() {
                break;
            }
            let len = usize::from(input.arbitrary::<u16>()?).min(LONGEST).min(input.len());
            let checksum =
                if step >> 3 & 1 << (number & 1) == 0 { RxChecksum::Unknown } else { RxChecksum::Valid };
            frames.push(RxFrame { bytes: input.bytes(len)?, checksum });
        }
        machine.deliver(port as usize, &frames);
        machine.settle();
        for index in RECEIVE {
            machine.reap_with(index, registration.page, true, |machine, cqe| {
                check(machine, index, cqe, &frames);
            });
        }
        if step & 0x80 != 0 {
            let to = RECEIVE[usize::from(step >> 6 & 1)];
            machine.post_buffer(to, buffer(step, 0), registration.key, PAGE as u32 / 2);
            machine.ring_wq(to, registration.page);
        }
    }
    Ok(())
}

/// A completion of one whole packet: one of the frames lies in the buffer, without its tag if one was taken out.
fn check(machine: &Machine, index: usize, cqe: &[u8; 64], frames: &[RxFrame<'_>]) {
    if dword(cqe, 0) & 0x3f != 1 {
        return;
    }
    let wq = machine.model.wqs[index];
    let len = usize::from(u16::from_le_bytes([cqe[8], cqe[9]]));
    let tagged = dword(cqe, 4) & 1 << 12 != 0;
    let wqe: [u8; 32] = machine.ram.read(wq.ring.0 + u64::from(dword(cqe, 56) % wq.ring.1));
    let start = u64::from_le_bytes(wqe[16..24].try_into().expect("eight bytes"));
    assert!(len <= dword(&wqe, 28) as usize, "a packet of {len} bytes is whole in a smaller buffer");
    // A later frame may lie over it: the buffers of a case overlap. Its first bytes and its length must be a frame's.
    let whole = |frame: &&RxFrame<'_>| frame.bytes.len() == len + if tagged { 4 } else { 0 };
    assert!(frames.iter().any(|frame| whole(&frame)), "no frame has {len} bytes, tag {tagged}");
    if let [only] = frames {
        let mut bytes = [0; LONGEST];
        machine.ram.read_into(start, &mut bytes[..len]);
        let (head, rest) = only.bytes.split_at(12);
        let body = if tagged { &rest[4..] } else { rest };
        assert!(bytes[..12] == *head && bytes[12..len] == *body, "the buffer holds another frame");
    }
}
