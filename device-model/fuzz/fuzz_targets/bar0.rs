//! BAR0's registers and doorbells: see `mana_test_driver::exercise::bar0`.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use mana_test_driver::exercise::{Player, bar0};

thread_local! {
    static PLAYER: RefCell<Player> = RefCell::new(Player::new(bar0::play));
}

fuzz_target!(|input: &[u8]| PLAYER.with_borrow_mut(|player| player.case(input)));
