//! Event queues: created one by one, tested with an event of their own, disabled.

use crate::command::{CommandResult, Context, Message, Reply};
use crate::dma::GuestRam;
use crate::ledger;
use crate::observe::QueueKind;
use crate::queues::HWC_QUEUE;
use crate::ring::EventQueue;
use crate::status::CommandError;
use crate::table::{Device, EqObject};
use crate::wire::gdma::{CreateQueue, CreateQueueReply, DisableQueue, GenerateTestEqe, queue_type};
use crate::wire::queue::EventEntry;

/// GDMA_CREATE_QUEUE: an event queue; all other queues are made by the commands of their devices. The region is the
/// queue's from then on.
pub fn create(context: &mut Context<'_>, message: &Message<'_, CreateQueue>) -> CommandResult {
    let request = message.body;
    let device = message.device()?;
    if request.kind.get() != queue_type::EQ {
        return Err(CommandError::invalid(format!("queue type {} is not an event queue", request.kind)));
    }
    if !context.objects.devices.contains_key(&device) {
        return Err(CommandError::wrong_state(format!("{device:?} is not registered")));
    }
    let msix = u16::try_from(request.eq_pci_msix_index.get()).ok();
    let msix = msix.filter(|&vector| vector < context.card.config.msix_table_size);
    let msix = msix.ok_or_else(|| {
        CommandError::invalid(format!("MSI-X vector {} is beyond the table", request.eq_pci_msix_index))
    })?;
    let page = context.objects.owned_page(device, request.doorbell_id.get())?;
    let size = request.queue_size.get();
    if !EventQueue::is_valid_size(size) {
        return Err(CommandError::invalid(format!("an event queue of {size} bytes")));
    }
    let handle = request.gdma_region.get();
    let ring = context.objects.ring(handle, size)?;
    let id = context.card.queues.free_id(QueueKind::Eq);
    let id = id.ok_or_else(|| CommandError::exhausted("no event queue is left"))?;
    let pages = context.objects.consume(handle);
    context.objects.eqs.insert(id, EqObject { device, pages, origin: context.origin });
    context.card.queues.open_eq(id, page, EventQueue::new(ring, msix));
    Ok(Reply::new(&CreateQueueReply { queue_index: id.into() }))
}

/// GDMA_DISABLE_QUEUE: the end of an event queue.
pub fn disable(context: &mut Context<'_>, message: &Message<'_, DisableQueue>) -> CommandResult {
    let (kind, id) = (message.body.kind.get(), message.body.queue_index.get());
    let device = message.device()?;
    let owned = context.objects.eqs.get(&id).is_some_and(|eq| eq.device == device);
    if kind != queue_type::EQ || !owned {
        return Err(CommandError::not_found(format!("queue {id} of type {kind} is not {device:?}'s")));
    }
    ledger::release_eq(context.card, context.objects, id);
    Ok(Reply::empty())
}

/// GDMA_GENERATE_TEST_EQE: the event comes before the response, or right after.
pub fn generate_test_eqe(context: &mut Context<'_>, message: &Message<'_, GenerateTestEqe>) -> CommandResult {
    let id = message.body.queue_index.get();
    let device = message.device()?;
    let owned = match device {
        Device::Hwc => id == HWC_QUEUE,
        _ => context.objects.eqs.get(&id).is_some_and(|eq| eq.device == device),
    };
    if !owned {
        return Err(CommandError::not_found(format!("event queue {id} is not {device:?}'s")));
    }
    if !context.card.queues.post_event(&GuestRam::new(context.memory), id, EventEntry::Test) {
        return Err(CommandError::dma(format!("event queue {id} takes no event")));
    }
    Ok(Reply::empty())
}
