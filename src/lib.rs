//! A small VMM with an emulated MANA NIC.

pub mod accel;
pub mod cli;
pub mod config;
pub mod cpio;
pub mod initramfs;
pub mod keyval;
pub mod layout;
pub mod topology;
pub mod vm;
