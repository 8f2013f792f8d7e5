//! Configuration space and MSI-X: see `mana_test_driver::exercise::config`.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use mana_test_driver::exercise::{Player, config};

thread_local! {
    static PLAYER: RefCell<Player> = RefCell::new(Player::new(config::play));
}

fuzz_target!(|input: &[u8]| PLAYER.with_borrow_mut(|player| player.case(input)));
