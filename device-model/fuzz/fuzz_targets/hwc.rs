//! Messages of the hardware channel: see `mana_test_driver::exercise::hwc`.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use mana_test_driver::exercise::{Player, hwc};

thread_local! {
    static PLAYER: RefCell<Player> = RefCell::new(Player::observed(hwc::play));
}

fuzz_target!(|input: &[u8]| PLAYER.with_borrow_mut(|player| player.case(input)));
