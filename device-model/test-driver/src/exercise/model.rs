//! What must be alive: a second count of the card's objects, kept from the messages themselves, and with it who may
//! write where.

use std::ops::Range;

use mana_device::observe::Fields;

use super::ram::{Holder, PAGE, Ram};
use crate::gdma::code as gdma;
use crate::mana::code as mana;

/// GDMA_STATUS_MORE_ENTRIES.
const MORE_ENTRIES: u32 = 0x105;
/// Doorbell page ranges and vPorts that are kept count of, a bit each.
const BITS: u32 = 64;
/// The Ethernet device.
pub const MANA: u16 = 2;

/// The `N` bytes at `at` of a message; 0 behind its end.
pub fn field<const N: usize>(message: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    let there = message.get(at..).unwrap_or_default();
    bytes.iter_mut().zip(there).for_each(|(to, from)| *to = *from);
    bytes
}
/// The dword at `at` of a message.
pub fn dword(message: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(message, at))
}
/// The quadword at `at` of a message.
pub fn qword(message: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(message, at))
}

/// A DMA region that no queue has taken.
#[derive(Clone, Debug)]
pub struct Region {
    /// Its handle.
    pub handle: u64,
    shift: u32,
    pages: Vec<u64>,
}

impl Region {
    /// Where the first `size` bytes lie.
    fn ring(&self, size: u32) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut left = u64::from(size);
        self.pages.iter().map_while(move |&page| {
            let now = left.min(1 << self.shift);
            left -= now;
            (now > 0).then(|| page..page.saturating_add(now))
        })
    }
}

/// An event queue.
#[derive(Clone, Copy, Debug)]
pub struct Eq {
    /// Its id.
    pub id: u32,
    device: u16,
    /// Entries.
    pub entries: u32,
}

/// A work queue and its completion queue.
#[derive(Clone, Copy, Debug)]
pub struct Wq {
    /// Handle of both.
    pub handle: u64,
    /// It sends.
    pub is_send: bool,
    /// Id of the work queue.
    pub wq: u32,
    /// Id of the completion queue.
    pub cq: u32,
    /// First page of the work queue's ring, and bytes.
    pub ring: (u64, u32),
    /// First page of the completion queue's ring, and entries.
    pub cq_ring: (u64, u32),
    /// Bytes posted.
    pub tail: u32,
    /// Completions taken, from the number of entries on.
    pub head: u32,
    /// Most completions that can have been asked for so far.
    pub asked: u64,
    /// Completions so far.
    pub completed: u64,
}

/// Everything that commands have made.
#[derive(Clone, Default)]
pub struct Model {
    /// There is a hardware channel.
    pub channel: bool,
    devices: [bool; 4],
    /// Regions, oldest first.
    pub regions: Vec<Region>,
    /// Event queues, oldest first.
    pub eqs: Vec<Eq>,
    /// Work queues, oldest first.
    pub wqs: Vec<Wq>,
    /// Protection domains, oldest first.
    pub pds: Vec<u64>,
    bindings: u64,
    doorbell_pages: u64,
    /// What the card reads, and acts upon: a write of its own there makes the guest's account worthless.
    reads: Vec<(Holder, Range<u64>)>,
    /// An answer was lost, and with it the account.
    lost: bool,
}

impl Model {
    /// The account can't be kept any more.
    pub fn lose(&mut self, ram: &mut Ram) {
        self.lost = true;
        ram.grant_all();
    }
    /// The account is worth something.
    pub fn is_kept(&self) -> bool {
        !self.lost
    }
    /// `device` is registered.
    pub fn has_device(&self, device: u16) -> bool {
        self.devices.get(usize::from(device)).is_some_and(|&is| is)
    }
    /// The card reads `range` from now on, and the driver writes there for this alone.
    pub fn reads(&mut self, ram: &mut Ram, holder: Holder, range: Range<u64>) {
        if ram.is_granted(&range) || self.is_read(&range) {
            self.lose(ram);
        }
        self.reads.push((holder, range));
    }
    /// The card writes entries of a ring to `range` from now on.
    pub fn grant_ring(&mut self, ram: &mut Ram, holder: Holder, range: Range<u64>) {
        if ram.is_granted(&range) || self.is_read(&range) {
            self.lose(ram);
        }
        ram.grant(holder, range);
    }
    /// The card may write a frame to `range` from now on. Buffers may overlap, but not rings: those lie below
    /// `buffers`.
    pub fn grant_buffer(&mut self, ram: &mut Ram, holder: Holder, range: Range<u64>, buffers: &Range<u64>) {
        if range.start < buffers.start || range.end > buffers.end {
            self.lose(ram);
        }
        ram.grant(holder, range);
    }
    /// The guest writes to `range`.
    pub fn poke(&mut self, ram: &mut Ram, range: &Range<u64>) {
        if ram.is_granted(range) || self.is_read(range) {
            self.lose(ram);
        }
    }
    fn is_read(&self, range: &Range<u64>) -> bool {
        self.reads.iter().any(|(_, read)| read.start < range.end && range.start < read.end)
    }
    /// Everything ends, and an account that was lost can be kept again.
    pub fn end(&mut self, ram: &mut Ram) {
        ram.revoke(|_| true);
        *self = Self::default();
    }
    fn revoke(&mut self, ram: &mut Ram, ends: impl Fn(Holder) -> bool) {
        ram.revoke(&ends);
        self.reads.retain(|(holder, _)| !ends(*holder));
    }
    fn release_wqs(&mut self, ram: &mut Ram, ends: impl Fn(&Wq) -> bool) {
        let gone: Vec<u64> = self.wqs.iter().filter(|wq| ends(wq)).map(|wq| wq.handle).collect();
        self.wqs.retain(|wq| !ends(wq));
        for handle in gone {
            self.revoke(ram, |holder| holder == Holder::Wq(handle));
        }
    }
    fn release_eqs(&mut self, ram: &mut Ram, ends: impl Fn(&Eq) -> bool) {
        let gone: Vec<u32> = self.eqs.iter().filter(|eq| ends(eq)).map(|eq| eq.id).collect();
        self.eqs.retain(|eq| !ends(eq));
        for id in gone {
            self.revoke(ram, |holder| holder == Holder::Eq(id));
        }
    }
    fn take_region(&mut self, handle: u64) -> Option<Region> {
        let at = self.regions.iter().position(|region| region.handle == handle)?;
        Some(self.regions.remove(at))
    }

    /// `request` was answered with `answer`, of which at least the header arrived.
    ///
    /// # Panics
    /// The card succeeds where it can't.
    pub fn answered(&mut self, ram: &mut Ram, request: &[u8], answer: &[u8]) {
        if self.lost {
            return;
        }
        let status = dword(answer, 24);
        if status != 0 && status != MORE_ENTRIES {
            return;
        }
        let device = u16::from_le_bytes(field(request, 32));
        let needed = match dword(request, 4) {
            gdma::CREATE_QUEUE | gdma::ALLOCATE_RESOURCE_RANGE => 36,
            gdma::CREATE_DMA_REGION | gdma::CREATE_PD => 40,
            mana::CREATE_WQ_OBJ => 48,
            _ => 0,
        };
        if answer.len() < needed {
            return self.lose(ram);
        }
        match dword(request, 4) {
            gdma::REGISTER_DEVICE => self.devices[usize::from(device)] = true,
            gdma::DEREGISTER_DEVICE => {
                if device == MANA {
                    self.release_wqs(ram, |_| true);
                    self.bindings = 0;
                }
                self.release_eqs(ram, |eq| eq.device == device);
                self.devices[usize::from(device)] = false;
            }
            gdma::CREATE_QUEUE => self.create_eq(ram, device, request, dword(answer, 32)),
            gdma::DISABLE_QUEUE => self.release_eqs(ram, |eq| eq.id == dword(request, 44)),
            gdma::ALLOCATE_RESOURCE_RANGE => {
                let range = bits(dword(answer, 32), dword(request, 44));
                assert_eq!(self.doorbell_pages & range, 0, "a doorbell page is given out twice");
                self.doorbell_pages |= range;
            }
            gdma::DESTROY_RESOURCE_RANGE => {
                self.doorbell_pages &= !bits(dword(request, 48), dword(request, 44));
            }
            gdma::CREATE_DMA_REGION => {
                let pages = list(request, 64, dword(request, 60));
                let shift = 12 + dword(request, 52);
                self.regions.push(Region { handle: qword(answer, 32), shift, pages });
            }
            gdma::DMA_REGION_ADD_PAGES => {
                let (handle, pages) = (qword(request, 40), list(request, 56, dword(request, 48)));
                let region = self.regions.iter_mut().find(|region| region.handle == handle);
                region.expect("pages are added to a region that is there").pages.extend(pages);
            }
            gdma::DESTROY_DMA_REGION => {
                self.take_region(qword(request, 40)).expect("a region ends once");
            }
            gdma::CREATE_PD => self.pds.push(qword(answer, 32)),
            gdma::DESTROY_PD => self.pds.retain(|&pd| pd != qword(request, 40)),
            mana::CONFIG_VPORT_TX => self.bindings |= bits(dword(request, 40), 1),
            mana::CREATE_WQ_OBJ => self.create_wq(ram, request, answer),
            mana::DESTROY_WQ_OBJ => self.release_wqs(ram, |wq| wq.handle == qword(request, 48)),
            mana::FENCE_RQ => {
                let wq = self.wqs.iter_mut().find(|wq| wq.handle == qword(request, 40));
                wq.expect("a queue is fenced that is there").asked += 1;
            }
            _ => {}
        }
    }
    fn create_eq(&mut self, ram: &mut Ram, device: u16, request: &[u8], id: u32) {
        let size = dword(request, 68);
        let region = self.take_region(qword(request, 56)).expect("an event queue has a region");
        assert!(self.eqs.iter().all(|eq| eq.id != id), "two event queues have one id");
        for range in region.ring(size) {
            self.grant_ring(ram, Holder::Eq(id), range);
        }
        self.eqs.push(Eq { id, device, entries: size / 16 });
    }
    fn create_wq(&mut self, ram: &mut Ram, request: &[u8], answer: &[u8]) {
        let (wq, cq, handle) = (dword(answer, 32), dword(answer, 36), qword(answer, 40));
        let is_send = dword(request, 48) == 1;
        let (wq_size, cq_size) = (dword(request, 72), dword(request, 76));
        let wq_region = self.take_region(qword(request, 56)).expect("a work queue has a region");
        let cq_region = self.take_region(qword(request, 64)).expect("a completion queue has a region");
        let same = |known: &Wq| {
            known.handle == handle || known.cq == cq || known.is_send == is_send && known.wq == wq
        };
        assert!(!self.wqs.iter().any(same), "two queues have one id");
        if wq_size.max(cq_size) as usize > PAGE {
            // This driver's rings lie in one page.
            self.lose(ram);
        }
        for range in wq_region.ring(wq_size) {
            self.reads(ram, Holder::Wq(handle), range);
        }
        for range in cq_region.ring(cq_size) {
            if !self.lost && !ram.is_granted(&range) && !self.is_read(&range) {
                ram.clear(range.start);
            }
            self.grant_ring(ram, Holder::Wq(handle), range);
        }
        let first = |region: &Region| region.pages.first().copied().unwrap_or_default();
        self.wqs.push(Wq {
            handle,
            is_send,
            wq,
            cq,
            ring: (first(&wq_region), wq_size),
            cq_ring: (first(&cq_region), cq_size / 64),
            tail: 0,
            head: cq_size / 64,
            asked: 0,
            completed: 0,
        });
    }
    /// Compare with the card's own count.
    ///
    /// # Panics
    /// They differ.
    pub fn compare(&self, Fields(ledger): &Fields) {
        if self.lost {
            return;
        }
        let sends = self.wqs.iter().filter(|wq| wq.is_send).count();
        let expected = [
            ("hardware_channels", u64::from(self.channel)),
            ("devices", self.devices.iter().filter(|&&is| is).count() as u64),
            ("dma_regions", self.regions.len() as u64),
            ("event_queues", self.eqs.len() as u64),
            ("send_queues", sends as u64),
            ("receive_queues", (self.wqs.len() - sends) as u64),
            ("completion_queues", self.wqs.len() as u64),
            ("vport_bindings", u64::from(self.bindings.count_ones())),
            ("doorbell_pages", u64::from(self.doorbell_pages.count_ones())),
            ("protection_domains", self.pds.len() as u64),
        ];
        for (kind, expected) in expected {
            let counted = ledger.iter().find(|(known, _)| *known == kind).map(|(_, count)| *count);
            assert_eq!(counted, Some(expected), "{kind} in the ledger {ledger:?}");
        }
    }
}

/// Bits `first` to `first + count - 1`.
fn bits(first: u32, count: u32) -> u64 {
    (first..first.saturating_add(count).min(BITS)).fold(0, |bits, bit| bits | 1 << bit)
}

fn list(request: &[u8], at: usize, count: u32) -> Vec<u64> {
    (0..count as usize).map(|index| qword(request, at + 8 * index)).collect()
}
