//! Numbers, times and names as a person writes them.

use serde_json::{Map, Value};

use super::super::reader::Record;

/// `t_ns` in seconds, as the kernel's log has it.
pub fn seconds(t_ns: u64) -> String {
    format!("{:>5}.{:06}", t_ns / 1_000_000_000, t_ns / 1000 % 1_000_000)
}

/// A duration in the unit that suits it.
pub fn duration(ns: u64) -> String {
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{} µs", ns / 1000),
        1_000_000..1_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        _ => format!("{:.1} s", ns as f64 / 1e9),
    }
}

/// `text` with every number in it replaced, so that `queue_id=7` and `queue_id=0x1f` read the same.
pub fn without_numbers(text: &str) -> String {
    let mut result = String::new();
    for word in text.split_inclusive(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
        match word.as_bytes().first() {
            Some(b'0'..=b'9') => result.push('#'),
            _ => result.push_str(word),
        }
    }
    result
}

/// Parts of the names of fields that are read in hexadecimal however small they are.
const HEXADECIMAL: [&str; 6] = ["flags", "mask", "handle", "region", "key", "address"];

/// A field's value: small numbers in decimal, large ones, which are addresses, handles and masks, in hexadecimal.
fn value(name: &str, value: &Value) -> String {
    match value.as_u64() {
        Some(number) if name.contains("mac") && number < 1 << 48 => {
            let octets: Vec<_> =
                number.to_be_bytes()[2..].iter().map(|octet| format!("{octet:02x}")).collect();
            octets.join(":")
        }
        Some(number) if number >= 10_000_000 || HEXADECIMAL.iter().any(|part| name.contains(part)) => {
            format!("{number:#x}")
        }
        Some(number) => number.to_string(),
        None => value.as_str().map_or_else(|| value.to_string(), str::to_owned),
    }
}

/// The fields of a message but those in `except`, as `name=value`.
pub fn fields(map: &Map<String, Value>, except: &[&str]) -> String {
    let shown = map.iter().filter(|(name, _)| !except.contains(&name.as_str()));
    shown.map(|(name, field)| format!("{name}={}", value(name, field))).collect::<Vec<_>>().join(" ")
}

/// Whole numbers in order, runs as ranges: `0, 2-5`.
pub fn ranges(numbers: impl IntoIterator<Item = u64>) -> String {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(number) => *last = number,
            _ => runs.push((number, number)),
        }
    }
    let run =
        |(first, last): (u64, u64)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    runs.into_iter().map(run).collect::<Vec<_>>().join(", ")
}

/// What a status of the hardware channel says.
pub fn status(status: u64) -> String {
    match status {
        0 => "ok".into(),
        0x105 => "more pages wanted".into(),
        0xffff_ffff => "FAILED: command not supported (0xffffffff)".into(),
        other => format!("FAILED: status {other:#x}"),
    }
}

/// What an event queue entry says (`enum gdma_eqe_type`, gdma.h).
pub fn eqe(kind: u64) -> String {
    match kind {
        3 => "completion".into(),
        64 => "test event".into(),
        129 => "HWC init: EQ id and doorbell page".into(),
        130 => "HWC init: data".into(),
        131 => "HWC init: done".into(),
        132 => "FPGA reconfiguration".into(),
        133 => "SoC reconfiguration data".into(),
        134 => "SoC service".into(),
        135 => "reset request".into(),
        176 => "fatal error of an RNIC queue pair".into(),
        other => format!("event of unknown type {other}"),
    }
}

/// A register of BAR0 (the VF's layout).
fn register(offset: u64) -> &'static str {
    match offset {
        0x00 => " (version)",
        0x08 => " (doorbell zone offset)",
        0x10 => " (doorbell page size)",
        0x18 => " (shared-memory window offset)",
        0x20 => " (shared-memory window size)",
        _ => "",
    }
}

fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// An event that stands for itself, in words.
pub fn plain(record: &Record) -> String {
    let number = |name| record.number(name).unwrap_or(0);
    match record.event.as_str() {
        "pci.command" => format!(
            "PCI: memory decoding {}, bus mastering {}",
            on_off(record.flag("memory")),
            on_off(record.flag("bus_master"))
        ),
        "pci.flr" => "PCI: function-level reset".into(),
        "msix.disable" => "MSI-X is disabled".into(),
        "msix.function_mask" if record.flag("masked") => "MSI-X: all vectors masked (function mask)".into(),
        "msix.function_mask" => "MSI-X: function mask cleared".into(),
        "reg.read" => format!(
            "register {:#x}{} reads {:#x} ({} bytes)",
            number("offset"),
            register(number("offset")),
            number("value"),
            number("size")
        ),
        "queue.create" => queue_created(record),
        "queue.destroy" => format!("{} {} is gone", record.text("kind").to_uppercase(), number("id")),
        "vport.rx" => format!(
            "vPort {}: receive {}, RSS {}, {} entries in the indirection table, CQE coalescing {}",
            number("vport"),
            on_off(record.flag("enable")),
            on_off(record.flag("rss")),
            number("entries"),
            on_off(record.flag("coalescing"))
        ),
        "fault" => format!("fault applied: {}", record.text("detail")),
        "host.event" => format!("host event: {}", record.text("detail")),
        "rule.violation" => {
            format!("RULE BROKEN by the driver: {}: {}", record.text("rule"), record.text("detail"))
        }
        "ledger" => ledger(record),
        other => format!("{other} {}", fields(&record.fields, &[])).trim_end().to_owned(),
    }
}

fn queue_created(record: &Record) -> String {
    let kind = record.text("kind").to_uppercase();
    let mut text = format!("{kind} {} is made", record.number("id").unwrap_or(0));
    if let Some(vector) = record.number("msix") {
        text += &format!(" on vector {vector}");
    }
    if let Some(eq) = record.number("eq") {
        text += &format!(" on EQ {eq}");
    }
    text + &format!(", {} entries", record.number("entries").unwrap_or(0))
}

fn ledger(record: &Record) -> String {
    let mut alive = record.fields.clone();
    alive.retain(|_, count| count.as_u64() != Some(0));
    if alive.is_empty() {
        "ledger: nothing is left alive".into()
    } else {
        format!("ledger: alive are {}", fields(&alive, &[]))
    }
}
