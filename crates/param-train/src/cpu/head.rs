//! Output head and cross-entropy, fused over chunks of rows: the logits of a batch never exist whole.

use param_kernels::{Kernels, Matrix, Product};

use super::linear::{Write, backward_input, backward_weight};
use super::machine::Machine;
use super::values::Values;
use crate::data::IGNORED;

/// Rows of logits at a time: about 16 MiB, but enough rows that the product stays a matmul and not a matrix-vector one.
pub fn rows_per_chunk(n_vocab: usize) -> usize {
    ((4 << 20) / n_vocab).clamp(512, 4096)
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
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CrossEntropy {
    /// Sum of `-log softmax(logits)[target]`, nats.
    pub sum: f64,
    /// Targets that count.
    pub n_target: usize,
}

/// `logits = x W^T`.
pub fn logits(machine: &mut Machine, logits: &mut [f32], x: Matrix, weight: &[f32], n_embd: usize) {
    let n_vocab = weight.len() / n_embd;
    let n_row = logits.len() / n_vocab;
    let product = Product::new(machine.precision, x.factor(), Matrix::f32(weight, n_vocab, n_embd).t());
    machine.multiply([logits], (n_vocab, 1), &[0, n_row], |_| product, |[out], _, _, sums| out.copy_from_slice(sums));
}

/// Cross-entropy of the logits `x W^T` against `targets` ([`IGNORED`] where none counts).
pub fn cross_entropy(
    machine: &mut Machine,
    x: &Values,      // [n_row, n_embd]
    weight: &[f32],  // [n_vocab, n_embd]
    targets: &[i32], // [n_row]
    mut gradients: Option<Gradients>,
) -> CrossEntropy {
    let (kernels, precision) = (Kernels::get(), machine.precision);
    let n_embd = x.n_col;
    let n_vocab = weight.len() / n_embd;
    let rows = rows_per_chunk(n_vocab).min(targets.len());
    let n_word = precision.words(n_vocab);
    let mut buffer = machine.buffers.take(rows * n_vocab);
    let mut narrow = machine.buffers.take_words(if gradients.is_some() { rows * n_word } else { 0 });
    let mut losses = vec![0.0; targets.len()];
    for (i, (targets, losses)) in targets.chunks(rows).zip(losses.chunks_mut(rows)).enumerate() {
        let n_row = targets.len();
        let x = x.matrix().rows(i * rows..i * rows + n_row);
        let all = &mut buffer[..n_row * n_vocab]; // [n_row, n_vocab]
        logits(machine, all, x, weight, n_embd);
        let scale = gradients.as_ref().map(|g| g.scale);
        machine.team.for_each_chunks((all, n_vocab), (losses, 1), (&mut narrow, n_word), |i, logits, loss, words| {
            let Ok(target) = usize::try_from(targets[i]) else {
                words.fill(0); // its gradient
                return;
            };
            loss[0] = f64::from(kernels.cross_entropy(logits, target, scale.unwrap_or(1.0)));
            if scale.is_some() {
                precision.store(kernels, logits, words);
            }
        });
        if let Some(gradients) = &mut gradients {
            let dlogits = Matrix::new(precision, &narrow[..n_row * n_word], n_row, n_vocab);
            let dx = &mut gradients.dx[i * rows * n_embd..][..n_row * n_embd];
            backward_input(machine, dx, Write::Replace, dlogits, Matrix::f32(weight, n_vocab, n_embd), n_embd);
            backward_weight(machine, gradients.dweight, dlogits, x, n_embd);
        }
    }
    machine.buffers.give(buffer);
    machine.buffers.give_words(narrow);
    CrossEntropy { sum: losses.iter().sum(), n_target: targets.iter().filter(|&&t| t != IGNORED).count() }
}
