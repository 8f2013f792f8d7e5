//! Guest memory that knows who may write where: a shadow of every page, and the ranges that the card was granted.
//!
//! The driver's writes go to both. Whatever else differs is the card's work and must lie in a grant. Memory is made
//! once; [`Ram::reset`] clears what was touched. Pages that a case has neither written nor granted are not looked at
//! after it: most of a short case's time would go there. [`Ram::is_clear`] does that, after many cases at once.

use std::ops::Range;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// First page of each stretch of RAM, and how many: two that touch, so that a buffer can lie across them, and one
/// with all address bits in use.
const STRETCHES: [(u64, usize); 3] = [(0x10_0000, 20), (0x11_4000, 4), (0xfff7_0000_0000_0000, 1)];
/// Pages in all.
pub const PAGES: usize = 25;

/// Bus address of page `index`, modulo the number of pages.
pub fn address(index: usize) -> u64 {
    let mut left = index % PAGES;
    for (start, pages) in STRETCHES {
        if left < pages {
            return start + (left * PAGE) as u64;
        }
        left -= pages;
    }
    unreachable!("the stretches have {PAGES} pages")
}

/// The page that holds `address`.
fn index_of(address: u64) -> Option<usize> {
    let mut before = 0;
    for (start, pages) in STRETCHES {
        let offset = address.wrapping_sub(start);
        if offset < (pages * PAGE) as u64 {
            return Some(before + offset as usize / PAGE);
        }
        before += pages;
    }
    None
}

/// Whom a grant is for: what ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// The hardware channel: its EQ, its CQ and its response buffers.
    Channel,
    /// The event queue with this id.
    Eq(u32),
    /// The work queue object with this handle: its CQ, and the buffers of a receive queue.
    Wq(u64),
    /// The guest has its own rings overwritten, and nothing can be told any more.
    Anybody,
}

/// What guest memory holds, and who may write there.
#[derive(Clone)]
pub struct Image {
    pieces: Vec<(usize, usize, Box<[u8]>)>,
    grants: Vec<(Holder, Range<u64>)>,
    visited: u32,
}

/// Guest memory and its shadow.
pub struct Ram {
    memory: GuestMemoryMmap,
    shadow: Box<[[u8; PAGE]; PAGES]>,
    /// What of each page may differ from zero.
    touched: [Range<usize>; PAGES],
    grants: Vec<(Holder, Range<u64>)>,
    /// Pages that the driver has written or granted since the last reset, a bit each.
    visited: u32,
    /// A page that is being looked at.
    page: Box<[u8; PAGE]>,
}

impl Default for Ram {
    fn default() -> Self {
        let ranges = STRETCHES.map(|(start, pages)| (GuestAddress(start), pages * PAGE));
        Self {
            memory: GuestMemoryMmap::from_ranges(&ranges).expect("the host has memory for the guest"),
            shadow: vec![[0; PAGE]; PAGES].try_into().expect("as many pages"),
            touched: std::array::from_fn(|_| UNTOUCHED),
            grants: Vec::new(),
            visited: 0,
            page: Box::new([0; PAGE]),
        }
    }
}

/// A bit for each page.
const ALL: u32 = (1 << PAGES) - 1;

/// The pages that `range` lies in, a bit each.
fn pages_of(range: &Range<u64>) -> u32 {
    let (mut pages, mut before) = (0, 0);
    for (start, count) in STRETCHES {
        let first = range.start.saturating_sub(start) / PAGE as u64;
        let end = range.end.saturating_sub(start).div_ceil(PAGE as u64).min(count as u64);
        if first < end {
            pages |= ((1 << end) - (1 << first)) << before;
        }
        before += count;
    }
    pages
}

/// The pages whose bits are set.
fn each(pages: u32) -> impl Iterator<Item = usize> {
    (0..PAGES).filter(move |index| pages & 1 << index != 0)
}

/// Whether two pieces of memory differ; in words, without a call, because libFuzzer looks at every memcmp.
fn differ<const N: usize>(now: &[u8; N], known: &[u8; N]) -> bool {
    let words = now.as_chunks::<8>().0.iter().zip(known.as_chunks::<8>().0);
    words.fold(0, |sum, (&now, &known)| sum | u64::from_ne_bytes(now) ^ u64::from_ne_bytes(known)) != 0
}

/// Wider than this is everything.
const UNTOUCHED: Range<usize> = Range { start: PAGE, end: 0 };

fn widen(range: &mut Range<usize>, by: Range<usize>) {
    *range = range.start.min(by.start)..range.end.max(by.end);
}

impl Ram {
    /// The memory, for the card.
    pub fn mmap(&self) -> GuestMemoryMmap {
        self.memory.clone()
    }
    /// The driver writes; what is not RAM is lost.
    pub fn write(&mut self, mut address: u64, mut bytes: &[u8]) {
        while let (Some(index), false) = (index_of(address), bytes.is_empty()) {
            let at = address as usize % PAGE;
            let (now, later) = bytes.split_at(bytes.len().min(PAGE - at));
            self.memory.write_slice(now, GuestAddress(address)).expect("RAM");
            self.shadow[index][at..at + now.len()].copy_from_slice(now);
            widen(&mut self.touched[index], at..at + now.len());
            self.visited |= 1 << index;
            address = address.wrapping_add(now.len() as u64);
            bytes = later;
        }
    }
    /// The driver clears the page at `address`, as it does before it gives it to the card as a ring.
    pub fn clear(&mut self, address: u64) {
        const ZERO: [u8; PAGE] = [0; PAGE];
        if let Some(index) = index_of(address) {
            let touched = self.touched[index].clone();
            if !touched.is_empty() {
                self.write(self::address(index) + touched.start as u64, &ZERO[touched]);
            }
        }
    }
    /// The driver reads; what is not RAM reads as 0.
    pub fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.read_into(address, &mut bytes);
        bytes
    }
    /// As [`read`](Self::read), into `bytes`, where what is not RAM stays as it is.
    pub fn read_into(&self, address: u64, bytes: &mut [u8]) {
        // An error says that there was less RAM than that.
        let _ = self.memory.read_slice(bytes, GuestAddress(address));
    }
    /// From now on the card may write to `range`.
    pub fn grant(&mut self, holder: Holder, range: Range<u64>) {
        self.visited |= pages_of(&range);
        self.grants.push((holder, range));
    }
    /// From now on anything can happen: the guest has given away a ring that the card reads.
    pub fn grant_all(&mut self) {
        if !self.is_lost() {
            self.grants.insert(0, (Holder::Anybody, 0..u64::MAX));
            self.visited = ALL;
        }
    }
    /// [`grant_all`](Self::grant_all) was called.
    pub fn is_lost(&self) -> bool {
        self.grants.first().is_some_and(|(holder, _)| *holder == Holder::Anybody)
    }
    /// Whether any byte of `range` is granted.
    pub fn is_granted(&self, range: &Range<u64>) -> bool {
        self.grants.iter().any(|(_, granted)| granted.start < range.end && range.start < granted.end)
    }
    /// What `ends` picks is the card's no more.
    ///
    /// # Panics
    /// It wrote where it had no business.
    pub fn revoke(&mut self, ends: impl Fn(Holder) -> bool) {
        let ended = self.grants.iter().filter(|(holder, _)| ends(*holder));
        let pages = ended.fold(0, |pages, (_, range)| pages | pages_of(range));
        each(pages).for_each(|index| self.check_page(index));
        self.grants.retain(|(holder, _)| !ends(*holder));
    }
    /// Look at every page that was written or granted since the last reset.
    ///
    /// # Panics
    /// The card wrote where it had no business.
    pub fn check(&mut self) {
        each(self.visited).for_each(|index| self.check_page(index));
    }
    /// All of memory is zero, as it must be after a reset.
    pub fn is_clear(&self) -> bool {
        each(ALL).all(|index| self.read::<PAGE>(address(index)) == [0; PAGE])
    }
    fn check_page(&mut self, index: usize) {
        self.memory.read_slice(&mut self.page[..], GuestAddress(address(index))).expect("RAM");
        if !differ(&self.page, &self.shadow[index]) {
            return;
        }
        let lines = self.page.as_chunks::<64>().0.iter().zip((0..).step_by(64));
        for (line, at) in lines {
            let known = &self.shadow[index][at..at + 64];
            if !differ(line, known.try_into().expect("as long")) {
                continue;
            }
            for (offset, _) in line.iter().zip(known).enumerate().filter(|(_, (new, old))| new != old) {
                let byte = address(index) + (at + offset) as u64;
                let granted = self.grants.iter().any(|(_, range)| range.contains(&byte));
                assert!(
                    granted,
                    "the card wrote to {byte:#x}, which nobody had granted it: {:x?}",
                    self.grants
                );
            }
            self.shadow[index][at..at + 64].copy_from_slice(line);
            widen(&mut self.touched[index], at..at + 64);
        }
    }
    /// Zero where it was touched, and nothing granted. [`check`](Self::check) first: what the card wrote unseen stays.
    pub fn reset(&mut self) {
        const ZERO: [u8; PAGE] = [0; PAGE];
        for (index, touched) in self.touched.iter_mut().enumerate().filter(|(_, touched)| touched.end > 0) {
            let zero = &ZERO[touched.clone()];
            let start = address(index) + touched.start as u64;
            self.memory.write_slice(zero, GuestAddress(start)).expect("RAM");
            self.shadow[index][touched.clone()].copy_from_slice(zero);
            *touched = UNTOUCHED;
        }
        self.visited = 0;
        self.grants.clear();
    }
    /// What there is.
    ///
    /// # Panics
    /// The card wrote where it had no business.
    pub fn image(&mut self) -> Image {
        self.check();
        let touched = self.touched.iter().enumerate().filter(|(_, touched)| touched.end > 0);
        let piece = |(index, touched): (usize, &Range<usize>)| {
            (index, touched.start, self.shadow[index][touched.clone()].into())
        };
        Image { pieces: touched.map(piece).collect(), grants: self.grants.clone(), visited: self.visited }
    }
    /// Memory that was reset holds what it held when `image` was made.
    pub fn set(&mut self, image: &Image) {
        let Image { pieces, grants, visited } = image;
        for (index, at, bytes) in pieces {
            self.write(address(*index) + *at as u64, bytes);
        }
        self.grants.clone_from(grants);
        self.visited = *visited;
    }
    /// A number that any difference in memory changes, page `except` left out.
    pub fn digest(&self, except: usize) -> u64 {
        let pages = (0..PAGES).filter(|&index| index != except);
        pages.fold(0, |sum, index| super::digest(sum, &self.read::<PAGE>(address(index))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_has_its_address() {
        for index in 0..PAGES {
            assert_eq!(index_of(address(index)), Some(index));
            assert_eq!(index_of(address(index) + 4095), Some(index));
        }
        assert_eq!(pages_of(&(0..u64::MAX)), ALL);
        assert_eq!(pages_of(&(address(19) + 4095..address(21))), 1 << 19 | 1 << 20);
        assert_eq!(pages_of(&(address(24)..address(24) + 1)), 1 << 24);
        assert_eq!(pages_of(&(0..address(0))), 0);
        assert_eq!(index_of(0), None);
        assert_eq!(index_of(address(23) + 4096), None);
    }

    #[test]
    fn only_granted_writes_pass() {
        let mut ram = Ram::default();
        ram.write(address(3) + 4090, &[1; 12]);
        ram.check();
        ram.grant(Holder::Eq(1), address(5)..address(5) + 16);
        ram.memory.write_slice(&[2; 16], GuestAddress(address(5))).unwrap();
        ram.revoke(|holder| holder == Holder::Eq(1));
        ram.check();
        ram.memory.write_slice(&[2; 17], GuestAddress(address(5))).unwrap();
        assert!(std::panic::catch_unwind(move || ram.check()).is_err());
    }

    #[test]
    fn what_is_written_where_nobody_looks_stays_to_be_seen() {
        let mut ram = Ram::default();
        ram.memory.write_slice(&[2; 16], GuestAddress(address(5))).unwrap();
        ram.check();
        ram.reset();
        assert!(!ram.is_clear());
    }

    #[test]
    fn a_reset_leaves_nothing() {
        let (mut ram, fresh) = (Ram::default(), Ram::default());
        ram.write(address(19) + 4000, &[1; 200]);
        ram.grant_all();
        ram.memory.write_slice(&[7; 4096], GuestAddress(address(24))).unwrap();
        ram.check();
        assert_ne!(ram.digest(PAGES), fresh.digest(PAGES));
        ram.reset();
        assert_eq!(ram.digest(PAGES), fresh.digest(PAGES));
        assert!(ram.is_clear());
    }
}
