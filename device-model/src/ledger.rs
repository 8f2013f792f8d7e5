//! What is alive, and the one way in which it ends: DESTROY commands, deregistration, the end of the hardware
//! channel, a function-level reset and a reset of the machine all release objects here.

use std::collections::BTreeMap;

use crate::card::Card;
use crate::command;
use crate::observe::{Fields, QueueKind};
use crate::rules::Rule;
use crate::table::{Device, Objects, Origin, WqKind};

/// Live objects by kind.
pub fn fields(objects: &Objects) -> Fields {
    let wqs = |kind| objects.wqs.iter().filter(|pair| pair.kind == kind).count() as u64;
    Fields(vec![
        ("devices", objects.devices.len() as u64),
        ("dma_regions", objects.regions.len() as u64),
        ("event_queues", objects.eqs.len() as u64),
        ("send_queues", wqs(WqKind::Send)),
        ("receive_queues", wqs(WqKind::Receive)),
        ("completion_queues", objects.wqs.len() as u64),
        ("vport_bindings", objects.bindings.len() as u64),
        ("doorbell_pages", objects.doorbell_pages.len() as u64),
        ("protection_domains", objects.pds.len() as u64),
    ])
}

/// The end of an event queue.
pub fn release_eq(card: &Card, objects: &mut Objects, id: u32) {
    card.queues.close(QueueKind::Eq, id);
    if let Some(eq) = objects.eqs.remove(&id) {
        objects.give_pages(eq.pages);
    }
}

/// The end of a work queue and its completion queue: first no packet leads to it, then its runner has finished,
/// then its completions go nowhere.
pub fn release_wq(card: &Card, objects: &mut Objects, handle: u64) {
    let Some(pair) = objects.wqs.remove(handle) else { return };
    match pair.kind {
        WqKind::Send => card.queues.close(QueueKind::Sq, pair.wq),
        WqKind::Receive => {
            if let Some(vport) = card.vports.get(pair.vport) {
                vport.receive.close(pair.wq);
            }
            card.queues.close(QueueKind::Rq, pair.wq);
        }
    }
    card.queues.close(QueueKind::Cq, pair.cq);
    objects.give_pages(pair.pages);
}

/// The end of a DMA region that no queue has taken over; `false` if there is none.
pub fn release_region(objects: &mut Objects, handle: u64) -> bool {
    let region = objects.regions.remove(handle);
    region.map(|object| objects.give_pages(object.region.page_count())).is_some()
}

/// The end of everything that `device` has.
pub fn release_device(card: &Card, objects: &mut Objects, device: Device) {
    if device == Device::Mana {
        for handle in objects.wqs.handles(|_| true) {
            release_wq(card, objects, handle);
        }
        objects.bindings.clear();
        card.vports.iter().for_each(crate::vport::Vport::reset);
    }
    let eqs = objects.eqs.iter().filter(|(_, eq)| eq.device == device).map(|(&id, _)| id);
    for id in eqs.collect::<Vec<_>>() {
        release_eq(card, objects, id);
    }
    objects.devices.remove(&device);
}

/// The end of everything. The channel's own queues are closed by whoever calls.
pub fn release_all(card: &Card, objects: &mut Objects) {
    for device in [Device::ManaIb, Device::Mana] {
        release_device(card, objects, device);
    }
    // Whatever is added to the table must be released above or be memory only.
    *objects = Objects::new(card.queues.limits().wqs());
    card.queues.clear_timers();
    card.core.msix.clear_pending();
}

/// Account for what a driver that unloads has left: of `device`, or all.
pub fn report_leaks(card: &Card, objects: &Objects, device: Option<Device>) {
    let mut left: BTreeMap<&str, Vec<Origin>> = BTreeMap::new();
    let mut note = |kind, origin| left.entry(kind).or_default().push(origin);
    let ours = |owner| device.is_none_or(|device| device == owner);
    objects.eqs.values().filter(|eq| ours(eq.device)).for_each(|eq| note("event queue", eq.origin));
    if ours(Device::Mana) {
        objects.wqs.iter().for_each(|pair| note("work queue object", pair.origin));
    }
    if device.is_none() {
        objects.devices.values().for_each(|&origin| note("registered device", origin));
        objects.regions.iter().for_each(|region| note("DMA region", region.origin));
        objects.doorbell_pages.values().for_each(|&origin| note("doorbell page", origin));
        objects.pds.iter().for_each(|pd| note("protection domain", pd.origin));
    }
    for (kind, origins) in left {
        card.core.counters.objects_leaked.add(origins.len() as u64);
        card.core.broken(Rule::ReleaseObjects, || {
            let makers: Vec<String> = origins
                .iter()
                .take(4)
                .map(|origin| {
                    let command = command::name(origin.code).unwrap_or("UNKNOWN");
                    format!("{command} (request {})", origin.seq)
                })
                .collect();
            format!("{} × {kind} left, made by {}", origins.len(), makers.join(", "))
        });
    }
}
