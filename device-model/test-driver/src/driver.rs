//! `mana.ko`: probe and remove, in the order of the kernel that [`Generation`] names.

use std::collections::{BTreeMap, VecDeque};

use crate::error::{Errno, Error, Result};
use crate::gdma::{DeviceId, Registration, Resources};
use crate::generation::{EqScope, Generation, Vectors};
use crate::hwc::Hwc;
use crate::irq::Irqs;
use crate::mana::DevConfig;
use crate::memory::{Dma, Zone};
use crate::msix::Msix;
use crate::netdev::Netdev;
use crate::pci::{self, Pci};
use crate::queues::{CompletionQueue, Eqe};
use crate::world::World;

/// Bytes of a MANA event queue.
pub(crate) const EQ_BYTES: u32 = 32768;

/// What BAR0's registers say (VF layout).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Registers {
    pub doorbells: u64,
    pub page_size: u64,
    pub shm: u64,
}

/// The driver, bound to the function.
pub struct Driver<'w> {
    /// The machine.
    pub world: &'w World,
    /// Whose behaviour it shows.
    pub generation: &'static Generation,
    /// What GDMA_VERIFY_VF_DRIVER_VERSION said the device can do.
    pub capabilities: u64,
    /// What GDMA_QUERY_MAX_RESOURCES said.
    pub resources: Resources,
    /// What MANA_QUERY_DEV_CONFIG said.
    pub config: DevConfig,
    /// What GDMA_REGISTER_DEVICE said of the MANA device.
    pub registration: Registration,
    /// Vectors in use.
    pub usable: u32,
    /// Most queues of a port.
    pub max_queues: u32,
    /// Ports, in vPort order.
    pub netdevs: Vec<Netdev>,
    /// Events that are neither completions nor tests nor the channel's.
    pub other_events: Vec<Eqe>,
    /// Interrupts per vector.
    pub interrupts_seen: BTreeMap<u16, u64>,
    /// Whether event queues trigger polls of the ports' completion queues; off, completions pile up.
    pub napi: bool,
    /// Whether each receive buffer is checked for bytes that the device wrote past the frame.
    pub checks_buffers: bool,
    pub(crate) bar0_size: u64,
    pub(crate) registers: Registers,
    pub(crate) msix: Msix<'w>,
    pub(crate) irqs: Irqs,
    pub(crate) cqs: BTreeMap<u32, CompletionQueue>,
    pub(crate) scheduled: VecDeque<u32>,
    pub(crate) hwc: Option<Hwc>,
    pub(crate) mana_device: DeviceId,
    pub(crate) activity: u32,
    registered: bool,
    /// Event queues of the device, if it has them ([`EqScope::Device`]).
    pub(crate) device_eqs: Vec<usize>,
}

impl<'w> Driver<'w> {
    /// `mana_gd_probe`: from the PCI function to ports that can be opened.
    ///
    /// # Errors
    /// The errno of the Linux driver; everything is undone.
    ///
    /// # Panics
    /// The device does what makes the Linux driver WARN or oops.
    pub fn probe(world: &'w World, generation: &'static Generation) -> Result<Self> {
        Self::probe_in(world, generation, Zone::default())
    }

    /// As [`probe`](Self::probe), with the hardware channel's memory in `zone`.
    ///
    /// # Errors
    /// As [`probe`](Self::probe).
    pub fn probe_in(world: &'w World, generation: &'static Generation, zone: Zone) -> Result<Self> {
        let mut driver = Self::bind(world, generation);
        match driver.setup(zone) {
            Ok(()) => Ok(driver),
            Err(error) => {
                // The first failure is the one to tell.
                let _ = driver.unwind();
                Err(error)
            }
        }
    }

    /// As far as the hardware channel: every register is read, one vector set up, ESTABLISH done, the test event
    /// seen. What the scenarios that send commands of their own start from.
    ///
    /// # Errors
    /// As [`probe`](Self::probe).
    pub fn probe_hwc(world: &'w World, generation: &'static Generation) -> Result<Self> {
        let mut driver = Self::bind(world, generation);
        driver.read_registers()?;
        driver.first_vectors()?;
        driver.create_hwc(Zone::default())?;
        Ok(driver)
    }

    /// `pci_enable_device`, `pci_set_master`, and BARs with addresses.
    fn bind(world: &'w World, generation: &'static Generation) -> Self {
        let pci = Pci::new(world);
        let bars = pci.assign_bars();
        let bar0 = bars.iter().find(|bar| bar.index == 0).expect("BAR0 holds the registers");
        pci.update_command(pci::COMMAND_MEMORY, 0);
        pci.update_command(pci::COMMAND_MASTER, 0);
        assert!(world.device.memory_enabled(), "Memory Space Enable sticks");
        Self {
            world,
            generation,
            capabilities: 0,
            resources: Resources::default(),
            config: DevConfig::default(),
            registration: Registration::default(),
            usable: 0,
            max_queues: 0,
            netdevs: Vec::new(),
            other_events: Vec::new(),
            interrupts_seen: BTreeMap::new(),
            napi: true,
            checks_buffers: true,
            bar0_size: bar0.size,
            registers: Registers::default(),
            msix: Msix::new(world),
            irqs: Irqs::default(),
            cqs: BTreeMap::new(),
            scheduled: VecDeque::new(),
            hwc: None,
            mana_device: DeviceId::NONE,
            activity: 0,
            registered: false,
            device_eqs: Vec::new(),
        }
    }

    fn setup(&mut self, zone: Zone) -> Result<()> {
        self.read_registers()?;
        let allocated = self.first_vectors()?;
        self.create_hwc(zone)?;
        self.capabilities = self.verify_vf_driver_version()?;
        if self.generation.lists_first {
            self.detect_devices()?;
        }
        self.resources = self.query_max_resources()?;
        self.budget_vectors(allocated)?;
        if !self.generation.lists_first {
            self.detect_devices()?;
        }
        if self.generation.budgets_vectors {
            self.config = self.ports()?;
        }
        if self.generation.vectors == Vectors::OneThenGrow {
            self.grow_vectors();
        }
        self.registration = self.register_device(self.mana_device)?;
        self.registered = true;
        if self.generation.eq_scope == EqScope::Device {
            self.create_device_eqs()?;
        }
        self.config = self.ports()?;
        (0..u32::from(self.config.vports)).try_for_each(|index| self.attach(index))
    }

    /// Offsets of the doorbells and of the shared-memory window, each access with the width that Linux uses.
    fn read_registers(&mut self) -> Result<()> {
        let page_size = u64::from(self.register32(0x10) & 0xffff);
        let doorbells = self.register64(0x08);
        if !self.generation.validates_registers {
            assert_eq!(self.register64(0x08), doorbells, "the doorbell offset reads the same twice");
        }
        let shm = self.register64(0x18);
        self.registers = Registers { doorbells, page_size, shm };
        if !self.generation.validates_registers {
            return Ok(());
        }
        let bar = self.bar0_size;
        match self.registers {
            Registers { page_size: ..4096, .. } => {
                Err(Error::proto(format!("a doorbell page of {page_size} bytes")))
            }
            Registers { doorbells, .. } if doorbells >= bar => Err(Error::proto("doorbells outside BAR0")),
            Registers { shm, .. } if shm >= bar || bar - shm < 32 || shm % 4 != 0 => {
                Err(Error::proto(format!("the SHM window at {shm:#x} of a BAR of {bar:#x}")))
            }
            _ => Ok(()),
        }
    }

    fn register32(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.world.device.bar_read(0, offset, &mut data).expect("a register answers");
        u32::from_le_bytes(data)
    }

    fn register64(&self, offset: u64) -> u64 {
        let mut data = [0; 8];
        self.world.device.bar_read(0, offset, &mut data).expect("a register answers");
        u64::from_le_bytes(data)
    }

    fn first_vectors(&mut self) -> Result<u32> {
        let count = self.generation.first_vectors(self.world.cpus, u32::from(self.msix.size()));
        if self.generation.vectors == Vectors::Static && count < 2 {
            return Err(Error::new(Errno::Enospc, format!("{count} vectors before the channel")));
        }
        let vectors = u16::try_from(count).expect("at most 65");
        self.enable_vectors(vectors);
        (0..vectors).for_each(|vector| self.request_irq(vector));
        Ok(count)
    }

    fn detect_devices(&mut self) -> Result<()> {
        let devices = self.list_devices()?;
        let mana = devices.iter().rev().find(|device| device.kind == 2);
        self.mana_device = *mana.ok_or_else(|| Error::new(Errno::Enodev, "no MANA device in the list"))?;
        Ok(())
    }

    /// `mana_gd_query_max_resources`: how many vectors and queues there are to be.
    fn budget_vectors(&mut self, allocated: u32) -> Result<()> {
        let Resources { max_sq, max_rq, max_cq, max_eq, max_msix } = self.resources;
        let (cpus, table) = (self.world.cpus, u32::from(self.msix.size()));
        self.usable = self.generation.usable_vectors(cpus, table, allocated, max_msix);
        if self.usable <= 1 {
            return Err(Error::new(Errno::Enospc, format!("{} usable vectors", self.usable)));
        }
        let limits = [64, max_eq, max_cq, max_sq, max_rq, self.usable - 1];
        self.max_queues = limits.into_iter().fold(cpus, u32::min);
        if self.max_queues == 0 && self.generation.rejects_zero_queues {
            return Err(Error::new(Errno::Enospc, format!("{:?}", self.resources)));
        }
        Ok(())
    }

    fn ports(&mut self) -> Result<DevConfig> {
        let config = self.query_dev_config()?;
        if config.vports == 0 && self.generation.rejects_zero_queues {
            return Err(Error::new(Errno::Einval, "a device without vPorts"));
        }
        Ok(config)
    }

    /// `mana_gd_setup_remaining_irqs`: more vectors, with MSI-X enabled all the while.
    fn grow_vectors(&mut self) {
        let vectors = 1..u16::try_from(self.usable).expect("fits");
        vectors.clone().for_each(|vector| self.alloc_vector(vector));
        vectors.for_each(|vector| self.request_irq(vector));
        assert_eq!(self.msix.flags(), (true, false), "MSI-X stays enabled while vectors grow");
    }

    fn create_device_eqs(&mut self) -> Result<()> {
        for i in 0..self.max_queues {
            let vector = self.eq_vector(i, false).expect("a queue has a vector");
            let key = self.create_eq(self.mana_device, self.registration, EQ_BYTES, vector)?;
            self.device_eqs.push(key);
        }
        Ok(())
    }

    /// `rmmod`, or unbind: ports down, everything undone, the function disabled.
    ///
    /// # Errors
    /// The first failure; the rest is still done.
    pub fn remove(mut self) -> Result<()> {
        let mut first = Ok(());
        for port in 0..self.netdevs.len() {
            first = first.and(self.ifdown(port));
        }
        first.and(self.unwind())
    }

    /// As [`remove`](Self::remove); returns which ports were up, for the resume.
    ///
    /// # Errors
    /// As [`remove`](Self::remove).
    pub fn suspend(self) -> Result<Vec<usize>> {
        let up =
            self.netdevs.iter().enumerate().filter(|(_, netdev)| netdev.up).map(|(port, _)| port).collect();
        self.remove()?;
        Ok(up)
    }

    /// The driver is gone without a word (crash kernel, FLR, surprise removal), and so is the memory it owned.
    pub fn abandon(self) {
        self.world.memory.free_all();
    }

    fn unwind(&mut self) -> Result<()> {
        let mut first = Ok(());
        for key in std::mem::take(&mut self.device_eqs) {
            first = first.and(self.destroy_eq(self.mana_device, key));
        }
        if std::mem::take(&mut self.registered) {
            first = first.and(self.deregister_device(self.mana_device));
        }
        first = first.and(self.destroy_hwc());
        self.free_vectors();
        Pci::new(self.world).update_command(0, pci::COMMAND_MASTER);
        first
    }

    /// Memory for a ring of the MANA device, scattered where the generation may do so.
    pub(crate) fn ring_memory(&self, len: u64) -> Dma {
        let memory = &self.world.memory;
        if self.generation.scattered_rings { memory.alloc_scattered(len) } else { memory.alloc(len) }
    }

    /// The vector of the event queue of queue `i` of a port; `shared` if ports share vectors.
    pub(crate) fn eq_vector(&self, i: u32, shared: bool) -> Option<u16> {
        use crate::generation::EqVector::{FirstFree, FirstFreeOrShared, RoundRobin};
        match self.generation.eq_vector {
            FirstFree => self.irqs.first_free(self.usable),
            FirstFreeOrShared if !shared => self.irqs.first_free(self.usable),
            RoundRobin | FirstFreeOrShared => u16::try_from((i + 1) % self.usable).ok(),
        }
    }

    /// MSI-X of the function.
    pub fn msix(&self) -> Msix<'w> {
        self.msix
    }
    /// Configuration space.
    pub fn pci(&self) -> Pci<'w> {
        Pci::new(self.world)
    }
}
