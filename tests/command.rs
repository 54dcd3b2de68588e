//! The toolkit's commands, run as a user runs them.

use std::process::{Command, Output};

pub fn param_train() -> Command {
    Command::new(env!("CARGO_BIN_EXE_param-train"))
}

pub fn param_convert() -> Command {
    Command::new(env!("CARGO_BIN_EXE_param-convert"))
}

pub fn param_run() -> Command {
    Command::new(env!("CARGO_BIN_EXE_param-run"))
}

/// Standard output of a command that must succeed.
pub fn output_of(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Standard error of a command that must fail with this exit code.
pub fn failure_of(command: &mut Command, code: i32) -> String {
    let Output { status, stderr, .. } = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&stderr).into_owned();
    assert_eq!(status.code(), Some(code), "{command:?}: {stderr}");
    stderr
}
