//! The UDP socket of a process's data plane: segmentation offload where the kernel has it, and a wait that another thread
//! can end.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use quinn_proto::Transmit;
use quinn_udp::{RecvMeta, UdpSockRef, UdpSocketState};

/// Wished size of the kernel's buffers, bytes; the kernel gives what it allows.
const KERNEL_BUFFER_BYTES: usize = 4 << 20;
/// Longest wait for room in the kernel's send buffer; then the datagram is dropped, which QUIC repairs.
const SEND_WAIT: Duration = Duration::from_millis(5);
/// Datagrams, or trains of them, that are read at once.
const BATCH: usize = 8;
/// Longest train of datagrams that the kernel hands over as one.
const TRAIN_BYTES: usize = 65_536;
/// Longest datagram that IPv4 carries; a train must not be longer.
const MAX_SEND_BYTES: usize = 65_507;

pub(super) struct Socket {
    udp: UdpSocket,
    state: UdpSocketState,
    /// Written to by [`Socket::wake`], read by whoever waits.
    waker: UnixDatagram,
    woken: UnixDatagram,
}

/// Room for what is read at once.
pub(super) struct Buffers {
    bytes: Vec<u8>,
    metas: [RecvMeta; BATCH],
}

impl Buffers {
    pub(super) fn new() -> Self {
        Buffers { bytes: vec![0; BATCH * TRAIN_BYTES], metas: [RecvMeta::default(); BATCH] }
    }
}

impl Socket {
    pub(super) fn bind(address: SocketAddr) -> io::Result<Self> {
        let udp = UdpSocket::bind(address)?;
        let state = UdpSocketState::new(UdpSockRef::from(&udp))?;
        // Less than wished for is slower, not wrong.
        let _ = state.set_send_buffer_size(UdpSockRef::from(&udp), KERNEL_BUFFER_BYTES);
        let _ = state.set_recv_buffer_size(UdpSockRef::from(&udp), KERNEL_BUFFER_BYTES);
        let (waker, woken) = UnixDatagram::pair()?;
        waker.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        Ok(Socket { udp, state, waker, woken })
    }

    pub(super) fn local_address(&self) -> io::Result<SocketAddr> {
        self.udp.local_addr()
    }

    /// Bytes of datagrams that the kernel holds until they are read.
    pub(super) fn receive_buffer_bytes(&self) -> usize {
        // Linux reports twice what was asked for and counts its own overhead against it.
        self.state.recv_buffer_size(UdpSockRef::from(&self.udp)).unwrap_or(256 << 10) / 2
    }

    pub(super) fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }

    /// Datagrams of this size that may leave as one train.
    pub(super) fn train(&self, datagram_bytes: u16) -> usize {
        self.state.max_gso_segments().min(MAX_SEND_BYTES / usize::from(datagram_bytes.max(1))).max(1)
    }

    pub(super) fn send(&self, transmit: &Transmit, contents: &[u8]) {
        let transmit = quinn_udp::Transmit {
            destination: transmit.destination,
            ecn: transmit.ecn.map(ecn_of),
            contents: &contents[..transmit.size],
            segment_size: transmit.segment_size,
            src_ip: transmit.src_ip,
        };
        for _ in 0..2 {
            match self.state.send(UdpSockRef::from(&self.udp), &transmit) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    wait_for(&mut [poll(self.udp.as_raw_fd(), libc::POLLOUT)], SEND_WAIT);
                }
                _ => return,
            }
        }
    }

    /// Reads what is there and gives each datagram to `take`. Returns false once there was nothing.
    pub(super) fn receive(&self, buffers: &mut Buffers, mut take: impl FnMut(&RecvMeta, &[u8])) -> bool {
        let Buffers { bytes, metas } = buffers;
        let mut slices = bytes.chunks_exact_mut(TRAIN_BYTES).map(IoSliceMut::new).collect::<Vec<_>>();
        // Whatever else a read says concerns a datagram that was sent, which QUIC finds out by itself.
        let Ok(count) = self.state.recv(UdpSockRef::from(&self.udp), &mut slices, metas) else { return false };
        for (meta, slice) in metas.iter().zip(&slices).take(count) {
            for datagram in slice[..meta.len].chunks(meta.stride.max(1)) {
                take(meta, datagram);
            }
        }
        count > 0
    }

    /// Waits until a datagram can be read or the time is over.
    pub(super) fn wait_readable(&self, timeout: Duration) {
        wait_for(&mut [poll(self.udp.as_raw_fd(), libc::POLLIN)], timeout);
    }

    /// Waits until [`Socket::wake`] is called, the time is over, or, where asked for, a datagram can be read. For one
    /// thread only.
    pub(super) fn wait(&self, readable: bool, timeout: Duration) {
        let mut polled = [poll(self.woken.as_raw_fd(), libc::POLLIN), poll(self.udp.as_raw_fd(), libc::POLLIN)];
        let count = if readable { 2 } else { 1 };
        wait_for(&mut polled[..count], timeout);
        if polled[0].revents != 0 {
            let mut byte = [0];
            while self.woken.recv(&mut byte).is_ok() {}
        }
    }

    /// Ends the wait of the thread that waits.
    pub(super) fn wake(&self) {
        // A full queue has woken it already.
        let _ = self.waker.send(&[0]);
    }
}

fn ecn_of(ecn: quinn_proto::EcnCodepoint) -> quinn_udp::EcnCodepoint {
    match ecn {
        quinn_proto::EcnCodepoint::Ect0 => quinn_udp::EcnCodepoint::Ect0,
        quinn_proto::EcnCodepoint::Ect1 => quinn_udp::EcnCodepoint::Ect1,
        quinn_proto::EcnCodepoint::Ce => quinn_udp::EcnCodepoint::Ce,
    }
}

pub(super) fn ecn_from(ecn: quinn_udp::EcnCodepoint) -> quinn_proto::EcnCodepoint {
    match ecn {
        quinn_udp::EcnCodepoint::Ect0 => quinn_proto::EcnCodepoint::Ect0,
        quinn_udp::EcnCodepoint::Ect1 => quinn_proto::EcnCodepoint::Ect1,
        quinn_udp::EcnCodepoint::Ce => quinn_proto::EcnCodepoint::Ce,
    }
}

fn poll(fd: RawFd, events: libc::c_short) -> libc::pollfd {
    libc::pollfd { fd, events, revents: 0 }
}

fn wait_for(polled: &mut [libc::pollfd], timeout: Duration) {
    #[cfg(target_os = "linux")]
    {
        let timeout =
            libc::timespec { tv_sec: timeout.as_secs().min(3600) as libc::time_t, tv_nsec: timeout.subsec_nanos() as libc::c_long };
        // SAFETY: `polled` is valid for its length and `timeout` for the call; a null mask leaves signals as they are.
        // An error (a signal) is a wait that ended early, which callers expect.
        unsafe { libc::ppoll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, &timeout, std::ptr::null()) };
    }
    #[cfg(not(target_os = "linux"))]
    {
        let millis = timeout.as_micros().div_ceil(1000).min(3_600_000) as libc::c_int;
        // SAFETY: `polled` is valid for its length. An error is a wait that ended early.
        unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, millis) };
    }
}
