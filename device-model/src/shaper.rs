//! The bandwidth clamp of a vPort (MANA_SET_BW_CLAMP): frames leave no faster than the clamp says.
//!
//! The line is a clock of its own: every frame moves the time when it is free again by as long as the frame takes.
//! Sending stops while the line is booked further ahead than [`BURST_NS`], so that several queues share it without
//! asking each other.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// How far ahead the line may be booked, nanoseconds: short enough for a driver's time-outs, long enough that
/// deadlines are few.
pub const BURST_NS: u64 = 1_000_000;

/// The clamp.
#[derive(Debug, Default)]
pub struct Shaper {
    /// Mbit/s; 0 is no clamp.
    mbps: AtomicU32,
    /// When the line is free, nanoseconds of the device's clock.
    free_at: AtomicU64,
}

impl Shaper {
    /// Clamp to `mbps` Mbit/s from now on; `None` lifts the clamp.
    pub fn set(&self, mbps: Option<u32>) {
        self.mbps.store(mbps.unwrap_or(0), Ordering::Relaxed);
        self.free_at.store(0, Ordering::Relaxed);
    }
    /// The clamp, Mbit/s.
    #[inline]
    pub fn mbps(&self) -> Option<u32> {
        match self.mbps.load(Ordering::Relaxed) {
            0 => None,
            mbps => Some(mbps),
        }
    }
    /// When the line is free, nanoseconds of the device's clock.
    pub fn free_at(&self) -> u64 {
        self.free_at.load(Ordering::Relaxed)
    }
    /// Clamp to `mbps` Mbit/s (0: not at all), with the line free at `free_at`: as it was when a state was saved.
    pub fn load(&self, mbps: u32, free_at: u64) {
        self.mbps.store(mbps, Ordering::Relaxed);
        self.free_at.store(free_at, Ordering::Relaxed);
    }
    /// `Err` with the time from when on a frame may leave, if that is later than `now_ns`.
    pub fn check(&self, now_ns: u64) -> Result<(), u64> {
        let from = self.free_at.load(Ordering::Relaxed).saturating_sub(BURST_NS);
        if self.mbps().is_some() && from > now_ns { Err(from) } else { Ok(()) }
    }
    /// Frames of `bytes` together leave at `now_ns`.
    pub fn spend(&self, now_ns: u64, bytes: u64) {
        let Some(mbps) = self.mbps() else { return };
        let takes = bytes.saturating_mul(8000) / u64::from(mbps);
        let book = |free_at: u64| Some(free_at.max(now_ns).saturating_add(takes));
        // The closure always books.
        let _ = self.free_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, book);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_as_fast_as_the_clamp() {
        let shaper = Shaper::default();
        assert_eq!(shaper.check(0), Ok(()));
        shaper.set(Some(100));
        let (mut now, mut sent) = (0, 0_u64);
        while now < 1_000_000_000 {
            match shaper.check(now) {
                Ok(()) => {
                    shaper.spend(now, 1514);
                    sent += 1514;
                }
                Err(from) => now = from,
            }
        }
        // 100 Mbit/s are 12.5 MB in a second; the burst and one frame more.
        assert!((12_500_000..12_500_000 + 12_500 + 2 * 1514).contains(&sent), "{sent}");
        shaper.set(None);
        assert_eq!(shaper.check(now), Ok(()));
    }
}
