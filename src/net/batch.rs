//! Frames on their way through a cable: many in one piece of memory that is used again and again.
//!
//! A frame is copied once out of the sender's memory into a [`Batch`] and once out of it into the taker's. What its
//! taker doesn't accept unfinished is finished in between, by an [`Outlet`].

use std::ops::Range;

use arrayvec::ArrayVec;
use mana_device::doors::{RxChecksum, TxFrame, TxOffload};
use mana_device::segment::Template;

use super::frame::{Accepts, Frame, complete_checksum};
use super::{Deliver, FRAME_OVERHEAD};
use crate::log_limited;

/// Frames handed over at once.
const HANDFUL: usize = 64;
/// Longest Ethernet, IP and TCP header.
const MAX_HEADER: usize = 256;
/// What a frame's entry costs beside its bytes, when waiting frames are bounded by bytes.
pub const FRAME_COST: usize = 64;

/// Where a frame lies in a batch, and what is known of it.
#[derive(Clone, Copy, Debug)]
struct Entry {
    start: usize,
    len: usize,
    checksum: RxChecksum,
    offload: TxOffload,
}

/// Frames one behind the other.
#[derive(Debug, Default)]
pub struct Batch {
    /// Never shrinks, so that its bytes are initialised only once.
    bytes: Vec<u8>,
    used: usize,
    entries: Vec<Entry>,
}

impl Batch {
    /// Forget all frames.
    pub fn clear(&mut self) {
        self.used = 0;
        self.entries.clear();
    }

    /// How many frames there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// No frames.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What the frames take of a bound on waiting bytes.
    pub fn cost(&self) -> usize {
        self.used + self.entries.len() * FRAME_COST
    }

    /// `len` bytes behind the last frame, to be filled before [`commit`](Self::commit).
    pub fn room(&mut self, len: usize) -> &mut [u8] {
        let end = self.used + len;
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        &mut self.bytes[self.used..end]
    }

    /// The bytes `frame` of the room taken last are a frame.
    pub fn commit(&mut self, frame: Range<usize>, checksum: RxChecksum, offload: TxOffload) {
        let start = self.used + frame.start;
        self.entries.push(Entry { start, len: frame.len(), checksum, offload });
        self.used += frame.end;
    }

    /// Add a frame that lies in guest memory.
    pub fn gather(&mut self, frame: &TxFrame<'_>) {
        let mut rest = self.room(frame.len);
        for slice in frame.slices {
            let copied = slice.copy_to(rest);
            rest = &mut rest[copied..];
        }
        self.commit(0..frame.len, RxChecksum::Unknown, frame.offload);
    }

    fn bytes_of(&self, entry: &Entry) -> &[u8] {
        &self.bytes[entry.start..entry.start + entry.len]
    }
}

/// A finished frame: in the batch it came in, or made of a super-frame that is there.
#[derive(Clone, Copy, Debug)]
struct Ready {
    made: bool,
    entry: Entry,
}

/// Where frames leave a cable: finishes what the taker doesn't accept unfinished, and drops what is too long for it.
#[derive(Debug, Default)]
pub struct Outlet {
    accepts: Accepts,
    /// Longest frame that isn't a super-frame, bytes.
    max_frame: usize,
    made: Batch,
    ready: Vec<Ready>,
    dropped: u64,
}

impl Outlet {
    /// The taker takes IP packets of at most `mtu` bytes.
    pub fn limit(&mut self, mtu: u16) {
        self.max_frame = usize::from(mtu) + FRAME_OVERHEAD;
    }

    /// The taker deals with this.
    pub fn accept(&mut self, accepts: Accepts) {
        self.accepts = accepts;
    }

    /// Frames that were too long or made no sense.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Hand the frames `range` of `batch` to `deliver`, in order.
    pub fn hand_over(&mut self, batch: &mut Batch, range: Range<usize>, deliver: Deliver<'_>) {
        self.made.clear();
        self.ready.clear();
        for index in range {
            self.finish(batch, index);
        }
        for handful in self.ready.chunks(HANDFUL) {
            let frames: ArrayVec<Frame<'_>, HANDFUL> =
                handful.iter().map(|ready| self.frame(batch, ready)).collect();
            deliver(&frames);
        }
    }

    /// Finish all frames of `batch` and hand them to `put` one by one, as a sender of frames wants them.
    pub fn hand_over_mut(&mut self, batch: &mut Batch, put: &mut dyn FnMut(&mut [u8])) {
        self.made.clear();
        self.ready.clear();
        (0..batch.len()).for_each(|index| self.finish(batch, index));
        for Ready { made, entry } in &self.ready {
            let from = if *made { &mut self.made } else { &mut *batch };
            put(&mut from.bytes[entry.start..entry.start + entry.len]);
        }
    }

    fn frame<'a>(&'a self, batch: &'a Batch, ready: &Ready) -> Frame<'a> {
        let Ready { made, entry } = ready;
        let bytes = if *made { self.made.bytes_of(entry) } else { batch.bytes_of(entry) };
        Frame { bytes, checksum: entry.checksum, offload: entry.offload }
    }

    fn finish(&mut self, batch: &mut Batch, index: usize) {
        let mut entry = batch.entries[index];
        if entry.offload.segmentation.is_none() && entry.len > self.max_frame {
            self.drop_frame(entry.len);
            return;
        }
        if !self.accepts.takes(&entry.offload) {
            if entry.offload.segmentation.is_some() {
                self.segment(batch, &entry);
                return;
            }
            let frame = &mut batch.bytes[entry.start..entry.start + entry.len];
            if !entry.offload.checksum.is_none_or(|partial| complete_checksum(frame, partial)) {
                self.drop_frame(entry.len);
                return;
            }
            (entry.checksum, entry.offload) = (RxChecksum::Valid, TxOffload::default());
        }
        self.ready.push(Ready { made: false, entry });
    }

    /// Cut a super-frame into segments.
    fn segment(&mut self, batch: &Batch, entry: &Entry) {
        let (before, frame) = (self.ready.len(), batch.bytes_of(entry));
        if self.add_segments(frame, entry).is_none() {
            self.ready.truncate(before);
            self.drop_frame(entry.len);
        }
    }

    fn add_segments(&mut self, frame: &[u8], entry: &Entry) -> Option<()> {
        let cut = entry.offload.segmentation?;
        let (header_len, mss) = (usize::from(cut.header_len), usize::from(cut.mss));
        if header_len > MAX_HEADER || mss == 0 || header_len + mss.min(entry.len) > self.max_frame {
            return None;
        }
        let (header, payload) = frame.split_at_checked(header_len)?;
        let template = Template::new(header).ok()?;
        let mut at = 0;
        for (index, part) in (0..).zip(payload.chunks(mss)) {
            let segment = self.made.room(header_len + part.len());
            segment[header_len..].copy_from_slice(part);
            template.complete(segment, index, at, at as usize + part.len() == payload.len()).ok()?;
            self.made.commit(0..header_len + part.len(), RxChecksum::Valid, TxOffload::default());
            self.ready.push(Ready { made: true, entry: *self.made.entries.last()? });
            at += part.len() as u32;
        }
        Some(())
    }

    fn drop_frame(&mut self, len: usize) {
        self.dropped += 1;
        log_limited!(
            Warn,
            "a cable drops a frame of {len} bytes: too long for its taker, or its headers make no sense"
        );
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use mana_device::doors::{PartialChecksum, Segmentation};

    use super::super::tests::with_frame;
    use super::*;

    /// A TCP segment over IPv4 with `payload`, whose TCP checksum is still the pseudo-header's sum.
    pub fn partial_tcp4(payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
        frame.extend([0x45, 0, 0, 0, 0, 7, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let (ip, tcp) = (14, 34);
        let len = (20 + 20 + payload.len()) as u16;
        frame[ip + 2..ip + 4].copy_from_slice(&len.to_be_bytes());
        let sum = mana_device::checksum::Sum::default().add_bytes(&frame[ip..tcp]).checksum();
        frame[ip + 10..ip + 12].copy_from_slice(&sum.to_be_bytes());
        frame.extend([0x10, 0, 0, 80, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 0x20, 0, 0, 0, 0, 0]);
        let pseudo = mana_device::checksum::Sum::default().add_bytes(&frame[ip + 12..tcp]);
        let pseudo = pseudo.add_word(6).add_word(20 + payload.len() as u16).fold();
        frame[tcp + 16..tcp + 18].copy_from_slice(&pseudo.to_be_bytes());
        frame.extend(payload);
        frame
    }

    /// Whether IP and TCP checksums of an IPv4 frame are right.
    pub fn checksums_hold(frame: &[u8]) -> bool {
        let sum = mana_device::checksum::Sum::default;
        let tcp = &frame[34..];
        let pseudo = sum().add_bytes(&frame[26..34]).add_word(frame[23].into()).add_word(tcp.len() as u16);
        sum().add_bytes(&frame[14..34]).is_valid() && pseudo.add_bytes(tcp).is_valid()
    }

    /// A TCP checksum of [`partial_tcp4`] to make.
    pub const PARTIAL: TxOffload =
        TxOffload { checksum: Some(PartialChecksum { start: 34, offset: 16 }), segmentation: None };

    /// Segments of `mss` bytes to make of [`partial_tcp4`].
    pub fn cut_at(mss: u16) -> TxOffload {
        TxOffload { segmentation: Some(Segmentation { mss, header_len: 54, ipv6: false }), ..PARTIAL }
    }

    fn out(outlet: &mut Outlet, frames: &[(&[u8], TxOffload)]) -> Vec<(Vec<u8>, TxOffload)> {
        let mut batch = Batch::default();
        for (bytes, offload) in frames {
            with_frame(bytes, |frame| batch.gather(&TxFrame { offload: *offload, ..*frame }));
        }
        let (mut seen, count) = (Vec::new(), batch.len());
        outlet.hand_over(&mut batch, 0..count, &mut |frames| {
            seen.extend(frames.iter().map(|frame| (frame.bytes.to_vec(), frame.offload)));
        });
        seen
    }

    #[test]
    fn plain_frames_pass_in_order_and_long_ones_are_dropped() {
        let mut outlet = Outlet::default();
        outlet.limit(1500);
        let frames: Vec<Vec<u8>> = (0..200_usize).map(|n| vec![n as u8; 60 + n]).collect();
        let given: Vec<_> = frames.iter().map(|frame| (&frame[..], TxOffload::default())).collect();
        let seen = out(&mut outlet, &given);
        assert!(seen.iter().map(|(bytes, _)| bytes).eq(&frames));
        assert!(out(&mut outlet, &[(&[0; 1519], TxOffload::default())]).is_empty());
        assert_eq!(outlet.dropped(), 1);
    }

    #[test]
    fn what_is_not_accepted_is_finished() {
        let mut outlet = Outlet::default();
        outlet.limit(1500);
        let payload: Vec<u8> = (0..10_000).map(|n| (n % 251) as u8).collect();
        let (small, large) = (partial_tcp4(b"x"), partial_tcp4(&payload));
        let seen = out(&mut outlet, &[(&small, PARTIAL), (&large, cut_at(1400)), (&small, PARTIAL)]);
        assert_eq!(seen.len(), 1 + 8 + 1);
        assert!(
            seen.iter().all(|(bytes, offload)| checksums_hold(bytes) && *offload == TxOffload::default())
        );
        let joined: Vec<u8> = seen[1..9].iter().flat_map(|(bytes, _)| bytes[54..].to_vec()).collect();
        assert_eq!(joined, payload);
    }

    #[test]
    fn what_is_accepted_passes_as_it_is() {
        let mut outlet = Outlet::default();
        outlet.limit(1500);
        outlet.accept(Accepts { checksum: true, tcp4: true, tcp6: false });
        let large = partial_tcp4(&[7; 5000]);
        let seen = out(&mut outlet, &[(&large, cut_at(1400))]);
        assert_eq!(seen, [(large, cut_at(1400))]);
    }

    #[test]
    fn senseless_offloads_drop_the_frame_only() {
        let mut outlet = Outlet::default();
        outlet.limit(1500);
        let beyond =
            TxOffload { checksum: Some(PartialChecksum { start: 60, offset: 94 }), segmentation: None };
        let frame = partial_tcp4(&[1; 100]);
        let tail = Segmentation { mss: 10, header_len: 250, ipv6: false };
        let headers = TxOffload { segmentation: Some(tail), ..PARTIAL };
        let jumbo = TxOffload { segmentation: Some(Segmentation { mss: 9000, ..tail }), ..PARTIAL };
        let zero = cut_at(0);
        let given = [beyond, headers, jumbo, zero, TxOffload::default()].map(|offload| (&frame[..], offload));
        assert_eq!(out(&mut outlet, &given).len(), 1);
        assert_eq!(outlet.dropped(), 4);
    }
}
