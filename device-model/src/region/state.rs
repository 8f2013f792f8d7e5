//! What is kept of DMA regions and rings.

use serde::{Deserialize, Serialize};

use super::{Layout, MAX_PAGES, MAX_RING, PAGE_SHIFT, PAGE_SIZE, Region, RingMemory};
use crate::state::{StateError, check, impossible};

/// A DMA region.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionState {
    length: u64,
    offset: u32,
    page_shift: u32,
    page_count: u32,
    pages: Vec<u64>,
}

impl Region {
    /// What is kept.
    pub fn save(&self) -> RegionState {
        let Self { length, offset, page_shift, page_count, pages } = self.clone();
        RegionState { length, offset, page_shift, page_count, pages }
    }
    /// The region that `state` says.
    ///
    /// # Errors
    /// The driver could not have made it.
    pub fn restore(state: &RegionState) -> Result<Self, StateError> {
        let RegionState { length, offset, page_shift, page_count, ref pages } = *state;
        let page_type = page_shift.checked_sub(PAGE_SHIFT).ok_or_else(|| impossible("pages below 4 KiB"))?;
        let region = Self::new(length, offset, page_type, page_count);
        let mut region = region.map_err(|error| impossible(error.to_string()))?;
        region.add_pages(pages.iter().copied()).map_err(|error| impossible(error.to_string()))?;
        Ok(region)
    }
}

/// Where a ring lies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingState {
    size: u32,
    /// log2 of the page size; of no meaning with one page.
    page_shift: u32,
    /// One page: the ring is in one piece from there on.
    pages: Vec<u64>,
}

impl RingMemory {
    /// What is kept.
    pub fn save(&self) -> RingState {
        let (page_shift, pages) = match &self.layout {
            Layout::Contiguous(base) => (PAGE_SHIFT, vec![*base]),
            Layout::Paged { pages, shift } => (*shift, pages.to_vec()),
        };
        RingState { size: self.size, page_shift, pages }
    }
    /// The ring that `state` says.
    ///
    /// # Errors
    /// No region could hold it.
    pub fn restore(state: &RingState) -> Result<Self, StateError> {
        let RingState { size, page_shift, ref pages } = *state;
        check((1..=MAX_RING).contains(&size), || format!("a ring of {size} bytes"))?;
        check(pages.iter().all(|page| page % u64::from(PAGE_SIZE) == 0), || "a ring off its page".into())?;
        if let [base] = pages[..] {
            return Ok(Self { layout: Layout::Contiguous(base), size });
        }
        // As the regions that rings are made of.
        check(matches!(page_shift, 12..=22 | 30 | 31), || format!("pages of 2^{page_shift} bytes"))?;
        let fits = pages.len() <= MAX_PAGES as usize && (pages.len() as u64) << page_shift >= u64::from(size);
        check(fits, || format!("a ring of {size} bytes in {} pages", pages.len()))?;
        Ok(Self { layout: Layout::Paged { pages: pages.clone().into(), shift: page_shift }, size })
    }
    /// Pages whose addresses are kept.
    pub fn page_addresses(&self) -> usize {
        match &self.layout {
            Layout::Contiguous(_) => 1,
            Layout::Paged { pages, .. } => pages.len(),
        }
    }
}
