//! The toolkit's commands, run as a user runs them.

use std::process::{Command, Output};

/// A command of the toolkit, from the folder in `PARAM_BIN` where the tests run on a machine that did not build them.
fn command(name: &str, built: &str) -> Command {
    match std::env::var_os("PARAM_BIN") {
        Some(folder) => Command::new(std::path::Path::new(&folder).join(name)),
        None => Command::new(built),
    }
}

pub fn param_train() -> Command {
    command("param-train", env!("CARGO_BIN_EXE_param-train"))
}

pub fn param_convert() -> Command {
    command("param-convert", env!("CARGO_BIN_EXE_param-convert"))
}

pub fn param_run() -> Command {
    command("param-run", env!("CARGO_BIN_EXE_param-run"))
}

pub fn param_bench() -> Command {
    command("param-bench", env!("CARGO_BIN_EXE_param-bench"))
}

/// Standard output of a command that must succeed.
pub fn output_of(command: &mut Command) -> String {
    outputs_of(command).0
}

/// Standard output and standard error of a command that must succeed.
pub fn outputs_of(command: &mut Command) -> (String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&stderr).into_owned();
    assert!(status.success(), "{command:?}: {status}\n{stderr}");
    (String::from_utf8(stdout).unwrap(), stderr)
}

/// Standard error of a command that must fail with this exit code, in good order.
pub fn failure_of(command: &mut Command, code: i32) -> String {
    let Output { status, stderr, .. } = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&stderr).into_owned();
    assert_eq!(status.code(), Some(code), "{command:?}: {status}\n{stderr}");
    assert!(!stderr.contains("panicked"), "{command:?}: {stderr}");
    stderr
}

/// The same command under a limit on the size of the files it writes, which stands in for a disk that fills up: writing
/// beyond it fails as on a full disk, with another error number.
#[cfg(unix)]
pub fn with_file_limit(command: &Command, n_byte: u64) -> Command {
    // POSIX counts the limit in blocks of 512 bytes. Where the signal is not ignored, it ends the process.
    let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"", n_byte / 512);
    let mut limited = Command::new("sh");
    limited.args(["-c", &script]).arg(command.get_program()).args(command.get_args());
    limited
}
