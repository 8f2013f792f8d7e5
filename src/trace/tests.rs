//! Whole traces, told.

use std::io::Cursor;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mana_device::observe::{Event, Fields, QueueKind};

use super::*;

/// The trace that a device writes of `events`, one microsecond apart.
fn written(events: &[Event]) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    let trace = TraceFile::create(file.path()).unwrap();
    let observer = trace.observer(None);
    (1..).zip(events).for_each(|(time, event)| observer.event(1_000_000 + time * 1000, event));
    drop((observer, trace));
    std::fs::read_to_string(file.path()).unwrap()
}

fn records(text: &str) -> Vec<Record> {
    Reader::new(Cursor::new(text)).map(Result::unwrap).collect()
}

fn told(text: &str, all: bool) -> String {
    let mut out = Vec::new();
    tell(&records(text), all, Style::default(), &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

fn request(command: &'static str, fields: &[(&'static str, u64)]) -> Event {
    Event::HwcRequest { seq: 0, command, code: 1, version: 1, fields: Fields(fields.to_vec()) }
}

fn response(command: &'static str, status: u32, fields: &[(&'static str, u64)]) -> Event {
    let fields = Fields(fields.to_vec());
    Event::HwcResponse { seq: 0, command, code: 1, version: 1, status, duration_ns: 1500, fields }
}

fn program(vector: u16) -> Event {
    Event::MsixProgram { vector, address: 0xfee0_0000 | u64::from(vector) << 12, data: 34 }
}

/// A driver that grows its vectors, as far as one queue.
fn growing() -> Vec<Event> {
    let mut events = vec![
        Event::MsixEnable { table_size: 8, masked: true },
        program(0),
        Event::MsixUnmask { vector: 0 },
        Event::SmcRequest { kind: "ESTABLISH_HWC" },
        Event::QueueCreate { kind: QueueKind::Eq, id: 0, eq: None, msix: Some(0), entries: 256 },
        Event::SmcResponse { kind: "ESTABLISH_HWC", status: 0 },
        request("GDMA_QUERY_MAX_RESOURCES", &[]),
        response("GDMA_QUERY_MAX_RESOURCES", 0, &[("max_msix", 8)]),
        Event::MsixFire { vector: 0 },
    ];
    for vector in 1..=3 {
        events.extend([program(vector), Event::MsixUnmask { vector }]);
    }
    for queue in 1..=3 {
        events.push(request("MANA_CREATE_WQ_OBJ", &[("cq_parent_qid", queue)]));
        let (id, msix) = (queue as u32, Some(queue as u16));
        events.push(Event::QueueCreate { kind: QueueKind::Eq, id, eq: None, msix, entries: 256 });
        events.push(Event::QueueCreate {
            kind: QueueKind::Sq,
            id: 10 + id,
            eq: None,
            msix: None,
            entries: 64,
        });
        events.push(Event::QueueCreate {
            kind: QueueKind::Cq,
            id: 20 + id,
            eq: Some(id),
            msix: None,
            entries: 64,
        });
        events.push(response("MANA_CREATE_WQ_OBJ", 0, &[("wq_id", 10 + queue)]));
    }
    for _ in 0..512 {
        events.extend([Event::Eqe { eq: 1, kind: 3 }, Event::MsixFire { vector: 1 }]);
    }
    events.extend([
        request("MANA_QUERY_PHY_STAT", &[]),
        response("MANA_QUERY_PHY_STAT", 0xffff_ffff, &[]),
        Event::RuleViolation { rule: "cq-doorbell", detail: "tail went back".into() },
        Event::Ledger { live: Fields(vec![("eq", 0), ("cq", 2)]) },
    ]);
    events
}

#[test]
fn tells_a_growing_driver() {
    let story = told(&written(&growing()), false);
    let expected = "\
[    0.000000] MSI-X is enabled: a table of 8 vectors
[    0.000001] vector 0 programmed, unmasked
[    0.000003] SMC ESTABLISH_HWC -> ok
                 EQ 0 is made on vector 0, 256 entries
[    0.000005] The hardware channel is established; one vector is unmasked: 0
[    0.000006] GDMA_QUERY_MAX_RESOURCES -> ok max_msix=8 [1 µs]
[    0.000009] MSI-X stays enabled and grows: vectors 1-3 programmed, unmasked
[    0.000015] MANA_CREATE_WQ_OBJ cq_parent_qid=1 -> ok wq_id=11 [1 µs]
                 EQ 1 is made on vector 1, 256 entries
                 SQ 11 is made, 64 entries
                 CQ 21 is made on EQ 1, 64 entries
               ... the same 2 more times, until 0.000025
[    0.000030] vector 1 fires ×512, 512 completion events
[    0.001054] MANA_QUERY_PHY_STAT -> FAILED: command not supported (0xffffffff) [1 µs]
[    0.001056] RULE BROKEN by the driver: cq-doorbell: tail went back
[    0.001057] ledger: alive are cq=2

vector  what for      APIC id  programmed  unmasked     fired  pended
     0  EQ 0 (HWC)          0           1         1         1       0
     1  EQ 1 (SQ 11)        1           1         1       512       0
     2  EQ 2 (SQ 12)        2           1         1         0       0
     3  EQ 3 (SQ 13)        3           1         1         0       0
";
    assert_eq!(story, expected, "\n{story}");
}

#[test]
fn sees_the_vectors_of_a_driver_grow_each_time_it_is_loaded() {
    let mut events = growing();
    events.push(Event::MsixDisable { table_size: 8, masked: false });
    events.extend(growing());
    assert_eq!(told(&written(&events), false).matches("stays enabled and grows: vectors 1-3").count(), 2);
    // All vectors before the limits are known: nothing grows.
    let mut events = growing();
    let table = events.extract_if(9..15, |_| true).collect::<Vec<_>>();
    events.splice(3..3, table);
    assert!(!told(&written(&events), false).contains("grows"));
}

#[test]
fn tells_every_event_when_asked() {
    let events = growing();
    let story = told(&written(&events), true);
    // One line an event, the end, an empty line, the table's head and four vectors.
    assert_eq!(story.lines().count(), events.len() + 1 + 1 + 5);
    assert_eq!(story.matches("vector 1 fires").count(), 512);
}

#[test]
fn says_when_a_request_has_no_answer_and_a_trace_no_end() {
    let text = written(&[request("GDMA_LIST_DEVICES", &[]), Event::PciFlr]);
    let cut = text.lines().take(2).map(|line| format!("{line}\n")).collect::<String>();
    let story = told(&cut, false);
    assert!(story.contains("GDMA_LIST_DEVICES (no answer yet)"), "{story}");
    assert!(story.contains("ends here without trace.end"), "{story}");
}

#[test]
fn reads_on_after_broken_lines_and_names_them() {
    let text = "{\"t_ns\":1,\"event\":\"pci.flr\"}\nnonsense\n\n[1]\n{\"event\":\"x\"}\n{\"t_ns\":2}\n\
                {\"t_ns\":3,\"event\":\"pci.flr\"}\n{\"t_ns\":4,\"ev";
    let (good, broken): (Vec<_>, Vec<_>) = Reader::new(Cursor::new(text)).partition(Result::is_ok);
    assert_eq!(good.len(), 2);
    let broken: Vec<_> = broken.into_iter().map(|line| line.unwrap_err().to_string()).collect();
    let starts = ["line 2 is no", "line 4 is no", "line 5 is no", "line 6 is no", "line 8 is no"];
    assert!(broken.iter().zip(starts).all(|(line, start)| line.starts_with(start)), "{broken:#?}");
    assert!(broken[2].contains("it has no time"), "{broken:#?}");
    assert!(broken[4].contains("(the file ends within it)"), "{broken:#?}");
}

#[test]
fn separates_devices() {
    let text = "{\"t_ns\":1,\"event\":\"msix.fire\",\"vector\":0,\"device\":0}\n\
                {\"t_ns\":2,\"event\":\"pci.flr\",\"device\":1}\n\
                {\"t_ns\":3,\"event\":\"msix.fire\",\"vector\":0,\"device\":0}\n\
                {\"t_ns\":4,\"event\":\"msix.fire\",\"vector\":7,\"device\":1}\n";
    let story = told(text, false);
    assert!(story.contains("device 1: PCI: function-level reset"), "{story}");
    assert!(story.contains("device 0: vector 0 fires ×2"), "{story}");
    assert!(story.contains("\ndevice 1\nvector  what for"), "{story}");
}

#[test]
fn draws_a_page_that_needs_nothing_else() {
    let text = written(&growing()) + "{\"t_ns\":9,\"event\":\"fault\",\"detail\":\"</script><b>\"}\n";
    let page = timeline::page(&records(&text), "a<b>");
    assert!(page.contains("a&lt;b> · MANA vectors over time"));
    assert!(
        !page.contains("{{") && !page.contains("http://") || page.matches("http").count() == 1,
        "the SVG namespace"
    );
    let start = page.find("type=\"application/json\">").unwrap() + 24;
    let json = &page[start..start + page[start..].find("</script>").unwrap()];
    let data: serde_json::Value = serde_json::from_str(json).unwrap();
    let device = &data["devices"][0];
    assert_eq!(device["vectors"].as_array().unwrap().len(), 4);
    assert_eq!(device["vectors"][1]["fires"].as_array().unwrap().len(), 512);
    assert_eq!(device["vectors"][1]["spans"][0][2], 1, "programmed first");
    assert_eq!(device["vectors"][1]["spans"][1][2], 2, "unmasked then");
    assert_eq!(device["commands"].as_array().unwrap().len(), 6);
    assert_eq!(device["marks"][2]["x"], "fault applied: </script><b>");
}

#[test]
fn counts_storms_in_buckets() {
    let fires: Vec<_> = (0..60_000).map(|_| Event::MsixFire { vector: 1 }).collect();
    let page = timeline::page(&records(&written(&fires)), "storm");
    assert!(page.len() < 3_000_000, "{} bytes", page.len());
}

/// A place to write to that can be looked at meanwhile.
#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Screen {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
    fn shows(&self, wanted: &str) {
        let end = Instant::now() + Duration::from_secs(20);
        while !self.text().contains(wanted) {
            assert!(Instant::now() < end, "{wanted:?} is not in\n{}", self.text());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn follows_a_trace_from_before_its_beginning_to_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("live.jsonl");
    let screen = Screen::default();
    let follower = {
        let (path, mut screen) = (path.clone(), screen.clone());
        std::thread::spawn(move || follow::follow(&path, Style::default(), &mut screen))
    };
    std::thread::sleep(Duration::from_millis(100));
    let trace = TraceFile::create(&path).unwrap();
    let observer = trace.observer(None);
    observer.event(1, &Event::PciFlr);
    screen.shows("function-level reset");
    observer.event(2, &Event::MsixFire { vector: 3 });
    // Nothing follows it, and it is told all the same.
    screen.shows("vector 3 fires");
    (0..5).for_each(|time| observer.event(3 + time, &Event::QueueDestroy { kind: QueueKind::Eq, id: 1 }));
    screen.shows("EQ 1 is gone");
    screen.shows("the same 4 more times");
    drop((observer, trace));
    follower.join().unwrap().unwrap();
    screen.shows("vector  what for");
}
