//! Kernel modules as files: found in `lib/modules/VERSION`, decompressed, with what they say about themselves.
//!
//! A module's `.modinfo` section names the modules it needs, so `modules.dep` (which Debian's packages leave to
//! an installation script) isn't needed to find them.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use object::{Object, ObjectSection};

/// One module, ready for the guest.
#[derive(Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name to `modprobe`, with underscores.
    pub name: String,
    /// The uncompressed ELF file.
    pub image: Vec<u8>,
    /// Names of the modules whose symbols it uses.
    pub depends: Vec<String>,
    /// Device patterns it answers to.
    pub aliases: Vec<String>,
    /// Kernel version it was built for, the first word of `vermagic`.
    pub kernel: String,
}

/// The modules of one kernel, by name.
#[derive(Debug)]
pub struct ModuleFolder {
    version: String,
    files: BTreeMap<String, PathBuf>,
    builtin: HashSet<String>,
}

impl ModuleFolder {
    /// Looks through `folder`, a `lib/modules/VERSION`.
    ///
    /// # Errors
    /// One sentence when `folder` isn't the module folder of a kernel.
    pub fn open(folder: &Path) -> Result<Self> {
        let version = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let tree = folder.join("kernel");
        if !tree.is_dir() {
            bail!(
                "{} is not a kernel's lib/modules/VERSION folder: it has no 'kernel' in it",
                folder.display()
            );
        }
        let mut files = BTreeMap::new();
        collect(&tree, &mut files).with_context(|| format!("can't read {}", tree.display()))?;
        let builtin = fs::read_to_string(folder.join("modules.builtin")).unwrap_or_default();
        let builtin = builtin.lines().filter_map(|line| module_name(Path::new(line))).collect();
        Ok(Self { version, files, builtin })
    }

    /// Puts the modules that lie in `folder` in the place of the kernel's own.
    ///
    /// # Errors
    /// One sentence when `folder` has no `mana.ko`.
    pub fn replace_from(&mut self, folder: &Path) -> Result<()> {
        let mut files = BTreeMap::new();
        collect(folder, &mut files).with_context(|| format!("--driver: can't read {}", folder.display()))?;
        if !files.contains_key("mana") {
            bail!("--driver: there is no mana.ko in {}", folder.display());
        }
        self.files.extend(files);
        Ok(())
    }

    /// The kernel's version: `uname -r`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Is `name` a module of this kernel?
    pub fn contains(&self, name: &str) -> bool {
        self.files.contains_key(name)
    }

    /// Is `name` part of the kernel image itself?
    pub fn is_builtin(&self, name: &str) -> bool {
        self.builtin.contains(name)
    }

    /// The modules `wanted` and all they need, each after what it needs.
    ///
    /// # Errors
    /// One sentence when a module is missing, unreadable or was built for another kernel.
    pub fn closure(&self, wanted: &[&str]) -> Result<Vec<Module>> {
        let mut done = Vec::new();
        for name in wanted {
            self.load_after_dependencies(name, &mut Vec::new(), &mut done)?;
        }
        Ok(done)
    }

    fn load_after_dependencies(
        &self,
        name: &str,
        path: &mut Vec<String>,
        done: &mut Vec<Module>,
    ) -> Result<()> {
        if self.is_builtin(name) || done.iter().any(|module| module.name == name) {
            return Ok(());
        }
        if path.iter().any(|above| above == name) {
            bail!("the modules {} need each other in a circle", path.join(", "));
        }
        let module = self.load(name)?;
        path.push(name.to_owned());
        for needed in &module.depends {
            self.load_after_dependencies(needed, path, done)?;
        }
        path.pop();
        done.push(module);
        Ok(())
    }

    fn load(&self, name: &str) -> Result<Module> {
        let Some(file) = self.files.get(name) else {
            bail!("kernel {} has no module '{name}'", self.version);
        };
        let module =
            parse(name, read(file)?).with_context(|| format!("{} is not a kernel module", file.display()))?;
        if module.kernel != self.version {
            bail!("{} was built for kernel {}, this one is {}", file.display(), module.kernel, self.version);
        }
        Ok(module)
    }
}

/// `mana` for `kernel/drivers/.../mana.ko.xz`; `None` for what is not a module.
fn module_name(file: &Path) -> Option<String> {
    let name = file.file_name()?.to_str()?;
    let stem = [".ko", ".ko.xz", ".ko.zst"].iter().find_map(|ending| name.strip_suffix(ending))?;
    Some(stem.replace('-', "_"))
}

fn collect(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            collect(&path, files)?;
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// The bytes of a module file, decompressed.
fn read(file: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(file).with_context(|| format!("can't read {}", file.display()))?;
    let mut image = Vec::new();
    match file.extension().and_then(|ending| ending.to_str()) {
        Some("xz") => lzma_rust2::XzReader::new(&bytes[..], true).read_to_end(&mut image).map(drop),
        Some("zst") => ruzstd::decoding::StreamingDecoder::new(&bytes[..])?.read_to_end(&mut image).map(drop),
        _ => return Ok(bytes),
    }
    .with_context(|| format!("can't decompress {}", file.display()))?;
    Ok(image)
}

/// Reads `.modinfo`: `tag=value` strings, each ended by a zero byte (`include/linux/moduleparam.h`).
fn parse(name: &str, image: Vec<u8>) -> Result<Module> {
    let info = {
        let elf = object::File::parse(&image[..])?;
        let section = elf.section_by_name(".modinfo").context("it has no .modinfo section")?;
        String::from_utf8_lossy(section.data()?).into_owned()
    };
    let values = |tag: &'static str| {
        info.split('\0')
            .filter_map(|line| line.split_once('='))
            .filter_map(move |(key, value)| (key == tag).then_some(value))
    };
    let depends = values("depends").flat_map(|list| list.split(','));
    let depends = depends.filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect();
    let aliases = values("alias").map(str::to_owned).collect();
    let kernel = values("vermagic").next().and_then(|magic| magic.split(' ').next()).unwrap_or_default();
    let kernel = kernel.to_owned();
    Ok(Module { name: name.to_owned(), image, depends, aliases, kernel })
}

#[cfg(test)]
mod tests {
    use super::*;
    use object::write;

    /// An ELF file with a `.modinfo` section, as `modpost` makes it.
    fn module_file(depends: &str, kernel: &str) -> Vec<u8> {
        let info = format!("alias=pci:v00001414d*\0depends={depends}\0vermagic={kernel} SMP mod_unload \0");
        let mut elf = write::Object::new(
            object::BinaryFormat::Elf,
            object::Architecture::X86_64,
            object::Endianness::Little,
        );
        let section = elf.add_section(Vec::new(), b".modinfo".to_vec(), object::SectionKind::ReadOnlyData);
        elf.append_section_data(section, info.as_bytes(), 1);
        elf.write().unwrap()
    }

    fn kernel_folder(modules: &[(&str, Vec<u8>)]) -> (tempfile::TempDir, PathBuf) {
        let top = tempfile::tempdir().unwrap();
        let folder = top.path().join("6.1.0");
        let net = folder.join("kernel/drivers/net");
        fs::create_dir_all(&net).unwrap();
        fs::write(folder.join("modules.builtin"), "kernel/net/packet/af_packet.ko\n").unwrap();
        for (name, image) in modules {
            fs::write(net.join(name), image).unwrap();
        }
        (top, folder)
    }

    fn names(modules: &[Module]) -> Vec<&str> {
        modules.iter().map(|module| module.name.as_str()).collect()
    }

    #[test]
    fn puts_a_module_after_all_that_it_needs() {
        let (_top, folder) = kernel_folder(&[
            ("mana_ib.ko", module_file("mana,ib-core,af_packet", "6.1.0")),
            ("mana.ko", module_file("", "6.1.0")),
            ("ib-core.ko", module_file("mana", "6.1.0")),
        ]);
        let modules = ModuleFolder::open(&folder).unwrap();
        assert_eq!(names(&modules.closure(&["mana_ib", "mana"]).unwrap()), ["mana", "ib_core", "mana_ib"]);
    }

    #[test]
    fn reads_xz_files() {
        let plain = module_file("", "6.1.0");
        let mut writer = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::default()).unwrap();
        std::io::Write::write_all(&mut writer, &plain).unwrap();
        let (_top, folder) = kernel_folder(&[("mana.ko.xz", writer.finish().unwrap())]);
        let modules = ModuleFolder::open(&folder).unwrap();
        let mana = modules.closure(&["mana"]).unwrap().remove(0);
        assert_eq!((mana.image, mana.aliases), (plain, vec!["pci:v00001414d*".to_owned()]));
    }

    #[test]
    fn reads_zst_files() {
        let plain = module_file("", "6.1.0");
        let packed =
            ruzstd::encoding::compress_to_vec(&plain[..], ruzstd::encoding::CompressionLevel::Uncompressed);
        let (_top, folder) = kernel_folder(&[("mana.ko.zst", packed)]);
        let modules = ModuleFolder::open(&folder).unwrap();
        assert_eq!(modules.closure(&["mana"]).unwrap()[0].image, plain);
    }

    #[test]
    fn a_user_s_driver_takes_the_place_of_the_kernel_s() {
        let (_top, folder) = kernel_folder(&[("mana.ko", module_file("", "6.1.0"))]);
        let (_own, driver) = kernel_folder(&[("mana.ko", module_file("af_packet", "6.1.0"))]);
        let mut modules = ModuleFolder::open(&folder).unwrap();
        modules.replace_from(&driver).unwrap();
        assert_eq!(modules.closure(&["mana"]).unwrap()[0].depends, ["af_packet"]);
    }

    #[test]
    fn says_what_is_wrong() {
        let (_top, folder) = kernel_folder(&[
            ("mana.ko", module_file("", "6.12.0")),
            ("a.ko", module_file("b", "6.1.0")),
            ("b.ko", module_file("a", "6.1.0")),
            ("text.ko", b"text".to_vec()),
        ]);
        let modules = ModuleFolder::open(&folder).unwrap();
        let error = |name| modules.closure(&[name]).unwrap_err().to_string();
        assert!(error("mana").ends_with("was built for kernel 6.12.0, this one is 6.1.0"));
        assert_eq!(error("mana_ib"), "kernel 6.1.0 has no module 'mana_ib'");
        assert_eq!(error("a"), "the modules a, b need each other in a circle");
        assert!(error("text").ends_with("text.ko is not a kernel module"));
        let error = ModuleFolder::open(&folder.join("kernel")).unwrap_err().to_string();
        assert!(error.ends_with("it has no 'kernel' in it"), "{error}");
    }
}
