//! Doorbells that KVM keeps for us.
//!
//! A doorbell is a store that KVM sees and would come out to us with, a CPU each time. What a driver says about its
//! completions, events and receive buffers need not be known before something is done about it. Such stores KVM puts
//! into a ring (coalesced MMIO) and goes on with the guest; whoever is about to run a queue, or to serve a CPU's other
//! access, takes them out first and hands them over in order.
//!
//! Two things can't wait for that:
//! * A driver that arms a queue behind whose end something has been put meanwhile sleeps until it is told. While the
//!   device has such a thing ([`ManaDevice::awaits_doorbells`](mana_device::ManaDevice::awaits_doorbells)), a worker looks into the ring
//!   every now and then.
//! * A send queue's doorbell, for which the workers sleep: it comes out to us. But once a worker finds, each time that
//!   it gets to run, that a send queue was rung many times, then the worker is what packets wait for, and not its
//!   being woken. These doorbells then go to the ring, too, and a worker looks every [`POLL`] ([`Doorbells::pace`]).

use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use anyhow::Context;
use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use kvm_ioctls::{IoEventAddress, VcpuFd, VmFd};

use crate::pci_host::PciHost;

/// How often a worker looks for doorbells that nobody wakes it for.
pub const POLL: Duration = Duration::from_micros(100);
/// Doorbells of send queues between two looks that make many, and few.
const MANY: u32 = 4;
const FEW: u32 = 2;
/// So many times in a row before anything is changed.
const STREAK: u32 = 8;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps stores to some addresses in the ring.
pub trait Keep: Send + Sync {
    /// From now on stores of 8 bytes to `zone` go to the ring.
    ///
    /// # Errors
    /// KVM refuses: they come out to us.
    fn keep(&self, zone: &Range<u64>) -> std::io::Result<()>;
    /// No longer.
    ///
    /// # Errors
    /// They did not.
    fn let_go(&self, zone: &Range<u64>) -> std::io::Result<()>;
}

impl Keep for VmFd {
    fn keep(&self, zone: &Range<u64>) -> std::io::Result<()> {
        let size = (zone.end - zone.start) as u32;
        Ok(self.register_coalesced_mmio(IoEventAddress::Mmio(zone.start), size)?)
    }
    fn let_go(&self, zone: &Range<u64>) -> std::io::Result<()> {
        let size = (zone.end - zone.start) as u32;
        Ok(self.unregister_coalesced_mmio(IoEventAddress::Mmio(zone.start), size)?)
    }
}

/// The doorbells of a machine.
pub struct Doorbells {
    vm: Arc<dyn Keep>,
    machine: OnceLock<Machine>,
    /// Address of the send queues' doorbell that a CPU came out with last.
    send: AtomicU64,
    /// Times that send queues were rung.
    rung: AtomicU32,
    /// Send queues' doorbells go to the ring.
    busy: AtomicBool,
    zones: Mutex<Zones>,
}

/// What there is only once the machine is built.
struct Machine {
    ring: Ring,
    /// Its functions know of the doorbells.
    pci: Weak<PciHost>,
}

/// Addresses whose stores KVM puts into the ring.
#[derive(Default)]
struct Zones {
    /// The memory map that they belong to ([`PciHost::generation`]).
    generation: u64,
    kept: Vec<Range<u64>>,
    /// Send queues' doorbells, and those of `kept` if they are kept now.
    send: Option<Range<u64>>,
    streak: u32,
    /// KVM refused one.
    refused: bool,
}

impl Doorbells {
    /// No doorbells are kept before [`begin`](Self::begin).
    pub fn new(vm: Arc<dyn Keep>) -> Arc<Self> {
        Arc::new(Self {
            vm,
            machine: OnceLock::new(),
            send: AtomicU64::new(u64::MAX),
            rung: AtomicU32::new(0),
            busy: AtomicBool::new(false),
            zones: Mutex::default(),
        })
    }

    /// From now on doorbells of the functions of `pci` are kept; `cpu` is any CPU of the machine.
    ///
    /// # Errors
    /// KVM has no ring: every doorbell comes out to us.
    pub fn begin(&self, pci: &Arc<PciHost>, cpu: &VcpuFd) -> anyhow::Result<()> {
        self.begin_with(pci, Ring::of(cpu)?);
        Ok(())
    }

    fn begin_with(&self, pci: &Arc<PciHost>, ring: Ring) {
        lock(&self.zones).generation = pci.generation();
        let _only_once = self.machine.set(Machine { ring, pci: Arc::downgrade(pci) });
    }

    /// Hand over what is in the ring; the answer is how many doorbells that were.
    #[inline]
    pub fn hand_over(&self) -> usize {
        match self.machine.get() {
            Some(machine) if !machine.ring.is_empty() => self.empty(machine),
            _ => 0,
        }
    }

    fn empty(&self, machine: &Machine) -> usize {
        let Some(pci) = machine.pci.upgrade() else { return 0 };
        let mut count = 0;
        machine.ring.take(|store| {
            let data = store.data.get(..store.len as usize).unwrap_or(&store.data);
            if self.send.load(Ordering::Relaxed) == store.phys_addr {
                self.rung.fetch_add(1, Ordering::Relaxed);
            }
            pci.window_write(store.phys_addr, data);
            count += 1;
        });
        count
    }

    /// A CPU has come out to us with a store to `address`, which was served.
    #[inline]
    pub fn stored(&self, address: u64) {
        if self.send.load(Ordering::Relaxed) == address {
            self.rung.fetch_add(1, Ordering::Relaxed);
        } else if let Some(machine) = self.machine.get() {
            self.learn(machine, address);
        }
    }

    /// If `address` is a doorbell, what is around it is kept from now on.
    fn learn(&self, machine: &Machine, address: u64) {
        let page = machine.pci.upgrade().and_then(|pci| pci.doorbell_page(address));
        let Some((send, others)) = page else { return };
        let mut zones = lock(&self.zones);
        if !zones.refused && !zones.kept.contains(&others) {
            zones.refused = !self.keep(&others);
            if !zones.refused {
                zones.kept.push(others);
            }
        }
        if send.contains(&address) && !self.busy.load(Ordering::Relaxed) {
            self.send.store(address, Ordering::Relaxed);
            self.rung.store(1, Ordering::Relaxed);
            zones.send = Some(send);
        }
    }

    fn keep(&self, zone: &Range<u64>) -> bool {
        let kept = self.vm.keep(zone);
        if let Err(error) = &kept {
            log::info!("doorbells at {zone:x?} come out one by one: KVM_REGISTER_COALESCED_MMIO: {error}");
        }
        kept.is_ok()
    }

    fn let_go(&self, zone: &Range<u64>) {
        if let Err(error) = self.vm.let_go(zone) {
            log::warn!("doorbells at {zone:x?}: KVM_UNREGISTER_COALESCED_MMIO: {error}");
        }
    }

    /// A CPU's access may have moved BARs: what is elsewhere now is no doorbell.
    #[inline]
    pub fn follow(&self) {
        if let Some(machine) = self.machine.get()
            && let Some(pci) = machine.pci.upgrade()
            && pci.has_moved()
        {
            self.forget(&pci);
        }
    }

    fn forget(&self, pci: &PciHost) {
        let mut zones = lock(&self.zones);
        let generation = pci.generation();
        if std::mem::replace(&mut zones.generation, generation) == generation {
            return;
        }
        pci.settle(generation);
        self.send.store(u64::MAX, Ordering::Relaxed);
        let send = zones.send.take().filter(|_| self.busy.swap(false, Ordering::Relaxed));
        std::mem::take(&mut zones.kept).iter().chain(&send).for_each(|zone| self.let_go(zone));
    }

    /// Send queues' doorbells are in the ring, and nobody is woken for them.
    #[inline]
    pub fn are_polled(&self) -> bool {
        self.busy.load(Ordering::Relaxed)
    }

    /// A worker begins to run queues, or to look whether it must: decide how send queues' doorbells come to us.
    pub fn pace(&self) {
        let (rung, busy) = (self.rung.swap(0, Ordering::Relaxed), self.are_polled());
        if rung == 0 && !busy {
            return;
        }
        let mut zones = lock(&self.zones);
        zones.streak = if busy && rung < FEW || !busy && rung >= MANY { zones.streak + 1 } else { 0 };
        if zones.streak < STREAK {
            return;
        }
        zones.streak = 0;
        let Some(send) = zones.send.clone().filter(|_| !zones.refused) else { return };
        if busy {
            self.let_go(&send);
            self.busy.store(false, Ordering::Relaxed);
        } else if self.keep(&send) {
            self.busy.store(true, Ordering::Relaxed);
        }
    }
}

/// KVM's ring (`struct kvm_coalesced_mmio_ring`): one for all CPUs of a machine, a page.
struct Ring {
    page: NonNull<kvm_coalesced_mmio_ring>,
    /// Held by who takes stores out.
    order: Mutex<()>,
}

// SAFETY: the page stays mapped until the ring is dropped; its two indices are accessed as atomics, and its entries only
// under `order`, while KVM leaves them alone.
unsafe impl Send for Ring {}
// SAFETY: as above.
unsafe impl Sync for Ring {}

impl Ring {
    /// x86-64's; KVM has the ring nowhere else.
    const PAGE: usize = 4096;
    const ENTRIES: u32 =
        ((Self::PAGE - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>()) as u32;

    fn of(cpu: &VcpuFd) -> anyhow::Result<Self> {
        Self::map(cpu.as_raw_fd(), libc::MAP_SHARED, Self::PAGE * KVM_COALESCED_MMIO_PAGE_OFFSET as usize)
    }

    fn map(file: RawFd, flags: libc::c_int, offset: usize) -> anyhow::Result<Self> {
        let (access, offset) = (libc::PROT_READ | libc::PROT_WRITE, offset as libc::off_t);
        // SAFETY: a new mapping, nowhere in particular.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), Self::PAGE, access, flags, file, offset) };
        let page = NonNull::new(page).filter(|page| page.as_ptr() != libc::MAP_FAILED);
        let page = page.ok_or_else(std::io::Error::last_os_error).context("no ring for doorbells")?;
        Ok(Self { page: page.cast(), order: Mutex::default() })
    }

    fn first(&self) -> &AtomicU32 {
        let first = self.page.as_ptr().cast::<u32>();
        // SAFETY: an aligned u32 of the page, which outlives `self`, and which everybody accesses atomically.
        unsafe { AtomicU32::from_ptr(first) }
    }

    fn last(&self) -> &AtomicU32 {
        let last = self.page.as_ptr().cast::<u32>().wrapping_add(1);
        // SAFETY: as for `first`.
        unsafe { AtomicU32::from_ptr(last) }
    }

    fn entry(&self, index: u32) -> *mut kvm_coalesced_mmio {
        let head = size_of::<kvm_coalesced_mmio_ring>();
        let entries = self.page.as_ptr().wrapping_byte_add(head).cast::<kvm_coalesced_mmio>();
        entries.wrapping_add(index as usize)
    }

    fn is_empty(&self) -> bool {
        self.first().load(Ordering::Acquire) == self.last().load(Ordering::Acquire)
    }

    /// Hand all stores to `serve`, oldest first. None is out of the ring before it is served, so that who finds the ring
    /// empty comes after all of them.
    fn take(&self, mut serve: impl FnMut(&kvm_coalesced_mmio)) {
        let _order = lock(&self.order);
        loop {
            let first = self.first().load(Ordering::Relaxed) % Self::ENTRIES;
            if first == self.last().load(Ordering::Acquire) {
                return;
            }
            // SAFETY: within the page; KVM writes this entry no more until `first` has passed it.
            let store = unsafe { self.entry(first).read() };
            serve(&store);
            self.first().store((first + 1) % Self::ENTRIES, Ordering::Release);
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping that `of` made, which nobody uses any more.
        unsafe { libc::munmap(self.page.as_ptr().cast(), Self::PAGE) };
    }
}

#[cfg(test)]
mod tests {
    use mana_device::{AccessError, Bar, ConfigEffect, DoorbellPage};

    use super::*;
    use crate::config::Slot;
    use crate::layout;
    use crate::pci_host::PciFunction;
    use crate::pci_host::plan::Wish;

    impl Ring {
        /// As KVM does (`coalesced_mmio_write`, virt/kvm/coalesced_mmio.c); `false` if the ring is full.
        fn put(&self, address: u64, value: u64) -> bool {
            let last = self.last().load(Ordering::Relaxed);
            let next = (last + 1) % Self::ENTRIES;
            if next == self.first().load(Ordering::Acquire) {
                return false;
            }
            let store = kvm_coalesced_mmio {
                phys_addr: address,
                len: 8,
                data: value.to_le_bytes(),
                ..Default::default()
            };
            // SAFETY: within the page; nobody reads this entry before `last` has passed it.
            unsafe { self.entry(last).write(store) };
            self.last().store(next, Ordering::Release);
            true
        }
    }

    fn ring() -> Ring {
        Ring::map(-1, libc::MAP_SHARED | libc::MAP_ANONYMOUS, 0).unwrap()
    }

    #[test]
    fn stores_come_out_in_order_and_none_before_it_is_served() {
        let ring = ring();
        let (mut put, mut seen) = (0, 0);
        for round in 1..100 {
            while put < seen + round && ring.put(put * 8, put) {
                put += 1;
            }
            ring.take(|store| {
                assert!(!ring.is_empty(), "who looks now must wait");
                let (address, value) = (store.phys_addr, u64::from_le_bytes(store.data));
                assert_eq!((address, value), (seen * 8, seen));
                seen += 1;
            });
            assert!(ring.is_empty());
        }
        while ring.put(put * 8, put) {
            put += 1;
        }
        assert_eq!(put - seen, u64::from(Ring::ENTRIES) - 1, "a full ring takes no more");
    }

    /// A BAR that is a page of doorbells, and what was written to it.
    #[derive(Default)]
    struct Page {
        address: AtomicU64,
        writes: Mutex<Vec<(u64, u64)>>,
    }

    impl PciFunction for Page {
        fn config_read(&self, _: u16, data: &mut [u8]) {
            data.fill(0);
        }
        fn config_write(&self, register: u16, data: &[u8]) -> ConfigEffect {
            let half = <[u8; 4]>::try_from(data).map(|half| u64::from(u32::from_le_bytes(half)));
            let address = self.address.load(Ordering::SeqCst);
            match (register, half) {
                (0x10, Ok(low)) => self.address.store(address >> 32 << 32 | low, Ordering::SeqCst),
                (0x14, Ok(high)) => self.address.store(high << 32 | address & 0xffff_ffff, Ordering::SeqCst),
                _ => {}
            }
            ConfigEffect { bars_changed: true }
        }
        fn bars(&self) -> Vec<Bar> {
            let address = self.address.load(Ordering::SeqCst);
            vec![Bar { index: 0, address, size: 4096, prefetchable: true }]
        }
        fn memory_enabled(&self) -> bool {
            true
        }
        fn bar_read(&self, _: u8, _: u64, _: &mut [u8]) -> Result<(), AccessError> {
            Ok(())
        }
        fn bar_write(&self, _: u8, offset: u64, data: &[u8]) -> Result<(), AccessError> {
            lock(&self.writes).push((offset, u64::from_le_bytes(data.try_into().unwrap())));
            Ok(())
        }
        fn doorbell_page(&self, _: u8, _: u64) -> Option<DoorbellPage> {
            Some(DoorbellPage { send: 0..0x400, others: 0x400..0x1000 })
        }
        fn reset(&self) {}
    }

    /// Zones that are kept now.
    #[derive(Default)]
    struct Zones(Mutex<Vec<Range<u64>>>);

    impl Keep for Zones {
        fn keep(&self, zone: &Range<u64>) -> std::io::Result<()> {
            lock(&self.0).push(zone.clone());
            Ok(())
        }
        fn let_go(&self, zone: &Range<u64>) -> std::io::Result<()> {
            let mut zones = lock(&self.0);
            let at = zones.iter().position(|kept| kept == zone).ok_or(std::io::ErrorKind::NotFound)?;
            zones.remove(at);
            Ok(())
        }
    }

    struct Bench {
        page: Arc<Page>,
        pci: Arc<PciHost>,
        zones: Arc<Zones>,
        doorbells: Arc<Doorbells>,
        at: u64,
    }

    impl Bench {
        fn new() -> Self {
            let (page, zones) = (Arc::new(Page::default()), Arc::new(Zones::default()));
            let wish = Wish { node: None, slot: Slot::Root };
            let function: Arc<dyn PciFunction> = page.clone();
            let pci = PciHost::new(&layout::mmio64(1 << 29), vec![(wish, function)]).unwrap();
            let (pci, doorbells) = (Arc::new(pci), Doorbells::new(zones.clone()));
            doorbells.begin_with(&pci, ring());
            let at = page.address.load(Ordering::SeqCst);
            Self { page, pci, zones, doorbells, at }
        }
        /// A CPU rings: into the ring if KVM keeps that, else it comes out.
        fn store(&self, offset: u64, value: u64) {
            let address = self.at + offset;
            if lock(&self.zones.0).iter().any(|zone| zone.contains(&address)) {
                assert!(self.doorbells.machine.get().unwrap().ring.put(address, value));
                return;
            }
            self.doorbells.hand_over();
            self.pci.window_write(address, &value.to_le_bytes());
            self.doorbells.stored(address);
        }
        fn written(&self) -> Vec<(u64, u64)> {
            std::mem::take(&mut *lock(&self.page.writes))
        }
        fn kept(&self) -> Vec<Range<u64>> {
            lock(&self.zones.0).iter().map(|zone| zone.start - self.at..zone.end - self.at).collect()
        }
    }

    const OTHERS: Range<u64> = 0x400..0x1000;
    const SEND: Range<u64> = 0..0x400;

    #[test]
    fn all_but_send_queues_doorbells_wait_for_the_next_one() {
        let bench = Bench::new();
        bench.store(0x800, 1);
        assert_eq!((bench.written(), bench.kept()), (vec![(0x800, 1)], vec![OTHERS]));
        bench.store(0xff8, 2);
        bench.store(0x400, 3);
        assert_eq!(bench.written(), []);
        bench.store(0, 4);
        assert_eq!(bench.written(), [(0xff8, 2), (0x400, 3), (0, 4)], "in order");
        bench.store(0x800, 5);
        assert_eq!((bench.doorbells.hand_over(), bench.written()), (1, vec![(0x800, 5)]));
        assert_eq!(bench.doorbells.hand_over(), 0);
    }

    #[test]
    fn send_queues_doorbells_wait_while_a_worker_finds_many_each_time() {
        let bench = Bench::new();
        let look = |rung| {
            (0..rung).for_each(|value| bench.store(0, value));
            bench.doorbells.hand_over();
            bench.doorbells.pace();
            bench.doorbells.are_polled()
        };
        look(u64::from(MANY));
        assert!(
            (1..100).all(|n| !look(if n % (STREAK - 1) == 0 { 1 } else { u64::from(MANY) })),
            "not in a row"
        );
        (0..STREAK).for_each(|_| _ = look(u64::from(MANY)));
        assert_eq!((bench.doorbells.are_polled(), bench.kept()), (true, vec![OTHERS, SEND]));
        assert!((0..100).all(|_| look(u64::from(MANY))));
        assert!((1..STREAK).all(|_| look(1)) && !look(0), "few for a while");
        assert_eq!(bench.kept(), [OTHERS]);
        assert!((0..100).all(|_| !look(1)));
    }

    #[test]
    fn nothing_is_kept_where_the_bar_was() {
        let bench = Bench::new();
        bench.store(0x800, 1);
        (0..=STREAK).for_each(|_| {
            (0..8).for_each(|value| bench.store(0, value));
            bench.doorbells.pace();
        });
        assert!(bench.doorbells.are_polled());
        let config = vm_device::bus::PioAddress(layout::PCI_CONFIG_PORT);
        let bar0 = 0x8000_0810_u32.to_le_bytes();
        vm_device::DevicePio::pio_write(&*bench.pci, config, 0, &bar0);
        bench.doorbells.follow();
        assert_eq!(bench.kept().len(), 2, "nothing has moved");
        let elsewhere = (bench.at as u32 + 4096).to_le_bytes();
        vm_device::DevicePio::pio_write(&*bench.pci, config, 4, &elsewhere);
        bench.doorbells.follow();
        assert!(bench.kept().is_empty() && !bench.doorbells.are_polled());
    }
}
