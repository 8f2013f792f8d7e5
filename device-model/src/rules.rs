//! What the device demands of its driver. A breach harms nobody but the driver's own queues, is counted, and shows
//! in the trace.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::observe::{Event, Fields, Tracer};
use crate::state::{StateError, check};

/// A demand on the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Rule {
    /// A doorbell names a live queue, through the page that the queue was created with.
    DoorbellLiveQueue,
    /// A work queue's tail advances by whole WQEs and never beyond the ring.
    DoorbellTail,
    /// The count field of a receive doorbell is 0.
    RqDoorbellCount,
    /// A completion or event queue's tail follows the entries that were posted.
    ConsumerTail,
    /// A completion or event queue's tail never goes back.
    ConsumerForward,
    /// A completion queue is rung at least once in eight laps; after seven the card waits.
    ConsumerLaps,
    /// A WQE's counts fit its queue and what was posted.
    WqeShape,
    /// A scatter/gather entry carries the device's memory key.
    MemoryKey,
    /// Segmentation has the headers, and nothing else, in its first scatter/gather entry.
    LsoHeaders,
    /// A message of the hardware channel is as long as it says and names the channel's own queues.
    HwcMessage,
    /// A command names objects that exist and belong to the device it addresses.
    KnownObject,
    /// A driver that unloads has destroyed what it made.
    ReleaseObjects,
}

impl Rule {
    const ALL: [Self; 12] = [
        Self::DoorbellLiveQueue,
        Self::DoorbellTail,
        Self::RqDoorbellCount,
        Self::ConsumerTail,
        Self::ConsumerForward,
        Self::ConsumerLaps,
        Self::WqeShape,
        Self::MemoryKey,
        Self::LsoHeaders,
        Self::HwcMessage,
        Self::KnownObject,
        Self::ReleaseObjects,
    ];
    /// The rule's name in traces.
    pub const fn name(self) -> &'static str {
        match self {
            Self::DoorbellLiveQueue => "doorbell-live-queue",
            Self::DoorbellTail => "doorbell-tail",
            Self::RqDoorbellCount => "rq-doorbell-count",
            Self::ConsumerTail => "consumer-tail",
            Self::ConsumerForward => "consumer-forward",
            Self::ConsumerLaps => "consumer-laps",
            Self::WqeShape => "wqe-shape",
            Self::MemoryKey => "memory-key",
            Self::LsoHeaders => "lso-headers",
            Self::HwcMessage => "hwc-message",
            Self::KnownObject => "known-object",
            Self::ReleaseObjects => "release-objects",
        }
    }
}

/// How often each rule was broken.
#[derive(Debug, Default)]
pub struct Rules {
    broken: [AtomicU64; Rule::ALL.len()],
}

impl Rules {
    /// `rule` was broken. Of a breach that the guest repeats for ever, ever fewer are traced.
    pub fn broken(&self, tracer: &Tracer, rule: Rule, detail: impl FnOnce() -> String) {
        let Some(count) = self.broken.get(rule as usize) else { return };
        let n = count.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        if !crate::counters::worth_a_line(n) {
            return;
        }
        let detail = detail();
        log::warn!("driver broke rule {}: {detail}", rule.name());
        tracer.emit(|| Event::RuleViolation { rule: rule.name(), detail });
    }
    /// Whether all of `saved` are rules.
    ///
    /// # Errors
    /// One is not.
    pub fn check(&self, saved: &[(String, u64)]) -> Result<(), StateError> {
        let known = |name: &str| Rule::ALL.iter().any(|rule| rule.name() == name);
        let unknown = saved.iter().find(|(name, _)| !known(name));
        check(unknown.is_none(), || format!("there is no rule {:?}", unknown.map(|(name, _)| name)))
    }
    /// Count on from what was saved.
    pub fn load(&self, saved: &[(String, u64)]) {
        for (rule, count) in Rule::ALL.iter().zip(&self.broken) {
            let found = saved.iter().find(|(name, _)| name == rule.name());
            count.store(found.map_or(0, |(_, count)| *count), Ordering::Relaxed);
        }
    }
    /// Rules that were broken, with how often.
    pub fn fields(&self) -> Fields {
        let counts = Rule::ALL.iter().zip(&self.broken);
        let broken = counts.map(|(rule, count)| (rule.name(), count.load(Ordering::Relaxed)));
        Fields(broken.filter(|&(_, count)| count > 0).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_has_its_own_count() {
        let rules = Rules::default();
        let tracer = Tracer::silent();
        for (index, rule) in Rule::ALL.into_iter().enumerate() {
            assert_eq!(rule as usize, index);
            rules.broken(&tracer, rule, String::new);
        }
        assert_eq!(rules.fields().0.len(), Rule::ALL.len());
    }
}
