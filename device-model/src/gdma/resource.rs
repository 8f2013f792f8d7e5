//! What user space owns: doorbell pages and protection domains.

use zerocopy::little_endian::U32;

use crate::command::{CommandResult, Context, Message, Reply};
use crate::status::CommandError;
use crate::table::{FIRST_FREE_PAGE, Objects, PdObject};
use crate::wire::gdma::{
    AllocateResourceRange, AllocateResourceRangeReply, CreatePd, CreatePdReply, DestroyResourceRange,
    HandleOnly, RESOURCE_DOORBELL_PAGE,
};

/// GDMA_ALLOCATE_RESOURCE_RANGE: doorbell pages, none of which belongs to a device.
pub fn allocate_range(
    context: &mut Context<'_>,
    message: &Message<'_, AllocateResourceRange>,
) -> CommandResult {
    let request = message.body;
    let (count, alignment) = (request.num_resources.get(), request.alignment.get().max(1));
    if request.resource_type.get() != RESOURCE_DOORBELL_PAGE || count == 0 {
        return Err(CommandError::invalid(format!("{count} resources of type {}", request.resource_type)));
    }
    let pages = u32::from(context.card.config.doorbell_pages);
    let taken = &context.objects.doorbell_pages;
    let free = |first: &u32| {
        first.checked_add(count).is_some_and(|end| end <= pages)
            && taken.range(*first..*first + count).next().is_none()
    };
    let first = (FIRST_FREE_PAGE..pages).filter(|first| first.is_multiple_of(alignment)).find(free);
    let first =
        first.ok_or_else(|| CommandError::exhausted(format!("no {count} doorbell pages are left")))?;
    context.objects.doorbell_pages.extend((first..first + count).map(|page| (page, context.origin)));
    Ok(Reply::new(&AllocateResourceRangeReply { allocated_resources: first.into() }))
}

/// GDMA_DESTROY_RESOURCE_RANGE.
pub fn destroy_range(
    context: &mut Context<'_>,
    message: &Message<'_, DestroyResourceRange>,
) -> CommandResult {
    let request = message.body;
    let (first, count) = (request.allocated_resources.get(), request.num_resources.get());
    let end = first.checked_add(count).filter(|&end| end <= context.card.config.doorbell_pages.into());
    let end = end.ok_or_else(|| CommandError::invalid(format!("{count} doorbell pages from {first}")))?;
    let owned = context.objects.doorbell_pages.range(first..end).count() == count as usize;
    if request.resource_type.get() != RESOURCE_DOORBELL_PAGE || !owned {
        return Err(CommandError::not_found(format!("doorbell pages {first} to {end} are not allocated")));
    }
    context.objects.doorbell_pages.retain(|page, _| !(first..end).contains(page));
    Ok(Reply::empty())
}

/// GDMA_CREATE_PD.
pub fn create_pd(context: &mut Context<'_>, _: &Message<'_, CreatePd>) -> CommandResult {
    let handle = context.objects.pds.insert(PdObject { origin: context.origin });
    let handle = handle.ok_or_else(|| CommandError::exhausted("no protection domain is left"))?;
    let pd_id = Objects::pd_id(handle).into();
    Ok(Reply::new(&CreatePdReply { pd_handle: handle.into(), pd_id, reserved: U32::ZERO }))
}

/// GDMA_DESTROY_PD.
pub fn destroy_pd(context: &mut Context<'_>, message: &Message<'_, HandleOnly>) -> CommandResult {
    let handle = message.body.handle.get();
    match context.objects.pds.remove(handle) {
        Some(_) => Ok(Reply::empty()),
        None => Err(CommandError::not_found(format!("there is no protection domain {handle:#x}"))),
    }
}
