//! The card's firmware: the hardware channel and everything that commands have made, behind one lock that no
//! doorbell and no packet takes.

pub mod state;

use crate::card::Card;
use crate::device::Ran;
use crate::dma::GuestRam;
use crate::host::Profile;
use crate::hwc::Hwc;
use crate::ledger;
use crate::observe::{Event, Fields};
use crate::smc;
use crate::table::Objects;
use crate::wire::smc::{EstablishHwc, Kind};

/// State of the control plane.
pub struct Firmware {
    hwc: Option<Hwc>,
    objects: Objects,
    /// Requests since the device was made.
    seq: u64,
    /// What the host shows.
    offer: Profile,
    /// What it is to show from the next channel on.
    next_offer: Option<Profile>,
}

impl Firmware {
    /// No channel, nothing made.
    pub fn new(card: &Card) -> Self {
        let objects = Objects::new(card.queues.limits().wqs());
        Self { hwc: None, objects, seq: 0, offer: card.config.profile.clone(), next_offer: None }
    }
    /// Answer requests of the hardware channel, at most `budget`.
    pub fn run(&mut self, card: &Card, budget: usize) -> Ran {
        let Self { hwc, objects, seq, offer, next_offer: _ } = self;
        hwc.as_mut().map_or(Ran::Idle, |hwc| hwc.run(card, offer, objects, seq, budget))
    }
    /// Do what the shared-memory channel asks for; the answer is the status.
    pub fn shared_memory(&mut self, card: &Card, request: &smc::Request) -> u8 {
        let kind = request.header.kind();
        card.core.tracer.emit(|| Event::SmcRequest { kind: kind.name() });
        let done = match kind {
            Kind::EstablishHwc => self.establish(card, &EstablishHwc::parse(&request.window)),
            Kind::DestroyHwc => self.destroy(card),
            // There is nothing to repair.
            Kind::ReportHwcTimeout => Ok(()),
            Kind::Unknown(number) => Err(format!("there is no request of type {number}")),
        };
        let status = u8::from(done.is_err());
        if let Err(cause) = done {
            crate::count!(card.core.counters.smc_failed, "{} failed: {cause}", kind.name());
        }
        card.core.tracer.emit(|| Event::SmcResponse { kind: kind.name(), status });
        status
    }
    /// A channel where there is one already means that the guest has lost its driver (a crash kernel, for one):
    /// everything of the old one goes first.
    fn establish(&mut self, card: &Card, message: &EstablishHwc) -> Result<(), String> {
        if self.hwc.is_some() {
            log::info!("a second channel is established: the function starts afresh");
        }
        self.reset(card);
        self.offer = self.next_offer.take().unwrap_or_else(|| std::mem::take(&mut self.offer));
        let memory = card.core.dma.map().ok_or("bus mastering is off")?;
        self.hwc = Some(
            Hwc::establish(card, &self.offer.channel, &GuestRam::new(&memory), message)
                .map_err(|error| error.to_string())?,
        );
        Ok(())
    }
    /// The driver unloads. When the answer is there the card has stopped all DMA.
    fn destroy(&mut self, card: &Card) -> Result<(), String> {
        if self.hwc.is_none() {
            return Err("there is no channel".into());
        }
        ledger::report_leaks(card, &self.objects, None);
        self.reset(card);
        card.core.tracer.emit(|| Event::Ledger { live: self.ledger() });
        Ok(())
    }
    /// Everything that a driver has made ends, the channel included.
    pub fn reset(&mut self, card: &Card) {
        // `seq` goes on, so that numbers in a trace are unique.
        // What the host shows stays, too.
        let Self { hwc, objects, seq: _, offer: _, next_offer: _ } = self;
        Hwc::close(card);
        *hwc = None;
        ledger::release_all(card, objects);
    }
    /// What the host is to show from the next channel on: `change` what it would show then.
    ///
    /// # Errors
    /// Those of `change`; nothing has changed then.
    pub fn change_offer(
        &mut self,
        change: impl FnOnce(&mut Profile) -> Result<(), String>,
    ) -> Result<(), String> {
        let mut next = self.next_offer.as_ref().unwrap_or(&self.offer).clone();
        change(&mut next)?;
        next.check()?;
        self.next_offer = Some(next);
        Ok(())
    }
    /// The host's faults are cleared: what they have held back comes now.
    pub fn heal(&mut self, card: &Card) {
        if let Some(hwc) = &mut self.hwc {
            hwc.release_held(card);
        }
    }
    /// Live objects by kind.
    pub fn ledger(&self) -> Fields {
        let mut live = ledger::fields(&self.objects);
        live.0.insert(0, ("hardware_channels", self.hwc.is_some().into()));
        live
    }
}
