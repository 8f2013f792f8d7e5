//! What the function is and may have, and the life of its devices.

use zerocopy::little_endian::{U32, U64};

use crate::command::{CommandResult, Context, Message, Reply};
use crate::host::Registration;
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
pub fn verify_version(context: &mut Context<'_>, message: &Message<'_, VerifyVersion>) -> CommandResult {
    let (min, max) = (message.body.protocol_ver_min.get(), message.body.protocol_ver_max.get());
    if !(min..=max).contains(&PROTOCOL) {
        return Err(CommandError::invalid(format!("protocol {PROTOCOL} is not in {min} to {max}")));
    }
    let moderates = message.body.drv_cap_flags1.get() & capability::DRIVER_MODERATION != 0;
    let shown = &context.offer.version;
    let own_flags = if moderates { capability::MODERATION } else { 0 };
    Ok(Reply::new(&VerifyVersionReply {
        gdma_protocol_ver: shown.protocol.unwrap_or(PROTOCOL).into(),
        pf_cap_flags1: shown.pf_flags.unwrap_or(own_flags).into(),
        pf_cap_flags: [U64::ZERO; 3],
    }))
}

/// GDMA_QUERY_MAX_RESOURCES.
pub fn query_max_resources(context: &mut Context<'_>, _: &Message<'_, Empty>) -> CommandResult {
    let (limits, shown) = (context.card.queues.limits(), &context.offer.limits);
    let config = &context.card.config;
    Ok(Reply::new(&MaxResources {
        max_sq: shown.max_sq.unwrap_or(limits.sqs - limits.first.sq).into(),
        max_rq: shown.max_rq.unwrap_or(limits.rqs - limits.first.rq).into(),
        max_cq: shown.max_cq.unwrap_or(limits.cqs - limits.first.cq).into(),
        max_eq: shown.max_eq.unwrap_or(limits.eqs - limits.first.eq).into(),
        max_db: shown.max_db.unwrap_or(config.doorbell_pages.into()).into(),
        max_mst: shown.max_mst.unwrap_or(0).into(),
        max_msix: shown.max_msix.unwrap_or(config.max_msix).into(),
        ..MaxResources::default()
    }))
}

/// GDMA_LIST_DEVICES: Ethernet, and RDMA if the host wants it.
pub fn list_devices(context: &mut Context<'_>, _: &Message<'_, Empty>) -> CommandResult {
    let own = || {
        let kinds = [Some(device::MANA), context.card.config.rdma.then_some(device::MANA_IB)];
        kinds.into_iter().flatten().map(DeviceId::new).collect()
    };
    let list: Vec<DeviceId> = context.offer.device_list().unwrap_or_else(own);
    let mut devs = [DeviceId::default(); DEVICE_LIST];
    devs.iter_mut().zip(&list).for_each(|(entry, id)| *entry = *id);
    let num_of_devs = U32::new(context.offer.devices.count.unwrap_or(list.len() as u32));
    Ok(Reply::new(&DeviceList { num_of_devs, reserved: U32::ZERO, devs }))
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
    let shown = match device {
        Device::Mana => context.offer.registration.clone(),
        Device::Hwc | Device::ManaIb => Registration::default(),
    };
    Ok(Reply::new(&RegisterDeviceReply {
        pdid: shown.pd.unwrap_or(device.pd()).into(),
        gpa_mkey: shown.gpa_mkey.unwrap_or(device.gpa_mkey()).into(),
        db_id: shown.doorbell_page.unwrap_or(device.doorbell_page()).into(),
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
pub fn query_hwc_timeout(context: &mut Context<'_>, message: &Message<'_, QueryHwcTimeout>) -> CommandResult {
    let own = match message.body.timeout_ms.get() {
        0 => HWC_TIMEOUT_MS,
        present => present,
    };
    let timeout_ms = context.offer.version.hwc_timeout.unwrap_or(own);
    Ok(Reply::new(&QueryHwcTimeout { timeout_ms: timeout_ms.into(), reserved: U32::ZERO }))
}
