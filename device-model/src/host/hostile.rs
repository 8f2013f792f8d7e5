//! A host that lies: what it says is wrong now and then, in ways that a seed decides.
//!
//! Whether the n-th message, event or completion of a queue is a lie, and which, follows from the seed, the queue and n
//! alone: threads and time have no say in it, so the same seed tells a driver that does the same the same lies.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::fault::{Action, Edit, NS_PER_MS, Place, Point};
use super::random::Random;
use super::words::LENGTH;

/// Where a host lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Where {
    /// In completions.
    Completions,
    /// In events and interrupts.
    Events,
    /// In answers of the hardware channel.
    Messages,
    /// In registers and in the shared-memory channel.
    Registers,
}

impl Where {
    const ALL: [(&'static str, Self); 4] = [
        ("completions", Self::Completions),
        ("events", Self::Events),
        ("messages", Self::Messages),
        ("registers", Self::Registers),
    ];
    /// The place that is called so.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|(name, _)| *name == text).map(|(_, place)| place)
    }
    fn of(point: Point) -> Self {
        match point {
            Point::Cqe => Self::Completions,
            Point::Eqe | Point::Msix => Self::Events,
            Point::Command => Self::Messages,
            Point::Reg | Point::Smc => Self::Registers,
        }
    }
}

/// Something of which the host may lie: the n-th of its kind on a queue since the host is hostile.
///
/// As text `cqe:5:17`, the 17th completion of queue 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chance {
    point: Point,
    queue: u32,
    nth: u64,
}

impl Chance {
    const COMMAND: &str = "command";

    /// The chance that is called so.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let name = parts.next()?;
        let named = Point::NAMED.into_iter().find(|(known, _)| *known == name).map(|(_, point)| point);
        let point = named.or_else(|| (name == Self::COMMAND).then_some(Point::Command))?;
        let (queue, nth) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        parts.next().is_none().then_some(Self { point, queue, nth })
    }
}

impl fmt::Display for Chance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { point, queue, nth } = self;
        let name = if *point == Point::Command { Self::COMMAND } else { point.name() };
        write!(f, "{name}:{queue}:{nth}")
    }
}

/// A habit of lying.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hostility {
    /// What decides the lies.
    pub seed: u64,
    /// One in so many is a lie, on average; not 0.
    pub rate: u32,
    /// Where.
    pub at: Vec<Where>,
}

impl Hostility {
    /// One in how many, if nobody says otherwise.
    pub const RATE: u32 = 100;

    /// Lies of `seed` at the usual rate, in all but registers: those decide whether a driver comes up at all.
    pub fn new(seed: u64) -> Self {
        Self { seed, rate: Self::RATE, at: vec![Where::Completions, Where::Events, Where::Messages] }
    }
    /// The points where it lies, a bit each.
    pub(super) fn points(&self) -> u8 {
        let points = [Point::Command, Point::Smc, Point::Eqe, Point::Cqe, Point::Msix, Point::Reg];
        let lying = points.into_iter().filter(|&point| self.at.contains(&Where::of(point)));
        lying.fold(0, |bits, point| bits | 1 << point as u8)
    }
}

/// A host at it.
#[derive(Debug)]
pub(super) struct Liar {
    pub hostility: Hostility,
    /// How often each point of each queue had its chance.
    chances: BTreeMap<(u8, u32), u64>,
    lies: u64,
    /// Only these lies of the seed are told; all, if there is none.
    only: Vec<Chance>,
    /// The first [`MAX_TOLD`](Self::MAX_TOLD) that were told.
    told: Vec<(Chance, Action)>,
}

impl Liar {
    /// Most lies that are remembered.
    const MAX_TOLD: usize = 4096;

    pub fn new(hostility: Hostility, only: Vec<Chance>) -> Self {
        Self { hostility, chances: BTreeMap::new(), lies: 0, only, told: Vec::new() }
    }
    /// What was told so far, in order.
    pub fn told(&self) -> &[(Chance, Action)] {
        &self.told
    }
    /// The lie at `place`, if it is time for one, and its number.
    pub fn lie(&mut self, place: Place) -> Option<(u64, Action)> {
        let Hostility { seed, rate, at } = &self.hostility;
        if !at.contains(&Where::of(place.point)) {
            return None;
        }
        let chance = self.chances.entry((place.point as u8, place.queue)).or_default();
        *chance += 1;
        let stream = *chance << 32 ^ u64::from(place.queue) << 3 ^ place.point as u64;
        let mut random = Random::new(*seed, stream);
        let chance = Chance { point: place.point, queue: place.queue, nth: *chance };
        let left_out = !self.only.is_empty() && !self.only.contains(&chance);
        if random.below((*rate).into()) != 0 || left_out {
            return None;
        }
        self.lies += 1;
        let lie = invent(place.point, &mut random);
        if self.told.len() < Self::MAX_TOLD {
            self.told.push((chance, lie.clone()));
        }
        Some((self.lies, lie))
    }
}

/// A number that is likely to be trouble: an extreme, a power of two or beside one, or any.
fn number(random: &mut Random) -> u64 {
    match random.below(4) {
        0 => 0,
        1 => u64::MAX,
        2 => (1 << random.below(32)) - 1 + random.below(3),
        _ => random.next(),
    }
}

fn edit(field: &str, value: u64) -> Action {
    Action::Edit(Edit { field: field.to_owned(), value })
}

/// A lie for `point`.
fn invent(point: Point, random: &mut Random) -> Action {
    let late = |random: &mut Random| Action::Delay((1 + random.below(20)) * NS_PER_MS);
    let garble = |random: &mut Random| Action::Corrupt(random.next());
    match (point, random.below(12)) {
        (Point::Msix, 0..6) | (Point::Cqe | Point::Eqe, 0) => Action::Duplicate,
        (Point::Msix, 6..9) | (Point::Cqe | Point::Eqe | Point::Command, 1..3) => late(random),
        (Point::Msix, _) | (Point::Cqe | Point::Eqe, 3) => Action::Drop,
        (Point::Cqe, 4) => edit("type", random.below(64)),
        (Point::Cqe, 5) => edit("pkt_len", number(random)),
        (Point::Cqe, 6) => edit("wq_num", number(random)),
        (Point::Cqe, 7) => edit("rx_wqe_offset", number(random)),
        (Point::Cqe | Point::Eqe, 8) => edit("owner", 1 + random.below(7)),
        (Point::Eqe, 4) => {
            edit("type", [3, 64, 129, 130, 131, 132, 133, 134, 135, 176][random.below(10) as usize])
        }
        (Point::Eqe, 5) => edit("type", random.below(256)),
        (Point::Eqe, 6 | 7) => edit("details0", number(random)),
        (Point::Command, 0) => Action::Duplicate,
        (Point::Command, 3) => Action::Lose,
        (Point::Command, 4) => edit("hwc_msg_id", number(random)),
        (Point::Command, 5) => edit(LENGTH, number(random) & 0x1fff),
        (Point::Command, 6) => edit("status", number(random)),
        (Point::Command, 7) => edit("msg_size", number(random)),
        // A word of the body.
        (Point::Command, 8 | 9) => edit(&format!("@{}", 32 + 4 * random.below(12)), number(random)),
        (Point::Reg, 0..4) => edit("value", number(random)),
        (Point::Smc, 0..4) => Action::Status(1 + random.below(255) as u32),
        (Point::Smc, 4..6) => late(random),
        (Point::Smc, 6) => Action::Lose,
        _ => garble(random),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lies(seed: u64, rate: u32, count: u32) -> Vec<(u64, Action)> {
        let mut liar = Liar::new(Hostility { rate, ..Hostility::new(seed) }, Vec::new());
        (0..count).filter_map(|n| liar.lie(Place::of(Point::Cqe, n % 4))).collect()
    }

    #[test]
    fn lies_follow_from_the_seed_and_come_at_their_rate() {
        assert_eq!(lies(1, 10, 10_000), lies(1, 10, 10_000));
        assert_ne!(lies(1, 10, 1000), lies(2, 10, 1000));
        let count = lies(3, 10, 10_000).len();
        assert!((800..1200).contains(&count), "{count}");
        assert_eq!(lies(3, 1, 50).len(), 50);
    }

    #[test]
    fn queues_do_not_depend_on_each_other() {
        let alone = {
            let mut liar = Liar::new(Hostility::new(5), Vec::new());
            (0..1000)
                .filter_map(|_| liar.lie(Place::of(Point::Eqe, 1)))
                .map(|(_, lie)| lie)
                .collect::<Vec<_>>()
        };
        let mut liar = Liar::new(Hostility::new(5), Vec::new());
        let mut among = Vec::new();
        for n in 0..1000 {
            among.extend(liar.lie(Place::of(Point::Eqe, 1)).map(|(_, lie)| lie));
            for queue in 0..n % 3 {
                let _ = liar.lie(Place::of(Point::Cqe, queue));
            }
        }
        assert!(!alone.is_empty());
        assert_eq!(alone, among);
    }

    #[test]
    fn some_of_a_seeds_lies_are_the_same_by_themselves() {
        let hostility = || Hostility { rate: 10, ..Hostility::new(7) };
        let tell = |only| {
            let mut liar = Liar::new(hostility(), only);
            (0..1000).for_each(|n| _ = liar.lie(Place::of(Point::Cqe, n % 4)));
            liar.told().to_vec()
        };
        let all = tell(Vec::new());
        let some: Vec<_> = all.iter().skip(3).step_by(5).cloned().collect();
        assert!(some.len() > 10);
        let read_back = |(chance, _): &(Chance, Action)| Chance::parse(&chance.to_string()).unwrap();
        assert_eq!(tell(some.iter().map(read_back).collect()), some);
        for wrong in ["", "cqe", "cqe:1", "cqe:1:x", "cqe:1:2:3", "any:1:2", "command:-1:2"] {
            assert_eq!(Chance::parse(wrong), None, "{wrong}");
        }
        assert_eq!(Chance::parse("command:0:3").unwrap().to_string(), "command:0:3");
    }

    #[test]
    fn it_lies_only_where_it_is_told_to() {
        let hostility = Hostility { rate: 1, at: vec![Where::Registers], ..Hostility::new(1) };
        assert_eq!(hostility.points(), 1 << Point::Reg as u8 | 1 << Point::Smc as u8);
        let mut liar = Liar::new(hostility, Vec::new());
        assert_eq!(liar.lie(Place::command(2)), None);
        assert!(liar.lie(Place::of(Point::Reg, 8)).is_some());
        assert_eq!(Where::parse("events"), Some(Where::Events));
        assert_eq!(Where::parse("everywhere"), None);
    }
}
