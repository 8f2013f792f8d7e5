//! MSI-X: the vector table, the pending bits, and the way out to the interrupt controller.
//!
//! Source: PCI Express base specification, 6.1.4 and 7.7.2.
//!
//! Each vector has its own lock, held only for its entry and while [`MsiSink::route`] is told (so that two
//! changes of one entry can't overtake each other); [`MsiSink::fire`] is called with no lock held.

pub mod state;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use crate::count;
use crate::counters::Counters;
use crate::doors::{MsiMessage, MsiSink};
use crate::observe::{Event, Tracer};
use crate::sync::lock;

/// Bytes of a table entry: address (8), data (4), vector control (4).
pub const ENTRY_SIZE: u32 = 16;
/// Vector control, Mask Bit.
const MASK: u32 = 1;

/// MSI-X Enable in Message Control.
pub const ENABLE: u16 = 1 << 15;
/// Function Mask in Message Control.
pub const FUNCTION_MASK: u16 = 1 << 14;

#[derive(Debug)]
struct Entry {
    message: MsiMessage,
    masked: bool,
    /// What the sink was last told.
    routed: Option<MsiMessage>,
}

impl Entry {
    /// Reset: masked, nothing pending.
    const RESET: Self = Self { message: MsiMessage { address: 0, data: 0 }, masked: true, routed: None };
}

/// The MSI-X capability's machinery.
pub struct Msix {
    enabled: AtomicBool,
    function_mask: AtomicBool,
    bus_master: Arc<AtomicBool>,
    entries: Box<[Mutex<Entry>]>,
    /// The pending-bit array, as it reads.
    pending: Box<[AtomicU32]>,
    sink: Arc<dyn MsiSink>,
    tracer: Tracer,
    counters: Arc<Counters>,
}

impl Msix {
    /// A table of `size` masked entries. Messages go to `sink` while MSI-X is enabled and `bus_master` set.
    pub fn new(
        size: u16,
        sink: Arc<dyn MsiSink>,
        bus_master: Arc<AtomicBool>,
        tracer: Tracer,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            enabled: AtomicBool::new(false),
            function_mask: AtomicBool::new(false),
            bus_master,
            entries: (0..size).map(|_| Mutex::new(Entry::RESET)).collect(),
            pending: (0..size.div_ceil(32)).map(|_| AtomicU32::new(0)).collect(),
            sink,
            tracer,
            counters,
        }
    }
    /// Entries of the table.
    pub fn table_size(&self) -> u16 {
        self.entries.len() as u16
    }
    /// Back to the reset state.
    pub fn reset(&self) {
        self.enabled.store(false, Ordering::SeqCst);
        self.function_mask.store(false, Ordering::SeqCst);
        for entry in &self.entries {
            *lock(entry) = Entry::RESET;
        }
        self.clear_pending();
    }
    /// The word of the pending-bit array that has `vector`'s bit, and the bit; for a vector of the table.
    fn pending_bit(&self, vector: u16) -> (&AtomicU32, u32) {
        (&self.pending[usize::from(vector / 32)], 1 << (vector % 32))
    }
    fn may_send(&self) -> bool {
        self.enabled.load(Ordering::SeqCst)
            && !self.function_mask.load(Ordering::SeqCst)
            && self.bus_master.load(Ordering::SeqCst)
    }
    /// Message Control was written.
    pub fn set_control(&self, control: u16) {
        let (enabled, masked) = (control & ENABLE != 0, control & FUNCTION_MASK != 0);
        let was_enabled = self.enabled.swap(enabled, Ordering::SeqCst);
        let was_masked = self.function_mask.swap(masked, Ordering::SeqCst);
        let table_size = self.table_size();
        if !enabled {
            self.clear_pending();
        }
        if enabled != was_enabled {
            self.tracer.emit(|| match enabled {
                true => Event::MsixEnable { table_size, masked },
                false => Event::MsixDisable { table_size, masked },
            });
        }
        if masked != was_masked {
            self.tracer.emit(|| Event::MsixFunctionMask { table_size, masked });
        }
        self.replay();
    }
    /// Send what is pending on unmasked vectors, after something that held all of them back is gone.
    pub fn replay(&self) {
        if self.may_send() {
            for vector in 0..self.table_size() {
                self.settle(vector);
            }
        }
    }
    /// Forget what is pending, because its causes are gone: a later owner of the function must not be interrupted for
    /// an earlier one's queues (the 6.1 driver does not survive an interrupt that comes before its first event).
    pub fn clear_pending(&self) {
        self.pending.iter().for_each(|word| word.store(0, Ordering::SeqCst));
    }
    /// Interrupt on `vector`: sent now, or pending until it can be. A function whose MSI-X is not enabled has no
    /// vectors, and nothing is kept.
    pub fn signal(&self, vector: u16) {
        if !self.enabled.load(Ordering::SeqCst) {
            return;
        }
        if vector >= self.table_size() {
            count!(self.counters.msix_out_of_range, "MSI-X vector {vector} is beyond the table");
            return;
        }
        let (word, bit) = self.pending_bit(vector);
        word.fetch_or(bit, Ordering::SeqCst);
        if !self.settle(vector) {
            self.counters.msix_pended.bump();
            self.tracer.emit(|| Event::MsixPend { vector });
        }
    }
    /// If `vector` can send: route it as its entry says, and send what is pending. `false` if it can't.
    fn settle(&self, vector: u16) -> bool {
        let Some(entry) = self.entries.get(usize::from(vector)) else { return false };
        let mut entry = lock(entry);
        if entry.masked || !self.may_send() {
            return false;
        }
        if entry.routed != Some(entry.message) {
            self.sink.route(vector, entry.message);
            entry.routed = Some(entry.message);
        }
        let (word, bit) = self.pending_bit(vector);
        // Mostly there is nothing, and then nothing is written.
        let fire =
            word.load(Ordering::SeqCst) & bit != 0 && word.fetch_and(!bit, Ordering::SeqCst) & bit != 0;
        drop(entry);
        if fire {
            self.sink.fire(vector);
            self.counters.msix_fired.bump();
            self.tracer.emit(|| Event::MsixFire { vector });
        }
        true
    }
    /// The dword at byte `offset` of the table, a multiple of 4.
    pub fn read_table(&self, offset: u32) -> u32 {
        let Some(entry) = self.entries.get((offset / ENTRY_SIZE) as usize) else { return 0 };
        let entry = lock(entry);
        match offset % ENTRY_SIZE / 4 {
            0 => entry.message.address as u32,
            1 => (entry.message.address >> 32) as u32,
            2 => entry.message.data,
            _ => u32::from(entry.masked),
        }
    }
    /// Write the dword at byte `offset` of the table, a multiple of 4. Takes effect at once, whatever other vectors
    /// do: a driver may add vectors while the function is running.
    pub fn write_table(&self, offset: u32, value: u32) {
        let vector = (offset / ENTRY_SIZE) as u16;
        let Some(entry) = self.entries.get(usize::from(vector)) else { return };
        let mut entry = lock(entry);
        let message = entry.message;
        match offset % ENTRY_SIZE / 4 {
            // The two low bits of a message address are reserved.
            0 => entry.message.address = message.address >> 32 << 32 | u64::from(value & !3),
            1 => entry.message.address = message.address & 0xffff_ffff | u64::from(value) << 32,
            2 => {
                entry.message.data = value;
                let MsiMessage { address, data } = entry.message;
                drop(entry);
                self.tracer.emit(|| Event::MsixProgram { vector, address, data });
            }
            _ => {
                let masked = value & MASK != 0;
                let changed = entry.masked != masked;
                entry.masked = masked;
                drop(entry);
                if changed {
                    self.tracer.emit(|| match masked {
                        true => Event::MsixMask { vector },
                        false => Event::MsixUnmask { vector },
                    });
                }
                self.settle(vector);
            }
        }
    }
    /// The dword at byte `offset` of the pending-bit array, a multiple of 4.
    pub fn read_pending(&self, offset: u32) -> u32 {
        self.pending.get((offset / 4) as usize).map_or(0, |word| word.load(Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<String>>);

    impl Recorder {
        fn take(&self) -> Vec<String> {
            std::mem::take(&mut lock(&self.0))
        }
    }
    impl MsiSink for Recorder {
        fn route(&self, vector: u16, message: MsiMessage) {
            lock(&self.0).push(format!("route {vector} {:x}={:x}", message.address, message.data));
        }
        fn fire(&self, vector: u16) {
            lock(&self.0).push(format!("fire {vector}"));
        }
    }

    fn msix() -> (Msix, Arc<Recorder>, Arc<AtomicBool>) {
        let sink = Arc::new(Recorder::default());
        let bus_master = Arc::new(AtomicBool::new(true));
        let msix = Msix::new(40, sink.clone(), bus_master.clone(), Tracer::silent(), Arc::default());
        (msix, sink, bus_master)
    }
    fn program(msix: &Msix, vector: u32, data: u32) {
        msix.write_table(vector * ENTRY_SIZE, 0xfee0_0000);
        msix.write_table(vector * ENTRY_SIZE + 4, 1);
        msix.write_table(vector * ENTRY_SIZE + 8, data);
    }
    fn mask(msix: &Msix, vector: u32, masked: bool) {
        msix.write_table(vector * ENTRY_SIZE + 12, masked.into());
    }

    #[test]
    fn entries_are_masked_at_reset_and_hold_what_is_written() {
        let (msix, _, _) = msix();
        assert_eq!(msix.read_table(12), 1);
        program(&msix, 3, 0x41);
        assert_eq!(msix.read_table(48), 0xfee0_0000);
        assert_eq!(msix.read_table(52), 1);
        assert_eq!(msix.read_table(56), 0x41);
        msix.reset();
        assert_eq!(msix.read_table(56), 0);
    }

    #[test]
    fn masked_vector_pends_and_fires_once_on_unmask() {
        let (msix, sink, _) = msix();
        msix.set_control(ENABLE);
        program(&msix, 33, 7);
        msix.signal(33);
        msix.signal(33);
        assert_eq!(msix.read_pending(4), 1 << 1);
        assert!(sink.take().is_empty());
        mask(&msix, 33, false);
        assert_eq!(sink.take(), ["route 33 1fee00000=7", "fire 33"]);
        assert_eq!(msix.read_pending(4), 0);
    }

    #[test]
    fn function_mask_and_bus_master_hold_back_all() {
        let (msix, sink, bus_master) = msix();
        program(&msix, 1, 7);
        mask(&msix, 1, false);
        msix.set_control(ENABLE | FUNCTION_MASK);
        msix.signal(1);
        bus_master.store(false, Ordering::SeqCst);
        msix.set_control(ENABLE);
        assert!(sink.take().is_empty());
        bus_master.store(true, Ordering::SeqCst);
        msix.replay();
        assert_eq!(sink.take(), ["route 1 1fee00000=7", "fire 1"]);
    }

    #[test]
    fn vectors_can_be_added_and_moved_while_others_are_live() {
        let (msix, sink, _) = msix();
        msix.set_control(ENABLE);
        program(&msix, 0, 1);
        mask(&msix, 0, false);
        msix.signal(0);
        program(&msix, 1, 2);
        assert_eq!(sink.take(), ["route 0 1fee00000=1", "fire 0"]);
        mask(&msix, 1, false);
        mask(&msix, 0, true);
        program(&msix, 0, 9);
        msix.signal(1);
        mask(&msix, 0, false);
        msix.signal(0);
        assert_eq!(sink.take(), ["route 1 1fee00000=2", "fire 1", "route 0 1fee00000=9", "fire 0"]);
    }

    #[test]
    fn message_changed_without_masking_is_routed_before_it_fires() {
        let (msix, sink, _) = msix();
        msix.set_control(ENABLE);
        program(&msix, 0, 1);
        mask(&msix, 0, false);
        sink.take();
        program(&msix, 0, 5);
        msix.signal(0);
        assert_eq!(sink.take(), ["route 0 1fee00000=5", "fire 0"]);
    }

    #[test]
    fn nothing_leaves_a_disabled_function_or_a_missing_vector() {
        let (msix, sink, _) = msix();
        program(&msix, 0, 1);
        mask(&msix, 0, false);
        msix.signal(0);
        msix.set_control(ENABLE);
        msix.signal(40);
        assert_eq!(sink.take(), ["route 0 1fee00000=1"]);
        mask(&msix, 0, true);
        msix.signal(0);
        msix.set_control(0);
        mask(&msix, 0, false);
        msix.set_control(ENABLE);
        assert!(sink.take().is_empty());
    }

    /// What can happen to interrupts.
    #[derive(Clone, Copy, Debug)]
    enum Step {
        Signal(u16),
        Mask(u16, bool),
        Control { enabled: bool, masked: bool },
        BusMaster(bool),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..42_u16).prop_map(Step::Signal),
            3 => (0..40_u16, any::<bool>()).prop_map(|(vector, masked)| Step::Mask(vector, masked)),
            1 => any::<(bool, bool)>().prop_map(|(enabled, masked)| Step::Control { enabled, masked }),
            1 => any::<bool>().prop_map(Step::BusMaster),
        ]
    }

    proptest! {
        /// An interrupt is sent once: at once if its vector can send, else when it can again; the pending bits say which
        /// ones wait. Disabling MSI-X forgets them.
        #[test]
        fn nothing_is_lost_doubled_or_sent_too_soon(steps in proptest::collection::vec(step(), 0..150)) {
            let (msix, sink, bus_master) = msix();
            let (mut unmasked, mut pending) = ([false; 40], [false; 40]);
            let (mut enabled, mut function_mask, mut master) = (false, false, true);
            for step in steps {
                match step {
                    Step::Signal(vector) => {
                        msix.signal(vector);
                        let known = pending.get_mut(usize::from(vector)).filter(|_| enabled);
                        known.into_iter().for_each(|pending| *pending = true);
                    }
                    Step::Mask(vector, masked) => {
                        mask(&msix, vector.into(), masked);
                        unmasked[usize::from(vector)] = !masked;
                    }
                    Step::Control { enabled: on, masked } => {
                        msix.set_control(if on { ENABLE } else { 0 } | if masked { FUNCTION_MASK } else { 0 });
                        (enabled, function_mask) = (on, masked);
                        pending = pending.map(|pending| pending && on);
                    }
                    Step::BusMaster(on) => {
                        bus_master.store(on, Ordering::SeqCst);
                        msix.replay();
                        master = on;
                    }
                }
                let may_send = enabled && !function_mask && master;
                let due: Vec<usize> = (0..40).filter(|&at| may_send && unmasked[at] && pending[at]).collect();
                due.iter().for_each(|&at| pending[at] = false);
                let mut fired: Vec<String> = sink.take();
                fired.retain(|said| said.starts_with("fire"));
                let expected: Vec<String> = due.iter().map(|vector| format!("fire {vector}")).collect();
                prop_assert_eq!(fired, expected);
                let bits: u64 = (0..40).map(|at| u64::from(pending[at]) << at).sum();
                let read = u64::from(msix.read_pending(0)) | u64::from(msix.read_pending(4)) << 32;
                prop_assert_eq!(read, bits);
            }
        }
    }
}
