//! Where frames wait for the worker that takes them: the receiving end of a cable between two ports.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use mana_device::doors::{PortDropped, TxFrame};

use super::batch::{Batch, Outlet};
use super::frame::Accepts;
use super::{Deliver, Kick, Polled};

/// Bytes that may wait; further frames are dropped, as a full switch would.
const MAX_WAITING: usize = 4 << 20;

/// The frames being handed over, and how far that has got.
struct Taking {
    batch: Batch,
    next: usize,
    outlet: Outlet,
}

/// A queue of frames from any thread to one.
pub struct Inbox {
    /// Held while one frame is copied in, and while the taker swaps in an empty batch.
    waiting: Mutex<Batch>,
    /// Frames came since the taker was last kicked.
    fresh: AtomicBool,
    /// Only the taker's; never held together with `waiting` for longer than a swap.
    taking: Mutex<Taking>,
    kick: OnceLock<Kick>,
    dropped: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inbox {
    /// An empty one.
    pub fn new() -> Self {
        let taking = Taking { batch: Batch::default(), next: 0, outlet: Outlet::default() };
        Self {
            waiting: Mutex::default(),
            fresh: AtomicBool::new(false),
            taking: Mutex::new(taking),
            kick: OnceLock::new(),
            dropped: AtomicU64::new(0),
        }
    }

    /// Its taker takes IP packets of at most `mtu` bytes.
    pub fn limit(&self, mtu: u16) {
        lock(&self.taking).outlet.limit(mtu);
    }

    /// See [`super::Cable::on_ready`].
    pub fn on_ready(&self, kick: Kick) {
        // The first owner stays: there is only one.
        let _ = self.kick.set(kick);
    }

    /// See [`super::Cable::accept`].
    pub fn accept(&self, accepts: Accepts) {
        lock(&self.taking).outlet.accept(accepts);
    }

    /// Copy a frame in.
    ///
    /// # Errors
    /// [`PortDropped`] if too much is waiting.
    pub fn put(&self, frame: &TxFrame<'_>) -> Result<(), PortDropped> {
        let mut waiting = lock(&self.waiting);
        if waiting.cost() + frame.len > MAX_WAITING {
            drop(waiting);
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return Err(PortDropped);
        }
        waiting.gather(frame);
        // Still under the lock: a taker that was told before this frame came finds it, or `ring` tells it again.
        if !self.fresh.load(Ordering::Relaxed) {
            self.fresh.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Tell the taker, if frames came since it was last told.
    pub fn ring(&self) {
        if self.fresh.load(Ordering::Relaxed)
            && self.fresh.swap(false, Ordering::AcqRel)
            && let Some(kick) = self.kick.get()
        {
            kick();
        }
    }

    /// See [`super::Cable::poll`].
    pub fn poll(&self, budget: usize, deliver: Deliver<'_>) -> Polled {
        let taking = &mut *lock(&self.taking);
        let mut left = budget.max(1);
        loop {
            if taking.next == taking.batch.len() {
                taking.batch.clear();
                taking.next = 0;
                std::mem::swap(&mut *lock(&self.waiting), &mut taking.batch);
                if taking.batch.is_empty() {
                    return Polled::default();
                }
            }
            if left == 0 {
                return Polled { more: true, deadline: None };
            }
            let now = left.min(taking.batch.len() - taking.next);
            let range = taking.next..taking.next + now;
            taking.outlet.hand_over(&mut taking.batch, range, deliver);
            taking.next += now;
            left -= now;
        }
    }

    /// Frames that found no room, or that the taker can't take.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed) + lock(&self.taking).outlet.dropped()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use super::super::tests::with_frame;
    use super::*;

    fn inbox(mtu: u16) -> Inbox {
        let inbox = Inbox::new();
        inbox.limit(mtu);
        inbox
    }

    fn numbered(n: u32) -> Vec<u8> {
        let mut frame = vec![0; 60];
        frame[14..18].copy_from_slice(&n.to_be_bytes());
        frame
    }

    #[test]
    fn the_taker_is_told_once_and_gets_all_within_its_budget() {
        let inbox = inbox(1500);
        let kicks = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&kicks);
        inbox.on_ready(Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        }));
        inbox.ring();
        (0..100).for_each(|n| with_frame(&numbered(n), |frame| inbox.put(frame)).unwrap());
        inbox.ring();
        inbox.ring();
        assert_eq!(kicks.load(Ordering::Relaxed), 1);
        let mut seen = Vec::new();
        let mut collect =
            |frames: &[super::super::Frame<'_>]| seen.extend(frames.iter().map(|f| f.bytes.to_vec()));
        assert!(inbox.poll(64, &mut collect).more);
        assert!(!inbox.poll(64, &mut collect).more);
        assert!(seen.iter().enumerate().all(|(n, frame)| *frame == numbered(n as u32)) && seen.len() == 100);
    }

    #[test]
    fn what_has_no_room_is_dropped_and_counted() {
        let inbox = inbox(9000);
        let frame = vec![0; 9000];
        let put = |_| with_frame(&frame, |frame| inbox.put(frame)).is_ok();
        let taken = (0..600).filter(|&n| put(n)).count();
        assert!((400..500).contains(&taken), "{taken}");
        assert_eq!(inbox.dropped(), 600 - taken as u64);
        while inbox.poll(64, &mut |_| {}).more {}
        assert!(put(0));
    }

    #[test]
    fn no_frame_is_lost_or_seen_twice_among_many_threads() {
        const SENDERS: u32 = 8;
        const EACH: u32 = 5000;
        let inbox = inbox(1500);
        let mut seen = vec![0_u8; (SENDERS * EACH) as usize];
        let mut last = [0; SENDERS as usize];
        std::thread::scope(|scope| {
            for sender in 0..SENDERS {
                let inbox = &inbox;
                scope.spawn(move || {
                    for n in 0..EACH {
                        let frame = numbered(sender * EACH + n);
                        while with_frame(&frame, |frame| inbox.put(frame)).is_err() {
                            std::thread::yield_now();
                        }
                    }
                });
            }
            let mut left = SENDERS * EACH;
            while left > 0 {
                inbox.poll(64, &mut |frames| {
                    for frame in frames {
                        let n = u32::from_be_bytes(frame.bytes[14..18].try_into().unwrap());
                        seen[n as usize] += 1;
                        let last = &mut last[(n / EACH) as usize];
                        assert!(n % EACH == 0 || n == *last + 1, "a sender's frames keep their order");
                        *last = n;
                        left -= 1;
                    }
                });
            }
        });
        assert!(seen.iter().all(|&count| count == 1));
    }
}
