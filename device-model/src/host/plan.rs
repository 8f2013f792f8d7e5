//! All faults that are set.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use super::fault::{Action, Fault, Place, Point};
use crate::sync::lock;

/// Most faults at a time.
const MAX_FAULTS: usize = 1024;

/// A fault has struck.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hit {
    /// The fault's id.
    pub fault: u64,
    /// How often it has struck, this time included.
    pub number: u64,
    /// What it does.
    pub action: Action,
}

/// What the host will do wrong.
///
/// Lock order: the state is taken last of all.
#[derive(Debug, Default)]
pub struct Plan {
    /// A bit for each [`Point`] that a fault watches.
    watched: AtomicU8,
    commands: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    faults: Vec<(u64, Fault)>,
    last_id: u64,
    /// Strikes of faults that are gone.
    old_hits: u64,
}

impl Plan {
    /// Whether any fault watches `point`: one load.
    #[inline]
    pub fn watches(&self, point: Point) -> bool {
        self.watched.load(Ordering::Relaxed) & 1 << point as u8 != 0
    }
    /// What strikes `place`, in the order in which the faults were set.
    pub fn strike(&self, place: Place) -> Vec<Hit> {
        if !self.watches(place.point) {
            return Vec::new();
        }
        let mut state = lock(&self.state);
        let faults = state.faults.iter_mut();
        let hits = faults.filter_map(|(id, fault)| {
            let number = fault.strike(place)?;
            Some(Hit { fault: *id, number, action: fault.action.clone() })
        });
        hits.collect()
    }
    /// Set `fault`; the answer is its id, or `None` if there are too many.
    pub(super) fn add(&self, fault: Fault) -> Option<u64> {
        let mut state = lock(&self.state);
        if state.faults.len() >= MAX_FAULTS {
            return None;
        }
        state.last_id += 1;
        let id = state.last_id;
        state.faults.push((id, fault));
        self.watch(&state);
        Some(id)
    }
    /// Take fault `id` back, or all; the answer is how often they had struck, and of all, how often any had since the
    /// last time. `None` if there is no fault `id`.
    pub(super) fn clear(&self, id: Option<u64>) -> Option<u64> {
        let mut state = lock(&self.state);
        let before = state.faults.len();
        let mut hits = 0;
        state.faults.retain(|(known, fault)| {
            let goes = id.is_none_or(|id| id == *known);
            hits += if goes { fault.hits } else { 0 };
            !goes
        });
        if id.is_some() && state.faults.len() == before {
            return None;
        }
        match id {
            Some(_) => state.old_hits += hits,
            None => hits += std::mem::take(&mut state.old_hits),
        }
        self.watch(&state);
        Some(hits)
    }
    /// Id, words and strikes of each fault.
    pub(super) fn list(&self) -> Vec<(u64, String, u64)> {
        let state = lock(&self.state);
        state.faults.iter().map(|(id, fault)| (*id, fault.text.clone(), fault.hits)).collect()
    }
    fn watch(&self, state: &State) {
        let bits = state.faults.iter().fold(0, |bits, (_, fault)| bits | 1 << fault.matcher.point as u8);
        self.watched.store(bits, Ordering::SeqCst);
    }
    /// A command has come.
    pub fn count_command(&self) {
        self.commands.fetch_add(1, Ordering::Relaxed);
    }
    /// Commands since the last mark.
    pub fn commands(&self) -> u64 {
        self.commands.load(Ordering::Relaxed)
    }
    /// Count commands from 0.
    pub(super) fn mark(&self) {
        self.commands.store(0, Ordering::Relaxed);
    }
}
