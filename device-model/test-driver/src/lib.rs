//! A driver for the MANA NIC that lives in the device's own process: the fast loop for everything the device does.
//!
//! It knows the device only by its doors ([`mana_device::ManaDevice`]) and by the interface that the Linux drivers
//! show: registers, rings and messages are written down here a second time, on purpose, so that a wrong offset in
//! the device can't hide behind the same wrong offset in its test.
//!
//! * [`World`] is the machine around the card: memory, interrupts, a clock that only moves when told, cables.
//! * [`Generation`] says, as data, how a kernel's driver behaves: order of commands, versions, vectors, sizes.
//! * [`lean`] drives rings that a [`Driver`] has made, as fast as a driver can.
//! * [`exercise`] is no driver at all: it plays bytes to the card, for fuzzing.
//! * [`Driver`] is `mana.ko`: [`Driver::probe`], [`Driver::ifup`], [`Driver::ifdown`], [`Driver::remove`].
//!
//! What the Linux driver answers with an errno comes back as an [`Error`]; what makes it WARN, oops or lose a packet
//! panics here with a sentence that says what the device did wrong.
//!
//! ```no_run
//! use mana_test_driver::{Driver, V7_3, World};
//!
//! let world = World::default();
//! let mut driver = Driver::probe(&world, &V7_3).unwrap();
//! driver.ifup(0).unwrap();
//! driver.remove().unwrap();
//! world.assert_empty_ledger();
//! ```
#![forbid(unsafe_code)]

mod datapath;
mod driver;
mod error;
pub mod exercise;
pub mod gdma;
pub mod generation;
mod hwc;
mod irq;
pub mod lean;
pub mod mana;
pub mod memory;
pub mod message;
pub mod msix;
pub mod netdev;
pub mod packet;
pub mod pci;
pub mod queues;
pub mod restore;
pub mod smc;
pub mod world;

pub use datapath::Transmit;
pub use driver::Driver;
pub use error::{Errno, Error, Result};
pub use gdma::{DeviceId, QueueType, Registration, Resources};
pub use generation::{EqScope, Generation, V6_1, V6_12, V6_17, V7_3, Vectors};
pub use mana::{DevConfig, RxSteering, VportInfo, WqObject};
pub use netdev::{Netdev, Received, RxRing, TxRing};
pub use world::World;
