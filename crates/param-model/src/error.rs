//! What can go wrong with a model's files, each error naming the file, tensor or key and what was expected.

use std::path::PathBuf;

/// An error about a model definition, a checkpoint or a tokenizer.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // fields are named in the messages
pub enum Error {
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: std::io::Error },
    #[error("unknown preset `{name}`: expected one of {known}")]
    UnknownPreset { name: String, known: String },
    #[error("{origin}: {problem}")]
    Config { origin: String, problem: String },
    #[error("{}: not a usable checkpoint: {problem}", path.display())]
    Checkpoint { path: PathBuf, problem: String },
    #[error("{}: tensor `{tensor}`: {problem}", path.display())]
    Tensor { path: PathBuf, tensor: String, problem: String },
    #[error("{origin}: {problem}")]
    Tokenizer { origin: String, problem: String },
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    #[error("GGUF key `{key}`: {problem}")]
    Metadata { key: String, problem: String },
}
