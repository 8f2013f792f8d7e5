//! Work queue objects: a send or receive queue with its completion queue.

use zerocopy::little_endian::U64;

use super::{for_registered_mana, vport};
use crate::command::{CommandResult, Context, Message, Reply};
use crate::dma::GuestRam;
use crate::ledger;
use crate::observe::QueueKind;
use crate::queues::WqObject;
use crate::ring::{CompletionQueue, Moderation, WorkQueue};
use crate::rx;
use crate::status::CommandError;
use crate::table::{Device, WqKind, WqPair};
use crate::wire::gdma::queue_type;
use crate::wire::mana::{CreateWqObj, CreateWqObjReply, DestroyWqObj, FenceRq};

fn kind(wq_type: u32) -> Result<WqKind, CommandError> {
    match wq_type {
        queue_type::SQ => Ok(WqKind::Send),
        queue_type::RQ => Ok(WqKind::Receive),
        other => Err(CommandError::invalid(format!("work queue type {other}"))),
    }
}

/// MANA_CREATE_WQ_OBJ. Both regions are the object's from then on.
pub fn create(context: &mut Context<'_>, message: &Message<'_, CreateWqObj>) -> CommandResult {
    for_registered_mana(context, message)?;
    let request = message.body;
    let kind = kind(request.wq_type.get())?;
    let vport = vport::index_of(context.card, context.offer, request.vport.get())?;
    let page = context.objects.bindings.get(&vport).map(|binding| binding.page);
    let page = page.ok_or_else(|| CommandError::wrong_state(format!("vPort {vport} is not configured")))?;
    check_limit(context, kind, vport)?;
    let eq = request.cq_parent_qid.get();
    if !context.objects.eqs.contains_key(&eq) {
        return Err(CommandError::not_found(format!("there is no event queue {eq}")));
    }
    let (wq_size, cq_size) = (request.wq_size.get(), request.cq_size.get());
    if !WorkQueue::is_valid_size(wq_size) || !CompletionQueue::is_valid_size(cq_size) {
        return Err(CommandError::invalid(format!("a work queue of {wq_size} and a CQ of {cq_size} bytes")));
    }
    let (wq_region, cq_region) = (request.wq_gdma_region.get(), request.cq_gdma_region.get());
    if wq_region == cq_region {
        return Err(CommandError::invalid("one DMA region for both queues"));
    }
    let wq_ring = context.objects.ring(wq_region, wq_size)?;
    let cq_ring = context.objects.ring(cq_region, cq_size)?;
    let queues = &context.card.queues;
    let wq_kind = match kind {
        WqKind::Send => QueueKind::Sq,
        WqKind::Receive => QueueKind::Rq,
    };
    let ids = queues.free_id(wq_kind).zip(queues.free_id(QueueKind::Cq));
    let (wq, cq) = ids.ok_or_else(|| CommandError::exhausted("no queue is left"))?;
    let pages = context.objects.consume(wq_region).saturating_add(context.objects.consume(cq_region));
    let pair = WqPair { kind, vport, wq, cq, pages, origin: context.origin };
    let Some(handle) = context.objects.wqs.insert(pair) else {
        context.objects.give_pages(pages);
        return Err(CommandError::exhausted("no work queue object is left"));
    };
    let moderation = moderation(message);
    let mut completions = CompletionQueue::new(cq_ring, eq);
    completions.moderate(moderation.unwrap_or_default());
    queues.open_cq(cq, page, completions);
    let object = |ring| WqObject::new(wq, ring, cq, vport, Device::Mana.gpa_mkey());
    match kind {
        WqKind::Send => queues.open_sq(page, object(WorkQueue::send(wq_ring))),
        WqKind::Receive => {
            let wq = object(WorkQueue::receive(wq_ring));
            queues.open_rq(page, wq.id, wq.ring.entries());
            if let Some(vport) = context.card.vports.get(vport) {
                vport.receive.open(wq);
            }
        }
    }
    let reply = CreateWqObjReply {
        wq_id: wq.into(),
        cq_id: cq.into(),
        wq_obj: U64::new(handle),
        cq_moderation_comp: moderation.unwrap_or_default().completions.into(),
        cq_moderation_usec: moderation.unwrap_or_default().usec.into(),
        cq_moderation_enabled: moderation.is_some().into(),
        ..Default::default()
    };
    Ok(Reply::new(&reply).in_version(2))
}

/// The moderation that the driver wants, as far as a doorbell could ask for it; requests before version 3 want none.
fn moderation(message: &Message<'_, CreateWqObj>) -> Option<Moderation> {
    let request = message.body;
    (message.header.msg_version.get() >= 3 && request.req_cq_moderation != 0).then(|| Moderation {
        usec: request.cq_moderation_usec.get().min(Moderation::MAX_USEC),
        completions: request.cq_moderation_comp.get().min(Moderation::MAX_COMPLETIONS),
    })
}

/// A vPort has no more queues of a kind than MANA_QUERY_VPORT_CONFIG said.
fn check_limit(context: &Context<'_>, kind: WqKind, vport: usize) -> Result<(), CommandError> {
    let limit = context.card.config.vports.get(vport).map_or(0, |config| config.max_queues);
    let shown = match kind {
        WqKind::Send => context.offer.port.max_sq,
        WqKind::Receive => context.offer.port.max_rq,
    };
    let limit = u32::from(limit).min(shown.unwrap_or(u32::MAX));
    let pairs = context.objects.wqs.iter().filter(|pair| pair.kind == kind && pair.vport == vport);
    match pairs.count() < limit as usize {
        true => Ok(()),
        false => Err(CommandError::exhausted(format!("vPort {vport} has its {limit} queues"))),
    }
}

/// MANA_DESTROY_WQ_OBJ. When the response is sent the card touches neither ring.
pub fn destroy(context: &mut Context<'_>, message: &Message<'_, DestroyWqObj>) -> CommandResult {
    for_registered_mana(context, message)?;
    let kind = kind(message.body.wq_type.get())?;
    let handle = message.body.wq_obj.get();
    if context.objects.wqs.get(handle).is_none_or(|pair| pair.kind != kind) {
        return Err(CommandError::not_found(format!("there is no {kind:?} object {handle:#x}")));
    }
    ledger::release_wq(context.card, context.objects, handle);
    Ok(Reply::empty())
}

/// MANA_FENCE_RQ: a completion after those of all packets that were steered before.
pub fn fence(context: &mut Context<'_>, message: &Message<'_, FenceRq>) -> CommandResult {
    for_registered_mana(context, message)?;
    let handle = message.body.wq_obj.get();
    let pair = context.objects.wqs.get(handle).filter(|pair| pair.kind == WqKind::Receive);
    let pair =
        *pair.ok_or_else(|| CommandError::not_found(format!("there is no receive object {handle:#x}")))?;
    let card = context.card;
    if let Some(vport) = card.vports.get(pair.vport) {
        let posted = rx::fence(&card.queues, &GuestRam::new(context.memory), vport, pair.wq);
        posted.map_err(|error| CommandError::dma(error.to_string()))?;
    }
    Ok(Reply::empty())
}
