//! Statistics and the link.

use zerocopy::little_endian::{U32, U64};

use super::{for_mana, for_registered_mana, vport};
use crate::card::Card;
use crate::command::{CommandResult, Context, Message, Reply};
use crate::counters::{Counter, VportCounters};
use crate::status::CommandError;
use crate::wire::mana::{
    GfStat, PhyStat, QueryGfStat, QueryLinkConfig, QueryLinkConfigReply, QueryPhyStat, SetBwClamp,
    SetBwClampReply, tri_state,
};

/// All counters of MANA_QUERY_GF_STAT (`STATISTICS_FLAGS_*`, bits 0 to 26).
const ALL_STATS: u64 = (1 << 27) - 1;
/// Bandwidth clamps are multiples of this, Mbit/s.
pub const CLAMP_STEP_MBPS: u32 = 100;

/// A counter's sum over all vPorts.
fn sum(card: &Card, counter: fn(&VportCounters) -> &Counter) -> U64 {
    U64::new(card.vports.iter().fold(0, |sum, vport| sum.wrapping_add(counter(&vport.counters).get())))
}

/// MANA_QUERY_GF_STAT: the traffic of the function since it was made, of all vPorts together; the request names none.
/// Counters that are not asked for are 0.
pub fn query_gf_stat(context: &mut Context<'_>, message: &Message<'_, QueryGfStat>) -> CommandResult {
    for_mana(message)?;
    let asked = message.body.req_stats.get();
    let count = |bit: u32, counter| match asked >> bit & 1 {
        0 => U64::ZERO,
        _ => sum(context.card, counter),
    };
    let stat = GfStat {
        reported_stats: U64::new(asked & ALL_STATS),
        rx_discards_nowqe: count(0, |counters| &counters.rx_discards_nowqe),
        rx_err_vport_disabled: count(1, |counters| &counters.rx_err_vport_disabled),
        rx_bytes: count(2, |counters| &counters.rx_bytes),
        rx_ucast_pkts: count(3, |counters| &counters.rx_ucast_pkts),
        rx_ucast_bytes: count(4, |counters| &counters.rx_ucast_bytes),
        rx_mcast_pkts: count(5, |counters| &counters.rx_mcast_pkts),
        rx_mcast_bytes: count(6, |counters| &counters.rx_mcast_bytes),
        rx_bcast_pkts: count(7, |counters| &counters.rx_bcast_pkts),
        rx_bcast_bytes: count(8, |counters| &counters.rx_bcast_bytes),
        tx_err_gf_disabled: count(9, |counters| &counters.tx_err_gf_disabled),
        tx_err_vport_disabled: count(10, |counters| &counters.tx_err_vport_disabled),
        tx_err_inval_vport_offset: count(11, |counters| &counters.tx_err_inval_vport_offset),
        tx_err_vlan_enforcement: count(12, |counters| &counters.tx_err_vlan_enforcement),
        tx_err_ethtype_enforcement: count(13, |counters| &counters.tx_err_ethtype_enforcement),
        tx_err_sa_enforcement: count(14, |counters| &counters.tx_err_sa_enforcement),
        // Protection domains are checked when a queue is made.
        tx_err_sqpdid_enforcement: U64::ZERO,
        tx_err_cqpdid_enforcement: U64::ZERO,
        tx_err_mtu_violation: count(17, |counters| &counters.tx_err_mtu_violation),
        tx_err_inval_oob: count(18, |counters| &counters.tx_err_inval_oob),
        tx_bytes: count(19, |counters| &counters.tx_bytes),
        tx_ucast_pkts: count(20, |counters| &counters.tx_ucast_pkts),
        tx_ucast_bytes: count(21, |counters| &counters.tx_ucast_bytes),
        tx_mcast_pkts: count(22, |counters| &counters.tx_mcast_pkts),
        tx_mcast_bytes: count(23, |counters| &counters.tx_mcast_bytes),
        tx_bcast_pkts: count(24, |counters| &counters.tx_bcast_pkts),
        tx_bcast_bytes: count(25, |counters| &counters.tx_bcast_bytes),
        tx_err_gdma: count(26, |counters| &counters.tx_err_gdma),
    };
    Ok(Reply::new(&stat).in_version(2))
}

/// MANA_QUERY_LINK_CONFIG: the speed that a clamp leaves, and the most that can be had (`mana_query_link_cfg`).
pub fn query_link_config(context: &mut Context<'_>, message: &Message<'_, QueryLinkConfig>) -> CommandResult {
    for_mana(message)?;
    let index = vport::index_of(context.card, context.offer, message.body.vport.get())?;
    let most = context.card.config.link_speed_mbps;
    let clamp = context.card.vports.get(index).and_then(|vport| vport.shaper.mbps());
    let link = QueryLinkConfigReply {
        qos_speed_mbps: U32::new(most),
        link_speed_mbps: U32::new(clamp.unwrap_or(most)),
        ..QueryLinkConfigReply::default()
    };
    Ok(Reply::new(&link).in_version(2))
}

/// MANA_SET_BW_CLAMP: the vPort sends no faster than that from now on (`mana_set_bw_clamp`).
pub fn set_bw_clamp(context: &mut Context<'_>, message: &Message<'_, SetBwClamp>) -> CommandResult {
    for_registered_mana(context, message)?;
    let request = message.body;
    let index = vport::index_of(context.card, context.offer, request.vport.get())?;
    let (mbps, most) = (request.link_speed_mbps.get(), context.card.config.link_speed_mbps);
    let enable = tri_state(request.enable_clamping)
        .ok_or_else(|| CommandError::invalid(format!("enable_clamping is {}", request.enable_clamping)))?;
    let possible = (CLAMP_STEP_MBPS..=most).contains(&mbps) && mbps.is_multiple_of(CLAMP_STEP_MBPS);
    if enable == Some(true) && !possible {
        let why = format!(
            "a clamp of {mbps} Mbit/s, where multiples of {CLAMP_STEP_MBPS} up to {most} are possible"
        );
        return Err(CommandError::invalid(why));
    }
    if let (Some(enable), Some(vport)) = (enable, context.card.vports.get(index)) {
        vport.shaper.set(enable.then_some(mbps));
        // What an older clamp holds back goes by the new one.
        context.card.queues.resume_all();
    }
    Ok(Reply::new(&SetBwClampReply::default()))
}

/// MANA_QUERY_PHY_STAT: what passed the cables, all of it in traffic class 0.
pub fn query_phy_stat(context: &mut Context<'_>, message: &Message<'_, QueryPhyStat>) -> CommandResult {
    for_mana(message)?;
    let sum = |counter| sum(context.card, counter);
    let add = |counters: [fn(&VportCounters) -> &Counter; 3]| {
        U64::new(counters.into_iter().fold(0, |all, counter| all.wrapping_add(sum(counter).get())))
    };
    let mut stat = PhyStat {
        reported_stats: message.body.req_stats,
        rx_pkt_drop_phy: sum(|counters| &counters.rx_runts),
        tx_pkt_drop_phy: sum(|counters| &counters.tx_port_dropped),
        ..PhyStat::default()
    };
    stat.packets[0] = [
        add([
            |counters| &counters.rx_ucast_pkts,
            |counters| &counters.rx_mcast_pkts,
            |counters| &counters.rx_bcast_pkts,
        ]),
        add([
            |counters| &counters.tx_ucast_pkts,
            |counters| &counters.tx_mcast_pkts,
            |counters| &counters.tx_bcast_pkts,
        ]),
    ];
    stat.bytes[0] = [sum(|counters| &counters.rx_bytes), sum(|counters| &counters.tx_bytes)];
    Ok(Reply::new(&stat))
}
