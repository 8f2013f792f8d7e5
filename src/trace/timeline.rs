//! The vectors over time, as one HTML page that needs nothing else.
//!
//! What happened is embedded as JSON; the page's script draws it, so that the reader can zoom in.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::reader::Record;
use super::story::{answered, asked, plain};
use super::vectors::Vectors;

const PAGE: &str = include_str!("timeline/page.html");
const STYLE: &str = include_str!("timeline/style.css");
const SCRIPT: &str = include_str!("timeline/script.js");

/// Interrupts of a page that are drawn one by one; more are counted in buckets.
const MAX_POINTS: usize = 40_000;

/// A page about `records`, headed `title`.
pub fn page(records: &[Record], title: &str) -> String {
    let title = title.replace('&', "&amp;").replace('<', "&lt;");
    // A "</script>" in a name must not end the script.
    let data = data(records).to_string().replace('<', "\\u003c");
    PAGE.replace("{{title}}", &title)
        .replace("{{style}}", STYLE)
        .replace("{{script}}", SCRIPT)
        .replace("{{data}}", &data)
}

fn data(records: &[Record]) -> Value {
    let start = records.first().map_or(0, |record| record.t_ns);
    let end = records.iter().map(|record| record.t_ns).max().unwrap_or(start);
    let interrupts = records.iter().filter(|record| is_interrupt(record)).count();
    let bucket = match interrupts {
        0..=MAX_POINTS => 1,
        many => (end - start) / MAX_POINTS as u64 * (many / MAX_POINTS) as u64 + 1,
    };
    let mut devices: BTreeMap<u64, Device> = BTreeMap::new();
    for record in records.iter().filter(|record| record.event != super::END) {
        let device = devices.entry(record.device).or_default();
        device.note(record.t_ns.saturating_sub(start), bucket, record);
    }
    let devices: Vec<_> =
        devices.into_iter().map(|(number, device)| device.json(number, end - start)).collect();
    json!({ "end": end - start, "devices": devices })
}

fn is_interrupt(record: &Record) -> bool {
    matches!(record.event.as_str(), "msix.fire" | "msix.pend")
}

/// What a vector can do, as the page's script numbers it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Unused = 0,
    Programmed = 1,
    Unmasked = 2,
}

/// A row of the chart.
#[derive(Default)]
struct Lane {
    state: State,
    since: u64,
    /// It holds a message.
    message: bool,
    /// Start, end, state.
    spans: Vec<(u64, u64, u8)>,
    /// Time and count.
    fired: Vec<(u64, u64)>,
    pended: Vec<(u64, u64)>,
    /// Time and text.
    notes: Vec<(u64, String)>,
}

impl Lane {
    fn note(&mut self, t: u64, bucket: u64, record: &Record) {
        match record.event.as_str() {
            "msix.fire" => count(&mut self.fired, t, bucket),
            "msix.pend" => count(&mut self.pended, t, bucket),
            "msix.unmask" => self.enter(t, State::Unmasked),
            "msix.mask" => self.masked(t),
            _ => {
                self.message = record.number("data") != Some(0) || record.number("address") != Some(0);
                if self.state != State::Unmasked {
                    self.masked(t);
                }
            }
        }
    }

    fn enter(&mut self, t: u64, state: State) {
        if state != self.state {
            self.close(t);
            self.state = state;
            self.since = t;
        }
    }

    fn close(&mut self, t: u64) {
        if self.state != State::Unused {
            self.spans.push((self.since, t, self.state as u8));
        }
    }

    fn masked(&mut self, t: u64) {
        self.enter(t, if self.message { State::Programmed } else { State::Unused });
    }
}

fn count(points: &mut Vec<(u64, u64)>, t: u64, bucket: u64) {
    match points.last_mut() {
        Some((last, count)) if bucket > 1 && *last / bucket == t / bucket => *count += 1,
        _ => points.push((t, 1)),
    }
}

/// What the page shows of one device.
#[derive(Default)]
struct Device {
    vectors: Vectors,
    lanes: BTreeMap<u64, Lane>,
    asked: Option<(u64, String)>,
    commands: Vec<Value>,
    marks: Vec<Value>,
}

impl Device {
    fn note(&mut self, t: u64, bucket: u64, record: &Record) {
        self.vectors.note(record);
        match record.event.as_str() {
            "msix.program" | "msix.unmask" | "msix.mask" | "msix.fire" | "msix.pend" => {
                self.lane(record.number("vector")).note(t, bucket, record);
            }
            "queue.create" if record.number("msix").is_some() => {
                self.lane(record.number("msix")).notes.push((t, plain(record)));
            }
            "hwc.request" | "smc.request" => self.asked = Some((t, asked(record))),
            "hwc.response" | "smc.response" => self.answered(t, record),
            "msix.disable" | "pci.flr" => {
                self.lanes.values_mut().for_each(|lane| lane.enter(t, State::Unused));
                self.mark(t, record);
            }
            "msix.enable" | "vport.rx" | "fault" | "host.event" | "rule.violation" => self.mark(t, record),
            _ => {}
        }
    }

    fn lane(&mut self, vector: Option<u64>) -> &mut Lane {
        self.lanes.entry(vector.unwrap_or(u64::MAX)).or_default()
    }

    fn answered(&mut self, t: u64, record: &Record) {
        let (start, question) = self.asked.take().unwrap_or((t, String::new()));
        let status = record.number("status").unwrap_or(0);
        let name = match record.text("command") {
            "" => format!("SMC_{}", record.text("type")),
            command => command.to_owned(),
        };
        let answer = answered(record);
        self.commands
            .push(json!({ "t": start, "d": t - start, "n": name, "s": status, "q": question, "a": answer }));
    }

    fn mark(&mut self, t: u64, record: &Record) {
        self.marks.push(json!({ "t": t, "k": record.event, "x": plain(record) }));
    }

    fn json(mut self, number: u64, end: u64) -> Value {
        let rows: Vec<_> = self.vectors.table().keys().copied().collect();
        let rows = rows.into_iter().map(|row| {
            let mut lane = self.lanes.remove(&row).unwrap_or_default();
            lane.close(end);
            let vector = &self.vectors.table()[&row];
            json!({
                "n": row, "purpose": vector.purpose(), "apic": vector.apic, "programmed": vector.programmed,
                "unmasked": vector.unmasked, "fired": vector.fired, "pended": vector.pended,
                "spans": lane.spans, "fires": lane.fired, "pends": lane.pended, "notes": lane.notes,
            })
        });
        let rows: Vec<_> = rows.collect();
        json!({ "n": number, "vectors": rows, "commands": self.commands, "marks": self.marks })
    }
}
