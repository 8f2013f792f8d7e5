//! Cables with real programs at the other end: passt, QEMU and tshark. Each is left out, with the reason printed, where
//! the program is not installed or may not do what it needs.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mana_device::doors::{Clock, Port};

use super::guest::{Card, Guest, pattern};
use super::inbox::Inbox;
use super::{Accepts, Loopback, Pcap, Stream};
use crate::clock::MonotonicClock;
use crate::nested::emulator::Emulator;

macro_rules! skip {
    ($($reason:tt)+) => {{
        eprintln!("SKIPPED: {}", format_args!($($reason)+));
        return;
    }};
}

fn clock() -> Arc<dyn Clock> {
    Arc::new(MonotonicClock::new())
}

fn installed(program: &str) -> bool {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    found.is_ok_and(|status| status.success())
}

/// A program that is gone when the test is.
struct Program(Child);

impl Program {
    fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An echo service on this machine's loopback interface; its port.
fn echo_service() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut bytes = vec![0; 64 << 10];
        while let Ok(count @ 1..) = stream.read(&mut bytes) {
            stream.write_all(&bytes[..count]).unwrap();
        }
    });
    port
}

/// Connect as soon as `program` listens.
fn client_of(program: &mut Program, socket: &Path) -> Stream {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        match Stream::open("n0", socket, false, 1500, &clock()) {
            Ok(stream) => return stream,
            Err(error) if Instant::now() > end => panic!("{error:#}"),
            Err(_) => assert!(program.0.try_wait().unwrap().is_none(), "it ended"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn ip(arguments: &str) -> bool {
    Command::new("ip")
        .args(arguments.split(' '))
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

#[test]
fn a_guest_reaches_this_machine_through_passt() {
    if !installed("passt") {
        skip!("passt is not installed (Debian's package passt)");
    }
    // It takes over the addresses of an interface with a default route.
    // SAFETY: unshare takes no pointer; it moves only this thread and those that it starts.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        skip!("no network namespace: {}", std::io::Error::last_os_error());
    }
    let set_up = [
        "link set lo up",
        "tuntap add dev outside mode tap",
        "addr add 192.0.2.10/24 dev outside",
        "link set outside up",
        "route add default via 192.0.2.1 dev outside",
    ];
    if let Some(failed) = set_up.iter().find(|step| !ip(step)) {
        skip!("`ip {failed}` fails");
    }
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("passt");
    let mut passt = Command::new("passt");
    passt.stderr(Stdio::null()).args(["--foreground", "--runas", "0", "--socket"]).arg(&socket);
    let mut passt = Program::start(&mut passt);
    let stream = client_of(&mut passt, &socket);
    let (guest, gateway) = (Ipv4Addr::new(192, 0, 2, 10), Ipv4Addr::new(192, 0, 2, 1));
    let mut guest = Guest::new(&stream, Card::default(), &[(guest.into(), 24)]);
    let bytes = pattern(300_000);
    assert!(
        guest.echo(gateway.into(), echo_service(), &bytes) == bytes,
        "what came back is not what was sent"
    );
}

/// QEMU as a program that joins its user-mode network to a stream socket, in either role.
fn qemu(emulator: &Emulator, socket: &Path, server: &str) -> Program {
    let stream = format!("stream,id=s,server={server},addr.type=unix,addr.path={}", socket.display());
    let mut command = Command::new(&emulator.program);
    command.args([
        "-M",
        "none",
        "-nodefaults",
        "-display",
        "none",
        "-netdev",
        "user,id=u",
        "-netdev",
        &stream,
    ]);
    command.args(["-netdev", "hubport,id=a,hubid=0,netdev=u", "-netdev", "hubport,id=b,hubid=0,netdev=s"]);
    Program::start(&mut command)
}

#[test]
fn a_guest_reaches_this_machine_through_qemu() {
    let emulator = match Emulator::find() {
        Ok(emulator) => emulator,
        Err(reason) => skip!("{reason}"),
    };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qemu");
    for server in [false, true] {
        let (stream, _qemu) = if server {
            let stream = Stream::open("n0", &socket, true, 1500, &clock()).unwrap();
            (stream, qemu(&emulator, &socket, "off"))
        } else {
            let mut qemu = qemu(&emulator, &socket, "on");
            (client_of(&mut qemu, &socket), qemu)
        };
        let (guest, host) = (IpAddr::from([10, 0, 2, 15]), IpAddr::from([10, 0, 2, 2]));
        let mut guest = Guest::new(&stream, Card::default(), &[(guest, 24)]);
        let bytes = pattern(300_000);
        assert!(guest.echo(host, echo_service(), &bytes) == bytes, "server={server}: not what was sent");
    }
}

/// How many packets of `file` tshark finds that fit `filter`, with all checksums checked.
fn count(file: &Path, filter: &str) -> usize {
    let checks = ["ip.check_checksum", "tcp.check_checksum", "udp.check_checksum"];
    let options = checks.iter().flat_map(|check| ["-o".to_owned(), format!("{check}:TRUE")]);
    let output =
        Command::new("tshark").arg("-r").arg(file).args(options).args(["-Y", filter]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).lines().count()
}

#[test]
fn captures_of_unfinished_frames_have_no_wrong_checksum() {
    if !installed("tshark") {
        skip!("tshark is not installed (Debian's package tshark)");
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    let (a, b) = (Arc::new(Inbox::new()), Arc::new(Inbox::new()));
    a.limit(1500);
    b.limit(1500);
    let near = Arc::new(Loopback::new(a.clone(), b.clone()));
    let near = Pcap::create("n0", file.path(), near, clock()).unwrap();
    let far = Loopback::new(b, a);
    let accepts = Accepts { checksum: true, tcp4: true, tcp6: true };
    let card = Card { sends_unfinished: true, accepts };
    let (ours, theirs) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
    let mut client = Guest::new(&near, card, &[(ours, 24)]);
    let mut server = Guest::new(&far, card, &[(theirs, 24)]);
    let (to, from) = (client.connect(theirs, 7), server.listen(7));
    let (bytes, mut sent, mut back) = (pattern(500_000), 0, 0);
    while back < bytes.len() {
        client.step();
        server.step();
        if sent < bytes.len() && client.tcp(to).can_send() {
            sent += client.tcp(to).send_slice(&bytes[sent..]).unwrap();
        }
        let mut part = [0; 32_768];
        if server.tcp(from).can_recv() && server.tcp(from).can_send() {
            let room = server.tcp(from).send_capacity() - server.tcp(from).send_queue();
            let count = server.tcp(from).recv_slice(&mut part[..room.min(32_768)]).unwrap();
            server.tcp(from).send_slice(&part[..count]).unwrap();
        }
        if client.tcp(to).can_recv() {
            back += client.tcp(to).recv_slice(&mut part).unwrap();
        }
    }
    near.flush();
    assert!(client.longest().0 > 1514 && client.longest().1 > 1514, "{:?}", client.longest());
    let (good, all) = (count(file.path(), "tcp.checksum.status == 1"), count(file.path(), "tcp"));
    assert_eq!(good, all, "every TCP checksum is good");
    assert!(all > 2 * 500_000 / 1460, "{all} packets");
    let bad = "ip.checksum.status == 0 || _ws.malformed || frame.len > 1514 || tcp.analysis.ack_lost_segment";
    assert_eq!(count(file.path(), bad), 0);
}
