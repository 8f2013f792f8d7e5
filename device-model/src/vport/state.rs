//! What is kept of a vPort. The transmit side's binding is the control plane's.

use serde::{Deserialize, Serialize};

use super::Vport;
use crate::card::Card;
use crate::config::TxPolicy;
use crate::counters;
use crate::mana::stats::CLAMP_STEP_MBPS;
use crate::rx;
use crate::rx::state::ReceiveState;
use crate::state::{StateError, check};

/// A vPort.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VportState {
    receive: ReceiveState,
    /// The bandwidth clamp, Mbit/s; 0 for none.
    clamp_mbps: u32,
    /// Until the clamped line is free.
    line_free_in_ns: u64,
    /// What the host does not let it send: bits of [`TxPolicy`]'s fields, in order.
    refused: u8,
    counters: Vec<(String, u64)>,
}

/// A vPort's state, checked.
pub struct Restored {
    receive: rx::State,
    clamp_mbps: u32,
    line_free_ns: u64,
    policy: TxPolicy,
    counters: Vec<(String, u64)>,
}

impl Vport {
    /// What is kept at `now_ns`.
    pub fn save(&self, now_ns: u64) -> VportState {
        let TxPolicy { disabled, own_source_only, ip_only, untagged_only } =
            self.tx_policy().unwrap_or_default();
        let bits = [disabled, own_source_only, ip_only, untagged_only];
        VportState {
            receive: self.receive.save(),
            clamp_mbps: self.shaper.mbps().unwrap_or(0),
            line_free_in_ns: self.shaper.free_at().saturating_sub(now_ns),
            refused: bits.into_iter().rev().fold(0, |bits, bit| bits << 1 | u8::from(bit)),
            counters: counters::save(&self.counters.fields()),
        }
    }
    /// Become what was checked.
    pub fn load(&self, restored: Restored) {
        let Restored { receive, clamp_mbps, line_free_ns, policy, counters } = restored;
        self.receive.load(receive);
        self.shaper.load(clamp_mbps, line_free_ns);
        self.set_tx_policy(policy);
        self.counters.load(&counters);
    }
}

impl VportState {
    /// Check everything, at `now_ns`.
    ///
    /// # Errors
    /// No driver and no host could have brought this about.
    pub fn build(&self, card: &Card, now_ns: u64) -> Result<Restored, StateError> {
        let (mbps, most) = (self.clamp_mbps, card.config.link_speed_mbps);
        let possible = mbps == 0 || mbps <= most && mbps.is_multiple_of(CLAMP_STEP_MBPS);
        check(possible, || format!("a bandwidth clamp of {mbps} Mbit/s"))?;
        let bit = |bit: u8| self.refused >> bit & 1 != 0;
        check(self.refused < 16, || format!("a transmit policy of {:#x}", self.refused))?;
        let policy =
            TxPolicy { disabled: bit(0), own_source_only: bit(1), ip_only: bit(2), untagged_only: bit(3) };
        if let Some(vport) = card.vports.first() {
            vport.counters.check(&self.counters)?;
        }
        Ok(Restored {
            receive: self.receive.build(card.queues.limits())?,
            clamp_mbps: mbps,
            line_free_ns: match self.line_free_in_ns {
                0 => 0,
                ns => now_ns.saturating_add(ns),
            },
            policy,
            counters: self.counters.clone(),
        })
    }
}
