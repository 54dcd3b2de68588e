//! Output head and cross-entropy, fused over chunks of rows: the logits of a batch never exist whole.

use param_kernels::{Kernels, Mat, Write, matmul};
use rayon::prelude::*;

use super::buffers::Buffers;
use crate::data::IGNORED;

/// Rows of logits at a time: about 16 MiB, but enough rows that the product stays a matmul and not a matrix-vector one.
fn rows_per_chunk(n_vocab: usize) -> usize {
    ((4 << 20) / n_vocab).clamp(256, 4096)
}

/// Gradients that [`cross_entropy`] computes besides the loss.
pub struct Gradients<'a> {
    /// Factor of every target's loss in the total, e.g. one over their number.
    pub scale: f32,
    /// Replaced by the gradient of the input, [n_row, n_embd].
    pub dx: &'a mut [f32],
    /// Added to, [n_vocab, n_embd].
    pub dweight: &'a mut [f32],
}

/// Cross-entropy over the targets that count.
#[derive(Clone, Copy, Debug, Default)]
pub struct CrossEntropy {
    /// Sum of `-log softmax(logits)[target]`, nats.
    pub sum: f64,
    /// Targets that count.
    pub n_target: usize,
}

/// Cross-entropy of the logits `x W^T` against `targets` ([`IGNORED`] where none counts).
pub fn cross_entropy(
    x: &[f32],       // [n_row, n_embd]
    weight: &[f32],  // [n_vocab, n_embd]
    targets: &[i32], // [n_row]
    n_embd: usize,
    mut gradients: Option<Gradients>,
    buffers: &mut Buffers,
) -> CrossEntropy {
    let kernels = Kernels::get();
    let n_thread = rayon::current_num_threads();
    let n_vocab = weight.len() / n_embd;
    let rows = rows_per_chunk(n_vocab).min(targets.len());
    let weight = Mat::new(weight, n_vocab, n_embd);
    let mut buffer = buffers.take(rows * n_vocab);
    let mut loss = 0.0;
    for (i, targets) in targets.chunks(rows).enumerate() {
        let n_row = targets.len();
        let at = i * rows * n_embd..(i * rows + n_row) * n_embd;
        let x = Mat::new(&x[at.clone()], n_row, n_embd);
        let logits = &mut buffer[..n_row * n_vocab]; // [n_row, n_vocab]
        matmul(logits, n_vocab, Write::Replace, 1.0, x, weight.t(), n_thread);
        let scale = gradients.as_ref().map(|g| g.scale);
        let losses = logits.par_chunks_mut(n_vocab).zip(targets).map(|(logits, &target)| {
            let Ok(target) = usize::try_from(target) else {
                logits.fill(0.0); // its gradient
                return 0.0;
            };
            let at_target = logits[target];
            let log_sum = kernels.log_sum_exp(logits);
            if let Some(scale) = scale {
                kernels.softmax(logits);
                logits[target] -= 1.0;
                logits.iter_mut().for_each(|d| *d *= scale);
            }
            f64::from(log_sum - at_target)
        });
        loss += losses.collect::<Vec<f64>>().iter().sum::<f64>();
        if let Some(gradients) = &mut gradients {
            let dlogits = Mat::new(logits, n_row, n_vocab);
            matmul(&mut gradients.dx[at], n_embd, Write::Replace, 1.0, dlogits, weight, n_thread);
            matmul(gradients.dweight, n_embd, Write::Add, 1.0, dlogits.t(), x, n_thread);
        }
    }
    buffers.give(buffer);
    CrossEntropy { sum: loss, n_target: targets.iter().filter(|&&t| t != IGNORED).count() }
}
