//! Bus mastering: the function's reads and writes of guest memory, possible only while Bus Master Enable is set.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arrayvec::ArrayVec;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryLoadGuard, GuestMemoryMmap,
    VolatileSlice,
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
    /// Guest memory as it is now; `None` while bus mastering is off.
    pub fn map(&self) -> Option<Mapped> {
        self.bus_master.load(Ordering::Acquire).then(|| self.memory.memory())
    }
}

/// Fill `data` from bus address `address`.
///
/// # Errors
/// [`DmaError`] if any byte is outside guest memory.
pub fn read(memory: &GuestMemoryMmap, address: u64, data: &mut [u8]) -> Result<(), DmaError> {
    let len = data.len();
    memory.read_slice(data, GuestAddress(address)).map_err(|_| DmaError { address, len })
}

/// Write `data` to bus address `address`.
///
/// # Errors
/// [`DmaError`] if any byte is outside guest memory; bytes before it may have been written.
pub fn write(memory: &GuestMemoryMmap, address: u64, data: &[u8]) -> Result<(), DmaError> {
    memory.write_slice(data, GuestAddress(address)).map_err(|_| DmaError { address, len: data.len() })
}

/// Append the memory at bus address `address` to `slices`: one piece unless it straddles regions of guest memory.
///
/// # Errors
/// [`DmaError`] if any byte is outside guest memory, or there are more pieces than `slices` has room for.
#[inline]
pub fn slices<'m, const N: usize>(
    memory: &'m GuestMemoryMmap,
    address: u64,
    len: usize,
    slices: &mut ArrayVec<VolatileSlice<'m>, N>,
) -> Result<(), DmaError> {
    for slice in memory.get_slices(GuestAddress(address), len) {
        slice.ok().and_then(|slice| slices.try_push(slice).ok()).ok_or(DmaError { address, len })?;
    }
    Ok(())
}

/// Store the last word of a queue entry, after everything written before it has become visible.
///
/// # Errors
/// [`DmaError`] if the word is outside guest memory or not aligned.
pub fn publish(memory: &GuestMemoryMmap, address: u64, word: u32) -> Result<(), DmaError> {
    memory
        .store(word.to_le(), GuestAddress(address), Ordering::Release)
        .map_err(|_| DmaError { address, len: size_of::<u32>() })
}
