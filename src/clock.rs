//! The host's monotonic clock, as the device and its ports see it.

use std::time::Instant;

use mana_device::doors::Clock;

/// Nanoseconds since this clock was made (`CLOCK_MONOTONIC`).
///
/// One clock a virtual machine, so that device, ports and traces agree on the time.
#[derive(Clone, Copy, Debug)]
pub struct MonotonicClock {
    start: Instant,
}

impl MonotonicClock {
    /// A clock that reads 0 now.
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Default for MonotonicClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for MonotonicClock {
    fn now_ns(&self) -> u64 {
        // 2^64 ns are 584 years.
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn counts_nanoseconds_from_its_start() {
        let clock = MonotonicClock::new();
        let before = clock.now_ns();
        std::thread::sleep(Duration::from_millis(5));
        let passed = clock.now_ns() - before;
        assert!((5_000_000..60_000_000_000).contains(&passed), "{passed} ns");
    }
}
