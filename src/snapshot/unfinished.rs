//! A file that appears under its name when it is whole.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A file beside the place where it is to be; removed when it is dropped unfinished.
pub struct Unfinished {
    file: File,
    here: PathBuf,
    path: PathBuf,
}

impl Unfinished {
    /// An empty file that is to be at `path`. It is its owner's alone, as it holds all that a guest knows.
    ///
    /// # Errors
    /// It can't be made.
    pub fn create(path: &Path) -> io::Result<Self> {
        let mut here = OsString::from(path);
        here.push(".part");
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&here)?;
        Ok(Self { file, here: here.into(), path: path.to_owned() })
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// It is whole; what was at its place before is gone.
    ///
    /// # Errors
    /// It can't be moved there.
    pub fn finish(self) -> io::Result<()> {
        fs::rename(&self.here, &self.path)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // After `finish` it has no such name any more.
        let _ = fs::remove_file(&self.here);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn only_a_whole_file_appears() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        fs::write(&path, "old").unwrap();
        let unfinished = Unfinished::create(&path).unwrap();
        unfinished.file().write_all(b"half").unwrap();
        drop(unfinished);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        let whole = Unfinished::create(&path).unwrap();
        whole.file().write_all(b"new").unwrap();
        whole.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
