//! Steps of a driver, most of them legal: a grammar that gets past the bootstrap and deep into the queues, where the
//! state of things and not a single field is what surprises a card.
//!
//! The first byte says how far the driver is already: power-on, channel, port open. Each step is a byte that says which
//! one it is, and what the step reads. Steps whose objects don't exist do nothing.

use std::sync::LazyLock;

use arbitrary::{Result, Unstructured};
use mana_device::config::TxPolicy;
use mana_device::doors::{RxChecksum, RxFrame, Work};

use super::doors::VECTORS;
use super::machine::{FREE, Machine, VPORTS, sge};
use super::message::{self, Message};
use super::model::{MANA, Wq};
use super::port::{BUFFERS, CQ, Registration, WQ};
use super::queues::buffer;
use super::ram::{PAGE, address};
use crate::gdma::code as gdma;
use crate::mana::code as mana;
use crate::packet::{Flow, Protocol, tagged};
use crate::queues::doorbell;

/// Steps: the byte is taken modulo this.
pub const STEPS: u8 = 32;

/// Play `input`.
///
/// # Panics
/// The card breaks a promise.
pub fn play(machine: &mut Machine, input: &[u8]) {
    let mut input = Unstructured::new(input);
    let first: u8 = input.arbitrary().unwrap_or_default();
    let mut driver = Driver {
        machine,
        registration: Registration { pd: 2, key: 0x200, page: 1 },
        port: u32::from(first >> 2 & 1),
        lazy: false,
    };
    match first & 3 {
        0 => {}
        1 => {
            driver.machine.enable();
            driver.machine.open(u16::from(first >> 4));
        }
        _ => driver.registration = driver.machine.bring_up(driver.port),
    }
    while !input.is_empty() {
        // Only an input that has ended is an error, and that is no error.
        let _ = driver.step(&mut input);
        if !driver.lazy {
            driver.machine.settle();
        }
        driver.machine.check_pending();
    }
    let Driver { machine, registration, .. } = driver;
    machine.settle();
    machine.reap_all(registration.page);
    machine.model.compare(&machine.device.ledger());
}

/// A driver on the machine.
struct Driver<'a> {
    machine: &'a mut Machine,
    registration: Registration,
    port: u32,
    /// The card is run only when a step says so.
    lazy: bool,
}

impl Driver<'_> {
    fn step(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let step = input.arbitrary::<u8>()? % STEPS;
        match step {
            0 => self.send(input)?,
            1 => self.send_large(input)?,
            2 => self.post_buffers(input)?,
            3 => self.deliver(input)?,
            4 => self.reap(input)?,
            5 => self.machine.pass(u64::from(input.arbitrary::<u16>()?) << 8),
            6 => self.machine.take_events(),
            7 => self.vector(input)?,
            8 => self.message_control(input)?,
            9 => self.bus_master(input)?,
            10 => self.lazy = input.arbitrary()?,
            11 => self.run(input)?,
            12 => self.moderate(input)?,
            13 => self.events(input)?,
            14 => self.policy(input)?,
            15 => self.machine.cables[self.port as usize].fill(input.arbitrary()?),
            16 => self.port = u32::from(input.arbitrary::<bool>()?),
            17 => self.channel(input)?,
            18 => self.reset(input)?,
            19 => self.wild_doorbell(input)?,
            20 => self.poke(input)?,
            _ => {
                if let Some(message) = self.message(step, input)? {
                    self.send_message(message, input)?;
                }
            }
        }
        Ok(())
    }

    /// The queue that a byte picks among those of a direction.
    fn pick(&self, pick: u8, is_send: bool) -> Option<usize> {
        let of_kind = |(index, wq): (usize, &Wq)| (wq.is_send == is_send).then_some(index);
        let mut found = self.machine.model.wqs.iter().enumerate().filter_map(of_kind);
        let count = self.machine.model.wqs.iter().filter(|wq| wq.is_send == is_send).count();
        found.nth(usize::from(pick) % count.max(1))
    }
    /// A send WQE with `entries` and the flags of the second dword.
    fn wqe(&self, wq: &Wq, flags: u8, counts: u32, entries: &[(u64, u32)]) -> ([u8; 128], usize) {
        let mut wqe = [0; 128];
        wqe[4..8].copy_from_slice(&(entries.len() as u32 | 2 << 8 | counts).to_le_bytes());
        wqe[8] = flags & !3;
        wqe[9..12].copy_from_slice(&wq.cq.to_le_bytes()[..3]);
        wqe[15] = self.port as u8;
        for (entry, at) in entries.iter().zip((16..).step_by(16)) {
            wqe[at..at + 16].copy_from_slice(&sge(entry.0, self.registration.key, entry.1));
        }
        (wqe, (16 + 16 * entries.len()).next_multiple_of(32))
    }
    /// A frame in one buffer or two, as a driver sends it, and perhaps one wrong byte in the WQE.
    fn send(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let (pick, flags, kind, len): (u8, u8, u8, u16) =
            (input.arbitrary()?, input.arbitrary()?, input.arbitrary()?, input.arbitrary()?);
        let Some(index) = self.pick(pick, true) else { return Ok(()) };
        let frame = FRAMES[usize::from(kind)].as_slice();
        let (at, size) = (buffer(pick >> 4, u16::from(kind) << 4), frame.len());
        self.machine.ram.write(at, frame);
        let (len, wq) = (u32::from(len) % 1600, self.machine.model.wqs[index]);
        let both = [(at, size as u32), (buffer(kind, len as u16), len)];
        let entries = if pick & 8 == 0 { &both[..1] } else { &both[..] };
        let (mut wqe, used) = self.wqe(&wq, flags, 0, entries);
        // The transport header, where the driver says so.
        wqe[12] = if flags & 0x20 != 0 { 34 } else { 0 };
        self.flip(input, &mut wqe[..used])?;
        self.machine.post_wqe(index, &wqe[..used]);
        self.machine.ring_wq(index, self.registration.page);
        Ok(())
    }
    /// A TCP super-frame: headers in the first entry, payload in others.
    fn send_large(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let (pick, mss, len): (u8, u16, u16) = (input.arbitrary()?, input.arbitrary()?, input.arbitrary()?);
        let Some(index) = self.pick(pick, true) else { return Ok(()) };
        let v6 = pick & 0x10 != 0;
        let headers = &FRAMES[if v6 { 3 } else { 1 }];
        let size = if v6 { 74 } else { 54 };
        let at = buffer(pick >> 5, 0);
        self.machine.ram.write(at, &headers[..size]);
        let wq = self.machine.model.wqs[index];
        let payload = (buffer(pick >> 5, 128), u32::from(len) % 9000);
        let entries = [(at, size as u32), payload, payload, payload];
        let counts = 1 << 11 | u32::from(mss & 0x7ff | 0x40) << 16;
        let flags = 1 << 5 | if v6 { 1 << 3 } else { 1 << 2 | 1 << 4 };
        let (mut wqe, used) = self.wqe(&wq, flags, counts, &entries[..2 + usize::from(pick >> 6 & 1)]);
        wqe[12] = if v6 { 54 } else { 34 };
        self.flip(input, &mut wqe[..used])?;
        self.machine.post_wqe(index, &wqe[..used]);
        self.machine.ring_wq(index, self.registration.page);
        Ok(())
    }
    /// Now and then a WQE has one wrong byte.
    fn flip(&self, input: &mut Unstructured<'_>, wqe: &mut [u8]) -> Result<()> {
        let (at, bits): (u8, u8) = (input.arbitrary()?, input.arbitrary()?);
        if at & 0x80 != 0 {
            wqe[usize::from(at & 0x7f) % wqe.len()] ^= bits;
        }
        Ok(())
    }
    fn post_buffers(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let (pick, count, len): (u8, u8, u16) = (input.arbitrary()?, input.arbitrary()?, input.arbitrary()?);
        let Some(index) = self.pick(pick, false) else { return Ok(()) };
        let key = if count & 0x80 == 0 { self.registration.key } else { 0x100 };
        for number in 0..=count & 7 {
            let start = buffer(number, u16::from(count & 0x70) << 4);
            self.machine.post_buffer(index, start, key, u32::from(len) % 4000);
        }
        self.machine.ring_wq(index, self.registration.page);
        Ok(())
    }
    fn deliver(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let (kind, count): (u8, u8) = (input.arbitrary()?, input.arbitrary()?);
        let checksum = if count & 0x80 == 0 { RxChecksum::Unknown } else { RxChecksum::Valid };
        let frames = [RxFrame { bytes: &FRAMES[usize::from(kind)], checksum }; 8];
        self.machine.deliver(self.port as usize, &frames[..=usize::from(count & 7)]);
        Ok(())
    }
    fn reap(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let pick: u8 = input.arbitrary()?;
        let count = self.machine.model.wqs.len();
        if count > 0 {
            self.machine.reap_wq(usize::from(pick >> 1) % count, self.registration.page, pick & 1 != 0);
        }
        Ok(())
    }
    fn vector(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let (vector, data): (u8, u8) = (input.arbitrary()?, input.arbitrary()?);
        let masked = vector & 0x80 != 0;
        if vector & 0x40 == 0 {
            self.machine.vector(u16::from(vector) % VECTORS as u16, data.into(), masked);
        } else {
            let at = u64::from(vector) % VECTORS as u64 * 16 + 12;
            self.machine.bar_write(super::machine::MSIX_BAR, at, &u32::from(masked).to_le_bytes());
        }
        Ok(())
    }
    fn message_control(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let high: u8 = input.arbitrary()?;
        self.machine.config_write(0x52, &[0, high & 0xc0]);
        Ok(())
    }
    /// What is under way when bus mastering ends may be done later, when nobody looks.
    fn bus_master(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let on: bool = input.arbitrary()?;
        self.machine.config_write(0x04, &[2 | u8::from(on) << 2, 0]);
        Ok(())
    }
    fn run(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let what: u8 = input.arbitrary()?;
        let work = match what & 15 {
            0 => Work::Hwc,
            15 => Work::Timers,
            sq => Work::Transmit { sq: sq.into() },
        };
        self.machine.run(work, usize::from(what >> 4));
        Ok(())
    }
    fn moderate(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let (pick, high): (u8, u32) = (input.arbitrary()?, input.arbitrary()?);
        let count = self.machine.model.wqs.len();
        if count > 0 {
            let cq = self.machine.model.wqs[usize::from(pick) % count].cq;
            let value = u64::from(cq) | u64::from(high) << 32;
            self.machine.ring(self.registration.page, doorbell::CQ_MODERATION, value);
        }
        Ok(())
    }
    /// A doorbell of an event queue: any tail may be right.
    fn events(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let (pick, tail): (u8, u16) = (input.arbitrary()?, input.arbitrary()?);
        let count = self.machine.model.eqs.len();
        if count > 0 {
            let eq = self.machine.model.eqs[usize::from(pick >> 1) % count];
            let tail = u64::from(tail) % u64::from(8 * eq.entries.max(1));
            let value = u64::from(eq.id) | tail << 32 | u64::from(pick & 1) << 63;
            self.machine.ring(self.registration.page, doorbell::EQ, value);
        }
        Ok(())
    }
    fn policy(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let [disabled, own_source_only, ip_only, untagged_only] = input.arbitrary()?;
        let policy = TxPolicy { disabled, own_source_only, ip_only, untagged_only };
        assert!(self.machine.device.set_tx_policy(self.port as usize, policy), "the port is there");
        Ok(())
    }
    /// The channel ends, or begins anew.
    fn channel(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let what: u8 = input.arbitrary()?;
        // Requests that were never read are gone with it.
        match what & 3 {
            0 => self.machine.close(),
            1 => self.machine.enable(),
            _ => {
                self.machine.open(u16::from(what >> 3));
            }
        }
        Ok(())
    }
    /// A reset, after which the driver is as far as the byte says; or the card is saved and restored under its feet.
    fn reset(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let what = input.arbitrary::<u8>()? & 3;
        if what == 3 {
            self.machine.reload();
            return Ok(());
        }
        self.machine.config_write(0x68, &[0, 0x80]);
        match what {
            0 => {}
            1 => self.machine.enable(),
            _ => self.registration = self.machine.bring_up(self.port),
        }
        Ok(())
    }
    fn wild_doorbell(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let (place, id, tail): (u8, u8, u32) = (input.arbitrary()?, input.arbitrary()?, input.arbitrary()?);
        let registers = [doorbell::SQ, doorbell::RQ, doorbell::CQ, doorbell::EQ];
        if id & 0x0f == 0 {
            // The channel's own queues: what is answered now is anybody's guess.
            self.machine.model.lose(&mut self.machine.ram);
        }
        self.machine.model.wqs.iter_mut().for_each(|wq| wq.asked = u64::MAX / 2);
        let register = registers[usize::from(place & 3)];
        self.machine.ring(u32::from(place >> 6), register, u64::from(id & 0x0f) | u64::from(tail) << 32);
        Ok(())
    }
    /// The guest scribbles over memory, its own rings included.
    fn poke(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let (page, at, value): (u8, u16, u64) = (input.arbitrary()?, input.arbitrary()?, input.arbitrary()?);
        let start = address(page.into()) + u64::from(at) % (PAGE as u64 - 7);
        self.machine.model.poke(&mut self.machine.ram, &(start..start + 8));
        self.machine.ram.write(start, &value.to_le_bytes());
        Ok(())
    }

    /// A command that fits what there is.
    fn message(&mut self, step: u8, input: &mut Unstructured<'_>) -> Result<Option<Message>> {
        let (pick, page): (u8, u8) = (input.arbitrary()?, input.arbitrary()?);
        let (index, place) = (usize::from(pick), usize::from(page));
        let Machine { model, ram, .. } = &mut *self.machine;
        let Registration { pd, page: doorbells, .. } = self.registration;
        let wq = (!model.wqs.is_empty()).then(|| model.wqs[index % model.wqs.len()]);
        let eq = (!model.eqs.is_empty()).then(|| model.eqs[index % model.eqs.len()].id);
        let device = if page & 0xc0 == 0xc0 { 3 } else { MANA };
        Ok(match step {
            21 => {
                let count = 1 + index % 3;
                let pages: [u64; 3] =
                    std::array::from_fn(|more| address(FREE + (place + more) % (BUFFERS - FREE)));
                if !pages.iter().any(|&page| ram.is_granted(&(page..page + PAGE as u64))) {
                    pages.iter().take(count).for_each(|&page| ram.clear(page));
                }
                // In their order, so that a ring is one piece, or not.
                let mut pages = pages;
                if pick & 0x80 != 0 {
                    pages[..count].reverse();
                }
                Some(message::create_region(&pages[..count], 1 + index / 3 % count))
            }
            22 => {
                let region = model.regions.get(index % model.regions.len().max(1));
                let page = address(FREE + place % (BUFFERS - FREE));
                region.map(|region| message::add_pages(region.handle, &[page]))
            }
            23 => {
                let region = model.regions.get(index % model.regions.len().max(1));
                // Small ones are full soon.
                let size = [4096, 64, 16, 8192][place >> 4 & 3];
                region.map(|region| {
                    message::create_eq(device, region.handle, doorbells, size, u32::from(page) & 15)
                })
            }
            24 => {
                let regions: Vec<u64> = model.regions.iter().rev().map(|region| region.handle).collect();
                let (size, eq) = ([WQ, 4096, 512, 8192][place >> 5 & 3], eq.unwrap_or(1));
                (regions.len() > 1).then(|| {
                    let regions = [regions[index % regions.len()], regions[(index + 1) % regions.len()]];
                    let cq = if page & 0x10 == 0 { CQ } else { 64 * (1 + index as u32 % 64) };
                    let mut message = message::create_wq(self.port, page & 1 == 0, regions, [size, cq], eq);
                    *message.put(89, &[page >> 1 & 1, page & 15, 0, page, 0])
                })
            }
            25 => wq.map(|wq| message::destroy_wq(wq.is_send, wq.handle)),
            26 => eq.map(|eq| message::disable_eq(device, eq)),
            27 => wq.map(|wq| message::of_one(mana::FENCE_RQ, MANA, wq.handle, 32)),
            28 => Some(message::config_tx(self.port, pd, doorbells)),
            29 => {
                let queues: Vec<u64> =
                    model.wqs.iter().filter(|wq| !wq.is_send).map(|wq| wq.handle).collect();
                let table = [1, 2, 16, 32][place >> 6];
                let (on, rss) = (pick & 1 == 0, pick & 2 != 0);
                let steering = message::config_rx(self.port, on, rss, &queues, table, pick >> 2 & 3);
                Some(if pick & 0x10 != 0 { message::with_key(steering) } else { steering })
            }
            30 => {
                let mbps = u32::from(page & 15) * 100;
                let mut message = Message::new(mana::SET_BW_CLAMP, MANA, 56, 40, 1);
                Some(*message.u64(40, message::vport(self.port)).u32(48, u32::from(pick & 1)).u32(52, mbps))
            }
            _ => self.other_message(pick, page),
        })
    }
    /// Commands that are rarer, and those that only ask.
    fn other_message(&mut self, pick: u8, page: u8) -> Option<Message> {
        let Machine { model, .. } = &*self.machine;
        let device = if page & 0xc0 == 0xc0 { 3 } else { MANA };
        let range = |code, answer, count, at, first| {
            *Message::new(code, MANA, 56, answer, 1).u32(40, 27).u32(44, count).u32(at, first)
        };
        let region = model.regions.first().map_or(0, |region| region.handle);
        let count = u32::from(page & 3);
        Some(match pick & 15 {
            0 => message::register(device),
            1 => message::deregister(device),
            2 => message::of_one(gdma::DESTROY_DMA_REGION, 0, region, 32),
            3 => message::of_one(gdma::CREATE_PD, 0, 0, 48),
            4 => message::of_one(gdma::DESTROY_PD, 0, *model.pds.first()?, 32),
            5 => range(gdma::ALLOCATE_RESOURCE_RANGE, 36, count, 48, 1),
            6 => range(gdma::DESTROY_RESOURCE_RANGE, 32, count, 48, 3 + u32::from(page >> 2 & 7)),
            7 => {
                let eq = model.eqs.first().map_or(0, |eq| eq.id);
                let device = if eq == 0 { 1 } else { MANA };
                *Message::new(gdma::GENERATE_TEST_EQE, device, 44, 32, 1).u32(40, eq)
            }
            8 => message::of_one(mana::QUERY_GF_STAT, MANA, u64::MAX, 256),
            9 => message::of_one(mana::QUERY_LINK_CONFIG, MANA, message::vport(self.port), 48),
            10 => message::of_one(mana::QUERY_PHY_STAT, MANA, u64::MAX, 440),
            11 => *Message::new(mana::QUERY_VPORT_CONFIG, MANA, 44, 64, 1)
                .u32(40, u32::from(page) % (VPORTS as u32 + 1)),
            12 => Message::new(mana::QUERY_DEV_CONFIG, MANA, 88, 80, 1 + u16::from(page & 3)),
            13 => Message::new(gdma::QUERY_MAX_RESOURCES, 0, 40, 72, 1),
            14 => Message::new(gdma::LIST_DEVICES, 0, 40, 296, 1),
            _ => *Message::new(gdma::VERIFY_VF_DRIVER_VERSION, 0, 640, 72, 1)
                .u64(40, 1)
                .u64(48, 1)
                .u64(56, 1 << 28),
        })
    }
    /// Send a command, with a wrong byte, a wrong length or too small a buffer if the next byte says so.
    fn send_message(&mut self, mut message: Message, input: &mut Unstructured<'_>) -> Result<()> {
        let mut room = PAGE as u32;
        match input.arbitrary::<u8>()? {
            0xf0.. => {
                let (at, bits): (u8, u8) = (input.arbitrary()?, input.arbitrary()?);
                message.flip(at.into(), bits);
            }
            0xee..=0xef => {
                message.cut(usize::from(input.arbitrary::<u8>()?));
            }
            0xec..=0xed => room = input.arbitrary::<u8>()?.into(),
            _ => {}
        }
        self.machine.command_into(message.bytes(), room);
        Ok(())
    }
}

/// Every frame that a byte can ask for: making one takes longer than a step.
static FRAMES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| (0..=u8::MAX).map(make_frame).collect());

fn make_frame(kind: u8) -> Vec<u8> {
    let number = u16::from(kind >> 5);
    let flow = if kind & 2 == 0 { Flow::v4([2; 6], number) } else { Flow::v6([2; 6], number) };
    let protocol = if kind & 1 == 0 { Protocol::Udp } else { Protocol::Tcp };
    let bytes = flow.frame(protocol, &[7; 40][..usize::from(kind >> 3 & 3) * 12]);
    if kind & 4 == 0 { bytes } else { tagged(&bytes, 0x6123) }
}
