//! Saved states: see `mana_test_driver::exercise::restore`.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use mana_test_driver::exercise::{Machine, case, restore};

thread_local! {
    static MACHINE: RefCell<Machine> = RefCell::new(Machine::new());
}

fuzz_target!(|input: &[u8]| MACHINE.with_borrow_mut(|machine| case(machine, restore::play, input)));
