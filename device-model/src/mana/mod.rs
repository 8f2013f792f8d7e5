//! MANA commands: Ethernet on top of GDMA.

pub mod stats;
pub mod vport;
pub mod wq;

use crate::command::Message;
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
