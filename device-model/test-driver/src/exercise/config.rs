//! Accesses to configuration space, the MSI-X table and its pending bits, with interrupts on the way.
//!
//! A step begins with a byte: what it is in bits 0 to 2, the size of the access in bits 3 and 4. Offsets are 16 bits,
//! data is as long as the access.

use arbitrary::{Result, Unstructured};

use super::machine::{MSIX_BAR, Machine, PBA};
use super::message;
use crate::gdma::code as gdma;

/// Registers that do something: command, BARs, Message Control, Device Control.
const REGISTERS: [u16; 8] = [0x04, 0x10, 0x14, 0x20, 0x24, 0x52, 0x68, 0x44];

/// Play `input`.
///
/// # Panics
/// The card breaks a promise.
pub fn play(machine: &mut Machine, input: &[u8]) {
    // Only an input that has ended is an error, and that is no error.
    let _ = steps(machine, &mut Unstructured::new(input));
    machine.settle();
}

fn steps(machine: &mut Machine, input: &mut Unstructured<'_>) -> Result<()> {
    while !input.is_empty() {
        let step: u8 = input.arbitrary()?;
        let size = [1, 2, 4, 8][usize::from(step >> 3 & 3)];
        let mut data = [0; 8];
        let data = &mut data[..size];
        match step & 7 {
            0 => machine.config_read(input.arbitrary::<u16>()? & 0xfff, &mut data[..size.min(4)]),
            1 | 2 => {
                let offset = match step & 7 {
                    1 => REGISTERS[usize::from(step >> 5)],
                    _ => input.arbitrary::<u16>()? & 0xfff,
                };
                let data = &mut data[..size.min(4)];
                input.fill_buffer(data)?;
                machine.config_write(offset, data);
            }
            3 => {
                let offset = input.arbitrary::<u16>()? & 0xfff;
                machine.bar_read(MSIX_BAR, offset.into(), data);
            }
            4 => {
                let offset = input.arbitrary::<u16>()? & 0x1ff;
                input.fill_buffer(data)?;
                machine.bar_write(MSIX_BAR, offset.into(), data);
            }
            5 => {
                machine.open(u16::from(step >> 3) & 0x1f);
            }
            6 => {
                let test = *message::Message::new(gdma::GENERATE_TEST_EQE, 1, 44, 32, 1).u32(40, 0);
                machine.command(test.bytes());
                machine.take_events();
            }
            _ => check_bars(machine),
        }
        machine.check_pending();
    }
    Ok(())
}

/// BARs are multiples of their size, wherever the guest wants them.
fn check_bars(machine: &mut Machine) {
    for bar in machine.device.bars() {
        assert_eq!(bar.address % bar.size, 0, "{bar:?}");
        machine.see(&bar.address.to_le_bytes());
    }
    let enabled = machine.device.memory_enabled();
    let mut command = [0; 2];
    machine.config_read(0x04, &mut command);
    assert_eq!(enabled, command[0] & 2 != 0, "Memory Space Enable is what it reads as");
}

impl Machine {
    /// What can be sent is not pending, and nothing is pending while MSI-X is off.
    ///
    /// # Panics
    /// It is.
    pub fn check_pending(&self) {
        let mut pending = [0; 8];
        self.device.bar_read(MSIX_BAR, PBA, &mut pending).expect("the pending bits answer");
        let pending = u64::from_le_bytes(pending);
        // Mostly none is, and a case looks after every step.
        let wrong = if pending == 0 { 0 } else { pending & !self.vectors.may_pend() };
        assert_eq!(wrong, 0, "vectors {wrong:#b} are pending, though nothing holds them back");
    }
}
