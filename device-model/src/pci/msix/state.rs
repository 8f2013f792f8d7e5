//! What is kept of MSI-X: the table and the pending bits. Enable and Function Mask stand in configuration space.

use std::sync::Mutex;
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
        let save = |(vector, entry): (u16, &Mutex<Entry>)| {
            let Entry { message: MsiMessage { address, data }, masked, routed: _ } = *lock(entry);
            let (word, bit) = self.pending_bit(vector);
            EntryState { address, data, masked, pending: word.load(Ordering::SeqCst) & bit != 0 }
        };
        MsixState { entries: (0..).zip(&self.entries).map(save).collect() }
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
        self.clear_pending();
        for ((vector, entry), saved) in (0..).zip(&self.entries).zip(&state.entries) {
            let EntryState { address, data, masked, pending } = *saved;
            *lock(entry) = Entry { message: MsiMessage { address, data }, masked, routed: None };
            if pending {
                let (word, bit) = self.pending_bit(vector);
                word.fetch_or(bit, Ordering::SeqCst);
            }
        }
        self.enabled.store(control & ENABLE != 0, Ordering::SeqCst);
        self.function_mask.store(control & FUNCTION_MASK != 0, Ordering::SeqCst);
    }
}
