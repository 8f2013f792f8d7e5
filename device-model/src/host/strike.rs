//! What faults make of the entries that the card posts, of interrupts and of registers.

use std::sync::Arc;

use zerocopy::IntoBytes;

use super::fault::{Action, Edit, Place, Point};
use super::later::{HELD, Later};
use super::random::Random;
use crate::observe::Event;
use crate::queues::Core;
use crate::ring::{Posted, Tamper};
use crate::wire::queue::{Cqe, Eqe};

/// What becomes of something that was struck.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Fate {
    /// How often it comes now.
    pub copies: usize,
    /// When it comes later, nanoseconds of the device's clock.
    pub later: Vec<u64>,
    /// The status that it gets, where it can have one.
    pub status: Option<u32>,
    /// It is done, but nobody hears of it.
    pub lost: bool,
}

/// Some bits of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bits {
    /// First byte of the 32-bit word that has them.
    at: usize,
    /// Lowest bit.
    shift: u32,
    width: u32,
}

const fn bits(at: usize, shift: u32, width: u32) -> Bits {
    Bits { at, shift, width }
}

/// Fields of an event (`struct gdma_eqe`). The owner bits are turned over by those of the value.
const EQE: &[(&str, Bits)] = &[
    ("details0", bits(0, 0, 32)),
    ("details1", bits(4, 0, 32)),
    ("details2", bits(8, 0, 32)),
    ("type", bits(12, 0, 8)),
    ("client_id", bits(12, 16, 2)),
    ("owner", bits(12, 29, 3)),
];
/// Fields of a completion (`struct gdma_cqe`, `struct mana_rxcomp_oob`, `struct mana_tx_comp_oob`, `struct hwc_rx_oob`).
const CQE: &[(&str, Bits)] = &[
    ("type", bits(0, 0, 6)),
    ("client_type", bits(0, 6, 2)),
    ("vendor_err", bits(0, 8, 24)),
    ("tx_wqe_offset", bits(8, 5, 27)),
    ("pkt_len", bits(8, 0, 16)),
    ("pkt_hash", bits(16, 0, 32)),
    ("rx_wqe_offset", bits(56, 0, 32)),
    ("hwc_wqe_offset", bits(12, 0, 32)),
    ("tx_oob_data_size", bits(24, 0, 32)),
    ("wq_num", bits(60, 0, 24)),
    ("is_sq", bits(60, 24, 1)),
    ("owner", bits(60, 29, 3)),
];
/// The only field of a register.
const REG: &[(&str, Bits)] = &[("value", bits(0, 0, 64))];
/// Fields of the answer in the shared-memory channel (`union smc_proto_hdr`).
const SMC: &[(&str, Bits)] = &[
    ("msg_type", bits(0, 0, 3)),
    ("msg_version", bits(0, 3, 3)),
    ("direction", bits(0, 7, 1)),
    ("status", bits(0, 8, 8)),
    ("reset_vf", bits(0, 24, 1)),
    ("owner_is_pf", bits(0, 31, 1)),
    ("value", bits(0, 0, 32)),
];

/// Fields that can be edited at `point`, commands left out.
fn fields(point: Point) -> &'static [(&'static str, Bits)] {
    match point {
        Point::Eqe => EQE,
        Point::Cqe => CQE,
        Point::Reg => REG,
        Point::Smc => SMC,
        Point::Command | Point::Msix => &[],
    }
}

/// The bits of `field` at `point`: by name, or `@OFFSET` and `@OFFSET.BYTES`.
///
/// # Errors
/// There are none; the sentence names those there are.
pub(crate) fn field(point: Point, field: &str) -> Result<Bits, String> {
    let fields = fields(point);
    if let Some((_, bits)) = fields.iter().find(|(name, _)| *name == field) {
        return Ok(*bits);
    }
    let raw = field.strip_prefix('@').and_then(|place| {
        let (at, bytes) = place.split_once('.').unwrap_or((place, "4"));
        Some(bits(
            at.parse().ok()?,
            0,
            bytes.parse::<u32>().ok().filter(|bytes| (1..=8).contains(bytes))? * 8,
        ))
    });
    raw.ok_or_else(|| {
        let names: Vec<&str> = fields.iter().map(|(name, _)| *name).collect();
        format!("there is no field `{field}` here, but {} and @OFFSET.BYTES", names.join(", "))
    })
}

impl Bits {
    /// Set them in `bytes` to `value`, as far as they are there.
    fn put(self, bytes: &mut [u8], value: u64) {
        let Some(place) = bytes.get_mut(self.at..) else { return };
        let mut word = [0; 8];
        word.iter_mut().zip(&*place).for_each(|(to, from)| *to = *from);
        let mask = if self.width >= 64 { u64::MAX } else { ((1 << self.width) - 1) << self.shift };
        let word = u64::from_le_bytes(word) & !mask | value << self.shift & mask;
        place.iter_mut().zip(word.to_le_bytes()).for_each(|(to, from)| *to = from);
    }
}

/// What strikes `place`, which is called `what`: `bytes` change, strikes are counted and traced.
#[cold]
pub(crate) fn strike(core: &Core, place: Place, what: &dyn Fn() -> String, bytes: &mut [u8]) -> Fate {
    let mut fate = Fate { copies: 1, later: Vec::new(), status: None, lost: false };
    for hit in core.host.strike(place) {
        core.counters.faults.bump();
        let whose = hit.to_string();
        let tell = |what: &str| {
            core.tracer.emit(|| Event::Fault { detail: format!("{whose}: {what}") });
        };
        tell(&format!("{}: {}", what(), hit.action));
        match hit.action {
            Action::Status(status) => fate.status = Some(status),
            Action::Drop => fate.copies = 0,
            Action::Lose => (fate.copies, fate.lost) = (0, true),
            Action::Delay(ns) => {
                fate.copies = 0;
                fate.later.push(core.tracer.now_ns().saturating_add(ns).min(HELD - 1));
            }
            Action::Hold => {
                fate.copies = 0;
                fate.later.push(HELD);
            }
            Action::Duplicate => fate.copies += 1,
            Action::Edit(Edit { field: name, value }) => {
                if let Ok(bits) = field(place.point, &name) {
                    bits.put(bytes, value);
                }
            }
            Action::Corrupt(seed) => tell(&Random::new(seed, hit.number).corrupt(bytes)),
            Action::Event(kind) => core.put_off(0, Later::event(kind, 0)),
        }
    }
    fate
}

/// Strikes the completions of one queue.
pub(crate) struct CqeStrikes {
    pub core: Arc<Core>,
    pub cq: u32,
}

impl Tamper for CqeStrikes {
    fn tamper(&self, mut cqe: Cqe) -> Posted {
        let (cq, wq, is_sq) = (self.cq, cqe.wq_num(), cqe.is_sq());
        let what = || format!("completion of {} {wq} on CQ {cq}", if is_sq { "SQ" } else { "RQ" });
        let fate = strike(&self.core, Place::of(Point::Cqe, cq), &what, cqe.as_mut_bytes());
        for due_ns in fate.later {
            self.core.put_off(due_ns, Later::Completion { cq, cqe });
        }
        Posted { cqe, copies: fate.copies }
    }
}

/// What strikes the event `eqe` on its way to event queue `eq`; the answer is the event, and how often it comes now.
#[cold]
pub(crate) fn strike_event(core: &Core, eq: u32, eqe: Eqe) -> (Eqe, usize) {
    let mut eqe = eqe;
    let kind = eqe.info.get() & 0xff;
    let place = Place { point: Point::Eqe, code: kind, queue: eq };
    let fate = strike(core, place, &|| format!("event {kind} on EQ {eq}"), eqe.as_mut_bytes());
    for due_ns in fate.later {
        core.put_off(due_ns, Later::Event { eq, eqe });
    }
    (eqe, fate.copies)
}

/// What strikes the interrupt on `vector`; the answer is how often it comes now.
#[cold]
pub(crate) fn strike_interrupt(core: &Core, vector: u16) -> usize {
    let place = Place::of(Point::Msix, vector.into());
    let fate = strike(core, place, &|| format!("interrupt on vector {vector}"), &mut []);
    for due_ns in fate.later {
        core.put_off(due_ns, Later::Interrupt { vector });
    }
    fate.copies
}

/// What strikes a read of the registers at `offset`.
#[cold]
pub(crate) fn strike_register(core: &Core, offset: u64, data: &mut [u8]) {
    core.host.overlay_registers(offset, data);
    let place = Place::of(Point::Reg, offset as u32);
    let fate = strike(core, place, &|| format!("register {offset:#x}"), data);
    if fate.copies == 0 {
        data.fill(0xff);
    }
}

/// What strikes a request `kind` in the shared-memory channel, whose answer is `header`.
#[cold]
pub(crate) fn strike_smc(core: &Core, kind: &'static str, header: &mut u32) -> Fate {
    let mut bytes = header.to_le_bytes();
    let fate = strike(core, Place::of(Point::Smc, 0), &|| kind.to_owned(), &mut bytes);
    *header = u32::from_le_bytes(bytes);
    fate
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_change_and_their_neighbours_stay() {
        let mut bytes = [0xff; 16];
        field(Point::Eqe, "type").unwrap().put(&mut bytes, 0x87);
        assert_eq!(bytes[12..], [0x87, 0xff, 0xff, 0xff]);
        field(Point::Eqe, "owner").unwrap().put(&mut bytes, 0);
        assert_eq!(bytes[15], 0x1f);
        field(Point::Reg, "value").unwrap().put(&mut bytes[..4], 0x1234);
        assert_eq!(bytes[..5], [0x34, 0x12, 0, 0, 0xff]);
        field(Point::Cqe, "@14.2").unwrap().put(&mut bytes, 0xabcd);
        assert_eq!(bytes[14..], [0xcd, 0xab]);
        field(Point::Cqe, "@60").unwrap().put(&mut bytes, 1);
        assert!(field(Point::Msix, "type").is_err() && field(Point::Cqe, "@0.9").is_err());
    }
}
