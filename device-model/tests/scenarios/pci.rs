//! The function as the PCI core finds it.

use mana_device::config::{BarLocation, DeviceConfig};
use mana_test_driver::World;
use mana_test_driver::pci::{self, CAP_MSIX, CAP_PCIE, Pci};

#[test]
fn it_is_microsofts_virtual_function() {
    let world = World::default();
    let pci = Pci::new(&world);
    assert_eq!(pci.read16(pci::VENDOR_ID), 0x1414);
    assert_eq!(pci.read16(pci::DEVICE_ID), 0x00ba);
    assert_eq!(pci.read32(0), 0x00ba_1414);
    assert_eq!(pci.read16(0x0a), 0x0200, "class: Ethernet");
    assert_eq!(pci.read8(0x0e) & 0x7f, 0, "header type 0");
    assert_eq!(pci.read8(0x3d), 0, "no interrupt pin");
}

#[test]
fn identity_does_not_take_writes() {
    let world = World::default();
    let pci = Pci::new(&world);
    let before: Vec<u32> = [0, 8, 0x2c].map(|at| pci.read32(at)).into();
    for at in [0, 8, 0x2c] {
        let _ = pci.write32(at, u32::MAX);
    }
    assert_eq!(before, [0, 8, 0x2c].map(|at| pci.read32(at)));
}

#[test]
fn it_has_msix_and_pcie() {
    let world = World::default();
    let pci = Pci::new(&world);
    let (msix, pcie) = (pci.capability(CAP_MSIX), pci.capability(CAP_PCIE));
    assert_eq!(pci.read16(msix + 2) & 0x7ff, 63, "64 entries");
    assert_eq!(pci.read16(pcie + 2) & 0xf, 2, "capability version 2");
    assert_eq!(pci.read16(pcie + 2) >> 4 & 0xf, 0, "an endpoint");
    assert_ne!(pci.read32(pcie + 4) & 1 << 28, 0, "it can do FLR");
}

#[test]
fn every_offset_and_size_can_be_read() {
    let world = World::default();
    for offset in 0..4096_u16 {
        for size in [1, 2, 4] {
            world.device.config_read(offset, &mut vec![0; size]);
        }
    }
}

#[test]
fn bars_are_sized_placed_and_moved() {
    let world = World::default();
    let pci = Pci::new(&world);
    let bars = pci.assign_bars();
    assert!(bars.iter().any(|bar| bar.index == 0 && bar.size >= 128 * 4096), "BAR0 holds its doorbell pages");
    for (i, bar) in (1..).zip(&bars) {
        pci.move_bar(*bar, 0x1000_0000_0000 * i);
    }
    assert!(!world.device.memory_enabled(), "memory decoding starts off");
    pci.update_command(pci::COMMAND_MEMORY, 0);
    assert!(world.device.memory_enabled());
    pci.update_command(0, pci::COMMAND_MEMORY);
    assert!(!world.device.memory_enabled());
}

#[test]
fn the_command_register_keeps_what_the_function_has() {
    let world = World::default();
    let pci = Pci::new(&world);
    assert_eq!(pci.read16(pci::COMMAND) & (pci::COMMAND_MEMORY | pci::COMMAND_MASTER), 0);
    pci.update_command(pci::COMMAND_MEMORY | pci::COMMAND_MASTER, 0);
    assert_eq!(pci.read16(pci::COMMAND) & 7, pci::COMMAND_MEMORY | pci::COMMAND_MASTER);
}

#[test]
fn an_access_that_hits_nothing_reads_as_all_ones() {
    let world = World::default();
    let mut data = [0; 4];
    assert!(world.device.bar_read(2, 0x100, &mut data).is_err());
    assert_eq!(data, [0xff; 4]);
    assert!(world.device.bar_read(0, 1 << 40, &mut data).is_err());
    assert_eq!(data, [0xff; 4]);
    assert!(world.device.bar_write(0, 1 << 40, &[0; 8]).is_err());
}

#[test]
fn the_register_block_is_the_interfaces() {
    let config = DeviceConfig { doorbell_pages: 7, ..DeviceConfig::default() };
    let world = World::new(config, 2);
    let pci = Pci::new(&world);
    let bars = pci.assign_bars();
    let read = |offset: u64, size: usize| {
        let mut data = [0; 8];
        world.device.bar_read(0, offset, &mut data[..size]).unwrap();
        u64::from_le_bytes(data)
    };
    let (doorbells, page, shm) = (read(0x08, 8), read(0x10, 4) & 0xffff, read(0x18, 8));
    assert_eq!(doorbells % 4096, 0, "pages can be mapped");
    assert!((4096..=32768).contains(&page) && page.is_power_of_two());
    assert!(doorbells + 7 * page <= bars[0].size);
    assert!(shm % 4 == 0 && shm + 32 <= bars[0].size);
    assert_eq!(read(0x08, 4) | read(0x0c, 4) << 32, doorbells, "two halves make the whole");
    assert_eq!(read(0x18, 4) | read(0x1c, 4) << 32, shm);
    assert_ne!(read(0x00, 4), 0xffff_ffff, "all ones would mean that the device is gone");
}

#[test]
fn the_table_may_lie_anywhere() {
    for (table, pba) in [((0, 0x1000), (0, 0x8000)), ((2, 0x2000), (4, 0x18)), ((4, 0x1000), (4, 0x2000))] {
        let config = DeviceConfig {
            msix_table: BarLocation { bar: table.0, offset: table.1 },
            msix_pba: BarLocation { bar: pba.0, offset: pba.1 },
            msix_table_size: 33,
            ..DeviceConfig::default()
        };
        let world = World::new(config, 2);
        Pci::new(&world).assign_bars();
        let msix = mana_test_driver::msix::Msix::new(&world);
        assert_eq!(msix.table(), (table.0, u64::from(table.1)));
        assert_eq!(msix.pba(), (pba.0, u64::from(pba.1)));
        assert_eq!(msix.size(), 33);
        assert!((0..33).all(|vector| msix.masked(vector) && !msix.pending(vector)));
    }
}
