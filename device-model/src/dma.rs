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
#[inline]
pub fn read(memory: &GuestMemoryMmap, address: u64, data: &mut [u8]) -> Result<(), DmaError> {
    let len = data.len();
    match memory.get_slice(GuestAddress(address), len) {
        Ok(slice) => {
            slice.copy_to(data);
            Ok(())
        }
        // Several regions, or none.
        Err(_) => memory.read_slice(data, GuestAddress(address)).map_err(|_| DmaError { address, len }),
    }
}

/// Write `data` to bus address `address`.
///
/// # Errors
/// [`DmaError`] if any byte is outside guest memory; bytes before it may have been written.
#[inline]
pub fn write(memory: &GuestMemoryMmap, address: u64, data: &[u8]) -> Result<(), DmaError> {
    let len = data.len();
    match memory.get_slice(GuestAddress(address), len) {
        Ok(slice) => {
            slice.copy_from(data);
            Ok(())
        }
        // Several regions, or none.
        Err(_) => memory.write_slice(data, GuestAddress(address)).map_err(|_| DmaError { address, len }),
    }
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
    let error = DmaError { address, len };
    if let Ok(slice) = memory.get_slice(GuestAddress(address), len) {
        return slices.try_push(slice).map_err(|_| error);
    }
    for slice in memory.get_slices(GuestAddress(address), len) {
        slice.ok().and_then(|slice| slices.try_push(slice).ok()).ok_or(error)?;
    }
    Ok(())
}

/// Write a queue entry at bus address `address`, see [`publish`].
///
/// # Errors
/// [`DmaError`] if the entry is outside guest memory or its last word not aligned.
pub fn publish_at(memory: &GuestMemoryMmap, address: u64, body: &[u8], last: u32) -> Result<(), DmaError> {
    let len = body.len() + size_of::<u32>();
    let entry = memory.get_slice(GuestAddress(address), len).map_err(|_| DmaError { address, len })?;
    publish(&entry, body, last)
}

/// Write a queue entry: `body`, then, visible only after everything before it, the word `last`.
///
/// # Errors
/// [`DmaError`] if the entry has no room for that, or its last word is not aligned.
#[inline]
pub fn publish(entry: &VolatileSlice<'_>, body: &[u8], last: u32) -> Result<(), DmaError> {
    entry.copy_from(body);
    let stored = entry.store(last.to_le(), body.len(), Ordering::Release);
    stored.map_err(|_| DmaError { address: u64::MAX, len: body.len() })
}
