//! The guests that can be booted, and what their driver is.

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context, Result};

use crate::model::Generation;
use crate::scenario::Growth;

/// A kernel with the driver that is tested on it.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Name of its folder: `6.12`, `newest`.
    pub series: String,
    /// How its driver treats vectors.
    pub generation: Generation,
}

impl Guest {
    /// The guest `series`, with its own driver or the one in `driver`.
    ///
    /// # Errors
    /// One sentence when it has not been fetched, or the driver can't be read.
    pub fn find(series: &str, driver: Option<&Path>) -> Result<Self> {
        let file = folder().join(series).join("version");
        let version = fs::read_to_string(&file).with_context(|| {
            format!("guest {series} has not been fetched (resources/fetch-guests {series})")
        })?;
        let stock = Generation::of_kernel(version.trim())?;
        let generation = match driver {
            Some(driver) if grows(driver)? => Generation::Growing,
            _ => stock,
        };
        Ok(Self { series: series.to_owned(), generation })
    }

    /// When its driver takes vectors.
    pub fn growth(&self) -> Growth {
        if self.generation.grows() { Growth::Growing } else { Growth::Static }
    }
}

/// Where `resources/fetch-guests` puts guests: `$MANA_GUESTS`, or `guests` in the target folder.
pub fn folder() -> PathBuf {
    let binary = env::current_exe().unwrap_or_default();
    let beside_binary =
        || binary.ancestors().map(|folder| folder.join("guests")).find(|folder| folder.is_dir());
    env::var_os("MANA_GUESTS")
        .map(PathBuf::from)
        .or_else(beside_binary)
        .unwrap_or_else(|| "target/guests".into())
}

/// A driver that adds vectors imports the function that does it.
fn grows(driver: &Path) -> Result<bool> {
    const IMPORT: &[u8] = b"\0pci_msix_alloc_irq_at\0";
    let file = driver.join("mana.ko");
    let image = fs::read(&file).with_context(|| format!("--driver: can't read {}", file.display()))?;
    Ok(image.windows(IMPORT.len()).any(|window| window == IMPORT))
}
