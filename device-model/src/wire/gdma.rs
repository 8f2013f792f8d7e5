//! Bodies of the GDMA_* requests and responses: what follows the header.
//!
//! Source: the `struct gdma_*_req` and `struct gdma_*_resp` of gdma.h; the sheet's sections 6.5 to 6.8.

use zerocopy::little_endian::{U32, U64};

use super::hwc::{DeviceId, RequestHeader, ResponseHeader};

/// Device types (`GDMA_DEVICE_*`).
pub mod device {
    /// The hardware channel itself.
    pub const HWC: u16 = 1;
    /// Ethernet.
    pub const MANA: u16 = 2;
    /// RDMA.
    pub const MANA_IB: u16 = 3;
}

/// Queue types (`enum gdma_queue_type`).
pub mod queue_type {
    /// Send queue.
    pub const SQ: u32 = 1;
    /// Receive queue.
    pub const RQ: u32 = 2;
    /// Completion queue.
    pub const CQ: u32 = 3;
    /// Event queue.
    pub const EQ: u32 = 4;
}

/// Bits of `gd_drv_cap_flags1` and `pf_cap_flags1`.
pub mod capability {
    /// The driver can moderate interrupts (`GDMA_DRV_CAP_FLAG_1_DYN_INTERRUPT_MODERATION`).
    pub const DRIVER_MODERATION: u64 = 1 << 28;
    /// The card can moderate interrupts (`GDMA_PF_CAP_FLAG_1_DYN_INTERRUPT_MODERATION`).
    pub const MODERATION: u64 = 1 << 15;
}

/// Resource types of GDMA_ALLOCATE_RESOURCE_RANGE (`GDMA_RESOURCE_DOORBELL_PAGE`).
pub const RESOURCE_DOORBELL_PAGE: u32 = 27;
/// Entries of the device list (`GDMA_MAX_NUM_DEVICES` less the reserved ones: the response holds 64).
pub const DEVICE_LIST: usize = 64;

wire! {
    /// A request without a body.
    pub struct Empty {}

    /// GDMA_VERIFY_VF_DRIVER_VERSION.
    pub struct VerifyVersion {
        /// Lowest protocol version the driver speaks.
        protocol_ver_min: U64,
        /// Highest protocol version the driver speaks.
        protocol_ver_max: U64,
        /// `gd_drv_cap_flags1`.
        drv_cap_flags1: U64,
        /// `gd_drv_cap_flags2`.
        drv_cap_flags2: U64,
        /// `gd_drv_cap_flags3`.
        drv_cap_flags3: U64,
        /// `gd_drv_cap_flags4`.
        drv_cap_flags4: U64,
        /// Driver version.
        drv_ver: U64,
        /// 0x10 Linux, 0x20 Windows.
        os_type: U32,
        /// Reserved.
        reserved: U32,
        /// Kernel version.
        os_ver_major: U32,
        /// Kernel patch level.
        os_ver_minor: U32,
        /// Kernel sublevel.
        os_ver_build: U32,
        /// Reserved for the platform.
        os_ver_platform: U32,
        /// Reserved.
        reserved2: U64,
        /// System name, release, version, and an empty string, 128 bytes each.
        os_ver_str: [[u8; 128]; 4],
    }
    /// Its response.
    pub struct VerifyVersionReply {
        /// Protocol version chosen.
        gdma_protocol_ver: U64,
        /// What the card can do, see [`capability`].
        pf_cap_flags1: U64,
        /// `pf_cap_flags2` to `pf_cap_flags4`.
        pf_cap_flags: [U64; 3],
    }

    /// Response to GDMA_QUERY_MAX_RESOURCES.
    pub struct MaxResources {
        /// Not used.
        status: U32,
        /// Send queues.
        max_sq: U32,
        /// Receive queues.
        max_rq: U32,
        /// Completion queues.
        max_cq: U32,
        /// Event queues.
        max_eq: U32,
        /// Doorbell pages.
        max_db: U32,
        /// Memory regions.
        max_mst: U32,
        /// Completion moderation contexts.
        max_cq_mod_ctx: U32,
        /// Moderated completion queues.
        max_mod_cq: U32,
        /// MSI-X vectors.
        max_msix: U32,
    }

    /// Response to GDMA_LIST_DEVICES.
    pub struct DeviceList {
        /// Entries in use.
        num_of_devs: U32,
        /// Reserved.
        reserved: U32,
        /// The devices.
        devs: [DeviceId; DEVICE_LIST],
    }

    /// Response to GDMA_REGISTER_DEVICE.
    pub struct RegisterDeviceReply {
        /// Protection domain.
        pdid: U32,
        /// Memory key for bus addresses.
        gpa_mkey: U32,
        /// Doorbell page.
        db_id: U32,
    }

    /// GDMA_GENERATE_TEST_EQE.
    pub struct GenerateTestEqe {
        /// Event queue.
        queue_index: U32,
    }

    /// GDMA_QUERY_HWC_TIMEOUT.
    pub struct QueryHwcTimeout {
        /// Present time-out, milliseconds.
        timeout_ms: U32,
        /// Reserved.
        reserved: U32,
    }

    /// GDMA_CREATE_QUEUE.
    pub struct CreateQueue {
        /// [`queue_type`].
        kind: U32,
        /// Reserved.
        reserved1: U32,
        /// Protection domain.
        pdid: U32,
        /// Doorbell page.
        doorbell_id: U32,
        /// Region of the ring; the queue takes it over.
        gdma_region: U64,
        /// Reserved.
        reserved2: U32,
        /// Bytes of the ring.
        queue_size: U32,
        /// Event queues: throttling.
        log2_throttle_limit: U32,
        /// Event queues: MSI-X vector.
        eq_pci_msix_index: U32,
        /// Completion queues: moderation context.
        cq_mod_ctx_id: U32,
        /// Completion queues: event queue.
        cq_parent_eq_id: U32,
        /// Receive queues: flags.
        rq_flags: [u8; 3],
        /// Send queues: doorbell by hardware.
        sq_hw_db: u8,
        /// Reserved.
        reserved3: U32,
    }
    /// Its response.
    pub struct CreateQueueReply {
        /// Id of the queue.
        queue_index: U32,
    }

    /// GDMA_DISABLE_QUEUE.
    pub struct DisableQueue {
        /// [`queue_type`].
        kind: U32,
        /// Id of the queue.
        queue_index: U32,
        /// 1.
        alloc_res_id_on_creation: U32,
    }

    /// GDMA_CREATE_DMA_REGION, page addresses following.
    pub struct CreateDmaRegion {
        /// Bytes.
        length: U64,
        /// Bytes from the first page's start.
        offset_in_page: U32,
        /// Log2 of the page size less 12.
        gdma_page_type: U32,
        /// Pages in all.
        page_count: U32,
        /// Pages in this message.
        page_addr_list_len: U32,
    }
    /// Its response.
    pub struct CreateDmaRegionReply {
        /// Handle of the region.
        dma_region_handle: U64,
    }

    /// GDMA_DMA_REGION_ADD_PAGES, page addresses following.
    pub struct AddPages {
        /// Handle of the region.
        dma_region_handle: U64,
        /// Pages in this message.
        page_addr_list_len: U32,
        /// Reserved.
        reserved: U32,
    }

    /// GDMA_DESTROY_DMA_REGION, GDMA_DESTROY_PD, GDMA_DESTROY_MR: one handle.
    pub struct HandleOnly {
        /// The object.
        handle: U64,
    }

    /// GDMA_ALLOCATE_RESOURCE_RANGE.
    pub struct AllocateResourceRange {
        /// [`RESOURCE_DOORBELL_PAGE`] or another type.
        resource_type: U32,
        /// How many.
        num_resources: U32,
        /// The first's alignment.
        alignment: U32,
        /// Where to start looking.
        allocated_resources: U32,
    }
    /// Its response.
    pub struct AllocateResourceRangeReply {
        /// The first.
        allocated_resources: U32,
    }

    /// GDMA_DESTROY_RESOURCE_RANGE.
    pub struct DestroyResourceRange {
        /// As allocated.
        resource_type: U32,
        /// As allocated.
        num_resources: U32,
        /// The first.
        allocated_resources: U32,
    }

    /// GDMA_CREATE_PD.
    pub struct CreatePd {
        /// Flags.
        flags: U32,
        /// Reserved.
        reserved: U32,
    }
    /// Its response.
    pub struct CreatePdReply {
        /// Handle of the protection domain.
        pd_handle: U64,
        /// Its id.
        pd_id: U32,
        /// Reserved.
        reserved: U32,
    }

    /// GDMA_CREATE_MR.
    pub struct CreateMr {
        /// Protection domain.
        pd_handle: U64,
        /// `GDMA_MR_TYPE_*`.
        mr_type: U32,
        /// Reserved.
        reserved1: U32,
        /// GVA and ZBVA: the region.
        region: U64,
        /// GVA: the first byte's address; ZBVA: access flags.
        virtual_address: U64,
        /// GVA: access flags.
        access_flags: U32,
        /// Reserved.
        reserved2: U32,
        /// Device memory: bytes.
        length: U64,
    }
    /// Its response.
    pub struct CreateMrReply {
        /// Handle of the memory region.
        mr_handle: U64,
        /// Local key.
        lkey: U32,
        /// Remote key.
        rkey: U32,
    }
}

layout!(RequestHeader, VerifyVersion = 640 { drv_cap_flags1: 56, os_type: 96, os_ver_major: 104, os_ver_str: 128 });
layout!(ResponseHeader, VerifyVersionReply = 72 { pf_cap_flags1: 40 });
layout!(ResponseHeader, MaxResources = 72 { max_sq: 36, max_eq: 48, max_mst: 56, max_msix: 68 });
layout!(ResponseHeader, DeviceList = 296 { devs: 40 });
layout!(ResponseHeader, RegisterDeviceReply = 44 { gpa_mkey: 36, db_id: 40 });
layout!(RequestHeader, GenerateTestEqe = 44 { queue_index: 40 });
layout!(RequestHeader, QueryHwcTimeout = 48 {});
layout!(ResponseHeader, QueryHwcTimeout = 40 { timeout_ms: 32 });
layout!(RequestHeader, CreateQueue = 96 {
    pdid: 48, doorbell_id: 52, gdma_region: 56, queue_size: 68, eq_pci_msix_index: 76, cq_parent_eq_id: 84,
});
layout!(ResponseHeader, CreateQueueReply = 36 {});
layout!(RequestHeader, DisableQueue = 52 { queue_index: 44 });
layout!(RequestHeader, CreateDmaRegion = 64 { offset_in_page: 48, gdma_page_type: 52, page_count: 56, page_addr_list_len: 60 });
layout!(ResponseHeader, CreateDmaRegionReply = 40 {});
layout!(RequestHeader, AddPages = 56 { page_addr_list_len: 48 });
layout!(RequestHeader, HandleOnly = 48 {});
layout!(RequestHeader, AllocateResourceRange = 56 { num_resources: 44, alignment: 48, allocated_resources: 52 });
layout!(ResponseHeader, AllocateResourceRangeReply = 36 {});
layout!(RequestHeader, DestroyResourceRange = 52 { allocated_resources: 48 });
layout!(RequestHeader, CreatePd = 48 {});
layout!(ResponseHeader, CreatePdReply = 48 { pd_id: 40 });
layout!(RequestHeader, CreateMr = 88 { mr_type: 48, region: 56, virtual_address: 64, access_flags: 72, length: 80 });
layout!(ResponseHeader, CreateMrReply = 48 { lkey: 40, rkey: 44 });
