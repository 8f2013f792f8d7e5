//! The queues of a virtio function, as the workers use them.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use mana_device::Ran;
use mana_device::doors::Memory;
use mana_device::pci::msix::Msix;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::super::ring::{Ring, RingError};
use super::{DRIVER_OK, NEEDS_RESET, NO_VECTOR, lock};
use crate::warn_limited;

/// A queue as the workers see it.
pub(in crate::virtio) struct Slot {
    /// While the driver is ready and the queue enabled.
    pub(in crate::virtio) ring: Mutex<Option<Ring>>,
    pub(in crate::virtio) vector: AtomicU16,
    pub(super) bell: EventFd,
}

/// The queues of a device, and what using them takes.
pub struct Queues {
    pub(in crate::virtio) slots: Vec<Slot>,
    pub(super) memory: Memory,
    pub(in crate::virtio) bus_master: Arc<AtomicBool>,
    pub(in crate::virtio) msix: Msix,
    pub(in crate::virtio) config_vector: AtomicU16,
    pub(in crate::virtio) status: AtomicU8,
    /// Requests that could not be understood.
    pub(super) bad_requests: AtomicU64,
}

impl Queues {
    /// Do `work` on a queue that is in use, then interrupt the driver if it wants that. `None` if it is not in use, or
    /// the device is broken.
    pub fn serve<R>(
        &self,
        queue: usize,
        work: impl FnOnce(&mut Ring, &GuestMemoryMmap) -> Result<R, RingError>,
    ) -> Option<R> {
        if !self.bus_master.load(Ordering::Acquire) {
            return None;
        }
        let slot = self.slots.get(queue)?;
        let memory = self.memory.memory();
        let mut ring = lock(&slot.ring);
        let in_use = ring.as_mut()?;
        let done = work(in_use, &memory).and_then(|done| Ok((done, in_use.wants_interrupt(&memory)?)));
        match done {
            Ok((done, interrupt)) => {
                drop(ring);
                if interrupt {
                    self.msix_signal(slot.vector.load(Ordering::Relaxed));
                }
                Some(done)
            }
            Err(error) => {
                *ring = None;
                drop(ring);
                warn_limited!("virtio: queue {queue}: {error}; the device needs a reset");
                self.break_down();
                None
            }
        }
    }

    /// Run a queue of requests: `step` does up to a given number and says how many; when there are no more, the driver
    /// is asked to ring.
    pub fn drain(
        &self,
        queue: usize,
        budget: usize,
        mut step: impl FnMut(&mut Ring, &GuestMemoryMmap, usize) -> Result<usize, RingError>,
    ) -> Ran {
        let ran = self.serve(queue, |ring, memory| {
            let mut left = budget.max(1);
            ring.quiet(memory)?;
            loop {
                left = left.saturating_sub(step(ring, memory, left)?);
                if left == 0 {
                    return Ok(Ran::More);
                }
                if !ring.listen(memory)? {
                    return Ok(Ran::Idle);
                }
                ring.quiet(memory)?;
            }
        });
        ran.unwrap_or(Ran::Idle)
    }

    /// A request made no sense; only it is lost.
    pub fn count_bad_request(&self, why: &dyn std::fmt::Display) {
        self.bad_requests.fetch_add(1, Ordering::Relaxed);
        warn_limited!("virtio: a request is lost: {why}");
    }

    /// Requests that made no sense, so far.
    pub fn bad_requests(&self) -> u64 {
        self.bad_requests.load(Ordering::Relaxed)
    }

    /// Nothing goes until the driver resets the device.
    pub(super) fn break_down(&self) {
        let before = self.status.fetch_or(NEEDS_RESET, Ordering::SeqCst);
        if before & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK {
            self.msix_signal(self.config_vector.load(Ordering::Relaxed));
        }
    }

    fn msix_signal(&self, vector: u16) {
        if vector != NO_VECTOR {
            self.msix.signal(vector);
        }
    }

    pub(super) fn stop(&self) {
        for slot in &self.slots {
            *lock(&slot.ring) = None;
            slot.vector.store(NO_VECTOR, Ordering::Relaxed);
        }
    }
}
