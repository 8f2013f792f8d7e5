//! The two ways to send a message-signalled interrupt: KVM_SIGNAL_MSI, which we use, and an irqfd behind a GSI route.
//!
//! Needs a /dev/kvm; the CPU that is interrupted does not run. Each figure is the mean of many calls:
//! `fire` is one interrupt of one vector, `route` is one change of a vector's address or data while 64 vectors are in
//! use.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi,
};
use kvm_ioctls::{Kvm, VmFd};
use mana_device::doors::{MsiMessage, MsiSink};
use mana_vmm::irq::{self, MsiRoutes};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const VECTORS: u16 = 64;
const FIRES: u32 = 20_000;
const ROUTES: u32 = 500;
/// GSIs below belong to the I/O APIC.
const FIRST_MSI_GSI: u32 = 24;

fn main() -> anyhow::Result<()> {
    let vm = Arc::new(Kvm::new()?.create_vm()?);
    irq::create_irqchip(&vm)?;
    let vcpu = vm.create_vcpu(0)?;
    let mut lapic = vcpu.get_lapic()?;
    // Spurious interrupt vector register: APIC enabled.
    lapic.regs[0xf0] = -1;
    lapic.regs[0xf1] = 1;
    vcpu.set_lapic(&lapic)?;

    let signal = MsiRoutes::new(vm.clone());
    let irqfds = Irqfds::new(vm.clone())?;
    for (name, sink) in [("KVM_SIGNAL_MSI", &signal as &dyn MsiSink), ("irqfd", &irqfds)] {
        (0..VECTORS).for_each(|vector| sink.route(vector, message(vector)));
        let fire = mean(FIRES, |turn| sink.fire((turn % u32::from(VECTORS)) as u16));
        let route = mean(ROUTES, |turn| {
            let vector = (turn % u32::from(VECTORS)) as u16;
            sink.route(vector, black_box(message(vector)));
        });
        println!("{name:15} fire {fire:8} ns   route {route:8} ns");
    }
    Ok(())
}

/// Fixed delivery to the CPU with APIC id 0.
fn message(vector: u16) -> MsiMessage {
    MsiMessage { address: 0xfee0_0000, data: 0x30 + u32::from(vector) }
}

fn mean(turns: u32, mut call: impl FnMut(u32)) -> u128 {
    let start = Instant::now();
    (0..turns).for_each(&mut call);
    start.elapsed().as_nanos() / u128::from(turns)
}

/// The other way: an eventfd and a GSI of its own for each vector.
struct Irqfds {
    vm: Arc<VmFd>,
    events: Vec<EventFd>,
    messages: std::sync::Mutex<Vec<MsiMessage>>,
}

impl Irqfds {
    fn new(vm: Arc<VmFd>) -> anyhow::Result<Self> {
        let events = (0..VECTORS).map(|_| EventFd::new(EFD_NONBLOCK)).collect::<Result<Vec<_>, _>>()?;
        let messages = std::sync::Mutex::new(vec![MsiMessage::default(); usize::from(VECTORS)]);
        let irqfds = Self { vm, events, messages };
        irqfds.route(0, message(0));
        for (gsi, event) in (FIRST_MSI_GSI..).zip(&irqfds.events) {
            irqfds.vm.register_irqfd(event, gsi)?;
        }
        Ok(irqfds)
    }
}

impl MsiSink for Irqfds {
    fn route(&self, vector: u16, message: MsiMessage) {
        let mut messages = self.messages.lock().expect("nobody panics here");
        messages[usize::from(vector)] = message;
        let entry = |(gsi, message): (u32, &MsiMessage)| kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                msi: kvm_irq_routing_msi {
                    address_lo: message.address as u32,
                    address_hi: (message.address >> 32) as u32,
                    data: message.data,
                    ..Default::default()
                },
            },
            ..Default::default()
        };
        let entries: Vec<_> = (FIRST_MSI_GSI..).zip(messages.iter()).map(entry).collect();
        let routing = KvmIrqRouting::from_entries(&entries).expect("few enough routes");
        self.vm.set_gsi_routing(&routing).expect("KVM takes the routes");
    }

    fn fire(&self, vector: u16) {
        self.events[usize::from(vector)].write(1).expect("the counter is far from full");
    }
}
