//! What the function is and may have, and the life of its devices.

use zerocopy::little_endian::{U32, U64};

use crate::command::{CommandResult, Context, Message, Reply};
use crate::ledger;
use crate::status::CommandError;
use crate::table::Device;
use crate::wire::gdma::{
    DEVICE_LIST, DeviceList, Empty, MaxResources, QueryHwcTimeout, RegisterDeviceReply, VerifyVersion,
    VerifyVersionReply, capability, device,
};
use crate::wire::hwc::DeviceId;

/// The protocol that the card speaks (`GDMA_PROTOCOL_FIRST`, `GDMA_PROTOCOL_LAST`).
const PROTOCOL: u64 = 1;
/// What the driver waits for an answer by itself (`HW_CHANNEL_WAIT_TIMEOUT_MS`).
const HWC_TIMEOUT_MS: u32 = 30_000;

/// GDMA_VERIFY_VF_DRIVER_VERSION. Interrupt moderation is offered to drivers that know of it; no other capability is,
/// so that the driver assumes the least.
pub fn verify_version(_: &mut Context<'_>, message: &Message<'_, VerifyVersion>) -> CommandResult {
    let (min, max) = (message.body.protocol_ver_min.get(), message.body.protocol_ver_max.get());
    if !(min..=max).contains(&PROTOCOL) {
        return Err(CommandError::invalid(format!("protocol {PROTOCOL} is not in {min} to {max}")));
    }
    let moderates = message.body.drv_cap_flags1.get() & capability::DRIVER_MODERATION != 0;
    Ok(Reply::new(&VerifyVersionReply {
        gdma_protocol_ver: PROTOCOL.into(),
        pf_cap_flags1: U64::new(if moderates { capability::MODERATION } else { 0 }),
        pf_cap_flags: [U64::ZERO; 3],
    }))
}

/// GDMA_QUERY_MAX_RESOURCES.
pub fn query_max_resources(context: &mut Context<'_>, _: &Message<'_, Empty>) -> CommandResult {
    let limits = context.card.queues.limits();
    Ok(Reply::new(&MaxResources {
        max_sq: (limits.sqs - 1).into(),
        max_rq: (limits.rqs - 1).into(),
        max_cq: (limits.cqs - 1).into(),
        max_eq: (limits.eqs - 1).into(),
        max_db: u32::from(context.card.config.doorbell_pages).into(),
        max_msix: context.card.config.max_msix.into(),
        ..MaxResources::default()
    }))
}

/// GDMA_LIST_DEVICES: Ethernet, and RDMA if the host wants it.
pub fn list_devices(context: &mut Context<'_>, _: &Message<'_, Empty>) -> CommandResult {
    let kinds = [Some(device::MANA), context.card.config.rdma.then_some(device::MANA_IB)];
    let mut devs = [DeviceId::default(); DEVICE_LIST];
    let mut num_of_devs = 0;
    for (entry, kind) in devs.iter_mut().zip(kinds.into_iter().flatten()) {
        *entry = DeviceId::new(kind);
        num_of_devs += 1;
    }
    Ok(Reply::new(&DeviceList { num_of_devs: U32::new(num_of_devs), reserved: U32::ZERO, devs }))
}

/// GDMA_REGISTER_DEVICE.
pub fn register(context: &mut Context<'_>, message: &Message<'_, Empty>) -> CommandResult {
    let device = message.device()?;
    if device == Device::Hwc || device == Device::ManaIb && !context.card.config.rdma {
        return Err(CommandError::not_found(format!("{device:?} is not in the list of devices")));
    }
    if context.objects.devices.contains_key(&device) {
        return Err(CommandError::wrong_state(format!("{device:?} is registered already")));
    }
    context.objects.devices.insert(device, context.origin);
    Ok(Reply::new(&RegisterDeviceReply {
        pdid: device.pd().into(),
        gpa_mkey: device.gpa_mkey().into(),
        db_id: device.doorbell_page().into(),
    }))
}

/// GDMA_DEREGISTER_DEVICE: releases everything of that device.
pub fn deregister(context: &mut Context<'_>, message: &Message<'_, Empty>) -> CommandResult {
    let device = message.device()?;
    if !context.objects.devices.contains_key(&device) {
        return Err(CommandError::wrong_state(format!("{device:?} is not registered")));
    }
    ledger::report_leaks(context.card, context.objects, Some(device));
    ledger::release_device(context.card, context.objects, device);
    Ok(Reply::empty())
}

/// GDMA_QUERY_HWC_TIMEOUT: the driver's own time-out will do. 0 would kill the channel.
pub fn query_hwc_timeout(_: &mut Context<'_>, message: &Message<'_, QueryHwcTimeout>) -> CommandResult {
    let timeout_ms = match message.body.timeout_ms.get() {
        0 => HWC_TIMEOUT_MS,
        present => present,
    };
    Ok(Reply::new(&QueryHwcTimeout { timeout_ms: timeout_ms.into(), reserved: U32::ZERO }))
}
