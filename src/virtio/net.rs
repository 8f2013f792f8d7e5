//! virtio-net: the NIC that the MANA function is measured against, on the same cables.
//!
//! Source: virtio 1.2, 5.1. What a driver may leave to us (checksums, segmentation) is left to the cable, or done here
//! where the cable can't; what it may take unfinished is asked of the cable when the driver is ready.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arrayvec::ArrayVec;
use mana_device::Ran;
use mana_device::doors::{RxChecksum, TxFrame, TxOffload};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_RX,
    VIRTIO_NET_ERR, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_OK, VIRTIO_NET_S_LINK_UP,
};
use vm_memory::{GuestMemoryMmap, VolatileSlice};
use zerocopy::IntoBytes;

use super::pci::Queues;
use super::ring::{BadChain, Chain, Pieces, Ring, RingError};
use super::{Backend, Identity, read_image};
use crate::config::VirtioNic;
use crate::net::batch::{Batch, Outlet};
use crate::net::vnet::{HEAD, Senseless, VnetHeader};
use crate::net::{Accepts, Cable, FRAME_OVERHEAD, Frame};

/// Queue numbers.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;
/// Requests between two looks at whether the driver wants an interrupt.
const BATCH: usize = 64;
/// Most buffers of the driver that one frame is spread over.
const MAX_MERGED: usize = 64;
/// The offload header, and behind it the number of merged buffers.
const HEADER: usize = size_of::<VnetHeader>() + size_of::<u16>();
/// Longest super-frame.
const MAX_SUPER_FRAME: usize = 65_535 + FRAME_OVERHEAD;

/// Why a frame of the driver's is not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum BadFrame {
    #[error(transparent)]
    Chain(#[from] BadChain),
    #[error(transparent)]
    Header(#[from] Senseless),
    #[error("a frame of {0} bytes")]
    Length(usize),
}

/// Frames that could not be passed on.
#[derive(Debug, Default)]
struct Drops {
    /// The driver had no buffers.
    no_buffer: AtomicU64,
    /// The cable took no more.
    cable: AtomicU64,
}

/// A NIC.
pub struct Nic {
    config: VirtioNic,
    cable: Arc<dyn Cable>,
    /// Features that the driver has accepted.
    accepted: AtomicU64,
    /// For frames that the cable doesn't take unfinished. Only the transmit queue's worker's.
    finishing: Mutex<(Batch, Outlet)>,
    drops: Drops,
}

fn bit(feature: u32) -> u64 {
    1 << feature
}

impl Nic {
    /// The NIC that `config` describes, on `cable`.
    pub fn new(config: VirtioNic, cable: Arc<dyn Cable>) -> Self {
        let mut outlet = Outlet::default();
        outlet.limit(config.mtu);
        let finishing = Mutex::new((Batch::default(), outlet));
        Self { config, cable, accepted: AtomicU64::new(0), finishing, drops: Drops::default() }
    }

    /// Frames lost because the driver had no buffers, and because the cable had no room.
    pub fn dropped(&self) -> (u64, u64) {
        (self.drops.no_buffer.load(Ordering::Relaxed), self.drops.cable.load(Ordering::Relaxed))
    }

    fn has(&self, feature: u32) -> bool {
        self.accepted.load(Ordering::Relaxed) & bit(feature) != 0
    }

    /// Unfinished frames that the driver takes.
    fn accepts(&self) -> Accepts {
        let checksum = self.has(VIRTIO_NET_F_GUEST_CSUM);
        Accepts {
            checksum,
            tcp4: checksum && self.has(VIRTIO_NET_F_GUEST_TSO4),
            tcp6: checksum && self.has(VIRTIO_NET_F_GUEST_TSO6),
        }
    }

    /// Send up to `limit` frames.
    fn transmit(
        &self,
        queues: &Queues,
        ring: &mut Ring,
        memory: &GuestMemoryMmap,
        limit: usize,
    ) -> Result<usize, RingError> {
        let mut used: ArrayVec<_, BATCH> = ArrayVec::new();
        while used.len() < limit.min(BATCH) {
            let Some(chain) = ring.pop(memory)? else { break };
            used.push((chain.head(), 0));
            if let Err(error) = self.send(chain, memory) {
                queues.count_bad_request(&error);
            }
        }
        self.cable.flush();
        ring.publish(memory, &used)?;
        Ok(used.len())
    }

    fn send(&self, chain: Chain<'_>, memory: &GuestMemoryMmap) -> Result<(), BadFrame> {
        let (mut pieces, mut writable) = (Pieces::new(), Pieces::new());
        chain.pieces(memory, &mut pieces, &mut writable)?;
        let mut header = VnetHeader::default();
        let taken = copy_out(&pieces, header.as_mut_bytes());
        let total: usize = pieces.iter().map(VolatileSlice::len).sum();
        let len = total.checked_sub(HEADER).filter(|_| taken == size_of::<VnetHeader>());
        let len = len.filter(|len| (14..=MAX_SUPER_FRAME).contains(len)).ok_or(BadFrame::Length(total))?;
        skip(&mut pieces, HEADER);
        let mut head = [0; HEAD];
        let offload = if header == VnetHeader::default() {
            TxOffload::default()
        } else {
            let copied = copy_out(&pieces, &mut head);
            header.offload(&head[..copied], len)?.1
        };
        if offload.segmentation.is_none() && len > usize::from(self.config.mtu) + FRAME_OVERHEAD {
            return Err(BadFrame::Length(len));
        }
        let frame = TxFrame { slices: &pieces, len, offload };
        let can = self.cable.capabilities();
        let takes = Accepts { checksum: can.checksum, tcp4: can.segmentation, tcp6: can.segmentation };
        if takes.takes(&offload) {
            self.put(&frame);
        } else {
            self.finish(&frame);
        }
        Ok(())
    }

    fn put(&self, frame: &TxFrame<'_>) {
        if self.cable.send(frame).is_err() {
            self.drops.cable.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Do what the cable can't, then send.
    fn finish(&self, frame: &TxFrame<'_>) {
        let (batch, outlet) = &mut *self.finishing.lock().unwrap_or_else(PoisonError::into_inner);
        batch.clear();
        batch.gather(frame);
        outlet.hand_over_mut(batch, &mut |bytes| {
            let len = bytes.len();
            self.put(&TxFrame { slices: &[VolatileSlice::from(bytes)], len, offload: TxOffload::default() });
        });
    }

    /// Put as many of `frames` into the driver's buffers as there are, up to [`BATCH`]; the answer is how many were
    /// looked at.
    fn receive(
        &self,
        ring: &mut Ring,
        memory: &GuestMemoryMmap,
        frames: &[Frame<'_>],
    ) -> Result<(), RingError> {
        ring.quiet(memory)?;
        let accepts = self.accepts();
        let mut used: ArrayVec<_, BATCH> = ArrayVec::new();
        for (index, frame) in frames.iter().enumerate() {
            if !accepts.takes(&frame.offload) {
                self.drops.no_buffer.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            if used.remaining_capacity() < MAX_MERGED.min(1 + frame.bytes.len() / 1024) {
                ring.publish(memory, &used)?;
                used.clear();
            }
            if !self.fill(ring, memory, frame, &mut used)? {
                let lost = frames.len() - index;
                self.drops.no_buffer.fetch_add(lost as u64, Ordering::Relaxed);
                break;
            }
        }
        ring.publish(memory, &used)
    }

    /// Put `frame` into buffers, which are added to `used`; whether there were enough.
    fn fill(
        &self,
        ring: &mut Ring,
        memory: &GuestMemoryMmap,
        frame: &Frame<'_>,
        used: &mut ArrayVec<(u16, u32), BATCH>,
    ) -> Result<bool, RingError> {
        let valid = frame.checksum == RxChecksum::Valid && self.has(VIRTIO_NET_F_GUEST_CSUM);
        let header = VnetHeader::new(&frame.offload, valid);
        let merge = self.has(VIRTIO_NET_F_MRG_RXBUF);
        let before = used.len();
        let mut bytes = frame.bytes;
        // Where the number of buffers goes, once it is known.
        let mut count_at: Pieces<'_> = Pieces::new();
        loop {
            let chain = if used.is_full() { None } else { ring.pop(memory)? };
            let Some(chain) = chain else {
                // They stay the driver's: the frame is lost, not they.
                (before..used.len()).for_each(|_| ring.unpop());
                used.truncate(before);
                return Ok(false);
            };
            let head = chain.head();
            let (mut readable, mut pieces) = (Pieces::new(), Pieces::new());
            if chain.pieces(memory, &mut readable, &mut pieces).is_err() {
                pieces.clear();
            }
            let mut written = 0;
            if used.len() == before {
                let room: usize = pieces.iter().map(VolatileSlice::len).sum();
                // A first buffer that can't hold the header, or one that must hold all and can't, is given back empty.
                if room < HEADER || !merge && room < HEADER + bytes.len() {
                    used.push((head, 0));
                    crate::log_limited!(Warn, "virtio-net: a receive buffer of {room} bytes is too small");
                    return Ok(true);
                }
                copy_in(&pieces, header.as_bytes());
                skip(&mut pieces, size_of::<VnetHeader>());
                count_at.extend(pieces.iter().copied());
                skip(&mut pieces, size_of::<u16>());
                written = HEADER;
            }
            let copied = copy_in(&pieces, bytes);
            bytes = &bytes[copied..];
            used.push((head, (written + copied) as u32));
            if bytes.is_empty() {
                break;
            }
        }
        let count = (used.len() - before) as u16;
        copy_in(&count_at, &count.to_le_bytes());
        Ok(true)
    }

    /// Answer up to `limit` commands of the control queue.
    fn control(
        &self,
        queues: &Queues,
        ring: &mut Ring,
        memory: &GuestMemoryMmap,
        limit: usize,
    ) -> Result<usize, RingError> {
        let mut done = 0;
        while done < limit {
            let Some(chain) = ring.pop(memory)? else { break };
            let head = chain.head();
            let (mut command, mut answer) = (Pieces::new(), Pieces::new());
            let written = match chain.pieces(memory, &mut command, &mut answer) {
                Ok(()) => copy_in(&answer, &[command_status(&command)]),
                Err(error) => {
                    queues.count_bad_request(&error);
                    0
                }
            };
            ring.publish(memory, &[(head, written as u32)])?;
            done += 1;
        }
        Ok(done)
    }
}

/// Which commands there are: receive modes and address lists, which a card without filters obeys by passing everything
/// on, and the address, which nothing here depends on.
fn command_status(command: &Pieces<'_>) -> u8 {
    let mut code = [0xff; 2];
    copy_out(command, &mut code);
    let status = match (u32::from(code[0]), u32::from(code[1])) {
        (VIRTIO_NET_CTRL_RX, 0..=1) => VIRTIO_NET_OK,
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET | VIRTIO_NET_CTRL_MAC_ADDR_SET) => VIRTIO_NET_OK,
        _ => VIRTIO_NET_ERR,
    };
    status as u8
}

/// Fill `to` from `pieces`; the answer is how much there was.
fn copy_out(pieces: &[VolatileSlice<'_>], to: &mut [u8]) -> usize {
    let mut at = 0;
    for piece in pieces {
        if at == to.len() {
            break;
        }
        at += piece.copy_to(&mut to[at..]);
    }
    at
}

/// Write `from` into `pieces`; the answer is how much had room.
fn copy_in(pieces: &[VolatileSlice<'_>], from: &[u8]) -> usize {
    let mut at = 0;
    for piece in pieces {
        let now = piece.len().min(from.len() - at);
        piece.copy_from(&from[at..at + now]);
        at += now;
    }
    at
}

/// Take the first `count` bytes off.
fn skip(pieces: &mut Pieces<'_>, mut count: usize) {
    while count > 0 {
        let Some(first) = pieces.first_mut() else { return };
        let now = count.min(first.len());
        count -= now;
        match first.offset(now) {
            Ok(rest) if !rest.is_empty() => *first = rest,
            _ => drop(pieces.remove(0)),
        }
    }
}

impl Backend for Nic {
    fn identity(&self) -> Identity {
        Identity { device: VIRTIO_ID_NET as u16, class: 0x02_00_00 }
    }

    fn features(&self) -> u64 {
        let features = [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_CTRL_RX,
            VIRTIO_NET_F_CTRL_MAC_ADDR,
        ];
        features.into_iter().map(bit).sum()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE, QUEUE_SIZE, CONTROL_SIZE]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut image = [0; 12];
        image[..6].copy_from_slice(&self.config.mac);
        image[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        image[8..10].copy_from_slice(&1_u16.to_le_bytes());
        image[10..12].copy_from_slice(&self.config.mtu.to_le_bytes());
        read_image(&image, offset, data);
    }

    fn activate(&self, features: u64) {
        self.accepted.store(features, Ordering::Relaxed);
        self.cable.accept(self.accepts());
    }

    fn run(&self, queues: &Queues, queue: usize, budget: usize) -> Ran {
        match queue {
            TRANSMIT => {
                queues.drain(queue, budget, |ring, memory, limit| self.transmit(queues, ring, memory, limit))
            }
            CONTROL => {
                queues.drain(queue, budget, |ring, memory, limit| self.control(queues, ring, memory, limit))
            }
            // New buffers; frames that had none are gone.
            _ => Ran::Idle,
        }
    }

    fn deliver(&self, queues: &Queues, frames: &[Frame<'_>]) {
        let done = queues.serve(RECEIVE, |ring, memory| self.receive(ring, memory, frames));
        if done.is_none() {
            self.drops.no_buffer.fetch_add(frames.len() as u64, Ordering::Relaxed);
        }
    }
}
