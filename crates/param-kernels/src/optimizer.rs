//! The arithmetic of an optimizer step over one stretch of parameters.

use crate::isa::{Isa, LANES};

/// Numbers of one step of AdamW: `m += gain1 (c g - m)`, `v = beta2 v + (1 - beta2) (c g)^2`,
/// `p = keep p - step_size m / (sqrt(v) root + eps)`.
#[derive(Clone, Copy, Debug)]
pub struct AdamWStep {
    /// Factor `c` of the gradients: what clips them.
    pub grad_scale: f32,
    /// 1 - beta1.
    pub gain1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Learning rate over `1 - beta1^t`.
    pub step_size: f32,
    /// `1 / sqrt(1 - beta2^t)`.
    pub root: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// 1 less what weight decay takes.
    pub keep: f32,
}

/// See [`crate::Kernels::adamw`].
#[inline(always)]
pub(crate) fn adamw<I: Isa>(p: &mut [f32], g: &mut [f32], m: &mut [f32], v: &mut [f32], step: &AdamWStep) {
    let AdamWStep { grad_scale, gain1, beta2, step_size, root, eps, keep } = *step;
    let n = p.len();
    assert!(g.len() == n && m.len() == n && v.len() == n);
    for i in 0..n {
        let scaled = g[i] * grad_scale;
        m[i] = I::madd(gain1, scaled - m[i], m[i]);
        v[i] = I::madd((1.0 - beta2) * scaled, scaled, beta2 * v[i]);
        p[i] = I::madd(-step_size, m[i] / I::madd(v[i].sqrt(), root, eps), p[i] * keep);
        g[i] = 0.0;
    }
}

/// See [`crate::Kernels::sum_of_squares`].
#[inline(always)]
pub(crate) fn sum_of_squares<I: Isa>(x: &[f32]) -> f64 {
    let mut acc = [0.0f64; 2 * LANES];
    let (blocks, rest) = x.as_chunks::<{ 2 * LANES }>();
    for block in blocks {
        for lane in 0..2 * LANES {
            let x = f64::from(block[lane]);
            acc[lane] += x * x;
        }
    }
    acc.iter().sum::<f64>() + rest.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kernels;
    use proptest::prelude::*;

    proptest! {
        /// Error bound: 1e-5 of what a parameter moves and of each moment, a few roundings.
        #[test]
        fn every_isa_takes_the_step_of_the_formula(
            rows in prop::collection::vec((-1.0f32..1.0, -1.0f32..1.0, -0.1f32..0.1, 0.0f32..0.1), 1..70), clip in 0.1f32..1.0,
        ) {
            let step = AdamWStep { grad_scale: clip, gain1: 0.1, beta2: 0.95, step_size: 1e-2, root: 1.5, eps: 1e-8, keep: 0.999 };
            for k in Kernels::supported() {
                let mut state: [Vec<f32>; 4] = Default::default();
                for &(p, g, m, v) in &rows {
                    state.iter_mut().zip([p, g, m, v]).for_each(|(to, x)| to.push(x));
                }
                let [p, g, m, v] = &mut state;
                let squares = k.sum_of_squares(g);
                let want_squares: f64 = g.iter().map(|&g| f64::from(g).powi(2)).sum();
                prop_assert!((squares - want_squares).abs() <= 1e-12 * want_squares);
                k.adamw(p, g, m, v, &step);
                for (i, &(p0, g0, m0, v0)) in rows.iter().enumerate() {
                    let [p0, g0, m0, v0] = [p0, g0, m0, v0].map(f64::from);
                    let c = f64::from(clip) * g0;
                    let m1 = m0 + f64::from(0.1f32) * (c - m0);
                    let v1 = f64::from(0.95f32) * v0 + f64::from(1.0 - 0.95f32) * c * c;
                    let moved = f64::from(1e-2f32) * m1 / (v1.sqrt() * 1.5 + 1e-8);
                    let p1 = p0 * f64::from(0.999f32) - moved;
                    let near = |got: f32, want: f64, size: f64| (f64::from(got) - want).abs() <= 1e-5 * size + 1e-7;
                    prop_assert!(near(m[i], m1, m0.abs() + c.abs()) && near(v[i], v1, v0 + c * c), "{}: moments", k.isa());
                    // The first moment may cancel: its rounding counts by its parts.
                    let slack = f64::from(1e-2f32) * (m0.abs() + c.abs()) / (v1.sqrt() * 1.5 + 1e-8);
                    prop_assert!(near(p[i], p1, p0.abs() + slack), "{}: {} for {p1}", k.isa(), p[i]);
                    prop_assert_eq!(g[i], 0.0);
                }
            }
        }
    }
}
