//! The definition of a PARAM model that trainer, converter and runtime share: hyperparameters, the tensor table,
//! checkpoints, tokenizer and GGUF metadata.
#![deny(unsafe_code)]

pub mod atomic;
pub mod checkpoint;
mod config;
mod error;
pub mod metadata;
mod tensors;
mod tokenizer;

pub use checkpoint::{Checkpoint, CheckpointTensor};
pub use config::{Activation, Config};
pub use error::Error;
pub use tensors::{GGUF_HEAD, Init, Part, Role, TIED_HEAD, TensorSpec, mask_name, tensors};
pub use tokenizer::{Kind, TokenType, Tokenizer};
