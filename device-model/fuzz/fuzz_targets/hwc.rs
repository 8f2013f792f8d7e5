//! Messages of the hardware channel: see `mana_test_driver::exercise::hwc`.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use mana_test_driver::exercise::{Machine, case, hwc};

thread_local! {
    static MACHINE: RefCell<Machine> = RefCell::new(Machine::new());
}

fuzz_target!(|input: &[u8]| MACHINE.with_borrow_mut(|machine| case(machine, hwc::play, input)));
