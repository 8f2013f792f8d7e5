//! The agent channel: I/O port 0xE9, where the VMM takes frames.
//!
//! A frame is a kind byte, the payload's length (16 bits, little-endian) and the payload. A read of the port answers
//! 0xE9 where there is someone to take them; after a question, the bytes of the answer up to a line feed; after a
//! request to the simulated host, the length of the answer (32 bits, little-endian) and the answer.
//!
//! Where there is nobody, everything goes to the console, and so it does if the kernel's command line says
//! `MANA_AGENT=console`: some nested machines let no program use a port, whatever the kernel allows (TCG's SVM with
//! QEMU above it). A request to the simulated host is then a line `@mana-host REQUEST` on the console, and its answer
//! a line `@mana-host-answer ANSWER` that comes in there; or on the terminal that `MANA_HOST` names there, where the
//! channel's port only takes frames.

use std::arch::asm;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::sys;

const PORT: u16 = 0xe9;

/// What a frame carries.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
pub enum Kind {
    /// Standard output of the command.
    Output = b'O',
    /// Standard error of the command.
    Error = b'E',
    /// A JSON object about what the agent did.
    Log = b'L',
    /// Exit status of the command, in decimal.
    Status = b'S',
    /// A question: how often did CPUs leave the guest so far?
    Exits = b'X',
    /// A request to the simulated host, a JSON object.
    Host = b'H',
}

/// What a request on the console begins with.
const CONSOLE_REQUEST: &str = "@mana-host ";
/// What its answer begins with.
const CONSOLE_ANSWER: &str = "@mana-host-answer ";
/// Longest answer that is believed, bytes.
const MAX_ANSWER: usize = 1 << 20;
/// Whoever has this file locked has the channel: commands run in processes of their own.
const LOCK: &str = "/etc/mana-agent.conf";

/// Frames of different threads must not mix.
static SENDING: Mutex<()> = Mutex::new(());

/// The channel, for one frame and its answer, until the guard goes.
fn take() -> (MutexGuard<'static, ()>, Option<File>) {
    let guard = SENDING.lock().unwrap_or_else(PoisonError::into_inner);
    // Without the file there is nobody to share with.
    let file = File::open(LOCK).ok().filter(|file| file.lock().is_ok());
    (guard, file)
}

/// Send `payload` to the VMM, in as many frames as it takes.
///
/// Where there is no channel, it goes to the console instead.
pub fn send(kind: Kind, payload: &[u8]) {
    let _sending = take();
    if !is_there() {
        print!("{}", String::from_utf8_lossy(payload));
        if matches!(kind, Kind::Log | Kind::Status) {
            println!();
        }
        return;
    }
    for chunk in payload.chunks(usize::from(u16::MAX)) {
        let [low, high] = (chunk.len() as u16).to_le_bytes();
        write(&[kind as u8, low, high]);
        write(chunk);
    }
}

/// How often CPUs left the guest so far: all the way to the VMM, and at all. `None` where nobody counts.
pub fn exits() -> Option<(u64, Option<u64>)> {
    const LONGEST: usize = 64;
    if !is_there() {
        return None;
    }
    let _asking = take();
    write(&[Kind::Exits as u8, 0, 0]);
    let mut answer = String::new();
    while answer.len() < LONGEST {
        match char::from(read()) {
            '\n' => break,
            digit if digit.is_ascii_digit() || digit == ' ' => answer.push(digit),
            _ => return None,
        }
    }
    let mut numbers = answer.split(' ').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next().flatten()))
}

/// Ask the simulated host for `words`; its answer, a JSON object.
pub fn ask_host(words: &[String]) -> Result<Value> {
    let request = json!({ "id": std::process::id(), "words": words }).to_string();
    let _asking = take();
    let terminal = std::env::var_os("MANA_HOST");
    let answer = match terminal {
        Some(terminal) => ask_by_terminal(&request, Path::new(&terminal))?,
        None if is_there() => ask_by_port(&request)?,
        None => ask_by_terminal(&request, Path::new("/dev/console"))?,
    };
    serde_json::from_str(&answer).with_context(|| format!("not an answer: {answer:?}"))
}

fn ask_by_port(request: &str) -> Result<String> {
    let length = u16::try_from(request.len()).context("more words than a request holds")?;
    let [low, high] = length.to_le_bytes();
    write(&[Kind::Host as u8, low, high]);
    write(request.as_bytes());
    let mut length = [0; 4];
    read_all(&mut length);
    let length = u32::from_le_bytes(length) as usize;
    // A VMM that knows of no requests goes on answering its port's number.
    if length == 0 || length > MAX_ANSWER {
        bail!("this VMM has no simulated host to ask");
    }
    let mut answer = vec![0; length];
    read_all(&mut answer);
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn ask_by_terminal(request: &str, terminal: &Path) -> Result<String> {
    let open = OpenOptions::new().read(true).write(true).open(terminal);
    let mut console = open.with_context(|| terminal.display().to_string())?;
    sys::stop_echo(&console)?;
    // A line of its own, whatever was written before.
    console.write_all(format!("\n{CONSOLE_REQUEST}{request}\n").as_bytes())?;
    for line in BufReader::new(console).lines() {
        if let Some(answer) = line?.trim().strip_prefix(CONSOLE_ANSWER) {
            return Ok(answer.to_owned());
        }
    }
    bail!("the console has ended")
}

/// Tell the VMM that a stage of the guest's start is reached.
pub fn log(stage: &str, mut details: Value) {
    details["stage"] = stage.into();
    details["uptime_ms"] = sys::uptime_ms().into();
    send(Kind::Log, details.to_string().as_bytes());
}

/// Does somebody take frames from this thread?
fn is_there() -> bool {
    // The kernel makes what it doesn't know on its command line its init's environment.
    let wants_console = std::env::var_os("MANA_AGENT").is_some_and(|value| value == "console");
    // Port permissions belong to a thread, and any thread may come here.
    !wants_console && sys::allow_port(PORT).is_ok() && u16::from(read()) == PORT
}

fn read() -> u8 {
    let value: u8;
    // SAFETY: the thread may use the port, and reading it changes nothing of this program's.
    unsafe { asm!("in al, dx", in("dx") PORT, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Many bytes at once.
fn read_all(bytes: &mut [u8]) {
    // SAFETY: the thread may use the port; the instruction fills exactly `bytes`, upwards as the direction flag is
    // clear by the calling convention.
    unsafe {
        asm!("rep insb", in("dx") PORT, inout("rdi") bytes.as_mut_ptr() => _, inout("rcx") bytes.len() => _,
             options(nostack, preserves_flags));
    }
}

fn write(bytes: &[u8]) {
    // SAFETY: the thread may use the port; the instruction reads exactly `bytes`, upwards as the direction flag is
    // clear by the calling convention.
    unsafe {
        asm!("rep outsb", in("dx") PORT, inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _,
             options(readonly, nostack, preserves_flags));
    }
}
