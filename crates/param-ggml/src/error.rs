//! What can be wrong with a request to convert or multiply rows.

use gguf::GgmlType;

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// An error that says what was asked and what would do.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the fields are those of the messages
pub enum Error {
    #[error("{ty} cannot be {operation}")]
    Unsupported { ty: GgmlType, operation: &'static str },
    #[error("{what}: expected {expected}, found {found}")]
    Length { what: &'static str, expected: usize, found: usize },
    #[error("rows of {n_per_row} elements: {ty} needs a multiple of {block_size}, from one block to 31 bits")]
    RowLength { ty: GgmlType, n_per_row: usize, block_size: usize },
    #[error("element {index} is {value}: only finite numbers can be stored as {ty}")]
    NotFinite { index: usize, value: f32, ty: GgmlType },
    #[error("element {index} is {value}: too large for {ty}")]
    TooLarge { index: usize, value: f32, ty: GgmlType },
    #[error("importance {index} is {value}: expected a finite number of at least 0")]
    Importance { index: usize, value: f32 },
    #[error("{what} must be aligned to {align} bytes")]
    Misaligned { what: &'static str, align: usize },
    #[error("this program was built on a machine with {feature}, which this CPU lacks: build it here")]
    Cpu { feature: &'static str },
}
