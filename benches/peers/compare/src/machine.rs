//! What the machine can do at the moment, measured by `param-bench --machine`.

use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{Args, output};

/// Tests of `param-bench --machine`, the key of their result and the heading in the table.
pub const TESTS: [(&str, &str, &str); 4] = [
    ("read_bandwidth", "GB/s", "read GB/s"),
    ("int8_peak", "GOP/s", "int8 GOP/s"),
    ("bf16_peak", "GOP/s", "bf16 GFLOP/s"),
    ("f32_peak", "GOP/s", "f32 GFLOP/s"),
];

/// The probe, where this param-bench has one.
pub struct Machine<'a> {
    args: &'a Args,
    is_available: bool,
}

impl<'a> Machine<'a> {
    pub fn new(args: &'a Args) -> Machine<'a> {
        let probe = output(&mut command(args, 1));
        if let Err(error) = &probe {
            eprintln!("no bandwidth, peaks and shares in the table: this param-bench has no --machine ({error:#})");
        }
        Machine { args, is_available: probe.is_ok() }
    }

    /// One row for each test; none where there is no probe.
    pub fn measure(&self, n_thread: u16) -> Result<Vec<Value>> {
        if !self.is_available {
            return Ok(Vec::new());
        }
        let text = output(&mut command(self.args, n_thread))?;
        serde_json::from_str(&text).context("rows of param-bench --machine")
    }
}

fn command(args: &Args, n_thread: u16) -> Command {
    let mut command = args.program("param-bench");
    command.args(["--machine", "-t", &n_thread.to_string(), "-o", "json"]);
    command
}
