//! What firmware leaves behind: bus numbers, windows and BARs, so that the guest may keep them.

use std::ops::Range;

use mana_device::Bar;

use super::root_port::{
    BUS_NUMBERS, IO_WINDOW, MEMORY_WINDOW, PREFETCHABLE_BASE_UPPER, PREFETCHABLE_LIMIT_UPPER,
    PREFETCHABLE_WINDOW, RootPort, window_registers,
};
use super::{Bridge, Device, Error, PciFunction};

/// First BAR register of a type 0 header; each is 4 bytes.
const BAR0: u16 = 0x10;
/// Windows of bridges come in units of this.
const MEBIBYTE: u64 = 1 << 20;
/// The base above the limit: lets nothing pass.
const IO_CLOSED: u32 = 0x0000_00f0;
/// The same for memory.
const CLOSED: u32 = 0x0000_fff0;

/// Assign what is below `bridge`. Memory decoding stays off: that is for the guest to turn on.
pub(super) fn assign(bridge: &Bridge) -> Result<(), Error> {
    let mut low = Space::new(&bridge.plan.mmio32);
    let mut high = Space::new(&bridge.plan.mmio64);
    let mut ports = bridge.plan.ports.iter();
    for device in &bridge.devices {
        match device {
            Device::Function(function) => {
                place(function.as_ref(), &function.bars(), &mut high)?;
            }
            Device::Port(port) => {
                let bus = ports.next().map_or(0, |plan| plan.bus);
                write(port, BUS_NUMBERS, u32::from_le_bytes([*bridge.plan.buses.start(), bus, bus, 0]));
                open_windows(port, &mut low, &mut high)?;
            }
        }
    }
    Ok(())
}

/// BARs behind a port: the window that reaches above 4 GiB is for the prefetchable ones only.
fn open_windows(port: &RootPort, low: &mut Space, high: &mut Space) -> Result<(), Error> {
    write(port, IO_WINDOW, IO_CLOSED);
    let function = port.function().as_ref();
    let (prefetchable, other): (Vec<_>, Vec<_>) =
        function.bars().into_iter().partition(|bar| bar.prefetchable);
    let window = place(function, &other, low)?;
    write(port, MEMORY_WINDOW, if window.is_empty() { CLOSED } else { window_registers(&window).0 });

    let window = place(function, &prefetchable, high)?;
    let (base_limit, base, limit) =
        if window.is_empty() { (CLOSED, 0, 0) } else { window_registers(&window) };
    write(port, PREFETCHABLE_WINDOW, base_limit);
    write(port, PREFETCHABLE_BASE_UPPER, base);
    write(port, PREFETCHABLE_LIMIT_UPPER, limit);
    Ok(())
}

fn write(port: &RootPort, register: usize, value: u32) {
    let _mapped_later = port.config_write(register as u16, &value.to_le_bytes());
}

/// Put `bars` side by side in one block of `space`, the largest first, so that each is aligned to its size.
fn place(function: &dyn PciFunction, bars: &[Bar], space: &mut Space) -> Result<Range<u64>, Error> {
    let mut bars = bars.to_vec();
    bars.sort_by_key(|bar| std::cmp::Reverse(bar.size));
    let size = bars.iter().map(|bar| bar.size).sum();
    let alignment = bars.first().map_or(1, |bar| bar.size);
    let block = space.take(size, alignment)?;
    let mut address = block.start;
    for bar in &bars {
        let register = BAR0 + 4 * u16::from(bar.index);
        let [low, high] = [address as u32, (address >> 32) as u32];
        let _mapped_later = function.config_write(register, &low.to_le_bytes());
        let _mapped_later = function.config_write(register + 4, &high.to_le_bytes());
        address += bar.size;
    }
    Ok(block)
}

/// Addresses of a window that are not given away yet.
struct Space {
    free: Range<u64>,
    size: u64,
}

impl Space {
    fn new(window: &Range<u64>) -> Self {
        Self { free: window.clone(), size: window.end - window.start }
    }

    /// A block of at least `size` bytes in whole mebibytes; empty if `size` is 0.
    fn take(&mut self, size: u64, alignment: u64) -> Result<Range<u64>, Error> {
        let start = self.free.start.checked_next_multiple_of(alignment.max(MEBIBYTE));
        let block = start.and_then(|start| {
            let end = start.checked_add(size)?.checked_next_multiple_of(MEBIBYTE)?;
            (end <= self.free.end).then_some(start..end)
        });
        let block = block.ok_or(Error::NoRoom { window: self.size })?;
        self.free.start = block.end;
        Ok(block)
    }
}
