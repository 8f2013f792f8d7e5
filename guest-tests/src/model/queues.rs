//! How many queues a driver gives each port, and on which vector each event queue is: the rules of each generation.

use super::{Generation, Limits, Topology, vectors};

/// Most queues of a driver, whatever the machine (`MANA_MAX_NUM_QUEUES`, mana.h).
const MOST: usize = 64;
/// Queues of a port when it is opened first, and the least that the newest driver's budget gives it (mana.h).
const DEFAULT: usize = 16;

/// What the driver makes of a function's limits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Vectors, the channel's included; 0 where it gives up.
    pub vectors: usize,
    /// Queues of each port.
    pub queues: usize,
    /// Vector of each event queue in the order in which they are made: once all ports are open, without the channel's.
    pub event_queues: Vec<usize>,
}

/// The share of a function with `limits`.
pub fn share(generation: Generation, topology: Topology, limits: Limits) -> Share {
    let vectors = vectors(generation, topology, limits);
    // A driver that takes all vectors first uses no more than the host allows, whatever it has.
    let usable = vectors.min(limits.max_msix);
    if usable < 2 {
        return Share::default();
    }
    let of_all_ports = limits.max_queues * limits.ports;
    let most = topology.cpus.min(MOST).min(of_all_ports).min(limits.max_eq).min(usable - 1);
    if generation != Generation::GrowingUnshared {
        return Share { vectors, queues: most.min(limits.max_queues), event_queues: (1..=most).collect() };
    }
    let budget = ((usable - 1) / limits.ports).max(1);
    let queues = most.min(DEFAULT.max(1 << budget.ilog2()));
    let shared = queues * limits.ports > usable - 1;
    let most_of_port = if shared { most } else { queues };
    let queues = most_of_port.min(DEFAULT).min(limits.max_queues);
    let event_queues = (0..limits.ports).flat_map(|port| {
        let first = if shared { 0 } else { port * queues };
        (0..queues).map(move |queue| if shared { (queue + 1) % usable } else { first + queue + 1 })
    });
    Share { vectors, queues, event_queues: event_queues.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn newest(cpus: &str, ports: usize, max_msix: usize, max_queues: usize) -> (usize, usize, Vec<usize>) {
        let limits = Limits { max_msix, table: 64, max_queues, max_eq: 128, ports, node: None };
        let share = share(Generation::GrowingUnshared, Topology::parse(cpus).unwrap(), limits);
        (share.vectors, share.queues, share.event_queues)
    }

    #[test]
    fn the_newest_drivers_budget() {
        assert_eq!(newest("2", 1, 64, 64), (3, 2, vec![1, 2]));
        assert_eq!(newest("4", 2, 5, 64), (5, 4, vec![1, 2, 3, 4, 1, 2, 3, 4]));
        assert_eq!(newest("32", 1, 64, 64), (33, 16, (1..=16).collect()));
        assert_eq!(newest("32", 2, 64, 64), (33, 16, (1..=32).collect()));
        assert_eq!(newest("8", 1, 5, 64), (5, 4, vec![1, 2, 3, 4]));
        assert_eq!(newest("8", 1, 1, 64), (0, 0, vec![]));
        // Ports with one queue each.
        assert_eq!(newest("4", 2, 64, 1), (5, 1, vec![1, 2]));
    }

    #[test]
    fn older_drivers_share_event_queues_among_ports() {
        let limits = Limits { max_msix: 5, table: 64, max_queues: 2, max_eq: 128, ports: 2, node: None };
        for generation in [Generation::StaticCpus, Generation::StaticCores, Generation::Growing] {
            let share = share(generation, Topology::parse("8").unwrap(), limits);
            assert_eq!((share.queues, share.event_queues), (2, vec![1, 2, 3, 4]));
        }
    }

    /// Vectors that no event queue can use are taken all the same.
    #[test]
    fn fewer_event_queues_than_vectors() {
        let limits = Limits { max_msix: 256, table: 64, max_queues: 64, max_eq: 4, ports: 1, node: None };
        let sixteen = Topology::parse("16").unwrap();
        for generation in [Generation::StaticCores, Generation::Growing, Generation::GrowingUnshared] {
            let share = share(generation, sixteen, limits);
            assert_eq!((share.vectors, share.queues, share.event_queues), (17, 4, vec![1, 2, 3, 4]));
        }
    }
}
