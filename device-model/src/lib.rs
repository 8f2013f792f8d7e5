//! The MANA NIC (Microsoft Azure Network Adapter) as a device model.
#![forbid(unsafe_code)]

pub mod checksum;
pub mod config;
mod device;
pub mod doors;
pub mod observe;
pub mod packet;
pub mod steer;
pub mod wire;

pub use device::{AccessError, Bar, ConfigEffect, ConfigError, Host, ManaDevice, Ran};
