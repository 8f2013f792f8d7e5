//! What vectors a driver asks for and which CPUs it hints them to: an independent model of each generation's rules.
//!
//! Written from the rules, not from any driver's code, so that a guest that disagrees is worth a look: either the
//! machine does not show the topology that was asked for, or the device answers with other limits, or the driver has
//! changed.

pub mod queues;

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde_json::Value;

/// Interrupts after which a vector must be where its affinity says.
const ENOUGH_TO_MOVE: u64 = 10;

/// Drivers that treat vectors alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Generation {
    /// 6.1: all vectors first, each hinted to a CPU of its own.
    #[value(name = "6.1")]
    StaticCpus,
    /// 6.12 to 6.16: all first, hinted to cores, node by node.
    #[value(name = "6.12")]
    StaticCores,
    /// 6.17 to 7.1: one first, then the others, hinted to cores in a second round.
    #[value(name = "6.17")]
    Growing,
    /// Since 7.2 (7.2.12 was looked at): as before, but with a vector for each CPU the queues go to one CPU each; no more
    /// vectors than the table has; each port has event queues of its own, which share vectors with other ports' only
    /// where there are too few.
    #[value(name = "7.2")]
    GrowingUnshared,
}

impl Generation {
    /// The stock driver of a kernel version such as `6.12.117+deb13-cloud-amd64`.
    pub fn of_kernel(version: &str) -> Result<Self> {
        let mut numbers = version.split(['.', '-', '+']).map_while(|word| word.parse::<u32>().ok());
        let version =
            numbers.next().zip(numbers.next()).with_context(|| format!("'{version}' is no version"))?;
        Ok(if version < (6, 12) {
            Self::StaticCpus
        } else if version < (6, 17) {
            Self::StaticCores
        } else if version < (7, 2) {
            Self::Growing
        } else {
            Self::GrowingUnshared
        })
    }

    /// Does it take vectors after the channel is up?
    pub fn grows(self) -> bool {
        !matches!(self, Self::StaticCpus | Self::StaticCores)
    }
}

/// CPUs numbered thread by thread, core by core, node by node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// All.
    pub cpus: usize,
    /// Of a core.
    pub threads: usize,
    /// Parts of equal size, of which each node has as many.
    pub packages: usize,
    /// Parts of equal size.
    pub nodes: usize,
    /// CPUs that are offline, a bit each.
    offline: u128,
}

impl Topology {
    /// Of a `--cpus` value: a number, or `cpus=8,threads=2,cores=2,sockets=1,nodes=2`.
    pub fn parse(text: &str) -> Result<Self> {
        let mut values = [None; 5];
        let names = ["cpus", "threads", "cores", "sockets", "nodes"];
        for word in text.split(',') {
            let (name, value) = word.split_once('=').unwrap_or(("cpus", word));
            let index =
                names.iter().position(|known| *known == name).with_context(|| format!("--cpus {text}"))?;
            values[index] = Some(value.parse::<usize>().with_context(|| format!("--cpus {text}"))?);
        }
        let [cpus, threads, cores, sockets, nodes] = values;
        let (threads, nodes) = (threads.unwrap_or(1), nodes.unwrap_or(1));
        let packages = sockets.unwrap_or(1) * nodes;
        let product = threads * cores.unwrap_or(1) * packages;
        Ok(Self { cpus: cpus.unwrap_or(product), threads, packages, nodes, offline: 0 })
    }

    /// The same with these CPUs offline.
    pub fn without(self, offline: &[usize]) -> Self {
        Self { offline: offline.iter().fold(self.offline, |bits, cpu| bits | 1 << cpu), ..self }
    }

    /// The CPUs that are online.
    fn online(self) -> impl Iterator<Item = usize> {
        (0..self.cpus).filter(move |cpu| self.offline & 1 << cpu == 0)
    }

    /// The node of `cpu`.
    pub fn node(self, cpu: usize) -> usize {
        cpu / (self.cpus / self.nodes)
    }

    /// The package of `cpu`.
    pub fn package(self, cpu: usize) -> usize {
        cpu / (self.cpus / self.packages)
    }

    /// All CPUs for which `part` gives what it gives for `cpu`.
    fn together(self, cpu: usize, part: fn(Self, usize) -> usize) -> BTreeSet<usize> {
        (0..self.cpus).filter(|&other| part(self, other) == part(self, cpu)).collect()
    }

    /// The CPUs of the core that `cpu` is of, as far as they are online.
    pub fn siblings(self, cpu: usize) -> BTreeSet<usize> {
        self.online().filter(|other| other / self.threads == cpu / self.threads).collect()
    }

    /// CPUs by distance from `node`: its own, then all others; without a node there is no difference.
    fn levels(self, node: Option<usize>) -> Vec<Vec<usize>> {
        match node {
            None => vec![self.online().collect()],
            Some(node) => {
                let (near, far): (Vec<_>, Vec<_>) = self.online().partition(|&cpu| self.node(cpu) == node);
                vec![near, far]
            }
        }
    }

    /// One set for each CPU, at least: within a level, whole rounds over the cores until there are as many as CPUs.
    fn core_by_core(self, node: Option<usize>) -> Vec<BTreeSet<usize>> {
        let of_level = |level: Vec<usize>| {
            let cores: BTreeSet<BTreeSet<usize>> = level.iter().map(|&cpu| self.siblings(cpu)).collect();
            let rounds = level.len().div_ceil(cores.len().max(1));
            (0..rounds).flat_map(|_| cores.iter().cloned()).collect::<Vec<_>>()
        };
        self.levels(node).into_iter().flat_map(of_level).collect()
    }
}

/// Limits that a function is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// `max_msix` of GDMA_QUERY_MAX_RESOURCES.
    pub max_msix: usize,
    /// Entries of the MSI-X table.
    pub table: usize,
    /// Queues that a vPort has of each kind.
    pub max_queues: usize,
    /// `max_eq` of GDMA_QUERY_MAX_RESOURCES.
    pub max_eq: usize,
    /// vPorts.
    pub ports: usize,
    /// NUMA node.
    pub node: Option<usize>,
}

impl Limits {
    /// Of a `--device` value.
    pub fn parse(device: &str) -> Result<Self> {
        let value = |name: &str| {
            let words = device.split(',').filter_map(|word| word.split_once('='));
            let found =
                words.filter(|(known, _)| *known == name).map(|(_, value)| value.parse::<usize>()).next();
            found.transpose().with_context(|| format!("--device {device}"))
        };
        Ok(Self {
            max_msix: value("max-msix")?.unwrap_or(64),
            table: value("msix-table")?.unwrap_or(64),
            max_queues: value("max-queues")?.unwrap_or(64),
            max_eq: value("max-eq")?.unwrap_or(128),
            ports: device.split(',').filter(|word| word.starts_with("netdev=")).count().max(1),
            node: value("node")?,
        })
    }
}

/// Vectors that the driver enables; 0 where it must give up.
pub fn vectors(generation: Generation, topology: Topology, limits: Limits) -> usize {
    let cpus = topology.online().count();
    let vectors = match generation {
        Generation::StaticCpus | Generation::StaticCores => (cpus.min(64) + 1).min(limits.table),
        Generation::Growing | Generation::GrowingUnshared => (cpus + 1).min(limits.max_msix),
    };
    let vectors = match generation {
        Generation::GrowingUnshared => vectors.min(limits.table),
        // The first vector beyond the table can't be had, and that ends the probe.
        _ if vectors > limits.table => 0,
        _ => vectors,
    };
    if vectors < 2 || limits.max_msix < 2 { 0 } else { vectors }
}

/// CPUs hinted for each vector, vector 0 first; no vectors where the driver must give up.
pub fn hints(generation: Generation, topology: Topology, limits: Limits) -> Vec<BTreeSet<usize>> {
    let cpus = topology.online().count();
    let vectors = vectors(generation, topology, limits);
    let spread: Vec<usize> = topology.levels(limits.node).concat();
    let cores = topology.core_by_core(limits.node);
    let single = |index: usize| BTreeSet::from([spread[index % cpus]]);
    if vectors == 0 {
        return Vec::new();
    }
    if generation == Generation::StaticCpus {
        return (0..vectors).map(single).collect();
    }
    if vectors <= cpus {
        return cores[..vectors].to_vec();
    }
    let first = if generation == Generation::StaticCores { single(0) } else { cores[0].clone() };
    let queues: Vec<BTreeSet<usize>> = match generation {
        Generation::GrowingUnshared => topology.online().map(|cpu| BTreeSet::from([cpu])).collect(),
        _ => cores,
    };
    [vec![first], queues[..vectors - 1].to_vec()].concat()
}

/// Compares what `vectors` printed in the guest with [`hints`], function by function.
pub fn check_vectors(
    report: &Value,
    generation: Generation,
    topology: Topology,
    devices: &[Limits],
) -> Result<()> {
    let vectors = report.as_array().context("no list of vectors")?;
    let addresses: BTreeSet<&str> = vectors.iter().filter_map(|vector| vector["function"].as_str()).collect();
    let expected: Vec<_> = devices.iter().map(|&limits| hints(generation, topology, limits)).collect();
    let probing: Vec<_> = expected.iter().filter(|hints| !hints.is_empty()).collect();
    ensure!(
        addresses.len() == probing.len(),
        "{} functions have vectors, not {}",
        addresses.len(),
        probing.len()
    );
    for (address, hints) in addresses.iter().zip(probing) {
        let shown: Vec<_> = vectors.iter().filter(|vector| vector["function"] == *address).collect();
        check_hints(&shown, hints).with_context(|| (*address).to_owned())?;
    }
    Ok(())
}

/// Compares one function's vectors with `hints`.
pub fn check_hints(shown: &[&Value], hints: &[BTreeSet<usize>]) -> Result<()> {
    ensure!(shown.len() == hints.len(), "{} vectors, not {}", shown.len(), hints.len());
    for (number, (vector, hint)) in shown.iter().zip(hints).enumerate() {
        check_vector(vector, number, hint).with_context(|| format!("vector {number}"))?;
    }
    Ok(())
}

fn check_vector(vector: &Value, number: usize, hint: &BTreeSet<usize>) -> Result<()> {
    ensure!(vector["vector"] == number, "it is {}", vector["vector"]);
    for name in ["hint", "affinity"] {
        let shown = cpu_set(vector[name].as_str().unwrap_or_default())?;
        ensure!(shown == *hint, "{name} is {shown:?}, not {hint:?}");
    }
    // Without interrupt remapping a vector moves when it next fires.
    let effective = cpu_set(vector["effective"].as_str().unwrap_or_default())?;
    let has_moved = vector["total"].as_u64() >= Some(ENOUGH_TO_MOVE);
    ensure!(effective.len() == 1, "effective CPUs are {effective:?}");
    ensure!(!has_moved || effective.is_subset(hint), "it fires on {effective:?} instead of {hint:?}");
    Ok(())
}

/// Compares what `topology` printed in the guest with what was asked for.
pub fn check_topology(report: &Value, topology: Topology, devices: &[Limits]) -> Result<()> {
    let cpus = report["cpus"].as_object().context("no CPUs")?;
    ensure!(cpus.len() == topology.cpus, "{} CPUs, not {}", cpus.len(), topology.cpus);
    for (name, shown) in cpus {
        let cpu: usize = name.parse()?;
        let package = topology.together(cpu, Topology::package);
        let sets = [
            ("threads", topology.siblings(cpu)),
            ("package_cpus", package.clone()),
            ("last_level_cache_cpus", package),
        ];
        for (name, wanted) in sets {
            let set = cpu_set(shown[name].as_str().unwrap_or_default())?;
            ensure!(set == wanted, "CPU {cpu}'s {name} are {set:?}, not {wanted:?}");
        }
        ensure!(shown["package"] == topology.package(cpu), "CPU {cpu} is of package {}", shown["package"]);
        ensure!(shown["node"] == topology.node(cpu), "CPU {cpu} is on node {}", shown["node"]);
    }
    check_nodes(report, topology)?;
    let functions = report["functions"].as_object().context("no functions")?;
    ensure!(functions.len() == devices.len(), "{} functions, not {}", functions.len(), devices.len());
    for ((address, shown), limits) in functions.iter().zip(devices) {
        let node = limits.node.map_or(-1, |node| node as i64);
        // A machine with one node has nothing to say, and the kernel may put everything on it.
        let only = topology.nodes == 1 && [-1, 0].map(Value::from).contains(&shown["numa_node"]);
        ensure!(
            only || shown["numa_node"] == node,
            "{address} is on node {}, not {node}",
            shown["numa_node"]
        );
    }
    Ok(())
}

/// Nodes with their CPUs, each as far from every other.
fn check_nodes(report: &Value, topology: Topology) -> Result<()> {
    let nodes = report["nodes"].as_object().context("no nodes")?;
    ensure!(nodes.len() == topology.nodes, "{} nodes, not {}", nodes.len(), topology.nodes);
    for (name, shown) in nodes {
        let node: usize = name.parse()?;
        let wanted: BTreeSet<_> = (0..topology.cpus).filter(|&cpu| topology.node(cpu) == node).collect();
        let cpus = cpu_set(shown["cpus"].as_str().unwrap_or_default())?;
        ensure!(cpus == wanted, "node {node} has CPUs {cpus:?}, not {wanted:?}");
        let distances: Value = (0..topology.nodes).map(|other| if other == node { 10 } else { 20 }).collect();
        ensure!(shown["distance"] == distances, "node {node}'s distances are {}", shown["distance"]);
    }
    Ok(())
}

/// `0-2,5` as a set.
fn cpu_set(list: &str) -> Result<BTreeSet<usize>> {
    let mut cpus = BTreeSet::new();
    for run in list.split(',').filter(|run| !run.is_empty()) {
        let (first, last) = run.split_once('-').unwrap_or((run, run));
        let parse = |text: &str| text.parse::<usize>().with_context(|| format!("CPU list '{list}'"));
        cpus.extend(parse(first)?..=parse(last)?);
    }
    Ok(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const GENERATIONS: [Generation; 4] =
        [Generation::StaticCpus, Generation::StaticCores, Generation::Growing, Generation::GrowingUnshared];

    fn limits(max_msix: usize, table: usize, node: Option<usize>) -> Limits {
        Limits { max_msix, table, max_queues: 64, max_eq: 128, ports: 1, node }
    }

    /// Sets as words: `01 23` for {0,1} {2,3}.
    fn words(sets: &[BTreeSet<usize>]) -> String {
        let word = |set: &BTreeSet<usize>| set.iter().map(usize::to_string).collect::<String>();
        sets.iter().map(word).collect::<Vec<_>>().join(" ")
    }

    fn check(cpus: &str, node: Option<usize>, limit: usize, expected: [&str; 4]) {
        let topology = Topology::parse(cpus).unwrap();
        let limits = limits(limit, limit, node);
        let shown = GENERATIONS.map(|generation| words(&hints(generation, topology, limits)));
        assert_eq!(shown, expected, "{cpus}, node {node:?}, {limit} vectors");
    }

    #[test]
    fn four_cpus_of_two_cores() {
        let cpus = "cpus=4,threads=2,cores=2";
        check(cpus, Some(0), 5, ["0 1 2 3 0", "0 01 23 01 23", "01 01 23 01 23", "01 0 1 2 3"]);
        check(cpus, Some(0), 4, ["0 1 2 3", "01 23 01 23", "01 23 01 23", "01 23 01 23"]);
        check(cpus, Some(0), 3, ["0 1 2", "01 23 01", "01 23 01", "01 23 01"]);
        check(cpus, None, 2, ["0 1", "01 23", "01 23", "01 23"]);
        check(cpus, None, 1, [""; 4]);
    }

    #[test]
    fn a_cpu_that_is_offline() {
        let topology = Topology::parse("cpus=4,threads=2,cores=2").unwrap().without(&[3]);
        let shown = |limit| {
            GENERATIONS.map(|generation| words(&hints(generation, topology, limits(limit, limit, Some(0)))))
        };
        assert_eq!(shown(64), ["0 1 2 0", "0 01 2 01", "01 01 2 01", "01 0 1 2"]);
        assert_eq!(shown(3), ["0 1 2", "01 2 01", "01 2 01", "01 2 01"]);
    }

    #[test]
    fn two_nodes() {
        let cpus = "threads=2,cores=2,nodes=2";
        let near = "01 23 01 23 45 67 45 67";
        check(
            cpus,
            Some(0),
            9,
            ["0 1 2 3 4 5 6 7 0", &format!("0 {near}"), &format!("01 {near}"), "01 0 1 2 3 4 5 6 7"],
        );
        check(cpus, Some(0), 8, ["0 1 2 3 4 5 6 7", near, near, near]);
        check(cpus, Some(0), 5, ["0 1 2 3 4", "01 23 01 23 45", "01 23 01 23 45", "01 23 01 23 45"]);
        let near = "45 67 45 67 01 23 01 23";
        check(
            cpus,
            Some(1),
            9,
            ["4 5 6 7 0 1 2 3 4", &format!("4 {near}"), &format!("45 {near}"), "45 0 1 2 3 4 5 6 7"],
        );
        let far = "01 23 45 67 01 23 45 67";
        check(
            cpus,
            None,
            9,
            ["0 1 2 3 4 5 6 7 0", &format!("0 {far}"), &format!("01 {far}"), "01 0 1 2 3 4 5 6 7"],
        );
    }

    #[test]
    fn two_cpus() {
        check("2", None, 3, ["0 1 0", "0 0 1", "0 0 1", "0 0 1"]);
        check("2", None, 2, ["0 1"; 4]);
    }

    #[test]
    fn static_drivers_count_vectors_by_the_table() {
        let limits = limits(3, 64, None);
        let topology = Topology::parse("4").unwrap();
        assert_eq!(GENERATIONS.map(|generation| hints(generation, topology, limits).len()), [5, 5, 3, 3]);
    }

    #[test]
    fn only_the_newer_mind_the_table_when_they_grow() {
        let topology = Topology::parse("16").unwrap();
        let growing = [Generation::Growing, Generation::GrowingUnshared];
        assert_eq!(growing.map(|generation| vectors(generation, topology, limits(64, 8, None))), [0, 8]);
        assert_eq!(growing.map(|generation| vectors(generation, topology, limits(8, 8, None))), [8, 8]);
        assert_eq!(vectors(Generation::StaticCores, topology, limits(64, 8, None)), 8);
    }

    #[test]
    fn a_topology_as_asked_and_others() {
        let cpu = |node: usize, threads: &str, package_cpus: &str| {
            json!({ "threads": threads, "package_cpus": package_cpus, "last_level_cache_cpus": package_cpus,
                    "package": node, "node": node })
        };
        let report = json!({
            "cpus": {
                "0": cpu(0, "0-1", "0-1"), "1": cpu(0, "0-1", "0-1"),
                "2": cpu(1, "2-3", "2-3"), "3": cpu(1, "2-3", "2-3"),
            },
            "nodes": {
                "0": { "cpus": "0-1", "distance": [10, 20] }, "1": { "cpus": "2-3", "distance": [20, 10] },
            },
            "functions": { "0000:81:00.0": { "numa_node": 1 } },
        });
        let device = |node| [limits(64, 64, node)];
        let check = |cpus: &str, node| check_topology(&report, Topology::parse(cpus).unwrap(), &device(node));
        check("threads=2,nodes=2", Some(1)).unwrap();
        assert!(check("threads=2,nodes=2", Some(0)).is_err());
        assert!(check("threads=2,nodes=2", None).is_err());
        assert!(check("threads=2,sockets=2", Some(1)).is_err());
        assert!(check("threads=1,cores=2,nodes=2", Some(1)).is_err());
        assert!(check("cpus=8,threads=2,nodes=2", Some(1)).is_err());
    }

    #[test]
    fn generations() {
        let of = |version| Generation::of_kernel(version).unwrap();
        assert_eq!(of("6.1.0-56-cloud-amd64"), Generation::StaticCpus);
        assert_eq!(of("6.12.117+deb13-cloud-amd64"), Generation::StaticCores);
        assert_eq!(of("6.16.3"), Generation::StaticCores);
        assert_eq!(of("6.18.15+deb13"), Generation::Growing);
        assert_eq!(of("7.2.12+deb13-cloud-amd64"), Generation::GrowingUnshared);
        assert_eq!(of("7.3.4+deb13-cloud-amd64"), Generation::GrowingUnshared);
        assert!(Generation::of_kernel("newest").is_err());
    }
}
