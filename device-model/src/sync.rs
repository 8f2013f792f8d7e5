//! Locks that survive a panic elsewhere: the state behind them is checked by whoever reads it.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Take the lock.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
