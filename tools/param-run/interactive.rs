//! Conversation over standard input, and what Ctrl-C means in it.

use std::io::{self, BufRead, IsTerminal};
use std::process::exit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use param::cli::INTERRUPTED;
use param_runtime::{FinishReason, GenerateOptions, Rows, Session};

use crate::output::{Output, Timings, generate};

/// Ctrl-C: the first ends what is being generated; without anything to end, or a second time, it ends the program.
#[derive(Clone)]
pub struct Interrupt {
    happened: Arc<AtomicBool>,
    generating: Arc<AtomicBool>,
}

impl Interrupt {
    pub fn install() -> Result<Interrupt> {
        let interrupt = Interrupt { happened: Arc::default(), generating: Arc::default() };
        let handler = interrupt.clone();
        ctrlc::set_handler(move || {
            let again = handler.happened.swap(true, Ordering::SeqCst);
            if again || !handler.generating.load(Ordering::SeqCst) {
                eprintln!();
                exit(INTERRUPTED.into());
            }
        })
        .context("catching interrupts")?;
        Ok(interrupt)
    }

    /// Whether to end what is being generated.
    pub fn happened(&self) -> bool {
        self.happened.load(Ordering::SeqCst)
    }

    /// From now until the guard is dropped, an interruption ends the generation only.
    pub fn generating(&self) -> Generating {
        self.generating.store(true, Ordering::SeqCst);
        Generating(Arc::clone(&self.generating))
    }

    /// Takes note of an interruption that has done its work.
    fn clear(&self) {
        self.happened.store(false, Ordering::SeqCst);
    }
}

/// See [`Interrupt::generating`].
pub struct Generating(Arc<AtomicBool>);

impl Drop for Generating {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// Answers each line of standard input until its end, or until the context is full and may not overflow. What is in the
/// context already is answered first.
pub fn converse(
    session: &mut Session,
    options: &GenerateOptions,
    interrupt: &Interrupt,
    output: &mut Output,
    timings: &mut Timings,
) -> Result<()> {
    let stdin = io::stdin();
    let mut finish = match session.tokens() {
        [] => None,
        _ => answer(session, &[], options, interrupt, output, timings)?,
    };
    let mut line = String::new();
    while finish != Some(FinishReason::ContextFull) {
        if stdin.is_terminal() {
            eprint!("> ");
        }
        line.clear();
        if stdin.lock().read_line(&mut line)? == 0 {
            break;
        }
        // A begin-of-text belongs only where the context begins.
        let tokens = match (session.tokens(), session.model().tokenizer()) {
            ([_, ..], Some(tokenizer)) => tokenizer.encode(&line)?,
            _ => session.model().encode(&line)?,
        };
        finish = answer(session, &tokens, options, interrupt, output, timings)?;
    }
    Ok(())
}

/// One answer to the context with `tokens` added, which Ctrl-C ends.
fn answer(
    session: &mut Session,
    tokens: &[u32],
    options: &GenerateOptions,
    interrupt: &Interrupt,
    output: &mut Output,
    timings: &mut Timings,
) -> Result<Option<FinishReason>> {
    let generating = interrupt.generating();
    let start = Instant::now();
    session.prompt(tokens, options.overflow)?;
    session.forward(Rows::Last)?;
    timings.prefilled(tokens.len(), start.elapsed());
    let finish = generate(session, options, interrupt, output, timings)?;
    drop(generating);
    interrupt.clear();
    Ok(finish)
}
