//! A small VMM with an emulated MANA NIC.

pub mod accel;
pub mod acpi;
pub mod boot;
pub mod bus;
pub mod cli;
pub mod clock;
pub mod config;
pub mod cpio;
pub mod events;
pub mod initramfs;
pub mod irq;
pub mod keyval;
pub mod layout;
pub mod legacy;
pub mod logging;
pub mod memory;
pub mod net;
pub mod nic;
pub mod pci_host;
pub mod stop;
pub mod topology;
pub mod trace;
pub mod vcpu;
pub mod vm;
pub mod workers;
