//! What a trace says about a device's interrupt vectors: who uses them, and what became of each.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};

use super::reader::Record;

/// Names shown of each kind of queue before the rest is only counted.
const MAX_NAMED: usize = 4;

/// One MSI-X vector.
#[derive(Clone, Debug, Default)]
pub struct Vector {
    /// Times its message was written.
    pub programmed: u64,
    /// Times it was unmasked.
    pub unmasked: u64,
    /// Times it was unmasked since MSI-X was last enabled.
    pub unmasked_since_enable: u64,
    /// Interrupts sent.
    pub fired: u64,
    /// Interrupts held back by a mask.
    pub pended: u64,
    /// APIC id its last message went to.
    pub apic: Option<u64>,
    /// It is unmasked now.
    pub live: bool,
    /// The hardware channel's EQ uses it.
    pub hwc: bool,
    eqs: BTreeSet<u64>,
    /// Work queues by kind.
    queues: BTreeMap<&'static str, BTreeSet<u64>>,
}

impl Vector {
    /// What it is for, e.g. `EQ 3 (SQ 1, RQ 1)`.
    pub fn purpose(&self) -> String {
        let queues = self.queues.iter().map(|(kind, ids)| format!("{kind} {}", named(ids)));
        let uses: Vec<_> = self.hwc.then(|| "HWC".into()).into_iter().chain(queues).collect();
        match (self.eqs.is_empty(), uses.is_empty()) {
            (true, _) => uses.join(", "),
            (false, true) => format!("EQ {}", named(&self.eqs)),
            (false, false) => format!("EQ {} ({})", named(&self.eqs), uses.join(", ")),
        }
    }
}

fn named(ids: &BTreeSet<u64>) -> String {
    let shown: Vec<_> = ids.iter().take(MAX_NAMED).map(u64::to_string).collect();
    match ids.len().saturating_sub(MAX_NAMED) {
        0 => shown.join(" "),
        rest => format!("{} and {rest} more", shown.join(" ")),
    }
}

/// The vectors of one device, kept up to date record by record.
#[derive(Clone, Debug, Default)]
pub struct Vectors {
    table: BTreeMap<u64, Vector>,
    /// Vector of each EQ, while it lives and after.
    eqs: BTreeMap<u64, u64>,
    hwc_eq: Option<u64>,
    /// ESTABLISH was asked for and is not answered.
    establishing: bool,
    /// EQ of the CQ, and the work queue, that the current command made: they belong together.
    made_cq: Option<u64>,
    made_wq: Option<(&'static str, u64)>,
    /// MSI-X is enabled.
    pub enabled: bool,
    /// GDMA_QUERY_MAX_RESOURCES was answered since MSI-X was enabled: who adds vectors now grows them.
    pub limits_known: bool,
}

impl Vectors {
    /// Take note of what `record` says.
    pub fn note(&mut self, record: &Record) {
        match record.event.as_str() {
            "msix.program" => {
                let apic = record.number("address").filter(|&address| address != 0).map(apic_id);
                let vector = self.vector(record);
                vector.programmed += 1;
                vector.apic = apic.or(vector.apic);
            }
            "msix.unmask" => {
                let vector = self.vector(record);
                vector.unmasked += 1;
                vector.unmasked_since_enable += 1;
                vector.live = true;
            }
            "msix.mask" => self.vector(record).live = false,
            "msix.fire" => self.vector(record).fired += 1,
            "msix.pend" => self.vector(record).pended += 1,
            "msix.enable" => self.set_enabled(true),
            "msix.disable" | "pci.flr" => self.set_enabled(false),
            "smc.request" => self.establishing = record.text("type").contains("ESTABLISH"),
            "smc.response" => self.establishing = false,
            "hwc.request" => (self.made_cq, self.made_wq) = (None, None),
            "hwc.response" if record.text("command") == "GDMA_QUERY_MAX_RESOURCES" => {
                self.limits_known = true;
            }
            "queue.create" => self.queue_made(record),
            _ => {}
        }
    }

    /// Every vector that was ever used.
    pub fn table(&self) -> &BTreeMap<u64, Vector> {
        &self.table
    }
    /// Vectors that are unmasked now.
    pub fn live(&self) -> impl Iterator<Item = u64> {
        self.table.iter().filter(|(_, vector)| vector.live).map(|(&number, _)| number)
    }
    /// Whether `number` is the hardware channel's.
    pub fn is_hwc(&self, number: u64) -> bool {
        self.table.get(&number).is_some_and(|vector| vector.hwc)
    }
    /// Whether EQ `id` is the hardware channel's.
    pub fn is_hwc_eq(&self, id: u64) -> bool {
        self.hwc_eq == Some(id)
    }

    fn vector(&mut self, record: &Record) -> &mut Vector {
        self.table.entry(record.number("vector").unwrap_or(u64::MAX)).or_default()
    }

    fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
        self.limits_known = false;
        self.table.values_mut().for_each(|vector| vector.unmasked_since_enable = 0);
        if !enabled {
            self.table.values_mut().for_each(|vector| vector.live = false);
        }
    }

    fn queue_made(&mut self, record: &Record) {
        let Some(id) = record.number("id") else { return };
        match record.text("kind") {
            "eq" => self.eq_made(id, record.number("msix").unwrap_or(0)),
            "cq" => self.made_cq = record.number("eq"),
            "sq" => self.made_wq = Some(("SQ", id)),
            "rq" => self.made_wq = Some(("RQ", id)),
            _ => {}
        }
        if let (Some(eq), Some((kind, id))) = (self.made_cq, self.made_wq)
            && let Some(vector) = self.eqs.get(&eq).and_then(|vector| self.table.get_mut(vector))
            && self.hwc_eq != Some(eq)
        {
            vector.queues.entry(kind).or_default().insert(id);
            (self.made_cq, self.made_wq) = (None, None);
        }
    }

    fn eq_made(&mut self, id: u64, number: u64) {
        self.eqs.insert(id, number);
        let vector = self.table.entry(number).or_default();
        if self.establishing {
            vector.hwc = true;
            self.hwc_eq = Some(id);
        }
        vector.eqs.insert(id);
    }

    /// The closing table: a vector, what it is for, and what became of it.
    pub fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        let purposes: Vec<_> = self.table.values().map(Vector::purpose).collect();
        let width = purposes.iter().map(|purpose| purpose.chars().count()).max().unwrap_or(0).max(8);
        writeln!(out, "vector  {:<width$}  APIC id  programmed  unmasked     fired  pended", "what for")?;
        for ((number, vector), purpose) in self.table.iter().zip(purposes) {
            let apic = vector.apic.map_or("-".into(), |apic| apic.to_string());
            let Vector { programmed, unmasked, fired, pended, .. } = vector;
            writeln!(
                out,
                "{number:>6}  {purpose:<width$}  {apic:>7}  {programmed:>10}  {unmasked:>8}  {fired:>8}  {pended:>6}"
            )?;
        }
        Ok(())
    }
}

/// Destination of an x86 MSI message: bits 12..19, extended by bits 5..11 and the upper half's bits 8..31 (Intel SDM
/// volume 3, 12.11.1; Linux, `struct x86_msi_addr_lo` and `x86_msi_addr_hi`).
fn apic_id(address: u64) -> u64 {
    (address >> 12 & 0xff) | (address >> 5 & 0x7f) << 8 | (address >> 32 & 0xffff_ff00)
}
