//! DMA regions: lists of pages, in one message or several.

use zerocopy::little_endian::U64;

use crate::command::{CommandResult, Context, Message, Reply};
use crate::ledger;
use crate::region::Region;
use crate::status::CommandError;
use crate::table::RegionObject;
use crate::wire::gdma::{AddPages, CreateDmaRegion, CreateDmaRegionReply, HandleOnly};

/// GDMA_CREATE_DMA_REGION. "More entries" until the last page is there.
pub fn create(context: &mut Context<'_>, message: &Message<'_, CreateDmaRegion>) -> CommandResult {
    let request = message.body;
    let (length, offset) = (request.length.get(), request.offset_in_page.get());
    let mut region = Region::new(length, offset, request.gdma_page_type.get(), request.page_count.get())?;
    let pages = message.trailing(request.page_addr_list_len.get())?;
    region.add_pages(pages.iter().map(|page| page.get()))?;
    let (missing, count) = (region.missing(), region.page_count());
    if !context.objects.take_pages(count) {
        return Err(CommandError::exhausted(format!("no room for {count} page addresses")));
    }
    let Some(handle) = context.objects.regions.insert(RegionObject { region, origin: context.origin }) else {
        context.objects.give_pages(count);
        return Err(CommandError::exhausted("no DMA region is left"));
    };
    let reply = Reply::new(&CreateDmaRegionReply { dma_region_handle: U64::new(handle) });
    Ok(if missing == 0 { reply } else { reply.more_entries() })
}

/// GDMA_DMA_REGION_ADD_PAGES. "More entries" until the last page is there.
pub fn add_pages(context: &mut Context<'_>, message: &Message<'_, AddPages>) -> CommandResult {
    let pages = message.trailing(message.body.page_addr_list_len.get())?;
    let handle = message.body.dma_region_handle.get();
    let object = context.objects.regions.get_mut(handle).ok_or_else(|| no_region(handle))?;
    object.region.add_pages(pages.iter().map(|page| page.get()))?;
    Ok(if object.region.missing() == 0 { Reply::empty() } else { Reply::empty().more_entries() })
}

/// GDMA_DESTROY_DMA_REGION, of a region that no queue has taken over.
pub fn destroy(context: &mut Context<'_>, message: &Message<'_, HandleOnly>) -> CommandResult {
    let handle = message.body.handle.get();
    match ledger::release_region(context.objects, handle) {
        true => Ok(Reply::empty()),
        false => Err(no_region(handle)),
    }
}

fn no_region(handle: u64) -> CommandError {
    CommandError::not_found(format!("there is no DMA region {handle:#x}"))
}
