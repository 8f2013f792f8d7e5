//! One client's socket: bytes and descriptors in, replies out.

use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use anyhow::{Context, ensure};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

use super::frames::{Frames, MAX_DESCRIPTORS};
use super::session::Session;

/// Replies that may wait while more of a batch is worked off.
const MAX_WAITING: usize = 64 << 10;

/// Serve `stream` until the client closes it or it is shut down.
///
/// Everything that a read brings is worked off before the replies go out together: a burst of posted writes costs one
/// system call.
///
/// # Errors
/// Why the connection had to end before the client wanted it to.
pub fn serve(stream: &UnixStream, session: &mut Session) -> anyhow::Result<()> {
    let mut frames = Frames::default();
    let mut replies = Vec::new();
    loop {
        let (bytes, descriptors) = receive(stream, frames.room())?;
        if bytes == 0 {
            return Ok(frames.close()?);
        }
        let worked = work(stream, session, &mut frames, bytes, descriptors, &mut replies);
        send(stream, &mut replies)?;
        worked?;
    }
}

/// Work off what a read brought.
fn work(
    stream: &UnixStream,
    session: &mut Session,
    frames: &mut Frames,
    bytes: usize,
    descriptors: Vec<OwnedFd>,
    replies: &mut Vec<u8>,
) -> anyhow::Result<()> {
    frames.received(bytes, descriptors)?;
    while let Some(frame) = frames.next_frame()? {
        session.handle(frame, replies)?;
        if replies.len() > MAX_WAITING {
            send(stream, replies)?;
        }
    }
    Ok(())
}

/// Bytes read into `room`, and the descriptors that came with them. No bytes are the end.
fn receive(stream: &UnixStream, room: &mut [u8]) -> anyhow::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let room = &mut [IoSliceMut::new(room)];
        match recvmsg(stream, room, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::CONNRESET) => return Ok((0, Vec::new())),
            other => break other.context("the socket can't be read")?,
        }
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let whole = !received.flags.contains(ReturnFlags::CTRUNC);
    ensure!(whole, "more descriptors come with a message than this process may have open");
    Ok((received.bytes, descriptors))
}

fn send(mut stream: &UnixStream, replies: &mut Vec<u8>) -> anyhow::Result<()> {
    stream.write_all(replies).context("a reply can't be sent")?;
    replies.clear();
    Ok(())
}
