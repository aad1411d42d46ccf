//! Linux, as far as the relay needs it: a tun device in a namespace, reads that do not wait, and a poll over all of them.

use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A tun device; it is gone when this is dropped.
pub(crate) struct Device(File);

impl Device {
    /// Makes the device in a namespace that `ip netns` knows. The calling thread is in that namespace afterwards.
    pub(crate) fn open(namespace: &str, name: &str) -> Result<Device> {
        let handle = File::open(Path::new("/var/run/netns").join(namespace))?;
        // SAFETY: a system call on a descriptor that lives; no memory of ours is touched.
        if unsafe { libc::setns(handle.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
            return Err(Error::last_os_error());
        }
        let device = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        // SAFETY: an all-zero request is a valid one: no name, no flags.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.len() >= request.ifr_name.len() {
            return Err(Error::new(ErrorKind::InvalidInput, "the device's name is too long"));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: the request is ours, whole, and outlives the call, which is the one that TUNSETIFF is for.
        if unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF as _, &mut request) } != 0 {
            return Err(Error::last_os_error());
        }
        Ok(Device(device))
    }

    /// The next packet's length, if there is one.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Result<Option<usize>> {
        no_wait((&self.0).read(buffer))
    }

    /// Gives the host a packet. What it does not take is lost, as on any wire: its device is down, or its queue full.
    pub(crate) fn write(&mut self, packet: &[u8]) {
        let _ = (&self.0).write(packet);
    }
}

/// Standard input, without waiting.
pub(crate) struct Input(RawFd);

impl Input {
    pub(crate) fn new() -> Result<Input> {
        // SAFETY: a system call on descriptor 0, which is open for the life of the process; no memory of ours is touched.
        let failed = unsafe { libc::fcntl(0, libc::F_SETFL, libc::O_NONBLOCK) } < 0;
        if failed { Err(Error::last_os_error()) } else { Ok(Input(0)) }
    }

    /// What came; 0 at the end, nothing if there is nothing yet.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Result<Option<usize>> {
        // SAFETY: the buffer is ours and as long as is said.
        let read = unsafe { libc::read(self.0, buffer.as_mut_ptr().cast(), buffer.len()) };
        no_wait(usize::try_from(read).map_err(|_| Error::last_os_error()))
    }
}

fn no_wait(read: Result<usize>) -> Result<Option<usize>> {
    match read {
        Ok(length) => Ok(Some(length)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What can be read now.
pub(crate) struct Ready {
    pub(crate) input: bool,
    /// Places of devices.
    pub(crate) devices: Vec<usize>,
}

/// Waits until anything can be read, or so long.
pub(crate) fn poll(input: &Input, devices: &[Device], wait_us: u64) -> Result<Ready> {
    let descriptors = devices.iter().map(|device| device.0.as_raw_fd()).chain([input.0]);
    let mut polled: Vec<libc::pollfd> = descriptors.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
    let wait = libc::timespec { tv_sec: (wait_us / 1_000_000) as _, tv_nsec: (wait_us % 1_000_000 * 1000) as _ };
    // SAFETY: the list is ours and as long as is said, the time outlives the call, and no mask of signals is given.
    if unsafe { libc::ppoll(polled.as_mut_ptr(), polled.len() as _, &wait, std::ptr::null()) } < 0 {
        let error = Error::last_os_error();
        if error.kind() != ErrorKind::Interrupted {
            return Err(error);
        }
    }
    let is_ready = |place: usize| polled[place].revents != 0;
    Ok(Ready { input: is_ready(devices.len()), devices: (0..devices.len()).filter(|host| is_ready(*host)).collect() })
}
