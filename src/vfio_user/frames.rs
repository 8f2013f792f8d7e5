//! Cuts the socket's bytes into messages.
//!
//! A stream has no borders between messages: a read may bring half of one, or fifty posted writes at once. Descriptors
//! travel beside the bytes. The kernel ends a read at the bytes that they were sent with, so they belong to the first
//! message that reaches the end of the read which brought them.

use std::os::fd::OwnedFd;

use zerocopy::FromBytes;

use super::wire::Header;

/// Largest message: 200 writes in one (4,824 bytes), or [`MAX_TRANSFER`] bytes of a region, whichever is larger, with
/// room for a client's longer version string.
pub const MAX_MESSAGE: usize = 8192;
/// Most bytes of one region access.
pub const MAX_TRANSFER: usize = 4096;
/// Most descriptors of one message (`SCM_MAX_FD` of Linux).
pub const MAX_DESCRIPTORS: usize = 253;

/// The stream can't be followed any further: the connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// The size in the header is less than the header's.
    #[error("a message says that it has {0} bytes, fewer than its header")]
    Short(u32),
    /// The size in the header is beyond all reason.
    #[error("a message says that it has {0} bytes, more than {MAX_MESSAGE}")]
    Long(u32),
    /// More descriptors than any message carries.
    #[error("more than {MAX_DESCRIPTORS} descriptors come with one message")]
    Descriptors,
    /// The socket closed inside a message.
    #[error("the socket was closed in the middle of a message")]
    Cut,
}

/// A whole message.
#[derive(Debug)]
pub struct Frame<'a> {
    /// The header.
    pub header: Header,
    /// What follows it.
    pub payload: &'a [u8],
    /// Descriptors that came along.
    pub descriptors: Vec<OwnedFd>,
}

/// Bytes received, and what of them has been taken.
pub struct Frames {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    descriptors: Vec<OwnedFd>,
    /// Where in `buffer` the read ended that brought the descriptors.
    descriptors_end: usize,
}

impl Default for Frames {
    fn default() -> Self {
        Self {
            buffer: vec![0; 8 * MAX_MESSAGE].into(),
            start: 0,
            end: 0,
            descriptors: Vec::new(),
            descriptors_end: 0,
        }
    }
}

impl Frames {
    /// Room for the next read; at least a whole message fits once [`next_frame`](Self::next_frame) has no more.
    pub fn room(&mut self) -> &mut [u8] {
        self.buffer.copy_within(self.start..self.end, 0);
        self.descriptors_end = self.descriptors_end.saturating_sub(self.start);
        self.end -= self.start;
        self.start = 0;
        &mut self.buffer[self.end..]
    }

    /// `bytes` of [`room`](Self::room) were filled by a read that brought `descriptors`.
    ///
    /// # Errors
    /// [`Broken::Descriptors`] if the message at hand has too many by now.
    pub fn received(&mut self, bytes: usize, descriptors: Vec<OwnedFd>) -> Result<(), Broken> {
        self.end = (self.end + bytes).min(self.buffer.len());
        if !descriptors.is_empty() {
            self.descriptors.extend(descriptors);
            self.descriptors_end = self.end;
        }
        if self.descriptors.len() > MAX_DESCRIPTORS { Err(Broken::Descriptors) } else { Ok(()) }
    }

    /// The next message, if all of it is there.
    ///
    /// # Errors
    /// [`Broken`] when no border can be trusted any more.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, Broken> {
        let waiting = &self.buffer[self.start..self.end];
        let Ok((header, _)) = Header::read_from_prefix(waiting) else { return Ok(None) };
        let size = header.size.get();
        let length = usize::try_from(size).unwrap_or(usize::MAX);
        if length < size_of::<Header>() {
            return Err(Broken::Short(size));
        }
        if length > MAX_MESSAGE {
            return Err(Broken::Long(size));
        }
        if waiting.len() < length {
            return Ok(None);
        }
        let payload = self.start + size_of::<Header>()..self.start + length;
        self.start += length;
        let ours = self.start >= self.descriptors_end;
        let descriptors = if ours { std::mem::take(&mut self.descriptors) } else { Vec::new() };
        Ok(Some(Frame { header, payload: &self.buffer[payload], descriptors }))
    }

    /// The socket was closed.
    ///
    /// # Errors
    /// [`Broken::Cut`] inside a message.
    pub fn close(&self) -> Result<(), Broken> {
        if self.start == self.end { Ok(()) } else { Err(Broken::Cut) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(id: u16, size: u32, payload: &[u8]) -> Vec<u8> {
        let header = [id.to_le_bytes(), 9_u16.to_le_bytes()].concat();
        [header, size.to_le_bytes().to_vec(), vec![0; 8], payload.to_vec()].concat()
    }

    fn feed(frames: &mut Frames, bytes: &[u8], descriptors: usize) -> Result<(), Broken> {
        let descriptors = (0..descriptors).map(|_| std::fs::File::open("/dev/null").unwrap().into());
        frames.room()[..bytes.len()].copy_from_slice(bytes);
        frames.received(bytes.len(), descriptors.collect())
    }

    /// Ids, payload lengths and descriptors of all whole messages.
    fn drain(frames: &mut Frames) -> Vec<(u16, usize, usize)> {
        let mut seen = Vec::new();
        while let Some(frame) = frames.next_frame().unwrap() {
            seen.push((frame.header.id.get(), frame.payload.len(), frame.descriptors.len()));
        }
        seen
    }

    #[test]
    fn messages_come_in_any_pieces() {
        let stream = [message(1, 16, &[]), message(2, 20, b"four"), message(3, 17, b"x")].concat();
        for cut in 0..=stream.len() {
            let mut frames = Frames::default();
            feed(&mut frames, &stream[..cut], 0).unwrap();
            let mut seen = drain(&mut frames);
            assert_eq!(frames.close().is_ok(), [0, 16, 36, 53].contains(&cut));
            feed(&mut frames, &stream[cut..], 0).unwrap();
            seen.extend(drain(&mut frames));
            assert_eq!(seen, [(1, 0, 0), (2, 4, 0), (3, 1, 0)], "cut at {cut}");
        }
    }

    #[test]
    fn descriptors_go_with_the_message_that_they_were_sent_with() {
        let mut frames = Frames::default();
        let two = [message(1, 16, &[]), message(2, 20, b"four")].concat();
        feed(&mut frames, &two, 2).unwrap();
        assert_eq!(drain(&mut frames), [(1, 0, 0), (2, 4, 2)]);
        feed(&mut frames, &two[..18], 1).unwrap();
        assert_eq!(drain(&mut frames), [(1, 0, 0)]);
        feed(&mut frames, &two[18..], 0).unwrap();
        assert_eq!(drain(&mut frames), [(2, 4, 1)]);
    }

    #[test]
    fn a_full_buffer_makes_room_again() {
        let mut frames = Frames::default();
        let large = message(7, MAX_MESSAGE as u32, &vec![5; MAX_MESSAGE - 16]);
        for round in 0..40 {
            let half = &large[..large.len() / 2];
            feed(&mut frames, half, 0).unwrap();
            assert_eq!(drain(&mut frames), []);
            feed(&mut frames, &large[half.len()..], usize::from(round % 3 == 0)).unwrap();
            assert_eq!(drain(&mut frames).len(), 1);
        }
    }

    #[test]
    fn sizes_that_cannot_be_end_the_stream() {
        for (size, broken) in
            [(0, Broken::Short(0)), (15, Broken::Short(15)), (u32::MAX, Broken::Long(u32::MAX))]
        {
            let mut frames = Frames::default();
            feed(&mut frames, &message(1, size, &[]), 0).unwrap();
            assert_eq!(frames.next_frame().unwrap_err(), broken);
        }
        let mut frames = Frames::default();
        feed(&mut frames, b"x", 200).unwrap();
        assert_eq!(feed(&mut frames, b"x", 200), Err(Broken::Descriptors));
    }
}
