//! Training data: from files on disk to batches of tokens.
//!
//! [`find`](source::find) lists the files, [`prepare`](build::prepare) tokenizes them once into a memory-mapped
//! [`Shard`](shard::Shard), [`split`](split::split) holds a part out, [`Batches`](batch::Batches) cuts the rest into
//! rows to train on and [`Evaluation`](batch::Evaluation) the held-out part. Text is read in blocks and tokens stay in
//! their file: what is held in memory does not grow with the corpus, but for a few bytes per hundred documents and
//! the list of files.

pub mod batch;
pub mod build;
mod cut;
mod encode;
mod error;
mod jsonl;
mod permute;
mod read;
pub mod report;
pub mod sample;
pub mod shard;
pub mod source;
pub mod split;
#[cfg(test)]
mod tests;

pub use error::DataError;
