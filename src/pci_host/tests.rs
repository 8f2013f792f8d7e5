//! The host bridges as a guest's kernel uses them, and as a hostile guest does.

use std::sync::atomic::AtomicU32 as Counter;

use mana_device::{AccessError, Bar, ConfigEffect};
use proptest::prelude::*;

use super::*;
use crate::config::Slot;

const MMIO64: Range<u64> = 0x1_0000_0000..0x5_0000_0000;
const ECAM: MmioAddress = MmioAddress(layout::ECAM.start);
const PORTS: PioAddress = PioAddress(layout::PCI_CONFIG_PORT);

const VENDOR: u32 = 0x00ba_1414;
const BAR_SIZES: [(u8, u64, bool); 3] = [(0, 0x20_0000, true), (2, 0x1000, false), (4, 0x1_0000, true)];

/// A function with 64-bit BARs, each of which is RAM of 8 bytes that repeat.
struct Fake {
    config: Mutex<ConfigSpace>,
    cells: Mutex<[u64; 6]>,
    resets: Counter,
}

impl Fake {
    fn new() -> Arc<Self> {
        let fake =
            Self { config: Mutex::new(ConfigSpace::new()), cells: Mutex::default(), resets: Counter::new(0) };
        fake.power_on();
        Arc::new(fake)
    }

    fn power_on(&self) {
        let mut config = ConfigSpace::new();
        config.set_u32(0, VENDOR);
        config.allow_u16(4, 0x0406);
        for (bar, size, prefetchable) in BAR_SIZES {
            let register = 0x10 + 4 * usize::from(bar);
            config.set_u32(register, if prefetchable { 0xc } else { 0x4 });
            config.allow_u32(register, !(size as u32 - 1));
            config.allow_u32(register + 4, u32::MAX);
        }
        *self.config.lock().unwrap() = config;
    }

    fn layout(&self) -> (bool, Vec<Bar>) {
        (self.memory_enabled(), self.bars())
    }
}

impl PciFunction for Fake {
    fn config_read(&self, register: u16, data: &mut [u8]) {
        assert!(matches!(data.len(), 1 | 2 | 4) && usize::from(register).is_multiple_of(data.len()));
        self.config.lock().unwrap().read(register, data);
    }

    fn config_write(&self, register: u16, data: &[u8]) -> ConfigEffect {
        assert!(matches!(data.len(), 1 | 2 | 4) && usize::from(register).is_multiple_of(data.len()));
        let before = self.layout();
        self.config.lock().unwrap().write(register, data);
        ConfigEffect { bars_changed: before != self.layout() }
    }

    fn bars(&self) -> Vec<Bar> {
        let config = self.config.lock().unwrap();
        let bars = BAR_SIZES.into_iter().map(|(index, size, prefetchable)| {
            let register = 0x10 + 4 * usize::from(index);
            let address = u64::from(config.u32(register) & !0xf) | u64::from(config.u32(register + 4)) << 32;
            Bar { index, address, size, prefetchable }
        });
        bars.collect()
    }

    fn memory_enabled(&self) -> bool {
        self.config.lock().unwrap().u16(4) & 2 != 0
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let size = self.bars().into_iter().find(|found| found.index == bar).unwrap().size;
        assert!(offset + data.len() as u64 <= size);
        let cell = self.cells.lock().unwrap()[usize::from(bar)].to_le_bytes();
        data.iter_mut().zip(cell.iter().cycle().skip(offset as usize % 8)).for_each(|(to, from)| *to = *from);
        Ok(())
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        match <[u8; 8]>::try_from(data) {
            Ok(cell) => self.cells.lock().unwrap()[usize::from(bar)] = u64::from_le_bytes(cell),
            Err(_) => return Err(AccessError { bar, offset, size: data.len() }),
        }
        Ok(())
    }

    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
        self.power_on();
    }
}

fn host(wishes: &[(Option<u32>, Slot)]) -> (PciHost, Vec<Arc<Fake>>) {
    let fakes: Vec<_> = wishes.iter().map(|_| Fake::new()).collect();
    let functions = wishes.iter().zip(&fakes).map(|(&(node, slot), fake)| {
        let function: Arc<dyn PciFunction> = fake.clone();
        (Wish { node, slot }, function)
    });
    (PciHost::new(&MMIO64, functions.collect()).unwrap(), fakes)
}

fn ecam(bus: u64, device: u64, register: u64) -> u64 {
    bus << 20 | device << 15 | register
}

impl PciHost {
    fn read32(&self, bus: u64, device: u64, register: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio_read(ECAM, ecam(bus, device, register), &mut data);
        u32::from_le_bytes(data)
    }

    fn write32(&self, bus: u64, device: u64, register: u64, value: u32) {
        self.mmio_write(ECAM, ecam(bus, device, register), &value.to_le_bytes());
    }

    fn write_window(&self, address: u64, data: &[u8]) {
        self.mmio_write(MmioAddress(MMIO64.start), address.wrapping_sub(MMIO64.start), data);
    }

    fn read_window(&self, address: u64) -> u64 {
        let mut data = [0; 8];
        self.mmio_read(MmioAddress(MMIO64.start), address.wrapping_sub(MMIO64.start), &mut data);
        u64::from_le_bytes(data)
    }

    /// Address in a BAR, as the guest reads it.
    fn bar(&self, bus: u64, device: u64, bar: u64) -> u64 {
        let register = 0x10 + 4 * bar;
        u64::from(self.read32(bus, device, register) & !0xf)
            | u64::from(self.read32(bus, device, register + 4)) << 32
    }
}

#[test]
fn a_function_on_the_root_bus_is_found_and_mapped() {
    let (host, fakes) = host(&[(None, Slot::Root)]);
    assert_eq!(host.read32(0, 0, 0), 0x0008_1b36);
    assert_eq!(host.read32(0, 0, 8) >> 16, 0x0600);
    assert_eq!(host.read32(0, 1, 0), VENDOR);
    assert_eq!(host.read32(0, 2, 0), u32::MAX);
    let bar = host.bar(0, 1, 0);
    assert!(MMIO64.contains(&bar) && bar.is_multiple_of(0x20_0000));
    host.write_window(bar, &[1; 8]);
    assert_eq!(host.read_window(bar), u64::MAX, "memory decoding is off until the guest turns it on");
    host.write32(0, 1, 4, 2);
    host.write_window(bar + 0x1f_fff8, &7u64.to_le_bytes());
    assert_eq!(host.read_window(bar), 7);
    assert_eq!(fakes[0].cells.lock().unwrap()[0], 7);
}

#[test]
fn a_function_behind_a_port_has_a_bus_a_slot_and_windows() {
    let (host, _) = host(&[(None, Slot::Port)]);
    assert_eq!(host.read32(0, 1, 0), 0x000c_1b36);
    assert_eq!(host.read32(0, 1, 0x0c) >> 16 & 0xff, 1, "type 1 header");
    assert_eq!(host.read32(0, 1, 0x18), 0x0001_0100, "primary 0, secondary 1, subordinate 1");
    assert_eq!(host.read32(0, 1, 0x1c), 0x00f0, "closed I/O window");
    assert_eq!(host.read32(0, 1, 0x34), 0x40);
    assert_eq!(host.read32(0, 1, 0x40), 0x0142_0010, "PCI Express, root port, slot implemented");
    assert_eq!(host.read32(0, 1, 0x54) >> 19, 1, "slot 1");
    assert_eq!(host.read32(0, 1, 0x54) & 0x7f, 0, "no hot-plug");
    assert_eq!(host.read32(1, 0, 0), VENDOR);
    assert_eq!(host.read32(1, 1, 0), u32::MAX);
    for (bar, window) in [(0, MMIO64), (2, layout::MMIO32), (4, MMIO64)] {
        let address = host.bar(1, 0, bar);
        assert!(window.contains(&address), "BAR {bar} at {address:#x}");
    }
    host.write32(1, 0, 4, 2);
    let bar = host.bar(1, 0, 4);
    host.write_window(bar, &5u64.to_le_bytes());
    assert_eq!(host.read_window(bar), u64::MAX, "the port lets nothing pass yet");
    host.write32(0, 1, 4, 2);
    host.write_window(bar, &5u64.to_le_bytes());
    assert_eq!(host.read_window(bar), 5);
}

#[test]
fn each_node_has_a_root_bus() {
    let (host, _) = host(&[(Some(1), Slot::Port), (None, Slot::Root), (Some(0), Slot::Root)]);
    let bridges = host.bridges();
    assert_eq!(bridges.iter().map(|bridge| bridge.node).collect::<Vec<_>>(), [None, Some(0), Some(1)]);
    assert_eq!(host.read32(0, 1, 0), VENDOR);
    assert_eq!(host.read32(2, 1, 0), VENDOR);
    assert_eq!(host.read32(4, 1, 0), 0x000c_1b36);
    assert_eq!(host.read32(4, 1, 0x18), 0x0005_0504);
    assert_eq!(host.read32(5, 0, 0), VENDOR);
    assert_eq!(host.read32(255, 0, 0), u32::MAX);
}

#[test]
fn bars_move_at_run_time() {
    let (host, _) = host(&[(None, Slot::Root)]);
    host.write32(0, 1, 4, 2);
    let (old, new) = (host.bar(0, 1, 0), 0x4_0000_0000);
    host.write_window(old, &9u64.to_le_bytes());
    host.write32(0, 1, 0x14, 4);
    host.write32(0, 1, 0x10, 0);
    assert_eq!((host.read_window(old), host.read_window(new)), (u64::MAX, 9));
    host.write32(0, 1, 0x14, 7);
    assert_eq!(host.read_window(0x7_0000_0000), u64::MAX, "outside of the host bridge's windows");
}

#[test]
fn a_port_passes_only_what_is_in_its_windows() {
    let (host, _) = host(&[(None, Slot::Port)]);
    host.write32(0, 1, 4, 2);
    host.write32(1, 0, 4, 2);
    let bar = host.bar(1, 0, 0);
    host.write_window(bar, &3u64.to_le_bytes());
    host.write32(0, 1, 0x24, 0x0000_fff0);
    assert_eq!(host.read_window(bar), u64::MAX, "window closed");
    host.write32(0, 1, 0x28, 0);
    host.write32(0, 1, 0x2c, u32::MAX);
    host.write32(0, 1, 0x24, 0xfff0_0000);
    assert_eq!(host.read_window(bar), 3, "window open from 0 to the end");
}

#[test]
fn buses_are_where_the_guest_puts_them() {
    let (host, _) = host(&[(None, Slot::Port), (None, Slot::Port)]);
    assert_eq!((host.read32(1, 0, 0), host.read32(2, 0, 0)), (VENDOR, VENDOR));
    host.write32(0, 2, 0x18, 0);
    assert_eq!(host.read32(2, 0, 0), u32::MAX);
    host.write32(0, 1, 0x18, 0x0002_0200);
    assert_eq!((host.read32(1, 0, 0), host.read32(2, 0, 0)), (u32::MAX, VENDOR));
    host.write32(0, 2, 0x18, 0x0001_0100);
    assert_eq!((host.read32(1, 0, 0), host.read32(2, 0, 0)), (VENDOR, VENDOR));
    host.write32(0, 1, 0x18, 0);
    assert_eq!(host.read32(0, 0, 0), 0x0008_1b36, "a root bus can't be taken over");
}

#[test]
fn secondary_bus_reset_resets_the_function_once() {
    let (host, fakes) = host(&[(None, Slot::Port)]);
    host.write32(0, 1, 4, 2);
    host.write32(1, 0, 4, 2);
    let bar = host.bar(1, 0, 0);
    host.write_window(bar, &3u64.to_le_bytes());
    host.write32(0, 1, 0x3c, 0x0040_0000);
    host.write32(0, 1, 0x3c, 0x0040_0000);
    host.write32(0, 1, 0x3c, 0);
    assert_eq!(fakes[0].resets.load(Ordering::Relaxed), 1);
    assert_eq!(host.bar(1, 0, 0), 0);
    assert_eq!(host.read_window(bar), u64::MAX);
}

#[test]
fn ports_0xcf8_reach_the_same_registers() {
    let (host, _) = host(&[(None, Slot::Port)]);
    let read = |address: u32, offset, data: &mut [u8]| {
        host.pio_write(PORTS, 0, &address.to_le_bytes());
        host.pio_read(PORTS, offset, data);
    };
    let mut data = [0; 4];
    read(0x8000_0800, 4, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x000c_1b36);
    read(0x8001_0000, 4, &mut data);
    assert_eq!(u32::from_le_bytes(data), VENDOR);
    read(0x8001_0000, 6, &mut data[..2]);
    assert_eq!(data[..2], [0xba, 0]);
    read(0x0001_0000, 4, &mut data);
    assert_eq!(data, [0xff; 4], "not enabled");
    host.pio_read(PORTS, 0, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x0001_0000);
    host.pio_write(PORTS, 3, &[1]);
    host.pio_read(PORTS, 0, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x0001_0000, "bytes don't reach CONFIG_ADDRESS");
    host.pio_write(PORTS, 0, &0x8001_0004u32.to_le_bytes());
    host.pio_write(PORTS, 4, &[6, 0]);
    assert_eq!(host.read32(1, 0, 4) & 0xffff, 6);
}

#[test]
fn too_large_bars_are_the_users_error() {
    let functions = (0..4).map(|_| {
        let function: Arc<dyn PciFunction> = Fake::new();
        (Wish { node: None, slot: Slot::Root }, function)
    });
    let error = PciHost::new(&(1 << 32..(1 << 32) + (4 << 20)), functions.collect()).err();
    assert_eq!(error, Some(Error::NoRoom { window: 4 << 20 }));
}

/// Anything that a guest can do to the host bridges.
#[derive(Clone, Debug)]
enum Act {
    Ecam { offset: u64, write: Option<Vec<u8>>, len: usize },
    Ports { offset: u16, write: Option<Vec<u8>>, len: usize },
    Window { address: u64, write: Option<Vec<u8>>, len: usize },
}

/// Offsets close to what is there, and anywhere.
fn ecam_offsets() -> impl Strategy<Value = u64> {
    let near = (prop_oneof![Just(0u64), Just(3), 0..6u64], 0..4u64, 0..0x60u64);
    prop_oneof![
        4 => near.prop_map(|(bus, device, register)| ecam(bus, device, register)),
        1 => 0..layout::ECAM.end - layout::ECAM.start + 8,
    ]
}

fn acts() -> impl Strategy<Value = Act> {
    let len = || prop_oneof![8 => (0..4u32).prop_map(|bits| 1usize << bits), 1 => 0..20usize];
    let write = || proptest::option::of(proptest::collection::vec(any::<u8>(), 0..20));
    let address = prop_oneof![
        Just(layout::MMIO32.start),
        MMIO64.start..MMIO64.start + 0x100_0000,
        layout::MMIO32,
        any::<u64>()
    ];
    prop_oneof![
        6 => (ecam_offsets(), write(), len()).prop_map(|(offset, write, len)| Act::Ecam { offset, write, len }),
        2 => (0..8u16, write(), len()).prop_map(|(offset, write, len)| Act::Ports { offset, write, len }),
        2 => (address, write(), len()).prop_map(|(address, write, len)| Act::Window { address, write, len }),
    ]
}

impl PciHost {
    fn act(&self, act: &Act) {
        let buffer = |len| vec![0; len];
        match act {
            Act::Ecam { offset, write: Some(data), .. } => self.mmio_write(ECAM, *offset, data),
            Act::Ecam { offset, len, .. } => self.mmio_read(ECAM, *offset, &mut buffer(*len)),
            Act::Ports { offset, write: Some(data), .. } => self.pio_write(PORTS, *offset, data),
            Act::Ports { offset, len, .. } => self.pio_read(PORTS, *offset, &mut buffer(*len)),
            Act::Window { address, write: Some(data), .. } => self.write_window(*address, data),
            Act::Window { address, len, .. } => {
                self.mmio_read(
                    MmioAddress(MMIO64.start),
                    address.wrapping_sub(MMIO64.start),
                    &mut buffer(*len),
                );
            }
        }
    }
}

/// Set node 5's function up as a kernel would, whatever its registers were, and see that it works.
fn still_works(host: &PciHost) {
    host.write32(3, 1, 0x18, 0x0004_0403);
    host.write32(3, 1, 0x28, 4);
    host.write32(3, 1, 0x2c, 4);
    host.write32(3, 1, 0x24, 0x0010_0000);
    host.write32(3, 1, 0x3c, 0);
    host.write32(3, 1, 4, 2);
    assert_eq!(host.read32(4, 0, 0), VENDOR);
    host.write32(4, 0, 0x10, 0);
    host.write32(4, 0, 0x14, 4);
    host.write32(4, 0, 0x24, 3);
    host.write32(4, 0, 4, 2);
    host.write_window(0x4_0000_0000, &0x1234_5678u64.to_le_bytes());
    assert_eq!(host.read_window(0x4_0000_0008), 0x1234_5678);
}

proptest! {
    #[test]
    fn nothing_a_guest_does_is_for_good(acts in proptest::collection::vec(acts(), 0..60)) {
        let (host, _) = host(&[(None, Slot::Root), (None, Slot::Port), (Some(5), Slot::Port)]);
        for act in &acts {
            host.act(act);
        }
        // What the guest may have put in the way of node 5: functions of bus 0 stay below their own bridge.
        still_works(&host);
    }

    #[test]
    fn pieces_cover_an_access_once_and_are_aligned(offset in any::<u64>(), len in 0..40usize) {
        let mut next = 0;
        for piece in pieces(offset, len) {
            let at = offset.wrapping_add(piece.start as u64);
            prop_assert_eq!(piece.start, next);
            prop_assert!(matches!(piece.len(), 1 | 2 | 4) && at.is_multiple_of(piece.len() as u64));
            next = piece.end;
        }
        prop_assert_eq!(next, len);
    }

    #[test]
    fn bars_that_overlap_share_out_the_addresses(places in proptest::collection::vec((0..64u64, 0..5u32), 1..8)) {
        let function: Arc<dyn PciFunction> = Fake::new();
        let mappings: Vec<_> = (0..).zip(&places).map(|(bar, &(start, bits))| {
            Mapping { range: start..start + (1 << bits), function: function.clone(), bar }
        }).collect();
        let map = BarMap::new(mappings.clone());
        for address in 0..100 {
            let inside = mappings.iter().any(|mapping| mapping.range.contains(&address));
            let found = map.find(address, 1);
            prop_assert_eq!(found.is_some(), inside, "{}", address);
            if let Some((mapping, offset)) = found {
                prop_assert!(mapping.range.contains(&address));
                prop_assert_eq!(offset, address - mapping.range.start);
            }
        }
    }
}
