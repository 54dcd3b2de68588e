//! Inner product and scaled addition.

use crate::isa::{Isa, LANES, madd_lanes, sum_lanes};

/// Naive twin: `sum_i a[i] b[i]` in f64.
#[cfg(test)]
pub(crate) fn dot_reference(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

#[inline(always)]
pub(crate) fn dot<I: Isa>(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let (a16, a_rest) = a.as_chunks::<LANES>();
    let (b16, b_rest) = b.as_chunks::<LANES>();
    // Four chains, because one fused multiply-add waits four cycles for the one before it.
    let mut acc = [[0.0f32; LANES]; 4];
    let (a64, a16) = a16.as_chunks::<4>();
    let (b64, b16) = b16.as_chunks::<4>();
    for (a, b) in a64.iter().zip(b64) {
        for chain in 0..4 {
            madd_lanes::<I>(&mut acc[chain], &a[chain], &b[chain]);
        }
    }
    for (a, b) in a16.iter().zip(b16) {
        madd_lanes::<I>(&mut acc[0], a, b);
    }
    let mut lanes = [0.0; LANES];
    for (i, lane) in lanes.iter_mut().enumerate() {
        *lane = (acc[0][i] + acc[1][i]) + (acc[2][i] + acc[3][i]);
    }
    let mut sum = sum_lanes(lanes);
    for (&a, &b) in a_rest.iter().zip(b_rest) {
        sum = I::madd(a, b, sum);
    }
    sum
}

#[inline(always)]
pub(crate) fn axpy<I: Isa>(alpha: f32, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    for (y, &x) in y.iter_mut().zip(x) {
        *y = I::madd(alpha, x, *y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kernels;
    use proptest::prelude::*;

    proptest! {
        /// Error bound: n * 2^-24 * sum |a b|, the classical bound for any order of summation.
        #[test]
        fn every_isa_computes_the_inner_product(pairs in prop::collection::vec((-3.0f32..3.0, -3.0f32..3.0), 0..300)) {
            let (a, b): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let want = dot_reference(&a, &b);
            let magnitude: f64 = a.iter().zip(&b).map(|(a, b)| f64::from((a * b).abs())).sum();
            let bound = (a.len() as f64 + 1.0) * 2f64.powi(-24) * magnitude + 1e-30;
            for k in Kernels::supported() {
                let got = f64::from(k.dot(&a, &b));
                prop_assert!((got - want).abs() <= bound, "{}: {got} for {want}", k.isa());
            }
        }

        /// Error bound: one rounding of the product and one of the sum.
        #[test]
        fn every_isa_adds_a_scaled_vector(alpha in -3.0f32..3.0, pairs in prop::collection::vec((-3.0f32..3.0, -3.0f32..3.0), 0..100)) {
            let (x, y): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            for k in Kernels::supported() {
                let mut got = y.clone();
                k.axpy(alpha, &x, &mut got);
                for i in 0..x.len() {
                    let product = f64::from(alpha) * f64::from(x[i]);
                    let want = product + f64::from(y[i]);
                    let bound = (product.abs() + want.abs()) * 2f64.powi(-23);
                    prop_assert!((f64::from(got[i]) - want).abs() <= bound, "{}: {} for {want}", k.isa(), got[i]);
                }
            }
        }
    }
}
