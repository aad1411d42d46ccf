//! NVIDIA GPUs, through the driver's own library where the machine has one. Nothing of CUDA is linked.
//!
//! Invariant: a machine without a driver, with a broken or a hanging one has no GPUs; it never fails and never waits
//! longer than [`TIMEOUT`].

use std::ffi::CStr;
use std::sync::mpsc;
use std::time::Duration;

/// A driver that has not answered by then has none to offer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The driver's library, by the name its version 2 and later have.
const LIBRARY: &CStr = c"libcuda.so.1";
/// More than any machine has.
const DEVICES_MAX: i32 = 64;

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaDevice {
    /// The maker's name.
    pub name: String,
    /// All of its memory.
    pub memory_bytes: u64,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Compute capability.
    pub capability: (u32, u32),
}

/// The machine's GPUs in the driver's order.
pub fn cuda_devices() -> Vec<CudaDevice> {
    // Without the driver's files there is nothing to ask, and most machines end here.
    if !std::path::Path::new("/proc/driver/nvidia").exists() && !std::path::Path::new("/dev/nvidiactl").exists() {
        return Vec::new();
    }
    devices_of(LIBRARY, TIMEOUT)
}

/// What a driver's library tells within this time.
fn devices_of(library: &'static CStr, timeout: Duration) -> Vec<CudaDevice> {
    let (sender, found) = mpsc::channel();
    let ask = std::thread::Builder::new().name("forge-gpu-probe".into()).spawn(move || {
        // Too late is the same as never.
        let _ = sender.send(ask_driver(library));
    });
    match ask.map(|_| found.recv_timeout(timeout)) {
        Ok(Ok(Ok(devices))) => devices,
        Ok(Ok(Err(reason))) => {
            tracing::warn!(reason, "the GPU driver does not tell its devices");
            Vec::new()
        }
        Ok(Err(_)) | Err(_) => {
            tracing::warn!("the GPU driver does not answer");
            Vec::new()
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn ask_driver(_library: &CStr) -> Result<Vec<CudaDevice>, String> {
    Ok(Vec::new())
}

#[cfg(target_os = "linux")]
fn ask_driver(library_name: &CStr) -> Result<Vec<CudaDevice>, String> {
    use std::ffi::{c_char, c_int, c_uint, c_void};

    type Init = unsafe extern "C" fn(c_uint) -> c_int;
    type Count = unsafe extern "C" fn(*mut c_int) -> c_int;
    type Get = unsafe extern "C" fn(*mut c_int, c_int) -> c_int;
    type Name = unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int;
    type Memory = unsafe extern "C" fn(*mut usize, c_int) -> c_int;
    type Attribute = unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int;

    const MULTIPROCESSORS: c_int = 16;
    const CAPABILITY_MAJOR: c_int = 75;
    const CAPABILITY_MINOR: c_int = 76;

    // SAFETY: the name is a C string; the library's constructors are the driver's own. It is never closed: the driver
    // keeps threads of its own.
    let library = unsafe { libc::dlopen(library_name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        return Err(format!("{library_name:?} cannot be loaded"));
    }
    let symbol = |name: &CStr| -> Result<*mut c_void, String> {
        // SAFETY: the library is open and the name is a C string.
        let found = unsafe { libc::dlsym(library, name.as_ptr()) };
        if found.is_null() { Err(format!("{library_name:?} has no {name:?}")) } else { Ok(found) }
    };
    // SAFETY: the CUDA driver API has had these signatures since version 3.2 (`_v2` where it says so).
    let (init, count, get, name, memory, attribute) = unsafe {
        (
            std::mem::transmute::<*mut c_void, Init>(symbol(c"cuInit")?),
            std::mem::transmute::<*mut c_void, Count>(symbol(c"cuDeviceGetCount")?),
            std::mem::transmute::<*mut c_void, Get>(symbol(c"cuDeviceGet")?),
            std::mem::transmute::<*mut c_void, Name>(symbol(c"cuDeviceGetName")?),
            std::mem::transmute::<*mut c_void, Memory>(symbol(c"cuDeviceTotalMem_v2")?),
            std::mem::transmute::<*mut c_void, Attribute>(symbol(c"cuDeviceGetAttribute")?),
        )
    };
    let check = |call: &str, result: c_int| if result == 0 { Ok(()) } else { Err(format!("{call} answers {result}")) };
    // SAFETY: the driver's entry, with the only flags there are.
    check("cuInit", unsafe { init(0) })?;
    let mut devices: c_int = 0;
    // SAFETY: writes one int.
    check("cuDeviceGetCount", unsafe { count(&mut devices) })?;
    let mut found = Vec::new();
    for ordinal in 0..devices.clamp(0, DEVICES_MAX) {
        let (mut device, mut bytes, mut text) = (0, 0_usize, [0 as c_char; 128]);
        // SAFETY: writes one int.
        check("cuDeviceGet", unsafe { get(&mut device, ordinal) })?;
        // SAFETY: writes at most 127 bytes and a zero; the last byte stays ours.
        check("cuDeviceGetName", unsafe { name(text.as_mut_ptr(), 127, device) })?;
        // SAFETY: writes one size_t.
        check("cuDeviceTotalMem", unsafe { memory(&mut bytes, device) })?;
        let number = |which| -> Result<u32, String> {
            let mut value: c_int = 0;
            // SAFETY: writes one int.
            check("cuDeviceGetAttribute", unsafe { attribute(&mut value, which, device) })?;
            Ok(u32::try_from(value).unwrap_or(0))
        };
        // SAFETY: the buffer ends with a zero: it was filled with them, and its last byte was not the driver's to write.
        let name = unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy().into_owned();
        found.push(CudaDevice {
            name,
            memory_bytes: bytes as u64,
            multiprocessors: number(MULTIPROCESSORS)?,
            capability: (number(CAPABILITY_MAJOR)?, number(CAPABILITY_MINOR)?),
        });
    }
    Ok(found)
}

#[cfg(all(test, target_os = "linux"))]
#[path = "cuda_tests.rs"]
mod tests;
