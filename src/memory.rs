//! Guest RAM: anonymous memory of this process, known to KVM by slots.

use anyhow::Context;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

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
