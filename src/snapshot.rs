//! Save and restore of the whole machine: a file with everything in it, from which the guest goes on.
//!
//! ```text
//!  0            magic, layout, lengths, checksum of the state
//!  64           the state: options, CPUs, chips, devices, in postcard's encoding
//!  4096 × n     guest RAM, a hole where it is zero
//! ```
//!
//! RAM is mapped from the file, copy on write: a restored machine reads a page when its guest does, and any number of
//! them share one file, which must not be changed meanwhile.
//!
//! A state is as little trusted as a guest. What of it could name anything on this machine (kernel, disks, sockets,
//! interfaces) is not taken from it but from the command line; nothing is allocated by a number in it; every part is
//! checked by who becomes it. Guest RAM and registers may be anything, as ever.
//!
//! What is on a disk is not in the file: the disk itself must be as it was when the machine was saved.

pub mod chips;
pub mod cpu;
mod options;
mod unfinished;

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, ensure};
use mana_device::state::State as CardState;
use serde::{Deserialize, Serialize};
use twox_hash::XxHash64;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice};

use crate::legacy::LegacyState;
use crate::memory;
use crate::pci_host::PciState;
use crate::virtio::state::FunctionState;
use chips::ChipsState;
use cpu::CpuState;
pub use options::Options;
pub use unfinished::Unfinished;

const MAGIC: &[u8; 8] = b"MANA-VM\0";
/// Layout of what follows. Raised whenever a type in it changes.
const VERSION: u32 = 2;
/// Where the state begins.
const HEADER: u64 = 64;
/// RAM begins at a multiple of this, and ends at one.
const PAGE: u64 = 4096;
/// Longest state: a machine with the most CPUs and devices stays well below.
const MAX_STATE: u64 = 64 << 20;

/// Everything but guest RAM.
#[derive(Serialize, Deserialize)]
pub struct MachineState {
    /// What the machine was booted with.
    pub options: Options,
    /// In the order of their numbers.
    pub cpus: Vec<CpuState>,
    /// What KVM keeps for the whole machine.
    pub chips: ChipsState,
    /// Devices at fixed ports.
    pub legacy: LegacyState,
    /// Bridges and root ports.
    pub pci: PciState,
    /// MANA functions, in order.
    pub cards: Vec<CardState>,
    /// virtio functions, disks first.
    pub virtio: Vec<FunctionState>,
}

/// A machine in a file.
pub struct Snapshot {
    /// All but RAM.
    pub state: MachineState,
    file: File,
    ram_at: u64,
}

impl Snapshot {
    /// The machine in the file at `path`.
    ///
    /// # Errors
    /// One sentence that says what is wrong with the file.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let name = || format!("--restore {}", path.display());
        let file = File::open(path).with_context(name)?;
        Self::read(file).with_context(name)
    }

    /// The machine in `file`.
    ///
    /// # Errors
    /// It is none that this version can restore.
    pub fn read(mut file: File) -> anyhow::Result<Self> {
        // A block device's size is where its end is, too.
        let size = file.seek(SeekFrom::End(0)).context("its size can't be told")?;
        let mut header = [0; HEADER as usize];
        let whole = size >= HEADER;
        ensure!(whole && file.read_exact_at(&mut header, 0).is_ok(), "this is no saved machine");
        let mut rest = &header[..];
        ensure!(take::<8>(&mut rest)? == *MAGIC, "this is no saved machine");
        let version = u32::from_le_bytes(take(&mut rest)?);
        ensure!(
            version == VERSION,
            "it has layout {version}, but this mana-vmm restores only {VERSION}; save the machine anew"
        );
        let reserved = u32::from_le_bytes(take(&mut rest)?);
        let [length, checksum, ram_at, ram] =
            [take(&mut rest)?, take(&mut rest)?, take(&mut rest)?, take(&mut rest)?].map(u64::from_le_bytes);
        let sound = reserved == 0 && length <= MAX_STATE && HEADER + length <= ram_at && rest == [0; 16];
        ensure!(sound && ram_at.is_multiple_of(PAGE), "its header makes no sense");
        ensure!(ram_at.checked_add(ram).is_some_and(|end| end <= size), "it is cut short");
        let mut state = vec![0; length as usize];
        file.read_exact_at(&mut state, HEADER).context("it can't be read")?;
        ensure!(XxHash64::oneshot(0, &state) == checksum, "it is damaged: its checksum does not fit");
        let (state, rest) = postcard::take_from_bytes::<MachineState>(&state)
            .map_err(|error| anyhow::anyhow!("its state can't be read: {error}"))?;
        ensure!(rest.is_empty(), "{} bytes follow its state", rest.len());
        state.options.check()?;
        ensure!(
            state.options.memory == ram,
            "it has {ram} bytes of RAM for --memory {}",
            state.options.memory
        );
        Ok(Self { state, file, ram_at })
    }

    /// Guest RAM as it was, each page read when it is used, and never written back.
    ///
    /// # Errors
    /// The file can't be mapped.
    pub fn ram(&self) -> anyhow::Result<GuestMemoryMmap> {
        memory::map_private(self.state.options.memory, &self.file, self.ram_at)
    }

    /// Write `state` and `ram` to `file`, which is empty; the answer is its size.
    ///
    /// # Errors
    /// It can't be written.
    pub fn write(mut file: &File, state: &MachineState, ram: &GuestMemoryMmap) -> anyhow::Result<u64> {
        let encoded = postcard::to_stdvec(state).context("no form for the state")?;
        let length = encoded.len() as u64;
        ensure!(length <= MAX_STATE, "a state of {length} bytes");
        let ram_at = (HEADER + length).next_multiple_of(PAGE);
        let mut header = Vec::from(MAGIC);
        header.extend(VERSION.to_le_bytes());
        header.extend(0_u32.to_le_bytes());
        for number in [length, XxHash64::oneshot(0, &encoded), ram_at, state.options.memory] {
            header.extend(number.to_le_bytes());
        }
        header.resize(HEADER as usize, 0);
        let end = ram_at + state.options.memory;
        file.set_len(end)?;
        file.write_all(&header)?;
        file.write_all(&encoded)?;
        let mut at = ram_at;
        for region in ram.iter() {
            write_ram(file, at, &region.as_volatile_slice()?)?;
            at += region.len();
        }
        Ok(end)
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> anyhow::Result<[u8; N]> {
    let (taken, left) = rest.split_first_chunk().context("this is no saved machine")?;
    *rest = left;
    Ok(*taken)
}

/// Write what is not zero of `ram` to `file`, where its first byte is to be `at`.
fn write_ram(file: &File, at: u64, ram: &VolatileSlice<'_>) -> anyhow::Result<()> {
    /// Bytes of a write.
    const CHUNK: usize = 1 << 20;
    let mut buffer = vec![0; CHUNK];
    let mut done = 0;
    while done < ram.len() {
        let count = CHUNK.min(ram.len() - done);
        let chunk = &mut buffer[..count];
        ram.subslice(done, count)?.copy_to(chunk);
        write_filled(file, at + done as u64, chunk)?;
        done += count;
    }
    Ok(())
}

/// Write the pages of `chunk` that hold anything, neighbours together.
fn write_filled(file: &File, at: u64, chunk: &[u8]) -> io::Result<()> {
    const EMPTY: [u8; PAGE as usize] = [0; PAGE as usize];
    let is_empty = |page: &[u8]| EMPTY.starts_with(page);
    let mut from = 0;
    for run in chunk.chunks(PAGE as usize).collect::<Vec<_>>().chunk_by(|a, b| is_empty(a) == is_empty(b)) {
        let length: usize = run.iter().map(|page| page.len()).sum();
        if !run.first().is_none_or(|page| is_empty(page)) {
            file.write_all_at(&chunk[from..from + length], at + from as u64)?;
        }
        from += length;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
