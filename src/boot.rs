//! From a kernel image to a CPU that can enter it: the Linux x86 boot protocol's 64-bit entry
//! (Documentation/arch/x86/boot.rst), with no firmware in between.

mod entry;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::layout;
pub use entry::EntryState;
pub(crate) use entry::set_msrs;

/// `boot_params`, which the kernel calls the zero page.
const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// The command line, up to the EBDA.
const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// `HdrS` at this offset makes a file a bzImage.
const BZIMAGE_MAGIC_OFFSET: u64 = 0x202;
/// `XLF_KERNEL_64`: there is a 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
/// That entry point's offset in the protected-mode part of a bzImage.
const BZIMAGE_ENTRY_64: u64 = 0x200;
/// `type_of_loader`: one without a number of its own.
const LOADER_UNKNOWN: u8 = 0xff;
/// COMMAND_LINE_SIZE of x86 kernels, for a vmlinux, which doesn't say.
const DEFAULT_COMMAND_LINE_SIZE: u32 = 2047;
/// Highest address of an initramfs, for a vmlinux, which doesn't say.
const DEFAULT_INITRD_ADDR_MAX: u32 = 0x7fff_ffff;
const PAGE_SIZE: u64 = 4096;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// What a guest is booted from.
pub struct BootSource<'a> {
    /// bzImage or vmlinux.
    pub kernel: &'a Path,
    /// Initramfs, as it goes to memory.
    pub initrd: &'a [u8],
    /// The kernel's command line.
    pub command_line: &'a str,
    /// Where the ACPI tables' root is.
    pub rsdp: GuestAddress,
}

/// Put everything into `memory`; the answer is how the boot CPU begins.
///
/// # Errors
/// The kernel is not one, or it, the initramfs or the command line don't fit.
pub fn load(memory: &GuestMemoryMmap, source: &BootSource<'_>) -> anyhow::Result<EntryState> {
    let kernel = load_kernel(memory, source.kernel)
        .with_context(|| format!("--kernel: {} is not a kernel that boots", source.kernel.display()))?;
    let mut header = kernel.header;
    header.type_of_loader = LOADER_UNKNOWN;

    let size = source.command_line.len();
    ensure!(
        size <= header.cmdline_size as usize,
        "--append: the command line is {size} bytes, too long for the kernel"
    );
    memory
        .write_slice(source.command_line.as_bytes(), COMMAND_LINE)
        .context("no room for the command line")?;
    memory.write_obj(0u8, COMMAND_LINE.unchecked_add(size as u64)).context("no room for the command line")?;
    header.cmd_line_ptr = COMMAND_LINE.0 as u32;

    let initrd = initrd_address(memory, &kernel, source.initrd.len() as u64)?;
    memory.write_slice(source.initrd, initrd).context("no room for the initramfs")?;
    header.ramdisk_image = initrd.0 as u32;
    header.ramdisk_size = source.initrd.len() as u32;

    let mut params = boot_params { hdr: header, acpi_rsdp_addr: source.rsdp.0, ..Default::default() };
    fill_e820(&mut params, memory);
    memory.write_obj(params, ZERO_PAGE).context("no room for the zero page")?;
    EntryState::new(memory, kernel.entry, ZERO_PAGE)
}

/// A kernel in guest memory.
struct Kernel {
    entry: GuestAddress,
    /// End of all the memory it uses before it knows of the rest.
    end: u64,
    header: setup_header,
}

fn load_kernel(memory: &GuestMemoryMmap, path: &Path) -> anyhow::Result<Kernel> {
    let mut file = File::open(path)?;
    let mut magic = [0; 4];
    file.seek(SeekFrom::Start(BZIMAGE_MAGIC_OFFSET))?;
    file.read_exact(&mut magic)?;
    if &magic == b"HdrS" {
        bzimage(BzImage::load(memory, None, &mut file, None)?)
    } else {
        vmlinux(&Elf::load(memory, None, &mut file, None)?)
    }
}

fn bzimage(loaded: KernelLoaderResult) -> anyhow::Result<Kernel> {
    let header = loaded.setup_header.context("it has no setup header")?;
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        bail!("it has no 64-bit entry point");
    }
    let start = loaded.kernel_load.0;
    let entry = GuestAddress(start + BZIMAGE_ENTRY_64);
    // The decompressor works at the address the kernel prefers, or where it is if that is higher.
    let end = start.max(header.pref_address) + u64::from(header.init_size);
    Ok(Kernel { entry, end, header })
}

fn vmlinux(loaded: &KernelLoaderResult) -> anyhow::Result<Kernel> {
    let header = setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x20f,
        kernel_alignment: 0x100_0000,
        cmdline_size: DEFAULT_COMMAND_LINE_SIZE,
        initrd_addr_max: DEFAULT_INITRD_ADDR_MAX,
        ..Default::default()
    };
    Ok(Kernel { entry: loaded.kernel_load, end: loaded.kernel_end, header })
}

/// As high as it may be: out of the way of the kernel, which grows upwards while it unpacks.
fn initrd_address(memory: &GuestMemoryMmap, kernel: &Kernel, size: u64) -> anyhow::Result<GuestAddress> {
    let low_end =
        memory.iter().next().map_or(0, |region| vm_memory::GuestMemoryRegion::last_addr(region).0 + 1);
    let end = low_end.min(u64::from(kernel.header.initrd_addr_max) + 1);
    let start =
        end.checked_sub(size).map(|start| start & !(PAGE_SIZE - 1)).filter(|start| *start >= kernel.end);
    let start = start.with_context(|| {
        let needed = (kernel.end + size) >> 20;
        format!("--memory: kernel and initramfs need {needed} MiB, and the guest some more to run")
    })?;
    Ok(GuestAddress(start))
}

/// The memory map that a PC's BIOS would give.
fn fill_e820(params: &mut boot_params, memory: &GuestMemoryMmap) {
    let mut entries = vec![
        e820(0..layout::BASE_RAM_END, E820_RAM),
        e820(layout::ACPI_TABLES, E820_RESERVED),
        e820(layout::ECAM, E820_RESERVED),
    ];
    for region in memory.iter() {
        let start = vm_memory::GuestMemoryRegion::start_addr(region).0.max(layout::EXTENDED_RAM_START);
        let end = vm_memory::GuestMemoryRegion::last_addr(region).0 + 1;
        entries.push(e820(start..end, E820_RAM));
    }
    params.e820_entries = entries.len() as u8;
    let mut table = params.e820_table;
    table[..entries.len()].copy_from_slice(&entries);
    params.e820_table = table;
}

fn e820(range: std::ops::Range<u64>, kind: u32) -> boot_e820_entry {
    boot_e820_entry { addr: range.start, size: range.end - range.start, r#type: kind }
}
