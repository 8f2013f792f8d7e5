//! What is kept of a vPort's receive side: what the driver has configured. Rings are kept with their objects.

use serde::{Deserialize, Serialize};

use super::{Coalescing, MAX_TABLE, NO_QUEUE, Receive, RxUpdate, State};
use crate::queues::Limits;
use crate::state::{StateError, check, impossible};
use crate::steer::{HASH_KEY_SIZE, HashTypes, Toeplitz};

/// The configuration. Queues are named by id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiveState {
    enabled: bool,
    /// Packets per completion: 1, 4 or 8.
    coalescing: u8,
    rss: bool,
    hash_types: u16,
    key: Vec<u8>,
    default_queue: Option<u32>,
    indirection: Vec<u32>,
}

impl Receive {
    /// What is kept.
    pub fn save(&self) -> ReceiveState {
        let state = self.lock();
        let State { enabled, coalescing, steering, queues, rings: _ } = &*state;
        let id = |position: u8| queues.get(usize::from(position)).map_or(NO_QUEUE, |queue| queue.id);
        ReceiveState {
            enabled: *enabled,
            coalescing: coalescing.packets() as u8,
            rss: steering.rss,
            hash_types: steering.hash_types.0,
            key: steering.toeplitz.key().to_vec(),
            default_queue: steering.default_queue.map(id),
            indirection: steering.indirection.iter().map(|&position| id(position)).collect(),
        }
    }
    /// Become `restored`, which has no rings yet.
    pub fn load(&self, restored: State) {
        *self.lock() = restored;
    }
}

impl ReceiveState {
    /// The configuration that this says, of a card with `limits`.
    ///
    /// # Errors
    /// No driver could have configured that.
    pub fn build(&self, limits: Limits) -> Result<State, StateError> {
        let known = |id: &u32| *id < limits.rqs || *id == NO_QUEUE;
        let all_known = self.default_queue.iter().chain(&self.indirection).all(known);
        check(all_known, || "steering to receive queues that can't be".into())?;
        let entries = self.indirection.len();
        let sized = entries == 0 || entries.is_power_of_two() && entries <= MAX_TABLE;
        check(sized, || format!("an indirection table of {entries} entries"))?;
        let key: &[u8; HASH_KEY_SIZE] =
            self.key.as_slice().try_into().map_err(|_| impossible("a Toeplitz key of the wrong length"))?;
        let mut state = State {
            enabled: self.enabled,
            coalescing: match self.coalescing {
                1 => Coalescing::Off,
                4 => Coalescing::Four,
                8 => Coalescing::Eight,
                packets => return Err(impossible(format!("completions of {packets} packets"))),
            },
            ..State::default()
        };
        let update = RxUpdate {
            default_rq: self.default_queue,
            table: Some(self.indirection.clone()),
            ..RxUpdate::default()
        };
        state.set_queues(&update).map_err(|error| impossible(error.to_string()))?;
        state.steering.rss = self.rss;
        state.steering.hash_types = HashTypes(self.hash_types);
        state.steering.toeplitz = Toeplitz::new(key);
        Ok(state)
    }
}
