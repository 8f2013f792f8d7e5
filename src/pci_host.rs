//! The PCI host bridges: root buses, configuration space, and the windows in which functions' BARs live.
//!
//! ```text
//!  ECAM, CF8/CFC ──► bus, device, function ──► host bridge · root port · function
//!  MMIO windows ───► BarMap (one lookup) ────► function, BAR, offset
//! ```
//!
//! Configuration cycles find their target by the bus numbers that the guest has programmed. Whatever they change of
//! the memory map (BARs, memory decoding, windows of root ports) is put into a new `BarMap`, which takes the old
//! one's place at once: the path to a BAR takes no lock.

mod bar_map;
pub mod config_space;
mod firmware;
mod function;
pub mod plan;
mod root_port;

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use serde::{Deserialize, Serialize};
use vm_device::bus::{MmioAddress, MmioAddressOffset, PioAddress, PioAddressOffset};
use vm_device::{DeviceMmio, DevicePio};

pub use self::function::PciFunction;

use self::bar_map::{BarMap, Mapping};
use self::config_space::ConfigSpace;
use self::plan::{HostBridge, Wish};
use self::root_port::RootPort;
use crate::{layout, log_limited, warn_limited};

/// Enable bit of CONFIG_ADDRESS (PCI local bus specification 3.0, 3.2.2.3.2).
const CONFIG_ENABLE: u32 = 1 << 31;
/// Offset of CONFIG_DATA from CONFIG_ADDRESS.
const CONFIG_DATA: u16 = 4;

/// Why the functions can't be plugged in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Too few places on a root bus.
    #[error(transparent)]
    TooManyDevices(#[from] plan::TooManyDevices),
    /// Their BARs are larger than the MMIO window.
    #[error("--device: the BARs of all PCI devices on a NUMA node don't fit in {} MiB of addresses", .window >> 20)]
    NoRoom {
        /// Size of the window in bytes.
        window: u64,
    },
}

/// Where a configuration cycle goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ConfigAddress {
    bus: u8,
    device: u8,
    function: u8,
    /// Byte offset, 0 to 4095.
    register: u16,
}

impl ConfigAddress {
    /// ECAM: `offset` from the start (PCI Express base specification, 7.2.2). None past the last bus.
    fn from_ecam(offset: u64) -> Option<Self> {
        Some(Self {
            bus: u8::try_from(offset >> 20).ok()?,
            device: (offset >> 15 & 0x1f) as u8,
            function: (offset >> 12 & 7) as u8,
            register: (offset & 0xfff) as u16,
        })
    }

    /// CONFIG_ADDRESS, and byte `offset` of CONFIG_DATA. None while it is not enabled.
    fn from_ports(config_address: u32, offset: u16) -> Option<Self> {
        (config_address & CONFIG_ENABLE != 0 && offset < 4).then_some(Self {
            bus: (config_address >> 16) as u8,
            device: (config_address >> 11 & 0x1f) as u8,
            function: (config_address >> 8 & 7) as u8,
            register: (config_address & 0xfc) as u16 | offset,
        })
    }
}

/// What answers a configuration cycle.
enum Target<'a> {
    Bridge(&'a ConfigSpace),
    Port(&'a RootPort),
    Function(&'a dyn PciFunction),
}

/// What sits at a device number of a root bus.
enum Device {
    Function(Arc<dyn PciFunction>),
    Port(Box<RootPort>),
}

/// A host bridge and what is below it.
struct Bridge {
    plan: HostBridge,
    /// The bridge's own function, device 0 of the root bus. It has nothing to write to.
    config: ConfigSpace,
    /// From device number 1 on.
    devices: Vec<Device>,
}

impl Bridge {
    fn target(&self, address: ConfigAddress) -> Option<Target<'_>> {
        if address.function != 0 {
            return None;
        }
        if address.bus != *self.plan.buses.start() {
            return (address.device == 0).then(|| self.behind_port(address.bus)).flatten();
        }
        let Some(index) = address.device.checked_sub(1) else { return Some(Target::Bridge(&self.config)) };
        self.devices.get(usize::from(index)).map(|device| match device {
            Device::Function(function) => Target::Function(function.as_ref()),
            Device::Port(port) => Target::Port(port),
        })
    }

    /// The function on secondary bus `bus`.
    fn behind_port(&self, bus: u8) -> Option<Target<'_>> {
        let ports = self.devices.iter().filter_map(|device| match device {
            Device::Port(port) => Some(port),
            Device::Function(_) => None,
        });
        let mut on_bus = ports.filter(|port| port.secondary_bus() == bus);
        on_bus.next().map(|port| Target::Function(port.function().as_ref()))
    }

    fn decodes(&self, range: &Range<u64>) -> bool {
        contains(&self.plan.mmio32, range) || contains(&self.plan.mmio64, range)
    }

    /// The BARs that are reachable now.
    fn mappings(&self) -> Vec<Mapping> {
        let mappings = self.devices.iter().flat_map(|device| match device {
            Device::Function(function) => bar_map::mappings(function),
            Device::Port(port) => port.mappings(),
        });
        mappings.filter(|mapping| self.decodes(&mapping.range)).collect()
    }
}

/// Whether all of `inner` is in `outer`.
fn contains(outer: &Range<u64>, inner: &Range<u64>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}

/// What is kept of the host bridges.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciState {
    config_address: u32,
    /// Configuration spaces of the root ports, by bridge and device number.
    ports: Vec<Vec<u8>>,
}

/// All PCI host bridges of the machine.
///
/// On the buses it answers [`mmio_ranges`](Self::mmio_ranges) and 8 ports from [`layout::PCI_CONFIG_PORT`] on.
pub struct PciHost {
    bridges: Vec<Bridge>,
    windows: [Range<u64>; 2],
    config_address: AtomicU32,
    bars: ArcSwap<BarMap>,
    /// Held while `bars` is made anew, so that the newest state is stored last.
    remap: Mutex<()>,
}

impl PciHost {
    /// Plug `functions` in and, as firmware would, assign bus numbers and BARs. `mmio64` is the 64-bit window.
    ///
    /// # Errors
    /// [`Error`], in the user's terms.
    pub fn new(mmio64: &Range<u64>, functions: Vec<(Wish, Arc<dyn PciFunction>)>) -> Result<Self, Error> {
        let wishes: Vec<_> = functions.iter().map(|(wish, _)| *wish).collect();
        let (plans, seats) = plan::plan(&wishes, &layout::MMIO32, mmio64)?;
        let mut bridges: Vec<_> = plans
            .into_iter()
            .map(|plan| Bridge { plan, config: host_bridge_config(), devices: Vec::new() })
            .collect();
        for ((_, function), seat) in functions.into_iter().zip(seats) {
            let bridge = &mut bridges[seat.bridge];
            let port = bridge.plan.ports.iter().find(|port| port.device == seat.device);
            bridge.devices.push(match port {
                Some(port) => Device::Port(Box::new(RootPort::new(port.slot, function))),
                None => Device::Function(function),
            });
        }
        for bridge in &bridges {
            firmware::assign(bridge)?;
        }
        let host = Self {
            bridges,
            windows: [layout::MMIO32, mmio64.clone()],
            config_address: AtomicU32::new(0),
            bars: ArcSwap::default(),
            remap: Mutex::default(),
        };
        host.remap();
        Ok(host)
    }

    /// The host bridges, for ACPI.
    pub fn bridges(&self) -> Vec<HostBridge> {
        self.bridges.iter().map(|bridge| bridge.plan.clone()).collect()
    }

    /// ECAM and both MMIO windows.
    pub fn mmio_ranges(&self) -> [Range<u64>; 3] {
        let [mmio32, mmio64] = self.windows.clone();
        [layout::ECAM, mmio32, mmio64]
    }

    fn ports(&self) -> impl Iterator<Item = &RootPort> {
        self.bridges.iter().flat_map(|bridge| &bridge.devices).filter_map(|device| match device {
            Device::Port(port) => Some(&**port),
            Device::Function(_) => None,
        })
    }

    /// What is kept; each function keeps its own.
    pub fn save(&self) -> PciState {
        PciState {
            config_address: self.config_address.load(Ordering::Relaxed),
            ports: self.ports().map(RootPort::save).collect(),
        }
    }

    /// Become what `state` says, once all functions have become what they were.
    ///
    /// # Errors
    /// It is of another machine.
    pub fn load(&self, state: &PciState) -> anyhow::Result<()> {
        let PciState { config_address, ports } = state;
        let known = self.ports().count();
        anyhow::ensure!(ports.len() == known, "{} root ports, not {known}", ports.len());
        self.ports().zip(ports).try_for_each(|(port, saved)| port.load(saved))?;
        self.config_address.store(*config_address, Ordering::Relaxed);
        self.remap();
        Ok(())
    }

    fn target(&self, address: ConfigAddress) -> Option<Target<'_>> {
        self.bridges.iter().find(|bridge| bridge.plan.buses.contains(&address.bus))?.target(address)
    }

    /// Read 1, 2 or 4 bytes, naturally aligned. All ones where nothing is.
    fn config_read(&self, address: Option<ConfigAddress>, data: &mut [u8]) {
        let target = address.and_then(|address| Some((address.register, self.target(address)?)));
        match target {
            Some((register, Target::Bridge(config))) => config.read(register, data),
            Some((register, Target::Port(port))) => port.config_read(register, data),
            Some((register, Target::Function(function))) => function.config_read(register, data),
            None => data.fill(0xff),
        }
    }

    /// Write 1, 2 or 4 bytes, naturally aligned.
    fn config_write(&self, address: Option<ConfigAddress>, data: &[u8]) {
        let target = address.and_then(|address| Some((address.register, self.target(address)?)));
        let effect = match target {
            Some((register, Target::Port(port))) => port.config_write(register, data),
            Some((register, Target::Function(function))) => function.config_write(register, data),
            Some((_, Target::Bridge(_))) | None => return,
        };
        if effect.bars_changed {
            self.remap();
        }
    }

    fn remap(&self) {
        let _newest_last = self.remap.lock().unwrap_or_else(PoisonError::into_inner);
        let mappings = self.bridges.iter().flat_map(Bridge::mappings).collect();
        self.bars.store(Arc::new(BarMap::new(mappings)));
    }

    fn window_read(&self, address: u64, data: &mut [u8]) {
        let bars = self.bars.load();
        match bars.find(address, data.len()) {
            Some((mapping, offset)) => {
                if let Err(error) = mapping.function.bar_read(mapping.bar, offset, data) {
                    warn_limited!("PCI read: {error}");
                    data.fill(0xff);
                }
            }
            None => {
                log_limited!(Debug, "no BAR takes a {}-byte read at {address:#x}", data.len());
                data.fill(0xff);
            }
        }
    }

    fn window_write(&self, address: u64, data: &[u8]) {
        let bars = self.bars.load();
        match bars.find(address, data.len()) {
            Some((mapping, offset)) => {
                if let Err(error) = mapping.function.bar_write(mapping.bar, offset, data) {
                    warn_limited!("PCI write of {data:x?}: {error}");
                }
            }
            None => log_limited!(Debug, "no BAR takes a {}-byte write at {address:#x}", data.len()),
        }
    }
}

impl DeviceMmio for PciHost {
    fn mmio_read(&self, base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        if base.0 != layout::ECAM.start {
            return self.window_read(base.0.wrapping_add(offset), data);
        }
        for piece in pieces(offset, data.len()) {
            let address = ConfigAddress::from_ecam(offset + piece.start as u64);
            self.config_read(address, &mut data[piece]);
        }
    }

    fn mmio_write(&self, base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        if base.0 != layout::ECAM.start {
            return self.window_write(base.0.wrapping_add(offset), data);
        }
        for piece in pieces(offset, data.len()) {
            let address = ConfigAddress::from_ecam(offset + piece.start as u64);
            self.config_write(address, &data[piece]);
        }
    }
}

/// CONFIG_ADDRESS takes 4-byte accesses only: bytes in its place are other devices' ports on a PC.
impl DevicePio for PciHost {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        let config_address = self.config_address.load(Ordering::Relaxed);
        match (offset.checked_sub(CONFIG_DATA), <&mut [u8; 4]>::try_from(&mut *data)) {
            (None, Ok(register)) if offset == 0 => *register = config_address.to_le_bytes(),
            (None, _) => data.fill(0xff),
            (Some(start), _) => {
                for piece in pieces(start.into(), data.len()) {
                    let address = data_address(config_address, start, piece.start);
                    self.config_read(address, &mut data[piece]);
                }
            }
        }
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        match (offset.checked_sub(CONFIG_DATA), <[u8; 4]>::try_from(data)) {
            (None, Ok(register)) if offset == 0 => {
                self.config_address.store(u32::from_le_bytes(register), Ordering::Relaxed);
            }
            (None, _) => {}
            (Some(start), _) => {
                let config_address = self.config_address.load(Ordering::Relaxed);
                for piece in pieces(start.into(), data.len()) {
                    let address = data_address(config_address, start, piece.start);
                    self.config_write(address, &data[piece]);
                }
            }
        }
    }
}

/// The target of byte `at` of an access to CONFIG_DATA that begins at its byte `start`.
fn data_address(config_address: u32, start: u16, at: usize) -> Option<ConfigAddress> {
    let offset = u16::try_from(at).ok()?.checked_add(start)?;
    ConfigAddress::from_ports(config_address, offset)
}

/// An access of `len` bytes at `offset`, cut into naturally aligned pieces of 1, 2 and 4 bytes.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let at = offset.wrapping_add(start as u64);
        let size = [4, 2].into_iter().find(|&size| at.is_multiple_of(size as u64) && size <= len - start);
        let piece = start..start + size.unwrap_or(1);
        start = piece.end;
        (piece.end <= len).then_some(piece)
    })
}

/// The function of a PCI Express host bridge. Linux trusts CF8/CFC only if it finds one (`pci_sanity_check`).
fn host_bridge_config() -> ConfigSpace {
    const VENDOR_RED_HAT: u16 = 0x1b36;
    const DEVICE_PCIE_HOST: u16 = 0x0008;
    const CLASS_HOST_BRIDGE: u32 = 0x06_00_00;

    let mut config = ConfigSpace::new();
    config.set_u16(0x00, VENDOR_RED_HAT);
    config.set_u16(0x02, DEVICE_PCIE_HOST);
    config.set_u32(0x08, CLASS_HOST_BRIDGE << 8);
    config
}

#[cfg(test)]
mod tests;
