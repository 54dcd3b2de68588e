//! Training data: from files on disk to batches of tokens.
//!
//! [`find`] lists the files, [`prepare`] tokenizes them once into a memory-mapped [`Shard`], [`split`] holds a part
//! out, [`Batches`] cuts the rest, or a [`Mixture`] of several, into rows to train on and [`Evaluation`] the held-out
//! part. Text is read in blocks and tokens stay in their file: what is held in memory does not grow with the corpus,
//! but for a few bytes per hundred documents and the list of files.

mod batch;
mod bpe;
mod build;
mod cut;
mod encode;
mod error;
mod evaluation;
mod jsonl;
mod mixture;
mod parquet;
mod permute;
mod prefetch;
mod pretokenize;
mod read;
mod report;
mod rows;
mod sample;
mod shard;
mod source;
mod split;
#[cfg(test)]
mod tests;

pub use batch::{Batch, Batches, IGNORED};
pub use build::{Progress, Reuse, Why, prepare};
pub use error::DataError;
pub use evaluation::Evaluation;
pub use mixture::{Dataset, Mixture, check_weight};
pub use prefetch::Prefetch;
pub use report::{Reason, Skipped, Tally};
pub use rows::{Layout, Vocabulary};
pub use sample::{alphabet, sample};
pub use shard::{Index, Recipe, Shard, folder_name};
pub use source::{Compression, Format, SourceFile, find};
pub use split::{Part, split};
