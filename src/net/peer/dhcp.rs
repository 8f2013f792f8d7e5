//! A small DHCP server (RFC 2131): an address for each Ethernet address, no router, no name server.

use std::net::Ipv4Addr;

use smoltcp::wire::{DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress};

/// Prefix length of the peer's IPv4 network.
pub const PREFIX_LENGTH: u8 = 24;
/// Last byte of the first address that is given out.
const FIRST_HOST: u8 = 15;
/// Addresses there are to give: .15 to .214.
const MAX_LEASES: usize = 200;
/// How long an address is the client's.
const LEASE_SECONDS: u32 = 24 * 60 * 60;
/// The interface MTU option (RFC 2132, 5.1).
const OPTION_INTERFACE_MTU: u8 = 26;

/// Who has which address.
pub struct Server {
    address: Ipv4Addr,
    mtu: u16,
    /// The client at `FIRST_HOST + index`.
    leases: Vec<EthernetAddress>,
    /// The lease that goes next when a client comes and there is no address left.
    oldest: usize,
}

impl Server {
    /// A server at `address` that tells its clients to use `mtu`.
    pub fn new(address: Ipv4Addr, mtu: u16) -> Self {
        Self { address, mtu, leases: Vec::new(), oldest: 0 }
    }

    /// The answer to a message, if there is one. It goes to port 68 of everyone.
    pub fn answer(&mut self, message: &[u8]) -> Option<Vec<u8>> {
        let packet = DhcpPacket::new_checked(message).ok()?;
        let request = DhcpRepr::parse(&packet).ok()?;
        let for_another = request.server_identifier.is_some_and(|server| server != self.address);
        if for_another || !request.relay_agent_ip.is_unspecified() {
            return None;
        }
        match request.message_type {
            DhcpMessageType::Discover => {
                let address = self.lease(request.client_hardware_address);
                self.reply(&request, DhcpMessageType::Offer, Some(address))
            }
            DhcpMessageType::Request => {
                let address = self.lease(request.client_hardware_address);
                if request.requested_ip.unwrap_or(request.client_ip) == address {
                    self.reply(&request, DhcpMessageType::Ack, Some(address))
                } else {
                    self.reply(&request, DhcpMessageType::Nak, None)
                }
            }
            DhcpMessageType::Inform => self.reply(&request, DhcpMessageType::Ack, None),
            // A lease that was given back stays its client's, so that it gets the same address again.
            _ => None,
        }
    }

    /// The address of `client`, from now on if it had none.
    fn lease(&mut self, client: EthernetAddress) -> Ipv4Addr {
        let index = match self.leases.iter().position(|&owner| owner == client) {
            Some(index) => index,
            None if self.leases.len() < MAX_LEASES => {
                self.leases.push(client);
                self.leases.len() - 1
            }
            None => {
                let index = self.oldest;
                self.oldest = (index + 1) % MAX_LEASES;
                self.leases[index] = client;
                index
            }
        };
        let [a, b, c, _] = self.address.octets();
        Ipv4Addr::new(a, b, c, FIRST_HOST + index as u8)
    }

    fn reply(
        &self,
        request: &DhcpRepr<'_>,
        message_type: DhcpMessageType,
        address: Option<Ipv4Addr>,
    ) -> Option<Vec<u8>> {
        let mtu = self.mtu.to_be_bytes();
        let options = [DhcpOption { kind: OPTION_INTERFACE_MTU, data: &mtu }];
        let granted = message_type != DhcpMessageType::Nak;
        let reply = DhcpRepr {
            message_type,
            your_ip: address.unwrap_or(Ipv4Addr::UNSPECIFIED),
            server_ip: Ipv4Addr::UNSPECIFIED,
            server_identifier: Some(self.address),
            subnet_mask: granted.then_some(Ipv4Addr::from(u32::MAX << (32 - PREFIX_LENGTH))),
            lease_duration: address.map(|_| LEASE_SECONDS),
            additional_options: if granted { &options } else { &[] },
            requested_ip: None,
            parameter_request_list: None,
            max_size: None,
            client_identifier: None,
            dns_servers: None,
            router: None,
            renew_duration: None,
            rebind_duration: None,
            ..request.clone()
        };
        let mut message = vec![0; reply.buffer_len()];
        reply.emit(&mut DhcpPacket::new_unchecked(&mut message)).ok()?;
        Some(message)
    }
}
