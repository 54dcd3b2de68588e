//! Why there is no GPU, and what can fail on one.

use std::ffi::CStr;

use cudarc::driver::DriverError;

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// A failure on a GPU that was opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the fields are those of the messages
pub enum Error {
    #[error("{call} failed: {name}: {text}")]
    Call { call: &'static str, name: String, text: String },
    #[error("out of memory on the GPU: {what} needs {bytes} bytes, {free} of {total} are free")]
    OutOfMemory { what: &'static str, bytes: usize, free: usize, total: usize },
    #[error("the GPU path takes {what} up to {most}, this is {value}")]
    Limit { what: &'static str, value: usize, most: usize },
    #[error("the GPU path takes {what} {expected}, this is {value}")]
    Unfit { what: &'static str, expected: &'static str, value: usize },
    #[error("products by {matmul} need {problem}")]
    Matmul { matmul: &'static str, problem: String },
    #[error("kernel `{kernel}`: {cause}")]
    Kernel { kernel: &'static str, cause: Box<Error> },
}

impl Error {
    /// The same error, saying in which kernel.
    pub(crate) fn in_kernel(self, kernel: &'static str) -> Error {
        Error::Kernel { kernel, cause: Box::new(self) }
    }
}

/// Why no GPU can be used; each a sentence that a user can act on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the fields are those of the messages
pub enum NoGpu {
    #[error("no NVIDIA driver was found (libcuda is missing)")]
    NoDriver,
    #[error("the NVIDIA driver is too old: it supports CUDA {}.{}, at least {}.{} is needed", version / 1000, version % 1000 / 10, needed / 1000, needed % 1000 / 10)]
    OldDriver { version: i32, needed: i32 },
    #[error("the NVIDIA driver is too old: it lacks `{symbol}`")]
    MissingSymbol { symbol: &'static str },
    #[error("the NVIDIA driver finds no GPU")]
    NoDevice,
    #[error("the GPU, {name}, is too old: its compute capability is {}.{}, at least {}.{} is needed", capability.0, capability.1, needed.0, needed.1)]
    OldDevice { name: String, capability: (i32, i32), needed: (i32, i32) },
    #[error("the GPU cannot be opened: {0}")]
    Unusable(String),
}

/// Names the call that failed.
pub(crate) trait Named<T> {
    fn named(self, call: &'static str) -> Result<T>;
}

impl<T> Named<T> for std::result::Result<T, DriverError> {
    fn named(self, call: &'static str) -> Result<T> {
        self.map_err(|error| {
            let text = |text: std::result::Result<&CStr, DriverError>| {
                text.map_or_else(|_| format!("error {}", error.0 as u32), |text| text.to_string_lossy().into_owned())
            };
            Error::Call { call, name: text(error.error_name()), text: text(error.error_string()) }
        })
    }
}

/// Fails where `value` is more than `most`.
pub(crate) fn within(what: &'static str, value: usize, most: usize) -> Result<()> {
    if value > most { Err(Error::Limit { what, value, most }) } else { Ok(()) }
}
