//! Raw messages to the vfio-user server: see `mana_vmm::vfio_user::exercise`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mana_vmm::vfio_user::exercise::Exercise;

thread_local! {
    static EXERCISE: Exercise = Exercise::new().expect("the host has descriptors");
}

fuzz_target!(|input: &[u8]| {
    EXERCISE.with(|exercise| exercise.play(input));
});
