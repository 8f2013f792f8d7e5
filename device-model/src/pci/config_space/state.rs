//! What is kept of configuration space.

use serde::{Deserialize, Serialize};

use super::{ConfigSpace, cap};
use crate::state::{StateError, check};

/// The registers' values.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigSpaceState {
    bytes: Vec<u8>,
}

impl ConfigSpace {
    /// What is kept.
    pub fn save(&self) -> ConfigSpaceState {
        ConfigSpaceState { bytes: self.bytes.to_vec() }
    }
    /// These reset values, and what software had written.
    ///
    /// # Errors
    /// Bits differ that software can't write.
    pub fn restored(&self, state: &ConfigSpaceState) -> Result<Self, StateError> {
        let Self { bytes: reset, writable, bars: _ } = self;
        check(state.bytes.len() == reset.len(), || format!("{} bytes of registers", state.bytes.len()))?;
        let mut restored = self.clone();
        for (at, (to, &saved)) in restored.bytes.iter_mut().zip(&state.bytes).enumerate() {
            let mask = writable.get(at).copied().unwrap_or(0);
            check((*to ^ saved) & !mask == 0, || format!("register {at:#x} holds {saved:#x}"))?;
            *to = saved;
        }
        Ok(restored)
    }
    /// MSI-X Message Control.
    pub fn msix_control(&self) -> u16 {
        self.word(cap::MSIX_CONTROL)
    }
}
