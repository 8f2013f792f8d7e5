//! The fuzz targets' bodies on a stable toolchain: their corpora, and inputs of any bytes.

use std::path::PathBuf;
use std::sync::Arc;

use mana_device::observe::{Event, Fields, Observer, QueueKind};
use mana_test_driver::exercise::seeds::{self, dictionary, seeds};
use mana_test_driver::exercise::{Machine, Play, TARGETS, case};
use serde_json::Value;

/// Inputs of any bytes for each target.
const ANY: u32 = 200;

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus")).join(target);
    let files = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

/// Bytes of a generator with this seed, of a length that it says.
fn any(seed: u32) -> Vec<u8> {
    let mut state = u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let len = usize::from(next()[0]) + usize::from(next()[1]);
    (0..len.div_ceil(8)).flat_map(|_| next()).take(len).collect()
}

#[test]
fn any_bytes_are_survived() {
    let mut machine = Machine::new();
    for (_, play) in TARGETS {
        (0..ANY).for_each(|seed| case(&mut machine, play, &any(seed)));
    }
}

#[test]
fn the_corpora_are_survived() {
    survive_the_corpora(Machine::new());
}

/// What the guest sends is decoded for whoever observes, and put into words.
#[test]
fn the_corpora_are_survived_by_an_observer() {
    struct Words;
    impl Observer for Words {
        fn event(&self, _: u64, event: &Event) {
            assert!(!format!("{event:?}").is_empty());
        }
    }
    survive_the_corpora(Machine::with(Some(Arc::new(Words))));
}

fn survive_the_corpora(mut machine: Machine) {
    for (target, play) in TARGETS {
        let corpus = corpus(target);
        assert!(!corpus.is_empty(), "{target} has no corpus");
        for (path, input) in corpus {
            // The name of what breaks it is the last line before the panic.
            println!("{}", path.display());
            case(&mut machine, play, &input);
        }
    }
}

/// What was recorded of the in-process driver is where fuzzing begins. `BLESS=1` writes it.
#[test]
fn the_corpora_hold_what_a_driver_does() {
    for (target, name, input) in seeds() {
        let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus")).join(target);
        let file = folder.join(format!("driver-{name}"));
        if std::env::var_os("BLESS").is_some() {
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(&file, &input).unwrap();
        }
        let there = std::fs::read(&file).unwrap_or_default();
        assert!(there == input, "{}: BLESS=1 renews it", file.display());
    }
    let (file, words) = (concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/dictionary"), dictionary());
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(file, &words).unwrap();
    }
    assert!(std::fs::read_to_string(file).unwrap_or_default() == words, "{file}: BLESS=1 renews it");
}

/// Kernels' own drivers are there, too. `MANA_TRACES=FOLDER` makes inputs of the traces in it (`boot --trace`), each
/// named by its file.
#[test]
fn the_corpora_hold_what_real_boots_did() {
    let traces = std::env::var_os("MANA_TRACES").map(PathBuf::from);
    for trace in traces.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap()) {
        let path = trace.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let events: Vec<_> =
            text.lines().filter_map(|line| event(&serde_json::from_str(line).unwrap())).collect();
        let name = path.file_stem().unwrap().to_string_lossy();
        assert!(events.iter().any(|event| matches!(event, Event::HwcRequest { .. })), "{name}: no driver");
        for (target, name, input) in seeds::of(&name, &events) {
            let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus")).join(target);
            std::fs::write(folder.join(format!("boot-{name}")), input).unwrap();
        }
    }
    for target in ["config", "bar0", "hwc", "device"] {
        let names = corpus(target).into_iter().map(|(path, _)| path.file_name().unwrap().to_owned());
        let boots = names.filter(|name| name.to_string_lossy().starts_with("boot-")).count();
        assert!(boots >= 3, "{target} has {boots} of real boots");
    }
}

/// A line of a trace, if it is of a kind that inputs are made of.
fn event(line: &Value) -> Option<Event> {
    let number = |name: &str| line[name].as_u64().unwrap_or_default();
    let is = |name: &str| line[name].as_bool().unwrap_or_default();
    let vector = number("vector") as u16;
    let (table_size, masked) = (number("table_size") as u16, is("masked"));
    Some(match line["event"].as_str()? {
        "pci.command" => Event::PciCommand { memory: is("memory"), bus_master: is("bus_master") },
        "msix.enable" => Event::MsixEnable { table_size, masked },
        "msix.disable" => Event::MsixDisable { table_size, masked },
        "msix.program" => {
            Event::MsixProgram { vector, address: number("address"), data: number("data") as u32 }
        }
        "msix.mask" => Event::MsixMask { vector },
        "msix.unmask" => Event::MsixUnmask { vector },
        "msix.fire" => Event::MsixFire { vector },
        "reg.read" => {
            Event::RegRead { offset: number("offset"), size: number("size") as u8, value: number("value") }
        }
        "smc.request" => Event::SmcRequest {
            kind: match line["type"].as_str()? {
                "ESTABLISH_HWC" => "ESTABLISH_HWC",
                "DESTROY_HWC" => "DESTROY_HWC",
                _ => "UNKNOWN",
            },
        },
        "hwc.request" => Event::HwcRequest {
            seq: number("seq"),
            command: "",
            code: number("code") as u32,
            version: number("version") as u16,
            fields: Fields::default(),
        },
        "queue.create" => Event::QueueCreate {
            kind: match line["kind"].as_str()? {
                "eq" => QueueKind::Eq,
                "cq" => QueueKind::Cq,
                "sq" => QueueKind::Sq,
                _ => QueueKind::Rq,
            },
            id: number("id") as u32,
            eq: None,
            msix: None,
            entries: number("entries") as u32,
        },
        _ => return None,
    })
}

/// A card that has lived through other cases shows the same as one that is new.
#[test]
fn a_reset_card_is_as_a_new_one() {
    let mut used = Machine::new();
    for (target, play) in TARGETS {
        for (path, input) in corpus(target) {
            let mut fresh = Machine::new();
            let shown = [&mut fresh, &mut used].map(|machine| shown(machine, play, &input));
            assert_eq!(shown[0], shown[1], "{}", path.display());
        }
    }
}

fn shown(machine: &mut Machine, play: Play, input: &[u8]) -> (u64, u64, [u64; 2]) {
    play(machine, input);
    let cables = [0, 1].map(|port: usize| machine.cables[port].frames());
    let shown = (machine.digest(), machine.vectors.fired(), cables);
    machine.end();
    shown
}

/// The recorded inputs are whole: packets leave, packets arrive, interrupts fire.
#[test]
fn what_a_driver_does_reaches_the_data_path() {
    let mut machine = Machine::new();
    let mut sum = |target: &str| {
        let (_, play) = TARGETS.into_iter().find(|(name, _)| *name == target).unwrap();
        let inputs = seeds().into_iter().filter(|(of, ..)| *of == target);
        inputs.fold([0; 3], |[sent, received, fired], (.., input)| {
            play(&mut machine, &input);
            let frames: u64 = machine.cables.iter().map(|cable| cable.frames()).sum();
            let taken: u64 = machine.model.wqs.iter().filter(|wq| !wq.is_send).map(|wq| wq.completed).sum();
            let shown = [sent + frames, received + taken, fired + machine.vectors.fired()];
            machine.end();
            shown
        })
    };
    assert!(sum("config")[2] > 0);
    let [sent, _, fired] = sum("queues");
    assert!(sent >= 4 + 4 && fired > 0, "{sent} sent, {fired} interrupts");
    let [_, received, _] = sum("packets");
    assert!(received >= 4 * 6, "{received} received");
    let [sent, received, fired] = sum("device");
    assert!(sent > 4 && received > 16 && fired > 0, "{sent} sent, {received} received, {fired} interrupts");
}
