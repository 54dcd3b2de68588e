//! Everything that can go wrong, each error naming what it is about and what to do.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use bytemuck::Zeroable;
use bytemuck::allocation::try_zeroed_vec;
use gguf::GgmlType;

use crate::kv_cache::CacheType;

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// A failure to open or run a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
// A cause that is part of the message is no `source`: whoever prints the chain would print it twice.
#[allow(missing_docs)] // the fields are those of the messages
pub enum Error {
    #[error("{}: {cause}", path.display())]
    File { path: PathBuf, cause: Box<Error> },
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    #[error(transparent)]
    Model(#[from] param_model::Error),
    #[error("tensor `{name}` is missing: the file does not hold the model its metadata describes")]
    MissingTensor { name: String },
    #[error("tensor `{name}`: expected {expected:?}, got {got:?}")]
    Shape { name: String, expected: Vec<u64>, got: Vec<u64> },
    #[error("tensor `{name}` has no place in the model that the metadata describes")]
    UnexpectedTensor { name: String },
    #[error("tensor `{name}` ({ty}): {cause}")]
    TensorType { name: String, ty: GgmlType, cause: param_ggml::Error },
    #[error("the file has no tokenizer: convert the model again with its tokenizer.json, or work with token ids")]
    NoTokenizer,
    #[error("token {token} is outside the vocabulary of {n_vocab}")]
    Token { token: u32, n_vocab: usize },
    #[error("no token to start from: give a prompt of at least one token")]
    EmptyContext,
    #[error(
        "{n_new} more tokens do not fit after {n_past} in a context of {n_ctx}: shorten the prompt, or let the context overflow"
    )]
    ContextFull { n_past: usize, n_new: usize, n_ctx: usize },
    #[error("a context of {requested} tokens: this model has positions for 1 to {n_ctx}")]
    ContextLength { requested: usize, n_ctx: usize },
    #[error("out of memory: {what} needs {bytes} bytes")]
    OutOfMemory { what: &'static str, bytes: usize },
    #[error("while computing {what}: {cause}")]
    Compute { what: String, cause: param_ggml::Error },
    #[error("while computing {what}: component {index} is {value}: the model file is damaged")]
    NotFinite { what: String, index: usize, value: f32 },
    #[error("every logit is NaN or -inf: the model file is damaged")]
    NoLogits,
    #[error("no GPU can be used: {0}")]
    NoGpu(param_cuda::NoGpu),
    #[error("on the GPU: {0}")]
    Gpu(param_cuda::Error),
    #[error(
        "the GPU has {available} bytes free, too few for {what}, which need {bytes}: leave blocks or experts to the CPU"
    )]
    GpuMemory { what: &'static str, bytes: u64, available: usize },
    #[error(
        "a cache of {requested:?} is not available on the GPU, which keeps this model's keys and values in {available:?}"
    )]
    GpuCacheType { requested: CacheType, available: CacheType },
    #[error("while computing on the GPU: a hidden state is not finite: the model file is damaged")]
    GpuNotFinite,
    #[error("hidden states can be shown on the CPU only: open the model there")]
    GpuTrace,
    #[error("sampling option {option} is {value}: expected {expected}")]
    Sampling { option: &'static str, value: f32, expected: &'static str },
}

// By hand: as a `#[from]` it would be the source as well, and whoever prints the chain would print it twice.
impl From<param_cuda::Error> for Error {
    fn from(error: param_cuda::Error) -> Error {
        Error::Gpu(error)
    }
}

/// `n` zeros that cost nothing until they are touched, or an error where the system refuses the memory.
pub(crate) fn zeroed<T: Zeroable>(what: &'static str, n: usize) -> Result<Vec<T>> {
    let refused = |()| Error::OutOfMemory { what, bytes: n.saturating_mul(size_of::<T>()) };
    try_zeroed_vec(n).map_err(refused)
}

/// Like [`Vec::resize`], or an error where the system refuses the memory.
pub(crate) fn resize<T: Clone + Default>(what: &'static str, buffer: &mut Vec<T>, n: usize) -> Result<()> {
    let bytes = n.saturating_mul(size_of::<T>());
    buffer.try_reserve_exact(n.saturating_sub(buffer.len())).map_err(|_| Error::OutOfMemory { what, bytes })?;
    buffer.resize(n, T::default());
    Ok(())
}

/// The first failure inside a parallel step.
#[derive(Default)]
pub(crate) struct FirstError(Mutex<Option<Error>>);

impl FirstError {
    /// Takes note of a failure.
    pub fn keep(&self, result: Result<()>) {
        if let Err(error) = result
            && let Ok(mut slot) = self.0.lock()
        {
            slot.get_or_insert(error);
        }
    }

    /// The failure noted, if any.
    pub fn into_result(self) -> Result<()> {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }
}
