//! What the host lets this function have: the limits, addresses and identities that the driver asks for.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

/// Most queue pairs of a vPort (`MANA_MAX_NUM_QUEUES`, mana.h).
pub const MAX_QUEUES_PER_VPORT: u16 = 64;
/// Most vPorts of a device (`MAX_PORTS_IN_MANA_DEV`, mana.h).
pub const MAX_VPORTS: usize = 256;
/// Legal MSI-X table sizes (PCIe base specification, 7.7.2.2).
pub const MSIX_TABLE_SIZES: RangeInclusive<u16> = 1..=2048;

/// Where the MSI-X table or its pending-bit array lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BarLocation {
    /// BAR number; only even ones exist, since every BAR is 64-bit.
    pub bar: u8,
    /// Bytes from the BAR's start, a multiple of 8.
    pub offset: u32,
}

/// One vPort: a MAC address and its queue limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VportConfig {
    /// MAC address in transmission order.
    pub mac: [u8; 6],
    /// `max_num_sq` and `max_num_rq` of MANA_QUERY_VPORT_CONFIG, 1 to 64.
    pub max_queues: u16,
}

/// The whole device, as the host configured it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceConfig {
    /// vPorts in index order, at least one.
    pub vports: Vec<VportConfig>,
    /// `max_msix` of GDMA_QUERY_MAX_RESOURCES.
    pub max_msix: u32,
    /// Entries of the MSI-X table.
    pub msix_table_size: u16,
    /// Where the MSI-X table is.
    pub msix_table: BarLocation,
    /// Where the pending-bit array is.
    pub msix_pba: BarLocation,
    /// Largest IP packet, bytes (`adapter_mtu` is this plus 14).
    pub mtu: u16,
    /// List the RDMA function (GDMA device type 3) in GDMA_LIST_DEVICES.
    pub rdma: bool,
    /// Doorbell pages in BAR0; the first is the hardware channel's.
    pub doorbell_pages: u16,
}

impl Default for DeviceConfig {
    fn default() -> Self {
        Self {
            vports: vec![VportConfig { mac: [0x52, 0x54, 0x00, 0x12, 0x34, 0x56], max_queues: 64 }],
            max_msix: 64,
            msix_table_size: 64,
            msix_table: BarLocation { bar: 4, offset: 0 },
            msix_pba: BarLocation { bar: 4, offset: 0x8000 },
            mtu: 1500,
            rdma: false,
            doorbell_pages: 128,
        }
    }
}
