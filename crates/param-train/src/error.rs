//! What can go wrong in training, each error naming the file or number and what to do.

use std::path::PathBuf;

use crate::data::DataError;

/// An error of a training run.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // fields are named in the messages
pub enum Error {
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Cuda(#[from] param_cuda::Error),
    #[error(transparent)]
    Model(#[from] param_model::Error),
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: std::io::Error },
    #[error("{}: not a training state: {problem}", path.display())]
    State { path: PathBuf, problem: String },
    #[error("{}: holds a run already (step {step}): continue it with --resume, or choose another folder", path.display())]
    RunExists { path: PathBuf, step: u64 },
    #[error("{}: no checkpoint to resume from", path.display())]
    NothingToResume { path: PathBuf },
    #[error(
        "step {step}: the loss became {loss}; the last checkpoint is whole: resume it with a lower --lr, \
         more --warmup or a smaller --clip"
    )]
    NotFinite { step: u64, loss: f64 },
    #[error("--{flag}: {problem}")]
    Setting { flag: &'static str, problem: String },
}
