//! Which kernel: `--kernel`, or one of the guests that `resources/fetch-guests` made.

use std::path::{Path, PathBuf};

use crate::keyval::OptionError;
use crate::places;

/// A kernel and what belongs to it.
pub(super) struct Guest {
    pub kernel: PathBuf,
    pub modules: Option<PathBuf>,
}

/// The guest of `--guest`, or the kernel of `--kernel` with its `--modules`.
pub(super) fn find(
    series: Option<&str>,
    kernel: Option<PathBuf>,
    modules: Option<PathBuf>,
) -> Result<Guest, OptionError> {
    match (series, kernel) {
        (Some(series), _) => from_folder(series, &places::guests()),
        (None, Some(kernel)) => {
            must_exist("--kernel", Some(&kernel))?;
            must_exist("--modules", modules.as_deref())?;
            Ok(Guest { kernel, modules })
        }
        (None, None) => Err(OptionError::new("--kernel", "is missing, and so is --guest")),
    }
}

/// The file or folder that an option names is there.
pub(super) fn must_exist(option: &str, path: Option<&Path>) -> Result<(), OptionError> {
    match path.map(|path| (path, path.metadata())) {
        Some((path, Err(error))) => Err(OptionError::new(option, format!("{}: {error}", path.display()))),
        _ => Ok(()),
    }
}

fn from_folder(series: &str, guests: &Path) -> Result<Guest, OptionError> {
    let folder = guests.join(series);
    let kernel = folder.join("vmlinuz");
    if !kernel.is_file() {
        let wanted = kernel.display();
        let reason = format!("{wanted} is not there; `resources/fetch-guests {series}` gets it");
        return Err(OptionError::new("--guest", reason));
    }
    let modules = only_entry(&folder.join("lib/modules"));
    if modules.is_none() {
        let reason = format!("{} must hold one folder, lib/modules/VERSION", folder.display());
        return Err(OptionError::new("--guest", reason));
    }
    Ok(Guest { kernel, modules })
}

/// The one thing in a folder, if it is one.
fn only_entry(folder: &Path) -> Option<PathBuf> {
    let mut entries = folder.read_dir().ok()?;
    let first = entries.next()?.ok()?;
    entries.next().is_none().then(|| first.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fetched_guest_has_a_kernel_and_modules() {
        let guests = tempfile::tempdir().unwrap();
        let folder = guests.path().join("6.12");
        assert!(from_folder("6.12", guests.path()).err().unwrap().to_string().contains("fetch-guests 6.12"));

        std::fs::create_dir_all(folder.join("lib/modules/6.12.1-cloud-amd64")).unwrap();
        std::fs::write(folder.join("vmlinuz"), "").unwrap();
        let guest = from_folder("6.12", guests.path()).unwrap();
        assert!(guest.kernel.ends_with("6.12/vmlinuz"));
        assert!(guest.modules.unwrap().ends_with("lib/modules/6.12.1-cloud-amd64"));
    }
}
