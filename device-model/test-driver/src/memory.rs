//! Guest memory and the driver's DMA allocator.
//!
//! Freed memory is filled with a pattern, and looked at again before it is handed out: a device that still writes
//! to it after it promised not to is found out.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Bytes of a MANA page.
pub const PAGE: u64 = 4096;

/// RAM below the hole for 32-bit devices: start and bytes.
const LOW: (u64, u64) = (0x10_0000, 16 << 20);
/// RAM above 4 GiB, where the allocator takes from.
const HIGH: (u64, u64) = (0x1_0000_0000, 768 << 20);
/// RAM at the very top of the address space: every bit of a page frame number matters.
const TOP: (u64, u64) = (0xfff7_0000_0000_0000, 16 << 20);

const FREED: u8 = 0x6b;

/// Where an allocation comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Zone {
    /// Below 4 GiB.
    Low,
    /// Above 4 GiB.
    #[default]
    High,
    /// With address bits above 51 set.
    Top,
}

/// Memory that the device may be given: one or more pages, in the order in which the device is to see them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dma {
    pages: Vec<u64>,
}

impl Dma {
    /// Address of the first byte; the following bytes lie behind it only in a contiguous allocation.
    pub fn address(&self) -> u64 {
        self.pages[0]
    }
    /// Page addresses.
    pub fn pages(&self) -> &[u64] {
        &self.pages
    }
    /// Bytes.
    pub fn len(&self) -> u64 {
        PAGE * self.pages.len() as u64
    }
    /// Never: an allocation holds a page.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
    /// Address of the byte at `offset`.
    ///
    /// # Panics
    /// `offset` is past the end.
    pub fn at(&self, offset: u64) -> u64 {
        self.pages[usize::try_from(offset / PAGE).expect("fits")] + offset % PAGE
    }
}

#[derive(Default)]
struct Allocator {
    next: BTreeMap<Zone, u64>,
    free: BTreeMap<(Zone, usize), Vec<Vec<u64>>>,
    live: BTreeSet<u64>,
}

/// Guest RAM.
pub struct GuestMemory {
    mmap: GuestMemoryMmap,
    allocator: RefCell<Allocator>,
}

impl Default for GuestMemory {
    fn default() -> Self {
        Self::new()
    }
}

impl GuestMemory {
    /// Three stretches of RAM with holes between them.
    ///
    /// # Panics
    /// The host has no memory.
    pub fn new() -> Self {
        let ranges =
            [LOW, HIGH, TOP].map(|(start, len)| (GuestAddress(start), usize::try_from(len).expect("fits")));
        let mmap = GuestMemoryMmap::from_ranges(&ranges).expect("the host has memory for the guest");
        Self { mmap, allocator: RefCell::default() }
    }

    /// The same memory, for the device.
    pub fn mmap(&self) -> GuestMemoryMmap {
        self.mmap.clone()
    }

    /// An address that is no RAM.
    pub fn hole() -> u64 {
        LOW.0 + LOW.1 + PAGE
    }

    /// Zeroed, contiguous memory of at least `len` bytes.
    pub fn alloc(&self, len: u64) -> Dma {
        self.alloc_in(Zone::default(), len)
    }

    /// Zeroed, contiguous memory in `zone`.
    ///
    /// # Panics
    /// Out of guest memory, or the device wrote to memory that it no longer owned.
    pub fn alloc_in(&self, zone: Zone, len: u64) -> Dma {
        let count = usize::try_from(len.div_ceil(PAGE).max(1)).expect("fits");
        let mut allocator = self.allocator.borrow_mut();
        let freed = allocator.free.get_mut(&(zone, count)).and_then(Vec::pop);
        let pages = freed.map_or_else(|| allocator.fresh(zone, count), |pages| self.checked(pages));
        allocator.live.extend(&pages);
        for &page in &pages {
            self.write(page, &[0; PAGE as usize]);
        }
        Dma { pages }
    }

    /// Zeroed memory of at least `len` bytes whose pages lie apart and in falling order.
    pub fn alloc_scattered(&self, len: u64) -> Dma {
        let count = len.div_ceil(PAGE).max(1);
        let mut pages: Vec<u64> = (0..count).map(|_| self.alloc(PAGE).address()).collect();
        pages.sort_unstable_by(|a, b| b.cmp(a));
        Dma { pages }
    }

    /// Give memory back: the device has promised not to touch it any more.
    ///
    /// # Panics
    /// It was given back before.
    pub fn free(&self, dma: Dma) {
        for &page in &dma.pages {
            self.write(page, &[FREED; PAGE as usize]);
        }
        let mut allocator = self.allocator.borrow_mut();
        for page in &dma.pages {
            assert!(allocator.live.remove(page), "page {page:#x} is freed twice");
        }
        let contiguous = dma.pages.windows(2).all(|pair| pair[1] == pair[0] + PAGE);
        let pieces =
            if contiguous { vec![dma.pages] } else { dma.pages.iter().map(|&page| vec![page]).collect() };
        for pages in pieces {
            let zone = zone_of(pages[0]);
            allocator.free.entry((zone, pages.len())).or_default().push(pages);
        }
    }

    /// Give back everything: the device was reset and owns nothing.
    pub fn free_all(&self) {
        let live = self.allocator.borrow().live.clone();
        for page in live {
            self.free(Dma { pages: vec![page] });
        }
    }

    /// Look at all freed memory.
    ///
    /// # Panics
    /// The device wrote to it.
    pub fn check_freed(&self) {
        for pages in self.allocator.borrow().free.values().flatten() {
            self.checked(pages.clone());
        }
    }

    /// Pages that are allocated.
    pub fn live_pages(&self) -> usize {
        self.allocator.borrow().live.len()
    }

    fn checked(&self, pages: Vec<u64>) -> Vec<u64> {
        for &page in &pages {
            let mut bytes = [0; PAGE as usize];
            self.read(page, &mut bytes);
            let hit = bytes.iter().position(|&byte| byte != FREED);
            assert!(hit.is_none(), "the device wrote to freed memory: page {page:#x}, byte {hit:?}");
        }
        pages
    }

    /// Read guest memory.
    ///
    /// # Panics
    /// There is no RAM at `address`.
    pub fn read(&self, address: u64, bytes: &mut [u8]) {
        self.mmap.read_slice(bytes, GuestAddress(address)).expect("the driver reads its own memory");
    }

    /// Write guest memory.
    ///
    /// # Panics
    /// There is no RAM at `address`.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.mmap.write_slice(bytes, GuestAddress(address)).expect("the driver writes its own memory");
    }
}

impl Allocator {
    fn fresh(&mut self, zone: Zone, count: usize) -> Vec<u64> {
        let (start, len) = match zone {
            Zone::Low => LOW,
            Zone::High => HIGH,
            Zone::Top => TOP,
        };
        let next = self.next.entry(zone).or_insert(start);
        let first = *next;
        *next += PAGE * count as u64;
        assert!(*next <= start + len, "out of guest memory in {zone:?}");
        (0..count as u64).map(|page| first + page * PAGE).collect()
    }
}

fn zone_of(address: u64) -> Zone {
    match address {
        _ if address >= TOP.0 => Zone::Top,
        _ if address >= HIGH.0 => Zone::High,
        _ => Zone::Low,
    }
}

/// Bytes that lie in pages anywhere and wrap at their end: a queue's memory as the driver sees it.
#[derive(Clone, Debug)]
pub struct RingMemory {
    dma: Dma,
    len: u32,
}

impl RingMemory {
    /// The first `len` bytes of `dma` as a ring.
    ///
    /// # Panics
    /// `dma` is shorter.
    pub fn new(dma: Dma, len: u32) -> Self {
        assert!(u64::from(len) <= dma.len(), "a ring lies inside its memory");
        Self { dma, len }
    }
    /// The memory below.
    pub fn dma(&self) -> &Dma {
        &self.dma
    }
    /// Give up the ring.
    pub fn into_dma(self) -> Dma {
        self.dma
    }
    /// Bytes of the ring.
    pub fn len(&self) -> u32 {
        self.len
    }
    /// Never: a ring holds an entry.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Read from `offset`, taken modulo the ring.
    pub fn read(&self, memory: &GuestMemory, offset: u32, bytes: &mut [u8]) {
        fence(Ordering::Acquire);
        for (address, range) in self.pieces(offset, bytes.len()) {
            memory.read(address, &mut bytes[range]);
        }
    }
    /// Write at `offset`, taken modulo the ring.
    pub fn write(&self, memory: &GuestMemory, offset: u32, bytes: &[u8]) {
        for (address, range) in self.pieces(offset, bytes.len()) {
            memory.write(address, &bytes[range]);
        }
        fence(Ordering::Release);
    }

    fn pieces(&self, offset: u32, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> + '_ {
        let mut done = 0;
        std::iter::from_fn(move || {
            if done == len {
                return None;
            }
            let at = (u64::from(offset) + done as u64) % u64::from(self.len);
            let to_end = (u64::from(self.len) - at).min(PAGE - at % PAGE);
            let start = done;
            done = len.min(done + usize::try_from(to_end).expect("a page fits"));
            Some((self.dma.at(at), start..done))
        })
    }
}
