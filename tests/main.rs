//! The integration tests, one binary.

mod command;
mod cuda;
mod cuda_training;
mod fixture;
mod golden;
mod hostile;
mod pipeline;
mod python;
mod quality;
