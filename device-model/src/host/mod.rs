//! The simulated host behind the card: what it does wrong on command.
//!
//! A fault says where it strikes (a command, an event, a completion, ...), which of those it means, and what happens to
//! them. `Plan` keeps all faults; the places where a fault can strike ask it, and with no fault set that costs them
//! one load. What strikes depends on the faults and on what the driver does, never on time or chance, so that the same
//! words give the same run.
//!
//! A [`Profile`] says what kind of host it is, and [`Hostility`] makes it lie.
//!
//! [`words`] is the language in which faults are written.

mod answer;
mod fault;
mod hostile;
mod later;
mod plan;
mod profile;
mod random;
mod strike;
pub mod words;

pub use answer::{Answer, Value};
pub(crate) use fault::{Action, Edit, Place, Point};
pub use hostile::{Chance, Hostility, Where};
pub(crate) use later::{HELD, Later};
pub(crate) use plan::{Hit, Plan};
pub use profile::{
    Adapter, Channel, Commands, Devices, FirstIds, MaxResources, Port, Profile, Registers, Registration,
    Version,
};
pub(crate) use random::Random;
pub(crate) use strike::{CqeStrikes, Fate, strike_event, strike_interrupt, strike_register, strike_smc};
pub(crate) use words::{LENGTH, Words, locate};
