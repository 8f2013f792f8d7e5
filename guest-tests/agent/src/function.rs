//! The MANA functions of this machine, as sysfs shows them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::net;

const VENDOR: &str = "0x1414";
/// PF, VF and the second PF (`mana_id_table`, gdma_main.c).
const DEVICES: [&str; 3] = ["0x00b9", "0x00ba", "0x00c1"];
const DRIVER: &str = "/sys/bus/pci/drivers/mana";

/// One PCI function.
#[derive(Clone, Debug)]
pub struct Function {
    /// `DOMAIN:BUS:DEVICE.FUNCTION`.
    pub address: String,
    /// Its folder in sysfs.
    pub path: PathBuf,
}

/// All MANA functions, by address.
pub fn all() -> Vec<Function> {
    let devices = fs::read_dir("/sys/bus/pci/devices").into_iter().flatten().flatten();
    let mut found: Vec<Function> = devices
        .map(|entry| Function {
            address: entry.file_name().to_string_lossy().into_owned(),
            path: entry.path(),
        })
        .filter(|function| {
            function.attribute("vendor") == VENDOR && DEVICES.contains(&function.attribute("device").as_str())
        })
        .collect();
    found.sort_by(|left, right| left.address.cmp(&right.address));
    found
}

/// The only function, or the one whose address is given.
pub fn choose(address: Option<&str>) -> Result<Function> {
    let mut functions = all().into_iter();
    let found = functions.find(|function| address.is_none_or(|address| address == function.address));
    found.with_context(|| format!("there is no MANA function {}", address.unwrap_or_default()))
}

impl Function {
    /// An attribute's text, empty if it can't be read.
    pub fn attribute(&self, name: &str) -> String {
        fs::read_to_string(self.path.join(name)).unwrap_or_default().trim().to_owned()
    }

    /// Writes an attribute.
    pub fn set(&self, name: &str, value: &str) -> Result<()> {
        let file = self.path.join(name);
        fs::write(&file, value).with_context(|| format!("write '{value}' to {}", file.display()))
    }

    /// Does the driver have it?
    pub fn is_bound(&self) -> bool {
        self.path.join("driver").exists()
    }

    /// Names of its network interfaces.
    pub fn interfaces(&self) -> Vec<String> {
        net::names_in(&self.path.join("net"))
    }

    /// Address, driver and interfaces.
    pub fn describe(&self) -> Value {
        json!({ "address": self.address, "bound": self.is_bound(), "interfaces": self.interfaces() })
    }

    /// Takes it from the driver.
    pub fn unbind(&self) -> Result<()> {
        self.tell_driver("unbind")?;
        if self.is_bound() { bail!("{} is still bound", self.address) } else { Ok(()) }
    }

    /// Gives it to the driver.
    pub fn bind(&self) -> Result<()> {
        self.tell_driver("bind")?;
        if self.is_bound() { Ok(()) } else { bail!("the driver did not take {}", self.address) }
    }

    fn tell_driver(&self, verb: &str) -> Result<()> {
        let file = Path::new(DRIVER).join(verb);
        fs::write(&file, &self.address).with_context(|| format!("{verb} {}", self.address))
    }
}

/// Milliseconds that `action` takes, if it works.
pub fn timed(action: impl FnOnce() -> Result<()>) -> Result<u64> {
    let start = Instant::now();
    action()?;
    Ok(Duration::as_millis(&start.elapsed()) as u64)
}
