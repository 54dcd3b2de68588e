//! `--tokenize-only`: the tokens of `--data`, and how fast they were made.

use std::io::{Write, stdout};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, Result};
use indicatif::{HumanBytes, HumanCount};
use param_model::atomic::write_file;
use param_model::checkpoint::TOKENIZER_FILE;
use param_train::memory;

use crate::args::Flags;
use crate::corpus::{DataChoice, TOKENS_FOLDER};

/// Tokenizes and prints the rate.
pub fn run(flags: &Flags, stop: &AtomicBool) -> Result<ExitCode> {
    let choice = DataChoice::from_flags(&flags.data, 0)?;
    let tokenizer = choice.tokenizer(&flags.data, || Ok(flags.model.config()?.n_vocab))?;
    let temporary;
    let cache = match &flags.out {
        Some(out) => out.join(TOKENS_FOLDER),
        None => {
            temporary = tempfile::tempdir().context("a temporary folder for tokens")?;
            temporary.path().to_owned()
        }
    };
    let start = Instant::now();
    let mixture = choice.everything(&cache, &tokenizer, stop)?;
    let seconds = start.elapsed().as_secs_f64();
    // Beside the tokens, so that a run which takes it finds them made already.
    let path = cache.join(TOKENIZER_FILE);
    write_file(&path, |out| out.write_all(tokenizer.json().as_bytes())).with_context(|| path.display().to_string())?;
    let indices = || mixture.datasets().iter().map(|dataset| dataset.part.shard().index());
    let n_byte = indices().map(|index| index.n_byte).sum::<u64>();
    let mut closing = format!(
        "{} of text, {} tokens in {seconds:.1} s: {:.1} MB/s on {} threads",
        HumanBytes(n_byte),
        HumanCount(mixture.n_token()),
        n_byte as f64 / 1e6 / seconds,
        flags.n_thread()
    );
    if let Some(bytes) = memory::peak() {
        closing += &format!(", {}", HumanBytes(bytes));
    }
    writeln!(stdout(), "{closing}")?;
    Ok(ExitCode::SUCCESS)
}
