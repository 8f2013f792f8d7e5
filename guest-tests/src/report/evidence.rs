//! What a run's files show, in little: the vectors over time, the commands, the faults, the end of the console.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Lines of the console that are kept.
const LOG_LINES: usize = 60;
/// Faults, events of the host and broken rules that are kept.
const MOST_EVENTS: usize = 200;
/// Commands of a device that are kept.
const MOST_COMMANDS: usize = 400;
/// Devices whose vectors are kept.
const MOST_DEVICES: usize = 4;
/// Interrupts of a vector are counted in this many parts of the run.
const BUCKETS: u64 = 300;
/// Files that a reader may want, if the run's folder is kept.
const FILES: [&str; 8] = [
    "timeline.html",
    "trace.jsonl",
    "console",
    "stdout",
    "stderr",
    "command",
    "qemu.command",
    "server.command",
];

/// In the report's own words.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Evidence {
    /// What `mana-vmm trace --html` draws, thinned out.
    pub timeline: Value,
    /// Lines of the trace on faults, events of the host and broken rules.
    pub events: Vec<String>,
    /// The console's last lines.
    pub log: String,
    /// Files below the report's folder.
    pub files: Vec<String>,
}

/// Of the run whose files are in `folder`. What is not there is left out.
pub fn gather(vmm: &Path, folder: &Path) -> Evidence {
    let trace = folder.join("trace.jsonl");
    let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let timeline = timeline(vmm, &trace, &folder.join("timeline.html")).unwrap_or_default();
    let is_capture = |name: &String| Path::new(name).extension().is_some_and(|ending| ending == "pcap");
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let captures = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).filter(is_capture);
    let there = FILES.iter().filter(|file| folder.join(file).is_file()).map(|&file| file.to_owned());
    Evidence {
        timeline,
        events: events(&trace),
        log: last_lines(&folder.join("console")),
        files: there.chain(captures).map(|file| format!("{name}/{file}")).collect(),
    }
}

/// The data of the page that `mana-vmm trace --html` makes.
fn timeline(vmm: &Path, trace: &Path, page: &Path) -> Option<Value> {
    const BEGIN: &str = r#"<script id="data" type="application/json">"#;
    let output = Command::new(vmm).arg("trace").arg(trace).arg("--html").arg(page).output().ok()?;
    let text = output.status.success().then(|| fs::read_to_string(page).ok())??;
    let data = text.split_once(BEGIN)?.1.split_once("</script>")?.0;
    Some(thinned(&serde_json::from_str(data).ok()?))
}

fn thinned(data: &Value) -> Value {
    let end = data["end"].as_u64().unwrap_or_default();
    let bucket = end / BUCKETS + 1;
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let vector = |vector: &Value| {
        let mut fires: Vec<(u64, u64)> = Vec::new();
        for fire in list(&vector["fires"]) {
            let (at, count) = (fire[0].as_u64().unwrap_or_default(), fire[1].as_u64().unwrap_or_default());
            match fires.last_mut() {
                Some((last, sum)) if *last == at / bucket => *sum += count,
                _ => fires.push((at / bucket, count)),
            }
        }
        json!({ "n": vector["n"], "purpose": vector["purpose"], "fired": vector["fired"], "spans": vector["spans"], "fires": fires })
    };
    let device = |device: &Value| {
        let vectors: Vec<Value> = list(&device["vectors"]).iter().map(vector).collect();
        let commands = list(&device["commands"]);
        let all = commands.len();
        let kept: Vec<Value> = commands
            .into_iter()
            .take(MOST_COMMANDS)
            .map(|command| json!([command["t"], command["d"], command["n"], command["s"]]))
            .collect();
        json!({ "n": device["n"], "vectors": vectors, "commands": kept, "all_commands": all, "marks": device["marks"] })
    };
    let devices = list(&data["devices"]);
    let kept: Vec<Value> = devices.iter().take(MOST_DEVICES).map(device).collect();
    json!({ "end": end, "buckets": BUCKETS, "devices": kept, "all_devices": devices.len() })
}

fn events(trace: &Path) -> Vec<String> {
    const WANTED: [&str; 3] =
        [r#""event":"fault""#, r#""event":"host.event""#, r#""event":"rule.violation""#];
    let Ok(file) = File::open(trace) else { return Vec::new() };
    let lines = BufReader::new(file).lines().map_while(Result::ok);
    lines.filter(|line| WANTED.iter().any(|text| line.contains(text))).take(MOST_EVENTS).collect()
}

fn last_lines(file: &Path) -> String {
    let text = String::from_utf8_lossy(&fs::read(file).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupts_are_counted_in_parts_of_the_run() {
        let data = json!({ "end": 2999, "devices": [{ "n": 0, "marks": [], "commands": [],
            "vectors": [{ "n": 1, "fired": 4, "spans": [[0, 5, 2]], "fires": [[0, 1], [9, 2], [2990, 1]] }] }] });
        let thin = thinned(&data);
        assert_eq!(thin["devices"][0]["vectors"][0]["fires"], json!([[0, 3], [299, 1]]));
        assert_eq!(thin["buckets"], BUCKETS);
    }
}
