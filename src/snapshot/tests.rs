use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::config::Topology;

const RAM: u64 = 64 << 20;

/// A machine with one CPU that never was, and no devices.
fn machine() -> MachineState {
    let pci = postcard::from_bytes(&[0, 0]).unwrap();
    let legacy = [vec![0; 9], vec![0], vec![0; 6], vec![0; 2], vec![0; 3]].concat();
    let options = Options {
        topology: Topology { cpus: 1, threads: 1, cores: 1, sockets: 1, nodes: 1 },
        memory: RAM,
        exec: None,
        nics: Vec::new(),
        netdevs: Vec::new(),
        virtio_nics: Vec::new(),
        disks: Vec::new(),
    };
    MachineState {
        options,
        cpus: vec![zero()],
        chips: zero(),
        legacy: postcard::from_bytes(&legacy).unwrap(),
        pci,
        cards: Vec::new(),
        virtio: Vec::new(),
    }
}

/// What a form of nothing but zeros means: lengths of 0, numbers of 0.
fn zero<T: for<'a> Deserialize<'a>>() -> T {
    postcard::from_bytes(&[0; 64]).unwrap()
}

fn saved(ram: &GuestMemoryMmap) -> File {
    let file = tempfile::tempfile().unwrap();
    Snapshot::write(&file, &machine(), ram).unwrap();
    file
}

fn ram() -> GuestMemoryMmap {
    memory::allocate(RAM).unwrap()
}

fn refusal(file: File) -> String {
    format!("{:#}", Snapshot::read(file).err().expect("it is refused"))
}

#[test]
fn memory_comes_back_and_the_file_stays_as_it_is() {
    let before = ram();
    before.write_slice(b"first", GuestAddress(0)).unwrap();
    before.write_slice(b"across", GuestAddress((1 << 20) - 3)).unwrap();
    before.write_slice(b"last", GuestAddress(RAM - 4)).unwrap();
    let file = saved(&before);
    let text = |ram: &GuestMemoryMmap, at: u64, len: usize| {
        let mut bytes = vec![0; len];
        ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        String::from_utf8(bytes).unwrap()
    };
    for _ in 0..2 {
        let snapshot = Snapshot::read(file.try_clone().unwrap()).unwrap();
        let ram = snapshot.ram().unwrap();
        assert_eq!(text(&ram, 0, 5), "first");
        assert_eq!(text(&ram, (1 << 20) - 3, 6), "across");
        assert_eq!(text(&ram, RAM - 4, 4), "last");
        assert_eq!(text(&ram, 4096, 2), "\0\0");
        ram.write_slice(b"other", GuestAddress(0)).unwrap();
    }
}

#[test]
fn only_pages_with_something_in_them_take_room() {
    use std::os::unix::fs::MetadataExt;
    let ram = ram();
    (0..10).for_each(|n| ram.write_obj(1_u8, GuestAddress(n << 21)).unwrap());
    let data = saved(&ram).metadata().unwrap();
    assert!(data.len() > RAM && data.blocks() * 512 < 1 << 20, "{} blocks", data.blocks());
}

#[test]
fn what_is_cut_off_or_changed_is_refused() {
    let whole = saved(&ram());
    let length = HEADER + postcard::to_stdvec(&machine()).unwrap().len() as u64;
    let copy = |change: &dyn Fn(&File)| {
        let file = tempfile::tempfile().unwrap();
        let mut bytes = vec![0; length as usize];
        whole.read_exact_at(&mut bytes, 0).unwrap();
        file.set_len(whole.metadata().unwrap().len()).unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        change(&file);
        file
    };
    assert!(Snapshot::read(copy(&|_| {})).is_ok());
    for end in [0, 7, 63, 64, length - 1, 4096, 4096 + RAM - 1] {
        let refused = refusal(copy(&|file| file.set_len(end).unwrap()));
        assert!(refused.contains("no saved machine") || refused.contains("cut short"), "{end}: {refused}");
    }
    for at in 0..length {
        for bit in [0, 3, 7] {
            let flip = |file: &File| {
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
            };
            refusal(copy(&flip));
        }
    }
    let newer = refusal(copy(&|file| file.write_all_at(&[3], 8).unwrap()));
    assert!(newer.contains("layout 3") && newer.contains("only 2"), "{newer}");
    assert!(refusal(tempfile::tempfile().unwrap()).contains("no saved machine"));
}

#[test]
fn options_that_no_command_line_gives_are_refused() {
    let refused = |change: &dyn Fn(&mut Options)| {
        let mut options = machine().options;
        change(&mut options);
        options.check().expect_err("it is refused");
    };
    assert!(machine().options.check().is_ok());
    refused(&|options| options.topology.cpus = 2);
    refused(&|options| options.topology.nodes = 0);
    refused(&|options| (options.topology.sockets, options.topology.cores) = (1 << 16, 1 << 16));
    refused(&|options| options.memory += 4096);
    refused(&|options| options.memory = u64::MAX);
}
