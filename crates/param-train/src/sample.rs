//! Text from the model in training: the whole window is computed again for every token, which short samples can afford.

use param_kernels::Kernels;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::backend::Evaluate;
use crate::error::Error;

/// Sharpens the distribution a little: at 1 the tail of a young model drowns the rest.
const TEMPERATURE: f32 = 0.8;

/// `n` tokens that continue `ids` (not empty), drawn at temperature 0.8.
///
/// # Errors
/// What the model's device fails with.
pub fn sample(
    model: &mut (impl Evaluate + ?Sized),
    mut ids: Vec<u32>,
    n: usize,
    rng: &mut ChaCha8Rng,
) -> Result<Vec<u32>, Error> {
    let kernels = Kernels::get();
    let n_ctx = model.config().n_ctx;
    for _ in 0..n {
        let window = &ids[ids.len().saturating_sub(n_ctx)..];
        let mut probabilities = model.logits(window)?;
        probabilities.iter_mut().for_each(|logit| *logit /= TEMPERATURE);
        kernels.softmax(&mut probabilities);
        let mut left: f32 = rng.random();
        let next = probabilities.iter().position(|p| {
            left -= p;
            left < 0.0
        });
        // Rounding can leave a sliver beyond the last token.
        ids.push(next.unwrap_or(probabilities.len() - 1) as u32);
    }
    Ok(ids)
}
