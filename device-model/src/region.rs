//! DMA regions: lists of guest pages that queues and memory regions are made of.
//!
//! The driver creates a region (GDMA_CREATE_DMA_REGION, more pages with GDMA_DMA_REGION_ADD_PAGES), then names it
//! in the command that makes a queue, which takes the region over.

pub mod state;

use vm_memory::VolatileSlice;

use crate::dma::{self, DmaError, GuestRam};

/// Bytes of a MANA page (`MANA_PAGE_SIZE`), whatever the CPU's pages are.
pub const PAGE_SIZE: u32 = 4096;
/// Bits of an offset in a MANA page.
pub const PAGE_SHIFT: u32 = 12;
/// Largest ring, bytes. The driver's largest is 1 MiB (a CQ for 16384 WQEs).
pub const MAX_RING: u32 = 16 << 20;
/// Most pages of one region: 4 GiB of small pages.
pub const MAX_PAGES: u32 = 1 << 20;

/// Why a region can't be, or can't be what it is asked to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegionError {
    /// Page type that does not exist.
    #[error("page type {0} does not exist")]
    PageType(u32),
    /// Length, offset and page count contradict each other, or the region is too large.
    #[error("{length} bytes from offset {offset} do not fill {pages} pages of {page_size} bytes")]
    Shape {
        /// Bytes.
        length: u64,
        /// Bytes into the first page.
        offset: u32,
        /// Pages.
        pages: u32,
        /// Bytes of a page.
        page_size: u64,
    },
    /// A page's address is not a multiple of 4096.
    #[error("page address {0:#x} is not aligned")]
    Alignment(u64),
    /// More pages than announced.
    #[error("{given} more pages where {missing} are missing")]
    TooMany {
        /// Pages in the message.
        given: usize,
        /// Pages still expected.
        missing: usize,
    },
    /// A ring in a region that has not all of its pages yet, starts inside a page, or is shorter than the ring.
    #[error("the region can't hold a ring of {0} bytes")]
    NotARing(u32),
}

/// A region, possibly still short of pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    length: u64,
    offset: u32,
    page_shift: u32,
    page_count: u32,
    pages: Vec<u64>,
}

impl Region {
    /// A region of `length` bytes from `offset` in the first of `page_count` pages. `page_type` is log2 of the page
    /// size less 12 (`enum gdma_page_type`).
    ///
    /// # Errors
    /// [`RegionError`] if no such region can be.
    pub fn new(length: u64, offset: u32, page_type: u32, page_count: u32) -> Result<Self, RegionError> {
        // 4 KiB to 2 MiB, 4 MiB, 1 GiB and 2 GiB are the sizes that exist.
        let page_shift = match page_type {
            0..=10 | 18 | 19 => page_type + PAGE_SHIFT,
            _ => return Err(RegionError::PageType(page_type)),
        };
        let page_size = 1_u64 << page_shift;
        let capacity = u64::from(page_count) << page_shift;
        let end = length.checked_add(offset.into());
        let fits = end.is_some_and(|end| end <= capacity) && length > 0;
        if !fits || u64::from(offset) >= page_size || page_count > MAX_PAGES {
            return Err(RegionError::Shape { length, offset, pages: page_count, page_size });
        }
        Ok(Self { length, offset, page_shift, page_count, pages: Vec::new() })
    }
    /// Append pages.
    ///
    /// # Errors
    /// [`RegionError`] if there are too many or one is not aligned; none is appended then.
    pub fn add_pages(
        &mut self,
        pages: impl ExactSizeIterator<Item = u64> + Clone,
    ) -> Result<(), RegionError> {
        let missing = self.missing();
        if pages.len() > missing {
            return Err(RegionError::TooMany { given: pages.len(), missing });
        }
        if let Some(bad) = pages.clone().find(|page| page % u64::from(PAGE_SIZE) != 0) {
            return Err(RegionError::Alignment(bad));
        }
        if self.pages.is_empty() {
            // As many as the caller has accounted for, not the next power of two.
            self.pages.reserve_exact(missing);
        }
        self.pages.extend(pages);
        Ok(())
    }
    /// Pages announced but not given yet.
    pub fn missing(&self) -> usize {
        (self.page_count as usize).saturating_sub(self.pages.len())
    }
    /// Pages announced.
    pub fn page_count(&self) -> u32 {
        self.page_count
    }
    /// The first `size` bytes as a ring.
    ///
    /// # Errors
    /// [`RegionError::NotARing`] if the region is incomplete, starts inside a page or is too short.
    pub fn ring(&self, size: u32) -> Result<RingMemory, RegionError> {
        let whole = self.missing() == 0 && self.offset == 0 && u64::from(size) <= self.length;
        if !whole || size == 0 || size > MAX_RING {
            return Err(RegionError::NotARing(size));
        }
        let step = 1_u64 << self.page_shift;
        let contiguous = self.pages.windows(2).all(|pair| match pair {
            [a, b] => a.checked_add(step) == Some(*b),
            _ => true,
        });
        let layout = match self.pages.first() {
            Some(&base) if contiguous => Layout::Contiguous(base),
            _ => Layout::Paged { pages: self.pages.clone().into(), shift: self.page_shift },
        };
        Ok(RingMemory { layout, size })
    }
}

/// Where a ring's bytes are.
#[derive(Clone, Debug)]
enum Layout {
    Contiguous(u64),
    Paged { pages: Box<[u64]>, shift: u32 },
}

/// Guest memory used as a ring: offsets wrap at its size, pages lie where the region's list says.
#[derive(Clone, Debug)]
pub struct RingMemory {
    layout: Layout,
    size: u32,
}

impl RingMemory {
    /// A ring of one page (each queue of the hardware channel).
    pub fn page(address: u64) -> Self {
        Self { layout: Layout::Contiguous(address), size: PAGE_SIZE }
    }
    /// Bytes.
    pub fn size(&self) -> u32 {
        self.size
    }
    /// A free running offset as one in the ring.
    #[inline]
    fn wrap(&self, offset: u32) -> u32 {
        match self.size {
            size if offset < size => offset,
            size if size.is_power_of_two() => offset & (size - 1),
            size => offset % size,
        }
    }
    /// Bus address of the byte at `offset`, and how many bytes from there on lie in one piece.
    fn locate(&self, offset: u32) -> Result<(u64, usize), DmaError> {
        let offset = self.wrap(offset);
        let to_end = self.size - offset;
        let found = match &self.layout {
            Layout::Contiguous(base) => base.checked_add(offset.into()).map(|address| (address, to_end)),
            Layout::Paged { pages, shift } => {
                let in_page = u64::from(offset) & ((1_u64 << shift) - 1);
                let to_page_end = (1_u64 << shift) - in_page;
                pages
                    .get((u64::from(offset) >> shift) as usize)
                    .and_then(|page| page.checked_add(in_page))
                    .map(|address| (address, to_end.min(u32::try_from(to_page_end).unwrap_or(to_end))))
            }
        };
        found
            .map(|(address, len)| (address, len as usize))
            .ok_or(DmaError { address: u64::MAX, len: to_end as usize })
    }
    /// The ring in `ram`, for a batch of reads or writes.
    #[inline]
    pub fn view<'v, 'm>(&self, ram: &'v GuestRam<'m>) -> RingView<'v, 'm> {
        let whole = match self.layout {
            Layout::Contiguous(base) => ram.slice(base, self.size as usize),
            Layout::Paged { .. } => None,
        };
        RingView { ram, whole }
    }
    /// Fill the front of `data` from `offset` on: `N` bytes, which is quickest where the ring is in one piece.
    ///
    /// # Errors
    /// [`DmaError`] if a page is not guest memory.
    #[inline]
    pub fn load<const N: usize>(
        &self,
        view: &RingView<'_, '_>,
        offset: u32,
        data: &mut [u8; N],
    ) -> Result<(), DmaError> {
        let at = self.wrap(offset) as usize;
        match view.whole.as_ref().and_then(|whole| dma::load(whole, at, data)) {
            Some(()) => Ok(()),
            None => self.read_pages(view.ram, offset, data),
        }
    }
    /// Fill `data` from `offset` on.
    ///
    /// # Errors
    /// [`DmaError`] if a page is not guest memory.
    #[inline]
    pub fn read(&self, view: &RingView<'_, '_>, offset: u32, data: &mut [u8]) -> Result<(), DmaError> {
        let at = self.wrap(offset) as usize;
        match view.whole.as_ref().and_then(|whole| whole.subslice(at, data.len()).ok()) {
            Some(piece) => {
                piece.copy_to(data);
                Ok(())
            }
            None => self.read_pages(view.ram, offset, data),
        }
    }
    fn read_pages(&self, ram: &GuestRam<'_>, mut offset: u32, mut data: &mut [u8]) -> Result<(), DmaError> {
        while !data.is_empty() {
            let (address, contiguous) = self.locate(offset)?;
            let (now, later) = data.split_at_mut(contiguous.min(data.len()));
            ram.read(address, now)?;
            offset = offset.wrapping_add(now.len() as u32);
            data = later;
        }
        Ok(())
    }
    /// Write one entry of a ring of entries: all but the last word, then, visible only after the rest, the last word.
    /// `offset` is a multiple of the entry's size, which is a power of two, so that it lies in one page.
    ///
    /// # Errors
    /// [`DmaError`] if the page is not guest memory.
    #[inline]
    pub fn publish<const N: usize>(
        &self,
        view: &RingView<'_, '_>,
        offset: u32,
        body: &[u8; N],
        last: u32,
    ) -> Result<(), DmaError> {
        let len = N + size_of::<u32>();
        let at = self.wrap(offset) as usize;
        if let Some(entry) = view.whole.as_ref().and_then(|whole| whole.subslice(at, len).ok()) {
            return dma::publish(&entry, body, last);
        }
        let (address, _) = self.locate(offset)?;
        let entry = view.ram.slice(address, len).ok_or(DmaError { address, len })?;
        dma::publish(&entry, body, last)
    }
}

/// A ring's place in guest memory: looked up once where its pages follow one another.
#[derive(Clone, Copy)]
pub struct RingView<'v, 'm> {
    ram: &'v GuestRam<'m>,
    whole: Option<VolatileSlice<'m>>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).expect("guest memory")
    }

    #[test]
    fn pages_arrive_in_several_messages() {
        let mut region = Region::new(3 * 4096, 0, 0, 3).expect("region");
        region.add_pages([0x1000].into_iter()).expect("page");
        assert_eq!(region.missing(), 2);
        assert_eq!(region.ring(4096).unwrap_err(), RegionError::NotARing(4096));
        let many = region.add_pages([0x2000, 0x3000, 0x4000].into_iter());
        assert_eq!(many, Err(RegionError::TooMany { given: 3, missing: 2 }));
        assert_eq!(region.add_pages([0x2001].into_iter()), Err(RegionError::Alignment(0x2001)));
        region.add_pages([0x8000, 0x2000].into_iter()).expect("pages");
        assert_eq!(region.missing(), 0);
        assert!(region.ring(3 * 4096).is_ok());
        assert!(region.ring(4 * 4096).is_err());
    }

    #[test]
    fn impossible_shapes_are_refused() {
        assert_eq!(Region::new(4096, 0, 11, 1), Err(RegionError::PageType(11)));
        assert!(Region::new(4097, 0, 0, 1).is_err());
        assert!(Region::new(4096, 1, 0, 1).is_err());
        assert!(Region::new(0, 0, 0, 1).is_err());
        assert!(Region::new(u64::MAX, 0xfff, 0, u32::MAX).is_err());
        assert!(Region::new(1 << 30, 0, 18, 1).is_ok());
    }

    #[test]
    fn scattered_ring_reads_wrap_and_follow_the_pages() {
        let memory = memory();
        memory.write_slice(&[1; 4096], GuestAddress(0x5000)).expect("fill");
        memory.write_slice(&[2; 4096], GuestAddress(0x3000)).expect("fill");
        let mut region = Region::new(8192, 0, 0, 2).expect("region");
        region.add_pages([0x5000, 0x3000].into_iter()).expect("pages");
        let ring = region.ring(8192).expect("ring");
        let ram = GuestRam::new(&memory);
        let mut data = [0; 8];
        ring.read(&ring.view(&ram), 4092, &mut data).expect("read");
        assert_eq!(data, [1, 1, 1, 1, 2, 2, 2, 2]);
        ring.read(&ring.view(&ram), 8188, &mut data).expect("read");
        assert_eq!(data, [2, 2, 2, 2, 1, 1, 1, 1]);
        ring.publish(&ring.view(&ram), 4096, &[7; 60], 9).expect("publish");
        assert_eq!(memory.read_obj::<u32>(GuestAddress(0x303c)).expect("word"), 9);
    }

    #[test]
    fn pages_outside_memory_are_errors() {
        let memory = memory();
        let ram = GuestRam::new(&memory);
        let ring = RingMemory::page(0xffff_ffff_ffff_f000);
        assert!(ring.read(&ring.view(&ram), 0, &mut [0; 8]).is_err());
        assert!(ring.publish(&ring.view(&ram), 4032, &[0; 60], 0).is_err());
    }

    proptest! {
        /// A region that is accepted has all that its queue may touch inside its pages, and nothing outside.
        #[test]
        fn a_ring_is_its_pages_and_no_byte_more(
            order in Just((0_u64..16).collect::<Vec<u64>>()).prop_shuffle(),
            count in 1_usize..8,
            size in 1_u32..40_000,
            offset in any::<u32>(),
            len in 0_usize..300,
        ) {
            let memory = memory();
            let pages: Vec<u64> = order.iter().take(count).map(|page| 0x2_0000 + page * 4096).collect();
            // Every byte of the ring says where in the ring it is; everything else is 0xff.
            memory.write_slice(&[0xff; 16 * 4096], GuestAddress(0x2_0000)).expect("RAM");
            let ring_byte = |at: u32| (at % 251) as u8;
            let mut region = Region::new(4096 * count as u64, 0, 0, count as u32).expect("region");
            region.add_pages(pages.iter().copied()).expect("pages");
            let fits = size as usize <= 4096 * count;
            prop_assert_eq!(region.ring(size).is_ok(), fits);
            if let Ok(ring) = region.ring(size) {
                for at in 0..size {
                    let address = pages[(at / 4096) as usize] + u64::from(at % 4096);
                    memory.write_obj(ring_byte(at), GuestAddress(address)).expect("RAM");
                }
                // A ring that does not divide 2^32 has no free running offsets: its queues count their entries.
                let offset = if size.is_power_of_two() { offset } else { offset % (u32::MAX / 2) };
                let mut data = vec![0; len];
                let ram = GuestRam::new(&memory);
                ring.read(&ring.view(&ram), offset, &mut data).expect("read");
                for (byte, at) in data.iter().zip(u64::from(offset)..) {
                    let wrapped = if size.is_power_of_two() { (at as u32) % size } else { (at % u64::from(size)) as u32 };
                    prop_assert_eq!(*byte, ring_byte(wrapped));
                }
            }
        }

        /// What no pages can hold is refused, without a panic and without an overflow.
        #[test]
        fn the_bounds_of_a_region_are_checked(
            length in prop_oneof![any::<u64>(), 0_u64..20_000],
            offset in prop_oneof![any::<u32>(), 0_u32..8192],
            kind in 0_u32..24,
            pages in prop_oneof![any::<u32>(), 0_u32..8],
        ) {
            let exists = matches!(kind, 0..=10 | 18 | 19);
            let page = 1_u128 << (kind + PAGE_SHIFT);
            let fits = u128::from(length) + u128::from(offset) <= page * u128::from(pages);
            let legal = exists && fits && length > 0 && u128::from(offset) < page && pages <= MAX_PAGES;
            prop_assert_eq!(Region::new(length, offset, kind, pages).is_ok(), legal);
        }
    }
}
