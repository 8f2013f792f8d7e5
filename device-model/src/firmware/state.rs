//! What is kept of the control plane.

use serde::{Deserialize, Serialize};

use super::Firmware;
use crate::card::Card;
use crate::host::Profile;
use crate::hwc::{self, Hwc, state::HwcState};
use crate::queues::HWC_QUEUE;
use crate::state::{MAX_COUNT, StateError, check};
use crate::table::state::ObjectsState;
use crate::table::{self, Objects};
use crate::timers;

/// The channel and everything that commands have made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirmwareState {
    hwc: Option<HwcState>,
    objects: ObjectsState,
    seq: u64,
    offer: Profile,
    next_offer: Option<Profile>,
}

/// The control plane's state, checked.
pub struct Restored {
    hwc: Option<hwc::state::Restored>,
    objects: table::state::Restored,
    seq: u64,
    offer: Profile,
    next_offer: Option<Profile>,
}

impl Firmware {
    /// What is kept at `now_ns`.
    pub fn save(&self, card: &Card, now_ns: u64) -> FirmwareState {
        let Self { hwc, objects, seq, offer, next_offer } = self;
        FirmwareState {
            hwc: hwc.as_ref().and_then(|hwc| hwc.save(card, now_ns)),
            objects: objects.save(card, now_ns),
            seq: *seq,
            offer: offer.clone(),
            next_offer: next_offer.clone(),
        }
    }
    /// Become what was checked, on a card where nothing is.
    pub fn load(&mut self, card: &Card, restored: Restored) {
        let Restored { hwc, objects, seq, offer, next_offer } = restored;
        let (hwc, objects) = (hwc.map(|hwc| Hwc::load(card, hwc)), Objects::load(card, objects));
        *self = Self { hwc, objects, seq, offer, next_offer };
    }
}

impl FirmwareState {
    /// Check everything, at `now_ns`.
    ///
    /// # Errors
    /// No driver could have brought this about.
    pub fn build(
        &self,
        card: &Card,
        timers: &timers::state::Restored,
        now_ns: u64,
    ) -> Result<Restored, StateError> {
        check(self.seq < MAX_COUNT, || format!("{} requests", self.seq))?;
        check(self.hwc.is_some() || self.objects.is_empty(), || "objects without a channel".into())?;
        let moderated = timers.moderated();
        let has_timer = moderated.contains(&HWC_QUEUE);
        let hwc = self.hwc.as_ref().map(|hwc| hwc.build(card, has_timer, now_ns)).transpose()?;
        let objects = self.objects.build(card, &moderated, now_ns)?;
        for offer in std::iter::once(&self.offer).chain(&self.next_offer) {
            check(offer.check().is_ok(), || "a profile that can't be".into())?;
        }
        let (offer, next_offer) = (self.offer.clone(), self.next_offer.clone());
        Ok(Restored { hwc, objects, seq: self.seq, offer, next_offer })
    }
}
