//! How QUIC is set up for one machine room: large windows, large datagrams where the path takes them, quick notice of death.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn_proto::congestion::{Controller, ControllerFactory, CubicConfig};
use quinn_proto::{EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

use crate::stream::INBOX_BYTES;
use crate::transport::keep_alive;
use crate::{NetError, Result};

/// Bytes written and not yet acknowledged, per connection.
const SEND_WINDOW_BYTES: u64 = 8 << 20;
/// Streams that a peer may have open.
const MAX_STREAMS: u32 = 1024;
/// Largest datagram looked for: what fits IPv4 and loopback with room for headers.
const MAX_DATAGRAM_BYTES: u16 = 65_000;
/// Bytes in flight from the first moment: a rack's round trips are short and its links fast.
const FIRST_WINDOW_BYTES: u64 = 256 << 10;

pub(super) fn endpoint() -> Result<EndpointConfig> {
    let mut config = EndpointConfig::default();
    config
        .max_udp_payload_size(MAX_DATAGRAM_BYTES)
        .map_err(|error| NetError::Setup { what: "datagram size", reason: error.to_string() })?;
    Ok(config)
}

/// `receive_buffer_bytes`: what the kernel of a peer like this one holds unread.
pub(super) fn transport(receive_buffer_bytes: usize, silence: Duration) -> Result<Arc<TransportConfig>> {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(MAX_DATAGRAM_BYTES).black_hole_cooldown(Duration::from_secs(10)).minimum_change(200);
    let idle = IdleTimeout::try_from(silence).map_err(|error| NetError::Setup { what: "idle timeout", reason: error.to_string() })?;
    let mut config = TransportConfig::default();
    config
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(keep_alive(silence)))
        .max_concurrent_bidi_streams(MAX_STREAMS.into())
        .max_concurrent_uni_streams(MAX_STREAMS.into())
        .stream_receive_window(VarInt::from_u32(INBOX_BYTES as u32))
        // Each stream has its own bound; one for all would let streams that nobody reads stop the others.
        .receive_window(VarInt::MAX)
        .send_window(SEND_WINDOW_BYTES)
        .datagram_receive_buffer_size(None)
        .initial_rtt(Duration::from_millis(20))
        .mtu_discovery_config(Some(mtu))
        .congestion_controller_factory(Arc::new(Bounded { most_bytes: (receive_buffer_bytes as u64 * 3 / 4).max(128 << 10) }));
    Ok(Arc::new(config))
}

/// Cubic, with no more in flight than a receiver's kernel holds: what overflows there is lost, and a lost datagram stalls
/// its stream for a round trip or more.
#[derive(Debug, Clone, Copy)]
struct Bounded {
    most_bytes: u64,
}

struct BoundedCubic {
    cubic: Box<dyn Controller>,
    most_bytes: u64,
}

impl ControllerFactory for Bounded {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let mut config = CubicConfig::default();
        config.initial_window(FIRST_WINDOW_BYTES.min(self.most_bytes));
        Box::new(BoundedCubic { cubic: Arc::new(config).build(now, current_mtu), most_bytes: self.most_bytes })
    }
}

impl Controller for BoundedCubic {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.cubic.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &quinn_proto::RttEstimator) {
        // Beyond the bound Cubic would grow for ever and not notice its next loss.
        let app_limited = app_limited || self.cubic.window() > 2 * self.most_bytes;
        self.cubic.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest_packet_num_acked: Option<u64>) {
        self.cubic.on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent_congestion: bool, lost_bytes: u64) {
        self.cubic.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.cubic.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.cubic.window().min(self.most_bytes)
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(BoundedCubic { cubic: self.cubic.clone_box(), most_bytes: self.most_bytes })
    }

    fn initial_window(&self) -> u64 {
        self.cubic.initial_window().min(self.most_bytes)
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
