//! The far ends of the cables: what a vPort's frames leave to and come from.
//!
//! A [`Cable`] is the host's side of the device's [`Port`]. Frames of the guest arrive through [`Port::send`] on
//! whichever worker runs the send queue; frames for the guest are fetched by [`Cable::poll`], which only the
//! worker that owns the vPort calls (see [`crate::workers`]).
//!
//! Every netdev is a network of its own: two peers never see each other.

mod null;
mod pcap;
pub mod peer;
mod tap;

use std::os::fd::RawFd;
use std::sync::Arc;

use mana_device::doors::{Clock, Port, RxFrame, TxFrame};

use crate::config::{Netdev, NetdevKind};

pub use null::Null;
pub use pcap::Pcap;
pub use peer::Peer;
pub use tap::Tap;

/// Bytes of an Ethernet header and one VLAN tag: a frame is at most this much longer than the MTU.
const FRAME_OVERHEAD: usize = 14 + 4;

/// Tells the owner of a cable that [`Cable::poll`] is due.
pub type Kick = Box<dyn Fn() + Send + Sync>;

/// Where [`Cable::poll`] hands a batch of frames for the guest, in order.
pub type Deliver<'a> = &'a mut dyn FnMut(&[RxFrame<'_>]);

/// What is left after [`Cable::poll`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Polled {
    /// The budget ran out first: poll again after others had their turn.
    pub more: bool,
    /// Poll again at this time of the clock, nanoseconds.
    pub deadline: Option<u64>,
}

/// The host's side of a vPort.
///
/// [`Cable::poll`] is called by one thread at a time: when the file of [`Cable::readable`] is readable, when the
/// cable kicks, and when its last deadline has come.
pub trait Cable: Port {
    /// File that is readable while frames for the guest wait.
    fn readable(&self) -> Option<RawFd> {
        None
    }
    /// From now on call `kick`, from any thread, when frames for the guest may wait. Called once, before any
    /// frame is sent.
    fn on_ready(&self, kick: Kick) {
        drop(kick);
    }
    /// Hand frames to `deliver`, in batches, about `budget` of them or one batch if that is more.
    fn poll(&self, budget: usize, deliver: Deliver<'_>) -> Polled;
}

/// Open what `netdev` describes, the `index`-th of the machine (it numbers the peers' networks), for IP packets
/// of at most `mtu` bytes.
///
/// # Errors
/// One sentence that names the option, what is wrong and what would help.
pub fn open(
    netdev: &Netdev,
    index: usize,
    mtu: u16,
    clock: &Arc<dyn Clock>,
) -> anyhow::Result<Arc<dyn Cable>> {
    let cable: Arc<dyn Cable> = match &netdev.kind {
        NetdevKind::Peer => Arc::new(Peer::new(peer::Network::numbered(index), mtu, Arc::clone(clock))),
        NetdevKind::Tap { ifname } => Arc::new(Tap::open(ifname, mtu)?),
        NetdevKind::Null => Arc::new(Null),
    };
    Ok(match &netdev.pcap {
        Some(file) => Arc::new(Pcap::create(&netdev.id, file, cable, Arc::clone(clock))?),
        None => cable,
    })
}

/// Copy a frame out of guest memory; what `buffer` held before is gone.
fn gather(frame: &TxFrame<'_>, buffer: &mut Vec<u8>) {
    buffer.clear();
    buffer.resize(frame.len, 0);
    let mut rest = buffer.as_mut_slice();
    for slice in frame.slices {
        let copied = slice.copy_to(rest);
        rest = &mut rest[copied..];
    }
}

#[cfg(test)]
mod tests {
    use mana_device::doors::TxOffload;
    use vm_memory::VolatileSlice;

    use super::*;

    /// Call `body` with `bytes` as a frame that lies in two pieces.
    pub fn with_frame<R>(bytes: &[u8], body: impl FnOnce(&TxFrame<'_>) -> R) -> R {
        let (mut head, mut tail) = (bytes[..bytes.len() / 3].to_vec(), bytes[bytes.len() / 3..].to_vec());
        let slices = [VolatileSlice::from(head.as_mut_slice()), VolatileSlice::from(tail.as_mut_slice())];
        body(&TxFrame { slices: &slices, len: bytes.len(), offload: TxOffload::default() })
    }

    /// Everything that `cable` has for the guest now.
    pub fn drain(cable: &dyn Cable) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while cable.poll(64, &mut |batch| frames.extend(batch.iter().map(|frame| frame.bytes.to_vec()))).more
        {
        }
        frames
    }

    #[test]
    fn gathers_all_pieces_in_order() {
        let bytes: Vec<u8> = (0..100).collect();
        let mut buffer = vec![7; 300];
        with_frame(&bytes, |frame| gather(frame, &mut buffer));
        assert_eq!(buffer, bytes);
    }
}
