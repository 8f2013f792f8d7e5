//! Requests of a guest under QEMU to the simulated host: lines on its second serial port, passed on to the control
//! socket of `mana-vmm serve`, and the answers back.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// What a request's line begins with.
const REQUEST: &str = "@mana-host ";
/// What an answer's line begins with.
const ANSWER: &str = "@mana-host-answer ";
/// Terminal of the guest on which it asks.
pub const TERMINAL: &str = "/dev/ttyS1";
/// How long the serial port and the control socket may take to be there.
const PATIENCE: Duration = Duration::from_secs(20);

/// Passes on what comes, until the guest is gone.
pub fn start(serial: &Path, control: &Path) {
    let (serial, control) = (serial.to_owned(), control.to_owned());
    // It ends with QEMU, whose end nobody has to wait for here.
    thread::spawn(move || {
        if let Err(error) = relay(&serial, &control) {
            eprintln!("guest-tests: requests to the simulated host: {error:#}");
        }
    });
}

fn relay(serial: &Path, control: &Path) -> Result<()> {
    let mut guest = connect(serial)?;
    let mut host = connect(control)?;
    let mut answers = BufReader::new(host.try_clone()?).lines();
    let mut requests = BufReader::new(guest.try_clone()?);
    let mut line = Vec::new();
    // Whoever is gone leaves nothing to pass on.
    while requests.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
        let text = String::from_utf8_lossy(&line).into_owned();
        line.clear();
        let Some(request) = text.trim().strip_prefix(REQUEST) else { continue };
        host.write_all(format!("{request}\n").as_bytes())?;
        let Some(answer) = answers.next().transpose()? else { break };
        guest.write_all(format!("{ANSWER}{answer}\n").as_bytes())?;
    }
    Ok(())
}

/// Connects to `socket`, which a program makes that has just been started.
pub fn connect(socket: &Path) -> Result<UnixStream> {
    let start = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if start.elapsed() > PATIENCE => {
                return Err(error).with_context(|| socket.display().to_string());
            }
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_guests_requests_are_answered() {
        let folder = tempfile::tempdir().unwrap();
        let (serial, control) = (folder.path().join("serial"), folder.path().join("control"));
        let (guest, host) = (UnixListener::bind(&serial).unwrap(), UnixListener::bind(&control).unwrap());
        start(&serial, &control);
        let (mut guest, _) = guest.accept().unwrap();
        guest.write_all(b"login:\n@mana-host {\"words\":[\"ledger\"]}\r\n").unwrap();
        let (mut host, _) = host.accept().unwrap();
        let mut line = String::new();
        BufReader::new(host.try_clone().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "{\"words\":[\"ledger\"]}\n");
        host.write_all(b"{\"ok\":true}\n").unwrap();
        line.clear();
        BufReader::new(guest).read_line(&mut line).unwrap();
        assert_eq!(line, "@mana-host-answer {\"ok\":true}\n");
    }
}
