//! The integration tests, one binary.

mod command;
mod fixture;
mod golden;
mod pipeline;
