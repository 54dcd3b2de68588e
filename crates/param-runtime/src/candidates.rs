//! The largest logits of a row, kept while the row is computed.

use std::cmp::Ordering;

/// A token that is in the running.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Candidate {
    pub logit: f32,
    pub token: u32,
}

impl Candidate {
    /// NaN counts as `-inf`; an infinite logit would make every probability NaN, and the largest finite one says the same.
    pub fn new(logit: f32, token: u32) -> Candidate {
        Candidate { logit: if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) }, token }
    }
}

/// More likely first; of equals the lower id, so that the order is the same everywhere.
pub(crate) fn by_logit(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

/// The most likely candidates so far, best first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Best {
    n: usize,
    list: Vec<Candidate>,
}

impl Best {
    /// Starts over, to keep `n`.
    pub fn reset(&mut self, n: usize) {
        self.n = n;
        self.list.clear();
        self.list.reserve(n + 1);
    }

    /// How many it was to keep.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Best first.
    pub fn list(&self) -> &[Candidate] {
        &self.list
    }

    /// Adds the logits of consecutive tokens.
    pub fn add(&mut self, first_token: usize, logits: &[f32]) {
        if self.n == 0 {
            return;
        }
        // Nearly every strip ends here: one pass without a branch. NaN is no larger than anything.
        let largest = logits.iter().fold(f32::NEG_INFINITY, |m, &l| if l > m { l } else { m });
        if self.list.len() == self.n && self.list.last().is_some_and(|worst| largest < worst.logit) {
            return;
        }
        for (logit, token) in logits.iter().zip(first_token as u32..) {
            self.insert(Candidate::new(*logit, token));
        }
    }

    /// Adds what another has kept.
    pub fn merge(&mut self, other: &Best) {
        other.list.iter().for_each(|&candidate| self.insert(candidate));
    }

    fn insert(&mut self, candidate: Candidate) {
        if self.list.len() == self.n && self.list.last().is_some_and(|worst| by_logit(worst, &candidate).is_le()) {
            return;
        }
        let at = self.list.partition_point(|other| by_logit(other, &candidate).is_lt());
        self.list.insert(at, candidate);
        self.list.truncate(self.n);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn equals_the_head_of_a_full_sort_however_it_is_cut_and_merged(
            logits in prop::collection::vec(prop_oneof![(-4i8..4).prop_map(f32::from), Just(f32::NAN), Just(f32::INFINITY)], 0..200),
            n in 0usize..20, cut in 1usize..30,
        ) {
            let mut want: Vec<Candidate> = logits.iter().zip(0..).map(|(&l, t)| Candidate::new(l, t)).collect();
            want.sort_by(by_logit);
            want.truncate(n);
            let mut parts = vec![Best::default(); 3];
            parts.iter_mut().for_each(|part| part.reset(n));
            for (i, chunk) in logits.chunks(cut).enumerate() {
                parts[i % 3].add(i * cut, chunk);
            }
            let mut best = Best::default();
            best.reset(n);
            parts.iter().rev().for_each(|part| best.merge(part));
            prop_assert_eq!(best.list(), &want[..]);
        }
    }
}
