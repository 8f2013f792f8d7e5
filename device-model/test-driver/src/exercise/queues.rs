//! WQEs, buffers and doorbells of queues that a driver has made: a port is open with two queue pairs.
//!
//! The first byte says which of the two vPorts, and whether its cable is full. A step then begins with a byte that says
//! in its low three bits what it is, in the next two which queue.

use arbitrary::{Result, Unstructured};
use mana_device::config::TxPolicy;
use mana_device::doors::{RxChecksum, RxFrame};

use super::machine::{Machine, sge};
use super::model::{Wq, dword};
use super::port::{BUFFERS, Registration};
use super::ram::{Holder, PAGE, PAGES, address};
use crate::queues::doorbell;

/// CQE_TX_GDMA_ERR.
pub const GDMA_ERROR: u32 = 42;

/// Play `input`.
///
/// # Panics
/// The card breaks a promise.
pub fn play(machine: &mut Machine, input: &[u8]) {
    let mut input = Unstructured::new(input);
    let first: u8 = input.arbitrary().unwrap_or_default();
    let port = u32::from(first & 1);
    let registration = machine.bring_up(port);
    machine.cables[port as usize].fill(first & 0x80 != 0);
    let policy = TxPolicy {
        disabled: first & 0x70 == 0x70,
        own_source_only: first & 0x10 != 0,
        ip_only: first & 0x20 != 0,
        untagged_only: first & 0x40 != 0,
    };
    machine.device.set_tx_policy(port as usize, policy);
    // Only an input that has ended is an error, and that is no error.
    let _ = steps(machine, &mut input, &registration, port);
    machine.settle();
    machine.reap_all(registration.page);
}

fn steps(
    machine: &mut Machine,
    input: &mut Unstructured<'_>,
    registration: &Registration,
    port: u32,
) -> Result<()> {
    let Registration { key, page, .. } = *registration;
    while !input.is_empty() {
        let step: u8 = input.arbitrary()?;
        let index = usize::from(step >> 3 & 3);
        let wq = machine.model.wqs[index];
        match step & 7 {
            0 => {
                let mut wqe = [0; 96];
                let len = 32 + 32 * usize::from(step >> 6).min(2);
                input.fill_buffer(&mut wqe[..len])?;
                if !wq.is_send {
                    keep_to_buffers(&mut wqe);
                }
                machine.post_wqe(index, &wqe[..len]);
                machine.ring_wq(index, page);
            }
            1 => {
                let (register, tail): (u8, u32) = (input.arbitrary()?, input.arbitrary()?);
                raw_doorbell(machine, &wq, register, tail, page);
            }
            2 => {
                let (to, at, len): (u8, u16, u8) =
                    (input.arbitrary()?, input.arbitrary()?, input.arbitrary()?);
                let bytes = input.bytes(usize::from(len).min(input.len()))?;
                machine.ram.write(buffer(to, at), bytes);
            }
            3 => {
                let wqe = transmit(input, &wq, key, port, step)?;
                machine.post_wqe(if wq.is_send { index } else { index & 2 }, &wqe);
                machine.ring_wq(index & 2, page);
            }
            4 => {
                let (to, at, len): (u8, u16, u16) =
                    (input.arbitrary()?, input.arbitrary()?, input.arbitrary()?);
                machine.post_buffer(index | 1, buffer(to, at), key, len.into());
                machine.ring_wq(index | 1, page);
            }
            5 => {
                let len = usize::from(input.arbitrary::<u8>()?).min(input.len());
                let checksum = if step & 8 == 0 { RxChecksum::Unknown } else { RxChecksum::Valid };
                let frame = RxFrame { bytes: input.bytes(len)?, checksum };
                machine.deliver(port as usize, &[frame; 4][..1 + usize::from(step >> 6)]);
            }
            6 => {
                machine.settle();
                machine.pass(u64::from(input.arbitrary::<u16>()?) * 100);
            }
            _ => machine.reap_wq(index, page, step & 0x20 != 0),
        }
        machine.settle();
    }
    Ok(())
}

/// Bus address in the buffers.
pub fn buffer(page: u8, at: u16) -> u64 {
    let page = address(BUFFERS + usize::from(page) % (PAGES - BUFFERS));
    page + u64::from(at) % PAGE as u64
}

/// Have the entries of a receive WQE of any bytes lie in the buffers: the rings are the card's to write, too.
fn keep_to_buffers(wqe: &mut [u8]) {
    for at in (16..wqe.len()).step_by(16) {
        let (page, offset) = (wqe[at], u16::from_le_bytes([wqe[at + 1], wqe[at + 2]]));
        wqe[at..at + 8].copy_from_slice(&buffer(page, offset).to_le_bytes());
        // Up to the end of the last buffer but no further, but for those that are longer than all of memory.
        if wqe[at + 15] < 0x80 {
            wqe[at + 13..at + 16].fill(0);
        }
    }
}

/// A send WQE with an OOB of any bytes but the ids, and entries of any lengths in the buffers.
fn transmit(input: &mut Unstructured<'_>, wq: &Wq, key: u32, port: u32, step: u8) -> Result<[u8; 96]> {
    let mut wqe = [0; 96];
    let shape: u16 = input.arbitrary()?;
    let (long, entries) = (step & 0x20 != 0, 1 + u32::from(step >> 6) % 3);
    let oob = if long { 6 } else { 2 };
    // Segmentation, and its MSS.
    let large = if shape & 1 != 0 { 1 << 11 | u32::from(shape >> 2) << 16 } else { 0 };
    wqe[4..8].copy_from_slice(&(entries | oob << 8 | large).to_le_bytes());
    input.fill_buffer(&mut wqe[8..if long { 32 } else { 16 }])?;
    wqe[8] = wqe[8] & !3 | u8::from(long);
    wqe[9..12].copy_from_slice(&wq.cq.to_le_bytes()[..3]);
    if shape & 2 == 0 {
        // transport offset, SQ frame 0, short vPort offset
        wqe[13] &= 3;
        wqe[14..16].copy_from_slice(&[0, port as u8]);
        wqe[22..24].fill(0);
    }
    let list = if long { 32 } else { 16 };
    for entry in 0..entries as usize {
        let (page, at, len): (u8, u16, u16) = (input.arbitrary()?, input.arbitrary()?, input.arbitrary()?);
        let entry_at = list + 16 * entry;
        if let Some(to) = wqe.get_mut(entry_at..entry_at + 16) {
            to.copy_from_slice(&sge(buffer(page, at), key, len.into()));
        }
    }
    Ok(wqe)
}

/// A doorbell with any tail, for this queue or one like it.
fn raw_doorbell(machine: &mut Machine, wq: &Wq, register: u8, tail: u32, page: u32) {
    let id = |own: u32| u64::from(if register & 0x80 == 0 { own } else { u32::from(register >> 3 & 7) });
    let (register, id) = match register & 7 {
        0 | 1 if wq.is_send => (doorbell::SQ, id(wq.wq)),
        0 | 1 => (doorbell::RQ, id(wq.wq)),
        2 => (doorbell::CQ, id(wq.cq)),
        3 => (doorbell::CQ_MODERATION, id(wq.cq)),
        4 => (doorbell::EQ, id(1)),
        5 => (doorbell::EQ, 0),
        6 => (0x408, id(wq.wq)),
        _ => (doorbell::CQ, 0),
    };
    // Nobody knows any more what was asked for, nor, behind the last WQE, what a receive queue finds.
    if register == doorbell::RQ {
        machine.model.lose(&mut machine.ram);
    }
    machine.model.wqs.iter_mut().for_each(|wq| wq.asked = u64::MAX / 2);
    machine.ring(page, register, id | u64::from(tail) << 32);
}

impl Machine {
    /// Write a WQE to the ring of the queue at `index`: what its entries name is granted, if it receives.
    pub fn post_wqe(&mut self, index: usize, wqe: &[u8]) {
        let wq = &mut self.model.wqs[index];
        let (base, size) = wq.ring;
        for (unit, bytes) in wqe.chunks(32).enumerate() {
            let at = (wq.tail + 32 * unit as u32) % size;
            self.ram.write(base + u64::from(at), bytes);
        }
        wq.tail = wq.tail.wrapping_add(wqe.len().next_multiple_of(32) as u32);
        wq.asked += wqe.len().div_ceil(32) as u64;
        if wq.is_send {
            return;
        }
        let holder = Holder::Wq(wq.handle);
        if wqe_len(dword(wqe, 4)) > wqe.len() {
            // It goes on in the next one, whose entries are not where they seem to be.
            self.model.lose(&mut self.ram);
        }
        // Wherever the list begins: the entries are 16 bytes apart.
        for entry in wqe[16..].chunks_exact(16) {
            let start = u64::from_le_bytes(entry[..8].try_into().expect("eight bytes"));
            let range = start..start.saturating_add(dword(entry, 12).into());
            if dword(entry, 12) != 0 {
                self.grant_buffer(holder, &range);
            }
        }
    }
    /// The card may write frames to `range`: if that is more than buffers, nothing can be told any more.
    pub fn grant_buffer(&mut self, holder: Holder, range: &std::ops::Range<u64>) {
        // The stretches of RAM that buffers are in, and what follows, which is no RAM.
        let wild = range.end.saturating_sub(range.start) > u64::from(u32::MAX) / 2;
        let buffers = if range.start < address(PAGES - 1) {
            address(BUFFERS)..address(PAGES - 1)
        } else {
            address(PAGES - 1)..u64::MAX
        };
        let range = if wild { range.start..buffers.end } else { range.clone() };
        self.model.grant_buffer(&mut self.ram, holder, range, &buffers);
    }
    /// Post a receive buffer.
    pub fn post_buffer(&mut self, index: usize, start: u64, key: u32, len: u32) {
        let mut wqe = [0; 32];
        wqe[4..8].copy_from_slice(&(1_u32 | 2 << 8).to_le_bytes());
        wqe[16..].copy_from_slice(&sge(start, key, len));
        self.post_wqe(index, &wqe);
    }
    /// Ring for what was posted to the queue at `index`.
    pub fn ring_wq(&mut self, index: usize, page: u32) {
        let Wq { is_send, wq, tail, .. } = self.model.wqs[index];
        let register = if is_send { doorbell::SQ } else { doorbell::RQ };
        self.ring(page, register, u64::from(wq) | u64::from(tail) << 32);
    }
    /// Take the completions of the queue at `index`, look at each, and ring.
    ///
    /// # Panics
    /// A completion is not one of this queue's, or there are more than WQEs.
    pub fn reap_wq(&mut self, index: usize, page: u32, arm: bool) {
        self.reap_with(index, page, arm, |_, _| ());
    }
    /// As [`reap_wq`](Self::reap_wq), with a closer look at each.
    ///
    /// # Panics
    /// As [`reap_wq`](Self::reap_wq).
    pub fn reap_with(
        &mut self,
        index: usize,
        page: u32,
        arm: bool,
        mut look: impl FnMut(&mut Self, &[u8; 64]),
    ) {
        let Wq { is_send, wq, cq, cq_ring: (base, entries), .. } = self.model.wqs[index];
        let is_kept = self.model.is_kept();
        // More than that can't have come since the last look.
        for _ in 0..entries {
            let head = self.model.wqs[index].head;
            let cqe: [u8; 64] = self.ram.read(base + u64::from(head % entries) * 64);
            let word = dword(&cqe, 60);
            if word >> 29 != head / entries % 8 {
                break;
            }
            let known = &mut self.model.wqs[index];
            known.head += 1;
            if !is_kept {
                continue;
            }
            assert_eq!(
                (word & 0xff_ffff, word & 1 << 24 != 0),
                (wq, is_send),
                "a completion names its queue"
            );
            known.completed += packets(&cqe, is_send);
            // What stops a queue is completed, too, though no WQE may stand for it.
            let most = known.asked + u64::from(is_send);
            assert!(known.completed <= most, "{} completions for {most} requests", known.completed);
            look(self, &cqe);
        }
        let head = self.model.wqs[index].head % (8 * entries);
        self.ring(page, doorbell::CQ, u64::from(cq) | u64::from(head) << 32 | u64::from(arm) << 63);
    }
    /// Take all completions.
    ///
    /// # Panics
    /// As [`reap_wq`](Self::reap_wq).
    pub fn reap_all(&mut self, page: u32) {
        (0..self.model.wqs.len()).for_each(|index| self.reap_wq(index, page, true));
    }
}

/// Bytes of a WQE with this second dword.
fn wqe_len(counts: u32) -> usize {
    let oob = match counts >> 8 & 7 {
        6 => 24,
        7 => 32,
        _ => 8,
    };
    (8 + oob as usize).next_multiple_of(16) + 16 * (counts & 0xff) as usize
}

/// WQEs that a completion stands for.
fn packets(cqe: &[u8; 64], is_send: bool) -> u64 {
    let kind = dword(cqe, 0) & 0x3f;
    if is_send {
        assert!((32..=GDMA_ERROR).contains(&kind), "a transmit completion of type {kind}");
        return 1;
    }
    let len = |at: usize| u16::from_le_bytes([cqe[at], cqe[at + 1]]);
    match kind {
        1 | 3 | 4 => 1,
        2 => (0..4).filter(|packet| len(8 + 12 * packet) != 0).count() as u64,
        7 => {
            (0..4).map(|pair| u64::from(len(12 + 12 * pair) != 0) + u64::from(len(14 + 12 * pair) != 0)).sum()
        }
        _ => panic!("a receive completion of type {kind}"),
    }
}
