//! The PARAM toolkit: one package over the crates, for its binaries, integration tests and benches.
#![forbid(unsafe_code)]

pub mod cli;
pub mod device;
