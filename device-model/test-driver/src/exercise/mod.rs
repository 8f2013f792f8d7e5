//! Plays bytes to the card as a hostile guest would: the bodies of the fuzz targets, which tests on stable replay.
//!
//! A [`Machine`] is made once and reset after every case, in microseconds. Around each case stand the same checks: the
//! card writes only where the guest has granted it ([`ram`]), interrupts only where the guest lets it ([`doors`]), has
//! alive what the guest's successful commands made ([`model`]), completes no more than was asked for, and becomes idle.
//!
//! | target | what the bytes are |
//! |---|---|
//! | [`config`] | accesses to configuration space, the MSI-X table and its pending bits |
//! | [`bar0`] | accesses to BAR0: registers, the shared-memory window, doorbells |
//! | [`hwc`] | shared-memory requests and messages of the hardware channel, and the WQEs that carry them |
//! | [`queues`] | WQEs, buffers and doorbells of queues that a driver has made |
//! | [`packets`] | frames from the cable, and what RSS, coalescing and buffers are like |
//! | [`restore`] | saved states |
//! | [`device`] | steps of a driver, most of them legal |
//!
//! `vfio-user`'s function is with the server: `mana_vmm::vfio_user::exercise`.

pub mod bar0;
pub mod config;
pub mod device;
pub mod doors;
pub mod hwc;
pub mod machine;
pub mod message;
pub mod model;
pub mod packets;
pub mod port;
pub mod queues;
pub mod ram;
pub mod restore;
pub mod seeds;

use std::sync::Arc;

use mana_device::observe::{Event, Observer};

pub use machine::Machine;

/// A target: plays one input to a machine as new.
pub type Play = fn(&mut Machine, &[u8]);

/// The targets of this crate, by the name of their corpus.
pub const TARGETS: [(&str, Play); 7] = [
    ("config", config::play),
    ("bar0", bar0::play),
    ("hwc", hwc::play),
    ("queues", queues::play),
    ("packets", packets::play),
    ("restore", restore::play),
    ("device", device::play),
];

/// After so many cases, memory that none of them should have touched is looked at, too.
const SWEEP: usize = 64;

/// A machine for case after case.
pub struct Player {
    machine: Machine,
    play: Play,
    /// The last [`SWEEP`] inputs at most, and the number of all.
    recent: [Vec<u8>; SWEEP],
    cases: usize,
}

impl Player {
    /// One that plays inputs of this target.
    pub fn new(play: Play) -> Self {
        Self { machine: Machine::new(), play, recent: std::array::from_fn(|_| Vec::new()), cases: 0 }
    }
    /// As [`new`](Self::new), with an observer, for which all that the guest sends is decoded.
    pub fn observed(play: Play) -> Self {
        Self { machine: Machine::with(Some(Arc::new(Listener))), ..Self::new(play) }
    }
    /// As [`case`], but all of memory is looked at after the first `SWEEP` cases, so that a single one is judged
    /// whole, and from then on after as many at once.
    ///
    /// # Panics
    /// The card breaks a promise, now or, as the message says, at an earlier input.
    pub fn case(&mut self, input: &[u8]) {
        let kept = &mut self.recent[self.cases % SWEEP];
        kept.clear();
        kept.extend_from_slice(input);
        (self.play)(&mut self.machine, input);
        self.machine.end();
        self.cases += 1;
        if (self.cases < SWEEP || self.cases.is_multiple_of(SWEEP)) && !self.machine.ram.is_clear() {
            self.blame();
        }
    }
    /// Which of the last inputs was it that had the card write where nobody looked?
    fn blame(&self) -> ! {
        for input in &self.recent {
            let mut machine = Machine::new();
            (self.play)(&mut machine, input);
            machine.end();
            assert!(machine.ram.is_clear(), "the card wrote where nobody had granted it: input {input:02x?}");
        }
        panic!("the card wrote where nobody had granted it, after several of {:02x?}", self.recent);
    }
}

/// An observer that listens and keeps nothing.
pub struct Listener;

impl Observer for Listener {
    fn event(&self, _: u64, event: &Event) {
        std::hint::black_box(event);
    }
}

/// Play one input, look at what it has done to memory, and reset the machine.
///
/// # Panics
/// The card breaks a promise.
pub fn case(machine: &mut Machine, play: Play, input: &[u8]) {
    play(machine, input);
    machine.end();
    assert!(machine.ram.is_clear(), "the card wrote where nobody had granted it");
}

/// `sum` with `bytes` mixed in.
fn digest(sum: u64, bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(sum, |sum, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        (sum ^ u64::from_le_bytes(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
    })
}
