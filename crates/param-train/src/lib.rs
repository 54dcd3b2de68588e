//! Training of PARAM models: data, forward and backward passes, optimizer, schedule, checkpoints and the loop over them.
#![deny(unsafe_code)]

pub mod cpu;
pub mod data;
pub mod init;
pub mod optimizer;
pub mod random;
pub mod schedule;
