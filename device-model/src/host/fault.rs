//! A fault: where it strikes, and what it does there.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Kinds of places where faults strike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum Point {
    /// A command of the hardware channel, between its request and its response.
    Command,
    /// A request in the shared-memory channel.
    Smc,
    /// An event on its way to an event queue.
    Eqe,
    /// A completion on its way to a completion queue.
    Cqe,
    /// An interrupt.
    Msix,
    /// A read of BAR0's registers.
    Reg,
}

impl Point {
    /// Words for all but commands, which go by their own names.
    pub(super) const NAMED: [(&'static str, Self); 5] = [
        ("smc", Self::Smc),
        ("eqe", Self::Eqe),
        ("cqe", Self::Cqe),
        ("msix", Self::Msix),
        ("reg", Self::Reg),
    ];
    /// The word for it.
    pub(super) fn name(self) -> &'static str {
        Self::NAMED.into_iter().find(|(_, point)| *point == self).map_or("any", |(name, _)| name)
    }
}

/// Something that a fault may strike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// What it is.
    pub point: Point,
    /// Commands: the code; events: the type; else 0.
    pub code: u32,
    /// Events and completions: the queue's id; interrupts: the vector; register reads: the offset.
    pub queue: u32,
}

impl Place {
    /// The command `code`.
    pub fn command(code: u32) -> Self {
        Self { point: Point::Command, code, queue: 0 }
    }
    /// A `point` of `queue`.
    pub fn of(point: Point, queue: u32) -> Self {
        Self { point, code: 0, queue }
    }
}

/// A value to put into an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edit {
    /// The driver's name of the field, or `@OFFSET` or `@OFFSET.BYTES`, which counts from the message's start.
    pub field: String,
    /// The value, cut to the field's size.
    pub value: u64,
}

/// What a fault does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Not done, and answered with this status.
    Status(u32),
    /// Not done and never answered; events, completions and interrupts get lost, registers read as all ones.
    Drop,
    /// Done, but the answer gets lost.
    Lose,
    /// Comes so many nanoseconds later; what follows does not wait for it.
    Delay(u64),
    /// Comes when the faults are cleared; what follows does not wait for it.
    Hold,
    /// Comes twice.
    Duplicate,
    /// Comes with another value in a field.
    Edit(Edit),
    /// Comes with some bytes changed, which ones the seed decides.
    Corrupt(u64),
    /// An event of this type comes first.
    Event(u8),
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "status:{status:#x}"),
            Self::Drop => write!(f, "drop"),
            Self::Lose => write!(f, "lose"),
            Self::Delay(ns) => write!(f, "delay:{}", ns / NS_PER_MS),
            Self::Hold => write!(f, "hold"),
            Self::Duplicate => write!(f, "duplicate"),
            Self::Edit(Edit { field, value }) => write!(f, "edit:{field}={value:#x}"),
            Self::Corrupt(seed) => write!(f, "corrupt:{seed}"),
            Self::Event(kind) => write!(f, "event:{kind}"),
        }
    }
}

pub(super) const NS_PER_MS: u64 = 1_000_000;

/// Which things of its kind a fault means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Matcher {
    pub point: Point,
    /// Commands: only this code; events: only this type.
    pub code: Option<u32>,
    /// Only of this queue, vector or offset.
    pub queue: Option<u32>,
}

impl Matcher {
    fn matches(self, place: Place) -> bool {
        self.point == place.point
            && self.code.is_none_or(|code| code == place.code)
            && self.queue.is_none_or(|queue| queue == place.queue)
    }
}

/// A fault that is set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub matcher: Matcher,
    /// Matches that pass before the first that is struck.
    pub skip: u64,
    /// How many are struck.
    pub count: u64,
    pub action: Action,
    /// As it was written.
    pub text: String,
    /// Matches so far.
    pub seen: u64,
    /// Strikes so far.
    pub hits: u64,
}

impl Fault {
    /// Count `place` if it is meant; the answer is the strike's number if it is struck.
    pub fn strike(&mut self, place: Place) -> Option<u64> {
        if !self.matcher.matches(place) {
            return None;
        }
        self.seen = self.seen.saturating_add(1);
        if self.seen <= self.skip || self.hits >= self.count {
            return None;
        }
        self.hits += 1;
        Some(self.hits)
    }
}
