//! What the two levels say to each other over a virtio-serial port: frames, one way orders, the other way reports.
//!
//! A frame is a kind (u8), an argument (u32), a length (u32) and so many bytes; numbers are little-endian.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// Longest payload; longer data goes in several frames.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// Level 0 tells level 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Run the job of this index.
    Run(u32),
    /// Bytes for the running job's standard input.
    Input(Vec<u8>),
    /// The standard input has ended.
    InputEnd,
    /// A request for the running job's simulated host, which has this number.
    Control(u32, Vec<u8>),
    /// Send the file that the request with this number has made, and remove it.
    Fetch(u32, PathBuf),
    /// All is done.
    PowerOff,
}

/// Level 1 tells level 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// KVM is there; jobs can run.
    Ready,
    /// Bytes of the running job's stream: [`STDOUT`], [`STDERR`], or [`FIRST_FILE`] and up for its output files.
    Output {
        /// Which stream.
        stream: u32,
        /// What was written.
        bytes: Vec<u8>,
    },
    /// The job ended with this exit code; all its output was sent before.
    Ended(u8),
    /// Level 1 can't go on; one sentence.
    Failed(String),
    /// Part of the answer to the request with this number; the last one is empty.
    Answer(u32, Vec<u8>),
    /// Part of the file of the request with this number; what lies between parts is zero.
    FilePart {
        /// The request's number.
        number: u32,
        /// Where in the file the bytes are; a part without bytes is the last one, and this the file's size.
        offset: u64,
        /// What is there.
        bytes: Vec<u8>,
    },
}

/// Stream of a job's standard output.
pub const STDOUT: u32 = 0;
/// Stream of a job's standard error.
pub const STDERR: u32 = 1;
/// Stream of a job's first output file.
pub const FIRST_FILE: u32 = 2;

impl Order {
    /// Sends the order.
    pub fn write(&self, link: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Run(job) => write_frame(link, b'R', *job, &[]),
            Self::Input(bytes) => write_frame(link, b'I', 0, bytes),
            Self::InputEnd => write_frame(link, b'Z', 0, &[]),
            Self::Control(number, request) => write_frame(link, b'C', *number, request),
            Self::Fetch(number, path) => write_frame(link, b'F', *number, path.as_os_str().as_bytes()),
            Self::PowerOff => write_frame(link, b'P', 0, &[]),
        }
    }

    /// Waits for the next order.
    pub fn read(link: &mut impl Read) -> io::Result<Self> {
        match read_frame(link)? {
            (b'R', job, _) => Ok(Self::Run(job)),
            (b'I', _, bytes) => Ok(Self::Input(bytes)),
            (b'Z', ..) => Ok(Self::InputEnd),
            (b'C', number, request) => Ok(Self::Control(number, request)),
            (b'F', number, path) => Ok(Self::Fetch(number, OsString::from_vec(path).into())),
            (b'P', ..) => Ok(Self::PowerOff),
            (kind, ..) => Err(unknown(kind)),
        }
    }
}

impl Report {
    /// Sends the report.
    pub fn write(&self, link: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Ready => write_frame(link, b'r', 0, &[]),
            Self::Output { stream, bytes } => write_frame(link, b'o', *stream, bytes),
            Self::Ended(code) => write_frame(link, b'e', u32::from(*code), &[]),
            Self::Failed(reason) => write_frame(link, b'f', 0, reason.as_bytes()),
            Self::Answer(number, part) => write_frame(link, b'a', *number, part),
            Self::FilePart { number, offset, bytes } => {
                write_frame(link, b'p', *number, &[&offset.to_le_bytes()[..], bytes].concat())
            }
        }
    }

    /// Waits for the next report.
    pub fn read(link: &mut impl Read) -> io::Result<Self> {
        match read_frame(link)? {
            (b'r', ..) => Ok(Self::Ready),
            (b'o', stream, bytes) => Ok(Self::Output { stream, bytes }),
            (b'a', number, part) => Ok(Self::Answer(number, part)),
            (b'p', number, payload) => {
                let (offset, bytes) = payload.split_first_chunk().ok_or(io::ErrorKind::InvalidData)?;
                let offset = u64::from_le_bytes(*offset);
                Ok(Self::FilePart { number, offset, bytes: bytes.to_vec() })
            }
            (b'e', code, _) => Ok(Self::Ended(code.to_le_bytes()[0])),
            (b'f', _, reason) => Ok(Self::Failed(String::from_utf8_lossy(&reason).into_owned())),
            (kind, ..) => Err(unknown(kind)),
        }
    }
}

/// One `write`, so that frames of several threads don't mix and each costs one exit of level 1.
fn write_frame(link: &mut impl Write, kind: u8, argument: u32, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let mut frame = Vec::with_capacity(9 + payload.len());
    frame.push(kind);
    frame.extend_from_slice(&argument.to_le_bytes());
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(payload);
    link.write_all(&frame)?;
    link.flush()
}

fn read_frame(link: &mut impl Read) -> io::Result<(u8, u32, Vec<u8>)> {
    let mut kind = [0];
    let mut argument = [0; 4];
    let mut length = [0; 4];
    link.read_exact(&mut kind)?;
    link.read_exact(&mut argument)?;
    link.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_PAYLOAD {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("frame of {length} bytes")));
    }
    let mut payload = vec![0; length];
    link.read_exact(&mut payload)?;
    Ok((kind[0], u32::from_le_bytes(argument), payload))
}

fn unknown(kind: u8) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("frame of unknown kind {kind:#x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_arrives() {
        let orders = [
            Order::Run(7),
            Order::Input(vec![1, 0x78]),
            Order::InputEnd,
            Order::Control(3, vec![9]),
            Order::Fetch(4, "/out/0/saved".into()),
            Order::PowerOff,
        ];
        let mut wire = Vec::new();
        orders.iter().for_each(|order| order.write(&mut wire).unwrap());
        let mut rest = &wire[..];
        let arrived: Vec<_> = orders.iter().map(|_| Order::read(&mut rest).unwrap()).collect();
        assert_eq!(arrived, orders);

        let reports = [
            Report::Ready,
            Report::Output { stream: 3, bytes: vec![0; MAX_PAYLOAD] },
            Report::Ended(5),
            Report::Failed("no".into()),
            Report::Answer(3, vec![7]),
            Report::FilePart { number: 4, offset: 1 << 40, bytes: vec![8; 3] },
            Report::FilePart { number: 4, offset: 1 << 41, bytes: Vec::new() },
        ];
        let mut wire = Vec::new();
        reports.iter().for_each(|report| report.write(&mut wire).unwrap());
        let mut rest = &wire[..];
        let arrived: Vec<_> = reports.iter().map(|_| Report::read(&mut rest).unwrap()).collect();
        assert_eq!(arrived, reports);
        assert_eq!(Report::read(&mut rest).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn nonsense_is_an_error() {
        let too_long = [b'o', 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
        assert_eq!(Report::read(&mut &too_long[..]).unwrap_err().kind(), io::ErrorKind::InvalidData);
        let unknown = [b'?', 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(Order::read(&mut &unknown[..]).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
