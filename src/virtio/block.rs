//! virtio-blk: a file or block device as a disk (`--disk FILE`).
//!
//! Source: virtio 1.2, 5.2. Requests are done one after another on the disk's worker, straight between the file and
//! guest memory.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, anyhow, bail};
use mana_device::Ran;
use rustix::fs::{FlockOperation, flock};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_ID_BYTES,
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::pci::Queues;
use super::ring::{BadChain, Chain, Pieces, Ring, RingError};
use super::{Backend, Identity, read_image};
use crate::volatile_io;
use crate::warn_limited;

/// Unit of the disk's size and of positions on it.
const SECTOR: u64 = 512;
const QUEUE_SIZE: u16 = 256;
/// Most data buffers of a request: what is left of the pieces beside header and status, and half of that, because a
/// buffer may straddle two regions of memory.
const SEG_MAX: u32 = 126;
/// Type, reserved, sector.
const HEADER: usize = 16;
const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// How a request ended.
type Status = Result<u32, u32>;

/// A disk.
pub struct Disk {
    file: File,
    sectors: u64,
    read_only: bool,
    id: [u8; ID_BYTES],
    /// The driver flushes what it wants to be kept; else every write is flushed.
    flushes: AtomicBool,
}

impl Disk {
    /// The disk in the file at `path`.
    ///
    /// # Errors
    /// One sentence that says what is wrong with the file.
    pub fn open(path: &Path, read_only: bool, index: usize) -> anyhow::Result<Self> {
        let name = format!("--disk {}", path.display());
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(|error| {
                anyhow!("{error}{}", if read_only { "" } else { " (readonly=on only reads it)" })
            })
            .with_context(|| name.clone())?;
        Self::new(file, read_only, index).context(name)
    }

    fn new(mut file: File, read_only: bool, index: usize) -> anyhow::Result<Self> {
        let kind = if read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        if flock(&file, kind) == Err(rustix::io::Errno::WOULDBLOCK) {
            bail!("another machine uses this disk; readonly=on for all lets them share it");
        }
        // A block device's size is where its end is, too.
        let size = file.seek(SeekFrom::End(0)).context("its size can't be told")?;
        if size == 0 || !size.is_multiple_of(SECTOR) {
            bail!(
                "it has {size} bytes, and a disk is a multiple of {SECTOR}; `truncate --size=64M FILE` makes one"
            );
        }
        let mut id = [0; ID_BYTES];
        let text = format!("mana-vmm-disk{index}");
        id.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
        Ok(Self { file, sectors: size / SECTOR, read_only, id, flushes: AtomicBool::new(false) })
    }

    /// Do up to `limit` requests.
    fn step(
        &self,
        queues: &Queues,
        ring: &mut Ring,
        memory: &GuestMemoryMmap,
        limit: usize,
    ) -> Result<usize, RingError> {
        let mut done = 0;
        while done < limit {
            let Some(chain) = ring.pop(memory)? else { break };
            let head = chain.head();
            let written = self.request(chain, memory).unwrap_or_else(|error| {
                queues.count_bad_request(&error);
                0
            });
            // A disk's requests take long enough to tell of each.
            ring.publish(memory, &[(head, written)])?;
            done += 1;
        }
        Ok(done)
    }

    /// Do a request; the answer is how many bytes were written into it.
    fn request(&self, chain: Chain<'_>, memory: &GuestMemoryMmap) -> Result<u32, BadChain> {
        let (mut readable, mut writable) = (Pieces::new(), Pieces::new());
        chain.pieces(memory, &mut readable, &mut writable)?;
        let mut header = [0; HEADER];
        take(&mut readable, &mut header)?;
        let status_at = take_last_byte(&mut writable)?;
        let [kind, _, sector_low, sector_high] =
            *<&[[u8; 4]; 4]>::try_from(header.as_chunks::<4>().0).map_err(|_| BadChain)?;
        let sector =
            u64::from(u32::from_le_bytes(sector_low)) | u64::from(u32::from_le_bytes(sector_high)) << 32;
        let result = self.transfer(u32::from_le_bytes(kind), sector, &readable, &writable);
        let (status, written) = match result {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(status) => (status, 0),
        };
        status_at.copy_from(&[status as u8]);
        Ok(written + 1)
    }

    fn transfer(
        &self,
        kind: u32,
        sector: u64,
        out: &[VolatileSlice<'_>],
        into: &[VolatileSlice<'_>],
    ) -> Status {
        let failed = |what: &str, error: std::io::Error| {
            warn_limited!("virtio-blk: {what} at sector {sector}: {error}");
            VIRTIO_BLK_S_IOERR
        };
        match kind {
            VIRTIO_BLK_T_IN => {
                let len = self.check(sector, into)?;
                volatile_io::read_all_at(&self.file, into, sector * SECTOR)
                    .map_err(|error| failed("read", error))?;
                Ok(len)
            }
            VIRTIO_BLK_T_OUT if self.read_only => Err(VIRTIO_BLK_S_IOERR),
            VIRTIO_BLK_T_OUT => {
                self.check(sector, out)?;
                volatile_io::write_all_at(&self.file, out, sector * SECTOR)
                    .map_err(|error| failed("write", error))?;
                if !self.flushes.load(Ordering::Relaxed) {
                    self.file.sync_data().map_err(|error| failed("flush", error))?;
                }
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH => self.file.sync_data().map(|()| 0).map_err(|error| failed("flush", error)),
            VIRTIO_BLK_T_GET_ID => {
                let mut rest = &self.id[..];
                for slice in into {
                    slice.copy_from(rest);
                    rest = &rest[rest.len().min(slice.len())..];
                }
                Ok((ID_BYTES - rest.len()) as u32)
            }
            _ => Err(VIRTIO_BLK_S_UNSUPP),
        }
    }

    /// Bytes of `data`, which must be whole sectors on the disk.
    fn check(&self, sector: u64, data: &[VolatileSlice<'_>]) -> Status {
        let len = data.iter().map(|slice| slice.len() as u64).sum::<u64>();
        let end = sector.checked_add(len / SECTOR).filter(|end| *end <= self.sectors);
        if end.is_none() || !len.is_multiple_of(SECTOR) {
            warn_limited!("virtio-blk: {len} bytes at sector {sector} of {} are refused", self.sectors);
            return Err(VIRTIO_BLK_S_IOERR);
        }
        u32::try_from(len).map_err(|_| VIRTIO_BLK_S_IOERR)
    }
}

/// Take the first bytes of `pieces`, however they are cut.
fn take(pieces: &mut Pieces<'_>, mut to: &mut [u8]) -> Result<(), BadChain> {
    while !to.is_empty() {
        let first = *pieces.first().ok_or(BadChain)?;
        let taken = first.copy_to(to);
        to = &mut to[taken..];
        if taken == first.len() {
            pieces.remove(0);
        } else {
            pieces[0] = first.offset(taken).map_err(|_| BadChain)?;
        }
    }
    Ok(())
}

/// Take the last byte of `pieces`, where the status goes.
fn take_last_byte<'m>(pieces: &mut Pieces<'m>) -> Result<VolatileSlice<'m>, BadChain> {
    while let Some(last) = pieces.pop() {
        if let Some(before) = last.len().checked_sub(1) {
            let (rest, byte) = last.split_at(before).map_err(|_| BadChain)?;
            if before > 0 {
                pieces.push(rest);
            }
            return Ok(byte);
        }
    }
    Err(BadChain)
}

impl Backend for Disk {
    fn identity(&self) -> Identity {
        // Mass storage, SCSI: what other VMMs' virtio disks say.
        Identity { device: VIRTIO_ID_BLOCK as u16, class: 0x01_00_00 }
    }

    fn features(&self) -> u64 {
        let features = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;
        features | u64::from(self.read_only) << VIRTIO_BLK_F_RO
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut image = [0; 24];
        image[..8].copy_from_slice(&self.sectors.to_le_bytes());
        image[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        image[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        read_image(&image, offset, data);
    }

    fn activate(&self, features: u64) {
        self.flushes.store(features & 1 << VIRTIO_BLK_F_FLUSH != 0, Ordering::Relaxed);
    }

    fn run(&self, queues: &Queues, queue: usize, budget: usize) -> Ran {
        queues.drain(queue, budget, |ring, memory, limit| self.step(queues, ring, memory, limit))
    }
}
