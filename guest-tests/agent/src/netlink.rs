//! Netlink (linux/netlink.h, linux/genetlink.h): one request, one answer.

use std::io::{Error, Read, Write};

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Protocol, Socket, Type};

/// Bytes of struct nlmsghdr.
const HEADER: usize = 16;
/// Bytes of struct genlmsghdr.
const GENERIC_HEADER: usize = 4;
/// NLA_F_NESTED.
pub const NESTED: u16 = 1 << 15;
/// NLA_TYPE_MASK.
const KIND: u16 = (1 << 14) - 1;

const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

/// linux/rtnetlink.h.
const RTM_SETLINK: u16 = 19;

/// Sets an attribute of the interface with this index.
///
/// # Errors
/// The kernel's own.
pub fn set_link(interface: u32, attribute: &[u8]) -> Result<()> {
    // struct ifinfomsg: family, padding, type, index, flags, mask of changes.
    let mut body = vec![0; 4];
    body.extend(interface.to_ne_bytes());
    body.extend([0; 8]);
    body.extend(attribute);
    exchange(libc::NETLINK_ROUTE, RTM_SETLINK, libc::NLM_F_ACK, &body).map(drop)
}

/// A family of generic netlink.
#[derive(Clone, Copy, Debug)]
pub struct Family(u16);

impl Family {
    /// By its name, such as `ethtool`.
    pub fn find(name: &str) -> Result<Self> {
        let name_attribute = attribute(CTRL_ATTR_FAMILY_NAME, format!("{name}\0").as_bytes());
        let answer = Self(GENL_ID_CTRL).get(CTRL_CMD_GETFAMILY, &name_attribute)?;
        let number = find(&answer, CTRL_ATTR_FAMILY_ID).and_then(|value| value.first_chunk().copied());
        number
            .map(|number| Self(u16::from_ne_bytes(number)))
            .with_context(|| format!("netlink: {name} has no number"))
    }

    /// The attributes of the answer to `command`.
    pub fn get(self, command: u8, attributes: &[u8]) -> Result<Vec<u8>> {
        let answer = exchange(libc::NETLINK_GENERIC, self.0, 0, &generic(command, attributes))?;
        Ok(answer.get(GENERIC_HEADER..).unwrap_or_default().to_vec())
    }

    /// `command`, which has no answer but that it is done.
    pub fn set(self, command: u8, attributes: &[u8]) -> Result<()> {
        exchange(libc::NETLINK_GENERIC, self.0, libc::NLM_F_ACK, &generic(command, attributes)).map(drop)
    }
}

/// Command, version, padding; then the attributes.
fn generic(command: u8, attributes: &[u8]) -> Vec<u8> {
    [&[command, 1, 0, 0], attributes].concat()
}

fn exchange(protocol: libc::c_int, kind: u16, flags: libc::c_int, body: &[u8]) -> Result<Vec<u8>> {
    let flags = (libc::NLM_F_REQUEST | flags) as u16;
    // struct nlmsghdr: length, type, flags, sequence number, port.
    let mut message = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);

    let socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(Protocol::from(protocol)))?;
    (&socket).write_all(&message).context("netlink")?;
    let mut answer = vec![0; 32 * 1024];
    let length = (&socket).read(&mut answer).context("netlink")?;
    ensure!(length >= HEADER + 4, "netlink: an answer of {length} bytes");
    answer.truncate(length);
    let is_error = i32::from(u16::from_ne_bytes([answer[4], answer[5]])) == libc::NLMSG_ERROR;
    let payload = answer.split_off(HEADER);
    // struct nlmsgerr begins with a negative error number, or 0.
    let error = i32::from_ne_bytes([payload[0], payload[1], payload[2], payload[3]]);
    if is_error && error != 0 { Err(Error::from_raw_os_error(-error).into()) } else { Ok(payload) }
}

/// struct nlattr: length, type, then the value, padded.
pub fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The value of the attribute `kind`.
pub fn find(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let [a, b, c, d] = *attributes.first_chunk()?;
        let (length, found) = (usize::from(u16::from_ne_bytes([a, b])), u16::from_ne_bytes([c, d]) & KIND);
        if found == kind {
            return attributes.get(4..length);
        }
        attributes = attributes.get(length.max(4).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_laid_out_as_the_kernel_reads_them() {
        assert_eq!(attribute(1, &[9, 8, 7, 6, 5]), [9, 0, 1, 0, 9, 8, 7, 6, 5, 0, 0, 0]);
    }

    #[test]
    fn attributes_are_found_behind_others() {
        let all = [attribute(7, &[1, 2, 3]), attribute(3 | NESTED, &[4, 5]), attribute(9, &[])].concat();
        assert_eq!(find(&all, 7), Some(&[1, 2, 3][..]));
        assert_eq!(find(&all, 3), Some(&[4, 5][..]));
        assert_eq!(find(&all, 9), Some(&[][..]));
        assert_eq!(find(&all, 8), None);
        assert_eq!(find(&[0, 0, 0, 0, 1], 8), None);
    }

    #[test]
    fn the_kernel_knows_its_own_controller() {
        assert_eq!(Family::find("nlctrl").unwrap().0, GENL_ID_CTRL);
        assert!(Family::find("no such").is_err());
    }
}
