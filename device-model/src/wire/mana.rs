//! Bodies of the MANA_* requests and responses: what follows the header.
//!
//! Source: the `struct mana_*_req` and `struct mana_*_resp` of mana.h; the sheet's section 7.

use zerocopy::little_endian::{U16, U32, U64};

use super::hwc::{RequestHeader, ResponseHeader};

/// "No object" and "no such handle" (`INVALID_MANA_HANDLE`).
pub const INVALID_HANDLE: u64 = u64::MAX;

/// `pf_cap_flags1` of MANA_QUERY_DEV_CONFIG: eight packets fit into a receive completion.
pub const PF_CAP_COALESCES_8: u64 = 1 << 5;

/// A switch that can be left as it is (`enum TRI_STATE`): 0 off, 1 on, all ones leave.
pub fn tri_state(value: U32) -> Option<Option<bool>> {
    match value.get() {
        0 => Some(Some(false)),
        1 => Some(Some(true)),
        u32::MAX => Some(None),
        _ => None,
    }
}

wire! {
    /// MANA_QUERY_DEV_CONFIG.
    pub struct QueryDevConfig {
        /// `mn_drv_cap_flags1` to `mn_drv_cap_flags4`.
        drv_cap_flags: [U64; 4],
        /// Protocol version.
        proto_major_ver: U32,
        /// Protocol version.
        proto_minor_ver: U32,
        /// Protocol version.
        proto_micro_ver: U32,
        /// Reserved.
        reserved: U32,
    }
    /// Its response.
    pub struct QueryDevConfigReply {
        /// What the card can do, see [`PF_CAP_COALESCES_8`].
        pf_cap_flags1: U64,
        /// `pf_cap_flags2` to `pf_cap_flags4`.
        pf_cap_flags: [U64; 3],
        /// vPorts.
        max_num_vports: U16,
        /// Version 3: bare-metal host mode.
        bm_hostmode: u8,
        /// Reserved.
        reserved: u8,
        /// Event queues.
        max_num_eqs: U32,
        /// Version 2: largest frame, Ethernet header included.
        adapter_mtu: U16,
        /// Reserved.
        reserved2: U16,
        /// Reserved.
        reserved3: U32,
    }

    /// MANA_QUERY_VPORT_CONFIG.
    pub struct QueryVportConfig {
        /// Index of the vPort.
        vport_index: U32,
    }
    /// Its response.
    pub struct QueryVportConfigReply {
        /// Send queues of the vPort.
        max_num_sq: U32,
        /// Receive queues of the vPort.
        max_num_rq: U32,
        /// Entries of its indirection table.
        num_indirection_ent: U32,
        /// Reserved.
        reserved1: U32,
        /// MAC address, in transmission order.
        mac_addr: [u8; 6],
        /// Reserved.
        reserved2: [u8; 2],
        /// Handle of the vPort.
        vport: U64,
    }

    /// MANA_CONFIG_VPORT_TX.
    pub struct ConfigVportTx {
        /// The vPort.
        vport: U64,
        /// Protection domain of its queues.
        pdid: U32,
        /// Doorbell page of its queues.
        doorbell_pageid: U32,
    }
    /// Its response.
    pub struct ConfigVportTxReply {
        /// What transmit OOBs must carry.
        tx_vport_offset: U16,
        /// Short transmit OOBs are understood.
        short_form_allowed: u8,
        /// Reserved.
        reserved: u8,
    }

    /// MANA_CREATE_WQ_OBJ. Version 1 ends before `allow_rqwqe_chain`.
    pub struct CreateWqObj {
        /// The vPort.
        vport: U64,
        /// 1 send, 2 receive.
        wq_type: U32,
        /// Reserved.
        reserved: U32,
        /// Region of the work queue; the object takes it over.
        wq_gdma_region: U64,
        /// Region of the completion queue; the object takes it over.
        cq_gdma_region: U64,
        /// Bytes of the work queue.
        wq_size: U32,
        /// Bytes of the completion queue.
        cq_size: U32,
        /// 0.
        cq_moderation_ctx_id: U32,
        /// Event queue that the completion queue notifies.
        cq_parent_qid: U32,
        /// Version 2.
        allow_rqwqe_chain: u8,
        /// Version 3: moderation is wanted.
        req_cq_moderation: u8,
        /// Version 3: completions to gather.
        cq_moderation_comp: U16,
        /// Version 3: microseconds to wait.
        cq_moderation_usec: U16,
        /// Reserved.
        reserved2: U16,
    }
    /// Its response. Version 1 ends before the moderation.
    pub struct CreateWqObjReply {
        /// Id of the work queue.
        wq_id: U32,
        /// Id of the completion queue.
        cq_id: U32,
        /// Handle of both.
        wq_obj: U64,
        /// Version 2: completions that are gathered.
        cq_moderation_comp: U16,
        /// Version 2: microseconds that are waited.
        cq_moderation_usec: U16,
        /// Version 2: moderation is on.
        cq_moderation_enabled: u8,
        /// Reserved.
        reserved: [u8; 3],
    }

    /// MANA_DESTROY_WQ_OBJ.
    pub struct DestroyWqObj {
        /// 1 send, 2 receive.
        wq_type: U32,
        /// Reserved.
        reserved: U32,
        /// Handle of the object.
        wq_obj: U64,
    }

    /// MANA_FENCE_RQ.
    pub struct FenceRq {
        /// Handle of the receive object.
        wq_obj: U64,
    }

    /// MANA_CONFIG_VPORT_RX. Version 1 ends before `cqe_coalescing_enable`.
    pub struct ConfigVportRx {
        /// The vPort.
        vport: U64,
        /// Entries of the indirection table.
        num_indir_entries: U16,
        /// Where the table is, bytes from the message's start.
        indir_tab_offset: U16,
        /// Tri-state: deliver.
        rx_enable: U32,
        /// Tri-state: spread over queues.
        rss_enable: U32,
        /// `default_rxobj` counts.
        update_default_rxobj: u8,
        /// `hashkey` counts.
        update_hashkey: u8,
        /// The table counts.
        update_indir_tab: u8,
        /// Reserved.
        reserved: u8,
        /// Handle of the object for what is not hashed.
        default_rxobj: U64,
        /// Toeplitz key.
        hashkey: [u8; 40],
        /// Version 2: up to four packets in a completion.
        cqe_coalescing_enable: u8,
        /// Reserved.
        reserved2: [u8; 3],
        /// Version 3: what to hash.
        rss_hash_types: U16,
        /// Version 5: up to eight packets in a completion.
        cqe8_coalescing_enable: u8,
        /// Reserved.
        reserved3: u8,
    }
    /// Its response in version 2.
    pub struct ConfigVportRxReply {
        /// How long packets are gathered, nanoseconds.
        cqe_coalescing_timeout_ns: U32,
        /// Reserved.
        reserved: U32,
    }

    /// MANA_QUERY_GF_STAT.
    pub struct QueryGfStat {
        /// Counters that are wanted.
        req_stats: U64,
    }
    /// Its response, in the order of Linux (broadcast before multicast).
    pub struct GfStat {
        /// Counters that are reported.
        reported_stats: U64,
        /// No receive WQE.
        rx_discards_nowqe: U64,
        /// vPort disabled.
        rx_err_vport_disabled: U64,
        /// Bytes received.
        rx_bytes: U64,
        /// Unicast frames received.
        rx_ucast_pkts: U64,
        /// Unicast bytes received.
        rx_ucast_bytes: U64,
        /// Broadcast frames received.
        rx_bcast_pkts: U64,
        /// Broadcast bytes received.
        rx_bcast_bytes: U64,
        /// Multicast frames received.
        rx_mcast_pkts: U64,
        /// Multicast bytes received.
        rx_mcast_bytes: U64,
        /// Transmission disabled for the function.
        tx_err_gf_disabled: U64,
        /// Transmission disabled for the vPort.
        tx_err_vport_disabled: U64,
        /// Wrong vPort offset.
        tx_err_inval_vport_offset: U64,
        /// VLAN rules.
        tx_err_vlan_enforcement: U64,
        /// Ethertype rules.
        tx_err_ethtype_enforcement: U64,
        /// Source address rules.
        tx_err_sa_enforcement: U64,
        /// Protection domain of the send queue.
        tx_err_sqpdid_enforcement: U64,
        /// Protection domain of the completion queue.
        tx_err_cqpdid_enforcement: U64,
        /// Longer than the MTU.
        tx_err_mtu_violation: U64,
        /// Senseless OOB.
        tx_err_inval_oob: U64,
        /// Bytes sent.
        tx_bytes: U64,
        /// Unicast frames sent.
        tx_ucast_pkts: U64,
        /// Unicast bytes sent.
        tx_ucast_bytes: U64,
        /// Broadcast frames sent.
        tx_bcast_pkts: U64,
        /// Broadcast bytes sent.
        tx_bcast_bytes: U64,
        /// Multicast frames sent.
        tx_mcast_pkts: U64,
        /// Multicast bytes sent.
        tx_mcast_bytes: U64,
        /// Errors below the Ethernet layer.
        tx_err_gdma: U64,
    }

    /// MANA_QUERY_LINK_CONFIG.
    pub struct QueryLinkConfig {
        /// The vPort.
        vport: U64,
    }
    /// Its response.
    pub struct QueryLinkConfigReply {
        /// Shaped speed, Mbit/s.
        qos_speed_mbps: U32,
        /// There is no shaping.
        qos_unconfigured: u8,
        /// Reserved.
        reserved1: [u8; 3],
        /// Speed of the link, Mbit/s.
        link_speed_mbps: U32,
        /// Reserved.
        reserved2: [u8; 4],
    }

    /// MANA_SET_BW_CLAMP.
    pub struct SetBwClamp {
        /// The vPort.
        vport: U64,
        /// Tri-state.
        enable_clamping: U32,
        /// Shaped speed, Mbit/s.
        link_speed_mbps: U32,
    }
    /// Its response.
    pub struct SetBwClampReply {
        /// There is no shaping.
        qos_unconfigured: u8,
        /// Reserved.
        reserved: [u8; 7],
    }

    /// MANA_QUERY_PHY_STAT.
    pub struct QueryPhyStat {
        /// Counters that are wanted.
        req_stats: U64,
    }
    /// Its response.
    pub struct PhyStat {
        /// Counters that are reported.
        reported_stats: U64,
        /// Frames dropped on the way in.
        rx_pkt_drop_phy: U64,
        /// Frames dropped on the way out.
        tx_pkt_drop_phy: U64,
        /// Frames in and out of each traffic class.
        packets: [[U64; 2]; 8],
        /// Bytes in and out of each traffic class.
        bytes: [[U64; 2]; 8],
        /// Pauses in and out of each traffic class.
        pauses: [[U64; 2]; 8],
    }
}

layout!(RequestHeader, QueryDevConfig = 88 { proto_major_ver: 72 });
layout!(ResponseHeader, QueryDevConfigReply = 80 { max_num_vports: 64, bm_hostmode: 66, max_num_eqs: 68, adapter_mtu: 72 });
layout!(RequestHeader, QueryVportConfig = 44 {});
layout!(ResponseHeader, QueryVportConfigReply = 64 { num_indirection_ent: 40, mac_addr: 48, vport: 56 });
layout!(RequestHeader, ConfigVportTx = 56 { pdid: 48, doorbell_pageid: 52 });
layout!(ResponseHeader, ConfigVportTxReply = 36 { short_form_allowed: 34 });
layout!(RequestHeader, CreateWqObj = 96 { wq_gdma_region: 56, wq_size: 72, cq_parent_qid: 84, allow_rqwqe_chain: 88 });
layout!(ResponseHeader, CreateWqObjReply = 56 { cq_id: 36, wq_obj: 40, cq_moderation_comp: 48 });
layout!(RequestHeader, DestroyWqObj = 56 { wq_obj: 48 });
layout!(RequestHeader, FenceRq = 48 {});
layout!(RequestHeader, ConfigVportRx = 120 {
    indir_tab_offset: 50, rx_enable: 52, update_default_rxobj: 60, default_rxobj: 64, hashkey: 72,
    cqe_coalescing_enable: 112, rss_hash_types: 116, cqe8_coalescing_enable: 118,
});
layout!(ResponseHeader, ConfigVportRxReply = 40 {});
layout!(RequestHeader, QueryGfStat = 48 {});
layout!(ResponseHeader, GfStat = 256 { rx_bcast_pkts: 80, rx_mcast_pkts: 96, tx_err_mtu_violation: 176, tx_bytes: 192, tx_err_gdma: 248 });
layout!(RequestHeader, QueryLinkConfig = 48 {});
layout!(ResponseHeader, QueryLinkConfigReply = 48 { link_speed_mbps: 40 });
layout!(RequestHeader, SetBwClamp = 56 { enable_clamping: 48 });
layout!(ResponseHeader, SetBwClampReply = 40 {});
layout!(RequestHeader, QueryPhyStat = 48 {});
layout!(ResponseHeader, PhyStat = 440 { packets: 56, bytes: 184, pauses: 312 });
