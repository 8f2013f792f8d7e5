//! A small VMM with an emulated MANA NIC.

pub mod accel;
pub mod acpi;
pub mod cli;
pub mod clock;
pub mod config;
pub mod cpio;
pub mod initramfs;
pub mod keyval;
pub mod layout;
pub mod net;
pub mod pci_host;
pub mod topology;
pub mod trace;
pub mod vm;
pub mod workers;
