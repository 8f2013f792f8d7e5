//! `vectors`: the function's interrupts: which vector, what for, on which CPUs, how often.

use std::fs;

use anyhow::Result;
use serde_json::{Value, json};

/// Index of a vector in the hardware interrupt number: as it is in kernels with a domain a device, in the low 11 bits
/// where there is one domain for all (`pci_msi_domain_calc_hwirq`, drivers/pci/msi/irqdomain.c).
const INDEX_BITS: u64 = 0x7ff;

/// The lines of /proc/interrupts whose action is the driver's, function by function, in vector order.
pub fn run() -> Result<Value> {
    Ok(all()?.iter().map(Vector::describe).collect())
}

/// `vectors --table`: the same for people.
pub fn table() -> Result<()> {
    println!(
        "{:>6}  {:>4}  {:<28}  {:>9}  {:>4}  {:>10}",
        "vector", "IRQ", "for", "hint", "CPU", "interrupts"
    );
    for vector in all()? {
        let description = vector.describe();
        let text = |name: &str| description[name].as_str().unwrap_or_default().to_owned();
        println!(
            "{:>6}  {:>4}  {:<28}  {:>9}  {:>4}  {:>10}",
            vector.index,
            vector.irq,
            vector.name,
            text("hint"),
            text("effective"),
            vector.counts.iter().sum::<u64>()
        );
    }
    Ok(())
}

fn all() -> Result<Vec<Vector>> {
    let table = fs::read_to_string("/proc/interrupts")?;
    let cpus = table.lines().next().unwrap_or_default().split_whitespace().count();
    let mut vectors: Vec<Vector> = table.lines().filter_map(|line| Vector::parse(line, cpus)).collect();
    vectors.sort_by_key(|vector| (vector.function().map(str::to_owned), vector.index));
    Ok(vectors)
}

struct Vector {
    irq: u32,
    index: u64,
    name: String,
    counts: Vec<u64>,
}

impl Vector {
    /// `IRQ: COUNT... CHIP HWIRQ-TRIGGER NAME`.
    fn parse(line: &str, cpus: usize) -> Option<Self> {
        let (irq, rest) = line.split_once(':')?;
        let name = rest.split_whitespace().last().filter(|name| name.starts_with("mana"))?;
        let counts = rest.split_whitespace().take(cpus).map_while(|count| count.parse().ok()).collect();
        let is_trigger = |word: &&str| ["-edge", "-fasteoi"].iter().any(|trigger| word.ends_with(trigger));
        let trigger = rest.split_whitespace().find(is_trigger)?;
        let hwirq: u64 = trigger.split_once('-')?.0.parse().ok()?;
        Some(Self { irq: irq.trim().parse().ok()?, index: hwirq & INDEX_BITS, name: name.to_owned(), counts })
    }

    /// Address of the function, which the driver puts into the name.
    fn function(&self) -> Option<&str> {
        self.name.split_once("@pci:").map(|(_, address)| address)
    }

    fn describe(&self) -> Value {
        let attribute = |name| {
            let text = fs::read_to_string(format!("/proc/irq/{}/{name}", self.irq)).unwrap_or_default();
            text.trim().to_owned()
        };
        json!({
            "vector": self.index,
            "irq": self.irq,
            "name": self.name,
            "function": self.function(),
            "hint": cpu_list(&attribute("affinity_hint")),
            "affinity": attribute("smp_affinity_list"),
            "effective": attribute("effective_affinity_list"),
            "counts": self.counts,
            "total": self.counts.iter().sum::<u64>(),
        })
    }
}

/// `0-2,5` for the mask `00000000,00000027`: 32-bit words, the highest first.
fn cpu_list(mask: &str) -> String {
    let words = mask.rsplit(',').map(|word| u32::from_str_radix(word, 16).unwrap_or(0));
    let bits = words.enumerate().flat_map(|(index, word)| {
        (0..32).filter(move |bit| word >> bit & 1 == 1).map(move |bit| index * 32 + bit)
    });
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for cpu in bits {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => runs.push((cpu, cpu)),
        }
    }
    let run = |&(first, last): &(usize, usize)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    runs.iter().map(run).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_both_generations_of_lines() {
        let line = " 25:   3   40  PCI-MSIX-0000:01:00.0   1-edge      mana_msi1@pci:0000:01:00.0";
        let vector = Vector::parse(line, 2).unwrap();
        assert_eq!((vector.irq, vector.index, vector.counts), (25, 1, vec![3, 40]));
        let line = " 26:   3   40  PCI-MSI 524290-edge      mana_q1@pci:0000:01:00.0";
        let vector = Vector::parse(line, 2).unwrap();
        assert_eq!((vector.index, vector.name.as_str()), (2, "mana_q1@pci:0000:01:00.0"));
        assert!(Vector::parse("  4:  7 0 IO-APIC   4-edge      ttyS0", 2).is_none());
    }

    #[test]
    fn lists_cpus_of_a_mask() {
        assert_eq!(cpu_list("27"), "0-2,5");
        assert_eq!(cpu_list("00000003,80000000"), "31-33");
        assert_eq!(cpu_list("0"), "");
    }
}
