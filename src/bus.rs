//! The two address spaces of a CPU's accesses, I/O ports and MMIO.
//!
//! Built once, then never changed: an access takes one lookup and no lock. BARs move inside the windows of the PCI
//! host bridge, which is one device here.

use std::sync::Arc;

use vm_device::bus::{MmioAddress, MmioRange, PioAddress, PioRange};
use vm_device::device_manager::{IoManager, MmioManager, PioManager};
use vm_device::{DeviceMmio, DevicePio};

use crate::log_limited;

/// Both address spaces.
#[derive(Default)]
pub struct Bus {
    io: IoManager,
}

impl Bus {
    /// Let `device` answer `size` ports from `port` on.
    ///
    /// # Errors
    /// The ports are taken.
    pub fn add_ports(
        &mut self,
        port: u16,
        size: u16,
        device: Arc<dyn DevicePio + Send + Sync>,
    ) -> anyhow::Result<()> {
        let range = PioRange::new(PioAddress(port), size);
        range.and_then(|range| self.io.register_pio(range, device)).map_err(describe(u64::from(port)))
    }

    /// Let `device` answer the addresses of `range`.
    ///
    /// # Errors
    /// The addresses are taken.
    pub fn add_mmio(
        &mut self,
        range: std::ops::Range<u64>,
        device: Arc<dyn DeviceMmio + Send + Sync>,
    ) -> anyhow::Result<()> {
        let mmio = MmioRange::new(MmioAddress(range.start), range.end - range.start);
        mmio.and_then(|mmio| self.io.register_mmio(mmio, device)).map_err(describe(range.start))
    }

    /// IN: where nothing answers, all ones.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        match self.io.pio_device(PioAddress(port)) {
            Some((range, device)) => device.pio_read(range.base(), port - range.base().0, data),
            None => {
                log_limited!(Debug, "nothing answers {}-byte reads of port {port:#x}", data.len());
                data.fill(0xff);
            }
        }
    }

    /// OUT.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        match self.io.pio_device(PioAddress(port)) {
            Some((range, device)) => device.pio_write(range.base(), port - range.base().0, data),
            None => log_limited!(Debug, "nothing answers writes of {data:x?} to port {port:#x}"),
        }
    }

    /// Load: where nothing answers, all ones.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.io.mmio_device(MmioAddress(address)) {
            Some((range, device)) => device.mmio_read(range.base(), address - range.base().0, data),
            None => {
                log_limited!(Debug, "nothing answers {}-byte reads of {address:#x}", data.len());
                data.fill(0xff);
            }
        }
    }

    /// Store.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        match self.io.mmio_device(MmioAddress(address)) {
            Some((range, device)) => device.mmio_write(range.base(), address - range.base().0, data),
            None => log_limited!(Debug, "nothing answers writes of {data:x?} to {address:#x}"),
        }
    }
}

fn describe(address: u64) -> impl FnOnce(vm_device::bus::Error) -> anyhow::Error {
    move |error| anyhow::anyhow!("can't put a device at {address:#x}: {error}")
}
