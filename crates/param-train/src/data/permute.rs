//! Random numbers and orders as pure functions of a seed, so that any position can be reached without what was before.

/// A well-mixed 64-bit hash of `words`: rounds of the finalizer of SplitMix64 (Steele, Lea and Flood 2014).
pub fn hash(words: &[u64]) -> u64 {
    words.iter().fold(0, |state, &word| {
        let mut x = (state ^ word).wrapping_add(0x9E37_79B9_7F4A_7C15);
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    })
}

/// A permutation of `0..n` that takes no memory: a Feistel network over the next power of four, walked until it lands
/// inside (Black and Rogaway 2002).
#[derive(Clone, Debug)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    /// `None` for the identity.
    key: Option<u64>,
}

impl Permutation {
    const ROUNDS: u64 = 6;

    /// `i -> i`.
    pub fn identity(n: u64) -> Self {
        Self { n, half_bits: 0, key: None }
    }

    /// The shuffle of `0..n` that belongs to `key`.
    pub fn shuffled(n: u64, key: u64) -> Self {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        Self { n, half_bits: bits.div_ceil(2).max(1), key: Some(key) }
    }

    /// Where `i` < `n` goes.
    pub fn at(&self, i: u64) -> u64 {
        debug_assert!(i < self.n);
        let Some(key) = self.key else { return i };
        let mask = (1 << self.half_bits) - 1;
        let mut x = i;
        loop {
            let (mut left, mut right) = (x >> self.half_bits, x & mask);
            for round in 0..Self::ROUNDS {
                (left, right) = (right, left ^ (hash(&[key, round, right]) & mask));
            }
            x = left << self.half_bits | right;
            if x < self.n {
                return x;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_index_is_reached_once(n in 1u64..3000, key in any::<u64>()) {
            let order = Permutation::shuffled(n, key);
            let mut reached: Vec<u64> = (0..n).map(|i| order.at(i)).collect();
            reached.sort();
            prop_assert_eq!(reached, (0..n).collect::<Vec<_>>());
        }
    }

    #[test]
    fn keys_give_different_orders_without_a_bias() {
        // Where 0 of 0..8 goes, over many keys: 1000 expected in each place, standard deviation 30.
        let mut counts = [0; 8];
        (0..8000).for_each(|key| counts[Permutation::shuffled(8, key).at(0) as usize] += 1);
        assert!(counts.iter().all(|c| (850..1150).contains(c)), "{counts:?}");
    }

    #[test]
    fn largest_range_is_permuted_without_overflow() {
        let order = Permutation::shuffled(u64::MAX, 7);
        assert_ne!(order.at(0), order.at(u64::MAX - 1));
    }
}
