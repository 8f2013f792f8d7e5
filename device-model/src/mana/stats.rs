//! Statistics and the link.

use zerocopy::little_endian::{U32, U64};

use super::{for_mana, vport};
use crate::card::Card;
use crate::command::{CommandResult, Context, Message, Reply};
use crate::counters::{Counter, VportCounters};
use crate::wire::mana::{GfStat, PhyStat, QueryGfStat, QueryLinkConfig, QueryLinkConfigReply, QueryPhyStat};

/// All counters of MANA_QUERY_GF_STAT (`STATISTICS_FLAGS_*`, bits 0 to 26).
const ALL_STATS: u64 = (1 << 27) - 1;
/// Speed of the card's link, Mbit/s.
const LINK_SPEED_MBPS: u32 = 200_000;

/// A counter's sum over all vPorts.
fn sum(card: &Card, counter: fn(&VportCounters) -> &Counter) -> U64 {
    U64::new(card.vports.iter().fold(0, |sum, vport| sum.wrapping_add(counter(&vport.counters).get())))
}

/// MANA_QUERY_GF_STAT: the function's traffic since it was made.
pub fn query_gf_stat(context: &mut Context<'_>, message: &Message<'_, QueryGfStat>) -> CommandResult {
    for_mana(message)?;
    let sum = |counter| sum(context.card, counter);
    let stat = GfStat {
        reported_stats: U64::new(message.body.req_stats.get() & ALL_STATS),
        rx_discards_nowqe: sum(|counters| &counters.rx_discards_nowqe),
        rx_err_vport_disabled: sum(|counters| &counters.rx_err_vport_disabled),
        rx_bytes: sum(|counters| &counters.rx_bytes),
        rx_ucast_pkts: sum(|counters| &counters.rx_ucast_pkts),
        rx_ucast_bytes: sum(|counters| &counters.rx_ucast_bytes),
        rx_bcast_pkts: sum(|counters| &counters.rx_bcast_pkts),
        rx_bcast_bytes: sum(|counters| &counters.rx_bcast_bytes),
        rx_mcast_pkts: sum(|counters| &counters.rx_mcast_pkts),
        rx_mcast_bytes: sum(|counters| &counters.rx_mcast_bytes),
        tx_err_vport_disabled: sum(|counters| &counters.tx_err_vport_disabled),
        tx_err_inval_vport_offset: sum(|counters| &counters.tx_err_inval_vport_offset),
        tx_err_mtu_violation: sum(|counters| &counters.tx_err_mtu_violation),
        tx_err_inval_oob: sum(|counters| &counters.tx_err_inval_oob),
        tx_bytes: sum(|counters| &counters.tx_bytes),
        tx_ucast_pkts: sum(|counters| &counters.tx_ucast_pkts),
        tx_ucast_bytes: sum(|counters| &counters.tx_ucast_bytes),
        tx_bcast_pkts: sum(|counters| &counters.tx_bcast_pkts),
        tx_bcast_bytes: sum(|counters| &counters.tx_bcast_bytes),
        tx_mcast_pkts: sum(|counters| &counters.tx_mcast_pkts),
        tx_mcast_bytes: sum(|counters| &counters.tx_mcast_bytes),
        tx_err_gdma: sum(|counters| &counters.tx_err_gdma),
        ..GfStat::default()
    };
    Ok(Reply::new(&stat).in_version(2))
}

/// MANA_QUERY_LINK_CONFIG: the link's speed; there is no shaping.
pub fn query_link_config(context: &mut Context<'_>, message: &Message<'_, QueryLinkConfig>) -> CommandResult {
    for_mana(message)?;
    vport::index_of(context.card, message.body.vport.get())?;
    let link = QueryLinkConfigReply {
        qos_unconfigured: 1,
        link_speed_mbps: U32::new(LINK_SPEED_MBPS),
        ..QueryLinkConfigReply::default()
    };
    Ok(Reply::new(&link).in_version(2))
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
