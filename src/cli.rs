//! What every command line shares: exit codes, interrupts, and how bars look.

use std::fmt;
use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};

/// Version of the toolkit, with the revision and target it was built from.
pub const VERSION: &str = env!("PARAM_VERSION");

/// Exit code of a command that an interrupt ended: 128 + SIGINT, as shells count.
pub const INTERRUPTED: u8 = 130;

/// Something to be put right on the command line, as opposed to in a file: exit code 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Prints the error, if there is one, and gives the exit code: 2 for [`Usage`], 1 for any other. Output that its reader
/// has closed (`| head`) is none: the reader has enough.
pub fn exit_code(result: Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) {
            return ExitCode::SUCCESS;
        }
        eprintln!("error: {error:#}");
        ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
    })
}

/// A flag that the first Ctrl-C (or SIGTERM) sets, so that work ends in good order; a second one ends the process.
pub fn interrupt_flag() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    ctrlc::set_handler(move || {
        if set.swap(true, Ordering::Relaxed) {
            std::process::exit(INTERRUPTED.into());
        }
    })
    .context("catching interrupts")?;
    Ok(flag)
}

/// A bar of `total` steps in the toolkit's looks, with a message after it; hidden where stderr is no terminal.
pub fn bar(total: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:32} {percent:>3}%  {msg}  {eta} left").expect("a valid template");
    ProgressBar::new(total).with_style(style)
}
