//! How much memory a hostile guest can make the card take: all that it may create, and as much of it as it can.
//!
//! `src/THREATS.md` has the table that these figures stand in.

use allocation_counter::measure;
use mana_device::config::DeviceConfig;
use mana_device::doors::PortCapabilities;
use mana_test_driver::lean::{Channel, Machine};
use mana_test_driver::mana::code as mana;
use mana_test_driver::message::{Request, Response};
use mana_test_driver::packet::{Flow, Protocol};
use mana_test_driver::{DeviceId, Registration, World, gdma};

const MANA: DeviceId = DeviceId { kind: 2, instance: 0 };
/// Page addresses that fit into one message.
const LIST: usize = 500;
/// `GDMA_STATUS_MORE_ENTRIES`.
const MORE: u32 = 0x105;

/// All page addresses together: 4 Mi of 8 bytes.
const PAGE_LISTS: u64 = 8 * (4 << 20);
/// 16,384 regions, 4,096 protection domains, 4,093 doorbell pages, and the tables of them, which double, too.
const OBJECTS: u64 = 4 << 20;
/// Events that one event queue keeps while its ring is full: 4,096 of 16 bytes.
const HELD_EVENTS: u64 = 4096 * 16;
/// Queues with their rings' page lists aside: the objects, a WQE each, and what is asked for on the way.
const QUEUES: u64 = 1 << 20;

/// What a send queue may come to keep: the longest frame, and 16 completions of 64 bytes that wait for a slot.
const SEND_QUEUE: u64 = 8 << 10;
/// Packets of [`a_guest_that_takes_no_completion_makes_nothing_grow`]: more than its completion queue takes.
const SENT: usize = 5000;

/// A guest that stops at nothing.
struct Hostile {
    channel: Channel,
    activity: u32,
}

impl Hostile {
    fn new() -> Self {
        // Most doorbell pages, and as many queues as a port can have.
        let config = DeviceConfig { doorbell_pages: 4096, ..DeviceConfig::default() };
        let world: &'static World =
            Box::leak(Box::new(World::unobserved(config, 2, PortCapabilities::default())));
        Self { channel: Channel::establish(world), activity: 0 }
    }
    fn ask(&mut self, request: Request) -> Response {
        self.activity += 1;
        self.channel.ask(&request.activity(self.activity))
    }
    fn register(&mut self) -> Registration {
        let response = self.ask(Request::new(gdma::code::REGISTER_DEVICE, MANA, 40, 44));
        assert_eq!(response.status(), 0);
        Registration { pdid: response.u32(32), gpa_mkey: response.u32(36), db_id: response.u32(40) }
    }
    /// A region of `pages` pages, no two of which are neighbours; `None` if the card has had enough.
    fn region(&mut self, pages: usize) -> Option<u64> {
        let address = |page: usize| 0x1_0000_0000 + 8192 * page as u64;
        let list = |range: std::ops::Range<usize>| range.map(address).collect::<Vec<_>>();
        let first = pages.min(LIST);
        let request = gdma::create_region_request(4096 * pages as u64, pages, &list(0..first));
        let response = self.ask(request);
        if !matches!(response.status(), 0 | MORE) {
            return None;
        }
        let handle = response.u64(32);
        for start in (first..pages).step_by(LIST) {
            let response = self.ask(gdma::add_pages_request(handle, &list(start..pages.min(start + LIST))));
            assert!(matches!(response.status(), 0 | MORE));
        }
        Some(handle)
    }
    fn event_queue(&mut self, registration: Registration) -> Option<u32> {
        let region = self.region(2)?;
        let response = self.ask(gdma::create_eq_request(MANA, registration, region, 8192, 0));
        (response.status() == 0).then(|| response.u32(32))
    }
    fn pair(&mut self, kind: u32, vport: u64, eq: u32) -> bool {
        let regions = [self.region(2).unwrap(), self.region(2).unwrap()];
        let request = Request::new(mana::CREATE_WQ_OBJ, MANA, 96, 56).versions(3, 2).u64(40, vport);
        let request = request.u32(48, kind).u64s(56, &regions).u32(72, 8192).u32(76, 8192).u32(84, eq);
        self.ask(request).status() == 0
    }
    fn configure_tx(&mut self, vport: u64, registration: Registration) {
        let request = Request::new(mana::CONFIG_VPORT_TX, MANA, 56, 36).u64(40, vport);
        let request = request.u32(48, registration.pdid).u32(52, registration.db_id);
        assert_eq!(self.ask(request).status(), 0);
    }
    fn vport(&mut self) -> u64 {
        self.ask(Request::new(mana::QUERY_VPORT_CONFIG, MANA, 44, 64)).u64(56)
    }
    /// `GDMA_CREATE_PD`.
    fn domain(&mut self) -> bool {
        self.ask(Request::new(29, DeviceId::NONE, 48, 48)).status() == 0
    }
    /// `GDMA_ALLOCATE_RESOURCE_RANGE` of one doorbell page.
    fn doorbell_page(&mut self) -> bool {
        self.ask(Request::new(22, DeviceId::NONE, 56, 36).u32(40, 27).u32(44, 1)).status() == 0
    }
    fn test_event(&mut self, eq: u32) -> u32 {
        self.ask(Request::new(10, MANA, 44, 32).u32(40, eq)).status()
    }
}

#[test]
fn a_guest_that_creates_all_it_can_stays_within_the_bounds() {
    let mut guest = Hostile::new();
    let (mut eqs, mut pairs, mut regions, mut domains, mut pages) = (0, 0, 0, 0, 0);
    let seen = measure(|| {
        let registration = guest.register();
        let vport = guest.vport();
        guest.configure_tx(vport, registration);
        let mut eq = 0;
        while let Some(id) = guest.event_queue(registration) {
            (eq, eqs) = (id, eqs + 1);
        }
        for kind in [1, 2] {
            while guest.pair(kind, vport, eq) {
                pairs += 1;
            }
        }
        while guest.domain() {
            domains += 1;
        }
        while guest.doorbell_page() {
            pages += 1;
        }
        // Almost as many regions as there can be, then all pages that there can be.
        while regions < 15_800 && guest.region(1).is_some() {
            regions += 1;
        }
        // A size that would leave most unused if lists grew by doubling.
        for size in [LIST * 17, LIST, 1] {
            while guest.region(size).is_some() {
                regions += 1;
            }
        }
    });
    println!(
        "{eqs} event queues, {pairs} pairs, {regions} regions, {domains} domains, {pages} doorbell pages: {seen:?}"
    );
    assert_eq!((eqs, pairs, domains, pages), (129, 128, 4096, 4093));
    let bound = PAGE_LISTS + OBJECTS + QUEUES;
    assert!(seen.bytes_max < bound, "{} bytes, where {bound} are allowed", seen.bytes_max);
    // The test means something: most of the page lists' share is really taken.
    assert!(seen.bytes_max > PAGE_LISTS * 9 / 10, "only {} bytes", seen.bytes_max);
    assert!(regions > 16_000, "only {regions} regions");
    guest.channel.device().reset();
}

#[test]
fn events_that_nobody_takes_are_kept_up_to_a_bound_and_then_counted() {
    let mut guest = Hostile::new();
    let registration = guest.register();
    let eq = guest.event_queue(registration).unwrap();
    let seen = measure(|| {
        for _ in 0..4096 + 8192 / 16 + 100 {
            guest.test_event(eq);
        }
    });
    let lost = guest.channel.device().counters().0.iter().find(|(name, _)| *name == "events_lost").unwrap().1;
    assert_eq!(lost, 100);
    assert!(seen.bytes_max < 2 * HELD_EVENTS, "{seen:?}");
}

/// Bytes that stay, for each of `count` objects that `make` makes.
fn each(count: u32, mut make: impl FnMut()) -> u64 {
    let seen = measure(|| (0..count).for_each(|_| make()));
    u64::try_from(seen.bytes_current).expect("nothing shrinks") / u64::from(count)
}

#[test]
fn what_one_of_each_costs() {
    let mut guest = Hostile::new();
    let registration = guest.register();
    let vport = guest.vport();
    guest.configure_tx(vport, registration);
    let eq = guest.event_queue(registration).unwrap();
    // Powers of two, so that what a table keeps in reserve counts, too.
    let costs = [
        ("region of 512 pages", each(16, || assert!(guest.region(512).is_some())), 512 * 8 + 256),
        ("region of one page", each(1024, || assert!(guest.region(1).is_some())), 256),
        ("protection domain", each(1024, || assert!(guest.domain())), 64),
        ("doorbell page", each(1024, || assert!(guest.doorbell_page())), 64),
        ("event queue", each(64, || assert!(guest.event_queue(registration).is_some())), 1024),
        ("send queue", each(32, || assert!(guest.pair(1, vport, eq))), 4096),
        ("receive queue", each(32, || assert!(guest.pair(2, vport, eq))), 4096),
    ];
    println!("{costs:?}");
    for (what, bytes, bound) in costs {
        assert!(bytes > 0 && bytes <= bound, "a {what} costs {bytes} bytes, where {bound} are allowed");
    }
}

/// Completions wait for a slot while the guest takes none, and so does all that would make more.
#[test]
fn a_guest_that_takes_no_completion_makes_nothing_grow() {
    for capabilities in [PortCapabilities::default(), PortCapabilities { checksum: true, segmentation: true }]
    {
        let machine = Machine::new(1, capabilities);
        let sender = machine.senders(&[vec![0; 60]]).pop().unwrap();
        // IPv4 and TCP: the card makes checksums and cuts.
        let mut sender = sender.with_oob(1 << 2 | 1 << 4 | 1 << 5, 34);
        let header = machine.placed(&Flow::v4([2, 0, 0, 0, 0, 1], 1).partial_frame(Protocol::Tcp, &[]));
        let payload = machine.placed(&vec![7; 60_000]);
        let seen = measure(|| {
            for _ in 0..SENT {
                sender.post_large(header, payload, 1448);
                sender.run();
            }
        });
        println!("sending: {seen:?}");
        assert!(machine.counter("tx_bytes") > 60_000, "packets leave");
        assert!(seen.bytes_max <= SEND_QUEUE, "{seen:?}");
    }
}
