//! Generation as an iterator over pieces of text, and what happens when the context is full.

use crate::error::Result;
use crate::sampler::{Sampler, SamplerOptions};
use crate::session::Session;
use crate::text::TextStream;

/// What to do when the context is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overflow {
    /// End the generation.
    #[default]
    Stop,
    /// Keep the newest half of the context, run it again, and go on.
    Slide,
    /// Drop the oldest token at every step and run the whole window again with positions from 0: exactly what the reference
    /// implementation does, at the cost of a full context per token.
    Window,
}

/// What to generate, and until when.
#[derive(Clone, Debug, Default)]
pub struct GenerateOptions {
    /// At most this many tokens; `None`: until something else ends it.
    pub n_predict: Option<usize>,
    /// How tokens are chosen.
    pub sampling: SamplerOptions,
    /// Texts that end the generation; they are not part of the output.
    pub stop: Vec<String>,
    /// What to do when the context is full.
    pub overflow: Overflow,
    /// Go on past the end-of-text token.
    pub ignore_end_of_text: bool,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model predicted the end of the text.
    EndOfText,
    /// A stop string appeared.
    StopString,
    /// As many tokens as asked for.
    Length,
    /// The context is full and was not to overflow.
    ContextFull,
}

/// One step of a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The token chosen; `None` in the last piece, which only brings text that was held back.
    pub token: Option<u32>,
    /// Text that is now certain: whole characters, possibly none.
    pub text: String,
}

/// A running generation; each item costs one forward pass. Dropping it keeps what was generated in the session, so that
/// the conversation can go on.
pub struct Generation<'s> {
    session: &'s mut Session,
    sampler: Sampler,
    text: TextStream,
    n_left: Option<usize>,
    overflow: Overflow,
    end_of_text: Option<u32>,
    finish: Option<FinishReason>,
}

impl Session {
    /// Adds a prompt to the context. One that does not fit is an error with [`Overflow::Stop`]; otherwise the context keeps its
    /// newest tokens: all that fit with [`Overflow::Window`], half a context with [`Overflow::Slide`].
    ///
    /// # Errors
    /// As [`Session::push`].
    pub fn prompt(&mut self, tokens: &[u32], overflow: Overflow) -> Result<()> {
        let n_ctx = self.n_ctx();
        if tokens.len() <= n_ctx - self.tokens().len() || overflow == Overflow::Stop {
            return self.push(tokens);
        }
        let keep = if overflow == Overflow::Window { n_ctx } else { (n_ctx / 2).max(1) };
        let newest = &tokens[tokens.len().saturating_sub(keep)..];
        self.keep_newest(keep - newest.len());
        self.push(newest)
    }

    /// Continues the context. Without a tokenizer in the model, pieces have tokens and no text.
    ///
    /// # Errors
    /// [`crate::Error::Sampling`] for sampling options outside their range.
    pub fn generate(&mut self, options: &GenerateOptions) -> Result<Generation<'_>> {
        let end_of_text = self.model().tokenizer().and_then(|t| t.end_of_text());
        Ok(Generation {
            sampler: Sampler::new(&options.sampling)?,
            text: TextStream::new(&options.stop),
            n_left: options.n_predict,
            overflow: options.overflow,
            end_of_text: end_of_text.filter(|_| !options.ignore_end_of_text),
            finish: None,
            session: self,
        })
    }
}

impl Generation<'_> {
    /// Why it ended, once it has.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish
    }

    fn step(&mut self) -> Result<Piece> {
        if self.n_left == Some(0) {
            return Ok(self.finish(FinishReason::Length));
        }
        let is_full = self.session.tokens().len() == self.session.n_ctx();
        if is_full && self.overflow == Overflow::Stop {
            return Ok(self.finish(FinishReason::ContextFull));
        }
        let token = self.session.sample(&mut self.sampler)?;
        if Some(token) == self.end_of_text {
            return Ok(self.finish(FinishReason::EndOfText));
        }
        self.session.prompt(&[token], self.overflow)?;
        self.n_left = self.n_left.map(|n| n - 1);
        let bytes = self.session.model().tokenizer().map(|t| t.token_bytes(token)).unwrap_or_default();
        let (text, stopped) = self.text.push(&bytes);
        if stopped {
            self.finish = Some(FinishReason::StopString);
        }
        Ok(Piece { token: Some(token), text })
    }

    fn finish(&mut self, reason: FinishReason) -> Piece {
        self.finish = Some(reason);
        Piece { token: None, text: self.text.finish() }
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Result<Piece>> {
        if self.finish.is_some() {
            return None;
        }
        let piece = self.step();
        match &piece {
            // Nothing held back: there is no last piece.
            Ok(Piece { token: None, text }) if text.is_empty() => None,
            _ => Some(piece),
        }
    }
}
