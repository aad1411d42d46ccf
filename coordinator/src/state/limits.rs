//! Bounds of the state: how much of everything a cluster remembers.
//!
//! Invariant: no command makes any collection longer than its bound; what comes later is refused with
//! `TooMany`, or pushes out the oldest where forgetting is harmless (replies, notices, removed nodes).

/// Workers and gateways, lost ones included.
pub const MAX_NODES: usize = 8_192;
/// Devices of one node.
pub const MAX_DEVICES: usize = 64;
/// Services.
pub const MAX_SERVICES: usize = 4_096;
/// Replicas of one service.
pub const MAX_REPLICAS: u32 = 1_024;
/// Replicas of all services, as wished.
pub const MAX_REPLICAS_TOTAL: usize = 16_384;
/// Older wishes of one service that still have replicas.
pub const MAX_OLDER_WISHES: usize = 8;
/// Earlier wishes of one service to go back to; the oldest go first.
pub const MAX_HISTORY: usize = 8;
/// Bytes of one service's wish as JSON.
pub const MAX_SERVICE_BYTES: usize = 64 << 10;
/// API keys, revoked ones included.
pub const MAX_KEYS: usize = 10_000;
/// Join tokens.
pub const MAX_TOKENS: usize = 1_024;
/// Nodes one join token may let in.
pub const MAX_TOKEN_USES: u32 = 10_000;
/// Longest life of a join token, milliseconds.
pub const MAX_TOKEN_LIFE_MS: u64 = 30 * 24 * 3_600_000;
/// Certificates that were not revoked; those that have ended make room, then the oldest of whoever has the most.
pub const MAX_CERTIFICATES: usize = 32_768;
/// Certificates of one holder that are good; more are not signed.
pub const MAX_HOLDER_CERTIFICATES: usize = 64;
/// Revoked certificates that have not ended.
pub const MAX_REVOKED: usize = 4_096;
/// Members of the raft group, learners included.
pub const MAX_MEMBERS: usize = 16;
/// Remembered numbers of removed members; what is older is known by being smaller.
pub const MAX_REMOVED_MEMBERS: usize = 256;
/// Idempotency records of all tenants.
pub const MAX_IDEMPOTENCY: usize = 20_000;
/// Idempotency records of one tenant.
pub const MAX_IDEMPOTENCY_TENANT: usize = 5_000;
/// Life of an idempotency record, milliseconds: at least and at most.
pub const IDEMPOTENCY_LIFE_MS: (u64, u64) = (600_000, 24 * 3_600_000);
/// Notices; the oldest go first.
pub const MAX_NOTICES: usize = 1_000;
/// Remembered replies to commands from outside; the oldest go first.
pub const MAX_ASKED_REPLIES: usize = 8_192;
/// Remembered replies to commands of leaders and workers; the oldest go first.
pub const MAX_REPORTED_REPLIES: usize = 4_096;
/// Remembered incarnations of removed nodes; the oldest go first.
pub const MAX_REMOVED_NODES: usize = 1_024;
/// Plans, removals or refusals in one commit.
pub const MAX_COMMIT: usize = 16_384;
/// Bytes of a sentence that somebody else wrote (a reason): what is longer is cut.
pub const MAX_REASON_BYTES: usize = 1_024;
