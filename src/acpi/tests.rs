//! The tables, found and read as a guest would, and given to ACPICA's disassembler.

use std::process::Command;

use super::*;
use crate::config::Slot;
use crate::pci_host::plan::{Wish, plan};

struct Guest {
    topology: Topology,
    memory: GuestMemoryMmap,
    rsdp: GuestAddress,
}

impl Guest {
    fn new(topology: Topology, wishes: &[Wish]) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let bytes = 6 << 30;
        let (bridges, _) = plan(wishes, &layout::MMIO32, &layout::mmio64(bytes)).unwrap();
        let ram = layout::numa_ram(bytes, &topology);
        let rsdp = write(&memory, &Platform { topology: &topology, ram: &ram, bridges: &bridges }).unwrap();
        Self { topology, memory, rsdp }
    }

    fn read(&self, address: u64, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn table_at(&self, address: u64) -> Vec<u8> {
        let length = self.memory.read_obj::<u32>(GuestAddress(address + 4)).unwrap();
        self.read(address, length as usize)
    }

    /// All tables but RSDP and XSDT, by signature.
    fn tables(&self) -> Vec<(String, Vec<u8>)> {
        let rsdp = self.read(self.rsdp.0, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!(sum(&rsdp[..20]), 0);
        assert_eq!(sum(&rsdp), 0);
        assert!(self.rsdp.0.is_multiple_of(16));
        let xsdt = self.table_at(u64_at(&rsdp, 24));
        assert_eq!((&xsdt[..4], sum(&xsdt)), (b"XSDT".as_slice(), 0));
        let mut addresses: Vec<_> = xsdt[36..].chunks(8).map(|entry| u64_at(entry, 0)).collect();
        let fadt = self.table_at(addresses[0]);
        addresses.push(u64_at(&fadt, 140));
        let named = addresses.into_iter().map(|address| {
            let table = self.table_at(address);
            let signature = String::from_utf8_lossy(&table[..4]).into_owned();
            assert_eq!(sum(&table), 0, "checksum of {signature}");
            (signature, table)
        });
        named.collect()
    }

    fn table(&self, signature: &str) -> Vec<u8> {
        self.tables().into_iter().find(|(name, _)| name == signature).unwrap().1
    }

    /// Entries of a table made of `type, length, ...` structures, from byte `start`.
    fn entries(&self, signature: &str, start: usize) -> Vec<Vec<u8>> {
        let table = self.table(signature);
        let (mut rest, mut entries) = (&table[start..], Vec::new());
        while let [_, length, ..] = rest {
            let (entry, after) = rest.split_at(usize::from(*length));
            entries.push(entry.to_vec());
            rest = after;
        }
        entries
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn two_by_two_by_two() -> Topology {
    Topology { cpus: 8, threads: 2, cores: 2, sockets: 2, nodes: 2 }
}

fn wishes() -> [Wish; 3] {
    [
        Wish { node: None, slot: Slot::Root },
        Wish { node: Some(1), slot: Slot::Port },
        Wish { node: Some(0), slot: Slot::Port },
    ]
}

#[test]
fn madt_lists_cpus_ioapic_and_overrides() {
    let guest = Guest::new(two_by_two_by_two(), &[]);
    assert_eq!(u32_at(&guest.table("APIC"), 36), 0xfee0_0000);
    let entries = guest.entries("APIC", 44);
    let apic_ids: Vec<_> = entries.iter().filter(|entry| entry[0] == 0).map(|entry| entry[3]).collect();
    assert_eq!(apic_ids, [0, 1, 2, 3, 8, 9, 10, 11]);
    let rest: Vec<_> = entries.into_iter().filter(|entry| entry[0] != 0).collect();
    assert_eq!(rest[0], [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    assert_eq!(rest[1], [2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    assert_eq!(rest[2], [2, 10, 0, 9, 9, 0, 0, 0, 0b1101, 0]);
}

#[test]
fn large_apic_ids_are_x2apics() {
    let topology = Topology { cpus: 600, threads: 2, cores: 300, sockets: 1, nodes: 1 };
    let guest = Guest::new(topology, &[]);
    let entries = guest.entries("APIC", 44);
    let count = |kind| entries.iter().filter(|entry| entry[0] == kind).count();
    assert_eq!((count(0), count(9)), (255, 345));
    let last = entries.iter().rfind(|entry| entry[0] == 9).unwrap();
    assert_eq!((u32_at(last, 4), u32_at(last, 8), u32_at(last, 12)), (599, 1, 599));
    let affinities = guest.entries("SRAT", 48);
    let last = affinities.iter().rfind(|entry| entry[0] == 2).unwrap();
    assert_eq!((u32_at(last, 4), u32_at(last, 8)), (0, 599));
}

#[test]
fn srat_and_slit_deal_out_cpus_and_ram() {
    let guest = Guest::new(two_by_two_by_two(), &[]);
    let entries = guest.entries("SRAT", 48);
    let cpus: Vec<_> =
        entries.iter().filter(|entry| entry[0] == 0).map(|entry| (entry[2], entry[3])).collect();
    assert_eq!(cpus, [(0, 0), (0, 1), (0, 2), (0, 3), (1, 8), (1, 9), (1, 10), (1, 11)]);
    let ram: Vec<_> = entries
        .iter()
        .filter(|entry| entry[0] == 1)
        .map(|entry| (u32_at(entry, 2), u64_at(entry, 8), u64_at(entry, 16), u32_at(entry, 28)))
        .collect();
    assert_eq!(ram, [(0, 0, 3 << 30, 1), (1, 4 << 30, 3 << 30, 1)]);
    let slit = guest.table("SLIT");
    assert_eq!((u64_at(&slit, 36), &slit[44..]), (2, [10, 20, 20, 10].as_slice()));
}

#[test]
fn fadt_states_the_fixed_hardware() {
    let fadt = Guest::new(two_by_two_by_two(), &[]).table("FACP");
    let flags = u32_at(&fadt, 112);
    assert_eq!(flags >> 20 & 0b11, 0b10, "full hardware, suspend-to-idle");
    assert_eq!((flags >> 4 & 1, flags >> 6 & 1), (0, 0), "fixed power button, RTC alarm in the PM1 block");
    assert_eq!(flags >> 10 & 1, 1, "reset register");
    assert_eq!((u32_at(&fadt, 56), u32_at(&fadt, 64)), (0x600, 0x604));
    assert_eq!((u64_at(&fadt, 116 + 4), fadt[128]), (0x606, 1));
}

#[test]
fn mcfg_ends_with_the_last_bus() {
    let mcfg = Guest::new(two_by_two_by_two(), &wishes()).table("MCFG");
    assert_eq!((u64_at(&mcfg, 44), &mcfg[52..56]), (0xe000_0000, [0, 0, 0, 5].as_slice()));
}

#[test]
fn too_many_cpus_are_an_error() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let topology = Topology { cpus: 4000, threads: 1, cores: 4000, sockets: 1, nodes: 1 };
    let result = write(&memory, &Platform { topology: &topology, ram: &[], bridges: &[] });
    assert!(matches!(result, Err(Error::NoRoom)), "{result:?}");
}

#[test]
fn memory_without_the_bios_area_is_an_error() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0xe_0000)]).unwrap();
    let platform = Platform { topology: &two_by_two_by_two(), ram: &[], bridges: &[] };
    assert!(matches!(write(&memory, &platform), Err(Error::Memory(_))));
}

/// `iasl -d` of every table: `None` if there is no iasl here.
fn disassemble(guest: &Guest) -> Option<Vec<(String, String)>> {
    let folder = tempfile::tempdir().unwrap();
    let mut texts = Vec::new();
    for (signature, bytes) in guest.tables() {
        let file = folder.path().join(format!("{signature}.aml"));
        std::fs::write(&file, bytes).unwrap();
        let output = Command::new("iasl").arg("-d").arg(&file).output().ok()?;
        let text = std::fs::read_to_string(file.with_extension("dsl")).unwrap_or_default();
        assert!(output.status.success(), "{signature}: {}", String::from_utf8_lossy(&output.stderr));
        texts.push((signature, text));
    }
    Some(texts)
}

#[test]
fn acpica_understands_every_table() {
    let guest = Guest::new(two_by_two_by_two(), &wishes());
    let Some(texts) = disassemble(&guest) else {
        eprintln!("skipped: no iasl (Debian: acpica-tools)");
        return;
    };
    assert_eq!(texts.len(), 6);
    for (signature, text) in &texts {
        for trouble in ["Incorrect checksum", "Invalid", "Unknown", "**** Error"] {
            assert!(!text.contains(trouble), "{signature}: {trouble}\n{text}");
        }
    }
    let dsdt = &texts.iter().find(|(name, _)| name == "DSDT").unwrap().1;
    assert_eq!(dsdt.matches("\"ACPI0007\"").count(), guest.topology.cpus as usize);
    assert_eq!(dsdt.matches("EisaId (\"PNP0A08\")").count(), 3);
    assert_eq!(dsdt.matches("Name (_PXM").count(), 2);
    assert_eq!(dsdt.matches("Name (_SUN").count(), 2);
}
