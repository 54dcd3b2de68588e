//! Divides a shard into a part to train on and a part held out, the same way every time.

use std::ops::Range;
use std::sync::Arc;

use super::DataError;
use super::permute::hash;
use super::shard::Shard;

/// Some of the documents of a shard, in order.
#[derive(Clone, Debug)]
pub struct Part {
    shard: Arc<Shard>,
    documents: Documents,
}

#[derive(Clone, Debug)]
enum Documents {
    All,
    /// All but these, sorted.
    Except(Arc<[u64]>),
    /// These, sorted.
    Only(Arc<[u64]>),
    /// These tokens of the only document there is.
    Tokens(Range<u64>),
}

impl Part {
    /// The whole shard, as for `--eval-data`.
    pub fn all(shard: Arc<Shard>) -> Self {
        Self { shard, documents: Documents::All }
    }

    /// The shard it is part of.
    pub fn shard(&self) -> &Shard {
        &self.shard
    }

    /// Number of documents.
    pub fn n_document(&self) -> u64 {
        match &self.documents {
            Documents::All => self.shard.index().n_document,
            Documents::Except(out) => self.shard.index().n_document - out.len() as u64,
            Documents::Only(these) => these.len() as u64,
            Documents::Tokens(_) => 1,
        }
    }

    /// The tokens of document `i` < `n_document` of this part, as a range for [`Shard::read`]; never empty.
    pub fn document(&self, i: u64) -> Range<u64> {
        match &self.documents {
            Documents::All => self.shard.document(i),
            Documents::Except(out) => {
                // `out[j] - j` of the shard's documents before `out[j]` are in this part.
                let before = partition_point(out.len(), |j| out[j] - j as u64 <= i);
                self.shard.document(i + before as u64)
            }
            Documents::Only(these) => self.shard.document(these[i as usize]),
            Documents::Tokens(tokens) => tokens.clone(),
        }
    }

    /// Number of tokens.
    pub fn n_token(&self) -> u64 {
        let sum = |documents: &[u64]| documents.iter().map(|&i| length(&self.shard.document(i))).sum::<u64>();
        match &self.documents {
            Documents::All => self.shard.index().n_token,
            Documents::Except(out) => self.shard.index().n_token - sum(out),
            Documents::Only(these) => sum(these),
            Documents::Tokens(tokens) => length(tokens),
        }
    }
}

pub(super) fn length(range: &Range<u64>) -> u64 {
    range.end - range.start
}

/// The first `j` in `0..n` for which `holds` no longer does.
pub(super) fn partition_point(n: usize, holds: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, n);
    while low < high {
        let middle = low + (high - low) / 2;
        if holds(middle) { low = middle + 1 } else { high = middle }
    }
    low
}

/// The training part and the held-out part of `shard`.
///
/// A document is held out if the hash of its number and `seed` falls into the first `fraction` of all hashes; if none
/// does, the one with the lowest hash is. One that makes up more than half of all tokens is never held out. Of a
/// single document the last `fraction` of the tokens is held out instead, as nanoGPT does with Tiny Shakespeare.
///
/// # Errors
/// [`DataError::Fraction`] unless `0 < fraction < 1`. Parts too short for a row are refused by
/// [`Batches`](super::Batches).
pub fn split(shard: Arc<Shard>, fraction: f64, seed: u64) -> Result<(Part, Part), DataError> {
    if !(fraction > 0.0 && fraction < 1.0) {
        return Err(DataError::Fraction { fraction });
    }
    let (n_document, n_token) = (shard.index().n_document, shard.index().n_token);
    let part = |documents| Part { shard: shard.clone(), documents };
    if n_document == 1 {
        let kept = n_token - (n_token as f64 * fraction) as u64;
        return Ok((part(Documents::Tokens(0..kept)), part(Documents::Tokens(kept..n_token))));
    }
    let below = (fraction * 2f64.powi(64)) as u64;
    let eligible = || (0..n_document).filter(|&i| length(&shard.document(i)) <= n_token / 2);
    let mut held_out: Vec<u64> = eligible().filter(|&i| hash(&[seed, i]) < below).collect();
    if held_out.is_empty() {
        held_out.extend(eligible().min_by_key(|&i| hash(&[seed, i])));
    }
    let held_out: Arc<[u64]> = held_out.into();
    Ok((part(Documents::Except(held_out.clone())), part(Documents::Only(held_out))))
}
