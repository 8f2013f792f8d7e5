//! The MSI-X table as memory: what reads back, what starts masked, what a reset does to it.

use mana_device::config::DeviceConfig;
use mana_device::doors::MsiMessage;
use mana_test_driver::World;
use mana_test_driver::msix::Msix;
use mana_test_driver::pci::{COMMAND_MEMORY, Pci};

fn table_of(size: u16) -> (World, u16) {
    (World::new(DeviceConfig { msix_table_size: size, ..DeviceConfig::default() }, 2), size)
}

#[test]
fn every_size_has_all_its_entries_masked() {
    for size in [1, 2, 3, 8, 63, 64, 65, 256, 2048] {
        let (world, size) = table_of(size);
        Pci::new(&world).assign_bars();
        Pci::new(&world).update_command(COMMAND_MEMORY, 0);
        let msix = Msix::new(&world);
        assert_eq!(msix.size(), size);
        assert!((0..size).all(|vector| msix.masked(vector)), "{size} entries");
        assert_eq!(msix.flags(), (false, false));
    }
}

#[test]
fn entries_keep_what_is_written() {
    let (world, size) = table_of(64);
    let msix = Msix::new(&world);
    for vector in 0..size {
        msix.set_message(
            vector,
            MsiMessage { address: 0xffff_fee0_0000 | u64::from(vector) << 12, data: !u32::from(vector) },
        );
    }
    for vector in 0..size {
        assert_eq!(msix.read(vector, 8), !u32::from(vector));
        assert!(msix.masked(vector), "a message does not unmask");
    }
}

#[test]
fn an_entry_can_be_written_as_two_quadwords() {
    let world = World::default();
    let msix = Msix::new(&world);
    let (bar, offset) = msix.table();
    world.device.bar_write(bar, offset + 16 * 5, &0x1_fee0_1000_u64.to_le_bytes()).unwrap();
    world.device.bar_write(bar, offset + 16 * 5 + 8, &0x1_0000_4321_u64.to_le_bytes()).unwrap();
    assert_eq!([0, 4, 8].map(|at| msix.read(5, at)), [0xfee0_1000, 1, 0x4321]);
    assert!(msix.masked(5));
    let mut both = [0; 8];
    world.device.bar_read(bar, offset + 16 * 5, &mut both).unwrap();
    assert_eq!(u64::from_le_bytes(both), 0x1_fee0_1000);
}

#[test]
fn flags_are_stored_and_the_table_size_is_not_writable() {
    let world = World::default();
    let pci = Pci::new(&world);
    let msix = Msix::new(&world);
    let capability = pci.capability(mana_test_driver::pci::CAP_MSIX);
    for flags in [(true, true), (true, false), (false, true), (false, false)] {
        msix.set_flags(flags.0, flags.1);
        assert_eq!(msix.flags(), flags);
    }
    let _ = pci.write16(capability + 2, 0xffff);
    assert_eq!(pci.read16(capability + 2), 0xc03f);
    let places = (pci.read32(capability + 4), pci.read32(capability + 8));
    let _ = pci.write32(capability + 4, 0);
    let _ = pci.write32(capability + 8, 0);
    assert_eq!((pci.read32(capability + 4), pci.read32(capability + 8)), places);
}

#[test]
fn the_pending_bits_are_read_only() {
    let world = World::default();
    let msix = Msix::new(&world);
    let (bar, offset) = msix.pba();
    let _ = world.device.bar_write(bar, offset, &[0xff; 8]);
    assert!((0..64).all(|vector| !msix.pending(vector)));
}

#[test]
fn a_function_reset_masks_everything() {
    let world = World::default();
    let pci = Pci::new(&world);
    pci.assign_bars();
    pci.update_command(COMMAND_MEMORY, 0);
    let msix = Msix::new(&world);
    msix.enable(4);
    msix.set_mask(2, false);
    pci.flr();
    pci.assign_bars();
    assert_eq!(msix.flags(), (false, false));
    assert!((0..64).all(|vector| msix.masked(vector)));
}

#[test]
fn no_route_is_made_for_a_vector_that_stays_masked() {
    let world = World::default();
    Pci::new(&world).assign_bars();
    let msix = Msix::new(&world);
    msix.enable(8);
    assert!(world.interrupts.routes().is_empty());
}
