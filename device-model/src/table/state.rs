//! What is kept of objects: each with its maker, and queues with what they hold, so that an object without its queue,
//! or a queue without its object, can't be written down.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{
    Binding, Device, EqObject, FIRST_FREE_PAGE, Handles, Objects, Origin, PdObject, RegionObject, Slot,
    WqKind, WqPair,
};
use crate::card::Card;
use crate::queues::state::{WqObjectState, check_id, check_page};
use crate::queues::{self, WqObject};
use crate::region::Region;
use crate::region::state::RegionState;
use crate::ring::state::{CompletionQueueState, EventQueueState};
use crate::ring::{CompletionQueue, EventQueue, WorkQueue};
use crate::state::{StateError, check, impossible};

/// The command that made an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct OriginState {
    seq: u64,
    code: u32,
}

impl From<Origin> for OriginState {
    fn from(Origin { seq, code }: Origin) -> Self {
        Self { seq, code }
    }
}

impl From<OriginState> for Origin {
    fn from(OriginState { seq, code }: OriginState) -> Self {
        Self { seq, code }
    }
}

/// Objects of one kind, with the order in which slots are used again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct HandlesState<S> {
    slots: Vec<(u32, Option<S>)>,
    free: Vec<u32>,
}

impl<T> Handles<T> {
    fn save<S>(&self, save: impl Fn(&T) -> Option<S>) -> HandlesState<S> {
        let slot = |slot: &Slot<T>| (slot.generation, slot.object.as_ref().and_then(&save));
        HandlesState { slots: self.slots.iter().map(slot).collect(), free: self.free.clone() }
    }
    /// These handles' kind and capacity with the objects of `state`.
    fn restored<S>(
        mut self,
        state: &HandlesState<S>,
        mut build: impl FnMut(&S) -> Result<T, StateError>,
    ) -> Result<Self, StateError> {
        let HandlesState { slots, free } = state;
        check(slots.len() <= self.capacity, || format!("{} handles of kind {}", slots.len(), self.kind))?;
        let unused: BTreeSet<u32> = free.iter().copied().collect();
        let empty = |at: &u32| matches!(slots.get(*at as usize), Some((_, None)));
        let objects = slots.iter().filter(|(_, object)| object.is_some()).count();
        let fits = unused.len() == free.len() && unused.iter().all(empty);
        check(fits && objects + free.len() == slots.len(), || {
            format!("free handles of kind {} are not the unused ones", self.kind)
        })?;
        for (generation, object) in slots {
            let object = object.as_ref().map(&mut build).transpose()?;
            self.slots.push(Slot { generation: *generation, object });
        }
        self.free.clone_from(free);
        Ok(self)
    }
}

/// An event queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct EqState {
    id: u32,
    device: u8,
    pages: u32,
    origin: OriginState,
    doorbell_page: u32,
    queue: EventQueueState,
}

/// A work queue with its completion queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct PairState {
    is_send: bool,
    vport: u32,
    wq: u32,
    cq: u32,
    pages: u32,
    origin: OriginState,
    doorbell_page: u32,
    tail: u32,
    work: WqObjectState,
    completions: CompletionQueueState,
}

/// Everything alive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectsState {
    devices: Vec<(u8, OriginState)>,
    regions: HandlesState<(RegionState, OriginState)>,
    eqs: Vec<EqState>,
    pairs: HandlesState<PairState>,
    /// vPort and doorbell page.
    bindings: Vec<(u32, u32)>,
    doorbell_pages: Vec<(u32, OriginState)>,
    pds: HandlesState<OriginState>,
}

/// Objects and their queues, checked.
pub struct Restored {
    objects: Objects,
    eqs: Vec<(u32, u32, EventQueue)>,
    pairs: Vec<RestoredPair>,
}

struct RestoredPair {
    is_send: bool,
    page: u32,
    tail: u32,
    work: WqObject,
    completions: CompletionQueue,
}

/// A GDMA device by number; the hardware channel is none that a driver registers.
fn device(number: u8) -> Result<Device, StateError> {
    match number {
        1 => Ok(Device::Mana),
        2 => Ok(Device::ManaIb),
        other => Err(impossible(format!("a registered device {other}"))),
    }
}

impl Objects {
    /// What is kept at `now_ns`.
    pub fn save(&self, card: &Card, now_ns: u64) -> ObjectsState {
        let Self { devices, regions, eqs, wqs, bindings, doorbell_pages, pds, pages: _ } = self;
        ObjectsState {
            devices: devices.iter().map(|(&device, &origin)| (device as u8, origin.into())).collect(),
            regions: regions.save(|object| Some((object.region.save(), object.origin.into()))),
            eqs: eqs.iter().filter_map(|(&id, eq)| save_eq(card, id, eq)).collect(),
            pairs: wqs.save(|pair| save_pair(card, pair, now_ns)),
            bindings: bindings.iter().map(|(&vport, binding)| (vport as u32, binding.page)).collect(),
            doorbell_pages: doorbell_pages.iter().map(|(&page, &origin)| (page, origin.into())).collect(),
            pds: pds.save(|pd| Some(pd.origin.into())),
        }
    }
    /// Become what was checked, with all queues, on a card that has none.
    pub fn load(card: &Card, restored: Restored) -> Self {
        let Restored { objects, eqs, pairs } = restored;
        for (id, page, eq) in eqs {
            card.queues.open_eq(id, page, eq);
        }
        for RestoredPair { is_send, page, tail, work, completions } in pairs {
            let (id, vport) = (work.id, work.vport);
            card.queues.open_cq(work.cq, page, completions);
            if is_send {
                card.queues.open_sq(page, work);
                card.queues.sq(id).into_iter().for_each(|slot| slot.load_tail(tail));
            } else {
                card.queues.open_rq(page, id, work.ring.entries());
                card.queues.rq(id).into_iter().for_each(|slot| slot.load_tail(tail));
                if let Some(vport) = card.vports.get(vport) {
                    vport.receive.open(work);
                }
            }
        }
        for &index in objects.bindings.keys() {
            card.vports.get(index).into_iter().for_each(|vport| vport.configure_tx(Some(index as u16)));
        }
        objects
    }
}

fn save_eq(card: &Card, id: u32, eq: &EqObject) -> Option<EqState> {
    let EqObject { device, pages, origin } = *eq;
    let doorbell_page = card.queues.eq(id)?.page()?;
    let queue = card.queues.save_eq(id)?;
    Some(EqState { id, device: device as u8, pages, origin: origin.into(), doorbell_page, queue })
}

fn save_pair(card: &Card, pair: &WqPair, now_ns: u64) -> Option<PairState> {
    let WqPair { kind, vport, wq, cq, pages, origin } = *pair;
    let queues = &card.queues;
    let (slot_page, tail, work) = match kind {
        WqKind::Send => {
            let slot = queues.sq(wq)?;
            (slot.page(), slot.tail(), slot.lock().as_ref().map(|wq| wq.save(now_ns)))
        }
        WqKind::Receive => {
            let slot = queues.rq(wq)?;
            let receive = &card.vports.get(vport)?.receive;
            (slot.page(), slot.tail(), receive.with_queue(wq, |wq| wq.save(now_ns)))
        }
    };
    Some(PairState {
        is_send: kind == WqKind::Send,
        vport: vport as u32,
        wq,
        cq,
        pages,
        origin: origin.into(),
        doorbell_page: slot_page?,
        tail,
        work: work?,
        completions: queues.save_cq(cq, now_ns)?,
    })
}

impl ObjectsState {
    /// Nothing at all.
    pub fn is_empty(&self) -> bool {
        let Self { devices, regions, eqs, pairs, bindings, doorbell_pages, pds } = self;
        devices.is_empty()
            && regions.slots.is_empty()
            && eqs.is_empty()
            && pairs.slots.is_empty()
            && bindings.is_empty()
            && doorbell_pages.is_empty()
            && pds.slots.is_empty()
    }
    /// Check everything, at `now_ns`; `moderated` are the completion queues whose deadline is among the timers.
    ///
    /// # Errors
    /// No driver could have made these objects.
    pub fn build(&self, card: &Card, moderated: &BTreeSet<u32>, now_ns: u64) -> Result<Restored, StateError> {
        let mut objects = Objects::new(card.queues.limits().wqs());
        for &(number, origin) in &self.devices {
            let device = device(number)?;
            let listed = device != Device::ManaIb || card.config.rdma;
            let fresh = objects.devices.insert(device, origin.into()).is_none();
            check(listed && fresh, || format!("{device:?} is not in the list, or registered twice"))?;
        }
        objects.regions = objects.regions.restored(&self.regions, |(region, origin)| {
            Ok(RegionObject { region: Region::restore(region)?, origin: (*origin).into() })
        })?;
        objects.pds = objects.pds.restored(&self.pds, |&origin| Ok(PdObject { origin: origin.into() }))?;
        self.build_pages(card, &mut objects)?;
        let eqs = self.eqs.iter().map(|eq| eq.build(card, &mut objects)).collect::<Result<_, _>>()?;
        let pairs = self.build_pairs(card, &mut objects, moderated, now_ns)?;
        let regions: u64 = objects.regions.iter().map(|object| u64::from(object.region.page_count())).sum();
        let queues = objects.eqs.values().map(|eq| eq.pages).chain(objects.wqs.iter().map(|pair| pair.pages));
        let pages = queues.fold(regions, |sum, pages| sum.saturating_add(pages.into()));
        let room = u32::try_from(pages).is_ok_and(|pages| objects.take_pages(pages));
        check(room, || format!("{pages} page addresses"))?;
        Ok(Restored { objects, eqs, pairs })
    }
    /// Doorbell pages, and the vPorts that are bound to one.
    fn build_pages(&self, card: &Card, objects: &mut Objects) -> Result<(), StateError> {
        for &(page, origin) in &self.doorbell_pages {
            let possible = (FIRST_FREE_PAGE..card.config.doorbell_pages.into()).contains(&page);
            let fresh = objects.doorbell_pages.insert(page, origin.into()).is_none();
            check(possible && fresh, || format!("allocated doorbell page {page}"))?;
        }
        for &(vport, page) in &self.bindings {
            check_page(&card.config, page)?;
            let known = (vport as usize) < card.vports.len();
            let fresh = objects.bindings.insert(vport as usize, Binding { page }).is_none();
            check(known && fresh && objects.devices.contains_key(&Device::Mana), || {
                format!("a binding of vPort {vport}")
            })?;
        }
        Ok(())
    }
    fn build_pairs(
        &self,
        card: &Card,
        objects: &mut Objects,
        moderated: &BTreeSet<u32>,
        now_ns: u64,
    ) -> Result<Vec<RestoredPair>, StateError> {
        let registered = objects.devices.contains_key(&Device::Mana);
        let mut restored = Vec::new();
        let mut ids = BTreeSet::new();
        let mut counts: BTreeMap<(bool, u32), u16> = BTreeMap::new();
        let wqs = Handles::new(objects.wqs.kind, objects.wqs.capacity);
        objects.wqs = wqs.restored(&self.pairs, |pair| {
            let once = ids.insert((Some(pair.is_send), pair.wq)) && ids.insert((None, pair.cq));
            check(registered && once, || {
                format!("{} queue {}", if pair.is_send { "send" } else { "receive" }, pair.wq)
            })?;
            let count = counts.entry((pair.is_send, pair.vport)).or_default();
            *count += 1;
            let limit = card.config.vports.get(pair.vport as usize).map_or(0, |vport| vport.max_queues);
            check(*count <= limit, || format!("{count} queues of vPort {}", pair.vport))?;
            let (object, pair) = pair.build(card, moderated.contains(&pair.cq), now_ns)?;
            restored.push(pair);
            Ok(object)
        })?;
        Ok(restored)
    }
}

impl EqState {
    fn build(&self, card: &Card, objects: &mut Objects) -> Result<(u32, u32, EventQueue), StateError> {
        let Self { id, device: number, pages, origin, doorbell_page, ref queue } = *self;
        check_id(id, card.queues.limits().eqs)?;
        check_page(&card.config, doorbell_page)?;
        let device = device(number)?;
        check(objects.devices.contains_key(&device), || format!("an EQ of {device:?}, not registered"))?;
        let queue = EventQueue::restore(queue, card.config.msix_table_size)?;
        check(queue.memory().page_addresses() <= pages as usize, || format!("EQ {id} has {pages} pages"))?;
        let object = EqObject { device, pages, origin: origin.into() };
        check(objects.eqs.insert(id, object).is_none(), || format!("EQ {id} is there twice"))?;
        Ok((id, doorbell_page, queue))
    }
}

impl PairState {
    fn build(&self, card: &Card, has_timer: bool, now_ns: u64) -> Result<(WqPair, RestoredPair), StateError> {
        let Self { is_send, vport, wq, cq, pages, origin, doorbell_page: page, tail, .. } = *self;
        let limits: queues::Limits = card.queues.limits();
        limits.check_pair(is_send, wq, cq)?;
        check_page(&card.config, page)?;
        let ring = if is_send { WorkQueue::restore_send } else { WorkQueue::restore_receive };
        let work = WqObject::restore(&self.work, (wq, cq, vport as usize), ring, now_ns)?;
        let completions = CompletionQueue::restore(&self.completions, limits, has_timer, now_ns)?;
        let kept = work.ring.memory().page_addresses() + completions.memory().page_addresses();
        check(kept <= pages as usize, || format!("work queue {wq} has {pages} pages"))?;
        let kind = if is_send { WqKind::Send } else { WqKind::Receive };
        let object = WqPair { kind, vport: vport as usize, wq, cq, pages, origin: origin.into() };
        Ok((object, RestoredPair { is_send, page, tail, work, completions }))
    }
}
