//! ACPI tables: how the guest learns of its CPUs, memory, interrupt controllers, PCI and power management.
//!
//! The machine has full ACPI hardware, not the reduced kind: the fixed events of its PM1 block (power button, RTC
//! alarm) raise the SCI, and Linux arms them to wake from suspend-to-idle; the legacy interrupt controllers and
//! timer are KVM's. There is no SMI command port, since ACPI mode is always on, and no power-management timer.
//!
//! Sources: ACPI specification 6.5, chapter 5 (table layouts), 4.8 (fixed hardware); PCI firmware specification 3.3,
//! 4.1.2 (MCFG).

mod dsdt;
mod madt;
mod numa;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::config::Topology;
use crate::layout::{self, RamRange};
use crate::pci_host::plan::HostBridge;

const OEM_ID: [u8; 6] = *b"MANAVM";
const OEM_TABLE_ID: [u8; 8] = *b"MANA-VMM";
const OEM_REVISION: u32 = 1;

/// Bytes before a table's own fields (ACPI 5.2.6).
const HEADER_SIZE: u32 = 36;
/// Tables start at multiples of this; the RSDP needs 16 and the FACS 64.
const ALIGNMENT: u64 = 64;

/// What the tables describe.
#[derive(Clone, Copy, Debug)]
pub struct Platform<'a> {
    /// CPUs and NUMA nodes.
    pub topology: &'a Topology,
    /// RAM by node.
    pub ram: &'a [RamRange],
    /// PCI host bridges, bus 0 first.
    pub bridges: &'a [HostBridge],
}

/// The tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// So many CPUs, or nodes, that the BIOS area is too small.
    #[error("--cpus: the ACPI tables of so large a machine take more than {} KiB", room() / 1024)]
    NoRoom,
    /// Guest RAM has a hole where the tables belong.
    #[error("no RAM for the ACPI tables: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Write all tables to [`layout::ACPI_TABLES`]; the answer is the RSDP's address.
///
/// # Errors
/// See [`Error`].
pub fn write(memory: &GuestMemoryMmap, platform: &Platform<'_>) -> Result<GuestAddress, Error> {
    let mut area = Area { memory, next: layout::ACPI_TABLES.start };
    let facs = area.place(&FACS::new())?;
    let dsdt = area.place(&dsdt::dsdt(platform))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let tables: [&dyn Aml; 5] = [
        &fadt(facs, dsdt),
        &madt::madt(platform.topology),
        &numa::srat(platform),
        &numa::slit(platform.topology),
        &mcfg(platform.bridges),
    ];
    for table in tables {
        xsdt.add_entry(area.place(table)?);
    }
    let xsdt = area.place(&xsdt)?;
    Ok(GuestAddress(area.place(&Rsdp::new(OEM_ID, xsdt))?))
}

fn room() -> u64 {
    layout::ACPI_TABLES.end - layout::ACPI_TABLES.start
}

/// Guest memory that fills up with tables.
struct Area<'a> {
    memory: &'a GuestMemoryMmap,
    next: u64,
}

impl Area<'_> {
    fn place(&mut self, table: &dyn Aml) -> Result<u64, Error> {
        let bytes = bytes_of(table);
        let address = self.next;
        let end = address + bytes.len() as u64;
        if end > layout::ACPI_TABLES.end {
            return Err(Error::NoRoom);
        }
        self.memory.write_slice(&bytes, GuestAddress(address))?;
        self.next = end.next_multiple_of(ALIGNMENT);
        Ok(address)
    }
}

fn bytes_of(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

/// A table of `signature`, its standard header followed by `body`.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut table = Sdt::new(signature, HEADER_SIZE, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(body);
    table
}

/// FADT: the PM1 block, the reset register, and what the platform has and lacks.
fn fadt(facs: u64, dsdt: u64) -> impl Aml {
    const LEGACY_DEVICES: u16 = 1 << 0;
    const VGA_NOT_PRESENT: u16 = 1 << 2;
    const NO_ASPM: u16 = 1 << 4;

    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .firmware_ctrl_32(facs as u32)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton) // that is: no fixed sleep button
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::LowPowerS0IdleCapable);
    fadt.sci_int = (layout::SCI_GSI as u16).into();
    fadt.pm1a_evt_blk = u32::from(layout::PM1A_EVENT_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = io_register(layout::PM1A_EVENT_PORT, 32, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(layout::PM1A_CONTROL_PORT).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = io_register(layout::PM1A_CONTROL_PORT, 16, AccessSize::WordAccess);
    // Longer than 100 and 1000 microseconds: no C2, no C3.
    fadt.p_lvl2_lat = 0xfff.into();
    fadt.p_lvl3_lat = 0xfff.into();
    fadt.iapc_boot_arch = (LEGACY_DEVICES | VGA_NOT_PRESENT | NO_ASPM).into();
    fadt.reset_reg = io_register(layout::RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.finalize()
}

fn io_register(port: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into())
}

/// MCFG: memory-mapped configuration space, one segment, up to the last bus that the machine uses: Linux probes all
/// up to it.
fn mcfg(bridges: &[HostBridge]) -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let last_bus = bridges.iter().map(|bridge| *bridge.buses.end()).max().unwrap_or(0);
    mcfg.add_ecam(layout::ECAM.start, 0, 0, last_bus);
    mcfg
}

#[cfg(test)]
mod tests;
