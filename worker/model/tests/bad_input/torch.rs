//! PyTorch files: cut at every byte, with lying directories and pickles, and with pickles that would run code.

use std::path::PathBuf;

use forge_model::{ModelError, torch};

use super::common::build::Random;

const MIB: usize = 1 << 20;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/torch/files").join(name)
}

fn read(name: &str) -> Vec<u8> {
    std::fs::read(fixture(name)).unwrap()
}

fn refused(bytes: &[u8]) -> String {
    torch::parse(bytes, |_| true).unwrap_err().to_string()
}

/// A zip archive of stored entries without 64-bit fields.
fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, contents) in entries {
        let sizes = [&(contents.len() as u32).to_le_bytes()[..]; 2].concat();
        directory.extend(b"PK\x01\x02\x14\0\x14\0\0\0\0\0\0\0\0\0\0\0\0\0");
        directory.extend(&sizes);
        directory.extend((name.len() as u16).to_le_bytes());
        directory.extend([0; 12]);
        directory.extend((out.len() as u32).to_le_bytes());
        directory.extend(name.as_bytes());
        out.extend(b"PK\x03\x04\x14\0\0\0\0\0\0\0\0\0\0\0\0\0");
        out.extend(&sizes);
        out.extend((name.len() as u16).to_le_bytes());
        out.extend([0; 2]);
        out.extend(name.as_bytes());
        out.extend(*contents);
    }
    let (start, count) = (out.len() as u32, (entries.len() as u16).to_le_bytes());
    out.extend(&directory);
    out.extend(b"PK\x05\x06\0\0\0\0");
    out.extend([count, count].concat());
    out.extend((directory.len() as u32).to_le_bytes());
    out.extend(start.to_le_bytes());
    out.extend([0; 2]);
    out
}

fn with_pickle(pickle: &[u8]) -> Vec<u8> {
    archive(&[("m/data.pkl", pickle), ("m/data/0", &[0; 16])])
}

/// Opcodes of a tensor in storage "0" of four floats.
fn tensor(count: u8, offset: u8, shape: &[u8], strides: &[u8]) -> Vec<u8> {
    let list = |numbers: &[u8]| [b"(", &numbers.iter().flat_map(|&number| [b'K', number]).collect::<Vec<u8>>()[..], b"t"].concat();
    let storage = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK";
    [storage, &[count][..], b"tQK", &[offset], &list(shape), &list(strides), b"\x89}tR"].concat()
}

/// A dictionary of one tensor.
fn pickle_of(tensor: &[u8]) -> Vec<u8> {
    [b"\x80\x02}X\x01\0\0\0w", tensor, b"s."].concat()
}

#[test]
fn the_archives_made_here_are_good_ones() {
    let bytes = with_pickle(&pickle_of(&tensor(4, 0, &[2, 2], &[2, 1])));
    let tensors = torch::parse(&bytes, |_| true).unwrap();
    assert_eq!((tensors["w"].shape.clone(), bytes[tensors["w"].bytes.clone()].len()), (vec![2, 2], 16));
    let part = with_pickle(&pickle_of(&tensor(4, 1, &[3, 1], &[1, 9])));
    assert_eq!(torch::parse(&part, |_| true).unwrap()["w"].bytes.len(), 12);
}

#[test]
fn every_prefix_is_refused_and_every_changed_byte_gives_a_directory_or_an_error() {
    let whole = with_pickle(&pickle_of(&tensor(4, 0, &[2, 2], &[2, 1])));
    for bytes in [whole, read("types-2.bin"), read("types-4.bin"), read("shared.bin")] {
        for length in 0..bytes.len() {
            assert!(torch::parse(&bytes[..length], |_| true).is_err(), "{length} of {}", bytes.len());
        }
        for at in 0..bytes.len() {
            for value in [0, 0xff, bytes[at] ^ 1, bytes[at] ^ 0x80, b'.', b'R'] {
                let mut changed = bytes.clone();
                changed[at] = value;
                if let Ok(tensors) = torch::parse(&changed, |_| true) {
                    assert!(tensors.values().all(|tensor| tensor.bytes.end <= changed.len()), "byte {at} as {value}");
                }
            }
        }
    }
}

#[test]
fn a_pickle_that_names_code_is_refused_with_the_name() {
    let error = torch::parse(&read("evil.bin"), |_| true).unwrap_err();
    assert!(matches!(&error, ModelError::ForeignCode { name, .. } if name == "posix.system"), "{error}");
    assert!(error.to_string().contains("would run code"), "{error}");
    for (module, name) in [
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch._utils", "_import_dotted_name"),
        ("torch", "_utils._rebuild_tensor_v2"),
        ("collections", "OrderedDict.fromkeys"),
        ("numpy.core.multiarray", "_reconstruct"),
    ] {
        let named = format!("{module}.{name}");
        for opcodes in [
            format!("\x00\x02c{module}\n{name}\n)R.").into_bytes(),
            [
                b"\x00\x04X",
                &(module.len() as u32).to_le_bytes()[..],
                module.as_bytes(),
                b"X",
                &(name.len() as u32).to_le_bytes(),
                name.as_bytes(),
                b"\x93)R.",
            ]
            .concat(),
        ] {
            let pickle = [&[0x80], &opcodes[1..]].concat();
            match torch::parse(&with_pickle(&pickle), |_| true) {
                Err(ModelError::ForeignCode { name, .. }) => assert_eq!(name, named),
                other => panic!("{named}: {other:?}"),
            }
        }
    }
    // Also where nothing would be called, and where the tensor is not wanted.
    let named = with_pickle(b"\x80\x02}X\x01\0\0\0xcos\nsystem\ns.");
    assert!(matches!(torch::parse(&named, |_| false), Err(ModelError::ForeignCode { .. })));
    let long = format!("\x00\x02c{}\nx\n.", "m".repeat(MIB)).into_bytes();
    assert!(refused(&with_pickle(&[&[0x80], &long[1..]].concat())).len() < 500);
}

#[test]
fn opcodes_that_call_classes_or_belong_to_other_protocols_are_named() {
    for (pickle, expected) in [
        (&b"\x80\x02(ios\nsystem\n."[..], "INST"),
        (b"\x80\x02(o.", "OBJ"),
        (b"\x80\x04\x92.", "NEWOBJ_EX"),
        (b"\x80\x02\x82\x01.", "EXT"),
        (b"\x80\x04\x8f.", "of sets"),
        (b"\x80\x05\x96.", "protocol 5's buffers"),
        (b"(dp0\n.", "protocol 0 or 1"),
        (b"\x80\x01}.", "protocol 1"),
        (b"\x80\x09}.", "protocol 9"),
        (b"\x80\x02]b.", "the stack is empty"),
        (b"\x80\x02]]b.", "gives a state to what is no dictionary"),
        (b"\x80\x02K\x01)R.", "calls what is no function"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", "called with arguments that it cannot have"),
        (b"\x80\x02ccollections\nOrderedDict\n]R.", "calls without a tuple"),
        (b"\x80\x02X\x05\0\0\0otherQ.", "something else than a storage"),
        (b"\x80\x02h\x05.", "nothing was remembered as 5"),
        (b"\x80\x02}(K\x01u.", "a key has no value"),
        (b"\x80\x02u.", "there is no mark"),
        (b"\x80\x020.", "the stack is empty"),
        (b"\x80\x02(0.", "the stack is empty"),
        (b"\x80\x02K\x01.", "no dictionary of tensors"),
        (b"\x80\x02}}.", "ends before its own end"),
        (b"\x80\x02}.}", "ends before its own end"),
        (b"\x80\x02}.", "holds no tensors"),
        (b"\x80\x02}K\x01K\x02s.", "a key of its dictionary is no text"),
        (b"\x80\x02X\x02\0\0\0\xff\xfe.", "not UTF-8"),
        (b"\x80\x02cno line ends here", "a name has no end"),
        (b"", "are needed, 0 are left"),
    ] {
        let text = refused(&with_pickle(pickle));
        assert!(text.contains(expected), "{}: {text}", String::from_utf8_lossy(pickle));
    }
}

#[test]
fn lengths_that_lie_and_bombs_take_neither_memory_nor_time() {
    let before = peak_bytes();
    let lie = |opcode: &[u8]| [b"\x80\x04", opcode, b"rest."].concat();
    for opcode in [
        &b"X\xff\xff\xff\xff"[..],
        b"X\xff\xff\xff\x7f",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x8e\0\0\0\0\0\x01\0\0",
        b"B\xff\xff\xff\xff",
        b"T\xff\xff\xff\xff",
        b"\x8b\xff\xff\xff\x7f",
        b"\x8b\xff\xff\xff\xff",
        b"\x8a\xff",
        b"\x95\xff\xff\xff\xff\xff\xff\xff\xff",
    ] {
        assert!(torch::parse(&with_pickle(&lie(opcode)), |_| true).is_err());
    }
    let repeated = |prefix: &[u8], piece: &[u8], count: usize, end: &[u8]| [b"\x80\x04", prefix, &piece.repeat(count), end].concat();
    for (bomb, expected) in [
        // Tuples in tuples, lists in lists: a hundred thousand deep and more.
        (repeated(b")", b"\x85", MIB, b"."), "no dictionary"),
        (repeated(b"]", b"]a", MIB / 4, b"."), "no dictionary"),
        (repeated(b"", b"]", MIB, b"."), "ends before its own end"),
        (repeated(b"", b"(", MIB, b"}."), "ends before its own end"),
        // Every tuple holds the one before twice: 2^n leaves to whoever walks it.
        (repeated(b")", b"2\x86", MIB / 2, b"."), "no dictionary"),
        // A list within itself, through the memo.
        (repeated(b"]\x94", b"h\0a", MIB / 4, b"."), "no dictionary"),
        (repeated(b"N", b"\x94", MIB, b"."), "no dictionary"),
        (repeated(b"N\x94", b"h\0", 3 * MIB, b"."), "ends before its own end"),
        (repeated(b"", b"2", MIB, b"."), "the stack is empty"),
        (repeated(b"N", b"2", 5 * MIB, b"."), "it makes more than"),
        (repeated(b"Nr\xff\xff\xff\xff", b"j\xff\xff\xff\xff0", MIB / 4, b"."), "no dictionary"),
        (repeated(b"N", b"N0", 9 * MIB, b"."), "16777216"),
    ] {
        let start = std::time::Instant::now();
        let text = refused(&with_pickle(&bomb));
        assert!(text.contains(expected), "{expected}: {text}");
        assert!(start.elapsed().as_secs() < 20, "{expected}: {:?}", start.elapsed());
    }
    // Other tests run beside this one; a lie that was believed would take gigabytes.
    assert!(peak_bytes() - before < 1024 * MIB, "{} MiB", (peak_bytes() - before) / MIB);
}

/// The most memory this process has had, where the system tells.
fn peak_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<usize>().ok()).map_or(0, |kib| kib << 10)
}

#[test]
fn tensors_that_do_not_lie_in_their_storage_are_named() {
    for (tensor, expected) in [
        (tensor(4, 1, &[2, 2], &[2, 1]), "more than its storage"),
        (tensor(4, 255, &[1], &[1]), "more than its storage"),
        (tensor(4, 0, &[5], &[1]), "more than its storage"),
        (tensor(3, 0, &[3], &[1]), "should have 3 values of 4 bytes and has 16 bytes"),
        (tensor(200, 0, &[3], &[1]), "should have 200 values"),
        (tensor(4, 0, &[2, 2], &[1, 2]), "strides [1, 2]"),
        (tensor(4, 0, &[4], &[0]), "strides [0]"),
        (tensor(4, 0, &[2, 2], &[1]), "called with arguments"),
        (tensor(4, 0, &[0, 2], &[2, 1]), "empty or too large"),
        (tensor(4, 0, &[1; 9], &[1; 9]), "called with arguments"),
    ] {
        let text = refused(&with_pickle(&pickle_of(&tensor)));
        assert!(text.contains(expected), "{expected}: {text}");
    }
    let good = tensor(4, 0, &[4], &[1]);
    let text = refused(&archive(&[("m/data.pkl", &pickle_of(&good))]));
    assert!(text.contains("tensor \"w\" is in storage \"0\", which the archive lacks"), "{text}");
    let twice = [b"\x80\x02}(X\x01\0\0\0w", &good[..], b"X\x01\0\0\0w", &good, b"u."].concat();
    assert!(refused(&with_pickle(&twice)).contains("tensor \"w\" is there twice"));
    // Sizes whose product overflows.
    let max = [&[0x8a, 8][..], &(i64::MAX).to_le_bytes()].concat();
    let sizes = [b"(", &max[..], &max, b"t"].concat();
    let wide = pickle_of(&good);
    let at = wide.windows(4).position(|window| window == b"(K\x04t").unwrap();
    let wide = [&wide[..at], &sizes, &[b"(", &max[..], b"K\x01t"].concat(), &wide[at + 8..]].concat();
    assert!(refused(&with_pickle(&wide)).contains("empty or too large"), "{}", refused(&with_pickle(&wide)));
}

#[test]
fn lying_archives_are_refused_with_the_entry() {
    let good = with_pickle(&pickle_of(&tensor(4, 0, &[4], &[1])));
    let find = |signature: &[u8], nth: usize| good.windows(4).enumerate().filter(|(_, window)| *window == signature).nth(nth).unwrap().0;
    let (entry, header, end) = (find(b"PK\x01\x02", 1), find(b"PK\x03\x04", 1), find(b"PK\x05\x06", 0));
    let changed = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        refused(&file)
    };
    for (at, bytes, expected) in [
        (entry + 8, &[1, 0][..], "\"m/data/0\" of the PyTorch file is encrypted"),
        (entry + 10, &[8, 0], "has another header than the directory says"),
        (entry + 20, &[17, 0, 0, 0], "in 17 bytes instead of 16"),
        (entry + 24, &[0xff, 0xff, 0xff, 0x7f], "instead of 2147483647"),
        (entry + 20, &[0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff, 0x7f], "has 2147483647 bytes from byte"),
        (entry + 20, &[0xff; 8], "has no 64-bit sizes"),
        (entry + 28, &[0xff, 0xff], "cut off"),
        (entry + 42, &[0xff, 0xff, 0xff, 0x7f], "has no header at byte 2147483647"),
        (entry + 42, &[0, 0, 0, 0], "has another header than the directory says"),
        (entry + 46, b"n", "has another header than the directory says"),
        (entry, b"PK\x01\x03", "no entry of the archive's directory"),
        (header, b"PK\x03\x05", "has another header"),
        (header + 8, &[8, 0], "has another header"),
        (header + 28, &[0xff, 0xff], "more than the file"),
        (end + 8, &[0xff, 0x7f, 0xff, 0x7f], "32767 entries"),
        (end + 8, &[3, 0], "several volumes"),
        (end + 4, &[1, 0], "several volumes"),
        (end + 12, &[0xff, 0xff, 0xff, 0x7f], "is not in the file"),
        (end + 16, &[0xff, 0xff, 0xff, 0x7f], "is not in the file"),
        (end + 20, &[1, 0], "has no end"),
        (end, b"PK\x05\x07", "has no end"),
    ] {
        let text = changed(at, bytes);
        assert!(text.contains(expected), "{expected}: {text}");
    }
    let pickle = pickle_of(&tensor(4, 0, &[4], &[1]));
    let twice = archive(&[("m/data.pkl", &pickle), ("m/data.pkl", &pickle)]);
    assert!(refused(&twice).contains("\"m/data.pkl\" twice"));
    // The second entry's header within the first one's contents.
    let inner = archive(&[("m/data/1", &[0; 8])]);
    let outer = archive(&[("m/data.pkl", &pickle), ("m/data/0", &inner[..46]), ("m/data/1", &[0; 8])]);
    let place = 30 + "m/data.pkl".len() + pickle.len() + 30 + "m/data/0".len();
    let last = outer.windows(4).enumerate().filter(|(_, window)| *window == b"PK\x01\x02").nth(2).unwrap().0;
    let mut overlapping = outer.clone();
    overlapping[last + 42..last + 46].copy_from_slice(&(place as u32).to_le_bytes());
    assert!(refused(&overlapping).contains("overlap"), "{}", refused(&overlapping));
    let two = archive(&[("a/data.pkl", &pickle), ("b/data.pkl", &pickle)]);
    assert!(refused(&two).contains("more than one data.pkl"));
    assert!(refused(&archive(&[("word/document.xml", b"<xml/>")])).contains("without data.pkl"));
    let big = archive(&[("m/data.pkl", &pickle), ("m/byteorder", b"big"), ("m/data/0", &[0; 16])]);
    assert!(refused(&big).contains("big-endian"));
}

#[test]
fn other_files_of_torch_are_refused_with_the_way_out() {
    for (name, expected) in [
        ("compressed.bin", "compressed (method 8)"),
        ("transposed.bin", "tensor t of shape [4, 3] with strides [1, 4]"),
        ("training.bin", "a dictionary in \"model\""),
        ("number.bin", "\"step\", which is no tensor"),
        ("script.pt", "TorchScript"),
    ] {
        let text = refused(&read(name));
        assert!(text.contains(expected), "{name}: {text}");
    }
    for (name, expected) in [("legacy.bin", "before torch 1.6"), ("evil.pkl", "Python pickle")] {
        let text = forge_model::Model::open(fixture(name), forge_model::LoadMode::Mmap).unwrap_err().to_string();
        assert!(text.contains(expected), "{name}: {text}");
    }
}

/// Random opcodes behind a good beginning: whatever they do, they end.
#[test]
fn random_pickles_end_in_an_error_or_a_directory() {
    let mut random = Random::new(20_261_121);
    let opcodes = b"(0123)]}aehjqrstubcQRNKMJXGBCTU.\x80\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x93\x94\x95\x81";
    for _ in 0..20_000 {
        let length = 1 + random.below(60);
        let mut pickle = vec![0x80, 2];
        for _ in 0..length {
            pickle.push(if random.below(3) == 0 { random.below(6) as u8 } else { opcodes[random.below(opcodes.len())] });
        }
        pickle.push(b'.');
        drop(torch::parse(&with_pickle(&pickle), |_| true));
    }
}
