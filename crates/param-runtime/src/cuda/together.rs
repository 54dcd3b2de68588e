//! One token each of many sequences at once: the pass that runs prompts, recorded once for so many rows, and the choice after it.

use param_cuda::{Chooser, Event, Forward, Row, Stream};
use rand::RngExt;

use super::ahead::{Request, is_greedy, sampling};
use crate::error::{Error, Result};

/// What choosing for many rows needs.
pub(crate) struct Together {
    chooser: Chooser,
    n_row_max: usize,
}

impl Together {
    pub fn new(stream: &Stream, n_row_max: usize, n_vocab: usize) -> Result<Together> {
        Ok(Together { chooser: Chooser::new(stream.gpu(), n_row_max, n_vocab)?, n_row_max })
    }

    /// Whether so many sequences can be decoded together.
    pub fn fits(&self, n_sequence: usize) -> bool {
        n_sequence <= self.n_row_max
    }

    /// Runs the last token of every context and chooses the next.
    pub fn sample(&mut self, stream: &Stream, forward: &mut Forward, requests: &mut [Request<'_>]) -> Result<Vec<u32>> {
        let n = requests.len();
        let mut rows = Vec::with_capacity(n);
        for request in requests.iter() {
            let Some((&token, past)) = request.context.split_last() else { return Err(Error::EmptyContext) };
            rows.push(Row { token, position: past.len() as u32, sequence: request.sequence as u32 });
        }
        forward.set_rows(&rows, &(0..n as u32).collect::<Vec<_>>())?;
        let likeliest = requests.iter().all(is_greedy);
        if !likeliest {
            for (row, request) in requests.iter_mut().enumerate() {
                let mut rng = request.sampler.rng().clone();
                let uniform = if request.sampler.options().temperature == 0.0 { 0.0 } else { rng.random() };
                self.chooser.set(row, &sampling(request.sampler, request.context), uniform)?;
                request.sampler.set_rng(rng);
            }
        }
        self.chooser.run(stream, forward, n, likeliest)?;
        Event::record(stream)?.synchronize()?;
        (0..n).map(|row| self.chooser.chosen(row).ok_or(Error::NoLogits)).collect()
    }
}
