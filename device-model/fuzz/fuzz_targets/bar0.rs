//! BAR0's registers and doorbells: see `mana_test_driver::exercise::bar0`.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use mana_test_driver::exercise::{Machine, bar0, case};

thread_local! {
    static MACHINE: RefCell<Machine> = RefCell::new(Machine::new());
}

fuzz_target!(|input: &[u8]| MACHINE.with_borrow_mut(|machine| case(machine, bar0::play, input)));
