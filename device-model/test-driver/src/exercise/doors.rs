//! What the card reaches: interrupts, a clock, a list of work, a cable. Each checks what it is told.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use mana_device::doors::{MsiMessage, MsiSink, Port, PortCapabilities, PortDropped, TxFrame, Waker, Work};

use super::digest;

/// Entries of the MSI-X table.
pub const VECTORS: usize = 16;

#[derive(Clone, Copy, Default)]
struct Entry {
    written: MsiMessage,
    unmasked: bool,
    routed: Option<MsiMessage>,
}

/// What the guest has written to the table, and what has fired.
#[derive(Clone, Default)]
pub struct State {
    entries: [Entry; VECTORS],
    enabled: bool,
    function_mask: bool,
    bus_master: bool,
    mastered: bool,
    fired: u64,
    digest: u64,
}

/// The interrupt controller, which knows what the guest has written to the table.
#[derive(Default)]
pub struct Vectors(Mutex<State>);

impl Vectors {
    fn with<R>(&self, work: impl FnOnce(&mut State) -> R) -> R {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
    /// The guest is about to write to configuration space.
    pub fn config(&self, offset: u16, data: &[u8]) {
        self.with(|state| {
            for (&byte, at) in data.iter().zip(offset..) {
                match at {
                    0x04 => state.bus_master = byte & 4 != 0,
                    0x53 => (state.enabled, state.function_mask) = (byte & 0x80 != 0, byte & 0x40 != 0),
                    _ => {}
                }
            }
            state.mastered |= state.bus_master;
        });
    }
    /// The guest is about to write dword `value` at byte `offset` of the table.
    pub fn table(&self, offset: usize, value: u32) {
        self.with(|state| {
            let Some(entry) = state.entries.get_mut(offset / 16) else { return };
            let address = entry.written.address;
            match offset % 16 {
                0 => entry.written.address = address & !0xffff_ffff | u64::from(value & !3),
                4 => entry.written.address = address & 0xffff_ffff | u64::from(value) << 32,
                8 => entry.written.data = value,
                _ => entry.unmasked = value & 1 == 0,
            }
        });
    }
    /// The guest has let the card reach memory since the last reset.
    pub fn has_mastered(&self) -> bool {
        self.with(|state| state.mastered)
    }
    /// Vectors that something holds back, a bit each: only these may be pending.
    pub fn may_pend(&self) -> u64 {
        self.with(|state| {
            let held = state.function_mask || !state.bus_master;
            let masked = |(vector, entry): (usize, &Entry)| u64::from(held || !entry.unmasked) << vector;
            if state.enabled { state.entries.iter().enumerate().map(masked).sum() } else { 0 }
        })
    }
    /// The function is reset.
    pub fn reset(&self) {
        self.with(|state| *state = State::default());
    }
    /// All that is known.
    pub fn state(&self) -> State {
        self.with(|state| state.clone())
    }
    /// What was known when `state` was taken is known.
    pub fn set(&self, state: &State) {
        self.with(|known| known.clone_from(state));
    }
    /// The function is reset in the middle of a case: what has fired remains known.
    pub fn reset_function(&self) {
        self.with(|state| {
            let State { fired, digest, mastered, .. } = *state;
            *state = State { fired, digest, mastered, ..State::default() };
        });
    }
    /// Interrupts since the last reset.
    pub fn fired(&self) -> u64 {
        self.with(|state| state.fired)
    }
    /// A number for which vectors fired, in their order.
    pub fn digest(&self) -> u64 {
        self.with(|state| state.digest)
    }
}

impl MsiSink for Vectors {
    fn route(&self, vector: u16, message: MsiMessage) {
        self.with(|state| {
            let entry = state.entries.get_mut(usize::from(vector)).expect("a vector of the table is routed");
            assert_eq!(message, entry.written, "vector {vector} is routed as the guest wrote it");
            entry.routed = Some(message);
        });
    }
    fn fire(&self, vector: u16) {
        self.with(|state| {
            let entry = state.entries.get(usize::from(vector)).expect("a vector of the table fires");
            assert!(state.enabled && !state.function_mask, "vector {vector} fires with MSI-X off");
            assert!(state.bus_master, "vector {vector} fires without Bus Master Enable");
            assert!(entry.unmasked, "vector {vector} fires masked");
            assert_eq!(entry.routed, Some(entry.written), "vector {vector} fires by an old route");
            state.fired += 1;
            state.digest = digest(state.digest, &vector.to_le_bytes());
        });
    }
}

/// What the card wants to be run.
#[derive(Default)]
pub struct Due {
    queues: AtomicU64,
    timers: AtomicBool,
}

impl Due {
    /// Bit of [`Work::Hwc`]; the others are send queues.
    const HWC: u32 = 0;

    /// The next piece of work, if there is one. Timers are to be run every time.
    pub fn take(&self) -> Option<Work> {
        let due = self.queues.load(Ordering::Relaxed);
        self.queues.store(due & due.wrapping_sub(1), Ordering::Relaxed);
        match due.trailing_zeros() {
            64 => self.timers.swap(false, Ordering::Relaxed).then_some(Work::Timers),
            Self::HWC => Some(Work::Hwc),
            sq => Some(Work::Transmit { sq }),
        }
    }
    /// Forget all.
    pub fn clear(&self) {
        self.queues.store(0, Ordering::Relaxed);
        self.timers.store(false, Ordering::Relaxed);
    }
}

impl Waker for Due {
    fn wake(&self, work: Work) {
        let bit = match work {
            Work::Hwc => Self::HWC,
            Work::Transmit { sq } => sq,
            Work::Timers => return self.timers.store(true, Ordering::Relaxed),
        };
        assert!(bit < 64 && (work == Work::Hwc || bit != Self::HWC), "{work:?} is no queue of this card");
        self.queues.fetch_or(1 << bit, Ordering::Relaxed);
    }
}

/// A cable that looks at every byte and keeps none.
pub struct Cable {
    capabilities: PortCapabilities,
    full: AtomicBool,
    frames: AtomicU64,
    digest: AtomicU64,
}

impl Cable {
    /// A cable that does what `capabilities` say.
    pub fn new(capabilities: PortCapabilities) -> Self {
        Self { capabilities, full: false.into(), frames: 0.into(), digest: 0.into() }
    }
    /// Take no more frames, or take them again.
    pub fn fill(&self, full: bool) {
        self.full.store(full, Ordering::Relaxed);
    }
    /// Frames taken since the last reset.
    pub fn frames(&self) -> u64 {
        self.frames.load(Ordering::Relaxed)
    }
    /// A number for the frames' bytes, in their order.
    pub fn digest(&self) -> u64 {
        self.digest.load(Ordering::Relaxed)
    }
    /// As new.
    pub fn reset(&self) {
        self.full.store(false, Ordering::Relaxed);
        self.frames.store(0, Ordering::Relaxed);
        self.digest.store(0, Ordering::Relaxed);
    }
}

/// Longest frame that may leave: the MTU of the card, Ethernet header, two VLAN tags.
pub const LONGEST: usize = 1500 + 14 + 8;

impl Port for Cable {
    fn capabilities(&self) -> PortCapabilities {
        self.capabilities
    }
    fn send(&self, frame: &TxFrame<'_>) -> Result<(), PortDropped> {
        let len: usize = frame.slices.iter().map(vm_memory::VolatileSlice::len).sum();
        assert_eq!(len, frame.len, "a frame is as long as its slices");
        assert!(len >= 14, "a frame has an Ethernet header");
        let offload = frame.offload;
        assert!(offload.checksum.is_none() || self.capabilities.checksum, "nobody can make this checksum");
        assert!(offload.segmentation.is_none() || self.capabilities.segmentation, "nobody can cut this");
        match offload.segmentation {
            None => assert!(len <= LONGEST, "a frame of {len} bytes leaves"),
            Some(cut) => {
                assert!(usize::from(cut.header_len) < len && cut.mss > 0, "{cut:?} of {len} bytes");
            }
        }
        if let Some(sum) = offload.checksum {
            let field = usize::from(sum.start) + usize::from(sum.offset);
            assert!(field + 2 <= len, "the checksum lies outside a frame of {len} bytes: {sum:?}");
        }
        if self.full.load(Ordering::Relaxed) {
            return Err(PortDropped);
        }
        let mut sum = self.digest();
        let mut piece = [0; 256];
        for slice in frame.slices {
            let mut rest = *slice;
            while !rest.is_empty() {
                let now = rest.copy_to(&mut piece[..]);
                sum = digest(sum, &piece[..now]);
                rest = rest.offset(now).expect("inside");
            }
        }
        self.digest.store(sum, Ordering::Relaxed);
        self.frames.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}
