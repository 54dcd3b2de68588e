//! What goes to standard output as it is generated, and how fast it came.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use anyhow::Result;
use param_runtime::{FinishReason, GenerateOptions, Session};

use crate::interactive::Interrupt;

/// Standard output: text as it comes, or token ids in one line.
pub struct Output {
    out: io::Stdout,
    ids: bool,
    n_token: usize,
}

impl Output {
    pub fn new(ids: bool) -> Output {
        Output { out: io::stdout(), ids, n_token: 0 }
    }

    fn piece(&mut self, token: Option<u32>, text: &str) -> io::Result<()> {
        match (self.ids, token) {
            (true, Some(id)) => write!(self.out, "{}{id}", if self.n_token > 0 { "," } else { "" })?,
            (true, None) => {}
            (false, _) => self.out.write_all(text.as_bytes())?,
        }
        self.n_token += usize::from(token.is_some());
        self.out.flush()
    }

    fn end(&mut self) -> io::Result<()> {
        writeln!(self.out)?;
        self.out.flush()
    }
}

/// How long each part took.
#[derive(Default)]
pub struct Timings {
    load: Duration,
    n_prefill: usize,
    prefill: Duration,
    n_token: usize,
    /// Tokens run one at a time, and how long that took: the first of an answer comes from the prompt's logits.
    n_decode: usize,
    decode: Duration,
}

impl Timings {
    pub fn new(load: Duration) -> Timings {
        Timings { load, ..Timings::default() }
    }

    /// `n` prompt tokens were run.
    pub fn prefilled(&mut self, n: usize, time: Duration) {
        self.n_prefill += n;
        self.prefill += time;
    }

    /// Whether any token was chosen.
    pub fn has_generated(&self) -> bool {
        self.n_token > 0
    }

    /// The closing line.
    pub fn line(&self, seed: Option<u64>) -> String {
        let rate = |n: usize, time: Duration| n as f64 / time.as_secs_f64();
        let mut line = format!("load {:.2} s", self.load.as_secs_f64());
        // Writing to a string cannot fail.
        if self.n_prefill > 0 {
            let _ =
                write!(line, " | prefill {} tokens, {:.1} tok/s", self.n_prefill, rate(self.n_prefill, self.prefill));
        }
        if self.n_token > 0 {
            let _ = write!(line, " | decode {} tokens", self.n_token);
        }
        if self.n_decode > 0 {
            let _ = write!(line, ", {:.1} tok/s", rate(self.n_decode, self.decode));
        }
        if let Some(seed) = seed {
            let _ = write!(line, " | seed {seed}");
        }
        line
    }
}

/// Continues the context until an end or an interruption, and says on standard error if the context is full.
pub fn generate(
    session: &mut Session,
    options: &GenerateOptions,
    interrupt: &Interrupt,
    output: &mut Output,
    timings: &mut Timings,
) -> Result<Option<FinishReason>> {
    if options.n_predict == Some(0) {
        return Ok(Some(FinishReason::Length));
    }
    let n_ctx = session.n_ctx();
    let mut generation = session.generate(options)?;
    let mut first = None;
    while !interrupt.happened() {
        let Some(piece) = generation.next().transpose()? else { break };
        if piece.token.is_some() {
            timings.n_token += 1;
            timings.n_decode += usize::from(first.is_some());
            first.get_or_insert_with(Instant::now);
        }
        output.piece(piece.token, &piece.text)?;
    }
    let finish = generation.finish_reason();
    timings.decode += first.map_or(Duration::ZERO, |first| first.elapsed());
    output.end()?;
    if finish == Some(FinishReason::ContextFull) {
        eprintln!("the context of {n_ctx} tokens is full: --overflow slide or --overflow window would go on");
    }
    Ok(finish)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closing_line_has_only_what_happened() {
        let mut timings = Timings::new(Duration::from_millis(120));
        assert_eq!(timings.line(None), "load 0.12 s");
        timings.prefilled(512, Duration::from_secs(2));
        assert_eq!(timings.line(None), "load 0.12 s | prefill 512 tokens, 256.0 tok/s");
        (timings.n_token, timings.n_decode, timings.decode) = (33, 32, Duration::from_secs(1));
        assert_eq!(
            timings.line(Some(7)),
            "load 0.12 s | prefill 512 tokens, 256.0 tok/s | decode 33 tokens, 32.0 tok/s | seed 7"
        );
    }
}
