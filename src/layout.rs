//! The address map of the machine: where memory, devices and tables lie for every guest.
//!
//! ```text
//! 0x0000_0000  RAM; below 1 MiB: boot structures, 0xE0000 ACPI tables
//! 0xC000_0000  hole: 32-bit MMIO window
//! 0xE000_0000        ECAM, 1 MiB a bus
//! 0xFEC0_0000        I/O APIC, local APICs, KVM's own pages
//! 0x1_0000_0000  the rest of RAM
//! above, at a 1 GiB boundary: 64-bit MMIO window
//! ```

use std::ops::Range;

use crate::config::Topology;

/// First byte of the hole below 4 GiB; RAM beyond it continues at [`HIGH_RAM_START`].
pub const LOW_RAM_END: u64 = 0xC000_0000;
/// RAM above the hole starts here.
pub const HIGH_RAM_START: u64 = 1 << 32;
/// RAM that a PC's BIOS leaves to the system below 640 KiB (the last KiB is the EBDA).
pub const BASE_RAM_END: u64 = 0x9_FC00;
/// RAM from here to [`LOW_RAM_END`] is the guest's without exception.
pub const EXTENDED_RAM_START: u64 = 0x10_0000;

/// Where the ACPI tables are: in the BIOS area, reserved in e820.
pub const ACPI_TABLES: Range<u64> = 0xE_0000..EXTENDED_RAM_START;

/// 32-bit MMIO window of the PCI host bridge.
pub const MMIO32: Range<u64> = LOW_RAM_END..ECAM.start;
/// Memory-mapped configuration space, buses 0 to 255.
pub const ECAM: Range<u64> = 0xE000_0000..0xF000_0000;
/// Bytes of the 64-bit MMIO window of the PCI host bridge.
pub const MMIO64_SIZE: u64 = 16 << 30;
const MMIO64_ALIGNMENT: u64 = 1 << 30;

/// I/O APIC, as KVM's in-kernel irqchip has it.
pub const IOAPIC: u64 = 0xFEC0_0000;
/// Pins of the I/O APIC: GSIs 0 to 23.
pub const IOAPIC_PINS: u32 = 24;
/// Local APICs.
pub const LOCAL_APIC: u64 = 0xFEE0_0000;
/// One page for KVM_SET_IDENTITY_MAP_ADDR, followed by three for KVM_SET_TSS_ADDR: only Intel's hosts that can't
/// run real mode use them.
pub const KVM_PAGES: u64 = 0xFFFB_C000;

/// COM1.
pub const SERIAL_PORT: u16 = 0x3F8;
/// COM1's interrupt.
pub const SERIAL_GSI: u32 = 4;
/// MC146818 index and data ports.
pub const RTC_PORT: u16 = 0x70;
/// The RTC's alarm interrupt.
pub const RTC_GSI: u32 = 8;
/// i8042 command port, which can reset the machine.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// Channel of the guest's agent (QEMU's isa-debugcon has the same address and answers reads with it).
pub const AGENT_PORT: u16 = 0xE9;
/// pvpanic (ACPI QEMU0001).
pub const PVPANIC_PORT: u16 = 0x505;
/// PM1a event block: status and enable, 2 bytes each (ACPI 6.5, 4.8.3.1).
pub const PM1A_EVENT_PORT: u16 = 0x600;
/// PM1a control block, 2 bytes (ACPI 6.5, 4.8.3.2).
pub const PM1A_CONTROL_PORT: u16 = 0x604;
/// System control interrupt.
pub const SCI_GSI: u32 = 9;
/// SLP_TYP of `\_S5`.
pub const S5_SLEEP_TYPE: u8 = 5;
/// PCI configuration address and data (CONFIG_ADDRESS, CONFIG_DATA), 4 bytes each.
pub const PCI_CONFIG_PORT: u16 = 0xCF8;
/// Reset register of the FADT.
pub const RESET_PORT: u16 = 0x606;
/// Value that resets the machine when written to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 1;

/// A piece of RAM on one NUMA node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// Guest physical addresses.
    pub range: Range<u64>,
    /// The node it belongs to.
    pub node: u32,
}

/// RAM as two ranges at most, below and above the hole.
pub fn ram(memory: u64) -> Vec<Range<u64>> {
    let low = memory.min(LOW_RAM_END);
    [0..low, HIGH_RAM_START..HIGH_RAM_START + (memory - low)]
        .into_iter()
        .filter(|range| !range.is_empty())
        .collect()
}

/// RAM dealt out to the nodes: in order, in equal parts, a part split where it meets the hole.
pub fn numa_ram(memory: u64, topology: &Topology) -> Vec<RamRange> {
    let part = memory / u64::from(topology.nodes);
    let parts = (0..topology.nodes).flat_map(|node| {
        let bytes = u64::from(node) * part..u64::from(node + 1) * part;
        split_at_hole(bytes).into_iter().map(move |range| RamRange { range, node })
    });
    parts.collect()
}

/// Guest physical addresses of the bytes numbered `bytes` of RAM.
fn split_at_hole(bytes: Range<u64>) -> Vec<Range<u64>> {
    let shift = HIGH_RAM_START - LOW_RAM_END;
    let low = bytes.start.min(LOW_RAM_END)..bytes.end.min(LOW_RAM_END);
    let high = bytes.start.max(LOW_RAM_END) + shift..bytes.end.max(LOW_RAM_END) + shift;
    [low, high].into_iter().filter(|range| !range.is_empty()).collect()
}

/// 64-bit MMIO window of the PCI host bridge.
pub fn mmio64(memory: u64) -> Range<u64> {
    let ram_end = ram(memory).last().map_or(0, |range| range.end).max(HIGH_RAM_START);
    let start = ram_end.next_multiple_of(MMIO64_ALIGNMENT);
    start..start + MMIO64_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn nodes(nodes: u32) -> Topology {
        Topology { cpus: nodes, threads: 1, cores: 1, sockets: nodes, nodes }
    }

    #[test]
    fn ram_goes_round_the_hole() {
        assert!(ram(GIB).into_iter().eq(std::iter::once(0..GIB)));
        assert!(ram(3 * GIB).into_iter().eq(std::iter::once(0..3 * GIB)));
        assert_eq!(ram(5 * GIB), [0..3 * GIB, 4 * GIB..6 * GIB]);
        assert_eq!(mmio64(GIB).start, 4 * GIB);
        assert_eq!(mmio64(5 * GIB + (2 << 20)).start, 7 * GIB);
    }

    #[test]
    fn nodes_get_equal_parts() {
        let ranges = |memory, count| numa_ram(memory, &nodes(count)).into_iter().map(|r| (r.range, r.node));
        assert!(ranges(2 * GIB, 2).eq([(0..GIB, 0), (GIB..2 * GIB, 1)]));
        assert!(ranges(4 * GIB, 2).eq([(0..2 * GIB, 0), (2 * GIB..3 * GIB, 1), (4 * GIB..5 * GIB, 1)]));
        assert!(ranges(6 * GIB, 2).eq([(0..3 * GIB, 0), (4 * GIB..7 * GIB, 1)]));
    }
}
