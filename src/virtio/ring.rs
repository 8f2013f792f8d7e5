//! A split virtqueue: chains of buffers that the driver makes available, and how they were used.
//!
//! Source: virtio 1.2, 2.7.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use arrayvec::ArrayVec;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use crate::volatile_io::MAX_PIECES;

/// Pieces of guest memory of one request.
pub type Pieces<'m> = ArrayVec<VolatileSlice<'m>, MAX_PIECES>;

/// The queue can't go on: what it says makes no sense, or lies outside memory. The device needs a reset.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// A ring or its indices.
    #[error(transparent)]
    Queue(#[from] virtio_queue::Error),
    /// A ring lies outside guest memory or is not aligned.
    #[error("a ring of {size} entries lies outside guest memory")]
    Place {
        /// Entries.
        size: u16,
    },
}

/// A chain that can't be followed: it loops, is too long, lies outside memory, or mixes what is read with what is
/// written. Only its request is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a descriptor chain makes no sense")]
pub struct BadChain;

/// Where a driver has put a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Entries, a power of 2.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
}

/// One request: its buffers that the device reads, and those that it writes.
pub struct Chain<'m> {
    head: u16,
    chain: DescriptorChain<&'m GuestMemoryMmap>,
}

impl<'m> Chain<'m> {
    /// What [`Ring::publish`] wants to know it by.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Add the buffers to `readable` and `writable`.
    ///
    /// # Errors
    /// [`BadChain`]; some may have been added.
    pub fn pieces(
        self,
        memory: &'m GuestMemoryMmap,
        readable: &mut Pieces<'m>,
        writable: &mut Pieces<'m>,
    ) -> Result<(), BadChain> {
        // A chain that was cut short, because it loops or leads nowhere, has a last descriptor that isn't the last.
        let mut cut = true;
        for descriptor in self.chain {
            cut = descriptor.has_next();
            let to = match descriptor.is_write_only() {
                true => &mut *writable,
                false if writable.is_empty() => &mut *readable,
                false => return Err(BadChain),
            };
            let (address, len) = (descriptor.addr(), descriptor.len() as usize);
            if let Ok(slice) = memory.get_slice(address, len) {
                to.try_push(slice).map_err(|_| BadChain)?;
                continue;
            }
            for slice in memory.get_slices(address, len) {
                slice.ok().and_then(|slice| to.try_push(slice).ok()).ok_or(BadChain)?;
            }
        }
        if cut { Err(BadChain) } else { Ok(()) }
    }
}

/// How far the device has come in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Index of the available ring.
    available: u16,
    /// Index of the used ring.
    used: u16,
    /// Index of the used ring when the driver was last asked whether it wants an interrupt.
    asked: u16,
}

/// A queue in use.
pub struct Ring {
    queue: Queue,
    /// Index of the used ring when the driver was last asked whether it wants an interrupt.
    asked: Wrapping<u16>,
}

impl Ring {
    /// The queue at `layout`.
    ///
    /// # Errors
    /// [`RingError`] if there is none.
    pub fn new(layout: &Layout, event_idx: bool, memory: &GuestMemoryMmap) -> Result<Self, RingError> {
        let mut queue = Queue::new(layout.size)?;
        queue.try_set_size(layout.size)?;
        queue.try_set_desc_table_address(GuestAddress(layout.descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(layout.available))?;
        queue.try_set_used_ring_address(GuestAddress(layout.used))?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        let size = usize::from(layout.size);
        // Flags and index, entries, and the event index at the end.
        let parts =
            [(layout.descriptors, 16 * size), (layout.available, 6 + 2 * size), (layout.used, 6 + 8 * size)];
        if parts.into_iter().any(|(at, len)| at == 0 || !memory.check_range(GuestAddress(at), len)) {
            return Err(RingError::Place { size: layout.size });
        }
        Ok(Self { queue, asked: Wrapping(0) })
    }

    /// How far it has come.
    pub fn position(&self) -> Position {
        let (available, used) = (self.queue.next_avail(), self.queue.next_used());
        Position { available, used, asked: self.asked.0 }
    }

    /// The queue at `layout`, gone on with from `position`.
    ///
    /// # Errors
    /// [`RingError`] if there is none.
    pub fn at(
        layout: &Layout,
        event_idx: bool,
        memory: &GuestMemoryMmap,
        position: Position,
    ) -> Result<Self, RingError> {
        let mut ring = Self::new(layout, event_idx, memory)?;
        ring.queue.set_next_avail(position.available);
        ring.queue.set_next_used(position.used);
        ring.asked = Wrapping(position.asked);
        Ok(ring)
    }

    /// The next available chain.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn pop<'m>(&mut self, memory: &'m GuestMemoryMmap) -> Result<Option<Chain<'m>>, RingError> {
        let chain = self.queue.iter(memory)?.next();
        Ok(chain.map(|chain| Chain { head: chain.head_index(), chain }))
    }

    /// Put the chain that was popped last back; it is popped again next.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Tell the driver that the chains with these heads are used, with so many bytes written into each. It sees all of
    /// them at once.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn publish(&mut self, memory: &GuestMemoryMmap, used: &[(u16, u32)]) -> Result<(), RingError> {
        if used.is_empty() {
            return Ok(());
        }
        let place = |error| RingError::Queue(virtio_queue::Error::GuestMemory(error));
        let ring = GuestAddress(self.queue.used_ring());
        let mut next = Wrapping(self.queue.next_used());
        for &(head, len) in used {
            let slot = u64::from(next.0 % self.queue.size());
            let element = u64::from(len) << 32 | u64::from(head);
            memory.write_obj(element.to_le(), GuestAddress(ring.0 + 4 + 8 * slot)).map_err(place)?;
            next += 1;
        }
        self.queue.set_next_used(next.0);
        memory.store(next.0.to_le(), GuestAddress(ring.0 + 2), Ordering::Release).map_err(place)
    }

    /// Whether the driver wants an interrupt for what was published since this was last asked.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn wants_interrupt(&mut self, memory: &GuestMemoryMmap) -> Result<bool, RingError> {
        let (old, new) = (self.asked, Wrapping(self.queue.next_used()));
        if old == new {
            return Ok(false);
        }
        self.asked = new;
        let load = |at: u64| {
            let value: u16 =
                memory.load(GuestAddress(at), Ordering::Relaxed).map_err(virtio_queue::Error::GuestMemory)?;
            Ok::<_, RingError>(u16::from_le(value))
        };
        // The index that was just published, before what the driver says (2.7.7.1).
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        if self.queue.event_idx_enabled() {
            let event = Wrapping(load(available + 4 + 2 * u64::from(self.queue.size()))?);
            return Ok(new - event - Wrapping(1) < new - old);
        }
        Ok(u32::from(load(available)?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// The driver need not ring while the queue is being looked at.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn quiet(&mut self, memory: &GuestMemoryMmap) -> Result<(), RingError> {
        Ok(self.queue.disable_notification(memory)?)
    }

    /// The driver is to ring for the next chain; `true` if there is one already, which it may not ring for.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn listen(&mut self, memory: &GuestMemoryMmap) -> Result<bool, RingError> {
        Ok(self.queue.enable_notification(memory)?)
    }
}
