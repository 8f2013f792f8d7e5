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
    /// Its kernel's version: `6.12.118+deb13-cloud-amd64`.
    pub version: String,
    /// How its driver treats vectors.
    pub generation: Generation,
    /// Where the kernel is.
    pub source: Source,
}

/// Where a kernel comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// The folder of a series, made by `resources/fetch-guests`.
    Fetched,
    /// `--kernel` and `--modules`.
    Files {
        /// The bzImage.
        kernel: PathBuf,
        /// Its `lib/modules/VERSION`.
        modules: PathBuf,
    },
}

impl Guest {
    /// The guest `series`, with its own driver or the one in `driver`.
    ///
    /// # Errors
    /// One sentence when it has not been fetched, or the driver can't be read.
    pub fn find(series: &str, driver: Option<&Path>, rules: Option<Generation>) -> Result<Self> {
        let file = folder().join(series).join("version");
        let version = fs::read_to_string(&file).with_context(|| {
            format!("guest {series} has not been fetched (resources/fetch-guests {series})")
        })?;
        Self::new(series, version.trim(), Source::Fetched, driver, rules)
    }

    /// A kernel of the user's own.
    ///
    /// # Errors
    /// One sentence when the folder of its modules has no version for a name, or the driver can't be read.
    pub fn of_files(
        kernel: &Path,
        modules: &Path,
        driver: Option<&Path>,
        rules: Option<Generation>,
    ) -> Result<Self> {
        let modules = modules.canonicalize().with_context(|| format!("--modules {}", modules.display()))?;
        let version = modules.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let source = Source::Files { kernel: kernel.to_owned(), modules };
        Self::new(&version, &version, source, driver, rules).context("--modules")
    }

    fn new(
        series: &str,
        version: &str,
        source: Source,
        driver: Option<&Path>,
        rules: Option<Generation>,
    ) -> Result<Self> {
        let stock = Generation::of_kernel(version)?;
        let own = match driver {
            Some(driver) if grows(driver)? => Generation::Growing,
            _ => stock,
        };
        let generation = rules.unwrap_or(own);
        Ok(Self { series: series.to_owned(), version: version.to_owned(), generation, source })
    }

    /// Options of `mana-vmm` that choose it.
    pub fn options(&self) -> Vec<String> {
        match &self.source {
            Source::Fetched => vec!["--guest".to_owned(), self.series.clone()],
            Source::Files { kernel, modules } => {
                let file = |path: &Path| path.display().to_string();
                vec!["--kernel".to_owned(), file(kernel), "--modules".to_owned(), file(modules)]
            }
        }
    }

    /// The kernel's image.
    pub fn image(&self) -> PathBuf {
        match &self.source {
            Source::Fetched => folder().join(&self.series).join("vmlinuz"),
            Source::Files { kernel, .. } => kernel.clone(),
        }
    }

    /// Is it `series`, by the folder's name or by the kernel's version?
    pub fn is_of(&self, series: &str) -> bool {
        let rest = self.version.strip_prefix(series);
        self.series == series
            || rest.is_some_and(|rest| !rest.starts_with(|next: char| next.is_ascii_digit()))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_known_by_its_folder_and_by_its_version() {
        let version = "7.3.4+deb13-cloud-amd64".to_owned();
        let guest = Guest {
            series: "newest".to_owned(),
            version,
            generation: Generation::GrowingUnshared,
            source: Source::Fetched,
        };
        assert!(["newest", "7.3", "7.3.4"].iter().all(|series| guest.is_of(series)));
        assert!(["7", "6.1", "7.31", "old"].iter().all(|series| !guest.is_of(series) || *series == "7"));
    }
}
