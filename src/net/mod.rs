//! The far ends of the cables: what a vPort's frames leave to and come from.
//!
//! A [`Cable`] is the host's side of the device's [`Port`]. Frames of the guest arrive through [`Port::send`] on
//! whichever worker runs the send queue; frames for the guest are fetched by [`Cable::poll`], which only the
//! worker that owns the vPort calls (see [`crate::workers`]).
//!
//! Every netdev is a network of its own, unless it is one end of a loopback or a port of a switch: two peers never see
//! each other.
//!
//! | cable | frames leave to | unfinished frames |
//! |---|---|---|
//! | [`Peer`] | the built-in host | finished by the device |
//! | [`Tap`] | the host's network stack | checksums and segmentation by the host's kernel, both ways |
//! | [`Stream`] | a socket: passt, QEMU, another mana-vmm | finished by the device |
//! | [`Loopback`], [`SwitchPort`] | other ports | stay unfinished until a taker wants them finished |
//! | [`Null`] | nothing | ignored |

pub mod batch;
mod exchange;
mod frame;
mod framing;
#[cfg(test)]
mod guest;
mod inbox;
mod loopback;
mod null;
mod pcap;
pub mod peer;
#[cfg(test)]
mod real;
mod stream;
mod switch;
mod tap;
mod uplink;
pub mod vnet;

use std::os::fd::RawFd;

use mana_device::doors::{Port, TxFrame};

pub use exchange::Exchange;
pub use frame::{Accepts, Frame};
pub use loopback::Loopback;
pub use null::Null;
pub use pcap::Pcap;
pub use peer::Peer;
pub use stream::Stream;
pub use switch::SwitchPort;
pub use tap::Tap;

/// Bytes of an Ethernet header and one VLAN tag: a frame is at most this much longer than the MTU.
pub const FRAME_OVERHEAD: usize = 14 + 4;

/// Tells the owner of a cable that [`Cable::poll`] is due.
pub type Kick = Box<dyn Fn() + Send + Sync>;

/// Where [`Cable::poll`] hands a batch of frames for the guest, in order.
pub type Deliver<'a> = &'a mut dyn FnMut(&[Frame<'_>]);

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
    /// The taker can deal with these unfinished frames; without a call, with none. Called once, before any frame is
    /// sent or polled for.
    fn accept(&self, accepts: Accepts) {
        let _finished_anyway = accepts;
    }
    /// Hand frames to `deliver`, in batches, about `budget` of them or one batch if that is more.
    fn poll(&self, budget: usize, deliver: Deliver<'_>) -> Polled;
    /// Frames for the guest that were lost on the cable: no room, or too long.
    fn dropped(&self) -> u64 {
        0
    }
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
