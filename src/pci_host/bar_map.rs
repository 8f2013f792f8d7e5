//! From an address in an MMIO window to a function's BAR.

use std::ops::Range;
use std::sync::Arc;

use super::PciFunction;

/// A BAR that decodes addresses.
#[derive(Clone)]
pub struct Mapping {
    /// Addresses of the whole BAR.
    pub range: Range<u64>,
    /// The function.
    pub function: Arc<dyn PciFunction>,
    /// BAR number.
    pub bar: u8,
}

/// All BARs of `function` if it decodes memory, wherever they are.
pub fn mappings(function: &Arc<dyn PciFunction>) -> Vec<Mapping> {
    if !function.memory_enabled() {
        return Vec::new();
    }
    let bars = function.bars().into_iter().filter_map(|bar| {
        let range = bar.address..bar.address.checked_add(bar.size)?;
        Some(Mapping { range, function: function.clone(), bar: bar.index })
    });
    bars.collect()
}

/// All BARs that are reachable, without overlap. Immutable: a change makes a new one.
#[derive(Default)]
pub struct BarMap {
    /// Ordered by address.
    entries: Vec<Entry>,
}

struct Entry {
    /// The part of the BAR that no BAR before it covers.
    visible: Range<u64>,
    mapping: Mapping,
}

impl BarMap {
    /// Where BARs overlap, the one at the lower address answers.
    pub fn new(mut mappings: Vec<Mapping>) -> Self {
        mappings.sort_by_key(|mapping| mapping.range.start);
        let mut free_from = 0;
        let mut entries = Vec::new();
        for mapping in mappings {
            let visible = mapping.range.start.max(free_from)..mapping.range.end;
            if !visible.is_empty() {
                free_from = visible.end;
                entries.push(Entry { visible, mapping });
            }
        }
        Self { entries }
    }

    /// The BAR that has all `len` bytes at `address`, and the offset in it.
    pub fn find(&self, address: u64, len: usize) -> Option<(&Mapping, u64)> {
        let after = self.entries.partition_point(|entry| entry.visible.start <= address);
        let entry = self.entries.get(after.checked_sub(1)?)?;
        let end = address.checked_add(len as u64)?;
        (end <= entry.visible.end).then(|| (&entry.mapping, address - entry.mapping.range.start))
    }
}
