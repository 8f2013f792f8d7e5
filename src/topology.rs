//! The CPUs as the guest sees them: APIC ids and the CPUID leaves that explain them.
//!
//! An APIC id is a bit string, from the low end: thread, core, die, package. Each field is as wide as its count
//! needs, so that ids have gaps where a count is no power of two. CPUID states the fields' boundaries (leaves 1, 4,
//! 0xB and 0x1F; on AMD also 0x80000008, 0x8000001D and 0x8000001E), and the kernel cuts every id along them. A
//! package that spans several NUMA nodes has one die a node: the last-level cache ends where the node ends.
//!
//! Sources: Intel SDM volume 3, "Hierarchical Mapping of Shared Resources"; AMD64 APM volume 3, appendix E.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2 as Leaf};

use crate::config::Topology;

/// APIC ids above this one need x2APIC (0xFF is the xAPIC broadcast).
pub const MAX_XAPIC_ID: u32 = 0xfe;

/// APIC id bits below the last-level cache on Zen 1, whatever CPUID says: Linux cuts there
/// (`cacheinfo_amd_init_llc_id`), and warns when it finds two NUMA nodes in one cache.
const ZEN1_LLC_BITS: u32 = 3;

/// The APIC id of logical CPU `cpu` (0-based). It is the id to create the vCPU with, too.
pub fn apic_id(topology: &Topology, cpu: u32) -> u32 {
    Fields::of(topology).pack(Place::of(topology, cpu))
}

/// The NUMA node of logical CPU `cpu`: CPUs are dealt out in order, in equal parts.
pub fn node(topology: &Topology, cpu: u32) -> u32 {
    let node = u64::from(cpu) * u64::from(topology.nodes) / u64::from(topology.cpus.max(1));
    u32::try_from(node).unwrap_or(u32::MAX)
}

/// CPUID of logical CPU `cpu`: what KVM supports, with the topology of the guest instead of the host's.
///
/// The local APIC is always an x2APIC with a TSC deadline timer (KVM emulates both), MWAIT is never offered, and
/// KVM's own leaves stay as they are.
///
/// # Panics
/// If `supported` is so long that a handful of leaves more are over KVM's limit of 256.
pub fn cpuid(supported: &CpuId, topology: &Topology, cpu: u32) -> CpuId {
    let shape = Shape::new(topology, cpu);
    let mut leaves = Leaves(supported.as_slice().to_vec());
    let vendor = leaves.vendor();
    leaves.set_processor_info(&shape);
    leaves.hide_mwait();
    leaves.set_extended_topology(&shape, vendor);
    match vendor {
        Vendor::Intel => leaves.set_intel_caches(&shape),
        Vendor::Amd => leaves.set_amd_topology(&shape),
        Vendor::Other => {}
    }
    CpuId::from_entries(&leaves.0).expect("KVM's leaves and ours are fewer than KVM_MAX_CPUID_ENTRIES")
}

/// Bits that numbers below `count` take.
fn bits_for(count: u32) -> u32 {
    u32::BITS - count.saturating_sub(1).leading_zeros()
}

/// Dies of a package: one for each NUMA node in it.
fn dies(topology: &Topology) -> u32 {
    let nodes = topology.nodes / topology.sockets.max(1);
    if nodes > 1 && topology.cores.is_multiple_of(nodes) { nodes } else { 1 }
}

/// Where a logical CPU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    thread: u32,
    /// Within the die.
    core: u32,
    /// Within the package.
    die: u32,
    package: u32,
}

impl Place {
    fn of(topology: &Topology, cpu: u32) -> Self {
        let threads = topology.threads.max(1);
        let cores_per_die = (topology.cores / dies(topology)).max(1);
        let core = cpu / threads;
        let die = core / cores_per_die;
        Self {
            thread: cpu % threads,
            core: core % cores_per_die,
            die: die % dies(topology),
            package: die / dies(topology),
        }
    }
}

/// Widths of the APIC id's fields, in bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fields {
    thread: u32,
    core: u32,
    die: u32,
}

impl Fields {
    fn of(topology: &Topology) -> Self {
        let dies = dies(topology);
        let (thread, die) = (bits_for(topology.threads), bits_for(dies));
        let core = bits_for(topology.cores / dies);
        let package = bits_for(topology.sockets);
        let wide = core.max(ZEN1_LLC_BITS.saturating_sub(thread));
        let one_cache = die + package == 0;
        // Wider than needed only where that keeps caches apart and the ids short.
        let fits = thread + wide + die + package < u8::BITS;
        Self { thread, core: if one_cache || !fits { core } else { wide }, die }
    }

    /// Bits below the die number: the CPUs that share a last-level cache.
    fn die_shift(self) -> u32 {
        self.thread + self.core
    }

    fn package_shift(self) -> u32 {
        self.die_shift() + self.die
    }

    fn pack(self, place: Place) -> u32 {
        place.package << self.package_shift()
            | place.die << self.die_shift()
            | place.core << self.thread
            | place.thread
    }
}

/// One CPU's place in a topology, with all that the leaves need.
struct Shape<'a> {
    topology: &'a Topology,
    place: Place,
    fields: Fields,
    apic_id: u32,
    dies: u32,
}

impl<'a> Shape<'a> {
    fn new(topology: &'a Topology, cpu: u32) -> Self {
        let (place, fields) = (Place::of(topology, cpu), Fields::of(topology));
        Self { topology, place, fields, apic_id: fields.pack(place), dies: dies(topology) }
    }

    fn cpus_per_package(&self) -> u32 {
        self.topology.cores * self.topology.threads
    }

    /// APIC id bits below what does not share a cache of this level.
    fn cache_shift(&self, level: u32) -> u32 {
        if level < 3 { self.fields.thread } else { self.fields.die_shift() }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vendor {
    Intel,
    /// AMD and Hygon.
    Amd,
    Other,
}

/// `value` with the bits `high..=low` replaced; a field too large for them saturates.
fn with_bits(value: u32, high: u32, low: u32, field: u32) -> u32 {
    let ones = u32::MAX >> (u32::BITS - 1 - (high - low));
    value & !(ones << low) | field.min(ones) << low
}

/// `value` with one bit set or cleared.
fn with_bit(value: u32, bit: u32, set: bool) -> u32 {
    with_bits(value, bit, bit, u32::from(set))
}

/// A level of leaves 0xB and 0x1F.
#[derive(Clone, Copy)]
struct Level {
    /// "Domain type" in ECX.
    kind: u32,
    /// Bits of the x2APIC id to shift out to reach the next level.
    shift: u32,
    /// Logical CPUs of this level in this package.
    cpus: u32,
}

/// A CPU's leaves while they are being made.
struct Leaves(Vec<Leaf>);

impl Leaves {
    fn get(&self, function: u32) -> Option<&Leaf> {
        self.0.iter().find(|leaf| leaf.function == function)
    }

    fn update(&mut self, function: u32, change: impl Fn(&mut Leaf)) {
        self.0.iter_mut().filter(|leaf| leaf.function == function).for_each(change);
    }

    /// All subleaves of `function` are `registers` (EAX, EBX, ECX, EDX) from now on.
    fn replace(&mut self, function: u32, registers: &[[u32; 4]]) {
        self.0.retain(|leaf| leaf.function != function);
        self.0.extend((0..).zip(registers).map(|(index, &[eax, ebx, ecx, edx])| Leaf {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }));
    }

    fn vendor(&self) -> Vendor {
        match self.get(0).map(|leaf| (leaf.ebx, leaf.edx, leaf.ecx)) {
            Some((0x756e_6547, 0x4965_6e69, 0x6c65_746e)) => Vendor::Intel, // "GenuineIntel"
            Some((0x6874_7541, 0x6974_6e65, 0x444d_4163)) // "AuthenticAMD"
            | Some((0x6f67_7948, 0x6e65_476e, 0x656e_6975)) => Vendor::Amd, // "HygonGenuine"
            _ => Vendor::Other,
        }
    }

    fn max_basic(&self) -> u32 {
        self.get(0).map_or(0, |leaf| leaf.eax)
    }

    fn set_processor_info(&mut self, shape: &Shape<'_>) {
        let addressable = 1 << shape.fields.package_shift();
        self.update(1, |leaf| {
            leaf.ebx = with_bits(leaf.ebx, 31, 24, shape.apic_id & 0xff);
            leaf.ebx = with_bits(leaf.ebx, 23, 16, addressable);
            leaf.ecx = with_bit(leaf.ecx, 3, false); // MONITOR
            leaf.ecx = with_bit(leaf.ecx, 21, true); // x2APIC
            leaf.ecx = with_bit(leaf.ecx, 24, true); // TSC deadline timer
            leaf.ecx = with_bit(leaf.ecx, 31, true); // hypervisor
            leaf.edx = with_bit(leaf.edx, 28, shape.cpus_per_package() > 1); // HTT
        });
    }

    fn hide_mwait(&mut self) {
        self.update(5, |leaf| (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0));
    }

    /// Leaf 0xB for everybody; 0x1F, which knows dies, where KVM has it or an Intel guest needs it.
    fn set_extended_topology(&mut self, shape: &Shape<'_>, vendor: Vendor) {
        let (fields, topology) = (shape.fields, shape.topology);
        let die_cpus = shape.cpus_per_package() / shape.dies;
        let thread = Level { kind: 1, shift: fields.thread, cpus: topology.threads };
        let core = Level { kind: 2, shift: fields.die_shift(), cpus: die_cpus };
        let die = Level { kind: 5, shift: fields.package_shift(), cpus: shape.cpus_per_package() };

        let all_cores = Level { kind: core.kind, ..die };
        self.replace(0xb, &extended_topology(&[thread, all_cores], shape.apic_id));
        let mut max_basic = self.max_basic().max(0xb);
        if vendor == Vendor::Intel && shape.dies > 1 {
            max_basic = max_basic.max(0x1f);
        }
        if max_basic >= 0x1f {
            self.replace(0x1f, &extended_topology(&[thread, core, die], shape.apic_id));
        }
        self.update(0, |leaf| leaf.eax = max_basic);
    }

    /// Who shares the caches of leaf 4; their sizes stay the host's.
    fn set_intel_caches(&mut self, shape: &Shape<'_>) {
        let core_ids = 1 << (shape.fields.package_shift() - shape.fields.thread);
        self.update(4, |leaf| {
            let level = leaf.eax >> 5 & 7;
            if leaf.eax & 0x1f != 0 {
                leaf.eax = with_bits(leaf.eax, 25, 14, (1 << shape.cache_shift(level)) - 1);
                leaf.eax = with_bits(leaf.eax, 31, 26, core_ids - 1);
            }
        });
    }

    fn set_amd_topology(&mut self, shape: &Shape<'_>) {
        let (fields, place) = (shape.fields, shape.place);
        self.update(0x8000_0001, |leaf| {
            leaf.ecx = with_bit(leaf.ecx, 1, shape.cpus_per_package() > 1); // CmpLegacy
            leaf.ecx = with_bit(leaf.ecx, 22, true); // TopologyExtensions
        });
        self.update(0x8000_0008, |leaf| {
            leaf.ecx = with_bits(leaf.ecx, 7, 0, shape.cpus_per_package() - 1);
            leaf.ecx = with_bits(leaf.ecx, 15, 12, fields.package_shift());
        });
        let caches = self.amd_caches(shape);
        self.replace(0x8000_001d, &caches);

        let core = place.die * (shape.topology.cores / shape.dies) + place.core;
        let node = place.package * shape.dies + place.die;
        self.replace(
            0x8000_001e,
            &[[
                shape.apic_id,
                with_bits(core & 0xff, 15, 8, shape.topology.threads - 1),
                with_bits(node & 0xff, 10, 8, shape.dies - 1),
                0,
            ]],
        );
        // Describes the host's cores and would win over leaf 0xB.
        self.replace(0x8000_0026, &[]);
        self.update(0x8000_0000, |leaf| leaf.eax = leaf.eax.clamp(0x8000_001e, 0x8000_0025));
    }

    /// Leaf 0x8000001D, which KVM leaves empty, from the cache sizes in 0x80000005 and 0x80000006.
    fn amd_caches(&self, shape: &Shape<'_>) -> Vec<[u32; 4]> {
        let l1 = self.get(0x8000_0005).copied().unwrap_or_default();
        let outer = self.get(0x8000_0006).copied().unwrap_or_default();
        let caches = [
            Cache::amd_l1(1, l1.ecx),
            Cache::amd_l1(2, l1.edx),
            Cache::amd_outer(2, outer.ecx >> 16, outer.ecx),
            Cache::amd_outer(3, (outer.edx >> 18) * 512, outer.edx),
        ];
        let mut subleaves: Vec<_> = caches.iter().flatten().map(|cache| cache.subleaf(shape)).collect();
        subleaves.push([0; 4]);
        subleaves
    }
}

/// Subleaves of 0xB or 0x1F: the levels and the "no more levels" end.
fn extended_topology(levels: &[Level], apic_id: u32) -> Vec<[u32; 4]> {
    let end = Level { kind: 0, shift: 0, cpus: 0 };
    let numbered = (0..).zip(levels.iter().chain([&end]));
    numbered.map(|(index, level)| [level.shift, level.cpus, level.kind << 8 | index, apic_id]).collect()
}

/// A cache of leaf 0x8000001D.
struct Cache {
    /// 1 data, 2 instructions, 3 both.
    kind: u32,
    level: u32,
    kib: u32,
    line: u32,
    ways: u32,
}

impl Cache {
    /// From ECX (data) or EDX (instructions) of leaf 0x80000005: size in KiB, ways, lines a tag, line size.
    fn amd_l1(kind: u32, register: u32) -> Option<Self> {
        let (kib, ways, line) = (register >> 24, register >> 16 & 0xff, register & 0xff);
        Self { kind, level: 1, kib, line, ways }.valid()
    }

    /// From ECX (L2) or EDX (L3) of leaf 0x80000006: bits 15:12 are a code for the ways, 7:0 the line size.
    fn amd_outer(level: u32, kib: u32, register: u32) -> Option<Self> {
        let ways = match register >> 12 & 0xf {
            code @ 1..=4 => code,
            5 => 6,
            6 => 8,
            0xa => 32,
            0xb => 48,
            0xc => 64,
            0xd => 96,
            0xe => 128,
            // 8 is sixteen ways; 9 refers to the leaf that is being made.
            _ => 16,
        };
        Self { kind: 3, level, kib, line: register & 0xff, ways }.valid()
    }

    fn valid(self) -> Option<Self> {
        (self.kib > 0 && self.line > 0 && self.ways > 0 && self.sets() > 0).then_some(self)
    }

    fn sets(&self) -> u32 {
        self.kib * 1024 / (self.line * self.ways)
    }

    fn subleaf(&self, shape: &Shape<'_>) -> [u32; 4] {
        const SELF_INITIALISING: u32 = 1 << 8;
        let sharers = 1 << shape.cache_shift(self.level);
        let eax = with_bits(self.kind | self.level << 5 | SELF_INITIALISING, 25, 14, sharers - 1);
        let ebx = with_bits(self.line - 1, 31, 22, self.ways - 1);
        [eax, ebx, self.sets() - 1, 0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology(threads: u32, cores: u32, sockets: u32, nodes: u32) -> Topology {
        Topology { cpus: threads * cores * sockets, threads, cores, sockets, nodes }
    }

    fn ids(topology: &Topology) -> Vec<u32> {
        (0..topology.cpus).map(|cpu| apic_id(topology, cpu)).collect()
    }

    fn leaf(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> Leaf {
        Leaf { function, eax, ebx, ecx, edx, ..Default::default() }
    }

    /// What KVM says on an EPYC 7001, as far as it matters here.
    fn epyc() -> CpuId {
        CpuId::from_entries(&[
            leaf(0, [0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
            leaf(1, [0x0080_0f12, 0x0501_0800, 1 << 3, 0]),
            leaf(5, [0x40, 0x40, 3, 0x11]),
            leaf(0x4000_0000, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
            leaf(0x8000_0000, [0x8000_0026, 0, 0, 0]),
            leaf(0x8000_0001, [0, 0, 0, 0]),
            leaf(0x8000_0005, [0, 0, 0x2008_0140, 0x4004_0140]),
            leaf(0x8000_0006, [0, 0, 0x0200_6140, 0x0100_8140]),
            leaf(0x8000_0008, [0x3030, 0, 0x7007, 0]),
            leaf(0x8000_001e, [7, 7, 7, 7]),
            leaf(0x8000_0026, [7, 7, 7, 7]),
        ])
        .unwrap()
    }

    fn xeon() -> CpuId {
        let mut leaves = vec![
            leaf(0, [0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            leaf(1, [0x0005_0654, 0, 0, 0]),
            leaf(0x8000_0000, [0x8000_0008, 0, 0, 0]),
            leaf(0x8000_0008, [0x302e, 0, 0, 0]),
        ];
        let caches = [(1, 1), (2, 1), (3, 2), (3, 3), (0, 0)];
        leaves.extend((0..).zip(caches).map(|(index, (kind, level))| Leaf {
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            ..leaf(4, [kind | level << 5, 0x01c0_003f, 63, 0])
        }));
        CpuId::from_entries(&leaves).unwrap()
    }

    fn registers(cpuid: &CpuId, function: u32, index: u32) -> [u32; 4] {
        let mut found =
            cpuid.as_slice().iter().filter(|leaf| leaf.function == function && leaf.index == index);
        let leaf = found.next().unwrap_or_else(|| panic!("leaf {function:#x}.{index} is missing"));
        assert_eq!(found.next(), None, "leaf {function:#x}.{index} is there twice");
        [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
    }

    #[test]
    fn one_package_packs_tightly() {
        assert_eq!(ids(&topology(1, 1, 1, 1)), [0]);
        assert_eq!(ids(&topology(1, 8, 1, 1)), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(ids(&topology(2, 3, 1, 1)), [0, 1, 2, 3, 4, 5]);
        assert_eq!(ids(&topology(3, 2, 1, 1)), [0, 1, 2, 4, 5, 6]);
    }

    #[test]
    fn packages_and_dies_have_a_cache_of_their_own_on_zen_1() {
        assert_eq!(ids(&topology(2, 2, 2, 2)), [0, 1, 2, 3, 8, 9, 10, 11]);
        assert_eq!(ids(&topology(1, 8, 1, 2)), [0, 1, 2, 3, 8, 9, 10, 11]);
        assert_eq!(ids(&topology(1, 1, 4, 4)), [0, 8, 16, 24]);
    }

    #[test]
    fn many_packages_stay_within_xapic_ids() {
        assert_eq!(ids(&topology(1, 1, 64, 1)), (0..64).collect::<Vec<_>>());
        assert!(ids(&topology(2, 32, 2, 2)).iter().all(|&id| id <= MAX_XAPIC_ID));
    }

    #[test]
    fn ids_are_unique_and_increase() {
        for (threads, cores, sockets, nodes) in [(2, 6, 3, 3), (1, 6, 2, 4), (4, 5, 7, 7), (2, 512, 2, 4)] {
            let ids = ids(&topology(threads, cores, sockets, nodes));
            assert!(ids.is_sorted_by(|a, b| a < b), "{ids:?}");
        }
    }

    #[test]
    fn cpus_are_dealt_out_to_nodes_in_order() {
        let topology = topology(1, 8, 1, 2);
        let nodes: Vec<_> = (0..8).map(|cpu| node(&topology, cpu)).collect();
        assert_eq!(nodes, [0, 0, 0, 0, 1, 1, 1, 1]);
    }

    #[test]
    fn leaf_1_names_the_cpu_and_offers_what_kvm_emulates() {
        let cpuid = cpuid(&epyc(), &topology(2, 2, 2, 2), 5);
        let [_, ebx, ecx, edx] = registers(&cpuid, 1, 0);
        assert_eq!(ebx, 9 << 24 | 8 << 16 | 0x0800);
        assert_eq!(ecx, 1 << 21 | 1 << 24 | 1 << 31, "x2APIC, TSC deadline, hypervisor, and no MONITOR");
        assert_eq!(edx, 1 << 28);
        assert_eq!(registers(&cpuid, 5, 0), [0; 4]);
        assert_eq!(registers(&cpuid, 0x4000_0000, 0)[1], 0x4b4d_564b);
    }

    #[test]
    fn a_single_cpu_is_no_multithreaded_package() {
        let cpuid = cpuid(&epyc(), &topology(1, 1, 1, 1), 0);
        assert_eq!(registers(&cpuid, 1, 0)[3] >> 28 & 1, 0);
        assert_eq!(registers(&cpuid, 0xb, 0), [0, 1, 0x100, 0]);
        assert_eq!(registers(&cpuid, 0xb, 1), [0, 1, 0x201, 0]);
    }

    #[test]
    fn leaf_0xb_of_2x2x2() {
        let cpuid = cpuid(&epyc(), &topology(2, 2, 2, 2), 7);
        assert_eq!(registers(&cpuid, 0xb, 0), [1, 2, 0x100, 11]);
        assert_eq!(registers(&cpuid, 0xb, 1), [3, 4, 0x201, 11]);
        assert_eq!(registers(&cpuid, 0xb, 2), [0, 0, 2, 11]);
    }

    #[test]
    fn amd_leaves_of_2x2x2() {
        let cpuid = cpuid(&epyc(), &topology(2, 2, 2, 2), 6);
        assert_eq!(registers(&cpuid, 0x8000_0001, 0)[2], 1 << 22 | 1 << 1);
        assert_eq!(registers(&cpuid, 0x8000_0008, 0), [0x3030, 0, 0x3003, 0]);
        assert_eq!(registers(&cpuid, 0x8000_001e, 0), [10, 0x101, 1, 0]);
        // L1 data: 32 KiB, 8 ways, 64-byte lines, shared by the 2 threads of the core.
        assert_eq!(registers(&cpuid, 0x8000_001d, 0), [0x4121, 0x01c0_003f, 63, 0]);
        // L2: 512 KiB, 8 ways, the same 2 threads.
        assert_eq!(registers(&cpuid, 0x8000_001d, 2), [0x4143, 0x01c0_003f, 1023, 0]);
        // L3: 32 MiB, 16 ways, shared by the package's 8 APIC ids.
        assert_eq!(registers(&cpuid, 0x8000_001d, 3), [7 << 14 | 0x163, 0x03c0_003f, 32767, 0]);
        assert_eq!(registers(&cpuid, 0x8000_001d, 4), [0; 4]);
    }

    #[test]
    fn a_package_of_two_nodes_is_two_dies_on_amd() {
        let (epyc, topology) = (epyc(), topology(1, 8, 1, 2));
        for cpu in 0..8 {
            let cpuid = cpuid(&epyc, &topology, cpu);
            let die = cpu / 4;
            assert_eq!(registers(&cpuid, 0x8000_001e, 0), [die * 8 + cpu % 4, cpu, 1 << 8 | die, 0]);
            assert_eq!(registers(&cpuid, 0xb, 1)[..2], [4, 8]);
        }
    }

    #[test]
    fn the_hosts_own_extended_topology_is_gone() {
        let cpuid = cpuid(&epyc(), &topology(1, 2, 1, 1), 0);
        assert!(cpuid.as_slice().iter().all(|leaf| leaf.function != 0x8000_0026));
        assert_eq!(registers(&cpuid, 0x8000_0000, 0)[0], 0x8000_0025);
    }

    #[test]
    fn intel_caches_of_2x2x2() {
        let cpuid = cpuid(&xeon(), &topology(2, 2, 2, 2), 0);
        for index in 0..3 {
            assert_eq!(registers(&cpuid, 4, index)[0] >> 14, 3 << 12 | 1, "cache {index}");
        }
        assert_eq!(registers(&cpuid, 4, 3)[0] >> 14, 3 << 12 | 7);
        assert_eq!(registers(&cpuid, 4, 4)[0], 0);
        assert!(cpuid.as_slice().iter().all(|leaf| leaf.function != 0x1f));
    }

    #[test]
    fn dies_raise_the_last_leaf_on_intel() {
        let cpuid = cpuid(&xeon(), &topology(1, 8, 1, 2), 5);
        assert_eq!(registers(&cpuid, 0, 0)[0], 0x1f);
        assert_eq!(registers(&cpuid, 0x1f, 0), [0, 1, 0x100, 9]);
        assert_eq!(registers(&cpuid, 0x1f, 1), [3, 4, 0x201, 9]);
        assert_eq!(registers(&cpuid, 0x1f, 2), [4, 8, 0x502, 9]);
        assert_eq!(registers(&cpuid, 0x1f, 3), [0, 0, 3, 9]);
    }
}
