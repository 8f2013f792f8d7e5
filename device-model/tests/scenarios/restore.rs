//! Save and restore: a card that takes another's place goes on exactly where that one was, whenever that happens, and
//! takes no state that no driver could have brought about.

use std::collections::BTreeMap;

use mana_device::config::{DeviceConfig, TxPolicy, VportConfig};
use mana_device::state::{State, StateError};
use mana_test_driver::packet::{Flow, Protocol};
use mana_test_driver::restore::exercise;
use mana_test_driver::{Driver, Generation, Received, Transmit, V6_1, V7_3, World};
use proptest::prelude::*;

/// xorshift64.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) % n
    }
    fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

fn config() -> DeviceConfig {
    let vports = (1..3).map(|n| VportConfig { mac: [2, 0, 0, 0, 0, n], max_queues: 4 }).collect();
    DeviceConfig { vports, ..DeviceConfig::default() }
}

/// What can be seen of a run, queue by queue: in which order queues have their turn is nobody's business.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    sent: BTreeMap<(usize, u8), Vec<Vec<u8>>>,
    received: BTreeMap<(usize, usize), Vec<Received>>,
    completions: BTreeMap<(usize, usize), Vec<u8>>,
    statistics: Vec<u8>,
    counters: Vec<(&'static str, u64)>,
}

/// Traffic and commands by `seed`, with the card replaced at random moments if there are `moments`; the answer is what
/// was seen, how often it was replaced, and a state now and then.
struct Run<'w> {
    driver: Driver<'w>,
    random: Random,
    moments: Option<Random>,
    replaced: u64,
    states: Vec<Vec<u8>>,
    seen: Seen,
    number: u32,
}

impl<'w> Run<'w> {
    fn new(world: &'w World, generation: &'static Generation, seed: u64, moments: Option<u64>) -> Self {
        let driver = Driver::probe(world, generation).unwrap();
        let (random, moments) = (Random::new(seed), moments.map(Random::new));
        let (states, seen) = (Vec::new(), Seen::default());
        Self { driver, random, moments, replaced: 0, states, seen, number: 0 }
    }
    /// The card is replaced now, or somewhere in what comes next.
    fn disturb(&mut self) {
        let Some(moments) = &mut self.moments else { return };
        match moments.below(4) {
            0 => self.states.push(self.driver.world.replace_card()),
            1 | 2 => self.driver.world.replace_card_in(moments.below(5)),
            _ => return,
        }
        self.replaced += 1;
    }
    fn packet(&mut self, queue: usize) -> Transmit {
        self.number += 1;
        let flow = Flow { destination_mac: [2, 0, 0, 0, 0, queue as u8], ..Flow::v4([2; 6], 9) };
        let mut payload = self.number.to_le_bytes().to_vec();
        let lso = self.random.chance(4);
        payload.resize(4 + self.random.below(if lso { 8000 } else { 1400 }) as usize, 5);
        if !lso {
            return Transmit::plain(&flow.frame(Protocol::Udp, &payload));
        }
        let header = flow.partial_frame(Protocol::Tcp, &[]);
        Transmit {
            pieces: vec![header, payload],
            ipv4: true,
            ip_csum: true,
            tcp_csum: true,
            transport_offset: 34,
            mss: Some(1000),
            ..Transmit::default()
        }
    }
    fn send(&mut self, port: usize) {
        let queues = self.driver.netdevs[port].tx.len() as u64;
        let queue = self.random.below(queues) as usize;
        let count = self.random.below(6) + 1;
        for n in 1..=count {
            // Linux gives up one completion in a few.
            // What the host refuses has a completion all the same; it refuses nothing of port 0.
            let suppress = port == 0 && n != count && self.random.chance(3);
            let packet = Transmit { suppress, ..self.packet(queue) };
            self.driver.try_transmit(port, queue, &packet);
        }
    }
    fn arrive(&mut self, port: usize) {
        let frames: Vec<_> = (0..=self.random.below(12))
            .map(|_| {
                self.number += 1;
                let payload = [&self.number.to_le_bytes()[..], &vec![6; self.random.below(900) as usize]];
                Flow::v4([2; 6], self.random.below(64) as u16).frame(Protocol::Tcp, &payload.concat())
            })
            .collect();
        let frames: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
        self.driver.world.deliver_all(port, &frames);
    }
    fn pass(&mut self, ns: u64) {
        self.driver.service();
        self.driver.world.clock.advance(ns);
        self.driver.service();
    }
    /// Something pends on a masked vector for a while.
    fn mask(&mut self, port: usize) {
        let eq = self.driver.port_eqs(port).first().copied();
        let Some(vector) = eq.map(|eq| self.driver.eq_vector_of(eq)) else { return };
        self.driver.msix().set_mask(vector, true);
        self.arrive(port);
        self.disturb();
        self.driver.world.settle();
        self.driver.msix().set_mask(vector, false);
    }
    fn step(&mut self) {
        let port = self.random.below(2) as usize;
        match self.random.below(24) {
            0..=6 => self.send(port),
            7..=11 => self.arrive(port),
            12..=14 => self.driver.service().map_or((), drop),
            15 => {
                let ns = self.random.below(300_000);
                self.pass(ns);
            }
            16 => {
                let cq = self.driver.netdevs[port].rx[0].cq;
                let (completions, usec) = (self.random.below(20) as u16, self.random.below(400) as u16);
                self.driver.moderate(cq, completions, usec);
            }
            17 => self.driver.napi = !self.driver.napi,
            18 => {
                // The driver tells completions apart by what it has asked for last.
                self.collect(port);
                let queues = self.driver.netdevs[port].rx.len();
                let shift = self.random.below(7) as usize;
                let netdev = &mut self.driver.netdevs[port];
                netdev.table.iter_mut().enumerate().for_each(|(at, queue)| *queue = at * shift % queues);
                netdev.key[shift] ^= 0x55;
                (netdev.coalescing, netdev.coalescing8) = (shift & 1 != 0, shift & 2 != 0);
                self.driver.steer(port).unwrap();
            }
            19 => self.mask(port),
            20 => {
                self.driver.napi = true;
                self.collect(port);
                self.driver.ifdown(port).unwrap();
                self.disturb();
                self.driver.ifup(port).unwrap();
            }
            21 => {
                let clamp = self.driver.netdevs[port].info.handle;
                let mbps = 100 * (1 + self.random.below(5) as u32);
                self.driver.napi = true;
                self.driver.set_bw_clamp(clamp, u32::from(!self.random.chance(2)), mbps).unwrap();
            }
            22 => {
                let policy = TxPolicy { own_source_only: self.random.chance(2), ..TxPolicy::default() };
                self.driver.world.device.set_tx_policy(1, policy);
            }
            _ => {
                let region = self.driver.world.memory.alloc(4 * 4096);
                let handle = self.driver.create_dma_region(&region).unwrap();
                self.disturb();
                if self.random.chance(2) {
                    self.driver.destroy_dma_region(handle).unwrap();
                }
                self.driver.world.memory.free(region);
            }
        }
    }
    /// Everything in flight comes home; what was seen is put down.
    fn collect(&mut self, port: usize) {
        self.driver.napi = true;
        for _ in 0..150 {
            if (0..self.driver.netdevs[port].tx.len()).all(|queue| self.driver.in_flight(port, queue) == 0) {
                break;
            }
            self.pass(1_000_000);
        }
        self.pass(2_000_000);
        for frame in self.driver.world.cables[port].take() {
            self.seen.sent.entry((port, frame.bytes[5])).or_default().push(frame.bytes);
        }
        for received in self.driver.take_received(port) {
            self.seen.received.entry((port, received.queue)).or_default().push(received);
        }
        for (queue, ring) in self.driver.netdevs[port].tx.iter_mut().enumerate() {
            self.seen.completions.entry((port, queue)).or_default().append(&mut ring.completions);
        }
    }
    fn play(mut self, steps: usize) -> (Seen, u64, Vec<Vec<u8>>) {
        (0..2).for_each(|port| self.driver.ifup(port).unwrap());
        for _ in 0..steps {
            self.disturb();
            self.step();
        }
        (0..2).for_each(|port| self.collect(port));
        let statistics = self.driver.query_gf_stat().unwrap();
        self.seen.statistics = (0..27).flat_map(|at| statistics.u64(40 + 8 * at).to_le_bytes()).collect();
        let world = self.driver.world;
        self.driver.remove().unwrap();
        // How often the driver had to be interrupted depends on how the work was cut into pieces.
        let counters = world.device.counters().0.into_iter();
        self.seen.counters = counters.filter(|(name, _)| !name.starts_with("msix")).collect();
        (self.seen, self.replaced, self.states)
    }
}

fn run(
    generation: &'static Generation,
    seed: u64,
    moments: Option<u64>,
    steps: usize,
) -> (Seen, u64, Vec<Vec<u8>>) {
    let world = World::new(config(), 4);
    Run::new(&world, generation, seed, moments).play(steps)
}

#[test]
fn fifty_moments_and_more_under_traffic_change_nothing() {
    let mut moments = 0;
    for (seed, generation) in [(1, &V7_3), (2, &V6_1), (3, &V7_3)] {
        let (undisturbed, none, _) = run(generation, seed, None, 120);
        let (disturbed, replaced, _) = run(generation, seed, Some(seed + 100), 120);
        assert_eq!(none, 0);
        assert_eq!(undisturbed, disturbed, "{} with seed {seed}", generation.name);
        assert!(undisturbed.sent.values().flatten().count() > 100, "there is traffic");
        assert!(undisturbed.received.values().flatten().count() > 100, "there is traffic");
        moments += replaced;
    }
    assert!(moments > 150, "{moments} moments");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]
    #[test]
    fn no_moment_matters(seed: u64, moments: u64) {
        let (undisturbed, _, _) = run(&V7_3, seed, None, 40);
        let (disturbed, _, _) = run(&V7_3, seed, Some(moments), 40);
        prop_assert_eq!(undisturbed, disturbed);
    }
}

#[test]
fn a_card_that_nobody_has_touched_can_be_saved() {
    let world = World::new(config(), 2);
    world.replace_card();
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    driver.ifup(0).unwrap();
    driver.remove().unwrap();
    world.assert_empty_ledger();
    let bytes = world.replace_card();
    assert!(bytes.len() < 4096, "{} bytes of nothing", bytes.len());
}

#[test]
fn an_answer_that_the_host_has_put_off_comes_from_the_restored_card() {
    let world = World::new(config(), 2);
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    world.device.control(&["fault", "add", "command=any", "do=delay:50"]).unwrap();
    // The first piece of work puts it off, the second is to deliver it.
    world.replace_card_in(1);
    let before = world.now();
    driver.query_gf_stat().unwrap();
    assert_eq!(world.now() - before, 50_000_000);
    driver.query_gf_stat().unwrap();
    assert_eq!(world.now() - before, 50_000_000, "faults are not saved");
    driver.remove().unwrap();
}

#[test]
fn states_of_other_devices_and_versions_are_refused_with_the_reason() {
    let world = World::new(config(), 2);
    let bytes = world.device.save().to_bytes().unwrap();
    let refused = |bytes: &[u8]| world.device.load_bytes(bytes).unwrap_err();
    assert!(matches!(refused(b"something"), StateError::NotAState));
    let mut newer = bytes.clone();
    newer[8] = 77;
    assert!(matches!(refused(&newer), StateError::Version(77)));
    assert!(matches!(refused(&[&bytes[..], &[0]].concat()), StateError::Impossible(_)));
    let other = World::new(DeviceConfig { mtu: 9000, ..config() }, 2);
    let error = other.device.load(&State::from_bytes(&bytes).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "the state is of a device with another mtu");
}

/// States of a busy card.
fn states() -> Vec<Vec<u8>> {
    let (_, _, mut states) = run(&V7_3, 5, Some(6), 80);
    states.retain(|state| state.len() > 1000);
    states.truncate(4);
    assert_eq!(states.len(), 4);
    states
}

#[test]
fn a_state_that_is_cut_off_is_refused_wherever() {
    let world = World::new(config(), 2);
    let state = states().remove(0);
    for len in 0..state.len() {
        assert!(world.device.load_bytes(&state[..len]).is_err(), "the first {len} bytes");
    }
    assert!(exercise(&world, &state), "the whole is taken");
}

#[test]
fn a_state_with_wrong_bytes_is_refused_or_harmless() {
    let world = World::new(config(), 2);
    let mut random = Random::new(11);
    let (mut taken, mut refused) = (0, 0);
    for state in states() {
        for _ in 0..150 {
            let mut bytes = state.clone();
            for _ in 0..=random.below(3) {
                let at = 12 + random.below(bytes.len() as u64 - 12) as usize;
                bytes[at] = match random.below(3) {
                    0 => random.below(256) as u8,
                    1 => bytes[at] ^ 1 << random.below(8),
                    _ => [0, 1, 0x7f, 0x80, 0xff][random.below(5) as usize],
                };
            }
            match exercise(&world, &bytes) {
                true => taken += 1,
                false => refused += 1,
            }
        }
    }
    assert!(taken > 50 && refused > 50, "{taken} taken, {refused} refused");
}
