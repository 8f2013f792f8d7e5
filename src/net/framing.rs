//! Frames on a stream socket, as QEMU's `-netdev stream`, passt and libslirp's helpers have them: each behind its
//! length, 32 bits, big-endian (QEMU's net/net.c, `net_fill_rstate`).

use std::io::{self, ErrorKind, Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;

use mana_device::doors::{PortDropped, TxFrame};

/// Bytes of the length.
const PREFIX: usize = 4;
/// Longest frame: QEMU's `NET_BUFSIZE`.
const MAX_FRAME: usize = 4096 + 65536;
/// What is read at once, and the room a frame must find.
const INPUT: usize = 256 << 10;
const _: () = assert!(INPUT >= 2 * (PREFIX + MAX_FRAME));
/// Bytes collected before they are written without waiting for the end of the batch.
const WRITE_AT: usize = 64 << 10;
/// Bytes that may wait for the other side to read; further frames are dropped.
const MAX_WAITING: usize = 2 << 20;

/// The incoming half.
pub struct Input {
    socket: UnixStream,
    buffer: Box<[u8]>,
    /// Bytes received and not taken yet.
    unread: Range<usize>,
}

/// What a read has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// Bytes.
    Bytes,
    /// Nothing: there is nothing now.
    Nothing,
}

impl Input {
    /// Frames from `socket`, which must be non-blocking.
    pub fn new(socket: UnixStream) -> Self {
        Self { socket, buffer: vec![0; INPUT].into(), unread: 0..0 }
    }

    /// Read once, as much as there is room for.
    ///
    /// # Errors
    /// The connection is over.
    pub fn read(&mut self) -> io::Result<Arrival> {
        if self.unread.start > 0 {
            self.buffer.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
        }
        match self.socket.read(&mut self.buffer[self.unread.end..]) {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                self.unread.end += count;
                Ok(Arrival::Bytes)
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                Ok(Arrival::Nothing)
            }
            Err(error) => Err(error),
        }
    }

    /// Where the next whole frame lies.
    ///
    /// # Errors
    /// The other side has sent a length that no frame has: there is no telling where the next one begins.
    pub fn next(&mut self) -> io::Result<Option<Range<usize>>> {
        let unread = &self.buffer[self.unread.clone()];
        let Some((prefix, rest)) = unread.split_first_chunk::<PREFIX>() else { return Ok(None) };
        let len = u32::from_be_bytes(*prefix) as usize;
        if len > MAX_FRAME {
            let text = format!("a frame of {len} bytes, where none has more than {MAX_FRAME}");
            return Err(io::Error::new(ErrorKind::InvalidData, text));
        }
        if rest.len() < len {
            return Ok(None);
        }
        let start = self.unread.start + PREFIX;
        self.unread.start = start + len;
        Ok(Some(start..start + len))
    }

    /// The bytes of a frame that [`next`](Self::next) has found, until the next read.
    pub fn bytes(&self, frame: Range<usize>) -> &[u8] {
        &self.buffer[frame]
    }

    /// The same, for who sends the frame on as a piece of memory.
    pub fn bytes_mut(&mut self, frame: Range<usize>) -> &mut [u8] {
        &mut self.buffer[frame]
    }
}

/// The outgoing half.
pub struct Output {
    socket: UnixStream,
    waiting: Vec<u8>,
    /// How much of `waiting` the socket has taken.
    written: usize,
}

impl Output {
    /// Frames to `socket`, which must be non-blocking.
    pub fn new(socket: UnixStream) -> Self {
        Self { socket, waiting: Vec::new(), written: 0 }
    }

    /// Copy a frame; it goes out with the next [`flush`](Self::flush), or before if there are many.
    ///
    /// # Errors
    /// [`PortDropped`] if too much is waiting.
    pub fn put(&mut self, frame: &TxFrame<'_>) -> Result<(), PortDropped> {
        if frame.len > MAX_FRAME || self.waiting.len() - self.written + frame.len > MAX_WAITING {
            return Err(PortDropped);
        }
        self.waiting.extend_from_slice(&(frame.len as u32).to_be_bytes());
        let start = self.waiting.len();
        self.waiting.resize(start + frame.len, 0);
        let mut rest = &mut self.waiting[start..];
        for slice in frame.slices {
            let copied = slice.copy_to(rest);
            rest = &mut rest[copied..];
        }
        if self.waiting.len() - self.written >= WRITE_AT {
            // An end of the connection shows when it is read.
            let _ = self.flush();
        }
        Ok(())
    }

    /// Write what the socket takes; the answer is whether that was all.
    ///
    /// # Errors
    /// The connection is over.
    pub fn flush(&mut self) -> io::Result<bool> {
        while self.written < self.waiting.len() {
            match self.socket.write(&self.waiting[self.written..]) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.waiting.drain(..self.written);
                    self.written = 0;
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        self.waiting.clear();
        self.written = 0;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::with_frame;
    use super::*;

    fn pair() -> (UnixStream, UnixStream) {
        let (a, b) = UnixStream::pair().unwrap();
        a.set_nonblocking(true).unwrap();
        b.set_nonblocking(true).unwrap();
        (a, b)
    }

    /// All frames that are there.
    fn receive(input: &mut Input) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while input.read().unwrap() == Arrival::Bytes {
            while let Some(frame) = input.next().unwrap() {
                frames.push(input.bytes(frame).to_vec());
            }
        }
        frames
    }

    #[test]
    fn frames_arrive_however_the_bytes_are_cut() {
        let (mut a, b) = pair();
        let mut input = Input::new(b);
        let frames = [vec![1; 60], vec![], vec![2; 65_536], vec![3; 14]];
        let bytes: Vec<u8> = frames
            .iter()
            .flat_map(|frame| [&(frame.len() as u32).to_be_bytes()[..], &frame[..]].concat())
            .collect();
        for size in [1, 3, 4, 1000, bytes.len()] {
            let step = size.max(bytes.len() / 500);
            let (head, tail) = bytes.split_at(200);
            let pieces = head.chunks(size).chain(tail.chunks(step));
            let mut seen = Vec::new();
            for piece in pieces {
                a.write_all(piece).unwrap();
                seen.extend(receive(&mut input));
            }
            assert_eq!(seen, frames);
        }
    }

    #[test]
    fn a_length_that_no_frame_has_ends_the_connection() {
        let (mut a, b) = pair();
        let mut input = Input::new(b);
        a.write_all(&0x0001_1001_u32.to_be_bytes()).unwrap();
        assert_eq!(input.read().unwrap(), Arrival::Bytes);
        assert_eq!(input.next().unwrap_err().kind(), ErrorKind::InvalidData);
        drop(a);
        assert_eq!(input.read().unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn whole_frames_wait_for_a_slow_reader_and_are_dropped_beyond_the_bound() {
        let (a, b) = pair();
        let (mut output, mut input) = (Output::new(a), Input::new(b));
        let frame = vec![5; 9000];
        let mut sent = 0;
        while with_frame(&frame, |frame| output.put(frame)).is_ok() {
            sent += 1;
            assert!(sent < 10_000, "nothing bounds what waits");
        }
        assert!(sent * 9000 >= MAX_WAITING);
        let mut seen = Vec::new();
        while seen.len() < sent {
            seen.extend(receive(&mut input));
            output.flush().unwrap();
        }
        assert!(output.flush().unwrap() && receive(&mut input).is_empty());
        assert!(seen.iter().all(|seen| *seen == frame));
    }
}
