//! Tells a trace as it is written.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use super::reader::parse;
use super::story::{LiveFold, Narrator, Style};
use super::{END, open};

/// How often a file is looked at for more.
const LOOK: Duration = Duration::from_millis(50);
/// After this long without news, what was kept back to be summed up is told.
const PATIENCE: Duration = Duration::from_millis(400);
/// Lines that may wait to be told.
const MAX_WAITING: usize = 4096;

/// Tell the trace in `file` (- is standard input) as it grows, until its end.
///
/// # Errors
/// The file can't be read, or `out` not written.
pub fn follow(file: &Path, style: Style, out: &mut dyn Write) -> io::Result<()> {
    let (lines, received) = sync_channel(MAX_WAITING);
    let path = file.to_owned();
    // Reading may block for ever; the thread ends with the process or when nobody receives any more.
    std::thread::Builder::new().name("follow".into()).spawn(move || send_lines(&path, &lines))?;
    tell(&received, style, out)
}

fn tell(lines: &Receiver<io::Result<String>>, style: Style, out: &mut dyn Write) -> io::Result<()> {
    let (mut narrator, mut fold) = (Narrator::new(false), LiveFold::default());
    let mut count = 0;
    let mut ended = false;
    while !ended {
        let paragraphs = match lines.recv_timeout(PATIENCE) {
            Ok(line) => {
                let line = line?;
                count += 1;
                match parse(count, &line) {
                    Ok(record) => {
                        ended = record.event == END;
                        narrator.hear(&record)
                    }
                    Err(_) if line.trim().is_empty() => Vec::new(),
                    Err(broken) => {
                        writeln!(out, "{broken}")?;
                        Vec::new()
                    }
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                fold.settle(out)?;
                narrator.pause()
            }
            Err(RecvTimeoutError::Disconnected) => {
                ended = true;
                narrator.finish()
            }
        };
        for paragraph in paragraphs {
            fold.tell(paragraph, style, out)?;
        }
        out.flush()?;
    }
    fold.settle(out)?;
    narrator.write_tables(out)?;
    out.flush()
}

/// Send the lines of `file` as they come.
fn send_lines(file: &Path, lines: &SyncSender<io::Result<String>>) {
    let result = match file.as_os_str().as_encoded_bytes() {
        b"-" => open(file).and_then(|input| send_stream(input, lines)),
        _ => send_growing(file, lines),
    };
    if let Err(error) = result {
        // If nobody receives it, nobody wants to know.
        let _ = lines.send(Err(error));
    }
}

fn send_stream(mut input: Box<dyn BufRead + Send>, lines: &SyncSender<io::Result<String>>) -> io::Result<()> {
    let mut bytes = Vec::new();
    while input.read_until(b'\n', &mut bytes)? > 0 {
        if !send(&mut bytes, lines) {
            break;
        }
    }
    Ok(())
}

fn send_growing(file: &Path, lines: &SyncSender<io::Result<String>>) -> io::Result<()> {
    let mut input = loop {
        match File::open(file) {
            Ok(opened) => break BufReader::new(opened),
            Err(error) if error.kind() == io::ErrorKind::NotFound => std::thread::sleep(LOOK),
            Err(error) => return Err(error),
        }
    };
    let mut bytes = Vec::new();
    loop {
        // A line may come in parts: what there is of it stays in `bytes`.
        if input.read_until(b'\n', &mut bytes)? == 0 || !bytes.ends_with(b"\n") {
            std::thread::sleep(LOOK);
        } else if !send(&mut bytes, lines) {
            return Ok(());
        }
    }
}

/// Send a line and make room for the next; `false` if nobody receives.
fn send(bytes: &mut Vec<u8>, lines: &SyncSender<io::Result<String>>) -> bool {
    let text = String::from_utf8_lossy(bytes).into_owned();
    bytes.clear();
    lines.send(Ok(text)).is_ok()
}
