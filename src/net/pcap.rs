//! Everything that passes on a cable, in a pcap file (draft-ietf-opsawg-pcap) with nanosecond timestamps.
//!
//! Frames are written as they would be on a wire: checksums and segmentation that are left to somebody further on are
//! done for the file, so that readers find no errors in it.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use mana_device::doors::{Clock, Port, PortCapabilities, PortDropped, TxFrame, TxOffload};
use zerocopy::{Immutable, IntoBytes};

use super::batch::{Batch, Outlet};
use super::{Accepts, Cable, Deliver, Frame, Kick, Polled};

/// Magic of a file whose second timestamp field counts nanoseconds.
const MAGIC_NANOSECONDS: u32 = 0xa1b2_3c4d;
/// `LINKTYPE_ETHERNET`.
const LINKTYPE_ETHERNET: u32 = 1;
/// Longest frame that is kept whole: a 64 KiB IP packet in a tagged frame.
const SNAP_LENGTH: u32 = 65_535 + 18;

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct FileHeader {
    magic: u32,
    version_major: u16,
    version_minor: u16,
    reserved: [u32; 2],
    snap_length: u32,
    link_type: u32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct PacketHeader {
    seconds: u32,
    nanoseconds: u32,
    captured: u32,
    original: u32,
}

struct Capture {
    out: BufWriter<File>,
    /// A frame that is being finished.
    batch: Batch,
    outlet: Outlet,
    failed: bool,
}

impl Capture {
    fn write(&mut self, time_ns: u64, bytes: &[u8]) -> io::Result<()> {
        let captured = &bytes[..bytes.len().min(SNAP_LENGTH as usize)];
        let header = PacketHeader {
            seconds: (time_ns / 1_000_000_000) as u32,
            nanoseconds: (time_ns % 1_000_000_000) as u32,
            captured: captured.len() as u32,
            original: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
        };
        self.out.write_all(header.as_bytes())?;
        self.out.write_all(captured)
    }
}

/// A cable that keeps a record (`--pcap ID=FILE`).
pub struct Pcap {
    name: String,
    cable: Arc<dyn Cable>,
    clock: Arc<dyn Clock>,
    /// Wall-clock nanoseconds at the clock's zero.
    epoch_ns: u64,
    capture: Mutex<Capture>,
}

impl Pcap {
    /// Record what passes on `cable` of the netdev `id` in `file`.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn create(
        id: &str,
        file: &Path,
        cable: Arc<dyn Cable>,
        clock: Arc<dyn Clock>,
    ) -> anyhow::Result<Self> {
        let name = format!("--pcap {id}={}", file.display());
        let header = FileHeader {
            magic: MAGIC_NANOSECONDS,
            version_major: 2,
            version_minor: 4,
            reserved: [0; 2],
            snap_length: SNAP_LENGTH,
            link_type: LINKTYPE_ETHERNET,
        };
        let mut out = File::create(file)
            .map(BufWriter::new)
            .with_context(|| format!("{name}: the file can't be written"))?;
        out.write_all(header.as_bytes()).and_then(|()| out.flush()).with_context(|| name.clone())?;
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let epoch_ns = u64::try_from(wall).unwrap_or(u64::MAX).saturating_sub(clock.now_ns());
        let mut outlet = Outlet::default();
        outlet.limit(u16::MAX);
        let capture = Mutex::new(Capture { out, batch: Batch::default(), outlet, failed: false });
        Ok(Self { name, cable, clock, epoch_ns, capture })
    }

    fn capture(&self) -> MutexGuard<'_, Capture> {
        self.capture.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Record a frame for the guest.
    fn record(&self, capture: &mut Capture, frame: &Frame<'_>) {
        if frame.offload == TxOffload::default() {
            return self.write(capture, frame.bytes);
        }
        capture.batch.room(frame.bytes.len()).copy_from_slice(frame.bytes);
        capture.batch.commit(0..frame.bytes.len(), frame.checksum, frame.offload);
        self.record_batch(capture);
    }

    /// Record what is in the batch.
    fn record_batch(&self, capture: &mut Capture) {
        let (mut batch, mut outlet) =
            (std::mem::take(&mut capture.batch), std::mem::take(&mut capture.outlet));
        let count = batch.len();
        outlet.hand_over(&mut batch, 0..count, &mut |frames| {
            frames.iter().for_each(|frame| self.write(capture, frame.bytes));
        });
        batch.clear();
        (capture.batch, capture.outlet) = (batch, outlet);
    }

    fn write(&self, capture: &mut Capture, bytes: &[u8]) {
        let time_ns = self.epoch_ns.saturating_add(self.clock.now_ns());
        self.attempt(capture, |capture| capture.write(time_ns, bytes));
    }

    /// A full disk must not end the network: say so once and go on without a record.
    fn attempt(&self, capture: &mut Capture, write: impl FnOnce(&mut Capture) -> io::Result<()>) {
        if capture.failed {
            return;
        }
        if let Err(error) = write(capture) {
            log::error!("{}: {error}; nothing more is recorded", self.name);
            capture.failed = true;
        }
    }
}

impl Port for Pcap {
    fn capabilities(&self) -> PortCapabilities {
        self.cable.capabilities()
    }
    fn send(&self, frame: &TxFrame<'_>) -> Result<(), PortDropped> {
        {
            let capture = &mut *self.capture();
            capture.batch.gather(frame);
            self.record_batch(capture);
        }
        self.cable.send(frame)
    }
    fn flush(&self) {
        self.attempt(&mut self.capture(), |capture| capture.out.flush());
        self.cable.flush();
    }
}

impl Cable for Pcap {
    fn readable(&self) -> Option<RawFd> {
        self.cable.readable()
    }
    fn on_ready(&self, kick: Kick) {
        self.cable.on_ready(kick);
    }
    fn accept(&self, accepts: Accepts) {
        self.cable.accept(accepts);
    }
    fn dropped(&self) -> u64 {
        self.cable.dropped()
    }
    fn poll(&self, budget: usize, deliver: Deliver<'_>) -> Polled {
        let polled = self.cable.poll(budget, &mut |frames| {
            {
                let capture = &mut *self.capture();
                frames.iter().for_each(|frame| self.record(capture, frame));
            }
            deliver(frames);
        });
        if !polled.more {
            self.attempt(&mut self.capture(), |capture| capture.out.flush());
        }
        polled
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{drain, with_frame};
    use super::super::{Null, Peer, peer};
    use super::*;

    struct At(u64);

    impl Clock for At {
        fn now_ns(&self) -> u64 {
            self.0
        }
    }

    /// The frames of a capture, as any reader of pcap files would find them.
    fn frames(file: &[u8]) -> Vec<(u64, Vec<u8>)> {
        let word = |at: usize| u32::from_ne_bytes(file[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(20)), (0xa1b2_3c4d, 1));
        let (mut at, mut frames) = (24, Vec::new());
        while at < file.len() {
            let length = word(at + 8) as usize;
            assert_eq!(length, word(at + 12) as usize);
            let time = u64::from(word(at)) * 1_000_000_000 + u64::from(word(at + 4));
            frames.push((time, file[at + 16..at + 16 + length].to_vec()));
            at += 16 + length;
        }
        frames
    }

    #[test]
    fn records_both_directions_and_is_complete_when_idle() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let clock: Arc<dyn Clock> = Arc::new(At(5_000_000_123));
        let peer = Arc::new(Peer::new(peer::Network::numbered(0), 1500, Arc::clone(&clock)));
        let pcap = Pcap::create("n0", file.path(), peer, clock).unwrap();
        // Who has 10.0.2.2? Tell 10.0.2.15.
        let mut request = vec![0xff; 6];
        request.extend([0x52, 0x54, 0, 0x12, 0x34, 0x56, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        request.extend([0x52, 0x54, 0, 0x12, 0x34, 0x56, 10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
        with_frame(&request, |frame| pcap.send(frame)).unwrap();
        pcap.flush();
        let replies = drain(&pcap);
        let recorded = frames(&std::fs::read(file.path()).unwrap());
        assert!(replies.iter().any(|reply| reply[20..22] == [0, 2]), "an ARP reply");
        let mut passed = vec![request];
        passed.extend(replies);
        assert_eq!(recorded.iter().map(|(_, frame)| frame.clone()).collect::<Vec<_>>(), passed);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        assert!(now - recorded[0].0 < 60_000_000_000, "the timestamp is not the wall clock's");
    }

    #[test]
    fn says_which_option_names_an_unwritable_file() {
        let clock: Arc<dyn Clock> = Arc::new(At(0));
        let error = Pcap::create("n0", Path::new("/nowhere/x.pcap"), Arc::new(Null), clock).err().unwrap();
        assert!(format!("{error:#}").starts_with("--pcap n0=/nowhere/x.pcap: "), "{error:#}");
    }
}
