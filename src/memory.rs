//! Guest RAM: memory of this process, anonymous or a private copy of a file's, known to KVM by slots.

use std::fs::File;

use anyhow::Context;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::layout;

/// `bytes` of RAM, in the ranges that [`layout::ram`] gives it.
///
/// # Errors
/// The host has no room for it.
pub fn allocate(bytes: u64) -> anyhow::Result<GuestMemoryMmap> {
    let ranges: Vec<(GuestAddress, usize)> = layout::ram(bytes)
        .into_iter()
        .map(|range| (GuestAddress(range.start), (range.end - range.start) as usize))
        .collect();
    let memory = GuestMemoryMmap::from_ranges(&ranges)
        .with_context(|| format!("--memory: no room for {} MiB of guest RAM", bytes >> 20))?;
    memory.iter().for_each(advise_huge_pages);
    Ok(memory)
}

/// `bytes` of RAM whose contents are in `file` from `at` on. A page is read when it is first used; what is written stays
/// in this process.
///
/// # Errors
/// The file is too short, or can't be mapped.
pub fn map_private(bytes: u64, file: &File, at: u64) -> anyhow::Result<GuestMemoryMmap> {
    let mut at = at;
    let mut regions = Vec::new();
    for range in layout::ram(bytes) {
        let size = range.end - range.start;
        let from = FileOffset::new(file.try_clone()?, at);
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
        let mapping = MmapRegion::build(Some(from), size as usize, prot, flags)
            .with_context(|| format!("no room for {} MiB of guest RAM", bytes >> 20))?;
        regions.push(
            GuestRegionMmap::new(mapping, GuestAddress(range.start)).context("RAM past all addresses")?,
        );
        at += size;
    }
    GuestMemoryMmap::from_regions(regions).context("no room for guest RAM")
}

/// Transparent huge pages: fewer faults at boot, and shorter walks of nested page tables. Only advice, so that a
/// kernel without them is no error.
fn advise_huge_pages(region: &GuestRegionMmap) {
    // SAFETY: the range is a mapping that `region` owns, and this advice changes no contents.
    let result = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_HUGEPAGE) };
    if result != 0 {
        log::debug!("no huge pages for guest RAM: {}", std::io::Error::last_os_error());
    }
}

/// Tell KVM about `memory`, a slot a region.
///
/// # Errors
/// KVM refuses a region.
pub fn register(vm: &VmFd, memory: &GuestMemoryMmap) -> anyhow::Result<()> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the region is mapped for as long as `memory` lives, which the machine keeps longer than the VM.
        unsafe { vm.set_user_memory_region(region) }.context("KVM takes no guest RAM")?;
    }
    Ok(())
}
