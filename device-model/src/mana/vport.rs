//! The Ethernet device and its vPorts: what there is, and where their packets go.

use zerocopy::little_endian::{U16, U32, U64};

use super::{for_mana, for_registered_mana};
use crate::card::Card;
use crate::command::{CommandResult, Context, Message, Reply};
use crate::host::Profile;
use crate::observe::Event;
use crate::packet::ETHERNET_HEADER;
use crate::rx::{Coalescing, MAX_TABLE, RxUpdate};
use crate::status::CommandError;
use crate::steer::HashTypes;
use crate::table::{Binding, Device, Objects, WqKind};
use crate::wire::hwc::RequestHeader;
use crate::wire::mana::{
    ConfigVportRx, ConfigVportRxReply, ConfigVportTx, ConfigVportTxReply, INVALID_HANDLE, PF_CAP_COALESCES_8,
    QueryDevConfig, QueryDevConfigReply, QueryVportConfig, QueryVportConfigReply, tri_state,
};

/// Handle of vPort 0; the others follow.
const VPORT_HANDLE: u64 = 0x7600_0000_0000_0000;

fn handle_of(offer: &Profile, index: usize) -> u64 {
    offer.port.handle.unwrap_or(VPORT_HANDLE).wrapping_add(index as u64)
}

/// How many vPorts the host shows.
fn shown_ports(card: &Card, offer: &Profile) -> u16 {
    offer.adapter.ports.unwrap_or(card.config.vports.len() as u16)
}

/// Index of the vPort with this handle.
///
/// # Errors
/// There is none.
pub fn index_of(card: &Card, offer: &Profile, handle: u64) -> Result<usize, CommandError> {
    let index = handle.wrapping_sub(handle_of(offer, 0));
    let known = (card.vports.len() as u64).min(shown_ports(card, offer).into());
    let index = Some(index).filter(|&index| index < known).map(|index| index as usize);
    index.ok_or_else(|| CommandError::not_found(format!("there is no vPort {handle:#x}")))
}

/// MANA_QUERY_DEV_CONFIG. Answered before the device is registered, too: newer drivers ask twice.
pub fn query_dev_config(context: &mut Context<'_>, message: &Message<'_, QueryDevConfig>) -> CommandResult {
    for_mana(message)?;
    let (limits, shown) = (context.card.queues.limits(), &context.offer.adapter);
    let frame = context.card.config.mtu.saturating_add(ETHERNET_HEADER as u16);
    let reply = QueryDevConfigReply {
        pf_cap_flags1: U64::new(shown.pf_flags.unwrap_or(PF_CAP_COALESCES_8)),
        max_num_vports: U16::new(shown_ports(context.card, context.offer)),
        bm_hostmode: shown.host_mode.unwrap_or(0),
        max_num_eqs: U32::new(shown.max_eqs.unwrap_or(limits.eqs - limits.first.eq)),
        adapter_mtu: shown.mtu.unwrap_or(frame).into(),
        ..QueryDevConfigReply::default()
    };
    Ok(Reply::new(&reply).in_version(shown.version.unwrap_or(3)))
}

/// MANA_QUERY_VPORT_CONFIG.
pub fn query_config(context: &mut Context<'_>, message: &Message<'_, QueryVportConfig>) -> CommandResult {
    for_mana(message)?;
    let index = message.body.vport_index.get() as usize;
    let vport = context.card.config.vports.get(index).zip(context.card.vports.get(index));
    let vport = vport.filter(|_| index < usize::from(shown_ports(context.card, context.offer)));
    let shown = &context.offer.port;
    let (limits, vport) =
        vport.ok_or_else(|| CommandError::not_found(format!("there is no vPort {index}")))?;
    Ok(Reply::new(&QueryVportConfigReply {
        max_num_sq: shown.max_sq.unwrap_or(limits.max_queues.into()).into(),
        max_num_rq: shown.max_rq.unwrap_or(limits.max_queues.into()).into(),
        num_indirection_ent: shown
            .indirection_entries
            .unwrap_or(context.card.config.indirection_entries.into())
            .into(),
        mac_addr: vport.mac,
        vport: U64::new(handle_of(context.offer, index)),
        ..QueryVportConfigReply::default()
    }))
}

/// MANA_CONFIG_VPORT_TX: binds a vPort to a protection domain and a doorbell page, again and again if the driver
/// wants; there is no command that ends it.
pub fn config_tx(context: &mut Context<'_>, message: &Message<'_, ConfigVportTx>) -> CommandResult {
    for_registered_mana(context, message)?;
    let request = message.body;
    let index = index_of(context.card, context.offer, request.vport.get())?;
    let page = context.objects.owned_page(Device::Mana, request.doorbell_pageid.get())?;
    if !context.objects.knows_pd(request.pdid.get()) {
        return Err(CommandError::not_found(format!("there is no protection domain {}", request.pdid)));
    }
    context.objects.bindings.insert(index, Binding { page });
    let offset = index as u16;
    if let Some(vport) = context.card.vports.get(index) {
        vport.configure_tx(Some(offset));
    }
    Ok(Reply::new(&ConfigVportTxReply { tx_vport_offset: offset.into(), short_form_allowed: 1, reserved: 0 }))
}

/// MANA_CONFIG_VPORT_RX. What is switched off delivers nothing more when the response is sent.
pub fn config_rx(context: &mut Context<'_>, message: &Message<'_, ConfigVportRx>) -> CommandResult {
    for_registered_mana(context, message)?;
    let index = index_of(context.card, context.offer, message.body.vport.get())?;
    let update = rx_update(context.objects, index, message)?;
    let Some(vport) = context.card.vports.get(index) else { return Ok(Reply::empty()) };
    vport.configure_rx(&update)?;
    context.card.core.tracer.emit(|| Event::VportRx {
        vport: index as u16,
        enable: message.body.rx_enable.get() == 1,
        rss: message.body.rss_enable.get() == 1,
        entries: message.body.num_indir_entries.get(),
        coalescing: message.body.cqe_coalescing_enable != 0,
    });
    // Packets are gathered only as they come together; nothing waits.
    Ok(Reply::new(&ConfigVportRxReply::default()).in_version(2))
}

/// What the request changes, handles resolved to ids of receive queues of this vPort.
fn rx_update(
    objects: &Objects,
    vport: usize,
    message: &Message<'_, ConfigVportRx>,
) -> Result<RxUpdate, CommandError> {
    let request = message.body;
    let switch = |what: &str, value: U32| {
        tri_state(value)
            .ok_or_else(|| CommandError::invalid(format!("{what} is neither on, off nor unchanged: {value}")))
    };
    let queue = |handle: &U64| {
        let pair =
            objects.wqs.get(handle.get()).filter(|pair| pair.kind == WqKind::Receive && pair.vport == vport);
        pair.map(|pair| pair.wq).ok_or_else(|| {
            CommandError::not_found(format!("vPort {vport} has no receive object {:#x}", handle.get()))
        })
    };
    let default_rq = match request.default_rxobj.get() {
        INVALID_HANDLE => None,
        _ if request.update_default_rxobj == 0 => None,
        _ => Some(queue(&request.default_rxobj)?),
    };
    let table = match request.update_indir_tab {
        0 => None,
        _ => Some(indirection(message)?.iter().map(queue).collect::<Result<Vec<_>, _>>()?),
    };
    // Version 1 ends before the fields that follow the key: there its table begins, if it says so.
    let table_at = usize::from(request.indir_tab_offset.get());
    let whole = table_at >= size_of::<RequestHeader>() + size_of::<ConfigVportRx>();
    let version = if whole { message.header.msg_version.get() } else { 1 };
    let coalescing = match (version, request.cqe_coalescing_enable, request.cqe8_coalescing_enable) {
        (5.., _, 1..) => Coalescing::Eight,
        (2.., 1.., _) => Coalescing::Four,
        _ => Coalescing::Off,
    };
    let hash_types = if version >= 3 { HashTypes(request.rss_hash_types.get()) } else { HashTypes::DEFAULT };
    Ok(RxUpdate {
        enable: switch("rx_enable", request.rx_enable)?,
        rss: switch("rss_enable", request.rss_enable)?,
        default_rq,
        key: (request.update_hashkey != 0).then_some(request.hashkey),
        hash_types: Some(hash_types),
        table,
        coalescing: Some(coalescing),
    })
}

/// The handles of the indirection table.
fn indirection<'a>(message: &'a Message<'_, ConfigVportRx>) -> Result<&'a [U64], CommandError> {
    let (offset, entries) = (message.body.indir_tab_offset.get(), message.body.num_indir_entries.get());
    if usize::from(entries) > MAX_TABLE {
        return Err(CommandError::invalid(format!("an indirection table of {entries} entries")));
    }
    message.list(offset.into(), entries.into())
}
