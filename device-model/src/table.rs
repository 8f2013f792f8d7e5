//! Who owns what: every object that commands have made, by handle, with the command that made it.
//!
//! A handle names its object's kind, its slot and how often the slot was used, so that a stale one finds nothing.

pub mod state;

use std::collections::BTreeMap;

use crate::region::{Region, RingMemory};
use crate::status::CommandError;

/// The command that made an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Number of the request on its channel.
    pub seq: u64,
    /// The command's code.
    pub code: u32,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    object: Option<T>,
}

/// Objects of one kind.
#[derive(Debug)]
pub struct Handles<T> {
    kind: u8,
    capacity: usize,
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

impl<T> Handles<T> {
    /// No objects yet, at most `capacity`, with `kind` (not 0) in the top bits of each handle.
    pub fn new(kind: u8, capacity: usize) -> Self {
        Self { kind, capacity, slots: Vec::new(), free: Vec::new() }
    }
    /// Objects alive.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
    /// Keep `object`; `None` if there is no room. The handle is neither 0 nor all ones.
    pub fn insert(&mut self, object: T) -> Option<u64> {
        if let Some(index) = self.free.pop() {
            let slot = self.slots.get_mut(index as usize)?;
            slot.object = Some(object);
            return Some(self.handle(index, self.slots.get(index as usize)?.generation));
        }
        if self.slots.len() >= self.capacity {
            return None;
        }
        self.slots.push(Slot { generation: 0, object: Some(object) });
        Some(self.handle(self.slots.len() as u32 - 1, 0))
    }
    fn handle(&self, index: u32, generation: u32) -> u64 {
        u64::from(self.kind & 0x7f) << 56 | u64::from(generation & 0xff_ffff) << 32 | u64::from(index)
    }
    fn slot(&mut self, handle: u64) -> Option<(u32, &mut Slot<T>)> {
        let index = handle as u32;
        let generation = self.slots.get(index as usize)?.generation;
        if self.handle(index, generation) != handle {
            return None;
        }
        self.slots.get_mut(index as usize).map(|slot| (index, slot))
    }
    /// The object with this handle.
    pub fn get(&self, handle: u64) -> Option<&T> {
        let slot = self.slots.get(handle as u32 as usize)?;
        let known = self.handle(handle as u32, slot.generation) == handle;
        slot.object.as_ref().filter(|_| known)
    }
    /// The object with this handle.
    pub fn get_mut(&mut self, handle: u64) -> Option<&mut T> {
        self.slot(handle)?.1.object.as_mut()
    }
    /// Give the object up.
    pub fn remove(&mut self, handle: u64) -> Option<T> {
        let (index, slot) = self.slot(handle)?;
        let object = slot.object.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(index);
        Some(object)
    }
    /// All objects.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().filter_map(|slot| slot.object.as_ref())
    }
    /// Handles of the objects that `wanted` picks.
    pub fn handles(&self, wanted: impl Fn(&T) -> bool) -> Vec<u64> {
        let live =
            self.slots.iter().enumerate().filter(|(_, slot)| slot.object.as_ref().is_some_and(&wanted));
        live.map(|(index, slot)| self.handle(index as u32, slot.generation)).collect()
    }
}

/// The GDMA devices of the function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Device {
    /// The hardware channel (`GDMA_DEVICE_HWC`).
    Hwc,
    /// Ethernet (`GDMA_DEVICE_MANA`).
    Mana,
    /// RDMA (`GDMA_DEVICE_MANA_IB`).
    ManaIb,
}

impl Device {
    /// Protection domain. Each device has its own, so that a mix-up shows.
    pub const fn pd(self) -> u32 {
        self as u32 + 1
    }
    /// Memory key for bus addresses.
    pub const fn gpa_mkey(self) -> u32 {
        (self as u32 + 1) << 8
    }
    /// Doorbell page.
    pub const fn doorbell_page(self) -> u32 {
        self as u32
    }
}

/// Doorbell pages below this belong to the devices, the others can be allocated.
pub const FIRST_FREE_PAGE: u32 = 3;

/// An event queue.
#[derive(Clone, Copy, Debug)]
pub struct EqObject {
    /// Whose it is.
    pub device: Device,
    /// Pages of its ring.
    pub pages: u32,
    /// Who made it.
    pub origin: Origin,
}

/// Direction of a work queue object (`enum` `GDMA_SQ`, `GDMA_RQ` in `wq_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WqKind {
    /// Transmit.
    Send,
    /// Receive.
    Receive,
}

/// A work queue with its completion queue.
#[derive(Clone, Copy, Debug)]
pub struct WqPair {
    /// Direction.
    pub kind: WqKind,
    /// Index of its vPort.
    pub vport: usize,
    /// Work queue id.
    pub wq: u32,
    /// Completion queue id.
    pub cq: u32,
    /// Pages of both rings.
    pub pages: u32,
    /// Who made it.
    pub origin: Origin,
}

/// A DMA region that no queue has taken over.
#[derive(Debug)]
pub struct RegionObject {
    /// Its pages.
    pub region: Region,
    /// Who made it.
    pub origin: Origin,
}

/// What MANA_CONFIG_VPORT_TX bound a vPort to.
#[derive(Clone, Copy, Debug)]
pub struct Binding {
    /// Doorbell page of its queues.
    pub page: u32,
}

/// A protection domain.
#[derive(Clone, Copy, Debug)]
pub struct PdObject {
    /// Who made it.
    pub origin: Origin,
}

/// Ids of protection domains below this are the devices' own.
const FIRST_PD_ID: u32 = 16;
/// Most DMA regions at a time that no queue has taken over.
const MAX_REGIONS: usize = 1 << 14;
/// Most pages of all regions and rings together: 32 MiB of addresses.
const MAX_TOTAL_PAGES: u32 = 4 << 20;
/// Most protection domains.
const MAX_PDS: usize = 1 << 12;

/// Everything alive.
#[derive(Debug)]
pub struct Objects {
    /// Registered devices.
    pub devices: BTreeMap<Device, Origin>,
    /// DMA regions.
    pub regions: Handles<RegionObject>,
    /// Event queues by id.
    pub eqs: BTreeMap<u32, EqObject>,
    /// Work queues with their completion queues.
    pub wqs: Handles<WqPair>,
    /// Bound vPorts by index.
    pub bindings: BTreeMap<usize, Binding>,
    /// Allocated doorbell pages.
    pub doorbell_pages: BTreeMap<u32, Origin>,
    /// Protection domains.
    pub pds: Handles<PdObject>,
    pages: u32,
}

impl Objects {
    /// Nothing, with room for `wqs` work queues.
    pub fn new(wqs: u32) -> Self {
        Self {
            devices: BTreeMap::new(),
            regions: Handles::new(1, MAX_REGIONS),
            eqs: BTreeMap::new(),
            wqs: Handles::new(2, wqs as usize),
            bindings: BTreeMap::new(),
            doorbell_pages: BTreeMap::new(),
            pds: Handles::new(3, MAX_PDS),
            pages: 0,
        }
    }
    /// Doorbell page `page`, if `device` may have its queues rung there: its own page, or one that was allocated.
    ///
    /// # Errors
    /// It may not.
    pub fn owned_page(&self, device: Device, page: u32) -> Result<u32, CommandError> {
        let owned = page == device.doorbell_page() || self.doorbell_pages.contains_key(&page);
        owned
            .then_some(page)
            .ok_or_else(|| CommandError::invalid(format!("doorbell page {page} is not {device:?}'s")))
    }
    /// Protection domain id of a domain that a command made.
    pub fn pd_id(handle: u64) -> u32 {
        // The handle's low half is the slot, which no other live domain has.
        (handle as u32).saturating_add(FIRST_PD_ID)
    }
    /// Whether protection domain `id` is the Ethernet device's own or was made by a command.
    pub fn knows_pd(&self, id: u32) -> bool {
        id == Device::Mana.pd()
            || self.pds.handles(|_| true).into_iter().any(|handle| Self::pd_id(handle) == id)
    }
    /// The first `size` bytes of region `handle` as a ring.
    ///
    /// # Errors
    /// There is no such region, or it can't hold that ring.
    pub fn ring(&self, handle: u64, size: u32) -> Result<RingMemory, CommandError> {
        let object = self.regions.get(handle);
        let object =
            object.ok_or_else(|| CommandError::not_found(format!("there is no DMA region {handle:#x}")))?;
        Ok(object.region.ring(size)?)
    }
    /// A queue takes region `handle` over; the answer is how many pages it keeps.
    pub fn consume(&mut self, handle: u64) -> u32 {
        self.regions.remove(handle).map_or(0, |object| object.region.page_count())
    }
    /// Account for `pages` more; `false` if that is more than the card keeps.
    #[must_use]
    pub fn take_pages(&mut self, pages: u32) -> bool {
        match self.pages.checked_add(pages).filter(|&sum| sum <= MAX_TOTAL_PAGES) {
            Some(sum) => self.pages = sum,
            None => return false,
        }
        true
    }
    /// `pages` were given up.
    pub fn give_pages(&mut self, pages: u32) {
        self.pages = self.pages.saturating_sub(pages);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_and_foreign_handles_find_nothing() {
        let mut handles = Handles::new(2, 8);
        let first = handles.insert('a').expect("room");
        assert!(first != 0 && first != u64::MAX);
        assert_eq!(handles.remove(first), Some('a'));
        let second = handles.insert('b').expect("room");
        assert_ne!(first, second);
        assert_eq!(handles.get(first), None);
        assert_eq!(handles.remove(first), None);
        assert_eq!(handles.get(second), Some(&'b'));
        let other: Handles<char> = Handles::new(3, 8);
        assert_eq!(other.get(second), None);
        assert_eq!(handles.get(u64::MAX), None);
    }

    #[test]
    fn capacity_is_a_limit_and_freed_slots_count_again() {
        let mut handles = Handles::new(1, 2);
        let first = handles.insert(1).expect("room");
        handles.insert(2).expect("room");
        assert_eq!(handles.insert(3), None);
        handles.remove(first);
        assert!(handles.insert(3).is_some());
        assert_eq!(handles.len(), 2);
        assert_eq!(handles.handles(|&n| n > 2).len(), 1);
    }

    #[test]
    fn page_budget_holds() {
        let mut objects = Objects::new(1);
        assert!(objects.take_pages(MAX_TOTAL_PAGES));
        assert!(!objects.take_pages(1));
        assert!(!objects.take_pages(u32::MAX));
        objects.give_pages(1);
        assert!(objects.take_pages(1));
    }
}
