//! Saved states that a stranger wrote: refused, or a card that runs on.
//!
//! The first byte says whether a port is open before, whether the state's magic number and version are in the input
//! too, and what is rung for afterwards. The state follows.

use mana_device::doors::{RxChecksum, RxFrame};
use mana_device::state::State;

use super::machine::{MSIX_BAR, Machine, VPORTS};
use super::model::dword;
use crate::queues::doorbell;

/// Bytes of magic number and version.
pub const PREFIX: usize = 12;
/// Queues of each kind that are rung for.
const QUEUES: u64 = 4;

/// Play `input`.
///
/// # Panics
/// The card breaks a promise.
pub fn play(machine: &mut Machine, input: &[u8]) {
    let Some((&first, body)) = input.split_first() else { return };
    if first & 1 != 0 {
        machine.bring_up(0);
    }
    let prefix = if first & 2 == 0 { &machine.power_on_bytes()[..PREFIX] } else { &[] };
    let bytes = [prefix, body].concat();
    let loaded = State::from_bytes(&bytes).and_then(|state| machine.device.load(&state));
    if loaded.is_err() {
        // Nothing has changed.
        machine.model.compare(&machine.device.ledger());
        return;
    }
    machine.adopt();
    machine.reload();
    run_on(machine, first);
    machine.power_on();
}

/// What a guest and a cable do to a card, whatever it holds.
fn run_on(machine: &mut Machine, first: u8) {
    machine.settle();
    let frame = [2; 60];
    for port in 0..VPORTS {
        machine.deliver(port, &[RxFrame { bytes: &frame, checksum: RxChecksum::Unknown }; 4]);
    }
    for id in 0..QUEUES {
        for register in [doorbell::RQ, doorbell::SQ, doorbell::CQ, doorbell::EQ] {
            let page = u32::from(id != 0);
            machine.ring(page, register, id | u64::from(first & 0xfc) << 35 | 1 << 63);
        }
    }
    machine.settle();
    machine.pass(2_000_000);
    machine.settle();
    machine.config_write(0x04, &[6, 0]);
    machine.settle();
}

impl Machine {
    /// The card has become another: what it says of MSI-X counts from now on, and of memory nothing is known.
    fn adopt(&mut self) {
        self.model.lose(&mut self.ram);
        let mut bytes = [0; 4];
        for offset in [0x04, 0x50] {
            self.device.config_read(offset, &mut bytes);
            self.vectors.config(offset, &bytes);
        }
        for at in (0..super::doors::VECTORS * 16).step_by(4) {
            self.device.bar_read(MSIX_BAR, at as u64, &mut bytes).expect("the table answers");
            self.vectors.table(at, dword(&bytes, 0));
        }
    }
    /// Save the card and have it become what was saved: nothing may be different.
    ///
    /// # Panics
    /// Something is, or the card does not believe itself.
    pub fn reload(&mut self) {
        let state = self.device.save();
        let bytes = state.to_bytes().expect("a state has its bytes");
        let read = State::from_bytes(&bytes).expect("a state is read as it was written");
        assert!(read == state, "a state is not what was written");
        let loaded = self.device.load(&read);
        assert!(loaded.is_ok(), "the card does not believe itself: {loaded:?}");
        assert!(self.device.save() == state, "a card that was restored is another");
        self.device.resume();
        self.model.compare(&self.device.ledger());
    }
}
