//! Frames from the cable: see `mana_test_driver::exercise::packets`.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use mana_test_driver::exercise::{Player, packets};

thread_local! {
    static PLAYER: RefCell<Player> = RefCell::new(Player::new(packets::play));
}

fuzz_target!(|input: &[u8]| PLAYER.with_borrow_mut(|player| player.case(input)));
