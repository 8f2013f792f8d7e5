//! Traces: what the devices did, as JSON lines, and how people read them (`mana-vmm trace`).
//!
//! A line is `{"t_ns": TIME, "event": NAME, ...}` with the fields of [`mana_device::observe::Event`], and
//! `"device": N` where a machine has several. The last line of a whole trace is the event `trace.end`.
//! [`TraceFile`] writes them; [`run`] reads them: in words (`story`), as they happen (`follow`), or as a page
//! with the vectors over time (`timeline`).

mod follow;
mod reader;
mod story;
mod timeline;
mod vectors;
mod writer;

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use reader::{BrokenLine, Reader, Record};
use story::{Fold, Narrator, Style};

pub use writer::TraceFile;

/// Name of the event that ends a whole trace.
const END: &str = "trace.end";

/// Broken lines that are shown one by one; more are only counted.
const MAX_SHOWN: usize = 10;

/// `mana-vmm trace`.
#[derive(clap::Args, Clone, Debug)]
pub struct TraceArgs {
    /// Trace file made by `mana-vmm boot --trace FILE`; - is standard input.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Draw the vectors over time as one self-contained page.
    #[arg(long, value_name = "OUT", conflicts_with_all = ["follow", "all"])]
    pub html: Option<PathBuf>,
    /// Tell the story as it happens, from a file that may still be to come, until the machine ends.
    #[arg(long)]
    pub follow: bool,
    /// Tell every event, without summing up repetitions.
    #[arg(long, conflicts_with = "follow")]
    pub all: bool,
}

/// Do what `mana-vmm trace` was asked to.
///
/// # Errors
/// A file can't be read or written, or holds no trace. Broken lines in a trace are reported by number on standard
/// error and left out.
pub fn run(args: &TraceArgs) -> anyhow::Result<()> {
    let style = Style { color: io::stdout().is_terminal() };
    let mut out = BufWriter::new(io::stdout().lock());
    if args.follow {
        return ended_by_reader(follow::follow(&args.file, style, &mut out));
    }
    let records = load(&args.file)?;
    match &args.html {
        Some(page) => std::fs::write(page, timeline::page(&records, &title(&args.file)))
            .with_context(|| format!("--html {}: the file can't be written", page.display())),
        None => ended_by_reader(tell(&records, args.all, style, &mut out)),
    }
}

/// Who stops reading early (`| head`) has had enough; that is no error.
fn ended_by_reader(result: io::Result<()>) -> anyhow::Result<()> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("the story can't be told")
        }
        _ => Ok(()),
    }
}

fn title(file: &Path) -> String {
    file.file_name().unwrap_or(file.as_os_str()).to_string_lossy().into_owned()
}

/// Open a trace; - is standard input.
fn open(file: &Path) -> io::Result<Box<dyn BufRead + Send>> {
    Ok(match file.as_os_str().as_encoded_bytes() {
        b"-" => Box::new(BufReader::new(io::stdin())),
        _ => Box::new(BufReader::new(File::open(file)?)),
    })
}

/// All records of a trace that can be understood.
fn load(file: &Path) -> anyhow::Result<Vec<Record>> {
    let name = file.display();
    let input = open(file).with_context(|| format!("{name}: the trace can't be read"))?;
    let (mut records, mut broken) = (Vec::new(), 0);
    for record in Reader::new(input) {
        match record {
            Ok(record) => records.push(record),
            Err(BrokenLine { line: 0, reason }) => bail!("{name}: the trace can't be read: {reason}"),
            Err(line) => {
                broken += 1;
                if broken <= MAX_SHOWN {
                    eprintln!("{name}: {line}");
                }
            }
        }
    }
    if broken > MAX_SHOWN {
        eprintln!("{name}: {broken} lines are broken; the rest is told");
    }
    if records.is_empty() {
        bail!("{name}: no line of this file is a trace event; `mana-vmm boot --trace FILE` makes traces");
    }
    Ok(records)
}

/// Tell a whole trace in words.
fn tell(records: &[Record], all: bool, style: Style, out: &mut dyn Write) -> io::Result<()> {
    let mut narrator = Narrator::new(all);
    let mut paragraphs: Vec<_> = records.iter().flat_map(|record| narrator.hear(record)).collect();
    paragraphs.extend(narrator.finish());
    if all {
        paragraphs.iter().try_for_each(|paragraph| paragraph.write(style, out))?;
    } else {
        Fold::new(&paragraphs).write(style, out)?;
    }
    if records.last().is_some_and(|record| record.event != END) {
        writeln!(out, "\nThe trace ends here without {END}: the VMM was killed, or still runs.")?;
    }
    narrator.write_tables(out)?;
    out.flush()
}

#[cfg(test)]
mod tests;
