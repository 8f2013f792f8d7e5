//! Locks that survive a panic elsewhere: the state behind them is checked by whoever reads it.

/// The atomics of the hand-over between threads. The test that has a model checker run it brings its own.
pub mod atomic {
    pub use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
}

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Take the lock.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
