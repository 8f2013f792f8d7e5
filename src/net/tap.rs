//! A tap interface of the host: its network stack, or a bridge, at the other end of the cable.
//!
//! One frame is one `read` or `writev` on `/dev/net/tun` (Linux's Documentation/networking/tuntap.rst), with a
//! [`VnetHeader`] in front. The file is non-blocking, so a full queue on the host's side drops the guest's frame as a
//! full link would.
//!
//! To the host, checksums and segmentation that the guest has asked its card for are left to the host's kernel, which
//! makes them only where a frame leaves it.
//!
//! From the host we take unfinished frames too (TUNSETOFFLOAD: `TUN_F_CSUM`, `TUN_F_TSO4`, `TUN_F_TSO6`) whether or not
//! the taker can, and finish them here if it can't, as the MANA driver, whose card knows only whole frames on the
//! receive side. Without them the kernel would do the same work before each read, and bulk TCP would cost a system
//! call for each segment instead of one for up to 64 KiB; a checksum would be made by the kernel and checked by the
//! device, in place of made once. Not asked for: `TUN_F_TSO_ECN` and `TUN_F_USO4`/`6`, which few senders use.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, anyhow, bail};
use mana_device::doors::{Port, PortCapabilities, PortDropped, TxFrame};
use zerocopy::{FromBytes, IntoBytes};

use super::batch::{Batch, Outlet};
use super::vnet::VnetHeader;
use super::{Accepts, Cable, Deliver, FRAME_OVERHEAD, Polled};
use crate::{log_limited, volatile_io};

/// Frames read before they are handed on.
const BATCH: usize = 64;
/// Bytes read after which a batch is handed on however few frames it has, so that it stays in the cache.
const BATCH_BYTES: usize = 256 << 10;
/// Longest frame from the kernel: a super-frame's IP packet and the Ethernet header.
const MAX_SUPER_FRAME: usize = 65_535 + FRAME_OVERHEAD;
const HEADER: usize = size_of::<VnetHeader>();

/// linux/if_tun.h.
mod tun {
    pub const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
    pub const F_CSUM: libc::c_uint = 0x01;
    pub const F_TSO4: libc::c_uint = 0x02;
    pub const F_TSO6: libc::c_uint = 0x04;
}

/// `--netdev tap,ifname=NAME`.
pub struct Tap {
    file: File,
    /// Only the poller's.
    reading: Mutex<Reading>,
}

struct Reading {
    batch: Batch,
    outlet: Outlet,
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
        if let Err(error) = offer_offloads(&file) {
            log::warn!("{option}: the kernel finishes all frames itself: TUNSETOFFLOAD: {error}");
        }
        if let Err(error) = bring_up(request) {
            log::warn!(
                "{option}: the interface can't be set up ({error}); `sudo ip link set {ifname} up` does it"
            );
        }
        let mut outlet = Outlet::default();
        outlet.limit(mtu);
        Ok(Self { file, reading: Mutex::new(Reading { batch: Batch::default(), outlet }) })
    }

    fn reading(&self) -> MutexGuard<'_, Reading> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Read up to `limit` frames into `batch`; whether there may be more.
    fn read_batch(&self, batch: &mut Batch, limit: usize) -> bool {
        for _ in 0..limit {
            let room = batch.room(HEADER + MAX_SUPER_FRAME);
            let length = match (&self.file).read(room) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // EAGAIN: no more frames. EIO: the interface is down.
                Err(_) => return false,
            };
            let Ok((header, frame)) = VnetHeader::read_from_prefix(&room[..length]) else { return false };
            match header.offload(frame, frame.len()) {
                Ok((checksum, offload)) => batch.commit(HEADER..length, checksum, offload),
                Err(error) => log_limited!(Warn, "tap: {error}: {header:?}"),
            }
            if batch.cost() >= BATCH_BYTES {
                break;
            }
        }
        true
    }
}

impl Port for Tap {
    fn capabilities(&self) -> PortCapabilities {
        PortCapabilities { checksum: true, segmentation: true }
    }

    fn send(&self, frame: &TxFrame<'_>) -> Result<(), PortDropped> {
        let mut header = VnetHeader::new(&frame.offload, false);
        match volatile_io::write(&self.file, header.as_mut_bytes(), frame.slices) {
            Ok(written) if written == HEADER + frame.len => Ok(()),
            _ => Err(PortDropped),
        }
    }
}

impl Cable for Tap {
    fn readable(&self) -> Option<RawFd> {
        Some(self.file.as_raw_fd())
    }

    fn accept(&self, accepts: Accepts) {
        self.reading().outlet.accept(accepts);
    }

    fn dropped(&self) -> u64 {
        self.reading().outlet.dropped()
    }

    fn poll(&self, budget: usize, deliver: Deliver<'_>) -> Polled {
        let Reading { batch, outlet } = &mut *self.reading();
        let mut left = budget.max(1);
        while left > 0 {
            batch.clear();
            let more = self.read_batch(batch, left.min(BATCH));
            let count = batch.len();
            outlet.hand_over(batch, 0..count, deliver);
            if !more {
                return Polled::default();
            }
            left = left.saturating_sub(count.max(1));
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
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
    match unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Tell the kernel which unfinished frames we take.
fn offer_offloads(file: &File) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its flags by value.
    match unsafe {
        libc::ioctl(file.as_raw_fd(), tun::TUNSETOFFLOAD, tun::F_CSUM | tun::F_TSO4 | tun::F_TSO6)
    } {
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
    use std::io::Write;
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};
    use std::process::Command;

    use super::super::Frame;
    use super::super::guest::{Card, Guest, pattern};
    use super::*;

    const HOST: [IpAddr; 2] = [v4(1), v6(1)];
    const GUEST: [IpAddr; 2] = [v4(2), v6(2)];

    const fn v4(host: u8) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(198, 51, 100, host))
    }

    const fn v6(host: u16) -> IpAddr {
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, host))
    }

    fn ip(arguments: &str) {
        let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
        assert!(status.success(), "ip {arguments}");
    }

    /// Move this thread, which the test runner made for this test, into a network namespace of its own, with a tap
    /// whose host has addresses; or the reason why that can't be.
    fn private_tap() -> Result<Tap, String> {
        if Command::new("ip").arg("-V").output().is_err() {
            return Err("no `ip` (Debian's iproute2)".into());
        }
        if !Path::new("/dev/net/tun").exists() {
            return Err("no /dev/net/tun".into());
        }
        // SAFETY: unshare takes no pointer; it moves only this thread and those that it starts.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return Err(format!("no network namespace: {}", io::Error::last_os_error()));
        }
        let tap = Tap::open("manatest0", 1500).unwrap();
        ip("addr add 198.51.100.1/24 dev manatest0");
        ip("addr add fd00::1/64 dev manatest0 nodad");
        Ok(tap)
    }

    macro_rules! tap_or_skip {
        () => {
            match private_tap() {
                Ok(tap) => tap,
                Err(reason) => {
                    eprintln!("SKIPPED: {reason}");
                    return;
                }
            }
        };
    }

    /// An echo service of the host's kernel; its port.
    fn echo_service() -> u16 {
        let listener = TcpListener::bind("[::]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let mut bytes = vec![0; 256 << 10];
                while let Ok(count @ 1..) = stream.read(&mut bytes) {
                    if stream.write_all(&bytes[..count]).is_err() {
                        break;
                    }
                }
            }
        });
        port
    }

    fn addresses() -> [(IpAddr, u8); 2] {
        [(GUEST[0], 24), (GUEST[1], 64)]
    }

    #[test]
    fn tcp_with_the_kernel_passes_whole_in_super_frames_and_out_of_them() {
        let tap = tap_or_skip!();
        let port = echo_service();
        let bytes = pattern(2 << 20);
        let all = Accepts { checksum: true, tcp4: true, tcp6: true };
        for card in [
            Card::default(),
            Card { sends_unfinished: true, accepts: Accepts::default() },
            Card { sends_unfinished: true, accepts: all },
        ] {
            for host in HOST {
                let mut guest = Guest::new(&tap, card, &addresses());
                assert!(
                    guest.echo(host, port, &bytes) == bytes,
                    "{card:?}: what came back is not what was sent"
                );
                let (received, sent) = guest.longest();
                assert_eq!(received > 1514, card.accepts == all, "{card:?} {host}: {received}");
                assert_eq!(sent > 1514, card.sends_unfinished, "{card:?} {host}: {sent}");
            }
        }
        assert_eq!(tap.dropped(), 0);
    }

    /// A tap as a card without offloads has it: the kernel must finish every frame.
    struct Bare(File);

    impl Port for Bare {
        fn send(&self, frame: &TxFrame<'_>) -> Result<(), PortDropped> {
            let mut bytes = vec![0; frame.len];
            let mut rest = &mut bytes[..];
            for slice in frame.slices {
                let copied = slice.copy_to(rest);
                rest = &mut rest[copied..];
            }
            (&self.0).write(&bytes).map(drop).map_err(|_| PortDropped)
        }
    }

    impl Cable for Bare {
        fn poll(&self, budget: usize, deliver: Deliver<'_>) -> Polled {
            for _ in 0..budget {
                let mut bytes = [0; 2000];
                let Ok(count) = (&self.0).read(&mut bytes) else { return Polled::default() };
                deliver(&[Frame::plain(&bytes[..count], Default::default())]);
            }
            Polled { more: true, deadline: None }
        }
    }

    #[test]
    fn the_kernel_cuts_and_sums_what_it_sends_on() {
        let tap = tap_or_skip!();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .unwrap();
        let mut request = interface_request("manatest1").unwrap();
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
        assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }, 0);
        ip("addr add 203.0.113.1/24 dev manatest1");
        ip("link set manatest1 up");
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();

        let (other, card) = (Bare(file), Card { sends_unfinished: true, accepts: Accepts::default() });
        let there = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 2));
        let mut sender = Guest::new(&tap, card, &addresses());
        sender.route(Ipv4Addr::new(198, 51, 100, 1));
        let mut receiver = Guest::new(&other, Card::default(), &[(there, 24)]);
        receiver.route(Ipv4Addr::new(203, 0, 113, 1));
        let (bytes, mut sent, mut seen) = (pattern(1 << 20), 0, Vec::new());
        let (from, to) = (sender.connect(there, 7000), receiver.listen(7000));
        while seen.len() < bytes.len() {
            sender.step();
            if sender.tcp(from).can_send() && sent < bytes.len() {
                sent += sender.tcp(from).send_slice(&bytes[sent..]).unwrap();
            }
            receiver.step();
            while receiver.tcp(to).can_recv() {
                receiver.tcp(to).recv(|part| (part.len(), seen.extend_from_slice(part))).unwrap();
            }
        }
        assert!(seen == bytes, "what arrived is not what was sent");
        assert!(
            sender.longest().1 > 20_000 && receiver.longest().0 == 1514,
            "{:?} {:?}",
            sender.longest(),
            receiver.longest()
        );
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
