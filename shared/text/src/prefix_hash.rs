//! Keys of the prefix cache: a chain of hashes, one per full block of tokens.
//!
//! A block's hash covers the hash of its parent, so equal hashes mean equal token prefixes (up
//! to BLAKE3 collisions, 128 bits of security). The chain's root covers the tenant's salt and
//! the numerics id, so tenants never share blocks and neither do two engines that compute
//! different bits. Positions need no field of their own: a block's place is its chain length.

/// Hash of a token prefix that ends at a block boundary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PrefixHash(pub [u8; 32]);

impl PrefixHash {
    /// Its first 64 bits: what engines and gateways tell each other of a block. Two blocks with equal ones are told apart
    /// by the engine alone; to a gateway they are one more reason to route somewhere.
    pub fn short(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }
}

/// Computes the chain. Stateless: all state is the parent hash.
///
/// ```
/// use forge_text::PrefixHasher;
/// let root = PrefixHasher::root(b"tenant-a", "cpu-f32-1");
/// let first = PrefixHasher::next(&root, &[1, 2, 3, 4]);
/// assert_ne!(first, PrefixHasher::next(&first, &[1, 2, 3, 4]));
/// ```
pub struct PrefixHasher;

/// Separate domains: a root can never equal a block's hash.
const ROOT_CONTEXT: &str = "forge 2026 prefix cache root v1";
const BLOCK_CONTEXT: &str = "forge 2026 prefix cache block v1";

impl PrefixHasher {
    /// The parent of every first block: covers the tenant's `salt` and the `numerics_id`.
    pub fn root(salt: &[u8], numerics_id: &str) -> PrefixHash {
        let mut hasher = blake3::Hasher::new_derive_key(ROOT_CONTEXT);
        hasher.update(&(salt.len() as u64).to_le_bytes());
        hasher.update(salt);
        hasher.update(numerics_id.as_bytes());
        PrefixHash(hasher.finalize().into())
    }

    /// The hash of the block of `tokens` that follows `parent`.
    pub fn next(parent: &PrefixHash, tokens: &[u32]) -> PrefixHash {
        let mut hasher = blake3::Hasher::new_derive_key(BLOCK_CONTEXT);
        hasher.update(&parent.0);
        let mut buffer = [0u8; 256];
        for chunk in tokens.chunks(buffer.len() / 4) {
            for (slot, token) in buffer.chunks_exact_mut(4).zip(chunk) {
                slot.copy_from_slice(&token.to_le_bytes());
            }
            hasher.update(&buffer[..chunk.len() * 4]);
        }
        PrefixHash(hasher.finalize().into())
    }

    /// The hashes of all full blocks of `tokens`, `block_size` tokens each; a remainder has none.
    pub fn chain(root: &PrefixHash, tokens: &[u32], block_size: usize) -> Vec<PrefixHash> {
        tokens
            .chunks_exact(block_size.max(1))
            .scan(*root, |parent, block| {
                *parent = Self::next(parent, block);
                Some(*parent)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn roots_separate_salt_and_numerics_id() {
        let roots: HashSet<_> = [
            PrefixHasher::root(b"", ""),
            PrefixHasher::root(b"a", ""),
            PrefixHasher::root(b"", "a"),
            PrefixHasher::root(b"ab", "c"),
            PrefixHasher::root(b"a", "bc"),
        ]
        .into_iter()
        .collect();
        assert_eq!(roots.len(), 5);
    }

    #[test]
    fn the_same_block_elsewhere_has_another_hash() {
        let root = PrefixHasher::root(b"t", "n");
        let chain = PrefixHasher::chain(&root, &[7; 64], 16);
        assert_eq!(chain.iter().collect::<HashSet<_>>().len(), 4);
    }

    /// Pins the format: a change makes caches of different releases disagree silently.
    #[test]
    fn the_format_is_stable() {
        let root = PrefixHasher::root(b"tenant", "cpu-1");
        let hash = PrefixHasher::next(&root, &[0, 1, u32::MAX]);
        let mut reference = blake3::Hasher::new_derive_key(BLOCK_CONTEXT);
        reference.update(&root.0);
        reference.update(&[0, 0, 0, 0, 1, 0, 0, 0, 255, 255, 255, 255]);
        assert_eq!(hash.0, *reference.finalize().as_bytes());
    }

    proptest! {
        #[test]
        fn a_chain_is_a_function_of_the_prefix(
            tokens in proptest::collection::vec(any::<u32>(), 0..200),
            other in any::<u32>(),
            at in any::<prop::sample::Index>(),
            block_size in 1usize..40,
        ) {
            let root = PrefixHasher::root(b"t", "n");
            let chain = PrefixHasher::chain(&root, &tokens, block_size);
            prop_assert_eq!(chain.len(), tokens.len() / block_size);
            if tokens.is_empty() { return Ok(()); }
            let at = at.index(tokens.len());
            let mut changed = tokens.clone();
            changed[at] = other;
            let changed_chain = PrefixHasher::chain(&root, &changed, block_size);
            for (block, (a, b)) in chain.iter().zip(&changed_chain).enumerate() {
                let differs = tokens[at] != other && block >= at / block_size;
                prop_assert_eq!(a != b, differs);
            }
        }
    }
}
