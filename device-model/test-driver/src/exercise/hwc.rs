//! Shared-memory requests and messages of the hardware channel, and the WQEs that carry them.
//!
//! A step begins with a byte that says in its low three bits what it is.

use arbitrary::{Result, Unstructured};

use super::machine::{CHANNEL, Machine};
use super::message::{self, HEADER, Message};
use super::model::MANA;
use super::ram::{PAGE, address};
use crate::gdma::code as gdma;
use crate::mana::code as mana;
use crate::queues::doorbell;
use crate::smc::Establish;

/// Every command: code, bytes of the request, bytes of the response.
pub const COMMANDS: [(u32, usize, u32); 27] = [
    (gdma::VERIFY_VF_DRIVER_VERSION, 640, 72),
    (gdma::QUERY_MAX_RESOURCES, 40, 72),
    (gdma::LIST_DEVICES, 40, 296),
    (gdma::REGISTER_DEVICE, 40, 44),
    (gdma::DEREGISTER_DEVICE, 40, 32),
    (gdma::GENERATE_TEST_EQE, 44, 32),
    (gdma::CREATE_QUEUE, 96, 36),
    (gdma::DISABLE_QUEUE, 52, 32),
    (gdma::ALLOCATE_RESOURCE_RANGE, 56, 36),
    (gdma::DESTROY_RESOURCE_RANGE, 52, 32),
    (gdma::CREATE_DMA_REGION, 72, 40),
    (gdma::DMA_REGION_ADD_PAGES, 64, 32),
    (gdma::DESTROY_DMA_REGION, 48, 32),
    (gdma::CREATE_PD, 48, 48),
    (gdma::DESTROY_PD, 48, 32),
    (gdma::QUERY_HWC_TIMEOUT, 48, 40),
    (mana::QUERY_DEV_CONFIG, 88, 80),
    (mana::QUERY_GF_STAT, 48, 256),
    (mana::CONFIG_VPORT_TX, 56, 36),
    (mana::CREATE_WQ_OBJ, 96, 56),
    (mana::DESTROY_WQ_OBJ, 56, 32),
    (mana::FENCE_RQ, 48, 32),
    (mana::CONFIG_VPORT_RX, 248, 40),
    (mana::QUERY_VPORT_CONFIG, 44, 64),
    (mana::QUERY_LINK_CONFIG, 48, 48),
    (mana::SET_BW_CLAMP, 56, 40),
    (mana::QUERY_PHY_STAT, 48, 440),
];

/// Play `input`.
///
/// # Panics
/// The card breaks a promise.
pub fn play(machine: &mut Machine, input: &[u8]) {
    machine.config_write(0x04, &[6, 0]);
    machine.config_write(0x52, &[0, 0x80]);
    machine.vector(0, 1, false);
    machine.open(0);
    // Only an input that has ended is an error, and that is no error.
    let _ = steps(machine, &mut Unstructured::new(input));
    machine.settle();
}

fn steps(machine: &mut Machine, input: &mut Unstructured<'_>) -> Result<()> {
    let mut room = PAGE as u32;
    while !input.is_empty() {
        let step: u8 = input.arbitrary()?;
        match step & 7 {
            0..=2 => known(machine, input, step, room)?,
            3 => raw(machine, input, room)?,
            4 => wqe(machine, input, step)?,
            5 => {
                let value: u32 = input.arbitrary()?;
                let register =
                    [doorbell::SQ, doorbell::RQ, doorbell::CQ, doorbell::EQ][usize::from(step >> 3 & 3)];
                machine.model.lose(&mut machine.ram);
                machine.ring(u32::from(step >> 5 & 1), register, u64::from(value) << 32);
                machine.settle();
            }
            6 => window(machine, input, step)?,
            _ => match step >> 3 {
                0 => machine.take_events(),
                1 => machine.config_write(0x04, &[2, 0]),
                2 => machine.config_write(0x04, &[6, 0]),
                _ => room = u32::from(input.arbitrary::<u16>()? & 0x1fff),
            },
        }
    }
    Ok(())
}

/// A command with a header as it should be, and any body: at most 48 bytes of it, or what a legal one holds.
fn known(machine: &mut Machine, input: &mut Unstructured<'_>, step: u8, room: u32) -> Result<()> {
    let which = usize::from(input.arbitrary::<u8>()?) % COMMANDS.len();
    let (code, len, answer) = COMMANDS[which];
    let device = if code > 0xffff { MANA } else { u16::from(step >> 3 & 3) };
    let mut message = match step & 7 {
        // Objects of the right kind, whatever they are.
        2 => legal(machine, input, code)?,
        _ => Message::new(code, device, len, answer, u16::from(step >> 5)),
    };
    if step & 7 == 1 {
        let mut body = [0; 48];
        let body = &mut body[..(len - HEADER).min(48)];
        input.fill_buffer(body)?;
        message.put(HEADER, body);
    }
    if step & 0x80 != 0 {
        let (at, bits): (u8, u8) = (input.arbitrary()?, input.arbitrary()?);
        message.flip(at.into(), bits);
    }
    machine.command_into(message.bytes(), room);
    Ok(())
}

/// A command that fits what there is.
fn legal(machine: &Machine, input: &mut Unstructured<'_>, code: u32) -> Result<Message> {
    let (pick, page): (u8, u8) = (input.arbitrary()?, input.arbitrary()?);
    let (pick, page) = (usize::from(pick), usize::from(page));
    let model = &machine.model;
    let region = |pick: usize| match model.regions.len() {
        0 => 0,
        len => model.regions[pick % len].handle,
    };
    let eq = model.eqs.get(pick % model.eqs.len().max(1)).map_or(1, |eq| eq.id);
    let wq = model.wqs.get(pick % model.wqs.len().max(1)).map_or((true, 0), |wq| (wq.is_send, wq.handle));
    Ok(match code {
        gdma::CREATE_DMA_REGION => {
            let mut pages = [address(6 + page), address(7 + page), address(8 + page)];
            let pages = &mut pages[..1 + pick % 3];
            // In their order, so that a ring is one piece, or not.
            if pick & 0x80 != 0 {
                pages.reverse();
            }
            message::create_region(pages, 1 + pick / 3 % 3)
        }
        gdma::DMA_REGION_ADD_PAGES => message::add_pages(region(pick), &[address(page)]),
        gdma::DESTROY_DMA_REGION => message::of_one(code, 0, region(pick), 32),
        gdma::CREATE_QUEUE => {
            // Small ones are full soon.
            let size = [4096, 64, 16, 8192][page >> 4 & 3];
            message::create_eq(MANA, region(pick), 1, size, page as u32 & 15)
        }
        gdma::DISABLE_QUEUE => message::disable_eq(MANA, eq),
        gdma::DESTROY_PD => message::of_one(code, 0, model.pds.first().copied().unwrap_or(0), 32),
        mana::CONFIG_VPORT_TX => message::config_tx(pick as u32 & 1, 2, 1),
        mana::CREATE_WQ_OBJ => {
            let regions = [region(pick), region(pick + 1)];
            let sizes = if page & 0x80 == 0 { [1024, 2048] } else { [8192, 6400] };
            message::create_wq(page as u32 & 1, page & 2 == 0, regions, sizes, eq)
        }
        mana::DESTROY_WQ_OBJ => message::destroy_wq(wq.0, wq.1),
        mana::FENCE_RQ => message::of_one(code, MANA, wq.1, 32),
        mana::CONFIG_VPORT_RX => {
            message::config_rx(page as u32 & 1, true, true, &[wq.1], 16, page as u8 >> 6)
        }
        mana::SET_BW_CLAMP => *Message::new(code, MANA, 56, 40, 1)
            .u64(40, message::vport(0))
            .u32(48, 1)
            .u32(52, 100 * pick as u32),
        _ => message::register(MANA),
    })
}

/// A message of any bytes.
fn raw(machine: &mut Machine, input: &mut Unstructured<'_>, room: u32) -> Result<()> {
    let len = usize::from(input.arbitrary::<u16>()?) % (PAGE + 32);
    let mut bytes = [0; PAGE + 32];
    let there = len.min(input.len());
    input.fill_buffer(&mut bytes[..there])?;
    machine.command_into(&bytes[..len], room);
    Ok(())
}

/// A WQE of any bytes: the account is lost.
fn wqe(machine: &mut Machine, input: &mut Unstructured<'_>, step: u8) -> Result<()> {
    machine.model.lose(&mut machine.ram);
    let mut bytes = [0; 64];
    input.fill_buffer(&mut bytes)?;
    if step & 8 != 0 {
        // At least the key is right, and the addresses are RAM.
        for at in (16..64).step_by(16) {
            let start = address(bytes[at].into()) + u64::from(bytes[at + 1]);
            bytes[at..at + 8].copy_from_slice(&start.to_le_bytes());
            bytes[at + 8..at + 12].copy_from_slice(&machine.channel.key.to_le_bytes());
        }
    }
    let (page, register) = if step & 16 == 0 { (3, doorbell::SQ) } else { (2, doorbell::RQ) };
    let channel = &mut machine.channel;
    let tail = if step & 16 == 0 { &mut channel.sq_tail } else { &mut channel.rq_tail };
    let at = address(CHANNEL[page]) + u64::from(*tail) % PAGE as u64;
    *tail = tail.wrapping_add(if step & 32 == 0 { 64 } else { 32 });
    let value = u64::from(*tail) << 32;
    machine.ram.write(at, &bytes);
    machine.ring(0, register, value);
    machine.settle();
    Ok(())
}

/// The shared-memory window: a new channel, legal or not, or the end of one.
fn window(machine: &mut Machine, input: &mut Unstructured<'_>, step: u8) -> Result<()> {
    match step >> 3 & 3 {
        0 => machine.close(),
        1 => {
            machine.open(u16::from(step >> 5));
        }
        2 => {
            let [mut eq, mut cq, rq, sq] = CHANNEL.map(address);
            let (page, high): (u8, u8) = (input.arbitrary()?, input.arbitrary()?);
            let wild = if high & 1 == 0 { address(page.into()) } else { u64::from(high) << 56 };
            *(if step & 0x20 == 0 { &mut eq } else { &mut cq }) = wild;
            machine.establish(&Establish { eq, cq, rq, sq, msix: u16::from(high >> 1) });
        }
        _ => {
            let value: u32 = input.arbitrary()?;
            machine.bar_write(0, 0x5c, &value.to_le_bytes());
        }
    }
    Ok(())
}
