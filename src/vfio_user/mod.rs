//! The same function behind a socket: a vfio-user server for QEMU (`-device vfio-user-pci`), Cloud Hypervisor
//! (`--user-device`) and whatever else speaks the protocol.
//!
//! The client is the VMM: it has the guest's CPUs and memory, the PCI slot and the MSI-X table. We have the rest:
//! accesses to configuration space and BARs come as messages ([`wire`]), which [`frames`] cuts out of the stream and a
//! [`session`] answers; the client's memory comes as files that we map ([`dma`]; what it takes
//! away again while we use it, [`lost`] replaces), and interrupts go out through event
//! descriptors ([`irqs`]). The [`server`] has a thread and a socket for each function, and one client at a time on it.
//!
//! Writes to BARs are posted: the client waits for no answer, and while we are busy it gathers them into one message
//! (`VFIO_USER_REGION_WRITE_MULTI`). A doorbell therefore costs the guest one message sent.
//!
//! # Why there is a server of our own
//!
//! The `vfio_user` crate (0.1.7) has one, but a client can end our whole process with a single message to it: it
//! subtracts from the message's size before it has looked at it and allocates what comes out, unwraps a string that
//! has no zero at its end, and allocates as many bytes (up to 4 GiB) as a read asks for. It takes a header that comes
//! in two pieces for a whole one, leaves the payload of a request that it refuses in the stream, so that the next
//! header is read from the middle of it, and reports most errors as number 0, which QEMU takes for success. It also
//! has no gathered writes. Its client is good: tests here use it beside hand-made messages.

pub mod connection;
pub mod dma;
pub mod exercise;
pub mod frames;
pub mod irqs;
pub mod lost;
pub mod server;
pub mod session;
pub mod wire;

#[cfg(test)]
mod tests;
