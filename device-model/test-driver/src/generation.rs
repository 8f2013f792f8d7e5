//! How the driver of a kernel release behaves, as data (sections 5.6, 7, 10, 12 and 13 of the interface).

/// When MSI-X vectors come into being.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vectors {
    /// All of them before the hardware channel.
    Static,
    /// One before the hardware channel, the rest when the device has said how many there are.
    OneThenGrow,
}

/// Whom the event queues belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EqScope {
    /// The device: made at probe, shared by all ports.
    Device,
    /// A port: made at ifup.
    Port,
}

/// How an event queue gets its vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EqVector {
    /// The first vector from 1 on that no event queue has.
    FirstFree,
    /// Queue `i` gets `(i + 1) % usable`.
    RoundRobin,
    /// [`FirstFree`](Self::FirstFree) while there is a vector for each queue of each port, else
    /// [`RoundRobin`](Self::RoundRobin).
    FirstFreeOrShared,
}

/// Version and length of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// `msg_version`.
    pub version: u16,
    /// Bytes.
    pub len: usize,
}

/// A kernel release's driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generation {
    /// The release.
    pub name: &'static str,
    /// `os_ver_major`, `os_ver_minor`.
    pub release: (u32, u32),
    /// `gd_drv_cap_flags1`.
    pub capabilities: u64,
    /// Checks the doorbell and SHM registers against BAR0.
    pub validates_registers: bool,
    /// When vectors come into being.
    pub vectors: Vectors,
    /// The number of vectors is limited to the MSI-X table's.
    pub limits_vectors_to_table: bool,
    /// GDMA_LIST_DEVICES comes before GDMA_QUERY_MAX_RESOURCES.
    pub lists_first: bool,
    /// MANA_QUERY_DEV_CONFIG is sent before GDMA_REGISTER_DEVICE, too.
    pub budgets_vectors: bool,
    /// Response version asked of MANA_QUERY_DEV_CONFIG.
    pub dev_config_version: u16,
    /// Whom event queues belong to.
    pub eq_scope: EqScope,
    /// Which vectors they get.
    pub eq_vector: EqVector,
    /// The ISR rings an event queue's doorbell though it found nothing.
    pub rings_empty_eq: bool,
    /// Request of MANA_CREATE_WQ_OBJ.
    pub wq_obj_request: Shape,
    /// Response of MANA_CREATE_WQ_OBJ.
    pub wq_obj_response: Shape,
    /// Request of MANA_CONFIG_VPORT_RX; the indirection table follows.
    pub vport_rx_request: Shape,
    /// Response of MANA_CONFIG_VPORT_RX.
    pub vport_rx_response: Shape,
    /// `rss_hash_types`.
    pub hash_types: u16,
    /// WQEs of a receive queue.
    pub rx_entries: u32,
    /// Bytes of a receive queue's CQ.
    pub rx_cq_bytes: u32,
    /// Most queue pairs that a port opens by default.
    pub default_queues: u32,
    /// A vPort without queues fails the probe.
    pub rejects_zero_queues: bool,
    /// After one command that timed out the channel counts as dead: 1 ms for each further one.
    pub gives_up_after_timeout: bool,
    /// `GDMA_STATUS_CMD_UNSUPPORTED` is an errno of its own.
    pub knows_unsupported: bool,
    /// Rings may lie in pages that are scattered.
    pub scattered_rings: bool,
}

/// Linux 6.1 as Debian ships it.
pub const V6_1: Generation = Generation {
    name: "6.1",
    release: (6, 1),
    capabilities: 0x82d,
    validates_registers: false,
    vectors: Vectors::Static,
    limits_vectors_to_table: true,
    lists_first: false,
    budgets_vectors: false,
    dev_config_version: 2,
    eq_scope: EqScope::Device,
    eq_vector: EqVector::FirstFree,
    rings_empty_eq: true,
    wq_obj_request: Shape { version: 1, len: 88 },
    wq_obj_response: Shape { version: 1, len: 48 },
    vport_rx_request: Shape { version: 2, len: 120 },
    vport_rx_response: Shape { version: 1, len: 32 },
    hash_types: 0,
    rx_entries: 512,
    rx_cq_bytes: 65536,
    default_queues: 64,
    rejects_zero_queues: false,
    gives_up_after_timeout: false,
    knows_unsupported: false,
    scattered_rings: false,
};

/// Linux 6.12 as Debian ships it.
pub const V6_12: Generation = Generation {
    name: "6.12",
    release: (6, 12),
    eq_vector: EqVector::RoundRobin,
    rings_empty_eq: false,
    rx_cq_bytes: 32768,
    ..V6_1
};

/// Linux 6.17: the first that grows its vectors.
pub const V6_17: Generation = Generation {
    name: "6.17",
    release: (6, 17),
    capabilities: 0x2_682d,
    vectors: Vectors::OneThenGrow,
    limits_vectors_to_table: false,
    ..V6_12
};

/// Linux 7.3.
pub const V7_3: Generation = Generation {
    name: "7.3",
    release: (7, 3),
    capabilities: 0x527e_686d,
    validates_registers: true,
    vectors: Vectors::OneThenGrow,
    limits_vectors_to_table: true,
    lists_first: true,
    budgets_vectors: true,
    dev_config_version: 3,
    eq_scope: EqScope::Port,
    eq_vector: EqVector::FirstFreeOrShared,
    rings_empty_eq: false,
    wq_obj_request: Shape { version: 3, len: 96 },
    wq_obj_response: Shape { version: 2, len: 56 },
    vport_rx_request: Shape { version: 5, len: 120 },
    vport_rx_response: Shape { version: 2, len: 40 },
    hash_types: 0x3f,
    rx_entries: 1024,
    rx_cq_bytes: 131_072,
    default_queues: 16,
    rejects_zero_queues: true,
    gives_up_after_timeout: true,
    knows_unsupported: true,
    scattered_rings: true,
};

impl Generation {
    /// Every generation, oldest first.
    pub const ALL: [&'static Generation; 4] = [&V6_1, &V6_12, &V6_17, &V7_3];
}

/// Most queues of a port, whatever the machine (`MANA_MAX_NUM_QUEUES`).
const MAX_QUEUES: u32 = 64;

impl Generation {
    /// Vectors to take before the hardware channel.
    pub fn first_vectors(&self, cpus: u32, table: u32) -> u32 {
        match self.vectors {
            Vectors::Static => (cpus.min(MAX_QUEUES) + 1).min(table),
            Vectors::OneThenGrow => 1,
        }
    }

    /// Vectors in use, once the device has said its `max_msix`; `allocated` were taken before.
    pub fn usable_vectors(&self, cpus: u32, table: u32, allocated: u32, max_msix: u32) -> u32 {
        match self.vectors {
            Vectors::Static => allocated.min(max_msix),
            Vectors::OneThenGrow if self.limits_vectors_to_table => max_msix.min(cpus + 1).min(table),
            Vectors::OneThenGrow => max_msix.min(cpus + 1),
        }
    }

    /// Queue pairs that a port may have and whether ports share vectors, on a device with `ports` ports.
    pub fn queue_budget(&self, max_queues: u32, usable: u32, ports: u32) -> (u32, bool) {
        if self.eq_scope == EqScope::Device {
            return (max_queues, false);
        }
        let share = (usable - 1) / ports;
        let rounded = if share == 0 { 1 } else { 1 << share.ilog2() };
        let queues = rounded.max(16).min(max_queues);
        if queues * ports > usable - 1 { (max_queues.min(usable - 1), true) } else { (queues, false) }
    }
}
