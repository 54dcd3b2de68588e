//! What can be wrong with a GGUF file or with what is to be written into one.

use std::path::PathBuf;

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// An error that names the file, key or tensor and says what was expected of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the fields are those of the messages
pub enum Error {
    // The cause is part of the message, and hence no `source`: whoever prints the chain would print it twice.
    #[error("{}: {error}", path.display())]
    File { path: PathBuf, error: Box<Error> },
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("not a GGUF file: it starts with {found:02x?} instead of `GGUF`")]
    Magic { found: Vec<u8> },
    #[error("a big-endian GGUF file: convert it to little-endian first (gguf-py has gguf_convert_endian.py)")]
    BigEndian,
    #[error("GGUF version {found} is not supported: expected 2 or 3")]
    Version { found: u32 },
    #[error("{what} at byte {at}: needs {needed} bytes, the file has {left} left (truncated or corrupt)")]
    Truncated { what: &'static str, at: u64, needed: u64, left: u64 },
    #[error("{what} at byte {at}: {problem}")]
    Malformed { what: &'static str, at: u64, problem: String },
    #[error("metadata key `{key}` is missing")]
    MissingKey { key: String },
    #[error("metadata key `{key}` is there twice")]
    DuplicateKey { key: String },
    #[error("metadata key `{key}`: expected {expected}, found {found}")]
    KeyType { key: String, expected: &'static str, found: String },
    #[error("metadata key `{key}`: {problem}")]
    Key { key: String, problem: String },
    #[error("tensor `{name}` is missing")]
    MissingTensor { name: String },
    #[error("tensor `{name}` is there twice")]
    DuplicateTensor { name: String },
    #[error("tensor `{name}`: {problem}")]
    Tensor { name: String, problem: String },
    #[error("part of a split model: {problem}")]
    Split { problem: String },
    #[error("`{name}` is not a tensor type: expected one of {known}")]
    UnknownTypeName { name: String, known: String },
}
