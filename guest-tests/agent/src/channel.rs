//! The agent channel: I/O port 0xE9, where the VMM takes frames.
//!
//! A frame is a kind byte, the payload's length (16 bits, little-endian) and the payload. A read of the port answers
//! 0xE9 where there is someone to take them; after a question, the bytes of the answer up to a line feed.
//!
//! Where there is nobody, everything goes to the console, and so it does if the kernel's command line says
//! `MANA_AGENT=console`: some nested machines let no program use a port, whatever the kernel allows (TCG's SVM with
//! QEMU above it).

use std::arch::asm;
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

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
}

/// Frames of different threads must not mix.
static SENDING: Mutex<()> = Mutex::new(());

/// Send `payload` to the VMM, in as many frames as it takes.
///
/// Where there is no channel, it goes to the console instead.
pub fn send(kind: Kind, payload: &[u8]) {
    let _sending = SENDING.lock().unwrap_or_else(PoisonError::into_inner);
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

fn write(bytes: &[u8]) {
    // SAFETY: the thread may use the port; the instruction reads exactly `bytes`, upwards as the direction flag is
    // clear by the calling convention.
    unsafe {
        asm!("rep outsb", in("dx") PORT, inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _,
             options(readonly, nostack, preserves_flags));
    }
}
