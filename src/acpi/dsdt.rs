//! DSDT: the devices that can't be probed for, in AML.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If,
    Interrupt, Memory32Fixed, Method, Name, Or, Package, Path, ResourceTemplate, Return, Scope, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{Platform, bytes_of, table};
use crate::layout;
use crate::pci_host::plan::{HostBridge, RootPort};

/// The whole table.
pub(super) fn dsdt(platform: &Platform<'_>) -> Sdt {
    let mut devices = Vec::new();
    for cpu in 0..platform.topology.cpus {
        devices.extend(processor(cpu));
    }
    for (index, bridge) in (0..).zip(platform.bridges) {
        devices.extend(host_bridge(index, bridge));
    }
    devices.extend(ecam_reservation());
    devices.extend(legacy_device(
        "COM1",
        &EISAName::new("PNP0501"),
        layout::SERIAL_PORT,
        8,
        Some(layout::SERIAL_GSI),
    ));
    devices.extend(legacy_device(
        "RTC0",
        &EISAName::new("PNP0B00"),
        layout::RTC_PORT,
        2,
        Some(layout::RTC_GSI),
    ));
    devices.extend(legacy_device("PVPN", &"QEMU0001", layout::PVPANIC_PORT, 1, None));

    let mut body = Scope::raw("_SB_".into(), devices);
    let sleep_type = layout::S5_SLEEP_TYPE;
    Name::new("_S5_".into(), &Package::new(vec![&sleep_type, &sleep_type, &ZERO, &ZERO]))
        .to_aml_bytes(&mut body);
    table(*b"DSDT", 2, &body)
}

/// Processor `cpu`; its `_UID` is the one in the MADT.
fn processor(cpu: u32) -> Vec<u8> {
    let name = format!("C{cpu:03X}");
    let id = Name::new("_HID".into(), &"ACPI0007");
    let uid = Name::new("_UID".into(), &cpu);
    bytes_of(&Device::new(Path::new(&name), vec![&id, &uid]))
}

/// A device at fixed I/O ports, perhaps with an ISA interrupt.
fn legacy_device(name: &str, hid: &dyn Aml, port: u16, ports: u8, gsi: Option<u32>) -> Vec<u8> {
    let hid = Name::new("_HID".into(), hid);
    let uid = Name::new("_UID".into(), &ZERO);
    let io = IO::new(port, port, 1, ports);
    let interrupt = gsi.map(|gsi| Interrupt::new(true, true, false, false, gsi));
    let mut resources: Vec<&dyn Aml> = vec![&io];
    resources.extend(interrupt.as_ref().map(|interrupt| interrupt as &dyn Aml));
    let crs = Name::new("_CRS".into(), &ResourceTemplate::new(resources));
    bytes_of(&Device::new(name.into(), vec![&hid, &uid, &crs]))
}

/// Linux uses ECAM only where a motherboard resource claims it (`pci_mmcfg_reject_broken`).
fn ecam_reservation() -> Vec<u8> {
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0C02"));
    let uid = Name::new("_UID".into(), &ZERO);
    let size = layout::ECAM.end - layout::ECAM.start;
    let ecam = Memory32Fixed::new(true, layout::ECAM.start as u32, size as u32);
    let crs = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam]));
    bytes_of(&Device::new("ECAM".into(), vec![&hid, &uid, &crs]))
}

/// A PCI Express host bridge with its windows, NUMA node and root ports.
fn host_bridge(index: u8, bridge: &HostBridge) -> Vec<u8> {
    let root_bus = *bridge.buses.start();
    let mut children = Vec::new();
    let mut add = |object: &dyn Aml| object.to_aml_bytes(&mut children);
    add(&Name::new("_HID".into(), &EISAName::new("PNP0A08")));
    add(&Name::new("_CID".into(), &EISAName::new("PNP0A03")));
    add(&Name::new("_UID".into(), &index));
    add(&Name::new("_SEG".into(), &ZERO));
    add(&Name::new("_BBN".into(), &root_bus));
    if let Some(node) = bridge.node {
        add(&Name::new("_PXM".into(), &node));
    }
    add(&Name::new("_CRS".into(), &windows(index, bridge)));
    add(&osc());
    for port in &bridge.ports {
        add(&root_port(port));
    }
    bytes_of(&Device::new(Path::new(&format!("PC{index:02X}")), vec![&Raw(children)]))
}

/// `_CRS` of a host bridge. No I/O ports but the configuration mechanism's, which bus 0 owns.
fn windows(index: u8, bridge: &HostBridge) -> Raw {
    let (buses, mmio32, mmio64) = (&bridge.buses, &bridge.mmio32, &bridge.mmio64);
    let buses = AddressSpace::new_bus_number(u16::from(*buses.start()), u16::from(*buses.end()));
    let config = IO::new(layout::PCI_CONFIG_PORT, layout::PCI_CONFIG_PORT, 1, 8);
    let low = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        mmio32.start as u32,
        (mmio32.end - 1) as u32,
        None,
    );
    let high = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        mmio64.start,
        mmio64.end - 1,
        None,
    );
    let mut resources: Vec<&dyn Aml> = vec![&buses, &low, &high];
    if index == 0 {
        resources.push(&config);
    }
    Raw(bytes_of(&ResourceTemplate::new(resources)))
}

/// `_OSC` for PCI host bridges (PCI firmware specification, 4.5.1): the guest may control the PCI Express capability
/// structures; hot-plug, PME and AER, which no port has, stay with the platform.
fn osc() -> Raw {
    const PCIE_CAPABILITY_CONTROL: u32 = 1 << 4;
    const UNRECOGNISED_UUID: u32 = 1 << 2;

    let status = Path::new("CDW1");
    let control = Path::new("CDW3");
    let uuid = Uuid::new("33DB4D5B-1FF7-401C-9657-7441C03DD766");
    Raw(bytes_of(&Method::new(
        "_OSC".into(),
        4,
        true,
        vec![
            &CreateDWordField::new(&status, &Arg(3), &ZERO),
            &If::new(
                &Equal::new(&Arg(0), &uuid),
                vec![
                    &CreateDWordField::new(&control, &Arg(3), &8u8),
                    &And::new(&control, &control, &PCIE_CAPABILITY_CONTROL),
                ],
            ),
            &Else::new(vec![&Or::new(&status, &status, &UNRECOGNISED_UUID)]),
            &Return::new(&Arg(3)),
        ],
    )))
}

/// A root port and the slot behind it. Linux makes a slot for each device with `_SUN` (`acpi_pci_slot_enumerate`),
/// hot-plug or not; drivers that ask for their function's slot find this one.
fn root_port(port: &RootPort) -> Raw {
    let slot_address = Name::new("_ADR".into(), &ZERO);
    let slot_number = Name::new("_SUN".into(), &port.slot);
    let slot = Device::new("SLOT".into(), vec![&slot_address, &slot_number]);
    let address = Name::new("_ADR".into(), &(u32::from(port.device) << 16));
    let name = format!("RP{:02X}", port.device);
    Raw(bytes_of(&Device::new(Path::new(&name), vec![&address, &slot])))
}

/// AML that is made already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}
