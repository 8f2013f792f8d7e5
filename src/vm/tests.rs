use std::{env, fs};

use clap::Parser;

use super::*;
use crate::cli::{Cli, Command};
use crate::config::{Accel, Topology};
use crate::testing::Random;

/// Set where the test has a process of its own.
const ALONE: &str = "MANA_TEST_ALONE";

/// Other tests in this process have traces and threads of theirs, so that it runs once more, by itself.
#[test]
fn the_traces_thread_leaves_signals_to_the_event_loop() {
    if env::var_os(ALONE).is_none() {
        let name = "vm::tests::the_traces_thread_leaves_signals_to_the_event_loop";
        let mut command = std::process::Command::new(env::current_exe().unwrap());
        let output = command.args(["--exact", name]).env(ALONE, "1").output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    let trace = tempfile::NamedTempFile::new().unwrap();
    let _outside = Outside::open(&config(trace.path())).unwrap();
    // The first thread is the test harness's, which began before.
    let harness = std::process::id().to_string();
    let threads = fs::read_dir("/proc/self/task").unwrap().map(|thread| thread.unwrap());
    let ours: Vec<_> = threads.filter(|thread| *thread.file_name() != *harness).collect();
    assert_eq!(ours.len(), 2, "this one, and the trace's");
    for thread in ours {
        let status = fs::read_to_string(thread.path().join("status")).unwrap();
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:\t")).unwrap();
        let blocked = u64::from_str_radix(blocked, 16).unwrap();
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            assert!(blocked & 1 << (signal - 1) != 0, "signal {signal} is not in {blocked:#x}");
        }
    }
}

fn config(trace: &Path) -> VmConfig {
    VmConfig {
        kernel: PathBuf::new(),
        initrd: None,
        modules: None,
        driver: None,
        append: String::new(),
        exec: None,
        topology: Topology { cpus: 1, threads: 1, cores: 1, sockets: 1, nodes: 1 },
        memory: 1 << 29,
        accel: Accel::Kvm,
        netdevs: Vec::new(),
        nics: Vec::new(),
        virtio_nics: Vec::new(),
        disks: Vec::new(),
        trace: Some(trace.to_owned()),
        control: None,
        restore: None,
        lies: None,
        console: None,
        timeout: None,
        boot_timeout: None,
        seccomp: seccomp::Mode::Off,
    }
}

/// Of a machine with devices that were never switched on, many bytes of the state are changed, where it is checked by
/// nothing but the machine that it is given to.
#[test]
fn a_state_changed_at_random_is_refused_or_taken_up() {
    if Kvm::new().is_err() {
        eprintln!("no /dev/kvm: not tested");
        return;
    }
    let trace = tempfile::NamedTempFile::new().unwrap();
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let config = VmConfig { memory: 64 << 20, ..with_devices(trace.path(), disk.path()) };
    let outside = Outside::open(&config).unwrap();
    let machine = Machine::assemble(&config, &outside, memory::allocate(config.memory).unwrap()).unwrap();
    let cpus = machine.vcpus.iter().map(|vcpu| vcpu.save(&machine.msrs).unwrap()).collect();
    let state = machine.state(&config, cpus).unwrap();
    machine.nics.into_iter().for_each(|nic| nic.finish().unwrap());
    let sound = postcard::to_stdvec(&state).unwrap();
    let registers = postcard::to_stdvec(&(&state.options, &state.cpus)).unwrap().len();

    let mut random = Random::default();
    let (mut taken, mut refused) = (0, 0);
    for case in 0..300 {
        let bytes = random.damaged(&sound, registers, case % 4);
        let ram = memory::allocate(config.memory).unwrap();
        let outcome =
            postcard::from_bytes::<MachineState>(&bytes).map_err(anyhow::Error::from).and_then(|state| {
                state.options.check()?;
                let machine = Machine::assemble(&config, &outside, ram)?;
                machine.take_up(&state)?;
                // It is one, and can be told what it is.
                let again = machine.state(&config, state.cpus)?;
                machine.nics.into_iter().try_for_each(Nic::finish)?;
                Ok(again)
            });
        match outcome {
            Ok(_) => taken += 1,
            Err(error) => {
                assert_ne!(case % 4, 0, "nothing was changed: {error:#}");
                refused += 1;
            }
        }
    }
    eprintln!(
        "{taken} taken, {refused} refused; {} bytes, {registers} of options and registers",
        sound.len()
    );
    assert!(taken > 75 && refused > 20, "{taken} taken, {refused} refused");
}

/// As the command line makes it, with a device of each kind.
fn with_devices(trace: &Path, disk: &Path) -> VmConfig {
    let disk = format!("{},readonly=on", disk.display());
    let words = ["mana-vmm", "boot", "--kernel", "Cargo.toml", "--device", "mana", "--device", "virtio-net"];
    let Command::Boot(arguments) = Cli::parse_from(words.into_iter().chain(["--disk", &disk])).command else {
        panic!("not to boot")
    };
    let VmConfig { nics, netdevs, virtio_nics, disks, .. } = arguments.into_config().unwrap();
    VmConfig { nics, netdevs, virtio_nics, disks, ..config(trace) }
}
