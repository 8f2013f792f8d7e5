//! A small VMM with an emulated MANA NIC.

pub mod config;
pub mod cpio;
