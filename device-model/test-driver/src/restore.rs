//! States that somebody has tampered with: what a card may do with one.

use mana_device::Ran;
use mana_device::doors::{RxChecksum, RxFrame, Work};

use crate::packet::{Flow, Protocol};
use crate::world::World;

/// Pieces of work that a card is given before it is taken to be busy for ever.
const MAX_RUNS: usize = 4096;
/// Doorbells of a page (`DOORBELL_OFFSET_*`).
const DOORBELLS: [u64; 6] = [0x000, 0x400, 0x408, 0x800, 0x820, 0xff8];

/// Have `world`'s card load `bytes`, and if it takes them, let it do whatever is in them: queues run, frames arrive,
/// doorbells ring, time passes. A reset ends all that, and nothing may be left. `true` if the state was taken.
///
/// # Panics
/// The device panics, never comes to rest, or keeps something over the reset.
pub fn exercise(world: &World, bytes: &[u8]) -> bool {
    world.run_by_hand();
    if world.device.load_bytes(bytes).is_err() {
        return false;
    }
    let again = world.device.save().to_bytes().expect("the state has an encoding");
    world.device.load_bytes(&again).expect("what a card saves it loads");
    world.device.resume();
    let ports = world.cables.len();
    let mut runs = MAX_RUNS;
    let mut run = |work| {
        while runs > 0 && world.device.run(work, 64) == Ran::More {
            runs -= 1;
        }
    };
    let flows = (0..8_u16).map(|n| Flow::v4([2; 6], n).frame(Protocol::Udp, &[7; 40]));
    let frames: Vec<_> = flows.collect();
    let frames: Vec<_> =
        frames.iter().map(|bytes| RxFrame { bytes, checksum: RxChecksum::Unknown }).collect();
    for round in 0..3_u64 {
        run(Work::Hwc);
        (1..6).for_each(|sq| run(Work::Transmit { sq }));
        for port in 0..ports {
            world.device.deliver(port, &frames);
        }
        for (page, id) in (0..3).flat_map(|page| (0..4).map(move |id| (page, id))) {
            for offset in DOORBELLS {
                let value: u64 = id | ((round * 32) | (1 << 31)) << 32;
                let at = 0x1_0000 + page * 4096 + offset;
                // Which pages there are is up to the configuration.
                let _ = world.device.bar_write(0, at, &value.to_le_bytes());
            }
        }
        world.clock.advance(2_000_000);
        world.device.run_timers();
    }
    world.device.reset();
    world.assert_empty_ledger();
    true
}
