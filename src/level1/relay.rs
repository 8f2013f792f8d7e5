//! Requests from level 0 for the simulated host of the running job.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::{Link, send};
use crate::nested::link::{MAX_PAYLOAD, Report};

/// How long a job may take to open its socket.
const PATIENCE: Duration = Duration::from_secs(20);

/// Asks the job that listens at `socket`, and sends its answer when it comes; an empty one if none does.
pub(super) fn pass_on(number: u32, request: Vec<u8>, socket: Option<PathBuf>, link: &Link) {
    let link = Arc::clone(link);
    thread::spawn(move || {
        let answer = socket.and_then(|socket| ask(&socket, &request).ok()).unwrap_or_default();
        for part in answer.chunks(MAX_PAYLOAD) {
            send(&link, &Report::Answer(number, part.to_vec()))?;
        }
        send(&link, &Report::Answer(number, Vec::new()))
    });
}

/// Sends the file at `path`, but for what is zero, and removes it.
pub(super) fn send_file(number: u32, path: PathBuf, link: &Link) {
    let link = Arc::clone(link);
    thread::spawn(move || {
        let sent = send_filled(number, &path, &link);
        let _ = std::fs::remove_file(&path);
        sent
    });
}

fn send_filled(number: u32, path: &Path, link: &Link) -> io::Result<()> {
    /// What fits into a frame with its offset, in whole pages.
    const PART: usize = MAX_PAYLOAD - 4096;
    let mut file = File::open(path)?;
    let empty = vec![0; PART];
    let (mut part, mut offset) = (empty.clone(), 0);
    loop {
        let count = file.read(&mut part)?;
        let bytes = part[..count].to_vec();
        if count == 0 || !empty.starts_with(&bytes) {
            send(link, &Report::FilePart { number, offset, bytes })?;
        }
        if count == 0 {
            return Ok(());
        }
        offset += count as u64;
    }
}

fn ask(socket: &Path, request: &[u8]) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + PATIENCE;
    let mut stream = loop {
        match UnixStream::connect(socket) {
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(50)),
            other => break other?,
        }
    };
    stream.write_all(request)?;
    stream.write_all(b"\n")?;
    let mut answer = Vec::new();
    BufReader::new(stream).read_until(b'\n', &mut answer)?;
    while answer.last() == Some(&b'\n') {
        answer.pop();
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn the_jobs_answer_is_sent_in_parts_and_ended() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("control");
        let listener = UnixListener::bind(&socket).unwrap();
        let job = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut request = String::new();
            BufReader::new(&stream).read_line(&mut request).unwrap();
            (&stream).write_all(&[&vec![b'x'; MAX_PAYLOAD + 1][..], b"\n"].concat()).unwrap();
            request
        });
        let (mut reports, link) = io::pipe().unwrap();
        let link: Link = Arc::new(Mutex::new(File::from(std::os::fd::OwnedFd::from(link))));
        pass_on(7, b"{}".to_vec(), Some(socket), &link);
        for length in [MAX_PAYLOAD, 1, 0] {
            assert_eq!(Report::read(&mut reports).unwrap(), Report::Answer(7, vec![b'x'; length]));
        }
        assert_eq!(job.join().unwrap(), "{}\n");
        pass_on(8, b"{}".to_vec(), None, &link);
        assert_eq!(Report::read(&mut reports).unwrap(), Report::Answer(8, Vec::new()));
    }
}
