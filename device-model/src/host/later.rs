//! What the simulated host does at a time, or at a command, that has been set.

use std::fmt;

use zerocopy::little_endian::U32;

use crate::queues::HWC_QUEUE;
use crate::wire::queue::{Cqe, Eqe};

/// When something comes that only waits for the faults to be cleared.
pub(crate) const HELD: u64 = u64::MAX;

/// Something that comes later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Later {
    /// An event.
    Event {
        /// Its event queue.
        eq: u32,
        /// The event, owner bits 0.
        eqe: Eqe,
    },
    /// A completion.
    Completion {
        /// Its completion queue.
        cq: u32,
        /// The completion, owner bits 0.
        cqe: Cqe,
    },
    /// An interrupt.
    Interrupt {
        /// Its vector.
        vector: u16,
    },
}

impl Later {
    /// Event `kind` on the channel's event queue.
    pub fn event(kind: u8, detail: u32) -> Self {
        Self::Event { eq: HWC_QUEUE, eqe: eqe(kind, detail) }
    }
}

/// Event `kind` with `detail` in its first word.
pub(super) fn eqe(kind: u8, detail: u32) -> Eqe {
    Eqe { details: [U32::new(detail), U32::ZERO, U32::ZERO], info: U32::new(kind.into()) }
}

impl fmt::Display for Later {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Event { eq, eqe } => {
                write!(f, "event {} ({:#x}) on EQ {eq}", eqe.info.get() & 0xff, eqe.details[0].get())
            }
            Self::Completion { cq, .. } => write!(f, "completion on CQ {cq}"),
            Self::Interrupt { vector } => write!(f, "interrupt on vector {vector}"),
        }
    }
}

/// Something that was put off.
#[derive(Clone, Copy, Debug)]
struct PutOff {
    due_ns: u64,
    what: Later,
}

/// An event that is to be raised, perhaps again and again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Scheduled {
    /// The event queue.
    pub eq: u32,
    /// The event.
    pub eqe: Eqe,
    /// Commands that are still to come before it; the last of them raises it.
    pub commands: Option<u64>,
    /// Nanoseconds from then, or from when it was asked for.
    pub after_ns: u64,
    /// Nanoseconds from one to the next.
    pub every_ns: u64,
    /// How many are still to come.
    pub left: u64,
    /// When the next is due.
    pub due_ns: u64,
    /// As it was written.
    pub text: String,
}

/// Most things that wait at a time.
const MAX_WAITING: usize = 4096;

/// All that waits.
#[derive(Debug, Default)]
pub(super) struct Agenda {
    put_off: Vec<PutOff>,
    events: Vec<(u64, Scheduled)>,
    last_id: u64,
}

impl Agenda {
    /// `what` comes at `due_ns`; `false` if too much waits already.
    #[must_use]
    pub fn put_off(&mut self, due_ns: u64, what: Later) -> bool {
        let room = self.put_off.len() < MAX_WAITING;
        if room {
            self.put_off.push(PutOff { due_ns, what });
        }
        room
    }
    /// Raise `event` when it is due; the answer is its id, and when something has to be done next.
    pub fn schedule(&mut self, event: Scheduled) -> Option<u64> {
        if self.events.len() >= MAX_WAITING {
            return None;
        }
        self.last_id += 1;
        self.events.push((self.last_id, event));
        Some(self.last_id)
    }
    /// The next command has come: events that waited for it are due `after` it.
    pub fn command(&mut self, now_ns: u64) {
        for (_, event) in &mut self.events {
            match &mut event.commands {
                Some(commands @ 2..) => *commands -= 1,
                Some(_) => {
                    event.commands = None;
                    event.due_ns = now_ns.saturating_add(event.after_ns);
                }
                None => {}
            }
        }
    }
    /// Events wait for commands.
    pub fn counts_commands(&self) -> bool {
        self.events.iter().any(|(_, event)| event.commands.is_some())
    }
    /// Take what is due at `now_ns`, at most a storm's worth.
    pub fn take_due(&mut self, now_ns: u64) -> Vec<Later> {
        let due = |put_off: &PutOff| put_off.due_ns <= now_ns;
        let mut taken: Vec<Later> =
            self.put_off.iter().filter(|one| due(one)).map(|put_off| put_off.what).collect();
        self.put_off.retain(|put_off| !due(put_off));
        for (_, event) in &mut self.events {
            while event.commands.is_none()
                && event.left > 0
                && event.due_ns <= now_ns
                && taken.len() < MAX_WAITING
            {
                taken.push(Later::Event { eq: event.eq, eqe: event.eqe });
                event.left -= 1;
                event.due_ns = event.due_ns.saturating_add(event.every_ns);
            }
        }
        self.events.retain(|(_, event)| event.left > 0);
        taken
    }
    /// When something is due next.
    pub fn earliest(&self) -> Option<u64> {
        let put_off = self.put_off.iter().map(|put_off| put_off.due_ns).filter(|&due_ns| due_ns != HELD);
        let events = self.events.iter().filter(|(_, event)| event.commands.is_none());
        put_off.chain(events.map(|(_, event)| event.due_ns)).min()
    }
    /// What was held comes now; no more events come.
    pub fn heal(&mut self) {
        self.put_off.iter_mut().filter(|one| one.due_ns == HELD).for_each(|one| one.due_ns = 0);
        self.events.clear();
    }
    /// What was put off had to do with queues that are gone.
    pub fn forget(&mut self) {
        self.put_off.clear();
    }
    /// Ids, words, and how many are to come.
    pub fn events(&self) -> Vec<(u64, String, u64)> {
        self.events.iter().map(|(id, event)| (*id, event.text.clone(), event.left)).collect()
    }
    /// Take event `id` back, or all; `false` if there is none.
    pub fn stop(&mut self, id: Option<u64>) -> bool {
        let before = self.events.len();
        self.events.retain(|(known, _)| id.is_some_and(|id| id != *known));
        id.is_none() || self.events.len() != before
    }
}
