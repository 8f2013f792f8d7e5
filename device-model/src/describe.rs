//! The fields of requests and responses that matter to a reader of a trace, under the driver's names.

use zerocopy::little_endian::{U16, U32, U64};

use crate::observe::Fields;
use crate::wire::{gdma, mana};

/// Names its fields.
pub trait Describe {
    /// The fields that matter.
    fn fields(&self) -> Fields;
}

/// A field's value as a number.
trait Number {
    fn number(self) -> u64;
}
macro_rules! numbers {
    ($($ty:ty),*) => { $(impl Number for $ty {
        fn number(self) -> u64 {
            self.get().into()
        }
    })* };
}
numbers!(U16, U32, U64);
impl Number for u8 {
    fn number(self) -> u64 {
        self.into()
    }
}

macro_rules! describe {
    ($($ty:ty { $($field:ident),* })+) => {
        $(impl Describe for $ty {
            fn fields(&self) -> Fields {
                Fields(vec![$((stringify!($field), self.$field.number()),)*])
            }
        })+
    };
}

describe! {
    gdma::Empty {}
    gdma::VerifyVersion {
        protocol_ver_min, protocol_ver_max, drv_cap_flags1, os_type, os_ver_major, os_ver_minor, os_ver_build
    }
    gdma::VerifyVersionReply { gdma_protocol_ver, pf_cap_flags1 }
    gdma::MaxResources { max_sq, max_rq, max_cq, max_eq, max_db, max_mst, max_msix }
    gdma::DeviceList { num_of_devs }
    gdma::RegisterDeviceReply { pdid, gpa_mkey, db_id }
    gdma::GenerateTestEqe { queue_index }
    gdma::QueryHwcTimeout { timeout_ms }
    gdma::CreateQueue { kind, pdid, doorbell_id, gdma_region, queue_size, log2_throttle_limit, eq_pci_msix_index }
    gdma::CreateQueueReply { queue_index }
    gdma::DisableQueue { kind, queue_index }
    gdma::CreateDmaRegion { length, offset_in_page, gdma_page_type, page_count, page_addr_list_len }
    gdma::CreateDmaRegionReply { dma_region_handle }
    gdma::AddPages { dma_region_handle, page_addr_list_len }
    gdma::HandleOnly { handle }
    gdma::AllocateResourceRange { resource_type, num_resources, alignment }
    gdma::AllocateResourceRangeReply { allocated_resources }
    gdma::DestroyResourceRange { resource_type, num_resources, allocated_resources }
    gdma::CreatePd { flags }
    gdma::CreatePdReply { pd_handle, pd_id }
    mana::QueryDevConfig { proto_major_ver, proto_minor_ver, proto_micro_ver }
    mana::QueryDevConfigReply { max_num_vports, bm_hostmode, max_num_eqs, adapter_mtu }
    mana::QueryVportConfig { vport_index }
    mana::QueryVportConfigReply { max_num_sq, max_num_rq, num_indirection_ent, vport }
    mana::ConfigVportTx { vport, pdid, doorbell_pageid }
    mana::ConfigVportTxReply { tx_vport_offset, short_form_allowed }
    mana::CreateWqObj {
        vport, wq_type, wq_gdma_region, cq_gdma_region, wq_size, cq_size, cq_parent_qid, req_cq_moderation,
        cq_moderation_comp, cq_moderation_usec
    }
    mana::CreateWqObjReply {
        wq_id, cq_id, wq_obj, cq_moderation_comp, cq_moderation_usec, cq_moderation_enabled
    }
    mana::DestroyWqObj { wq_type, wq_obj }
    mana::FenceRq { wq_obj }
    mana::ConfigVportRx {
        vport, num_indir_entries, indir_tab_offset, rx_enable, rss_enable, update_default_rxobj, update_hashkey,
        update_indir_tab, default_rxobj, cqe_coalescing_enable, rss_hash_types, cqe8_coalescing_enable
    }
    mana::ConfigVportRxReply { cqe_coalescing_timeout_ns }
    mana::QueryGfStat { req_stats }
    mana::GfStat { reported_stats, rx_discards_nowqe, rx_bytes, tx_bytes }
    mana::QueryLinkConfig { vport }
    mana::QueryLinkConfigReply { qos_speed_mbps, qos_unconfigured, link_speed_mbps }
    mana::SetBwClamp { vport, enable_clamping, link_speed_mbps }
    mana::SetBwClampReply { qos_unconfigured }
    mana::QueryPhyStat { req_stats }
    mana::PhyStat { reported_stats }
}
