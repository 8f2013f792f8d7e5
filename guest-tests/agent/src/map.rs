//! Memory shared with a device: its registers, or pages it writes to.

use std::fs::File;
use std::io::{Error, Read, Result, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};

const PAGE: usize = 4096;

/// A mapping, unmapped when dropped. Every access is one load or store of its size.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

impl Mapping {
    /// `length` bytes of `file` from its start: a BAR's resource file in sysfs.
    pub fn of_file(file: &File, length: usize) -> Result<Self> {
        Self::new(length, libc::MAP_SHARED, file.as_raw_fd())
    }

    /// `pages` zeroed pages that stay where they are in physical memory.
    pub fn locked(pages: usize) -> Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_LOCKED | libc::MAP_POPULATE;
        Self::new(pages * PAGE, flags, -1)
    }

    fn new(length: usize, flags: libc::c_int, file: libc::c_int) -> Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, placed by the kernel, touches no memory in use.
        let start = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, file, 0) };
        if start == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| Error::other("mapped at address 0"))?;
        Ok(Self { start, length })
    }

    fn pointer<T>(&self, offset: usize) -> *mut T {
        assert!(offset.is_multiple_of(size_of::<T>()) && offset + size_of::<T>() <= self.length);
        // SAFETY: within the mapping, as just checked.
        unsafe { self.start.as_ptr().add(offset).cast() }
    }

    /// Read a value at `offset` bytes.
    pub fn read<T: Copy + Into<u64>>(&self, offset: usize) -> T {
        // SAFETY: aligned and inside the mapping; every bit pattern of an integer is valid.
        unsafe { self.pointer::<T>(offset).read_volatile() }
    }

    /// Write a 32-bit value at `offset` bytes.
    pub fn write(&self, offset: usize, value: u32) {
        // SAFETY: aligned and inside the mapping.
        unsafe { self.pointer::<u32>(offset).write_volatile(value) };
    }

    /// Physical page frame numbers of the mapping's pages (`Documentation/admin-guide/mm/pagemap.rst`).
    pub fn frames(&self) -> Result<Vec<u64>> {
        const PRESENT: u64 = 1 << 63;
        const FRAME: u64 = (1 << 55) - 1;
        let mut pagemap = File::open("/proc/self/pagemap")?;
        let first = self.start.as_ptr() as usize / PAGE;
        pagemap.seek(SeekFrom::Start(first as u64 * 8))?;
        let mut entries = vec![0; self.length / PAGE * 8];
        pagemap.read_exact(&mut entries)?;
        let (entries, _) = entries.as_chunks::<8>();
        let entries = entries.iter().map(|&entry| u64::from_le_bytes(entry));
        entries
            .map(|entry| match entry & FRAME {
                frame if entry & PRESENT != 0 && frame != 0 => Ok(frame),
                _ => Err(Error::other("a locked page has no frame")),
            })
            .collect()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this mapping, which nothing refers to any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}
