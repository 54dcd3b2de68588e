//! The two GELUs where a product's sums pass by.

use std::ops::Range;

use param_kernels::Kernels;
use param_model::Activation;

use super::values::Values;

/// Most columns that a product's sums come with.
const WIDEST: usize = 512;

/// `x = gelu(x)`.
pub fn in_place(kind: Activation, x: &mut [f32]) {
    let kernels = Kernels::get();
    let no_bias = &[0.0; WIDEST][..x.len()];
    match kind {
        Activation::GeluErf => kernels.bias_gelu_erf(no_bias, x.len(), x),
        Activation::GeluTanh => kernels.bias_gelu_tanh(no_bias, x.len(), x),
    }
}

/// Given a part of the gradient of `gelu(pre)`, the columns `cols` of row `row`: writes that part of the gradient of `pre`, and of
/// `gelu(pre)` itself, which was not kept.
pub fn backward(
    kind: Activation,
    pre: &Values,
    row: usize,
    cols: Range<usize>,
    grad: &mut [f32],
    (dpre, hidden): (&mut [u32], &mut [u32]),
) {
    let mut buffer = [0.0; WIDEST];
    let kernels = Kernels::get();
    let x = &mut buffer[..cols.len()];
    pre.ask(row + 1, cols.clone());
    pre.load(row, cols, x);
    match kind {
        Activation::GeluErf => kernels.gelu_erf_backward(x, grad),
        Activation::GeluTanh => kernels.gelu_tanh_backward(x, grad),
    }
    pre.precision.store(kernels, grad, dpre);
    pre.precision.store(kernels, x, hidden);
}
