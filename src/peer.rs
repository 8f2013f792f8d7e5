//! `mana-vmm peer`: the built-in host at the end of another VMM's cable, so that another NIC is tried or measured
//! against the same far end as ours.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use event_manager::{EventOps, Events, MutEventSubscriber, SubscriberOps};
use mana_device::doors::{Clock, Port, TxFrame, TxOffload};
use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use crate::clock::MonotonicClock;
use crate::events;
use crate::net::{Cable, Frame, Peer, Polled, Stream, peer};
use crate::seccomp::{self, Role};
use crate::stop::{Outcome, Stop};

/// Frames that one side hands over before the other has its turn.
const BUDGET: usize = 256;

/// What `mana-vmm peer` is asked for.
#[derive(Clone, Debug)]
pub struct PeerConfig {
    /// Where the other VMM connects.
    pub socket: PathBuf,
    /// Bytes of the longest IP packet.
    pub mtu: u16,
    /// The end of the run.
    pub timeout: Option<Duration>,
    /// What becomes of unexpected system calls.
    pub seccomp: seccomp::Mode,
}

/// Answers whoever connects, until a signal or the time-out.
///
/// # Errors
/// The socket can't be made, or the host lacks descriptors.
pub fn run(config: &PeerConfig) -> anyhow::Result<ExitCode> {
    seccomp::set_mode(config.seccomp);
    let stop = Stop::new()?;
    let mut events = events::until_stopped(&stop, config.timeout)?;
    let clock: Arc<dyn Clock> = Arc::new(MonotonicClock::new());
    let stream = Stream::open("peer", &config.socket, true, config.mtu, &clock)?;
    let host = Peer::new(peer::Network::numbered(0), config.mtu, clock.clone());
    let alarm = TimerFd::new().context("no timer descriptor")?;
    events.add_subscriber(Box::new(Link { stream, host, clock, alarm }));
    eprintln!("mana-vmm: the peer is behind {}", config.socket.display());
    seccomp::enter(Role::Worker)?;
    loop {
        events.run().context("event loop")?;
        match stop.outcome() {
            // A signal is how it is meant to end.
            Some(Outcome::HostError(_)) => return Ok(ExitCode::SUCCESS),
            Some(outcome) => return Ok(outcome.exit_code()),
            None => {}
        }
    }
}

/// A cable whose one end is the socket and whose other end is the host.
struct Link {
    stream: Stream,
    host: Peer,
    clock: Arc<dyn Clock>,
    /// The next deadline of either.
    alarm: TimerFd,
}

impl Link {
    /// Passes on what there is; when the next look is due, in nanoseconds of the clock.
    fn pass(&self) -> Option<u64> {
        loop {
            let from_guest = pass_on(&self.stream, &self.host);
            let to_guest = pass_on(&self.host, &self.stream);
            if !from_guest.more && !to_guest.more {
                return [from_guest.deadline, to_guest.deadline].into_iter().flatten().min();
            }
        }
    }
}

/// Takes what `from` has for the guest, which here is `to`.
fn pass_on(from: &dyn Cable, to: &dyn Port) -> Polled {
    let mut copy = Vec::new();
    let polled = from.poll(BUDGET, &mut |frames: &[Frame<'_>]| {
        for frame in frames {
            copy.clear();
            copy.extend_from_slice(frame.bytes);
            let slices = [VolatileSlice::from(copy.as_mut_slice())];
            // The side that has no room counts it, as a switch would.
            let _full =
                to.send(&TxFrame { slices: &slices, len: frame.bytes.len(), offload: TxOffload::default() });
        }
    });
    to.flush();
    polled
}

impl MutEventSubscriber for Link {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Some(file) = self.stream.readable() {
            add(ops, Events::new_raw(file, EventSet::IN));
        }
        add(ops, Events::new(&self.alarm, EventSet::IN));
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        let wait =
            self.pass().map(|due| Duration::from_nanos(due.saturating_sub(self.clock.now_ns()).max(1)));
        let set = match wait {
            Some(wait) => self.alarm.reset(wait, None),
            None => self.alarm.clear(),
        };
        if let Err(error) = set {
            log::error!("peer: {error}");
        }
    }
}

fn add(ops: &mut EventOps<'_>, events: Events) {
    if let Err(error) = ops.add(events) {
        log::error!("event loop: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Ethernet, ARP: who has 10.0.2.2? Tell 10.0.2.15.
    const ARP: [u8; 42] = [
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1,
        10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2,
    ];

    #[test]
    fn the_host_answers_through_the_socket() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("peer");
        let clock: Arc<dyn Clock> = Arc::new(MonotonicClock::new());
        let stream = Stream::open("peer", &socket, true, 1500, &clock).unwrap();
        let host = Peer::new(peer::Network::numbered(0), 1500, clock.clone());
        let link = Link { stream, host, clock, alarm: TimerFd::new().unwrap() };
        let mut client = UnixStream::connect(&socket).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        client.write_all(&(ARP.len() as u32).to_be_bytes()).unwrap();
        client.write_all(&ARP).unwrap();
        // Accepts, reads, answers.
        for _ in 0..3 {
            let _due = link.pass();
        }
        let mut answer = [0; 4 + 42];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer[4..10], [2, 0, 0, 0, 0, 1], "it is for who has asked");
        assert_eq!(answer[4 + 20..4 + 22], [0, 2], "an ARP reply");
        assert_eq!(answer[4 + 28..4 + 32], [10, 0, 2, 2]);
    }
}
