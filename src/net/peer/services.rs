//! What the peer serves: echo (RFC 862), discard (RFC 863), chargen (RFC 864), DHCP.
//!
//! smoltcp's listening socket becomes the connection, so there is one listener a port at any time, made anew as
//! soon as a connection has taken it: connections wait only when [`MAX_CONNECTIONS`] are open.

use std::net::Ipv4Addr;

use smoltcp::iface::{Interface, SocketHandle, SocketSet};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Duration;
use smoltcp::wire::{DHCP_CLIENT_PORT, DHCP_SERVER_PORT, IpAddress};

use super::dhcp;

/// Most TCP connections at once; further ones are refused.
pub const MAX_CONNECTIONS: usize = 128;
/// Bytes of each direction's buffer of a TCP connection. Untouched memory costs nothing.
const TCP_BUFFER: usize = 256 * 1024;
/// Datagrams and bytes that wait in each direction of a UDP service.
const UDP_DATAGRAMS: usize = 256;
const UDP_BUFFER: usize = 512 * 1024;
/// A connection whose guest says nothing for this long, keep-alives included, is over.
const TCP_TIMEOUT: Duration = Duration::from_secs(60);
const TCP_KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Bytes moved at a time from a connection's input to its output.
const ECHO_CHUNK: usize = 64 * 1024;
/// Longest answer to a chargen datagram (RFC 864).
const CHARGEN_DATAGRAM: usize = 512;

/// A service with a port of its own, the same in TCP and UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Service {
    Echo,
    Discard,
    Chargen,
}

impl Service {
    const ALL: [Self; 3] = [Self::Echo, Self::Discard, Self::Chargen];

    /// IANA's port number.
    fn port(self) -> u16 {
        match self {
            Self::Echo => 7,
            Self::Discard => 9,
            Self::Chargen => 19,
        }
    }
}

/// An open TCP connection.
struct Connection {
    service: Service,
    handle: SocketHandle,
    /// Bytes that chargen has sent, modulo its pattern.
    sent: usize,
}

/// All services and their sockets.
pub struct Services {
    listeners: Vec<(Service, Option<SocketHandle>)>,
    connections: Vec<Connection>,
    datagrams: Vec<(Service, SocketHandle)>,
    dhcp: (dhcp::Server, SocketHandle),
    address: Ipv4Addr,
    pattern: Vec<u8>,
    scratch: Vec<u8>,
}

impl Services {
    /// Open the services' sockets in `sockets` for a peer at `address`.
    pub fn new(sockets: &mut SocketSet<'static>, address: Ipv4Addr, mtu: u16) -> Self {
        Self {
            listeners: Service::ALL.map(|service| (service, Some(listen(sockets, service)))).into(),
            connections: Vec::new(),
            datagrams: Service::ALL.map(|service| (service, bind(sockets, service.port()))).into(),
            dhcp: (dhcp::Server::new(address, mtu), bind(sockets, DHCP_SERVER_PORT)),
            address,
            pattern: chargen_pattern(),
            scratch: vec![0; ECHO_CHUNK],
        }
    }

    /// Give every port that a connection has just taken a new listener.
    pub fn accept(&mut self, sockets: &mut SocketSet<'static>) {
        for (service, listener) in &mut self.listeners {
            if let Some(handle) = *listener
                && !sockets.get::<tcp::Socket<'_>>(handle).is_listening()
            {
                self.connections.push(Connection { service: *service, handle, sent: 0 });
                *listener = None;
            }
            if listener.is_none() && self.connections.len() < MAX_CONNECTIONS {
                *listener = Some(listen(sockets, *service));
            }
        }
    }

    /// Do for every socket what can be done now.
    pub fn serve(&mut self, interface: &Interface, sockets: &mut SocketSet<'static>) {
        let Self { connections, pattern, scratch, .. } = self;
        connections.retain_mut(|connection| {
            let socket = sockets.get_mut::<tcp::Socket<'_>>(connection.handle);
            connection.serve(socket, pattern, scratch);
            let open = socket.is_open();
            if !open {
                sockets.remove(connection.handle);
            }
            open
        });
        for &(service, handle) in &self.datagrams {
            let socket = sockets.get_mut::<udp::Socket<'_>>(handle);
            serve_datagrams(service, interface, socket, pattern, scratch);
        }
        self.serve_dhcp(sockets);
    }

    fn serve_dhcp(&mut self, sockets: &mut SocketSet<'static>) {
        let (server, handle) = &mut self.dhcp;
        let socket = sockets.get_mut::<udp::Socket<'_>>(*handle);
        while let Ok((message, _)) = socket.recv() {
            let Some(answer) = server.answer(message) else { continue };
            let to = udp::UdpMetadata {
                endpoint: (Ipv4Addr::BROADCAST, DHCP_CLIENT_PORT).into(),
                local_address: Some(self.address.into()),
                meta: Default::default(),
            };
            // A full queue loses the answer, as a wire might; the client asks again.
            let _ = socket.send_slice(&answer, to);
        }
    }
}

impl Connection {
    fn serve(&mut self, socket: &mut tcp::Socket<'_>, pattern: &[u8], scratch: &mut [u8]) {
        match self.service {
            Service::Echo => echo(socket, scratch),
            Service::Discard => discard(socket),
            Service::Chargen => {
                discard(socket);
                self.generate(socket, pattern);
            }
        }
        // The guest has said all it will, and all of it has been served.
        if !socket.may_recv() && socket.recv_queue() == 0 && socket.may_send() {
            socket.close();
        }
    }

    fn generate(&mut self, socket: &mut tcp::Socket<'_>, pattern: &[u8]) {
        // Once the guest has closed its side there is nobody to generate for.
        while socket.may_recv() && socket.can_send() {
            let Ok(taken) = socket.send_slice(&pattern[self.sent..]) else { return };
            self.sent = (self.sent + taken) % pattern.len();
        }
    }
}

fn echo(socket: &mut tcp::Socket<'_>, scratch: &mut [u8]) {
    while socket.can_recv() && socket.can_send() {
        let room = (socket.send_capacity() - socket.send_queue()).min(scratch.len());
        let Ok(length) = socket.recv_slice(&mut scratch[..room]) else { return };
        let Ok(_) = socket.send_slice(&scratch[..length]) else { return };
    }
}

fn discard(socket: &mut tcp::Socket<'_>) {
    while socket.can_recv() {
        let Ok(()) = socket.recv(|bytes| (bytes.len(), ())) else { return };
    }
}

fn serve_datagrams(
    service: Service,
    interface: &Interface,
    socket: &mut udp::Socket<'_>,
    pattern: &[u8],
    scratch: &mut [u8],
) {
    while socket.can_send()
        && let Ok((length, mut meta)) = socket.recv_slice(scratch)
    {
        // What was sent to all is answered from the peer's own address.
        meta.local_address =
            meta.local_address.filter(|&address| interface.has_ip_addr::<IpAddress>(address));
        let answer = match service {
            Service::Echo => &scratch[..length],
            Service::Discard => continue,
            Service::Chargen => &pattern[..CHARGEN_DATAGRAM],
        };
        // A full queue loses the answer, as a wire might.
        let _ = socket.send_slice(answer, meta);
    }
}

fn listen(sockets: &mut SocketSet<'static>, service: Service) -> SocketHandle {
    let buffer = || tcp::SocketBuffer::new(vec![0; TCP_BUFFER]);
    let mut socket = tcp::Socket::new(buffer(), buffer());
    socket.set_timeout(Some(TCP_TIMEOUT));
    socket.set_keep_alive(Some(TCP_KEEP_ALIVE));
    socket.set_nagle_enabled(false);
    if let Err(error) = socket.listen(service.port()) {
        log::error!("the peer can't listen on TCP port {}: {error}", service.port());
    }
    sockets.add(socket)
}

fn bind(sockets: &mut SocketSet<'static>, port: u16) -> SocketHandle {
    let buffer =
        || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; UDP_DATAGRAMS], vec![0; UDP_BUFFER]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    if let Err(error) = socket.bind(port) {
        log::error!("the peer can't bind UDP port {port}: {error}");
    }
    sockets.add(socket)
}

/// RFC 864's popular pattern: 72 of the 95 printable characters a line, one further each line, until it repeats.
fn chargen_pattern() -> Vec<u8> {
    let line = |first: u8| (0..72).map(move |column| b' ' + (first + column) % 95).chain(*b"\r\n");
    (0..95).flat_map(line).collect()
}
