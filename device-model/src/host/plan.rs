//! All faults that are set.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use super::fault::{Action, Fault, Place, Point};
use super::hostile::{Chance, Hostility, Liar};
use super::later::{Agenda, Later, Scheduled};
use super::profile::Registers;
use crate::sync::lock;

/// Most faults at a time.
const MAX_FAULTS: usize = 1024;

/// A fault has struck.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hit {
    /// The fault's id; `None` if it is a lie of a hostile host.
    pub fault: Option<u64>,
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
    /// Events wait for commands.
    counting: AtomicBool,
    commands: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    faults: Vec<(u64, Fault)>,
    last_id: u64,
    /// Strikes of faults that are gone.
    old_hits: u64,
    agenda: Agenda,
    liar: Option<Liar>,
    registers: Registers,
}

impl fmt::Display for Hit {
    /// Whose doing it is.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.fault {
            Some(id) => write!(f, "fault {id}"),
            None => write!(f, "lie {}", self.number),
        }
    }
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
        let State { faults, liar, .. } = &mut *state;
        let hits = faults.iter_mut().filter_map(|(id, fault)| {
            let number = fault.strike(place)?;
            Some(Hit { fault: Some(*id), number, action: fault.action.clone() })
        });
        let lie = |(number, action)| Hit { fault: None, number, action };
        let lies = liar.as_mut().and_then(|liar| liar.lie(place)).map(lie);
        hits.chain(lies).collect()
    }
    /// Lie from now on, or be honest again.
    pub fn set_hostile(&self, hostility: Option<Hostility>) {
        self.set_liar(hostility.map(|hostility| Liar::new(hostility, Vec::new())));
    }
    /// Of the lies of `hostility`, tell `only` these from now on; all, if there is none.
    pub(super) fn set_lies(&self, hostility: Hostility, only: Vec<Chance>) {
        self.set_liar(Some(Liar::new(hostility, only)));
    }
    fn set_liar(&self, liar: Option<Liar>) {
        let mut state = lock(&self.state);
        state.liar = liar;
        self.watch(&state);
    }
    /// Lies that were told since the host is hostile, as far as they are remembered.
    pub(super) fn told(&self) -> Vec<(Chance, Action)> {
        lock(&self.state).liar.as_ref().map_or_else(Vec::new, |liar| liar.told().to_vec())
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
            None => {
                hits += std::mem::take(&mut state.old_hits);
                state.agenda.heal();
                state.liar = None;
            }
        }
        self.watch(&state);
        Some(hits)
    }
    /// Id, words and strikes of each fault.
    pub(super) fn list(&self) -> Vec<(u64, String, u64)> {
        let state = lock(&self.state);
        state.faults.iter().map(|(id, fault)| (*id, fault.text.clone(), fault.hits)).collect()
    }
    /// `what` comes at `due_ns`; `false` if too much waits already.
    #[must_use]
    pub fn put_off(&self, due_ns: u64, what: Later) -> bool {
        lock(&self.state).agenda.put_off(due_ns, what)
    }
    /// Take what is due at `now_ns`.
    pub fn take_due(&self, now_ns: u64) -> Vec<Later> {
        lock(&self.state).agenda.take_due(now_ns)
    }
    /// When something is due next.
    pub fn earliest(&self) -> Option<u64> {
        lock(&self.state).agenda.earliest()
    }
    /// All queues are gone, and what was put off with them.
    pub fn forget_put_off(&self) {
        lock(&self.state).agenda.forget();
    }
    /// Raise `event` when it is due; the answer is its id.
    pub(super) fn schedule(&self, event: Scheduled) -> Option<u64> {
        let mut state = lock(&self.state);
        let id = state.agenda.schedule(event);
        self.watch(&state);
        id
    }
    /// Ids, words, and how many are to come, of each event.
    pub(super) fn events(&self) -> Vec<(u64, String, u64)> {
        lock(&self.state).agenda.events()
    }
    /// Take event `id` back, or all; `false` if there is none.
    pub(super) fn stop(&self, id: Option<u64>) -> bool {
        let mut state = lock(&self.state);
        let stopped = state.agenda.stop(id);
        self.watch(&state);
        stopped
    }
    fn watch(&self, state: &State) {
        self.counting.store(state.agenda.counts_commands(), Ordering::SeqCst);
        let lies = u8::from(!state.registers.are_true()) << Point::Reg as u8;
        let lies = lies | state.liar.as_ref().map_or(0, |liar| liar.hostility.points());
        let bits = state.faults.iter().fold(lies, |bits, (_, fault)| bits | 1 << fault.matcher.point as u8);
        self.watched.store(bits, Ordering::SeqCst);
    }
    /// BAR0's registers read so from now on.
    pub fn set_registers(&self, registers: Registers) {
        let mut state = lock(&self.state);
        state.registers = registers;
        self.watch(&state);
    }
    /// What the registers at `offset` read as.
    pub fn overlay_registers(&self, offset: u64, data: &mut [u8]) {
        lock(&self.state).registers.overlay(offset, data);
    }
    /// A command has come at `now_ns`. `true` if that may have made events due.
    #[must_use]
    pub fn count_command(&self, now_ns: impl FnOnce() -> u64) -> bool {
        self.commands.fetch_add(1, Ordering::Relaxed);
        let counting = self.counting.load(Ordering::Relaxed);
        if counting {
            let mut state = lock(&self.state);
            state.agenda.command(now_ns());
            self.watch(&state);
        }
        counting
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
