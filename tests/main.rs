//! The integration tests, one binary.

mod command;
mod golden;
