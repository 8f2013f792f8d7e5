//! Interrupts to the client: an event descriptor for each MSI-X vector that it has given us.
//!
//! The vector table that the guest programs is the client's, which gives us a descriptor for a vector when the guest
//! first unmasks it. Where the message goes is the client's business too, so that only the firing is left to do.

use std::os::fd::OwnedFd;
use std::sync::{PoisonError, RwLock, RwLockWriteGuard, TryLockError};
use std::time::Duration;

use mana_device::doors::{MsiMessage, MsiSink};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use crate::warn_limited;

/// How long whoever fires has before we see whether the descriptor holds it up.
const PATIENCE: Duration = Duration::from_micros(20);

/// The descriptors by vector.
pub struct EventDescriptors(RwLock<Vec<Option<OwnedFd>>>);

impl EventDescriptors {
    /// None for `vectors` vectors.
    pub fn new(vectors: u16) -> Self {
        Self(RwLock::new((0..vectors).map(|_| None).collect()))
    }

    /// From now on `vector` writes to `descriptor`, or nowhere.
    ///
    /// # Errors
    /// EINVAL if there is no such vector, or the descriptor is none of an eventfd.
    pub fn set(&self, vector: u32, descriptor: Option<OwnedFd>) -> Result<(), Errno> {
        if let Some(descriptor) = &descriptor {
            check(descriptor)?;
        }
        let mut all = self.alone();
        let slot = usize::try_from(vector).ok().and_then(|vector| all.get_mut(vector)).ok_or(Errno::INVAL)?;
        *slot = descriptor;
        Ok(())
    }

    /// Forget all.
    pub fn clear(&self) {
        self.alone().fill_with(|| None);
    }

    /// Wait until nobody fires.
    fn alone(&self) -> RwLockWriteGuard<'_, Vec<Option<OwnedFd>>> {
        loop {
            match self.0.try_write() {
                Ok(all) => return all,
                Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => {
                    std::thread::sleep(PATIENCE);
                    self.release_writers();
                }
            }
        }
    }

    /// A client may have made its descriptors block again, and full: a worker that waits there goes on when they are
    /// read. Others are left alone, since what is pending there is the client's to read.
    fn release_writers(&self) {
        for descriptor in self.0.read().unwrap_or_else(PoisonError::into_inner).iter().flatten() {
            let mut polled = [PollFd::new(descriptor, PollFlags::OUT)];
            let asked = poll(&mut polled, Some(&Timespec::default()));
            let full = asked.is_ok() && !polled[0].revents().contains(PollFlags::OUT);
            if full && check(descriptor).is_ok() {
                // Somebody else was quicker if there is nothing to read.
                let _ = rustix::io::read(descriptor, &mut [0; 8]);
            }
        }
    }
}

/// Only an eventfd will do: any other file may block, or not bear the write. It is made non-blocking, which its other
/// holders (KVM, QEMU's event loop) are indifferent to: an event that is pending already need not be raised again.
fn check(descriptor: &OwnedFd) -> Result<(), Errno> {
    let file = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(descriptor));
    let name = rustix::fs::readlink(file, Vec::new())?;
    if name.as_bytes() != b"anon_inode:[eventfd]" {
        return Err(Errno::INVAL);
    }
    let flags = fcntl_getfl(descriptor)?;
    if flags.contains(OFlags::NONBLOCK) { Ok(()) } else { fcntl_setfl(descriptor, flags | OFlags::NONBLOCK) }
}

impl MsiSink for EventDescriptors {
    fn route(&self, _: u16, _: MsiMessage) {}

    fn fire(&self, vector: u16) {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let Some(Some(descriptor)) = all.get(usize::from(vector)) else { return };
        match rustix::io::write(descriptor, &1_u64.to_ne_bytes()) {
            // Full: 2^64 - 2 events are pending, of which one will do.
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(error) => warn_limited!("vector {vector}: the client's event descriptor: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn count(descriptor: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        match rustix::io::read(descriptor, &mut bytes) {
            Ok(_) => u64::from_ne_bytes(bytes),
            Err(error) => {
                assert_eq!(error, Errno::AGAIN);
                0
            }
        }
    }

    #[test]
    fn fires_what_is_set_and_nothing_else() {
        let all = EventDescriptors::new(3);
        let event = eventfd(0, EventfdFlags::empty()).unwrap();
        all.set(2, Some(event.try_clone().unwrap())).unwrap();
        (0..5).for_each(|vector| all.fire(vector));
        all.fire(2);
        assert_eq!(count(&event), 2);
        all.set(2, None).unwrap();
        all.fire(2);
        assert_eq!(count(&event), 0);
        assert_eq!(all.set(3, None), Err(Errno::INVAL));
    }

    #[test]
    fn no_interrupt_is_lost_while_other_vectors_come_and_go() {
        const FIRED: u64 = 20_000;
        let all = EventDescriptors::new(2);
        let events = [(); 2].map(|()| eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        all.set(0, Some(events[0].try_clone().unwrap())).unwrap();
        std::thread::scope(|scope| {
            let worker = scope.spawn(|| (0..FIRED).for_each(|_| all.fire(0)));
            while !worker.is_finished() {
                all.set(1, Some(events[1].try_clone().unwrap())).unwrap();
            }
        });
        assert_eq!(count(&events[0]), FIRED);
    }

    #[test]
    fn takes_eventfds_only() {
        let all = EventDescriptors::new(1);
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let file: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
        for descriptor in [reader, writer, file] {
            assert_eq!(all.set(0, Some(descriptor)), Err(Errno::INVAL));
        }
    }

    #[test]
    fn a_full_descriptor_stops_nobody() {
        let all = EventDescriptors::new(1);
        let event = eventfd(0, EventfdFlags::empty()).unwrap();
        rustix::io::write(&event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        all.set(0, Some(event.try_clone().unwrap())).unwrap();
        all.fire(0);
        // The client makes it block again, and a worker runs into it.
        fcntl_setfl(&event, OFlags::empty()).unwrap();
        std::thread::scope(|scope| {
            let worker = scope.spawn(|| all.fire(0));
            std::thread::sleep(Duration::from_millis(50));
            assert!(!worker.is_finished(), "it should be waiting");
            all.clear();
            worker.join().unwrap();
        });
    }
}
