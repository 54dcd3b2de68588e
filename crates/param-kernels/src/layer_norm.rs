//! Layer normalisation over the last dimension, biased variance, epsilon inside the root: forward and backward.

use crate::isa::{Isa, sum_map};

#[inline(always)]
pub(crate) fn layer_norm<I: Isa>(
    x: &[f32],        // [n_row, n_col]
    scale: &[f32],    // [n_col]
    shift: &[f32],    // [n_col]
    eps: f32,         //
    y: &mut [f32],    // [n_row, n_col]
    mean: &mut [f32], // [n_row]
    rstd: &mut [f32], // [n_row]
) {
    let n = scale.len();
    assert!(n > 0 && shift.len() == n && x.len() == n * mean.len() && y.len() == x.len() && rstd.len() == mean.len());
    for (((x, y), mean), rstd) in x.chunks_exact(n).zip(y.chunks_exact_mut(n)).zip(mean).zip(rstd) {
        *mean = sum_map(n, |i| x[i]) / n as f32;
        let m = *mean;
        let variance = sum_map(n, |i| (x[i] - m) * (x[i] - m)) / n as f32;
        *rstd = 1.0 / (variance + eps).sqrt();
        for i in 0..n {
            y[i] = I::madd((x[i] - m) * *rstd, scale[i], shift[i]);
        }
    }
}

#[inline(always)]
pub(crate) fn layer_norm_backward<I: Isa>(
    x: &[f32],          // [n_row, n_col]
    scale: &[f32],      // [n_col]
    mean: &[f32],       // [n_row]
    rstd: &[f32],       // [n_row]
    dy: &[f32],         // [n_row, n_col]
    dx: &mut [f32],     // [n_row, n_col], accumulated
    dscale: &mut [f32], // [n_col], accumulated
    dshift: &mut [f32], // [n_col], accumulated
) {
    let n = scale.len();
    assert!(n > 0 && dscale.len() == n && dshift.len() == n && x.len() == n * mean.len());
    assert!(dy.len() == x.len() && dx.len() == x.len() && rstd.len() == mean.len());
    let rows = x.chunks_exact(n).zip(dy.chunks_exact(n)).zip(dx.chunks_exact_mut(n));
    for (((x, dy), dx), (&mean, &rstd)) in rows.zip(mean.iter().zip(rstd)) {
        // With xhat = (x - mean) rstd and g = dy scale: dx = rstd (g - mean(g) - xhat mean(g xhat)).
        let g_mean = sum_map(n, |i| dy[i] * scale[i]) / n as f32;
        let g_xhat_mean = sum_map(n, |i| dy[i] * scale[i] * ((x[i] - mean) * rstd)) / n as f32;
        for i in 0..n {
            let xhat = (x[i] - mean) * rstd;
            dx[i] = I::madd(rstd, dy[i] * scale[i] - g_mean - xhat * g_xhat_mean, dx[i]);
            dscale[i] = I::madd(dy[i], xhat, dscale[i]);
            dshift[i] += dy[i];
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::Kernels;
    use proptest::prelude::*;

    const EPS: f32 = 1e-5;

    fn reference(x: &[f64], scale: &[f64], shift: &[f64]) -> Vec<f64> {
        let n = x.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
        let rstd = 1.0 / (variance + f64::from(EPS)).sqrt();
        (0..x.len()).map(|i| (x[i] - mean) * rstd * scale[i] + shift[i]).collect()
    }

    fn wide(x: &[f32]) -> Vec<f64> {
        x.iter().map(|&v| f64::from(v)).collect()
    }

    /// `n_row` rows of `n_col` values, then scale, shift and the gradient of the output.
    fn case() -> impl Strategy<Value = (usize, Vec<f32>, Vec<f32>, Vec<f32>, Vec<f32>)> {
        (1usize..4, 2usize..150).prop_flat_map(|(n_row, n_col)| {
            let row = prop::collection::vec(-2.0f32..2.0, n_col);
            let rows = prop::collection::vec(-2.0f32..2.0, n_row * n_col);
            (Just(n_col), rows.clone(), row.clone(), row, rows)
        })
    }

    proptest! {
        /// Error bounds: forward 2e-5 relative to the largest output; backward 1e-4 of the largest entry of the numerical gradient
        /// in f64; times rstd (at most 316) where that exceeds 1, as the mean's rounding counts more where numbers are nearly equal.
        #[test]
        fn every_isa_normalises_and_differentiates((n, x, scale, shift, dy) in case()) {
            let n_row = x.len() / n;
            let (wide_scale, wide_shift) = (wide(&scale), wide(&shift));
            for k in Kernels::supported() {
                let (mut y, mut mean, mut rstd) = (vec![0.0; x.len()], vec![0.0; n_row], vec![0.0; n_row]);
                k.layer_norm(&x, &scale, &shift, EPS, &mut y, &mut mean, &mut rstd);
                // Accumulation is part of the contract: start from ones.
                let (mut dx, mut dscale, mut dshift) = (vec![1.0; x.len()], vec![1.0; n], vec![1.0; n]);
                k.layer_norm_backward(&x, &scale, &mean, &rstd, &dy, &mut dx, &mut dscale, &mut dshift);

                let steepness: Vec<f64> = rstd.iter().map(|&r| f64::from(r).max(1.0)).collect();
                let (mut want_dscale, mut want_dshift) = (vec![1.0f64; n], vec![1.0f64; n]);
                for row in 0..n_row {
                    let at = row * n..(row + 1) * n;
                    let (x, dy) = (wide(&x[at.clone()]), wide(&dy[at.clone()]));
                    let want = reference(&x, &wide_scale, &wide_shift);
                    for (got, want) in y[at.clone()].iter().zip(&want) {
                        prop_assert!((f64::from(*got) - want).abs() <= 2e-5 * steepness[row] * want.abs().max(1.0), "{}: {got} for {want}", k.isa());
                    }
                    let loss = |x: &[f64]| -> f64 {
                        reference(x, &wide_scale, &wide_shift).iter().zip(&dy).map(|(y, d)| y * d).sum()
                    };
                    let want_dx: Vec<f64> = (0..n).map(|i| {
                        let (mut up, mut down) = (x.clone(), x.clone());
                        up[i] += 1e-5;
                        down[i] -= 1e-5;
                        1.0 + (loss(&up) - loss(&down)) / 2e-5
                    }).collect();
                    let largest = want_dx.iter().fold(1.0f64, |m, v| m.max(v.abs()));
                    for (got, want) in dx[at].iter().zip(&want_dx) {
                        prop_assert!((f64::from(*got) - want).abs() <= 1e-4 * steepness[row] * largest, "{}: dx {got} for {want}", k.isa());
                    }
                    let xhat = reference(&x, &vec![1.0; n], &vec![0.0; n]);
                    for i in 0..n {
                        want_dscale[i] += dy[i] * xhat[i];
                        want_dshift[i] += dy[i];
                    }
                }
                let steepest = steepness.iter().fold(1.0f64, |m, &s| m.max(s));
                for (got, want) in dscale.iter().chain(&dshift).zip(want_dscale.iter().chain(&want_dshift)) {
                    prop_assert!((f64::from(*got) - want).abs() <= 1e-4 * steepest * want.abs().max(1.0), "{}: {got} for {want}", k.isa());
                }
            }
        }
    }
}
