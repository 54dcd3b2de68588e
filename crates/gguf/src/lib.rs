//! The GGUF container, version 3: metadata and tensors read from a memory map, and written as a stream.
//! It knows the file format and nothing of the models in it. Files are taken as hostile: whatever opens has been
//! checked in full, and what does not is an [`Error`], never a panic and never an allocation beyond the file's size.

#![deny(unsafe_code)]

mod error;
mod ggml_type;
mod metadata;
mod parse;
mod reader;
mod tensor;
mod value;
mod writer;

pub use error::{Error, Result};
pub use ggml_type::GgmlType;
pub use metadata::Metadata;
pub use reader::Gguf;
pub use tensor::TensorInfo;
pub use value::{Array, Value};
pub use writer::Writer;

/// First four bytes of every GGUF file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// The version written; version 2 has the same layout and is read too.
pub const VERSION: u32 = 3;
/// Metadata key of the alignment of tensor data.
pub const KEY_ALIGNMENT: &str = "general.alignment";
/// Alignment of tensor data where [`KEY_ALIGNMENT`] is absent, in bytes.
pub const DEFAULT_ALIGNMENT: u64 = 32;
/// Most dimensions a tensor can have.
pub const MAX_DIMS: usize = 4;
/// Longest tensor name written, in bytes: ggml holds names in 64 bytes with a final zero.
pub const MAX_TENSOR_NAME: usize = 63;
/// Longest metadata key, in bytes.
pub const MAX_KEY: usize = 65_535;
