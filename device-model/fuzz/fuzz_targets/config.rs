//! Configuration space and MSI-X: see `mana_test_driver::exercise::config`.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use mana_test_driver::exercise::{Machine, case, config};

thread_local! {
    static MACHINE: RefCell<Machine> = RefCell::new(Machine::new());
}

fuzz_target!(|input: &[u8]| MACHINE.with_borrow_mut(|machine| case(machine, config::play, input)));
