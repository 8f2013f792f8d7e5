//! What the simulated host does to commands: answers that are wrong, late, lost, or come twice.

pub mod state;

use zerocopy::IntoBytes;

use crate::card::Card;
use crate::count;
use crate::dma::GuestRam;
use crate::host::{Action, Edit, Hit, LENGTH, Later, Place, Random, locate};
use crate::observe::Event;
use crate::status::CommandError;
use crate::timers::Timer;
use crate::wire::hwc::MAX_MESSAGE;

/// Most responses that wait for their time.
const MAX_LATE: usize = 64;

/// A response that is to come later.
pub struct Letter {
    /// When, nanoseconds of the device's clock; [`HELD`] when the faults are cleared.
    due_ns: u64,
    bytes: Box<[u8]>,
    /// The length that its completion tells.
    pub told: u32,
}

/// Never, unless the faults are cleared.
const HELD: u64 = u64::MAX;

/// Responses that wait for their time, oldest first.
#[derive(Default)]
pub struct Late(Vec<Letter>);

impl Late {
    /// Nothing waits: the rule.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    /// Have `bytes` delivered at `due_ns`.
    fn put(&mut self, card: &Card, due_ns: u64, bytes: &[u8], told: u32) {
        if self.0.len() >= MAX_LATE {
            count!(card.core.counters.hwc_lost_responses, "too many responses wait: one is lost");
            return;
        }
        self.0.push(Letter { due_ns, bytes: bytes.into(), told });
        if due_ns != HELD {
            card.core.add_timer(due_ns, Timer::Host);
        }
    }
    /// Take the first that is due at `now_ns`.
    pub fn take(&mut self, now_ns: u64) -> Option<(Box<[u8]>, u32)> {
        let at = self.0.iter().position(|letter| letter.due_ns <= now_ns)?;
        let letter = self.0.remove(at);
        Some((letter.bytes, letter.told))
    }
    /// One is due.
    pub fn any_due(&self, now_ns: u64) -> bool {
        self.0.iter().any(|letter| letter.due_ns <= now_ns)
    }
    /// What waits for the faults to be cleared comes now.
    pub fn release(&mut self) {
        self.0.iter_mut().filter(|letter| letter.due_ns == HELD).for_each(|letter| letter.due_ns = 0);
    }
}

/// What strikes the command `name` (`code`), whose request has number `seq`: counted and traced.
pub fn strike(card: &Card, code: u32, name: &str, seq: u64) -> Vec<Hit> {
    let hits = card.core.host.strike(Place::command(code));
    for hit in &hits {
        card.core.counters.faults.bump();
        let action = &hit.action;
        card.core.tracer.emit(|| {
            let detail = format!("{hit}: {name} (request {seq}): {action}");
            Event::Fault { detail }
        });
    }
    hits
}

/// Why a command is not done, if it is not.
pub fn refusal(hits: &[Hit]) -> Option<CommandError> {
    let refused = hits.iter().any(|hit| matches!(hit.action, Action::Status(_) | Action::Drop));
    refused.then(|| CommandError::wrong_state("the simulated host does not do it"))
}

/// Whether no answer ever comes.
pub fn is_silent(hits: &[Hit]) -> bool {
    hits.iter().any(|hit| matches!(hit.action, Action::Drop | Action::Lose))
}

/// Change `response`, to a command with this `code`, and raise events, as `hits` say; the answer is the length that its
/// completion tells.
pub fn garble(card: &Card, ram: &GuestRam<'_>, hits: &[Hit], code: u32, response: &mut [u8]) -> u32 {
    let mut told = response.len() as u32;
    for hit in hits {
        match &hit.action {
            Action::Status(status) => put(response, STATUS, u64::from(*status)),
            Action::Edit(Edit { field, value }) if field == LENGTH => told = *value as u32,
            // A field that only the response of another command has stays out of this one.
            Action::Edit(Edit { field, value }) => {
                if let Ok(range) = locate(Some(code), field) {
                    put(response, range, *value);
                }
            }
            Action::Corrupt(seed) => {
                let changes = Random::new(*seed, hit.number).corrupt(response);
                card.core.tracer.emit(|| Event::Fault { detail: format!("{hit}: {changes}") });
            }
            Action::Event(kind) => card.queues.raise(ram, Later::event(*kind, 0)),
            Action::Drop | Action::Lose | Action::Delay(_) | Action::Hold | Action::Duplicate => {}
        }
    }
    told.min(MAX_MESSAGE as u32 * 2)
}

/// Keep what is to come later; the answer is whether `response` comes now, too.
pub fn post_later(card: &Card, late: &mut Late, hits: &[Hit], response: &[u8], told: u32) -> bool {
    let mut now = true;
    for Hit { action, .. } in hits {
        match action {
            Action::Drop | Action::Lose => now = false,
            Action::Delay(ns) => {
                now = false;
                let due_ns = card.core.tracer.now_ns().saturating_add(*ns).min(HELD - 1);
                late.put(card, due_ns, response, told);
            }
            Action::Hold => {
                now = false;
                late.put(card, HELD, response, told);
            }
            Action::Duplicate => late.put(card, 0, response, told),
            Action::Status(_) | Action::Edit(_) | Action::Corrupt(_) | Action::Event(_) => {}
        }
    }
    now
}

/// Bytes of a response's status.
const STATUS: std::ops::Range<usize> = 24..28;

fn put(response: &mut [u8], range: std::ops::Range<usize>, value: u64) {
    let to = response.get_mut(range.start..).unwrap_or_default();
    let bytes = value.to_le();
    to.iter_mut().zip(bytes.as_bytes().iter().take(range.len())).for_each(|(to, from)| *to = *from);
}
