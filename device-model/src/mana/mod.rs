//! MANA commands: Ethernet on top of GDMA.

pub mod stats;
pub mod vport;
pub mod wq;

use crate::command::{Context, Message};
use crate::status::CommandError;
use crate::table::Device;

/// The command is addressed to the Ethernet device.
///
/// # Errors
/// It is not.
fn for_mana<T>(message: &Message<'_, T>) -> Result<(), CommandError> {
    match message.device()? {
        Device::Mana => Ok(()),
        other => Err(CommandError::not_found(format!("{other:?} has no Ethernet commands"))),
    }
}

/// The command is addressed to the Ethernet device, and the driver has registered it.
///
/// # Errors
/// It is not, or has not.
fn for_registered_mana<T>(context: &Context<'_>, message: &Message<'_, T>) -> Result<(), CommandError> {
    for_mana(message)?;
    match context.objects.devices.contains_key(&Device::Mana) {
        true => Ok(()),
        false => Err(CommandError::wrong_state("the Ethernet device is not registered")),
    }
}
