//! Steps of a driver: see `mana_test_driver::exercise::device`.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use mana_test_driver::exercise::{Machine, case, device};

thread_local! {
    static MACHINE: RefCell<Machine> = RefCell::new(Machine::new());
}

fuzz_target!(|input: &[u8]| MACHINE.with_borrow_mut(|machine| case(machine, device::play, input)));
