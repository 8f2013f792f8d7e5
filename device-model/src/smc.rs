//! The shared-memory channel: 32 bytes in BAR0 through which the driver has the hardware channel established and
//! destroyed.
//!
//! The write of the last dword is the request. The answer stands there when that write is done, but that to DESTROY_HWC:
//! the driver sees the card owning the window once, and sleeps for a millisecond before it looks again, as it does with
//! firmware that takes its time. The handler of the channel's last interrupt, which has woken the unload and still rings
//! its queues, needs that millisecond: without it, drivers until 6.12 tear the channel's doorbell from under the handler.
//!
//! Source: `mana_smc_setup_hwc`, `mana_smc_teardown_hwc` (shm_channel.c); the sheet's section 3.

pub mod state;

use zerocopy::IntoBytes;

use crate::bar0::SHM_SIZE;
use crate::wire::smc::{Header, Kind};

/// Bytes of the window.
const SIZE: usize = SHM_SIZE as usize;
/// Where the header is.
const HEADER: usize = SIZE - size_of::<u32>();

/// The window.
#[derive(Debug, Default)]
pub struct Window {
    bytes: [u8; SIZE],
    /// A request that the simulated host lets wait, and when it is served.
    kept: Option<(u64, Request)>,
    /// The header with the answer, once the driver has looked in vain.
    withheld: Option<Header>,
}

/// A request, as it stood in the window when its last dword was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is asked.
    pub header: Header,
    /// Everything.
    pub window: [u8; SIZE],
}

impl Window {
    /// Read from byte `offset`.
    pub fn read(&mut self, offset: u32, data: &mut [u8]) {
        self.peek(offset, data);
        if offset as usize + data.len() > HEADER
            && let Some(header) = self.withheld.take()
        {
            self.respond(header);
        }
    }
    fn peek(&self, offset: u32, data: &mut [u8]) {
        let from = self.bytes.get(offset as usize..).unwrap_or_default();
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }
    /// Write to byte `offset`; the request, if this completes one.
    pub fn write(&mut self, offset: u32, data: &[u8]) -> Option<Request> {
        let to = self.bytes.get_mut(offset as usize..).unwrap_or_default();
        to.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        let complete = offset as usize + data.len() == SIZE;
        if complete {
            self.withheld = None;
        }
        complete.then(|| Request { header: Header(self.header()), window: self.bytes })
    }
    /// The card keeps the window, and `kept`, if there is something, until its time.
    pub fn keep(&mut self, kept: Option<(u64, Request)>) {
        self.kept = kept;
        self.respond(Header(self.header() | Header::CARD_OWNS));
    }
    /// The request whose time has come at `now_ns`.
    pub fn take_kept(&mut self, now_ns: u64) -> Option<Request> {
        self.kept.take_if(|(due_ns, _)| *due_ns <= now_ns).map(|(_, request)| request)
    }
    /// The driver gets the window back, if nothing is kept; its request stays without an answer.
    pub fn release(&mut self) {
        if self.kept.is_none() {
            self.respond(Header(self.header() & !Header::CARD_OWNS));
        }
    }
    fn header(&self) -> u32 {
        let mut word = [0; 4];
        self.peek(HEADER as u32, &mut word);
        u32::from_le_bytes(word)
    }
    /// Answer `request` with `status`.
    pub fn answer(&mut self, request: &Request, status: u8) {
        let header = request.header.response(status);
        if request.header.kind() == Kind::DestroyHwc {
            self.respond(Header(header.0 | Header::CARD_OWNS));
            self.withheld = Some(header);
        } else {
            self.respond(header);
        }
    }
    /// Put the answer where the request was.
    pub fn respond(&mut self, header: Header) {
        let to = self.bytes.get_mut(HEADER..).unwrap_or_default();
        to.iter_mut().zip(header.0.to_le().as_bytes()).for_each(|(to, from)| *to = *from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_dword_makes_a_request() {
        let mut window = Window::default();
        for offset in (0..28).step_by(4) {
            assert_eq!(window.write(offset, &[offset as u8; 4]), None);
        }
        let request = window.write(28, &1_u32.to_le_bytes()).expect("request");
        assert_eq!(request.header, Header(1));
        assert_eq!(request.window[24], 24);
        window.answer(&request, 0);
        let mut word = [0; 4];
        window.read(28, &mut word);
        assert_eq!(u32::from_le_bytes(word), 0x81);
        assert!(window.write(24, &[0, 0, 0, 0, 2, 0, 0, 0]).is_some());
    }

    #[test]
    fn the_end_of_the_channel_is_answered_at_the_second_look() {
        let mut window = Window::default();
        let request = window.write(28, &2_u32.to_le_bytes()).expect("request");
        window.answer(&request, 0);
        let saved = window.save();
        let mut look = || {
            let mut word = [0; 4];
            window.read(24, &mut [0; 4]);
            window.read(28, &mut word);
            u32::from_le_bytes(word)
        };
        assert_eq!([look(), look(), look()], [0x8000_0082, 0x82, 0x82]);
        let mut restored = Window::default();
        restored.load(saved);
        assert_eq!(restored.header(), 0x82);
    }
}
