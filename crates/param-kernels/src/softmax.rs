//! Softmax of a row in place, and log-sum-exp; both subtract the maximum first, so neither overflows.

use crate::isa::{Isa, LANES, fold_lanes, sum_map};
use crate::math::exp;

/// Largest element, `-inf` of an empty row. NaN is passed over: it resurfaces in the exponentials.
#[inline(always)]
pub(crate) fn max<I: Isa>(x: &[f32]) -> f32 {
    let mut best = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for chunk in whole {
        for i in 0..LANES {
            best[i] = if chunk[i] > best[i] { chunk[i] } else { best[i] };
        }
    }
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    rest.iter().fold(fold_lanes(best, larger), |m, &v| larger(m, v))
}

#[inline(always)]
pub(crate) fn softmax<I: Isa>(x: &mut [f32]) {
    let max = max::<I>(x);
    for v in x.iter_mut() {
        *v = exp::<I>(*v - max);
    }
    let inverse = 1.0 / sum_map(x.len(), |i| x[i]);
    for v in x.iter_mut() {
        *v *= inverse;
    }
}

#[inline(always)]
pub(crate) fn log_sum_exp<I: Isa>(x: &[f32]) -> f32 {
    let max = max::<I>(x);
    // All -inf: the sum is zero, and subtracting -inf would give NaN.
    if max == f32::NEG_INFINITY {
        return max;
    }
    max + sum_map(x.len(), |i| exp::<I>(x[i] - max)).ln()
}

/// See [`crate::Kernels::cross_entropy`].
#[inline(always)]
pub(crate) fn cross_entropy<I: Isa>(x: &mut [f32], target: usize, scale: f32) -> f32 {
    let max = max::<I>(x);
    let at_target = x[target];
    for v in x.iter_mut() {
        *v = exp::<I>(*v - max);
    }
    let sum = sum_map(x.len(), |i| x[i]);
    let inverse = scale / sum;
    for v in x.iter_mut() {
        *v *= inverse;
    }
    x[target] -= scale;
    sum.ln() + (max - at_target)
}

#[cfg(test)]
mod tests {
    use crate::Kernels;
    use proptest::prelude::*;

    fn log_sum_exp_reference(x: &[f32]) -> f64 {
        let max = x.iter().fold(f64::NEG_INFINITY, |m, &v| m.max(f64::from(v)));
        max + x.iter().map(|&v| (f64::from(v) - max).exp()).sum::<f64>().ln()
    }

    proptest! {
        /// Error bounds: 2e-6 of the scale for gradients, 1e-5 for the loss of logits up to 60 (their rounding).
        #[test]
        fn every_isa_differentiates_the_cross_entropy(
            x in prop::collection::vec(-60.0f32..60.0, 1..300), target in any::<prop::sample::Index>(), scale in 0.01f32..2.0,
        ) {
            let target = target.index(x.len());
            let lse = log_sum_exp_reference(&x);
            for k in Kernels::supported() {
                let mut got = x.clone();
                let loss = f64::from(k.cross_entropy(&mut got, target, scale));
                prop_assert!((loss - (lse - f64::from(x[target]))).abs() <= 1e-5, "{}: {loss}", k.isa());
                for (i, (&x, &got)) in x.iter().zip(&got).enumerate() {
                    let want = f64::from(scale) * ((f64::from(x) - lse).exp() - f64::from(u8::from(i == target)));
                    prop_assert!((f64::from(got) - want).abs() <= 2e-6 * f64::from(scale), "{}: {got} for {want}", k.isa());
                }
            }
        }

        /// Error bound: 1e-6 relative (exponential, sum of up to 500 terms, division) plus the smallest subnormals.
        #[test]
        fn every_isa_normalises(x in prop::collection::vec(-60.0f32..60.0, 1..500)) {
            let lse = log_sum_exp_reference(&x);
            for k in Kernels::supported() {
                let mut got = x.clone();
                k.softmax(&mut got);
                for (&x, &got) in x.iter().zip(&got) {
                    // The argument itself is rounded when the maximum is subtracted.
                    let want = (f64::from(x) - lse).exp();
                    prop_assert!((f64::from(got) - want).abs() <= 1e-5 * want + 1e-44, "{}: {got} for {want}", k.isa());
                }
                let got = f64::from(k.log_sum_exp(&x));
                prop_assert!((got - lse).abs() <= 1e-6 * lse.abs().max(1.0), "{}: {got} for {lse}", k.isa());
            }
        }
    }

    #[test]
    fn masked_entries_get_exactly_zero_and_nan_is_not_hidden() {
        for k in Kernels::supported() {
            let mut x = [1.0, f32::NEG_INFINITY, 1.0];
            k.softmax(&mut x);
            assert_eq!(x, [0.5, 0.0, 0.5]);
            assert_eq!(k.log_sum_exp(&[f32::NEG_INFINITY; 3]), f32::NEG_INFINITY);
            let mut x = [1.0, f32::NAN, 1.0];
            k.softmax(&mut x);
            assert!(x.iter().all(|v| v.is_nan()));
        }
    }
}
