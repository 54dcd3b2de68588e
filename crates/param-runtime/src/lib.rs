//! Runs PARAM models inside any application: open a GGUF file, keep a [`Session`] per conversation, take text out.
//! Nothing here prints, exits, or panics on what a file or a user supplies; every failure is an [`Error`] that names its cause.

#![forbid(unsafe_code)]

mod activations;
mod batch;
mod candidates;
mod cuda;
mod engine;
mod error;
mod feed_forward;
mod forward;
mod generate;
mod kv_cache;
mod matmul;
mod model;
mod placement;
mod routing;
mod sampler;
mod scratch;
mod session;
mod text;
mod tiles;
mod trace;
mod weights;

pub use batch::Batch;
pub use error::{Error, Result};
pub use generate::{FinishReason, GenerateOptions, Generation, Overflow, Piece};
pub use kv_cache::CacheType;
pub use model::Model;
pub use placement::{Device, GpuDecode, ModelOptions};
pub use sampler::{Sampler, SamplerOptions};
pub use session::{Rows, Session, SessionOptions};
pub use trace::{Point, Trace};
