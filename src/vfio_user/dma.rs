//! The client's memory, as the function's DMA sees it.
//!
//! The client names each piece of its memory and sends the file that the piece lies in; we map it. What comes without
//! a file (a video card's memory, firmware) or may not be written can't be reached: DMA there fails as it does where
//! no memory is. A piece that the client takes back is unmapped before it gets its answer, and that waits for workers
//! that are in the middle of a batch with the old map.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use mana_device::doors::Memory;
use rustix::fs::fstatfs;
use rustix::io::Errno;
use vm_memory::{
    FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use super::lost::Watch;
use super::wire::{DmaMap, DmaUnmap, dma};
use crate::warn_limited;

/// Most pieces at a time. A client with a hundred devices has some dozens.
const MAX_PIECES: usize = 4096;
/// How often we look whether the last worker has let go: a batch takes microseconds.
const PATIENCE: Duration = Duration::from_micros(20);
/// A piece of this many bytes that comes without a file is worth a warning: it is the guest's RAM.
const LARGE: u64 = 32 << 20;

/// A filesystem whose files are a program's, which may let us wait for their bytes for ever (`FUSE_SUPER_MAGIC`).
const FUSE: u64 = 0x6573_5546;

/// The client's memory. Dropping it takes it back.
pub struct ClientMemory {
    memory: Memory,
    /// By address.
    pieces: BTreeMap<u64, Piece>,
    /// The client's socket, which is shut down when memory is found gone; after the pieces, which refer to it.
    socket: Option<OwnedFd>,
}

struct Piece {
    size: u64,
    /// None where the device can't reach.
    reachable: Option<Reachable>,
}

struct Reachable {
    // First, so that nothing is watched that is unmapped.
    _watch: Watch,
    region: Arc<GuestRegionMmap>,
}

impl ClientMemory {
    /// Nothing is mapped; what will be, appears in `memory`.
    pub fn new(memory: Memory, socket: Option<OwnedFd>) -> Self {
        Self { memory, pieces: BTreeMap::new(), socket }
    }

    /// Map a piece, which lies in `file` if it comes with one.
    ///
    /// # Errors
    /// EINVAL for a piece that makes no sense or a file that can't hold it, EEXIST if it overlaps another, ENOSPC if
    /// there are too many.
    pub fn map(&mut self, message: &DmaMap, file: Option<OwnedFd>) -> Result<(), Errno> {
        let (iova, size) = (message.iova.get(), message.size.get());
        let end = iova.checked_add(size).filter(|_| size > 0).ok_or(Errno::INVAL)?;
        if message.flags.get() & !(dma::READ | dma::WRITE) != 0 {
            return Err(Errno::INVAL);
        }
        if self.overlapping(iova, end).next().is_some() {
            return Err(Errno::EXIST);
        }
        if self.pieces.len() >= MAX_PIECES {
            return Err(Errno::NOSPC);
        }
        let writable = message.flags.get() & dma::WRITE != 0;
        let reachable = match file {
            Some(file) if writable => Some(self.reach(message, file)?),
            None if writable && size >= LARGE => {
                warn_limited!(
                    "the client's {} MiB at {iova:#x} come without a file, so that DMA can't reach them: QEMU's guest \
                     RAM must be shared (-object memory-backend-memfd,id=ram,share=on,size=... -machine \
                     memory-backend=ram)",
                    size >> 20
                );
                None
            }
            _ => None,
        };
        if let Some(Reachable { region, .. }) = &reachable {
            let map = self.memory.memory().insert_region(region.clone()).map_err(|_| Errno::INVAL)?;
            self.replace(map);
        }
        self.pieces.insert(iova, Piece { size, reachable });
        Ok(())
    }

    /// Maps what `message` describes.
    fn reach(&self, message: &DmaMap, file: OwnedFd) -> Result<Reachable, Errno> {
        let region = Arc::new(region(message, file)?);
        let length = usize::try_from(region.len()).map_err(|_| Errno::INVAL)?;
        let socket = self.socket.as_ref().map(|socket| socket.as_fd());
        let watch = Watch::new(region.as_ptr(), length, socket).map_err(|error| {
            log::info!("the client's memory can't be watched: {error}");
            Errno::NOSPC
        })?;
        Ok(Reachable { _watch: watch, region })
    }

    /// Take back the pieces that lie in a range. When this returns nobody touches them any more.
    ///
    /// # Errors
    /// EINVAL if the range cuts a piece in two, ENOENT if there is none in it.
    pub fn unmap(&mut self, message: &DmaUnmap) -> Result<(), Errno> {
        if message.flags.get() & !dma::UNMAP_ALL != 0 {
            return Err(Errno::INVAL);
        }
        if message.flags.get() & dma::UNMAP_ALL != 0 {
            self.unmap_all();
            return Ok(());
        }
        let (iova, size) = (message.iova.get(), message.size.get());
        let end = iova.checked_add(size).filter(|_| size > 0).ok_or(Errno::INVAL)?;
        let found: Vec<(u64, u64)> = self.overlapping(iova, end).collect();
        if found.is_empty() {
            return Err(Errno::NOENT);
        }
        if found.iter().any(|&(start, piece_end)| start < iova || piece_end > end) {
            return Err(Errno::INVAL);
        }
        self.remove(found.into_iter().map(|(start, _)| start));
        Ok(())
    }

    /// Take back everything.
    pub fn unmap_all(&mut self) {
        let all: Vec<u64> = self.pieces.keys().copied().collect();
        self.remove(all.into_iter());
    }

    /// Start and end of each piece that touches `start..end`.
    fn overlapping(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let before_end = self.pieces.range(..end).rev().map(|(&at, piece)| (at, at + piece.size));
        // Pieces don't overlap, so that going down the first that ends too early is followed by others that do.
        before_end.take_while(move |&(_, piece_end)| piece_end > start)
    }

    fn remove(&mut self, starts: impl Iterator<Item = u64>) {
        let mut leaving = Vec::new();
        let mut map: GuestMemoryMmap = (*self.memory.memory()).clone();
        for start in starts {
            let Some(Piece { size, reachable: Some(piece) }) = self.pieces.remove(&start) else { continue };
            if let Ok((without, _)) = map.remove_region(GuestAddress(start), size) {
                map = without;
            }
            leaving.push(piece);
        }
        if leaving.is_empty() {
            return;
        }
        self.replace(map);
        for Reachable { region, .. } in &mut leaving {
            // Whoever began a batch before the map was replaced holds the old one, and with it the region.
            while Arc::get_mut(region).is_none() {
                std::thread::sleep(PATIENCE);
            }
        }
    }

    fn replace(&self, map: GuestMemoryMmap) {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).replace(map);
    }
}

impl Drop for ClientMemory {
    fn drop(&mut self) {
        self.unmap_all();
    }
}

fn region(message: &DmaMap, file: OwnedFd) -> Result<GuestRegionMmap, Errno> {
    let file = File::from(file);
    let metadata = file.metadata().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    let (offset, size) = (message.offset.get(), message.size.get());
    let fits = offset.checked_add(size).is_some_and(|end| end <= metadata.len());
    // A device's file may do anything when it is touched, a pipe has no memory.
    if !metadata.is_file() || !fits || fstatfs(&file)?.f_type as u64 == FUSE {
        return Err(Errno::INVAL);
    }
    let length = usize::try_from(size).map_err(|_| Errno::INVAL)?;
    let mapping = MmapRegion::from_file(FileOffset::new(file, offset), length).map_err(|error| {
        log::info!("{size:#x} bytes of the client's memory can't be mapped: {error}");
        Errno::INVAL
    })?;
    let region = GuestRegionMmap::new(mapping, GuestAddress(message.iova.get())).ok_or(Errno::INVAL)?;
    debug_assert_eq!(region.len(), size);
    Ok(region)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use vm_memory::{Bytes, GuestMemoryAtomic};

    use super::*;

    const PAGE: u64 = 4096;

    fn file(bytes: u64) -> OwnedFd {
        let file = memfd_create("client", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, bytes).unwrap();
        file
    }

    fn memory() -> (ClientMemory, Memory) {
        let memory: Memory = GuestMemoryAtomic::new(GuestMemoryMmap::default());
        (ClientMemory::new(memory.clone(), None), memory)
    }

    fn map(iova: u64, size: u64, offset: u64) -> DmaMap {
        DmaMap {
            argsz: 32.into(),
            flags: (dma::READ | dma::WRITE).into(),
            offset: offset.into(),
            iova: iova.into(),
            size: size.into(),
        }
    }

    fn unmap(iova: u64, size: u64) -> DmaUnmap {
        DmaUnmap { argsz: 24.into(), flags: 0.into(), iova: iova.into(), size: size.into() }
    }

    #[test]
    fn the_clients_bytes_are_the_devices() {
        let (mut client, memory) = memory();
        let file = file(3 * PAGE);
        client.map(&map(0x10_0000, 2 * PAGE, PAGE), Some(file.try_clone().unwrap())).unwrap();
        memory.memory().write_slice(b"hello", GuestAddress(0x10_0ffe)).unwrap();
        let mut seen = [0; 5];
        rustix::io::pread(&file, &mut seen, 2 * PAGE - 2).unwrap();
        assert_eq!(&seen, b"hello");
        client.unmap(&unmap(0x10_0000, 2 * PAGE)).unwrap();
        assert!(memory.memory().write_slice(b"hello", GuestAddress(0x10_0ffe)).is_err());
    }

    #[test]
    fn what_makes_no_sense_is_refused_and_changes_nothing() {
        let (mut client, memory) = memory();
        client.map(&map(0x4000, 2 * PAGE, 0), Some(file(2 * PAGE))).unwrap();
        let mut refused = |message: DmaMap, file| client.map(&message, file).unwrap_err();
        assert_eq!(refused(map(0x8000, 0, 0), Some(file(PAGE))), Errno::INVAL);
        assert_eq!(refused(map(u64::MAX - 100, PAGE, 0), Some(file(PAGE))), Errno::INVAL);
        assert_eq!(refused(map(0x8000, PAGE, PAGE), Some(file(PAGE))), Errno::INVAL);
        assert_eq!(refused(map(0x8000, PAGE, u64::MAX), Some(file(PAGE))), Errno::INVAL);
        assert_eq!(refused(map(0x8000, PAGE, 100), Some(file(2 * PAGE))), Errno::INVAL);
        assert_eq!(refused(DmaMap { flags: 0xff.into(), ..map(0x8000, PAGE, 0) }, None), Errno::INVAL);
        for (iova, size) in [(0x3000, 2 * PAGE), (0x5000, PAGE), (0x4000, 2 * PAGE), (0, 1 << 40)] {
            assert_eq!(refused(map(iova, size, 0), None), Errno::EXIST);
        }
        let pipe = rustix::pipe::pipe().unwrap().0;
        assert_eq!(refused(map(0x8000, PAGE, 0), Some(pipe)), Errno::INVAL);
        let zero: OwnedFd = File::open("/dev/zero").unwrap().into();
        assert_eq!(refused(map(0x8000, PAGE, 0), Some(zero)), Errno::INVAL);
        assert_eq!(client.unmap(&unmap(0x9000, PAGE)), Err(Errno::NOENT));
        assert_eq!(client.unmap(&unmap(0x4000, PAGE)), Err(Errno::INVAL));
        assert_eq!(client.unmap(&unmap(0x4000, u64::MAX)), Err(Errno::INVAL));
        assert!(memory.memory().write_slice(&[1], GuestAddress(0x5fff)).is_ok());
        client.unmap(&unmap(0, 1 << 40)).unwrap();
        assert!(memory.memory().write_slice(&[1], GuestAddress(0x5fff)).is_err());
    }

    #[test]
    fn memory_without_a_file_or_read_only_is_known_but_out_of_reach() {
        let (mut client, memory) = memory();
        client.map(&map(0xa_0000, 0x2_0000, 0), None).unwrap();
        let rom = DmaMap { flags: dma::READ.into(), ..map(0xc_0000, PAGE, 0) };
        client.map(&rom, Some(file(PAGE))).unwrap();
        assert!(memory.memory().write_slice(&[1], GuestAddress(0xc_0000)).is_err());
        assert_eq!(client.map(&map(0xb_0000, PAGE, 0), None), Err(Errno::EXIST));
        client.unmap(&unmap(0xa_0000, 0x2_0000)).unwrap();
        client.unmap(&unmap(0xc_0000, PAGE)).unwrap();
    }

    #[test]
    fn memory_that_the_client_takes_away_ends_nobody() {
        let (mut client, memory) = memory();
        let file = file(2 * PAGE);
        client.map(&map(0, 2 * PAGE, 0), Some(file.try_clone().unwrap())).unwrap();
        memory.memory().write_slice(&[7], GuestAddress(PAGE)).unwrap();
        ftruncate(&file, 0).unwrap();
        assert_eq!(memory.memory().read_obj::<u8>(GuestAddress(PAGE)).unwrap(), 0);
        memory.memory().write_slice(&[7], GuestAddress(PAGE)).unwrap();
        client.unmap(&unmap(0, 2 * PAGE)).unwrap();
        assert!(memory.memory().write_slice(&[7], GuestAddress(PAGE)).is_err());
    }

    #[test]
    fn there_are_bounds() {
        let (mut client, _) = memory();
        for piece in 0..MAX_PIECES as u64 {
            client.map(&map(piece * PAGE, PAGE, 0), None).unwrap();
        }
        assert_eq!(client.map(&map(1 << 40, PAGE, 0), None), Err(Errno::NOSPC));
        client.unmap(&DmaUnmap { flags: dma::UNMAP_ALL.into(), ..unmap(0, 0) }).unwrap();
        client.map(&map(1 << 40, PAGE, 0), None).unwrap();
    }

    #[test]
    fn unmapping_waits_for_whoever_is_still_at_it() {
        let (mut client, memory) = memory();
        client.map(&map(0, PAGE, 0), Some(file(PAGE))).unwrap();
        let held = memory.memory();
        let let_go = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let let_go = &let_go;
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(50));
                let_go.store(true, Ordering::SeqCst);
                drop(held);
            });
            client.unmap(&unmap(0, PAGE)).unwrap();
            assert!(let_go.load(Ordering::SeqCst), "it did not wait");
        });
    }
}
