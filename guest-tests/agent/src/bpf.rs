//! XDP programs: written by hand, loaded by bpf(2), attached by rtnetlink (IFLA_XDP).
//!
//! They look at UDP datagrams over IPv4 to one port and let everything else pass, so that other traffic goes on.

use std::ffi::CStr;
use std::io::Error;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};

use crate::netlink::{self, NESTED, attribute};

/// What a program does with a datagram that it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// XDP_DROP.
    Drop,
    /// XDP_TX, addresses and ports exchanged: an echo.
    Tx,
    /// XDP_REDIRECT out of the interface with this index, to this Ethernet address.
    Redirect(u32, [u8; 6]),
}

// linux/bpf.h
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_TYPE_XDP: u32 = 6;
const XDP_DROP: i32 = 1;
const XDP_PASS: i32 = 2;
const XDP_TX: i32 = 3;
/// bpf_redirect(ifindex, flags).
const REDIRECT: i32 = 23;

// linux/bpf_common.h: class, size and mode of an instruction.
const LOAD_8: u8 = 0x71;
const LOAD_16: u8 = 0x69;
const LOAD_32: u8 = 0x61;
const STORE_16: u8 = 0x6b;
const STORE_32: u8 = 0x63;
const STORE_IMMEDIATE_16: u8 = 0x6a;
const STORE_IMMEDIATE_32: u8 = 0x62;
const MOVE: u8 = 0xbf;
const MOVE_IMMEDIATE: u8 = 0xb7;
const ADD_IMMEDIATE: u8 = 0x07;
const JUMP_IF_GREATER: u8 = 0x2d;
const JUMP_UNLESS_IMMEDIATE: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

// Byte positions in the frame: Ethernet, IPv4 without options, UDP.
const ETHER_TYPE: i16 = 12;
const IP: i16 = 14;
const IP_PROTOCOL: i16 = IP + 9;
const IP_SOURCE: i16 = IP + 12;
const IP_DESTINATION: i16 = IP + 16;
const UDP_SOURCE: i16 = IP + 20;
const UDP_DESTINATION: i16 = IP + 22;
const HEADERS: i32 = 42;

/// struct bpf_insn.
fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> u64 {
    let registers = from << 4 | to;
    u64::from(code)
        | u64::from(registers) << 8
        | u64::from(offset as u16) << 16
        | u64::from(immediate as u32) << 32
}

/// The program. Register 2 is the frame's begin.
fn assemble(action: Action, port: u16) -> Vec<u64> {
    let mut head = vec![
        // struct xdp_md: data, data_end.
        instruction(LOAD_32, 2, 1, 0, 0),
        instruction(LOAD_32, 3, 1, 4, 0),
        instruction(MOVE, 4, 2, 0, 0),
        instruction(ADD_IMMEDIATE, 4, 0, 0, HEADERS),
    ];
    let body = act(action);
    let tests = [
        (LOAD_16, ETHER_TYPE, i32::from(0x0800_u16.to_be())),
        (LOAD_8, IP, 0x45),
        (LOAD_8, IP_PROTOCOL, libc::IPPROTO_UDP),
        (LOAD_16, UDP_DESTINATION, i32::from(port.to_be())),
    ];
    // Jumps lead over the rest to the two instructions at the end, and count from the next one.
    let mut left = 2 * tests.len() + body.len();
    head.push(instruction(JUMP_IF_GREATER, 4, 3, left as i16, 0));
    for (load, position, wanted) in tests {
        left -= 2;
        head.push(instruction(load, 5, 2, position, 0));
        head.push(instruction(JUMP_UNLESS_IMMEDIATE, 5, 0, left as i16, wanted));
    }
    head.extend(body);
    head.extend(answer(XDP_PASS));
    head
}

fn answer(verdict: i32) -> [u64; 2] {
    [instruction(MOVE_IMMEDIATE, 0, 0, 0, verdict), instruction(EXIT, 0, 0, 0, 0)]
}

fn act(action: Action) -> Vec<u64> {
    match action {
        Action::Drop => answer(XDP_DROP).to_vec(),
        Action::Tx => {
            let mut program = Vec::new();
            for (load, store, first, second) in [
                (LOAD_32, STORE_32, 0, 6),
                (LOAD_16, STORE_16, 4, 10),
                (LOAD_32, STORE_32, IP_SOURCE, IP_DESTINATION),
                (LOAD_16, STORE_16, UDP_SOURCE, UDP_DESTINATION),
            ] {
                program.push(instruction(load, 4, 2, first, 0));
                program.push(instruction(load, 5, 2, second, 0));
                program.push(instruction(store, 2, 5, first, 0));
                program.push(instruction(store, 2, 4, second, 0));
            }
            program.extend(answer(XDP_TX));
            program
        }
        Action::Redirect(interface, [a, b, c, d, e, f]) => vec![
            instruction(STORE_IMMEDIATE_32, 2, 0, 0, i32::from_ne_bytes([a, b, c, d])),
            instruction(STORE_IMMEDIATE_16, 2, 0, 4, u16::from_ne_bytes([e, f]).into()),
            instruction(MOVE_IMMEDIATE, 1, 0, 0, interface as i32),
            instruction(MOVE_IMMEDIATE, 2, 0, 0, 0),
            instruction(CALL, 0, 0, 0, REDIRECT),
            instruction(EXIT, 0, 0, 0, 0),
        ],
    }
}

/// Start of union bpf_attr for BPF_PROG_LOAD.
#[repr(C)]
struct LoadRequest {
    kind: u32,
    instructions: u32,
    program: u64,
    licence: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
}

/// Loads a program; the verifier's reason is in the error.
pub fn load(action: Action, port: u16) -> Result<OwnedFd> {
    const LICENCE: &CStr = c"Dual MIT/GPL";
    let program = assemble(action, port);
    let mut log = vec![0_u8; 64 * 1024];
    let request = LoadRequest {
        kind: BPF_PROG_TYPE_XDP,
        instructions: program.len() as u32,
        program: program.as_ptr() as u64,
        licence: LICENCE.as_ptr() as u64,
        log_level: 1,
        log_size: log.len() as u32,
        log: log.as_mut_ptr() as u64,
    };
    // SAFETY: the request and all that it points to live until the call returns, and the lengths are theirs.
    let file =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const request, size_of::<LoadRequest>()) };
    if file < 0 {
        let error = Error::last_os_error();
        let text = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy().into_owned();
        return Err(error).with_context(|| format!("bpf: {}", text.trim()));
    }
    // SAFETY: the kernel has just opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(file as i32) })
}

// linux/if_link.h
const IFLA_XDP: u16 = 43;
const IFLA_XDP_FD: u16 = 1;
const IFLA_XDP_FLAGS: u16 = 3;
/// XDP_FLAGS_DRV_MODE: by the driver itself or not at all.
const BY_DRIVER: u32 = 1 << 2;

/// Attaches a program to the interface with this index, or with `None` takes away what is there.
pub fn attach(interface: u32, program: Option<&OwnedFd>) -> Result<()> {
    let file: i32 = program.map_or(-1, AsRawFd::as_raw_fd);
    let attributes =
        [attribute(IFLA_XDP_FD, &file.to_ne_bytes()), attribute(IFLA_XDP_FLAGS, &BY_DRIVER.to_ne_bytes())]
            .concat();
    netlink::set_link(interface, &attribute(IFLA_XDP | NESTED, &attributes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Follows every jump; the kernel's verifier is not there in a unit test.
    #[test]
    fn every_jump_leads_to_the_end() {
        for action in [Action::Drop, Action::Tx, Action::Redirect(3, [2, 0, 0, 0, 0, 1])] {
            let program = assemble(action, 7777);
            let pass = program.len() - 2;
            assert_eq!(program[pass..], answer(XDP_PASS));
            let jumps: Vec<usize> = program
                .iter()
                .enumerate()
                .filter(|(_, word)| [JUMP_IF_GREATER, JUMP_UNLESS_IMMEDIATE].contains(&(**word as u8)))
                .map(|(at, word)| at + 1 + usize::from((word >> 16) as u16))
                .collect();
            assert_eq!(jumps, [pass; 5]);
        }
    }

    #[test]
    fn instructions_are_laid_out_as_the_kernel_reads_them() {
        assert_eq!(
            instruction(LOAD_32, 2, 1, 4, -1).to_le_bytes(),
            [0x61, 0x12, 4, 0, 0xff, 0xff, 0xff, 0xff]
        );
    }
}
