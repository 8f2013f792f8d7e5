//! Bus mastering: the function's reads and writes of guest memory, possible only while Bus Master Enable is set.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arrayvec::ArrayVec;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryLoadGuard, GuestMemoryMmap,
    GuestMemoryRegion, VolatileSlice,
};

use crate::doors::Memory;

/// Guest memory, held for as long as one batch of work takes.
pub type Mapped = GuestMemoryLoadGuard<GuestMemoryMmap>;

/// An address range that is not guest memory, or not all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("DMA of {len} bytes at {address:#x} misses guest memory")]
pub struct DmaError {
    /// Bus address.
    pub address: u64,
    /// Bytes.
    pub len: usize,
}

/// The function's way to guest memory.
pub struct Dma {
    memory: Memory,
    bus_master: Arc<AtomicBool>,
}

impl Dma {
    /// DMA to `memory` whenever `bus_master` is set.
    pub fn new(memory: Memory, bus_master: Arc<AtomicBool>) -> Self {
        Self { memory, bus_master }
    }
    /// Bus mastering is on.
    #[inline]
    pub fn is_enabled(&self) -> bool {
        self.bus_master.load(Ordering::Acquire)
    }
    /// Guest memory as it is now; `None` while bus mastering is off.
    #[inline]
    pub fn map(&self) -> Option<Mapped> {
        self.is_enabled().then(|| self.memory.memory())
    }
}

/// Guest memory for one batch of work. The region that was hit last is kept at hand, because nearly all rings and
/// buffers of a driver lie in one.
pub struct GuestRam<'m> {
    memory: &'m GuestMemoryMmap,
    region: Cell<Option<Region<'m>>>,
}

/// A region of guest memory as a whole.
#[derive(Clone, Copy)]
struct Region<'m> {
    start: u64,
    bytes: VolatileSlice<'m>,
}

impl<'m> GuestRam<'m> {
    /// All of `memory`.
    #[inline]
    pub fn new(memory: &'m GuestMemoryMmap) -> Self {
        Self { memory, region: Cell::new(None) }
    }
    /// The memory itself.
    pub fn memory(&self) -> &'m GuestMemoryMmap {
        self.memory
    }
    /// The memory at bus address `address` if it lies in one region.
    #[inline]
    pub fn slice(&self, address: u64, len: usize) -> Option<VolatileSlice<'m>> {
        if let Some(region) = self.region.get()
            && let Ok(slice) = region.bytes.subslice(address.wrapping_sub(region.start) as usize, len)
        {
            return Some(slice);
        }
        self.look_up(address, len)
    }
    #[inline(never)]
    fn look_up(&self, address: u64, len: usize) -> Option<VolatileSlice<'m>> {
        let found = self.memory.find_region(GuestAddress(address))?;
        let region = Region { start: found.start_addr().0, bytes: found.as_volatile_slice().ok()? };
        self.region.set(Some(region));
        region.bytes.subslice((address - region.start) as usize, len).ok()
    }
    /// Fill `data` from bus address `address`.
    ///
    /// # Errors
    /// [`DmaError`] if any byte is outside guest memory.
    #[inline]
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<(), DmaError> {
        let len = data.len();
        match self.slice(address, len) {
            Some(slice) => {
                slice.copy_to(data);
                Ok(())
            }
            // Several regions, or none.
            None => {
                self.memory.read_slice(data, GuestAddress(address)).map_err(|_| DmaError { address, len })
            }
        }
    }
    /// Write `data` to bus address `address`.
    ///
    /// # Errors
    /// [`DmaError`] if any byte is outside guest memory; bytes before it may have been written.
    #[inline]
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), DmaError> {
        let len = data.len();
        match self.slice(address, len) {
            Some(slice) => {
                slice.copy_from(data);
                Ok(())
            }
            // Several regions, or none.
            None => {
                self.memory.write_slice(data, GuestAddress(address)).map_err(|_| DmaError { address, len })
            }
        }
    }
    /// Append the memory at bus address `address` to `slices`: one piece unless it straddles regions of guest
    /// memory.
    ///
    /// # Errors
    /// [`DmaError`] if any byte is outside guest memory, or there are more pieces than `slices` has room for.
    #[inline]
    pub fn slices<const N: usize>(
        &self,
        address: u64,
        len: usize,
        slices: &mut ArrayVec<VolatileSlice<'m>, N>,
    ) -> Result<(), DmaError> {
        let error = DmaError { address, len };
        if let Some(slice) = self.slice(address, len) {
            return slices.try_push(slice).map_err(|_| error);
        }
        for slice in self.memory.get_slices(GuestAddress(address), len) {
            slice.ok().and_then(|slice| slices.try_push(slice).ok()).ok_or(error)?;
        }
        Ok(())
    }
}

/// The `N` bytes at `offset` of `from`, if there are as many. A length that the compiler knows makes this a few
/// loads, where [`VolatileSlice::copy_to`] calls `memcpy`.
#[inline]
pub fn load<const N: usize>(from: &VolatileSlice<'_>, offset: usize, to: &mut [u8; N]) -> Option<()> {
    let piece = from.subslice(offset, N).ok()?;
    piece.copy_to(to);
    Some(())
}

/// Write a queue entry of `N` bytes and a word: `body`, then, visible only after everything before it, the word
/// `last`.
///
/// # Errors
/// [`DmaError`] if the entry has no room for that, or its last word is not aligned.
#[inline]
pub fn publish<const N: usize>(entry: &VolatileSlice<'_>, body: &[u8; N], last: u32) -> Result<(), DmaError> {
    let error = |_| DmaError { address: u64::MAX, len: N };
    entry.subslice(0, N).map_err(error)?.copy_from(body);
    entry.store(last.to_le(), N, Ordering::Release).map_err(error)
}
