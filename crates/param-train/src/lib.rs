//! Training of PARAM models: data, forward and backward passes, optimizer, schedule, checkpoints and the loop over them.
#![deny(unsafe_code)]

mod backend;
pub mod benchmark;
pub mod checkpoint;
pub mod cpu;
pub mod cuda;
pub mod data;
mod device;
mod error;
pub mod inherit;
pub mod init;
mod learner;
mod load;
pub mod memory;
pub mod metrics;
pub mod optimizer;
pub mod random;
pub mod recipe;
pub mod report;
pub mod sample;
pub mod schedule;
pub mod settings;
pub mod spikes;
pub mod trainer;

pub use backend::{BatchLosses, Evaluate, Learn, RouterLosses};
pub use device::Device;
pub use error::Error;
