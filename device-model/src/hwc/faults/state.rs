//! What is kept of responses that the simulated host has put off. The faults themselves are the host's and are not kept:
//! a restored card's host does nothing wrong until it is told to.

use serde::{Deserialize, Serialize};

use super::{HELD, Late, Letter, MAX_LATE};
use crate::state::{StateError, check};
use crate::wire::hwc::MAX_MESSAGE;

/// A response.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LetterState {
    /// When it is due; `None` if it is held until the faults are cleared.
    in_ns: Option<u64>,
    bytes: Vec<u8>,
    told: u32,
}

impl Late {
    /// What is kept at `now_ns`.
    pub fn save(&self, now_ns: u64) -> Vec<LetterState> {
        let save = |Letter { due_ns, bytes, told }: &Letter| LetterState {
            in_ns: (*due_ns != HELD).then(|| due_ns.saturating_sub(now_ns)),
            bytes: bytes.to_vec(),
            told: *told,
        };
        self.0.iter().map(save).collect()
    }
    /// The responses that `states` say, at `now_ns`.
    ///
    /// # Errors
    /// There are too many, or one is too long.
    pub fn restore(states: &[LetterState], now_ns: u64) -> Result<Self, StateError> {
        check(states.len() <= MAX_LATE, || format!("{} late responses", states.len()))?;
        let restore = |LetterState { in_ns, bytes, told }: &LetterState| {
            check(bytes.len() <= MAX_MESSAGE, || format!("a response of {} bytes", bytes.len()))?;
            let due_ns = in_ns.map_or(HELD, |ns| now_ns.saturating_add(ns).min(HELD - 1));
            Ok(Letter { due_ns, bytes: bytes.as_slice().into(), told: *told })
        };
        Ok(Self(states.iter().map(restore).collect::<Result<_, StateError>>()?))
    }
}
