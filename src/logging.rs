//! Logging that a guest can't drown: messages it can provoke at will come at most a few times a second.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Messages of one place in the code that are let through in a second.
const PER_SECOND: u64 = 5;

/// Start logging to standard error: warnings and worse, or what `MANA_LOG` says.
pub fn init() {
    env_logger::Builder::from_env(env_logger::Env::new().filter_or("MANA_LOG", "warn")).init();
}

/// A budget of messages, one for each place that logs.
#[derive(Debug, Default)]
pub struct RateLimit {
    /// The current second in the upper 44 bits, messages in it in the lower 20.
    window: AtomicU64,
}

impl RateLimit {
    /// Nothing spent yet.
    pub const fn new() -> Self {
        Self { window: AtomicU64::new(0) }
    }

    /// Whether one more message may go out now.
    pub fn allows(&self) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.allows_at(now.as_secs())
    }

    fn allows_at(&self, second: u64) -> bool {
        let start = second << 20;
        let count = |window: u64| if window >> 20 == second { (window & 0xf_ffff) + 1 } else { 1 };
        let next = |window| (count(window) <= PER_SECOND).then(|| start | count(window));
        self.window.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).is_ok()
    }
}

/// `log::log!` for what a guest can provoke; the level is a variant of [`log::Level`].
#[macro_export]
macro_rules! log_limited {
    ($level:ident, $($argument:tt)+) => {{
        static LIMIT: $crate::logging::RateLimit = $crate::logging::RateLimit::new();
        if log::log_enabled!(log::Level::$level) && LIMIT.allows() {
            log::log!(log::Level::$level, $($argument)+);
        }
    }};
}

/// `log::warn!` for what a guest can provoke.
#[macro_export]
macro_rules! warn_limited {
    ($($argument:tt)+) => { $crate::log_limited!(Warn, $($argument)+) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_cut_and_the_next_second_is_new() {
        let limit = RateLimit::new();
        assert_eq!((0..100).filter(|_| limit.allows_at(7)).count() as u64, PER_SECOND);
        assert_eq!((0..100).filter(|_| limit.allows_at(8)).count() as u64, PER_SECOND);
    }
}
