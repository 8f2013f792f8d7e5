//! MADT: local APICs, the I/O APIC, and how ISA interrupts reach it.

use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink, aml_as_bytes};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes};

use super::table;
use crate::config::Topology;
use crate::layout;
use crate::topology::{self, MAX_XAPIC_ID};

/// The whole table.
pub(super) fn madt(topology: &Topology) -> Sdt {
    const PCAT_COMPATIBLE: u32 = 1;

    let mut body = Vec::new();
    body.extend_from_slice(&(layout::LOCAL_APIC as u32).to_le_bytes());
    body.extend_from_slice(&PCAT_COMPATIBLE.to_le_bytes());
    for cpu in 0..topology.cpus {
        local_apic(cpu, topology::apic_id(topology, cpu)).to_aml_bytes(&mut body);
    }
    IoApic::new(0, layout::IOAPIC as u32, 0).to_aml_bytes(&mut body);
    SourceOverride::new(0, 2, SourceOverride::CONFORMING).to_aml_bytes(&mut body);
    SourceOverride::new(layout::SCI_GSI as u8, layout::SCI_GSI, SourceOverride::LEVEL_HIGH)
        .to_aml_bytes(&mut body);
    LocalApicNmi::ALL_LINT1.to_aml_bytes(&mut body);
    LocalX2ApicNmi::ALL_LINT1.to_aml_bytes(&mut body);
    table(*b"APIC", 4, &body)
}

fn local_apic(cpu: u32, apic_id: u32) -> Box<dyn Aml> {
    match (u8::try_from(cpu), u8::try_from(apic_id)) {
        (Ok(uid), Ok(id)) if apic_id <= MAX_XAPIC_ID => {
            Box::new(ProcessorLocalApic::new(uid, id, EnabledStatus::Enabled))
        }
        _ => Box::new(LocalX2Apic::new(cpu, apic_id)),
    }
}

/// Processor Local x2APIC Structure (ACPI 5.2.12.12).
#[repr(C, packed)]
#[derive(Clone, Copy, IntoBytes, Immutable)]
struct LocalX2Apic {
    kind: u8,
    length: u8,
    reserved: U16,
    x2apic_id: U32,
    flags: U32,
    uid: U32,
}

impl LocalX2Apic {
    fn new(uid: u32, x2apic_id: u32) -> Self {
        let flags = EnabledStatus::Enabled as u32;
        Self {
            kind: 9,
            length: size_of::<Self>() as u8,
            reserved: U16::ZERO,
            x2apic_id: x2apic_id.into(),
            flags: flags.into(),
            uid: uid.into(),
        }
    }
}

/// Interrupt Source Override Structure (ACPI 5.2.12.5).
#[repr(C, packed)]
#[derive(Clone, Copy, IntoBytes, Immutable)]
struct SourceOverride {
    kind: u8,
    length: u8,
    bus: u8,
    source: u8,
    gsi: U32,
    flags: U16,
}

impl SourceOverride {
    const CONFORMING: u16 = 0;
    const LEVEL_HIGH: u16 = 0b1101;

    fn new(source: u8, gsi: u32, flags: u16) -> Self {
        Self {
            kind: 2,
            length: size_of::<Self>() as u8,
            bus: 0,
            source,
            gsi: gsi.into(),
            flags: flags.into(),
        }
    }
}

/// Local APIC NMI Structure (ACPI 5.2.12.7).
#[repr(C, packed)]
#[derive(Clone, Copy, IntoBytes, Immutable)]
struct LocalApicNmi {
    kind: u8,
    length: u8,
    uid: u8,
    flags: U16,
    lint: u8,
}

impl LocalApicNmi {
    const ALL_LINT1: Self =
        Self { kind: 4, length: size_of::<Self>() as u8, uid: u8::MAX, flags: U16::ZERO, lint: 1 };
}

/// Local x2APIC NMI Structure (ACPI 5.2.12.13).
#[repr(C, packed)]
#[derive(Clone, Copy, IntoBytes, Immutable)]
struct LocalX2ApicNmi {
    kind: u8,
    length: u8,
    flags: U16,
    uid: U32,
    lint: u8,
    reserved: [u8; 3],
}

impl LocalX2ApicNmi {
    const ALL_LINT1: Self = Self {
        kind: 10,
        length: size_of::<Self>() as u8,
        flags: U16::ZERO,
        uid: U32::MAX_VALUE,
        lint: 1,
        reserved: [0; 3],
    };
}

aml_as_bytes!(LocalX2Apic);
aml_as_bytes!(SourceOverride);
aml_as_bytes!(LocalApicNmi);
aml_as_bytes!(LocalX2ApicNmi);
