//! What can go wrong between text on disk and a batch of tokens, each error naming the file and the way out.

use std::io;
use std::path::{Path, PathBuf};

use super::report::Skipped;

/// An error about training data.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // fields are named in the messages
pub enum DataError {
    #[error("`{}`: no such file or folder, and nothing that it matches as a glob", path.display())]
    Missing { path: PathBuf },
    #[error("`{pattern}`: not a valid glob: {problem}")]
    Pattern { pattern: String, problem: String },
    #[error("no file matched in {inputs}{}; {seen}", wanted_suffix(wanted))]
    NoFiles { inputs: String, wanted: Vec<String>, seen: String },
    #[error("`{}`: cannot read: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("`{}`: not text: a NUL byte at offset {offset}; leave the file out", path.display())]
    Binary { path: PathBuf, offset: u64 },
    #[error("`{}`: not UTF-8 at byte offset {offset}{hint}", path.display())]
    NotUtf8 { path: PathBuf, offset: u64, hint: &'static str },
    #[error("`{}`: no document in field `{field}`: {skipped}; --text-field names the field", path.display())]
    NoGoodLine { path: PathBuf, field: String, skipped: Skipped },
    #[error("`{}`: not a usable Parquet file: {problem}", path.display())]
    Parquet { path: PathBuf, problem: String },
    #[error("`{}`: no column `{field}`: there are {columns}; --text-field names the one to read", path.display())]
    NoColumn { path: PathBuf, field: String, columns: String },
    #[error("`{}`: column `{field}` holds no text but {found}; --text-field names the one to read", path.display())]
    ColumnType { path: PathBuf, field: String, found: String },
    #[error("the data holds no text: {inputs}{}", skipped_suffix(skipped))]
    NoText { inputs: String, skipped: Skipped },
    #[error("`{}`: {source}", path.display())]
    Tokenize { path: PathBuf, source: param_model::Error },
    #[error(transparent)]
    Tokenizer(#[from] param_model::Error),
    #[error("`{}`: the disk is full; free some space or point the output elsewhere", path.display())]
    DiskFull { path: PathBuf },
    #[error("`{}`: cannot write: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("`{}`: token shards are damaged: {problem}; delete the folder to have them rebuilt", path.display())]
    Damaged { path: PathBuf, problem: String },
    #[error("held-out fraction {fraction}: expected a number above 0 and below 1")]
    Fraction { fraction: f64 },
    #[error(
        "the {part} has {n_token} tokens, less than one context of {context} and its last target; \
         use more data, a smaller context, or another split"
    )]
    TooShort { part: String, n_token: u64, context: usize },
    #[error("`{}`: made with a tokenizer of {shard} tokens, not with this one of {tokenizer}", path.display())]
    OtherTokenizer { path: PathBuf, shard: u64, tokenizer: u64 },
    #[error("the tokenizer has no end-of-text token, by which rows of one document are padded; use packed rows")]
    NoEndOfText,
    #[error("a mixture needs at least one data set")]
    EmptyMixture,
    #[error("`{name}`: weight {weight}: expected a positive number")]
    Weight { name: String, weight: f64 },
    #[error("cancelled")]
    Cancelled,
}

impl DataError {
    pub(super) fn read(path: &Path, source: io::Error) -> Self {
        Self::Read { path: path.to_owned(), source }
    }

    pub(super) fn write(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path },
            _ => Self::Write { path, source },
        }
    }

    /// Says in addition which data set of a mixture it is about.
    pub(crate) fn of_dataset(self, name: &str) -> Self {
        match self {
            Self::TooShort { part, n_token, context } if !name.is_empty() => {
                Self::TooShort { part: format!("{part} of `{name}`"), n_token, context }
            }
            other => other,
        }
    }

    pub(super) fn damaged(path: &Path, problem: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), problem: problem.into() }
    }
}

fn wanted_suffix(wanted: &[String]) -> String {
    if wanted.is_empty() { String::new() } else { format!(" with extension {}", wanted.join(", ")) }
}

fn skipped_suffix(skipped: &Skipped) -> String {
    if skipped.is_empty() { String::new() } else { format!(" (skipped {skipped})") }
}
