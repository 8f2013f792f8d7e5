//! Who sits where: host bridges, root ports and functions, before the guest has a say.
//!
//! Linux takes a function's NUMA node from the host bridge that it hangs below (`_PXM`, read by `pci_acpi_scan_root`),
//! so that there is a host bridge for each node that functions ask for, besides the one at bus 0, which belongs to
//! no node. All share one segment, and each has its part of the bus numbers and of both MMIO windows.

use std::ops::{Range, RangeInclusive};

use crate::config::Slot;

/// Device numbers of a root bus: 0 is the host bridge's own function.
const DEVICES: RangeInclusive<u8> = 1..=31;
/// A bridge's share of a window starts and ends at a multiple of this, as PCI bridges' windows do.
const WINDOW_ALIGNMENT: u64 = 1 << 20;

/// Where a function would like to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// NUMA node.
    pub node: Option<u32>,
    /// On the root bus, or behind a root port of its own.
    pub slot: Slot,
}

/// Where a function is, or the root port that it is behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat {
    /// Index of the host bridge.
    pub bridge: usize,
    /// Device number on the root bus.
    pub device: u8,
}

/// A root port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RootPort {
    /// Device number on the root bus.
    pub device: u8,
    /// Bus number behind it, as firmware sets it.
    pub bus: u8,
    /// Physical slot number, unique in the machine.
    pub slot: u16,
}

/// A host bridge and what it decodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostBridge {
    /// NUMA node of all that is below it.
    pub node: Option<u32>,
    /// Bus numbers; the first is the root bus.
    pub buses: RangeInclusive<u8>,
    /// Its part of the 32-bit MMIO window.
    pub mmio32: Range<u64>,
    /// Its part of the 64-bit MMIO window.
    pub mmio64: Range<u64>,
    /// Root ports, each with one slot.
    pub ports: Vec<RootPort>,
}

/// More devices than a node's host bridge has places for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "--device: a NUMA node has room for {most} PCI devices on this machine; leave some out or spread them over nodes"
)]
pub struct TooManyDevices {
    /// What there is room for.
    pub most: usize,
}

/// Seat all functions; the seats come in the order of `wishes`.
///
/// # Errors
/// [`TooManyDevices`].
pub fn plan(
    wishes: &[Wish],
    mmio32: &Range<u64>,
    mmio64: &Range<u64>,
) -> Result<(Vec<HostBridge>, Vec<Seat>), TooManyDevices> {
    let nodes = nodes(wishes);
    let buses = buses(wishes, &nodes)?;
    let mut bridges: Vec<_> = (0..nodes.len())
        .map(|index| HostBridge {
            node: nodes[index],
            buses: buses[index].clone(),
            mmio32: share(mmio32, index, nodes.len()),
            mmio64: share(mmio64, index, nodes.len()),
            ports: Vec::new(),
        })
        .collect();
    let mut taken = vec![0; bridges.len()];
    let mut seats = Vec::new();
    for (slot, wish) in (1..).zip(wishes) {
        let index = nodes.iter().position(|&node| node == wish.node).unwrap_or(0);
        let bridge = &mut bridges[index];
        let most = DEVICES.len();
        if taken[index] == most {
            return Err(TooManyDevices { most });
        }
        let device = DEVICES.start() + taken[index] as u8;
        taken[index] += 1;
        if wish.slot == Slot::Port {
            let bus = bridge.buses.start() + 1 + bridge.ports.len() as u8;
            bridge.ports.push(RootPort { device, bus, slot });
        }
        seats.push(Seat { bridge: index, device });
    }
    Ok((bridges, seats))
}

/// The nodes that need a host bridge: none first, then each that is wished for.
fn nodes(wishes: &[Wish]) -> Vec<Option<u32>> {
    let mut nodes: Vec<_> = wishes.iter().map(|wish| wish.node).chain([None]).collect();
    nodes.sort_unstable();
    nodes.dedup();
    nodes
}

/// Bus numbers of each bridge: the root bus, and one more for every function.
fn buses(wishes: &[Wish], nodes: &[Option<u32>]) -> Result<Vec<RangeInclusive<u8>>, TooManyDevices> {
    let mut next = 0;
    let mut buses = Vec::new();
    for node in nodes {
        let functions = wishes.iter().filter(|wish| wish.node == *node).count();
        let last = u8::try_from(next + functions).map_err(|_| TooManyDevices { most: DEVICES.len() })?;
        buses.push(next as u8..=last);
        next += functions + 1;
    }
    Ok(buses)
}

/// Part `index` of `count` of a window.
fn share(window: &Range<u64>, index: usize, count: usize) -> Range<u64> {
    let each = (window.end - window.start) / count as u64 / WINDOW_ALIGNMENT * WINDOW_ALIGNMENT;
    let start = window.start + index as u64 * each;
    start..start + each
}

#[cfg(test)]
mod tests {
    use super::*;

    const MMIO32: Range<u64> = 0xc000_0000..0xe000_0000;
    const MMIO64: Range<u64> = 0x1_0000_0000..0x5_0000_0000;

    fn wish(node: Option<u32>, slot: Slot) -> Wish {
        Wish { node, slot }
    }

    #[test]
    fn bus_0_is_there_without_functions() {
        let (bridges, seats) = plan(&[], &MMIO32, &MMIO64).unwrap();
        let all = HostBridge { node: None, buses: 0..=0, mmio32: MMIO32, mmio64: MMIO64, ports: Vec::new() };
        assert_eq!((bridges, seats), (vec![all], Vec::new()));
    }

    #[test]
    fn each_node_has_its_host_bridge() {
        let wishes = [wish(Some(1), Slot::Port), wish(None, Slot::Root), wish(Some(1), Slot::Root)];
        let (bridges, seats) = plan(&wishes, &MMIO32, &MMIO64).unwrap();
        assert_eq!(bridges.iter().map(|bridge| bridge.node).collect::<Vec<_>>(), [None, Some(1)]);
        assert_eq!((&bridges[0].buses, &bridges[1].buses), (&(0..=1), &(2..=4)));
        assert_eq!(bridges[1].mmio32, 0xd000_0000..0xe000_0000);
        assert_eq!(bridges[0].ports, []);
        assert_eq!(bridges[1].ports, [RootPort { device: 1, bus: 3, slot: 1 }]);
        let seat = |bridge, device| Seat { bridge, device };
        assert_eq!(seats, [seat(1, 1), seat(0, 1), seat(1, 2)]);
    }

    #[test]
    fn a_root_bus_has_31_places() {
        let wishes = [wish(Some(0), Slot::Port); 31];
        let (bridges, _) = plan(&wishes, &MMIO32, &MMIO64).unwrap();
        assert_eq!(bridges[1].ports.last(), Some(&RootPort { device: 31, bus: 32, slot: 31 }));
        let wishes = [wish(Some(0), Slot::Port); 32];
        assert_eq!(plan(&wishes, &MMIO32, &MMIO64), Err(TooManyDevices { most: 31 }));
    }

    #[test]
    fn windows_are_shared_out_in_whole_mebibytes() {
        let wishes = [wish(Some(0), Slot::Root), wish(Some(1), Slot::Root)];
        let (bridges, _) = plan(&wishes, &MMIO32, &MMIO64).unwrap();
        for bridge in &bridges {
            assert!(bridge.mmio32.start.is_multiple_of(1 << 20) && bridge.mmio64.end.is_multiple_of(1 << 20));
        }
        assert_eq!(bridges[1].mmio32, 0xca_a0_00_00..0xd5_40_00_00);
    }
}
