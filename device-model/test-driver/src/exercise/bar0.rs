//! Accesses to BAR0: registers, the shared-memory window, doorbells.
//!
//! A step begins with a byte: write or read in bit 0, the size of the access in bits 1 and 2, where to in bits 3 to 5.

use arbitrary::{Result, Unstructured};

use super::machine::Machine;
use super::ram::PAGE;

/// Doorbells of a page, the last no doorbell.
const DOORBELLS: [u64; 8] = [0x000, 0x400, 0x408, 0x800, 0x820, 0xff8, 0x000, 0x010];

/// Play `input`.
///
/// # Panics
/// The card breaks a promise.
pub fn play(machine: &mut Machine, input: &[u8]) {
    machine.config_write(0x04, &[6, 0]);
    // Only an input that has ended is an error, and that is no error.
    let _ = steps(machine, &mut Unstructured::new(input));
    machine.settle();
}

fn steps(machine: &mut Machine, input: &mut Unstructured<'_>) -> Result<()> {
    while !input.is_empty() {
        let step: u8 = input.arbitrary()?;
        let size = [1, 2, 4, 8][usize::from(step >> 1 & 3)];
        let mut bar = 0;
        let offset = match step >> 3 & 7 {
            0 => u64::from(input.arbitrary::<u8>()?),
            1 => 0x40 + u64::from(input.arbitrary::<u8>()? & 0x1f),
            2 | 3 => {
                let place: u8 = input.arbitrary()?;
                let page = u64::from(place >> 3) % 18;
                machine.doorbells() + page * PAGE as u64 + DOORBELLS[usize::from(place & 7)]
            }
            4 => u64::from(input.arbitrary::<u32>()? & 0x3f_ffff),
            5 => {
                bar = step >> 6;
                input.arbitrary()?
            }
            6 => {
                machine.open(u16::from(step >> 6));
                continue;
            }
            _ => {
                machine.settle();
                continue;
            }
        };
        let mut data = [0; 8];
        let data = &mut data[..size];
        if step & 1 == 0 {
            input.fill_buffer(data)?;
            machine.bar_write(bar, offset, data);
        } else {
            machine.bar_read(bar, offset, data);
        }
    }
    Ok(())
}
