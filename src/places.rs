//! Where the scripts of `resources/` leave what they fetch.

use std::path::PathBuf;

/// The folder `name` of fetched things: the environment's `variable`; else beside the running program, or in a folder
/// above it (so in its target folder); else in `target`.
pub fn fetched(variable: &str, name: &str) -> PathBuf {
    if let Some(folder) = std::env::var_os(variable) {
        return folder.into();
    }
    let program = std::env::current_exe().unwrap_or_default();
    let near_program =
        program.ancestors().skip(1).map(|folder| folder.join(name)).find(|folder| folder.is_dir());
    near_program.unwrap_or_else(|| PathBuf::from("target").join(name))
}

/// Fetched guests, a folder for each series (`resources/fetch-guests`).
pub fn guests() -> PathBuf {
    fetched("MANA_GUESTS", "guests")
}

/// The fetched emulator (`resources/fetch-emulator`).
pub fn emulator() -> PathBuf {
    fetched("MANA_EMULATOR", "emulator")
}
