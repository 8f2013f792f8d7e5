//! What is kept of MSI-X: the table and the pending bits. Enable and Function Mask stand in configuration space.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::{ENABLE, Entry, FUNCTION_MASK, Msix};
use crate::doors::MsiMessage;
use crate::state::{StateError, check};
use crate::sync::lock;

/// The table's entries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    entries: Vec<EntryState>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct EntryState {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
}

impl Msix {
    /// What is kept.
    pub fn save(&self) -> MsixState {
        let save = |entry: &Entry| {
            let Entry { message: MsiMessage { address, data }, masked, pending, routed: _ } = *entry;
            EntryState { address, data, masked, pending }
        };
        MsixState { entries: self.entries.iter().map(|entry| save(&lock(entry))).collect() }
    }
    /// Whether a driver can have brought `state` about.
    ///
    /// # Errors
    /// It can't.
    pub fn check(&self, state: &MsixState) -> Result<(), StateError> {
        let MsixState { entries } = state;
        check(entries.len() == self.entries.len(), || format!("{} MSI-X vectors", entries.len()))?;
        let aligned = entries.iter().all(|entry| entry.address & 3 == 0);
        check(aligned, || "a message address that is not a multiple of 4".into())
    }
    /// Become `state`, with Message Control as in configuration space. Routes are told again when they are needed.
    pub fn load(&self, state: &MsixState, control: u16) {
        for (entry, saved) in self.entries.iter().zip(&state.entries) {
            let EntryState { address, data, masked, pending } = *saved;
            *lock(entry) = Entry { message: MsiMessage { address, data }, masked, pending, routed: None };
        }
        self.enabled.store(control & ENABLE != 0, Ordering::SeqCst);
        self.function_mask.store(control & FUNCTION_MASK != 0, Ordering::SeqCst);
    }
}
