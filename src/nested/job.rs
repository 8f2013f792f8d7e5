//! What level 1 is to run, and the initramfs that takes it there.
//!
//! A file that a job reads has in level 1 the path it has here, below [`INPUTS`], so that messages about it make sense
//! to the user. A file that it writes is a FIFO there, whose bytes are sent to the file here as they come.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use object::Endianness;
use object::read::elf::{ElfFile64, ProgramHeader};
use serde::{Deserialize, Serialize};

use crate::config::{Accel, DiskConfig, Netdev, NetdevKind, VmConfig};
use crate::cpio::Archive;
use crate::initramfs;
use crate::initramfs::modules::Module;

/// Folder of level 1 that holds the files of level 0.
pub const INPUTS: &str = "/level0";
/// Folder of level 1 that holds the FIFOs.
pub const OUTPUTS: &str = "/out";
/// The list of modules and jobs: [`Orders`] as JSON.
pub const ORDERS: &str = "/etc/mana-level1.json";

/// What a job does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Task {
    /// Find out whether KVM runs guests there.
    Probe,
    /// Boot a guest.
    Boot(Box<VmConfig>),
    /// Run a program.
    Command {
        /// The program's path and its arguments.
        argv: Vec<String>,
        /// Bytes of memory that it is to find.
        memory: u64,
    },
}

/// One thing to run in level 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// What to do, with the paths of level 1.
    pub task: Task,
    /// FIFOs to make first; their bytes are the streams from [`super::link::FIRST_FILE`] on.
    pub outputs: Vec<PathBuf>,
    /// Does a terminal stand behind the standard input?
    pub terminal: bool,
    /// Value of `MANA_LOG`.
    pub log: Option<String>,
    /// Where it takes requests to the simulated host.
    pub control: Option<PathBuf>,
}

/// All that level 1 has to know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Orders {
    /// Modules to load first, in order.
    pub modules: Vec<PathBuf>,
    /// The jobs, in the order of their indices.
    pub jobs: Vec<Job>,
}

/// A job, with what it needs from here and leaves here.
#[derive(Debug)]
pub struct Parcel {
    /// The job, for level 1.
    pub job: Job,
    /// Files of this machine that go along, and their paths there.
    inputs: Vec<(PathBuf, PathBuf)>,
    /// Files that go along and exist only there.
    made: Vec<(String, Vec<u8>)>,
    /// Disks of this machine that the job's machine has, in the order of their names there, and whether they are only
    /// read.
    pub disks: Vec<DiskConfig>,
    /// Files of this machine for the job's outputs, in the order of [`Job::outputs`], each with the option it is of.
    pub files: Vec<(&'static str, PathBuf)>,
    /// Where this machine takes requests for the job's simulated host.
    pub control: Option<PathBuf>,
    /// Files for the job's standard output and standard error, if they are not this process's.
    pub own_output: Option<[PathBuf; 2]>,
}

impl Parcel {
    /// Does level 1 run guests at all?
    pub fn probe() -> Self {
        let job = Job { task: Task::Probe, outputs: Vec::new(), terminal: false, log: None, control: None };
        let (inputs, made, disks, files) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { job, inputs, made, disks, files, control: None, own_output: None }
    }

    /// The boot of `config`, as job number `index` of a level 1.
    ///
    /// # Errors
    /// One sentence when a file is missing or the configuration can't be had in a nested run.
    pub fn boot(index: usize, mut config: VmConfig, terminal: bool) -> Result<Self> {
        config.netdevs.iter().try_for_each(can_be_had)?;
        let mut parcel = Self::probe();
        match &config.initrd {
            // A saved machine has all that in its memory.
            _ if config.restore.is_some() => {}
            Some(initrd) => config.initrd = Some(parcel.take(initrd)?),
            None => {
                let path = format!("/made/{index}/initramfs");
                parcel.made.push((path.clone(), initramfs::build(&config)?));
                config.initrd = Some(path.into());
            }
        }
        match &mut config.restore {
            Some(file) => {
                // As a disk, of which level 1 reads what its guest uses.
                let file = std::mem::replace(file, format!("/dev/vd{}", letter(config.disks.len())).into());
                parcel.disks.push(DiskConfig { path: file, read_only: true });
            }
            None => config.kernel = parcel.take(&config.kernel)?,
        }
        (config.modules, config.driver) = (None, None);
        config.accel = Accel::Kvm;
        let folder = Path::new(OUTPUTS).join(index.to_string());
        let netdevs = config.netdevs.iter_mut();
        let pcaps = netdevs.map(|netdev| ("--pcap", format!("pcap-{}", netdev.id), &mut netdev.pcap));
        let named = [
            ("--trace", "trace".to_owned(), &mut config.trace),
            ("--console", "console".to_owned(), &mut config.console),
        ];
        for (option, name, file) in named.into_iter().chain(pcaps) {
            if let Some(here) = file.take() {
                let there = folder.join(name);
                parcel.files.push((option, here));
                parcel.job.outputs.push(there.clone());
                *file = Some(there);
            }
        }
        if config.control.is_some() {
            parcel.control = config.control.replace(folder.join("control"));
            parcel.job.control.clone_from(&config.control);
        }
        for (index, disk) in config.disks.iter_mut().enumerate() {
            parcel.disks.insert(index, disk.clone());
            disk.path = format!("/dev/vd{}", letter(index)).into();
        }
        parcel.job.task = Task::Boot(Box::new(config));
        parcel.job.terminal = terminal;
        parcel.job.log = std::env::var("MANA_LOG").ok();
        Ok(parcel)
    }

    /// Notes that `file` goes along; its path there.
    fn take(&mut self, file: &Path) -> Result<PathBuf> {
        let here = file.canonicalize().with_context(|| format!("can't find {}", file.display()))?;
        let there = Path::new(INPUTS).join(here.strip_prefix("/").unwrap_or(&here));
        self.inputs.push((here, there.clone()));
        Ok(there)
    }

    /// A program with its arguments, and the files and folders that go along: there they have the paths they have
    /// here.
    ///
    /// # Errors
    /// One sentence when a file is missing.
    pub fn command(argv: Vec<String>, memory: u64, take: &[PathBuf]) -> Result<Self> {
        let mut parcel = Self::probe();
        for path in take {
            let path = std::path::absolute(path)?;
            parcel.take_tree(&path).with_context(|| format!("can't take {} along", path.display()))?;
        }
        parcel.job.task = Task::Command { argv, memory };
        parcel.job.log = std::env::var("MANA_LOG").ok();
        Ok(parcel)
    }

    fn take_tree(&mut self, path: &Path) -> io::Result<()> {
        if path.symlink_metadata()?.is_dir() {
            for entry in std::fs::read_dir(path)? {
                self.take_tree(&entry?.path())?;
            }
        } else {
            self.inputs.push((path.to_owned(), path.to_owned()));
        }
        Ok(())
    }
}

/// By which level 1 calls the disk with number `index`.
fn letter(index: usize) -> char {
    ('a'..='z').nth(index).unwrap_or('z')
}

/// Level 1 has none of this machine's interfaces and sockets.
fn can_be_had(netdev: &Netdev) -> Result<()> {
    let (kind, what) = match netdev.kind {
        NetdevKind::Tap { .. } => ("tap", "interfaces"),
        NetdevKind::Stream { .. } => ("stream", "sockets"),
        NetdevKind::Switch { path: Some(_), .. } => ("switch", "sockets"),
        NetdevKind::Peer | NetdevKind::Loopback { .. } | NetdevKind::Switch { .. } | NetdevKind::Null => {
            return Ok(());
        }
    };
    let instead = if kind == "switch" { "a switch without path=" } else { "--netdev peer" };
    bail!(
        "--netdev {kind},id={}: a nested run can't reach this machine's {what}; use {instead} there",
        netdev.id
    )
}

/// Writes the initramfs of a level 1 that has these modules and runs these jobs.
///
/// # Errors
/// One sentence when a file can't be read.
pub fn pack(out: File, modules: &[Module], parcels: &[Parcel]) -> Result<()> {
    let mut archive = Archive::new(BufWriter::new(out));
    let program = std::env::current_exe().context("can't tell where mana-vmm itself lies")?;
    archive.file("/init", 0o755, &loaded_part(&std::fs::read(&program)?)?)?;
    archive.char_device("/dev/console", 0o600, 5, 1)?;
    for folder in ["/proc", "/sys", "/tmp", OUTPUTS] {
        archive.dir(folder, 0o755)?;
    }
    let mut orders = Orders { modules: Vec::new(), jobs: Vec::new() };
    for module in modules {
        let path = format!("/modules/{}.ko", module.name);
        archive.file(&path, 0o644, &module.image)?;
        orders.modules.push(path.into());
    }
    let mut packed = HashSet::new();
    for parcel in parcels {
        for (here, there) in &parcel.inputs {
            if packed.insert(there) {
                add(&mut archive, here, there).with_context(|| format!("can't read {}", here.display()))?;
            }
        }
        for (path, content) in &parcel.made {
            archive.file(path, 0o644, content)?;
        }
        orders.jobs.push(parcel.job.clone());
    }
    archive.file(ORDERS, 0o644, &serde_json::to_vec(&orders)?)?;
    archive.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
    Ok(())
}

/// Adds a file, or a symbolic link as what it is.
fn add(archive: &mut Archive<impl Write>, here: &Path, there: &Path) -> Result<()> {
    const UTF8: &str = "a nested run needs file names in UTF-8";
    let there = there.to_str().context(UTF8)?;
    let metadata = here.symlink_metadata()?;
    if metadata.is_symlink() {
        archive.symlink(there, std::fs::read_link(here)?.to_str().context(UTF8)?)?;
    } else {
        archive.copy(there, metadata.mode() & 0o777, here)?;
    }
    Ok(())
}

/// The program without what only debuggers read: half of it or more, and every byte is copied under emulation.
fn loaded_part(program: &[u8]) -> Result<Vec<u8>> {
    let elf = ElfFile64::<Endianness>::parse(program).context("mana-vmm itself is no ELF file")?;
    let endian = elf.endian();
    let headers = elf.elf_program_headers().iter();
    if headers.clone().any(|header| header.p_type(endian) == object::elf::PT_INTERP) {
        bail!(
            "this mana-vmm needs libraries, which level 1 has not: build it in its own source folder, which links it statically"
        );
    }
    let ends = headers.filter(|header| header.p_type(endian) == object::elf::PT_LOAD);
    let end = ends.map(|header| header.p_offset(endian) + header.p_filesz(endian)).max().unwrap_or_default();
    let loaded = usize::try_from(end).ok().and_then(|end| program.get(..end));
    Ok(loaded.context("mana-vmm itself is cut short")?.to_vec())
}
