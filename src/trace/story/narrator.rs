//! Puts records together that belong together.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};

use super::super::END;
use super::super::reader::Record;
use super::super::vectors::Vectors;
use super::{Line, Mark, Paragraph, words};

/// Steps between a request and its answer that are told below it; if there are more, the answer stands alone.
const MAX_STEPS: usize = 256;
/// Vectors of a group that are named one by one.
const MAX_VECTORS: usize = 8;
/// `GDMA_EQE_COMPLETION` (gdma.h).
const COMPLETION: u64 = 3;
/// Writes to the vector table further apart than this are not summed up together, nanoseconds.
const BREATH: u64 = 100_000_000;
/// Interrupts further apart than this are not summed up together, nanoseconds.
const QUIET: u64 = 1_000_000_000;

/// Tells a trace in paragraphs.
pub struct Narrator {
    all: bool,
    start: Option<u64>,
    scenes: BTreeMap<u64, Scene>,
}

impl Narrator {
    /// A narrator that has heard nothing; with `all`, every record will be a paragraph.
    pub fn new(all: bool) -> Self {
        Self { all, start: None, scenes: BTreeMap::new() }
    }

    /// Hear the next record; the answer is what can now be told.
    pub fn hear(&mut self, record: &Record) -> Vec<Paragraph> {
        let start = *self.start.get_or_insert(record.t_ns);
        let t_ns = record.t_ns.saturating_sub(start);
        let scene = self.scenes.entry(record.device).or_default();
        scene.hear(t_ns, record, self.all);
        let told = std::mem::take(&mut scene.told);
        self.named(record.device, told)
    }

    /// Nothing comes for a while: tell what was kept back to be summed up.
    pub fn pause(&mut self) -> Vec<Paragraph> {
        self.release(Scene::end_group)
    }

    /// There will be nothing more: tell everything that was kept back.
    pub fn finish(&mut self) -> Vec<Paragraph> {
        self.release(Scene::settle)
    }

    fn release(&mut self, release: impl Fn(&mut Scene)) -> Vec<Paragraph> {
        let mut paragraphs = Vec::new();
        for device in self.scenes.keys().copied().collect::<Vec<_>>() {
            let Some(scene) = self.scenes.get_mut(&device) else { continue };
            release(scene);
            let told = std::mem::take(&mut scene.told);
            paragraphs.extend(self.named(device, told));
        }
        paragraphs
    }

    fn named(&self, device: u64, mut paragraphs: Vec<Paragraph>) -> Vec<Paragraph> {
        if self.scenes.len() > 1 {
            paragraphs.iter_mut().for_each(|paragraph| paragraph.device = format!("device {device}: "));
        }
        paragraphs
    }

    /// The closing table of each device.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_tables(&self, out: &mut dyn Write) -> io::Result<()> {
        for (device, scene) in &self.scenes {
            if scene.vectors.table().is_empty() {
                continue;
            }
            writeln!(out)?;
            if self.scenes.len() > 1 {
                writeln!(out, "device {device}")?;
            }
            scene.vectors.write_table(out)?;
        }
        Ok(())
    }
}

/// A request without an answer yet.
struct Open {
    t_ns: u64,
    request: Record,
    steps: Vec<Line>,
}

/// Records that are told together.
enum Group {
    /// Writes to the vector table.
    Table(TableGroup),
    /// Interrupts and events.
    Activity(ActivityGroup),
}

/// What one device does.
#[derive(Default)]
struct Scene {
    vectors: Vectors,
    open: Option<Open>,
    group: Option<Group>,
    told: Vec<Paragraph>,
}

impl Scene {
    fn hear(&mut self, t_ns: u64, record: &Record, all: bool) {
        self.vectors.note(record);
        if all {
            return self.tell(t_ns, vec![plainly(record)]);
        }
        match record.event.as_str() {
            "hwc.request" | "smc.request" => self.open(t_ns, record),
            "hwc.response" | "smc.response" => self.close(t_ns, record),
            "msix.program" | "msix.mask" | "msix.unmask" => self.table_written(t_ns, record),
            "msix.fire" | "msix.pend" | "eqe" => self.activity(t_ns, record),
            "msix.enable" => {
                let line = Line { mark: Mark::Plain, text: msix_enabled(record) };
                self.step(t_ns, line);
            }
            END => self.settle(),
            _ => self.step(t_ns, plainly(record)),
        }
    }

    fn tell(&mut self, t_ns: u64, lines: Vec<Line>) {
        self.told.push(Paragraph { t_ns, device: String::new(), lines });
    }

    /// A step of the open request, or one that stands for itself.
    fn step(&mut self, t_ns: u64, line: Line) {
        self.end_group();
        self.put(t_ns, line);
    }

    fn put(&mut self, t_ns: u64, line: Line) {
        match &mut self.open {
            Some(open) if open.steps.len() < MAX_STEPS => open.steps.push(line),
            _ => self.tell(t_ns, vec![line]),
        }
    }

    fn open(&mut self, t_ns: u64, record: &Record) {
        self.settle();
        self.open = Some(Open { t_ns, request: record.clone(), steps: Vec::new() });
    }

    fn close(&mut self, t_ns: u64, answer: &Record) {
        self.end_group();
        let answered_ns = t_ns;
        let same = |open: &Open| {
            name(&open.request) == name(answer) && open.request.number("seq") == answer.number("seq")
        };
        let (t_ns, request, steps) = match self.open.take() {
            Some(open) if same(&open) => (open.t_ns, Some(open.request), open.steps),
            other => {
                self.open = other;
                (t_ns, None, Vec::new())
            }
        };
        let mut lines = vec![exchange(request.as_ref(), answer)];
        lines.extend(steps);
        self.tell(t_ns, lines);
        if answer.event == "smc.response" && name(answer).contains("ESTABLISH") && succeeded(answer) {
            let vectors: Vec<_> = self.vectors.live().collect();
            let text = format!("The hardware channel is established; {}", unmasked_now(&vectors));
            self.tell(answered_ns, vec![Line { mark: Mark::Milestone, text }]);
        }
    }

    /// Tell everything that was kept back.
    fn settle(&mut self) {
        self.end_group();
        if let Some(Open { t_ns, request, steps }) = self.open.take() {
            let text = format!("{} (no answer yet)", asked(&request));
            let mut lines = vec![Line { mark: Mark::Problem, text }];
            lines.extend(steps);
            self.tell(t_ns, lines);
        }
    }

    fn table_written(&mut self, t_ns: u64, record: &Record) {
        let joins =
            matches!(&self.group, Some(Group::Table(group)) if t_ns.saturating_sub(group.last) < BREATH);
        if !joins {
            self.end_group();
            self.group = Some(Group::Table(TableGroup { t_ns, ..Default::default() }));
        }
        if let Some(Group::Table(group)) = &mut self.group {
            group.last = t_ns;
            group.add(record, &self.vectors);
        }
    }

    fn activity(&mut self, t_ns: u64, record: &Record) {
        let number = |name| record.number(name).unwrap_or(u64::MAX);
        // That an answer comes with an event and an interrupt is no news.
        let routine = match record.event.as_str() {
            "msix.fire" => self.vectors.is_hwc(number("vector")),
            "eqe" => self.vectors.is_hwc_eq(number("eq")) && number("type") == COMPLETION,
            _ => false,
        };
        if routine {
            return;
        }
        let joins =
            matches!(&self.group, Some(Group::Activity(group)) if t_ns.saturating_sub(group.last) < QUIET);
        if !joins {
            self.end_group();
            self.group = Some(Group::Activity(ActivityGroup { t_ns, ..Default::default() }));
        }
        if let Some(Group::Activity(group)) = &mut self.group {
            group.last = t_ns;
            group.add(record);
        }
    }

    fn end_group(&mut self) {
        match self.group.take() {
            Some(Group::Table(group)) => {
                self.put(group.t_ns, group.line());
            }
            Some(Group::Activity(group)) => self.put(group.t_ns, group.line()),
            None => {}
        }
    }
}

/// Writes to the vector table, one after the other.
#[derive(Default)]
struct TableGroup {
    t_ns: u64,
    last: u64,
    /// A vector was unmasked for the first time since MSI-X was enabled, and after the limits were known.
    grows: bool,
    /// Per vector: what was written, in order, repetitions left out.
    written: BTreeMap<u64, Vec<&'static str>>,
}

impl TableGroup {
    fn add(&mut self, record: &Record, vectors: &Vectors) {
        let number = record.number("vector").unwrap_or(u64::MAX);
        let first = vectors.table().get(&number).is_some_and(|vector| vector.unmasked_since_enable == 1);
        self.grows |= record.event == "msix.unmask" && first && vectors.enabled && vectors.limits_known;
        let cleared = record.number("address") == Some(0) && record.number("data") == Some(0);
        let what = match record.event.as_str() {
            "msix.program" if cleared => "cleared",
            "msix.program" => "programmed",
            "msix.mask" => "masked",
            _ => "unmasked",
        };
        let steps = self.written.entry(number).or_default();
        if !steps.contains(&what) {
            steps.push(what);
        }
    }

    fn line(&self) -> Line {
        let mut alike: Vec<(&[&str], BTreeSet<u64>)> = Vec::new();
        for (&vector, steps) in &self.written {
            match alike.iter_mut().find(|(same, _)| same == steps) {
                Some((_, numbers)) => _ = numbers.insert(vector),
                None => alike.push((steps, BTreeSet::from([vector]))),
            }
        }
        let parts = alike.iter().map(|(steps, numbers)| {
            let plural = if numbers.len() > 1 { "s" } else { "" };
            format!("vector{plural} {} {}", words::ranges(numbers.iter().copied()), steps.join(", "))
        });
        let text = parts.collect::<Vec<_>>().join("; ");
        match self.grows {
            true => Line { mark: Mark::Milestone, text: format!("MSI-X stays enabled and grows: {text}") },
            false => Line { mark: Mark::Plain, text },
        }
    }
}

/// Interrupts and events, counted.
#[derive(Default)]
struct ActivityGroup {
    t_ns: u64,
    last: u64,
    fired: BTreeMap<u64, u64>,
    pended: BTreeMap<u64, u64>,
    events: BTreeMap<(u64, u64), u64>,
}

impl ActivityGroup {
    fn add(&mut self, record: &Record) {
        let number = |name| record.number(name).unwrap_or(u64::MAX);
        let count = match record.event.as_str() {
            "msix.fire" => self.fired.entry(number("vector")).or_default(),
            "msix.pend" => self.pended.entry(number("vector")).or_default(),
            _ => self.events.entry((number("eq"), number("type"))).or_default(),
        };
        *count += 1;
    }

    fn line(&self) -> Line {
        let mut parts = Vec::new();
        parts.extend(summed(&self.fired, "fires", "fire"));
        parts.extend(summed(&self.pended, "is masked: pending", "are masked: pending"));
        let mut completions = 0;
        for (&(eq, kind), &count) in &self.events {
            match kind {
                COMPLETION => completions += count,
                _ => parts.push(format!("EQ {eq}: {}{}", words::eqe(kind), times(count))),
            }
        }
        if completions > 0 {
            let plural = if completions == 1 { "" } else { "s" };
            parts.push(format!("{completions} completion event{plural}"));
        }
        Line { mark: Mark::Plain, text: parts.join(", ") }
    }
}

/// ` ×N`, if it is more than once.
fn times(count: u64) -> String {
    if count == 1 { String::new() } else { format!(" ×{count}") }
}

/// What the vectors in `counts` did and how often, one by one if they are few; nothing if there are none.
fn summed(counts: &BTreeMap<u64, u64>, does: &str, they_do: &str) -> Option<String> {
    let total = counts.values().sum();
    match counts.len() {
        0 => None,
        1 => counts.keys().next().map(|vector| format!("vector {vector} {does}{}", times(total))),
        2..=MAX_VECTORS => {
            let each: Vec<_> =
                counts.iter().map(|(vector, &count)| format!("{vector}{}", times(count))).collect();
            Some(format!("vectors {} {they_do}", each.join(", ")))
        }
        _ => Some(format!("vectors {} {they_do}, ×{total} in all", words::ranges(counts.keys().copied()))),
    }
}

fn plainly(record: &Record) -> Line {
    let mark = match record.event.as_str() {
        "rule.violation" => Mark::Problem,
        "pci.flr" | "host.event" | "fault" => Mark::Milestone,
        "vport.rx" if record.flag("enable") => Mark::Milestone,
        _ => Mark::Plain,
    };
    let text = match record.event.as_str() {
        "msix.enable" => msix_enabled(record),
        "hwc.request" | "smc.request" => format!("asked: {}", asked(record)),
        "hwc.response" | "smc.response" => return Line { mark, ..exchange(None, record) },
        "msix.program" | "msix.mask" | "msix.unmask" => {
            let what = record.event.trim_start_matches("msix.");
            format!("{what} {}", words::fields(&record.fields, &[]))
        }
        "msix.fire" => format!("vector {} fires", record.number("vector").unwrap_or(0)),
        "msix.pend" => format!("vector {} is masked and pends", record.number("vector").unwrap_or(0)),
        "eqe" => format!(
            "EQ {}: {}",
            record.number("eq").unwrap_or(0),
            words::eqe(record.number("type").unwrap_or(u64::MAX))
        ),
        END => "the trace is complete".into(),
        _ => words::plain(record),
    };
    Line { mark, text }
}

fn msix_enabled(record: &Record) -> String {
    format!("MSI-X is enabled: a table of {} vectors", record.number("table_size").unwrap_or(0))
}

fn unmasked_now(vectors: &[u64]) -> String {
    match vectors {
        [] => "no vector is unmasked".into(),
        [one] => format!("one vector is unmasked: {one}"),
        many => format!("{} vectors are unmasked: {}", many.len(), words::ranges(many.iter().copied())),
    }
}

/// The driver's name of a command, its number if it has none.
fn name(message: &Record) -> String {
    match (message.text("command"), message.number("code")) {
        ("", _) => format!("SMC {}", message.text("type")),
        ("UNKNOWN", Some(code)) => format!("unknown command {code:#x}"),
        (command, _) => command.to_owned(),
    }
}

/// A request: its name, version and fields.
pub fn asked(request: &Record) -> String {
    let version = match request.number("version") {
        Some(version @ 2..) => format!(" v{version}"),
        _ => String::new(),
    };
    let fields = words::fields(&request.fields, except(request));
    let space = if fields.is_empty() { "" } else { " " };
    format!("{}{version}{space}{fields}", name(request))
}

/// Fields of a message that are told otherwise.
fn except(message: &Record) -> &'static [&'static str] {
    match message.event.as_str() {
        "smc.request" | "smc.response" => &["type", "status"],
        _ => &["seq", "command", "code", "version", "status", "duration_ns"],
    }
}

fn succeeded(answer: &Record) -> bool {
    answer.number("status") == Some(0)
}

/// An answer: its status, fields, and how long it took.
pub fn answered(answer: &Record) -> String {
    let status = words::status(answer.number("status").unwrap_or(0));
    let fields = words::fields(&answer.fields, except(answer));
    let space = if fields.is_empty() { "" } else { " " };
    let took =
        answer.number("duration_ns").map(|ns| format!(" [{}]", words::duration(ns))).unwrap_or_default();
    format!("{status}{space}{fields}{took}")
}

/// An event that stands for itself, in words.
pub fn plain(record: &Record) -> String {
    plainly(record).text
}

/// A request and its answer in one line.
fn exchange(request: Option<&Record>, answer: &Record) -> Line {
    let question = request.map_or_else(|| name(answer), asked);
    let status = answer.number("status").unwrap_or(0);
    let milestone = answer.text("command") == "GDMA_QUERY_MAX_RESOURCES";
    let mark = match status {
        0 if milestone => Mark::Milestone,
        0 | 0x105 => Mark::Plain,
        _ => Mark::Problem,
    };
    Line { mark, text: format!("{question} -> {}", answered(answer)) }
}
