//! The probe against drivers made of a few lines of C. Whoever compiles Rust has the C compiler: it links.

use std::ffi::{CStr, CString};
use std::process::Command;
use std::time::{Duration, Instant};

use super::*;

/// Two GPUs, the second with a name as long as the buffer. `INIT` is what `cuInit` does, `MEMORY` the name of its function.
const DRIVER: &str = r#"
#include <stddef.h>
#include <string.h>
#include <unistd.h>
int cuInit(unsigned flags) { (void)flags; INIT; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 40 + ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
    if (device == 40) strncpy(name, "Fake One", length); else memset(name, 'x', length);
    return 0;
}
int MEMORY(size_t *bytes, int device) { *bytes = (size_t)(device - 39) * (80ull << 30); return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) {
    (void)device;
    *value = which == 16 ? 132 : which == 75 ? 9 : which == 76 ? 0 : -1;
    return 0;
}
"#;

fn driver(folder: &tempfile::TempDir, init: &str, memory: &str) -> &'static CStr {
    let (source, library) = (folder.path().join("driver.c"), folder.path().join("libfake.so"));
    std::fs::write(&source, DRIVER).unwrap();
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .arg(&library)
        .args([format!("-DINIT={init}"), format!("-DMEMORY={memory}")])
        .arg(&source)
        .output()
        .expect("cc, which links Rust too");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    // A library is never closed, so that its name may live as long.
    Box::leak(CString::new(library.to_str().unwrap()).unwrap().into_boxed_c_str())
}

const PATIENT: Duration = Duration::from_secs(30);

#[test]
fn devices_are_told_as_the_driver_does() {
    let folder = tempfile::tempdir().unwrap();
    let found = devices_of(driver(&folder, "(void)0", "cuDeviceTotalMem_v2"), PATIENT);
    let device = |name: String, memory_bytes| CudaDevice { name, memory_bytes, multiprocessors: 132, capability: (9, 0) };
    assert_eq!(found, [device("Fake One".into(), 80 << 30), device("x".repeat(127), 160 << 30)]);
}

#[test]
fn a_driver_that_refuses_or_is_of_another_age_has_no_devices() {
    let folder = tempfile::tempdir().unwrap();
    let refusing = driver(&folder, "return 100", "cuDeviceTotalMem_v2");
    assert_eq!(ask_driver(refusing), Err("cuInit answers 100".into()));
    assert_eq!(devices_of(refusing, PATIENT), []);
    let folder = tempfile::tempdir().unwrap();
    let old = driver(&folder, "(void)0", "cuDeviceTotalMem");
    assert!(ask_driver(old).unwrap_err().contains("cuDeviceTotalMem_v2"));
}

#[test]
fn a_driver_that_hangs_holds_nobody_up() {
    let folder = tempfile::tempdir().unwrap();
    let hanging = driver(&folder, "sleep(600)", "cuDeviceTotalMem_v2");
    let began = Instant::now();
    assert_eq!(devices_of(hanging, Duration::from_millis(200)), []);
    assert!(began.elapsed() < PATIENT);
}

#[test]
fn without_a_driver_there_are_no_devices() {
    assert_eq!(devices_of(c"libforge-no-such-driver.so.1", PATIENT), []);
    // And the machine's own, if it has one, answers.
    for device in cuda_devices() {
        println!("{device:?}");
        assert!(device.memory_bytes > 0 && device.multiprocessors > 0 && !device.name.is_empty());
    }
}
