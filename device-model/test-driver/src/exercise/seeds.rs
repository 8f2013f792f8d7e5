//! What the fuzz targets start from: what the in-process driver did to its card, and kernels' own drivers in traces of
//! their boots, step by step, written down as their inputs. The card's own events tell.

use std::collections::BTreeSet;

use mana_device::config::{DeviceConfig, VportConfig};
use mana_device::observe::{Event, QueueKind};

use super::Machine;
use super::hwc::COMMANDS;
use super::message::Message;
use crate::gdma::code as gdma;
use crate::mana::code as mana;
use crate::packet::{Flow, Protocol, tagged};
use crate::{Driver, Generation, V6_1, V6_12, V7_3, World};

/// Kernels whose drivers are recorded.
const GENERATIONS: [(&str, &Generation); 3] = [("6.1", &V6_1), ("6.12", &V6_12), ("7.3", &V7_3)];

/// An input: its target, its name, its bytes.
pub type Seed = (&'static str, String, Vec<u8>);

/// All of them.
///
/// # Panics
/// The driver does not load.
pub fn seeds() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for (name, generation) in GENERATIONS {
        seeds.extend(of(name, &record(generation)));
    }
    seeds.extend(traffic());
    seeds.extend(states());
    seeds
}

/// What `events` tell of a driver's life, as inputs of this `name`.
pub fn of(name: &str, events: &[Event]) -> Vec<Seed> {
    let life = [vec![0, 17, 1, 17, 2], events.iter().flat_map(device).collect()].concat();
    vec![
        ("config", name.to_owned(), events.iter().flat_map(config).collect()),
        ("bar0", name.to_owned(), events.iter().flat_map(bar0).collect()),
        ("hwc", name.to_owned(), events.iter().flat_map(hwc).collect()),
        ("device", name.to_owned(), life),
    ]
}

/// States of a card: new, with a channel, with a port that has buffers and frames under way.
fn states() -> Vec<Seed> {
    let mut machine = Machine::new();
    let mut seeds = Vec::new();
    let mut save = |machine: &Machine, name: &str, first: u8| {
        let bytes = machine.device.save().to_bytes().expect("a state has its bytes");
        seeds.push(("restore", name.to_owned(), [&[first], &bytes[super::restore::PREFIX..]].concat()));
    };
    save(&machine, "power-on", 0);
    machine.enable();
    machine.open(0);
    save(&machine, "channel", 1);
    machine.end();
    // Whatever the counters of a machine were, those of a seed are the same.
    machine.power_on();
    let registration = machine.bring_up(0);
    for index in [1, 3] {
        machine.post_buffer(index, super::queues::buffer(0, 0), registration.key, 2048);
        machine.ring_wq(index, registration.page);
    }
    save(&machine, "port", 0);
    machine.ring(registration.page, crate::queues::doorbell::CQ_MODERATION, 2 | 0x8800 << 32);
    let clamp = Message::new(mana::SET_BW_CLAMP, 2, 56, 40, 1);
    machine.command({ clamp }.u64(40, super::message::vport(0)).u32(48, 1).u32(52, 100).bytes());
    let frame = Flow::v4([2, 0, 0, 0, 0, 1], 3).frame(Protocol::Udp, &[7; 40]);
    let frame = mana_device::doors::RxFrame { bytes: &frame, checksum: Default::default() };
    machine.deliver(0, &[frame; 2]);
    save(&machine, "traffic", 0x45);
    seeds
}

/// From probe to remove, with the port up in between.
fn record(generation: &'static Generation) -> Vec<Event> {
    let vports = vec![VportConfig { mac: [2, 0, 0, 0, 0, 1], max_queues: 4 }];
    let world = World::new(DeviceConfig { vports, ..DeviceConfig::default() }, 2);
    world.recorder.start();
    let mut driver = Driver::probe(&world, generation).expect("the driver loads");
    driver.ifup(0).expect("the port comes up");
    driver.remove().expect("the driver unloads");
    world.recorder.events()
}

fn config(event: &Event) -> Vec<u8> {
    let write = |step: u8, offset: u16, data: &[u8]| [&[step][..], &offset.to_le_bytes(), data].concat();
    let control = |vector: u16, value: u32| write(4 | 2 << 3, vector % 16 * 16 + 12, &value.to_le_bytes());
    match *event {
        Event::PciCommand { memory, bus_master } => {
            let command = u8::from(memory) << 1 | u8::from(bus_master) << 2;
            vec![1 | 1 << 3, command, 0]
        }
        Event::MsixEnable { .. } => vec![1 | 1 << 3 | 5 << 5, 0, 0x80],
        Event::MsixDisable { .. } => vec![1 | 1 << 3 | 5 << 5, 0, 0],
        Event::MsixProgram { vector, address, data } => [
            write(4 | 3 << 3, vector % 16 * 16, &address.to_le_bytes()),
            write(4 | 2 << 3, vector % 16 * 16 + 8, &data.to_le_bytes()),
        ]
        .concat(),
        Event::MsixMask { vector } => control(vector, 1),
        Event::MsixUnmask { vector } => control(vector, 0),
        Event::SmcRequest { .. } => vec![5],
        Event::MsixFire { .. } => vec![6],
        _ => Vec::new(),
    }
}

fn bar0(event: &Event) -> Vec<u8> {
    let doorbell = |register: u8, page: u8, id: u32, tail: u32| {
        let value = u64::from(id) | u64::from(tail) << 32;
        [&[3 << 1 | 2 << 3, page << 3 | register][..], &value.to_le_bytes()].concat()
    };
    match *event {
        Event::RegRead { offset, size, .. } => {
            let size = size.trailing_zeros() as u8;
            vec![1 | size << 1, offset as u8]
        }
        Event::SmcRequest { kind: "ESTABLISH_HWC" } => vec![6 << 3],
        Event::SmcRequest { .. } => vec![2 << 1 | 1 << 3, 0x1c, 2, 0, 0, 0],
        Event::HwcRequest { seq, .. } => {
            let posted = seq as u32 * 32;
            let rings = [doorbell(1, 0, 0, posted), doorbell(0, 0, 0, 2 * posted), vec![7 << 3]];
            [rings.concat(), doorbell(3, 0, 0, 1 << 31 | (64 + 2 * seq as u32)), doorbell(5, 0, 0, 1 << 31)]
                .concat()
        }
        Event::QueueCreate { kind: QueueKind::Cq, id, .. } => doorbell(3, 1, id, 1 << 31),
        _ => Vec::new(),
    }
}

fn hwc(event: &Event) -> Vec<u8> {
    match *event {
        Event::HwcRequest { code, .. } => {
            let index = COMMANDS.iter().position(|&(known, ..)| known == code).unwrap_or_default();
            // Of what there is, first what was made first.
            vec![2 | 2 << 3 | 1 << 5, index as u8, 0, index as u8]
        }
        Event::SmcRequest { kind: "DESTROY_HWC" } => vec![6],
        Event::MsixFire { .. } => vec![7],
        _ => Vec::new(),
    }
}

/// The step of the structured target for a command, and what it picks.
fn device(event: &Event) -> Vec<u8> {
    let plain = |step: u8, pick: u8, page: u8| vec![step, pick, page, 0];
    match *event {
        Event::HwcRequest { code, seq, .. } => {
            let page = seq as u8;
            match code {
                gdma::CREATE_DMA_REGION => plain(21, 0, page),
                gdma::CREATE_QUEUE => plain(23, 0, page & 0x0f),
                mana::CREATE_WQ_OBJ => plain(24, 1, page & 1),
                mana::DESTROY_WQ_OBJ => plain(25, 0, 0),
                gdma::DISABLE_QUEUE => plain(26, 0, 0),
                mana::FENCE_RQ => plain(27, 1, 0),
                mana::CONFIG_VPORT_TX => plain(28, 0, 0),
                mana::CONFIG_VPORT_RX => plain(29, 0x10 | 2, 0x80),
                gdma::REGISTER_DEVICE => plain(31, 0, 0),
                gdma::DEREGISTER_DEVICE => plain(31, 1, 0),
                mana::QUERY_VPORT_CONFIG => plain(31, 11, 0),
                mana::QUERY_DEV_CONFIG => plain(31, 12, 2),
                gdma::QUERY_MAX_RESOURCES => plain(31, 13, 0),
                gdma::LIST_DEVICES => plain(31, 14, 0),
                gdma::GENERATE_TEST_EQE => plain(31, 7, 0),
                _ => plain(31, 15, 0),
            }
        }
        Event::SmcRequest { kind: "DESTROY_HWC" } => vec![17, 0],
        Event::MsixFire { .. } => vec![6],
        _ => Vec::new(),
    }
}

/// Packets in both directions on a port that is open.
fn traffic() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for (family, flow) in [("v4", Flow::v4([2, 0, 0, 0, 0, 1], 3)), ("v6", Flow::v6([2, 0, 0, 0, 0, 1], 3))] {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let name = format!("{family}-{protocol:?}").to_lowercase();
            let frame = flow.frame(protocol, &[0x55; 40]);
            let both = [frame.clone(), tagged(&frame, 0x2064)];
            let batch = |step: u8, frames: &[Vec<u8>]| {
                let bytes = frames
                    .iter()
                    .flat_map(|frame| [&(frame.len() as u16).to_le_bytes(), &frame[..]].concat());
                [vec![step | (frames.len() - 1) as u8], bytes.collect()].concat()
            };
            // RSS and coalescing; eight buffers of 513 bytes in each queue.
            let port = vec![0x0c, 0x7f, 64, 8];
            let packets = [port, batch(0x80, &both), batch(0x88, &[&both[..], &both].concat())].concat();
            seeds.push(("packets", name.clone(), packets));
            seeds.push(("queues", name, sends(&flow, protocol)));
        }
    }
    seeds.push((
        "packets",
        "v6-mobile".to_owned(),
        [&[0x0c, 0x7f, 64, 8, 0x88][..], &mobile(), &[0x88]].concat(),
    ));
    // Send, time, buffers, a batch, completions of both queues, twice.
    let round = [
        &[0, 0, 0, 0x0b, 0, 0, 0, 0, 1, 0x10, 0, 4, 0, 4, 0, 0, 2, 0, 7, 0, 6][..],
        &[3, 9, 3, 3, 1, 0x87, 5, 0, 1, 4, 0, 4, 2, 4, 4, 4, 6, 13, 1, 0, 1, 6],
    ];
    let round = round.concat();
    seeds.push(("device", "traffic".to_owned(), [&[2][..], &round, &round].concat()));
    seeds.push(("device", "offloading-port".to_owned(), [&[2 | 4, 16, 1][..], &round, &round].concat()));
    seeds
}

/// The length and the bytes of a frame with a home address and a type 2 routing header (RFC 6275): what RSS hashes.
fn mobile() -> Vec<u8> {
    const DESTINATION_OPTIONS: u8 = 60;
    const ROUTING: u8 = 43;
    let frame = Flow::v6([2, 0, 0, 0, 0, 1], 3).frame(Protocol::Udp, &[0x55; 16]);
    let (before, transport) = frame.split_at(54);
    let options = [&[ROUTING, 2, 1, 2, 0, 0, 201, 16][..], &[0xfc; 16]].concat();
    let routing = [&[Protocol::Udp as u8, 2, 2, 1, 0, 0, 0, 0][..], &[0xfb; 16]].concat();
    let mut frame = [before, &options, &routing, transport].concat();
    let payload = (frame.len() - 54) as u16;
    frame[18..20].copy_from_slice(&payload.to_be_bytes());
    frame[20] = DESTINATION_OPTIONS;
    [&(frame.len() as u16).to_le_bytes()[..], &frame].concat()
}

/// Words that stand in inputs, for libFuzzer's mutations: what the driver said and was told, and each command with the
/// lengths of its messages.
///
/// # Panics
/// The driver does not load.
pub fn dictionary() -> String {
    let mut words = BTreeSet::new();
    for (code, request, response) in COMMANDS {
        words.insert(code.to_le_bytes().to_vec());
        words.insert((request as u32).to_le_bytes().to_vec());
        words.insert(response.to_le_bytes().to_vec());
    }
    for (_, generation) in GENERATIONS {
        for event in record(generation) {
            match event {
                Event::RegRead { offset, value, .. } => {
                    words.insert((offset as u16).to_le_bytes().to_vec());
                    words.insert((value as u32).to_le_bytes().to_vec());
                }
                Event::HwcRequest { code, version, .. } => {
                    words.insert(code.to_le_bytes().to_vec());
                    words.insert(version.to_le_bytes().to_vec());
                }
                Event::MsixProgram { address, data, .. } => {
                    words.insert(address.to_le_bytes().to_vec());
                    words.insert(data.to_le_bytes().to_vec());
                }
                Event::QueueCreate { id, entries, .. } => {
                    words.insert(id.to_le_bytes().to_vec());
                    words.insert(entries.to_le_bytes().to_vec());
                }
                _ => {}
            }
        }
    }
    let line = |word: Vec<u8>| {
        let bytes: String = word.iter().map(|byte| format!("\\x{byte:02x}")).collect();
        format!("\"{bytes}\"\n")
    };
    words.into_iter().map(line).collect()
}

/// A frame whose checksum the card makes, then one that it cuts.
fn sends(flow: &Flow, protocol: Protocol) -> Vec<u8> {
    let v4 = matches!(flow.addresses, crate::packet::Addresses::V4(..));
    let frame = flow.partial_frame(protocol, &[0x33; 60]);
    let at = flow.transport_offset() as u8;
    let kind = if protocol == Protocol::Tcp { 1 << 5 } else { 1 << 6 };
    let flags = kind | if v4 { 1 << 2 | 1 << 4 } else { 1 << 3 };
    // Write the frame to buffer 0, then a WQE of the short form with one entry.
    let mut input = vec![0, 2, 0, 0, 0, frame.len() as u8];
    input.extend(&frame);
    let transport = if protocol == Protocol::Tcp { at } else { 0 };
    input.extend([3, 0, 0, flags, 0, 0, 0, transport, 0, 0, 0]);
    input.extend([0, 0, 0, frame.len() as u8, 0]);
    // The long form with two entries, the headers in the first: MSS 16.
    input.extend([3 | 1 << 5 | 1 << 6, 1 | 16 << 2, 0]);
    input.extend([flags, 0, 0, 0, transport, 0, 0, 0]);
    input.extend([0; 16]);
    input.extend([0, 0, 0, at + 20, 0]);
    input.extend([0, at + 20, 0, 60, 0]);
    input.extend([7 | 1 << 5]);
    input
}
