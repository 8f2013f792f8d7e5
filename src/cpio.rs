//! An initramfs as the kernel unpacks it: one archive in the "newc" format (`init/initramfs.c`).
//!
//! Entries are owned by root. Parent folders are made as they are needed, mode 0755.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use cpio::newc::{Builder, ModeFileType, trailer};

/// Writes an archive, entry by entry. Paths are those of the guest, with or without the leading slash.
#[derive(Debug)]
pub struct Archive<W> {
    out: W,
    folders: HashSet<String>,
    inodes: u32,
}

impl<W: Write> Archive<W> {
    /// An archive that goes to `out`; [`Archive::finish`] completes it.
    pub fn new(out: W) -> Self {
        Self { out, folders: HashSet::new(), inodes: 0 }
    }

    /// A folder; one that is there already keeps its mode.
    pub fn dir(&mut self, path: &str, mode: u32) -> io::Result<()> {
        let path = relative(path);
        if path.is_empty() || self.folders.contains(path) {
            return Ok(());
        }
        self.parents(path)?;
        self.folders.insert(path.to_owned());
        let entry = self.entry(path, mode, ModeFileType::Directory).nlink(2);
        self.put(entry, &mut io::empty(), 0)
    }

    /// A file with these bytes.
    pub fn file(&mut self, path: &str, mode: u32, mut content: &[u8]) -> io::Result<()> {
        let size = content.len() as u64;
        self.stream(path, mode, &mut content, size)
    }

    /// A file with the bytes of `source`, a file of the host.
    pub fn copy(&mut self, path: &str, mode: u32, source: &Path) -> io::Result<()> {
        let mut file = File::open(source)?;
        let size = file.metadata()?.len();
        self.stream(path, mode, &mut file, size)
    }

    /// A symbolic link to `target`.
    pub fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        let path = relative(path);
        self.parents(path)?;
        let entry = self.entry(path, 0o777, ModeFileType::Symlink);
        self.put(entry, &mut target.as_bytes(), target.len() as u64)
    }

    /// A character device.
    pub fn char_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> io::Result<()> {
        let path = relative(path);
        self.parents(path)?;
        let entry = self.entry(path, mode, ModeFileType::Char).rdev_major(major).rdev_minor(minor);
        self.put(entry, &mut io::empty(), 0)
    }

    /// Writes the trailer, without which the kernel calls the archive broken.
    pub fn finish(self) -> io::Result<W> {
        trailer(self.out)
    }

    /// Exactly `size` bytes of `content`; an error if there are fewer.
    fn stream(&mut self, path: &str, mode: u32, content: &mut dyn Read, size: u64) -> io::Result<()> {
        let path = relative(path);
        self.parents(path)?;
        let entry = self.entry(path, mode, ModeFileType::Regular);
        self.put(entry, content, size)
    }

    fn parents(&mut self, path: &str) -> io::Result<()> {
        path.rsplit_once('/').map_or(Ok(()), |(parent, _)| self.dir(parent, 0o755))
    }

    fn entry(&mut self, path: &str, mode: u32, kind: ModeFileType) -> Builder {
        self.inodes += 1;
        Builder::new(path).ino(self.inodes).mode(mode).set_mode_file_type(kind)
    }

    fn put(&mut self, entry: Builder, content: &mut dyn Read, size: u64) -> io::Result<()> {
        let field = u32::try_from(size).map_err(|_| {
            io::Error::new(io::ErrorKind::FileTooLarge, "an initramfs holds no file of 4 GiB")
        })?;
        let mut writer = entry.write(&mut self.out, field);
        if io::copy(&mut content.take(size), &mut writer)? < size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        writer.finish().map(drop)
    }
}

fn relative(path: &str) -> &str {
    path.trim_matches('/')
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpio::newc::Reader;

    /// Name, mode, device numbers, content.
    type Entry = (String, u32, (u32, u32), Vec<u8>);

    fn entries(archive: &[u8]) -> Vec<Entry> {
        let mut rest = archive;
        let mut found = Vec::new();
        loop {
            let mut reader = Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                return found;
            }
            let entry = reader.entry().clone();
            let mut content = Vec::new();
            reader.read_to_end(&mut content).unwrap();
            found.push((
                entry.name().to_owned(),
                entry.mode(),
                (entry.rdev_major(), entry.rdev_minor()),
                content,
            ));
            rest = reader.finish().unwrap();
        }
    }

    #[test]
    fn holds_every_kind_of_entry() {
        let mut archive = Archive::new(Vec::new());
        archive.file("/init", 0o755, b"#!/bin/sh\n").unwrap();
        archive.dir("/proc", 0o555).unwrap();
        archive.symlink("/bin/sh", "busybox").unwrap();
        archive.char_device("/dev/console", 0o600, 5, 1).unwrap();
        let bytes = archive.finish().unwrap();
        let expected = [
            ("init", 0o100_755, (0, 0), &b"#!/bin/sh\n"[..]),
            ("proc", 0o040_555, (0, 0), b""),
            ("bin", 0o040_755, (0, 0), b""),
            ("bin/sh", 0o120_777, (0, 0), b"busybox"),
            ("dev", 0o040_755, (0, 0), b""),
            ("dev/console", 0o020_600, (5, 1), b""),
        ];
        let expected =
            expected.map(|(name, mode, device, text)| (name.to_owned(), mode, device, text.to_vec()));
        assert_eq!(entries(&bytes), expected);
    }

    #[test]
    fn aligns_names_and_contents_to_four_bytes() {
        for length in 0..9 {
            let mut archive = Archive::new(Vec::new());
            let name = "n".repeat(length + 1);
            archive.file(&name, 0o644, &vec![b'x'; length]).unwrap();
            archive.file("next", 0o644, b"").unwrap();
            let bytes = archive.finish().unwrap();
            let (header, name_size) = (110, length + 2);
            let content = (header + name_size).next_multiple_of(4);
            let next = (content + length).next_multiple_of(4);
            assert_eq!(&bytes[next..next + 6], b"070701", "content of {length} bytes");
            assert_eq!(bytes.len() % 4, 0);
        }
    }

    #[test]
    fn makes_a_folder_once() {
        let mut archive = Archive::new(Vec::new());
        archive.file("/lib/modules/a", 0o644, b"a").unwrap();
        archive.file("/lib/modules/b", 0o644, b"b").unwrap();
        archive.dir("/lib", 0o700).unwrap();
        let bytes = archive.finish().unwrap();
        let names: Vec<_> = entries(&bytes).into_iter().map(|entry| entry.0).collect();
        assert_eq!(names, ["lib", "lib/modules", "lib/modules/a", "lib/modules/b"]);
    }

    #[test]
    fn refuses_a_file_that_shrinks_while_it_is_read() {
        let mut archive = Archive::new(Vec::new());
        let error = archive.stream("/short", 0o644, &mut &b"abc"[..], 4).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
