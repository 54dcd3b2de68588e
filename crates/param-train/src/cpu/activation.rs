//! The two GELUs over whole tensors, on all threads.

use param_kernels::Kernels;
use param_model::Activation;
use rayon::prelude::*;

/// Elements per task.
const PART: usize = 1 << 13;

/// `y = gelu(x)`.
pub fn forward(kind: Activation, x: &[f32], y: &mut [f32]) {
    let kernels = Kernels::get();
    x.par_chunks(PART).zip(y.par_chunks_mut(PART)).for_each(|(x, y)| match kind {
        Activation::GeluErf => kernels.gelu_erf(x, y),
        Activation::GeluTanh => kernels.gelu_tanh(x, y),
    });
}

/// Multiplies `grad` by the derivative at `x`.
pub fn backward(kind: Activation, x: &[f32], grad: &mut [f32]) {
    let kernels = Kernels::get();
    x.par_chunks(PART).zip(grad.par_chunks_mut(PART)).for_each(|(x, grad)| match kind {
        Activation::GeluErf => kernels.gelu_erf_backward(x, grad),
        Activation::GeluTanh => kernels.gelu_tanh_backward(x, grad),
    });
}
