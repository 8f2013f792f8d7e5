//! SRAT and SLIT: which CPUs and which RAM belong to a NUMA node, and how far the nodes are apart.

use acpi_tables::sdt::Sdt;
use acpi_tables::slit::SLIT;
use acpi_tables::srat::MemoryAffinity;
use acpi_tables::{Aml, AmlSink, aml_as_bytes};
use zerocopy::little_endian::U32;
use zerocopy::{Immutable, IntoBytes};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, Platform, table};
use crate::config::Topology;
use crate::topology::{self, MAX_XAPIC_ID};

/// Distance to another node; to itself it is 10 (ACPI 5.2.17).
const REMOTE_DISTANCE: u8 = 20;
const ENABLED: u32 = 1;

/// SRAT. It is there for one node, too: without it Linux knows no node to put a PCI function on.
pub(super) fn srat(platform: &Platform<'_>) -> Sdt {
    let mut body = Vec::new();
    body.dword(1);
    body.qword(0);
    for cpu in 0..platform.topology.cpus {
        cpu_affinity(platform.topology, cpu).to_aml_bytes(&mut body);
    }
    for ram in platform.ram {
        let length = ram.range.end - ram.range.start;
        MemoryAffinity::new(ram.node, ram.range.start, length).enabled().to_aml_bytes(&mut body);
    }
    table(*b"SRAT", 3, &body)
}

/// SLIT: every node is as far from every other.
pub(super) fn slit(topology: &Topology) -> SLIT {
    let mut slit = SLIT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, topology.nodes);
    for a in 0..topology.nodes as usize {
        for b in 0..a {
            slit.set_distance(a, b, REMOTE_DISTANCE);
        }
    }
    slit
}

fn cpu_affinity(topology: &Topology, cpu: u32) -> Box<dyn Aml> {
    let (node, apic_id) = (topology::node(topology, cpu), topology::apic_id(topology, cpu));
    match u8::try_from(apic_id) {
        Ok(id) if apic_id <= MAX_XAPIC_ID => Box::new(ApicAffinity::new(node, id)),
        _ => Box::new(X2ApicAffinity::new(node, apic_id)),
    }
}

/// Processor Local APIC/SAPIC Affinity Structure (ACPI 5.2.16.1).
#[repr(C, packed)]
#[derive(Clone, Copy, IntoBytes, Immutable)]
struct ApicAffinity {
    kind: u8,
    length: u8,
    node_low: u8,
    apic_id: u8,
    flags: U32,
    sapic_eid: u8,
    node_high: [u8; 3],
    clock_domain: U32,
}

impl ApicAffinity {
    fn new(node: u32, apic_id: u8) -> Self {
        let [node_low, node_high @ ..] = node.to_le_bytes();
        Self {
            kind: 0,
            length: size_of::<Self>() as u8,
            node_low,
            apic_id,
            flags: ENABLED.into(),
            sapic_eid: 0,
            node_high,
            clock_domain: U32::ZERO,
        }
    }
}

/// Processor Local x2APIC Affinity Structure (ACPI 5.2.16.3).
#[repr(C, packed)]
#[derive(Clone, Copy, IntoBytes, Immutable)]
struct X2ApicAffinity {
    kind: u8,
    length: u8,
    reserved: [u8; 2],
    node: U32,
    x2apic_id: U32,
    flags: U32,
    clock_domain: U32,
    reserved_end: [u8; 4],
}

impl X2ApicAffinity {
    fn new(node: u32, x2apic_id: u32) -> Self {
        Self {
            kind: 2,
            length: size_of::<Self>() as u8,
            reserved: [0; 2],
            node: node.into(),
            x2apic_id: x2apic_id.into(),
            flags: ENABLED.into(),
            clock_domain: U32::ZERO,
            reserved_end: [0; 4],
        }
    }
}

aml_as_bytes!(ApicAffinity);
aml_as_bytes!(X2ApicAffinity);
