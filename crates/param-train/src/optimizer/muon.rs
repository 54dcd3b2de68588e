//! Muon (Jordan et al. 2024): momentum whose singular values are all made one, by products alone.
//!
//! A matrix `X` [m, n] of singular values `s` becomes one of `p(s)` by `X p(X^T X)`, `p` an odd polynomial. Some polynomials of
//! degree 5 one after another take every `s` from a least one up to 1 close to 1. Since all of them are functions of the Gram
//! matrix `G` of the shorter side, `X` itself is read twice only: to make `G` and to multiply it by what they amount to.

use std::ops::Range;
use std::sync::OnceLock;

use param_kernels::{Factor, Kernels, Matrix, Precision, Product, Workspace};
use serde::{Deserialize, Serialize};

/// Muon's settings.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Muon {
    /// Highest learning rate of the matrices it moves, which follows the schedule of the others.
    pub lr: f32,
    /// Decay of the running sum of gradients.
    pub momentum: f32,
}

/// Root mean square of an update at a learning rate of 1, whatever the shape: about AdamW's, so that learning rates and weight
/// decay carry over (Liu et al. 2025).
const RMS: f32 = 0.2;

/// Polynomials of an orthogonalisation.
const N_POLYNOMIAL: usize = 5;
/// Singular values from here up to 1 end within an eighth of 1; smaller ones are raised by the same factors and stay below.
const LEAST: f64 = 1e-3;

/// Columns of a symmetric product that are computed together: the narrower, the less of its lower half is computed for nothing.
const SYMMETRIC_STRIP: usize = 64;

/// What one thread orthogonalises in; grows to what was needed most.
#[derive(Default)]
pub struct Scratch {
    workspace: Workspace,
    update: Vec<f32>,       // [n_row, n_col]
    squares: [Vec<f32>; 4], // [m, m] each
}

impl Muon {
    /// The usual decay of the running sum.
    pub const MOMENTUM: f32 = 0.95;
    /// Its learning rate over AdamW's, where nothing else is said.
    pub const LR_RATIO: f32 = 1.2;

    /// One step of a matrix `p` [n_row, n_col] at learning rate `lr`, keeping `keep` of it. The gradient, read times `grad_scale`,
    /// becomes zero; `sum` is the running sum of gradients.
    pub(super) fn step(
        &self,
        scratch: &mut Scratch,
        (p, g, sum): (&mut [f32], &mut [f32], &mut [f32]),
        (n_row, n_col): (usize, usize),
        (lr, grad_scale, keep): (f32, f32, f32),
    ) {
        let kernels = Kernels::get();
        let mut update = std::mem::take(&mut scratch.update);
        update.clear();
        update.extend_from_slice(g);
        g.fill(0.0);
        // Nesterov's look ahead: sum = momentum sum + g, update = momentum sum + g.
        sum.iter_mut().for_each(|s| *s *= self.momentum);
        kernels.axpy(grad_scale, &update, sum);
        update.iter_mut().for_each(|u| *u *= grad_scale);
        kernels.axpy(self.momentum, sum, &mut update);
        let size = lr * RMS * (n_row.max(n_col) as f32).sqrt();
        p.iter_mut().for_each(|p| *p *= keep);
        orthogonalise(kernels, scratch, &update, (n_row, n_col), |from, part| {
            kernels.axpy(-size, part, &mut p[from..from + part.len()]);
        });
        scratch.update = update;
    }
}

/// Hands `each(start, part)` the matrix `x` [n_row, n_col] with its singular values made one, part by part of its rows. Nothing if
/// `x` is zero.
fn orthogonalise(
    kernels: &Kernels,
    scratch: &mut Scratch,
    x: &[f32],
    (n_row, n_col): (usize, usize),
    mut each: impl FnMut(usize, &mut [f32]),
) {
    let x = Matrix::f32(x, n_row, n_col);
    let is_wide = n_row <= n_col;
    let m = n_row.min(n_col);
    let Scratch { workspace, squares, .. } = scratch;
    squares.iter_mut().for_each(|square| square.resize(m * m, 0.0));
    let [gram, power, step, total] = squares.each_mut().map(|square| &mut square[..m * m]);

    let (left, right) = if is_wide { (x.factor(), x.t()) } else { (x.t(), x.factor()) };
    symmetric(kernels, workspace, (left, right), gram, m);
    // The largest singular value is at most the fourth root of the sum of all their fourth powers.
    let largest_squared = kernels.sum_of_squares(gram).sqrt();
    if !(largest_squared > 0.0 && largest_squared.is_finite()) {
        return;
    }
    let scale = (1.0 / largest_squared) as f32;
    gram.iter_mut().for_each(|g| *g *= scale);
    for (i, &[a, b, c]) in polynomials().iter().enumerate() {
        // step = a + b G + c G^2.
        symmetric(kernels, workspace, (square(gram, m), square(gram, m)), power, m);
        for (step, (&g, &g2)) in step.iter_mut().zip(gram.iter().zip(&*power)) {
            *step = b * g + c * g2;
        }
        step.iter_mut().step_by(m + 1).for_each(|diagonal| *diagonal += a);
        if i == 0 {
            total.copy_from_slice(step);
        } else {
            symmetric(kernels, workspace, (square(step, m), square(total, m)), power, m);
            total.copy_from_slice(power);
        }
        if i + 1 < N_POLYNOMIAL {
            symmetric(kernels, workspace, (square(step, m), square(gram, m)), power, m);
            symmetric(kernels, workspace, (square(step, m), square(power, m)), gram, m);
        }
    }
    let root = scale.sqrt();
    total.iter_mut().for_each(|t| *t *= root);
    let product = match is_wide {
        true => Product::new(Precision::F32, square(total, m), x.factor()),
        false => Product::new(Precision::F32, x.factor(), square(total, m)),
    };
    for cols in parts(n_col, product.strip()) {
        product.compute(kernels, 0..n_row, cols.clone(), workspace, |row, sums| each(row * n_col + cols.start, sums));
    }
}

fn square(values: &[f32], m: usize) -> Factor<'_> {
    Matrix::f32(values, m, m).factor()
}

/// Products that are symmetric because their factors commute: the upper half is computed, the lower copied.
fn symmetric(
    kernels: &Kernels,
    workspace: &mut Workspace,
    (left, right): (Factor, Factor),
    out: &mut [f32], // [m, m]
    m: usize,
) {
    let product = Product::new(Precision::F32, left, right);
    for cols in parts(m, SYMMETRIC_STRIP) {
        product.compute(kernels, 0..cols.end, cols.clone(), workspace, |row, sums| {
            out[row * m + cols.start..][..sums.len()].copy_from_slice(sums);
        });
        for row in cols.clone() {
            for col in 0..row {
                out[row * m + col] = out[col * m + row];
            }
        }
    }
}

fn parts(n: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..n).step_by(size).map(move |first| first..n.min(first + size))
}

/// Coefficients of `a s + b s^3 + c s^5`, one polynomial after another.
pub(crate) fn polynomials() -> &'static [[f32; 3]; N_POLYNOMIAL] {
    static COMPUTED: OnceLock<[[f32; 3]; N_POLYNOMIAL]> = OnceLock::new();
    COMPUTED.get_or_init(|| {
        let mut least = LEAST;
        let mut most = 1.0;
        [(); N_POLYNOMIAL].map(|()| {
            let (coefficients, error) = best_polynomial(least, most);
            (least, most) = (1.0 - error, 1.0 + error);
            coefficients.map(|c| c as f32)
        })
    })
}

/// The odd polynomial of degree 5 whose largest distance from 1 on `[least, most]` is least, and that distance: each of the best
/// maps its interval to the next one's (Amsel et al. 2025). Found by Remez' exchange: it has the distance at four points by turns.
fn best_polynomial(least: f64, most: f64) -> ([f64; 3], f64) {
    let mut inner = [least + (most - least) / 3.0, least + (most - least) * 2.0 / 3.0];
    let mut best = ([1.0, 0.0, 0.0], 1.0);
    for _ in 0..100 {
        let points = [least, inner[0], inner[1], most];
        // p(x_i) + (-1)^i error = 1: below 1 at the least, by Gaussian elimination.
        let mut rows = [[0.0f64; 5]; 4];
        for (i, (row, x)) in rows.iter_mut().zip(points).enumerate() {
            *row = [x, x.powi(3), x.powi(5), if i % 2 == 0 { 1.0 } else { -1.0 }, 1.0];
        }
        let Some([a, b, c, error]) = solve(rows) else { return best };
        best = ([a, b, c], error.abs());
        // p'(x) = a + 3 b x^2 + 5 c x^4 has the inner points as its roots.
        let discriminant = 9.0 * b * b - 20.0 * a * c;
        if !(discriminant > 0.0 && c != 0.0) {
            return best;
        }
        let roots = [-1.0, 1.0].map(|sign| ((-3.0 * b + sign * discriminant.sqrt()) / (10.0 * c)).max(0.0).sqrt());
        let next = [roots[0].min(roots[1]), roots[0].max(roots[1])].map(|x| x.clamp(least, most));
        let moved = (next[0] - inner[0]).abs() + (next[1] - inner[1]).abs();
        inner = next;
        if moved < 1e-14 {
            break;
        }
    }
    best
}

/// Solves a system of four equations, [coefficients, right side] a row; `None` if it has no one solution.
fn solve(mut rows: [[f64; 5]; 4]) -> Option<[f64; 4]> {
    for i in 0..4 {
        let pivot = (i..4).max_by(|&a, &b| rows[a][i].abs().total_cmp(&rows[b][i].abs()))?;
        rows.swap(i, pivot);
        let row = rows[i];
        if row[i].abs() < 1e-300 {
            return None;
        }
        for (_, other) in rows.iter_mut().enumerate().filter(|(j, _)| *j != i) {
            let factor = other[i] / row[i];
            other.iter_mut().zip(row).for_each(|(o, r)| *o -= factor * r);
        }
    }
    Some(std::array::from_fn(|i| rows[i][4] / rows[i][i]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn polynomial([a, b, c]: [f64; 3], s: f64) -> f64 {
        s * (a + s * s * (b + s * s * c))
    }

    #[test]
    fn polynomials_take_singular_values_from_the_least_up_to_one() {
        let all = polynomials().map(|p| p.map(f64::from));
        let end = |s: f64| all.iter().fold(s, |s, &p| polynomial(p, s));
        let n = 10_000;
        let far =
            (0..=n).map(|i| (end(LEAST + (1.0 - LEAST) * f64::from(i) / f64::from(n)) - 1.0).abs()).fold(0.0, f64::max);
        assert!(far < 0.12, "as far as {far} from 1");
        assert!(end(0.0) == 0.0 && end(LEAST / 10.0) > 0.05 && end(LEAST / 10.0) < 1.0);
    }

    /// The same by whole products in f64, `X` itself taken through every polynomial.
    fn naive(x: &[f32], (n_row, n_col): (usize, usize)) -> Vec<f64> {
        let (wide, m, n) = if n_row <= n_col { (true, n_row, n_col) } else { (false, n_col, n_row) };
        let at = |i: usize, j: usize| f64::from(if wide { x[i * n_col + j] } else { x[j * n_col + i] });
        let mut y = (0..m).map(|i| (0..n).map(|j| at(i, j)).collect::<Vec<_>>()).collect::<Vec<_>>();
        let gram = |y: &[Vec<f64>]| {
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            y.iter().map(|a| y.iter().map(|b| dot(a, b)).collect::<Vec<_>>()).collect::<Vec<_>>()
        };
        let by = |a: &[Vec<f64>], b: &[Vec<f64>]| {
            let mut out = vec![vec![0.0; b[0].len()]; a.len()];
            for (out, a) in out.iter_mut().zip(a) {
                for (a, b) in a.iter().zip(b) {
                    out.iter_mut().zip(b).for_each(|(o, b)| *o += a * b);
                }
            }
            out
        };
        let norm = gram(&y).iter().flatten().map(|g| g * g).sum::<f64>().powf(0.25);
        y.iter_mut().flatten().for_each(|v| *v /= norm);
        for p in polynomials() {
            let [a, b, c] = p.map(f64::from);
            let g = gram(&y);
            let (gy, ggy) = (by(&g, &y), by(&g, &by(&g, &y)));
            for (y, (gy, ggy)) in y.iter_mut().flatten().zip(gy.iter().flatten().zip(ggy.iter().flatten())) {
                *y = a * *y + b * gy + c * ggy;
            }
        }
        let from = |i: usize, j: usize| if wide { y[i][j] } else { y[j][i] };
        (0..n_row * n_col).map(|e| from(e / n_col, e % n_col)).collect()
    }

    /// Error bound: 1e-3 of the size of an element, where singular values span three decades.
    #[test]
    fn an_update_is_the_orthogonal_factor_of_its_gradient() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        for (n_row, n_col) in [(1, 7), (8, 8), (24, 96), (96, 24), (130, 300), (300, 130)] {
            // Columns of falling size spread the singular values.
            let mut x = vec![0.0f32; n_row * n_col];
            for row in x.chunks_exact_mut(n_col) {
                for (j, x) in row.iter_mut().enumerate() {
                    *x = rng.random_range(-1.0..1.0f32) * 10f32.powf(-2.0 * j as f32 / n_col as f32);
                }
            }
            let want = naive(&x, (n_row, n_col));
            let mut got = vec![0.0f32; x.len()];
            orthogonalise(Kernels::get(), &mut Scratch::default(), &x, (n_row, n_col), |from, part| {
                got[from..from + part.len()].copy_from_slice(part);
            });
            let far = got.iter().zip(&want).map(|(g, w)| (f64::from(*g) - w).powi(2)).sum::<f64>().sqrt();
            let size = want.iter().map(|w| w * w).sum::<f64>().sqrt();
            assert!(far < 1e-3 * size, "{n_row} x {n_col}: {far} of {size}");
            // Its norm is that of as many singular values of one, but for those that were too small to be raised.
            let rank = n_row.min(n_col) as f64;
            assert!(size * size <= 1.25 * rank && size * size > 0.5 * rank, "{n_row} x {n_col}: {size}");
        }
    }

    #[test]
    fn a_step_moves_a_matrix_against_its_gradient_and_decays_it() {
        let muon = Muon { lr: 0.1, momentum: 0.5 };
        let (mut p, mut g, mut sum) = (vec![1.0f32; 4], vec![0.0f32; 4], vec![0.0f32; 4]);
        let mut scratch = Scratch::default();
        // No gradient: only decay.
        muon.step(&mut scratch, (&mut p, &mut g, &mut sum), (2, 2), (0.1, 1.0, 0.5));
        assert_eq!(p, [0.5; 4]);
        g.copy_from_slice(&[3.0, 0.0, 0.0, -3.0]);
        muon.step(&mut scratch, (&mut p, &mut g, &mut sum), (2, 2), (0.1, 2.0, 1.0));
        // Orthogonal already, of any size: each element moves by lr * RMS * sqrt(2).
        let moved = 0.1 * RMS * 2f32.sqrt();
        for (p, want) in p.iter().zip([0.5 - moved, 0.5, 0.5, 0.5 + moved]) {
            assert!((p - want).abs() < 0.12 * moved, "{p} for {want}");
        }
        assert_eq!((g, sum), (vec![0.0; 4], vec![6.0, 0.0, 0.0, -6.0]));
    }
}
