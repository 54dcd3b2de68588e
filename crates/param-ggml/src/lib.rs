//! ggml's number formats behind a safe face: quantize, dequantize and the dot product of every tensor type, from the
//! frozen ggml of `ggml-sys-bleedingedge`. ggml answers a wrong argument by aborting the process or reading past the
//! end; here everything is checked before the call, and what it cannot take is an [`Error`].
//!
//! F32, F16 and BF16 rows are converted in Rust (this ggml predates BF16), with no difference to the caller.

mod dot;
mod error;
mod init;
mod quantize;

pub use dot::DotKernel;
pub use error::{Error, Result};
pub use quantize::{can_quantize, dequantize, quantize};
