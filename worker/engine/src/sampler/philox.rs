//! Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw ("Parallel random numbers: as
//! easy as 1, 2, 3", SC 2011).
//!
//! A random number is a pure function of (seed, position, choice, draw): there is no state to lose, so a
//! replay on another machine, in another batch, draws the same numbers.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Four random words of a key and a counter.
pub fn philox4x32(mut key: [u32; 2], mut counter: [u32; 4]) -> [u32; 4] {
    for round in 0..ROUNDS {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let first = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let second = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [(second >> 32) as u32 ^ counter[1] ^ key[0], second as u32, (first >> 32) as u32 ^ counter[3] ^ key[1], first as u32];
    }
    counter
}

/// Where in a request's randomness a draw lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrawKey {
    /// The request's seed.
    pub seed: u64,
    /// The answer's index.
    pub choice: u32,
    /// Absolute position of the token that is sampled: prompt tokens count.
    pub position: u32,
}

impl DrawKey {
    /// Uniform in [0, 1) with 53 bits; `draw` counts the draws for one token.
    pub fn uniform(self, draw: u32) -> f64 {
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        let words = philox4x32(key, [self.position, self.choice, draw, 0]);
        let bits = (u64::from(words[0]) << 32 | u64::from(words[1])) >> 11;
        bits as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The three vectors of Random123's `kat_vectors` for philox4x32 with 10 rounds.
    #[test]
    fn known_answers() {
        assert_eq!(philox4x32([0; 2], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([u32::MAX; 2], [u32::MAX; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0xa409_3822, 0x299f_31d0], [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn draws_are_uniform_and_differ_in_every_coordinate() {
        let key = DrawKey { seed: 7, choice: 0, position: 3 };
        let others = [
            DrawKey { seed: 8, ..key }.uniform(0),
            DrawKey { seed: 7 | 1 << 40, ..key }.uniform(0),
            DrawKey { choice: 1, ..key }.uniform(0),
            DrawKey { position: 4, ..key }.uniform(0),
            key.uniform(1),
        ];
        assert!(others.iter().all(|&other| other != key.uniform(0)));
        let draws = (0..20).flat_map(|seed| (0..10_000).map(move |position| DrawKey { seed, choice: 0, position }.uniform(0)));
        let mean: f64 = draws.sum::<f64>() / 200_000.0;
        // Standard error 0.00065.
        assert!((mean - 0.5).abs() < 0.0025, "{mean}");
    }
}
