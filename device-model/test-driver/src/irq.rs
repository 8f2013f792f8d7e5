//! Interrupts: vectors and their handlers, the event queues behind them, and the wait for something to happen.

use std::collections::BTreeMap;

use mana_device::doors::MsiMessage;

use crate::driver::Driver;
use crate::error::{Errno, Error, Result};
use crate::queues::{Cqe, Eqe, EventQueue};

/// Events that the ISR takes at a time (`ARRAY_SIZE` of its buffer).
const EVENTS_PER_INTERRUPT: usize = 5;
/// Rounds of interrupts after which the device is taken to interrupt for ever.
const MAX_ROUNDS: usize = 100_000;

/// A vector that the kernel gave the driver.
pub(crate) struct Vector {
    message: MsiMessage,
    requested: bool,
    eqs: Vec<usize>,
}

/// An event queue and what was heard on it.
pub(crate) struct Eq {
    pub queue: EventQueue,
    pub vector: u16,
    /// Events of type 64.
    pub tests: u32,
}

/// All of the driver's interrupt state.
#[derive(Default)]
pub(crate) struct Irqs {
    pub vectors: BTreeMap<u16, Vector>,
    pub eqs: BTreeMap<usize, Eq>,
    next_key: usize,
}

impl Irqs {
    pub fn eq(&self, key: usize) -> &Eq {
        &self.eqs[&key]
    }
    pub fn eq_mut(&mut self, key: usize) -> &mut Eq {
        self.eqs.get_mut(&key).expect("the event queue is registered")
    }
    /// `mana_gd_register_irq`.
    pub fn register(&mut self, vector: u16, queue: EventQueue) -> usize {
        let key = self.next_key;
        self.next_key += 1;
        self.eqs.insert(key, Eq { queue, vector, tests: 0 });
        self.vectors.get_mut(&vector).expect("the vector exists").eqs.push(key);
        key
    }
    /// `mana_gd_deregister_irq`.
    pub fn deregister(&mut self, key: usize) -> EventQueue {
        let eq = self.eqs.remove(&key).expect("the event queue is registered");
        if let Some(vector) = self.vectors.get_mut(&eq.vector) {
            vector.eqs.retain(|&other| other != key);
        }
        eq.queue
    }
    /// The first vector from 1 on without an event queue.
    pub fn first_free(&self, usable: u32) -> Option<u16> {
        let free = |vector: &u16| self.vectors.get(vector).is_some_and(|vector| vector.eqs.is_empty());
        (1..u16::try_from(usable).ok()?).find(free)
    }
}

/// The message that sends `vector` to `cpu`: an x86 local APIC address, with data unlike any other vector's.
fn message(vector: u16, cpu: u32) -> MsiMessage {
    MsiMessage { address: 0xfee0_0000 | u64::from(cpu & 0xff) << 12, data: 0x4000 | u32::from(vector) }
}

impl Driver<'_> {
    /// The kernel takes vector `vector` for the driver, while it is masked.
    pub(crate) fn alloc_vector(&mut self, vector: u16) {
        self.msix.alloc(vector);
        self.irqs
            .vectors
            .insert(vector, Vector { message: MsiMessage::default(), requested: false, eqs: Vec::new() });
    }

    /// The kernel took `count` vectors at once.
    pub(crate) fn enable_vectors(&mut self, count: u16) {
        self.msix.enable(count);
        for vector in 0..count {
            let fresh = Vector { message: MsiMessage::default(), requested: false, eqs: Vec::new() };
            self.irqs.vectors.insert(vector, fresh);
        }
    }

    /// `request_irq`: the final message, then unmask.
    pub(crate) fn request_irq(&mut self, vector: u16) {
        let to = message(vector, u32::from(vector) % self.world.cpus);
        self.msix.set_message(vector, to);
        let state = self.irqs.vectors.get_mut(&vector).expect("the vector is allocated");
        (state.message, state.requested) = (to, true);
        self.msix.set_mask(vector, false);
    }

    /// Move a vector to `cpu`, as an affinity change without interrupt remapping does: masked, in two steps.
    ///
    /// # Panics
    /// The driver has no such vector.
    pub fn set_affinity(&mut self, vector: u16, cpu: u32) {
        let to = message(vector, cpu);
        self.msix.set_mask(vector, true);
        self.msix.set_message(vector, to);
        self.irqs.vectors.get_mut(&vector).expect("the driver has this vector").message = to;
        self.msix.set_mask(vector, false);
    }

    /// Free every vector and disable MSI-X.
    pub(crate) fn free_vectors(&mut self) {
        for (vector, state) in std::mem::take(&mut self.irqs.vectors) {
            if state.requested {
                self.msix.release(vector);
            }
        }
        self.msix.disable();
    }

    /// Let the device work and handle what it raises until both are quiet; time stands still.
    ///
    /// Returns the device's next deadline.
    ///
    /// # Panics
    /// The device interrupts for ever, or does what makes the Linux driver WARN.
    pub fn service(&mut self) -> Option<u64> {
        for _ in 0..MAX_ROUNDS {
            let deadline = self.world.settle();
            let messages = self.world.interrupts.take();
            if messages.is_empty() && !self.napi_due() {
                return deadline;
            }
            for message in messages {
                self.interrupt(message);
            }
            self.run_napi();
        }
        panic!("the device interrupts for ever");
    }

    /// Serve interrupts until `done`, letting time pass to the device's deadlines.
    ///
    /// # Errors
    /// `-ETIMEDOUT` after `timeout_ns`.
    pub(crate) fn wait(&mut self, timeout_ns: u64, what: &str, done: impl Fn(&Self) -> bool) -> Result<()> {
        let end = self.world.now() + timeout_ns;
        loop {
            let deadline = self.service();
            if done(self) {
                return Ok(());
            }
            let now = self.world.now();
            match deadline {
                Some(deadline) if deadline <= end && now < end => self.world.clock.advance(deadline - now),
                _ => {
                    self.world.clock.advance(end - now);
                    return Err(Error::new(
                        Errno::Etimedout,
                        format!("{what}: nothing after {timeout_ns} ns"),
                    ));
                }
            }
        }
    }

    /// One message-signalled interrupt.
    fn interrupt(&mut self, message: MsiMessage) {
        let found =
            self.irqs.vectors.iter().find(|(_, vector)| vector.requested && vector.message == message);
        let Some((&number, vector)) = found else {
            panic!("an interrupt that nobody asked for: {message:x?}");
        };
        self.interrupts_seen.entry(number).and_modify(|count| *count += 1).or_insert(1);
        for key in vector.eqs.clone() {
            self.process_eq(key);
        }
    }

    /// `mana_gd_process_eq_events`.
    fn process_eq(&mut self, key: usize) {
        let mut taken = 0;
        while taken < EVENTS_PER_INTERRUPT {
            let Some(eqe) = self.irqs.eq_mut(key).queue.poll(&self.world.memory) else { break };
            self.event(key, eqe);
            taken += 1;
            // The handler of an event may be the last one of its queue.
            if !self.irqs.eqs.contains_key(&key) {
                return;
            }
        }
        if taken > 0 || self.generation.rings_empty_eq {
            let eq = self.irqs.eq(key);
            assert!(
                self.hwc_ready_to_ring(key),
                "an interrupt on vector {} before event 129 is in memory",
                eq.vector
            );
            eq.queue.doorbell(self.world, true);
        }
    }

    fn event(&mut self, key: usize, eqe: Eqe) {
        match eqe.kind {
            3 => self.completion_event(eqe.details[0]),
            64 => self.irqs.eq_mut(key).tests += 1,
            129..=131 => self.hwc_init_event(key, eqe),
            _ => self.other_events.push(eqe),
        }
    }

    fn completion_event(&mut self, details: u32) {
        assert_eq!(details >> 24, 0, "the upper bits of a completion event's details are reserved");
        let known = self.cqs.contains_key(&details);
        assert!(known, "WARN: a completion event names CQ {details}, which the driver does not have");
        if self.hwc_cq() == Some(details) {
            self.hwc_completion_event(details);
        } else {
            self.schedule_napi(details);
        }
    }

    /// The next completion of CQ `cq`.
    pub(crate) fn poll_cq(&mut self, cq: u32) -> Option<Cqe> {
        self.cqs.get_mut(&cq)?.poll(&self.world.memory)
    }
}
