//! A tap interface of the host: its network stack, or a bridge, at the other end of the cable.
//!
//! One frame is one `readv` or `writev` on `/dev/net/tun` (Linux's Documentation/networking/tuntap.rst). The file
//! is non-blocking, so a full queue on the host's side drops the guest's frame as a full link would.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, anyhow, bail};
use mana_device::doors::{Port, PortDropped, RxChecksum, TxFrame};
use vm_memory::VolatileSlice;

use super::{Cable, Deliver, FRAME_OVERHEAD, Frame, Polled};

/// Frames read before they are handed on.
const BATCH: usize = 64;
/// Most pieces of one frame: a MANA WQE holds fewer than this (`MAX_TX_WQE_SGL_ENTRIES`, gdma.h: 30).
const MAX_PIECES: usize = 64;

/// `--netdev tap,ifname=NAME`.
pub struct Tap {
    file: File,
    /// Longest frame that is let through, bytes.
    max_frame: usize,
    /// `BATCH` places of `max_frame + 1` bytes, so that a longer frame shows.
    buffer: Mutex<Vec<u8>>,
}

impl Tap {
    /// Attach to the tap interface `ifname`, made if it doesn't exist, for IP packets of at most `mtu` bytes.
    ///
    /// # Errors
    /// One sentence that says what is missing and how to get it.
    pub fn open(ifname: &str, mtu: u16) -> anyhow::Result<Self> {
        let option = format!("--netdev tap,ifname={ifname}");
        let request = interface_request(ifname).with_context(|| option.clone())?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(|error| anyhow!("{option}: {}", explain_open(&error)))?;
        attach(&file, request).map_err(|error| anyhow!("{option}: {}", explain_attach(ifname, &error)))?;
        if let Err(error) = bring_up(request) {
            log::warn!(
                "{option}: the interface can't be set up ({error}); `sudo ip link set {ifname} up` does it"
            );
        }
        let max_frame = usize::from(mtu) + FRAME_OVERHEAD;
        Ok(Self { file, max_frame, buffer: Mutex::new(vec![0; BATCH * (max_frame + 1)]) })
    }

    /// Fill the places of `buffer`; the answer is the frames' lengths, in order.
    fn read_batch(&self, buffer: &mut [u8], limit: usize) -> Vec<usize> {
        let mut lengths = Vec::with_capacity(BATCH);
        for place in buffer.chunks_exact_mut(self.max_frame + 1).take(limit) {
            match (&self.file).read(place) {
                Ok(length) => lengths.push(length),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // EAGAIN: no more frames. EIO: the interface is down.
                Err(_) => break,
            }
        }
        lengths
    }
}

impl Port for Tap {
    fn send(&self, frame: &TxFrame<'_>) -> Result<(), PortDropped> {
        match write_pieces(&self.file, frame.slices) {
            Ok(written) if written == frame.len => Ok(()),
            _ => Err(PortDropped),
        }
    }
}

impl Cable for Tap {
    fn readable(&self) -> Option<RawFd> {
        Some(self.file.as_raw_fd())
    }

    fn poll(&self, budget: usize, deliver: Deliver<'_>) -> Polled {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut left = budget.max(1);
        while left > 0 {
            let lengths = self.read_batch(&mut buffer, left.min(BATCH));
            let frames: Vec<_> = buffer
                .chunks_exact(self.max_frame + 1)
                .zip(&lengths)
                .filter(|&(_, &length)| length <= self.max_frame)
                .map(|(place, &length)| Frame::plain(&place[..length], RxChecksum::Unknown))
                .collect();
            if !frames.is_empty() {
                deliver(&frames);
            }
            if lengths.len() < left.min(BATCH) {
                return Polled::default();
            }
            left -= lengths.len();
        }
        Polled { more: true, deadline: None }
    }
}

/// A request about the interface `ifname`; names have 1 to 15 bytes (`IFNAMSIZ`).
fn interface_request(ifname: &str) -> anyhow::Result<libc::ifreq> {
    // SAFETY: ifreq holds only integers, arrays and pointers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let bytes = ifname.as_bytes();
    if bytes.is_empty() || bytes.len() >= request.ifr_name.len() || bytes.iter().any(|b| b"/ \0".contains(b))
    {
        bail!("an interface name has 1 to 15 characters, no space and no slash");
    }
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    Ok(request)
}

/// Make `file` the one queue of the tap interface that `request` names.
fn attach(file: &File, mut request: libc::ifreq) -> io::Result<()> {
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
    match unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Set IFF_UP unless it is set. Any socket serves to ask for it.
fn bring_up(mut request: libc::ifreq) -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: SIOCGIFFLAGS reads and writes one ifreq, which outlives the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: SIOCGIFFLAGS has filled this member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let up = libc::IFF_UP as libc::c_short;
    if flags & up != 0 {
        return Ok(());
    }
    request.ifr_ifru.ifru_flags = flags | up;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which outlives the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// One frame out of guest memory into `file`; the answer is the bytes taken.
fn write_pieces(file: &File, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    if slices.len() > MAX_PIECES {
        return Err(ErrorKind::InvalidInput.into());
    }
    let mut pieces = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_PIECES];
    for (piece, slice) in pieces.iter_mut().zip(slices) {
        *piece = libc::iovec { iov_base: slice.ptr_guard().as_ptr().cast_mut().cast(), iov_len: slice.len() };
    }
    // SAFETY: every piece is a VolatileSlice, which is readable memory for as long as `slices` is borrowed;
    // that the guest may write it meanwhile is as harmless to the kernel as any shared mapping.
    let written = unsafe { libc::writev(file.as_raw_fd(), pieces.as_ptr(), slices.len() as libc::c_int) };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}

fn explain_open(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            "/dev/net/tun is not there; `sudo modprobe tun` brings it".into()
        }
        Some(libc::EACCES | libc::EPERM) => {
            "/dev/net/tun may not be opened by this user; run as root or `sudo chmod 0666 /dev/net/tun`"
                .into()
        }
        _ => format!("/dev/net/tun can't be opened: {error}"),
    }
}

fn explain_attach(ifname: &str, error: &io::Error) -> String {
    let exists = Path::new("/sys/class/net").join(ifname).exists();
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) if exists => format!(
            "the interface belongs to another user and CAP_NET_ADMIN is missing; run as root, or make it anew with \
             `sudo ip tuntap add dev {ifname} mode tap user $USER`"
        ),
        Some(libc::EPERM | libc::EACCES) => format!(
            "there is no such interface, and making one takes CAP_NET_ADMIN; run as root, or \
             `sudo ip tuntap add dev {ifname} mode tap user $USER && sudo ip link set {ifname} up`"
        ),
        Some(libc::EBUSY) => {
            "another program has the interface open; give each machine a tap of its own".into()
        }
        Some(libc::EINVAL) if exists => format!(
            "the interface is no single-queue tap; make one with `sudo ip tuntap add dev NAME mode tap` instead of \
             {ifname}"
        ),
        _ => format!("the interface can't be attached: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::tests::with_frame;
    use super::*;

    /// A tap in a network namespace of this thread's own, or the reason why there is none.
    fn private_tap() -> Result<Tap, String> {
        // SAFETY: unshare takes no pointer; it moves only this thread, which the test runner made for this test.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return Err(format!("no network namespace: {}", io::Error::last_os_error()));
        }
        if !Path::new("/dev/net/tun").exists() {
            return Err("no /dev/net/tun".into());
        }
        Ok(Tap::open("manatest0", 1500).unwrap())
    }

    fn set_address(ifname: &str, address: [u8; 4]) {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        for (request, value) in [(libc::SIOCSIFADDR, address), (libc::SIOCSIFNETMASK, [255, 255, 255, 0])] {
            let mut data = interface_request(ifname).unwrap();
            let mut bytes = [0_i8; 14];
            for (to, from) in bytes[2..].iter_mut().zip(value) {
                *to = from.cast_signed();
            }
            data.ifr_ifru.ifru_addr = libc::sockaddr { sa_family: libc::AF_INET as u16, sa_data: bytes };
            // SAFETY: both requests read one ifreq, which outlives the call.
            assert_eq!(unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut data) }, 0);
        }
    }

    /// Poll until a frame fits `wanted`.
    fn await_frame(tap: &Tap, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let end = Instant::now() + Duration::from_secs(10);
        let mut found = None;
        while found.is_none() {
            assert!(Instant::now() < end, "the frame never came");
            let mut set = libc::pollfd { fd: tap.readable().unwrap(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one pollfd, which outlives the call.
            unsafe { libc::poll(&raw mut set, 1, 100) };
            let _ = tap.poll(64, &mut |frames| {
                found = found.take().or(frames.iter().find(|f| wanted(f.bytes)).map(|f| f.bytes.to_vec()));
            });
        }
        found.unwrap()
    }

    #[test]
    fn carries_frames_both_ways() {
        let tap = match private_tap() {
            Ok(tap) => tap,
            Err(reason) => {
                eprintln!("SKIPPED: {reason}");
                return;
            }
        };
        set_address("manatest0", [192, 0, 2, 1]);
        // The host looks for 192.0.2.2: its ARP request comes out of the tap.
        let socket = UdpSocket::bind("192.0.2.1:4000").unwrap();
        socket.send_to(b"out", "192.0.2.2:9").unwrap();
        let request = await_frame(&tap, |frame| frame[12..14] == [8, 6] && frame[38..42] == [192, 0, 2, 2]);
        let host: [u8; 6] = request[6..12].try_into().unwrap();
        // Our answer goes in; the datagram that waited for it comes out.
        let us = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
        let mut reply =
            [&host[..], &us, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2], &us, &[192, 0, 2, 2], &host].concat();
        reply.extend([192, 0, 2, 1]);
        with_frame(&reply, |frame| tap.send(frame)).unwrap();
        let datagram = await_frame(&tap, |frame| frame[12..14] == [8, 0] && frame[23] == 17);
        assert_eq!((&datagram[..6], &datagram[42..45]), (&us[..], &b"out"[..]));
    }

    #[test]
    fn says_what_a_bad_name_should_be() {
        for name in ["", "a-name-of-16-bytes", "a/b", "a b"] {
            let error = Tap::open(name, 1500).err().unwrap();
            let text = format!("{error:#}");
            assert!(text.contains(&format!("--netdev tap,ifname={name}: an interface name")), "{text}");
        }
    }

    #[test]
    fn explains_what_is_missing() {
        let eperm = io::Error::from_raw_os_error(libc::EPERM);
        assert!(explain_attach("nosuch0", &eperm).contains("ip tuntap add dev nosuch0 mode tap user"));
        assert!(explain_attach("lo", &eperm).contains("belongs to another user"));
        assert!(explain_open(&io::Error::from_raw_os_error(libc::ENOENT)).contains("modprobe tun"));
    }
}
