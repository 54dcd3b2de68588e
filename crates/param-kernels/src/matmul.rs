//! General f32 matrix product over strided views: a safe face on the `gemm` crate.

use gemm::Parallelism;

/// A read-only [rows, cols] view whose element (i, j) lies at `i * row_stride + j * col_stride`.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A row-major matrix that fills `data`.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a {rows} x {cols} matrix");
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// `rows` rows of `cols` elements, `row_stride` apart, the first at the start of `data`.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(fits(data.len(), rows, cols, row_stride), "{rows} x {cols} by {row_stride} in {}", data.len());
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transposed view.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

fn fits(len: usize, rows: usize, cols: usize, row_stride: usize) -> bool {
    rows == 0
        || cols == 0
        || (cols <= row_stride && (rows - 1).checked_mul(row_stride).is_some_and(|n| n + cols <= len))
}

/// Where a product goes: as it is, or added to what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// `out = a b`.
    Replace,
    /// `out += a b`.
    Add,
}

/// `out = alpha a b` (or `+=`) with `out` row-major [a.rows, b.cols], its rows `out_stride` apart, on `n_thread` threads of
/// the current rayon pool. The result does not depend on `n_thread`.
///
/// # Panics
/// If the shapes do not fit together.
pub fn matmul(out: &mut [f32], out_stride: usize, write: Write, alpha: f32, a: Mat, b: Mat, n_thread: usize) {
    assert_eq!(a.cols, b.rows, "inner dimensions of a product");
    assert!(fits(out.len(), a.rows, b.cols, out_stride), "output of a {} x {} product", a.rows, b.cols);
    if a.rows == 0 || b.cols == 0 {
        return;
    }
    let parallelism = if n_thread > 1 { Parallelism::Rayon(n_thread) } else { Parallelism::None };
    let strides = |m: &Mat| (m.col_stride as isize, m.row_stride as isize);
    let ((a_cs, a_rs), (b_cs, b_rs)) = (strides(&a), strides(&b));
    // SAFETY: `fits` and the constructors of `Mat` hold every element that the strides reach inside its slice; `out` is
    // borrowed mutably, so it overlaps neither input.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            out.as_mut_ptr(),
            1,
            out_stride as isize,
            write == Write::Add,
            a.data.as_ptr(),
            a_cs,
            a_rs,
            b.data.as_ptr(),
            b_cs,
            b_rs,
            1.0,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Error bound: 1e-6 of the sum of absolute products, twice what 100 additions in f32 may lose.
        #[test]
        fn equals_the_naive_product_for_every_layout(
            (m, k, n) in (0usize..40, 1usize..100, 0usize..40), gap in 0usize..5, transposed in any::<[bool; 2]>(),
            add in any::<bool>(), n_thread in 1usize..4, seed in any::<u32>(),
        ) {
            let mut state = seed;
            let mut random = |n: usize| -> Vec<f32> {
                (0..n).map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as f32 / (1 << 23) as f32 - 1.0
                }).collect()
            };
            let mut matrix = |rows: usize, cols: usize, transposed: bool| {
                let (r, c) = if transposed { (cols, rows) } else { (rows, cols) };
                (random(r * (c + gap)), r, c)
            };
            let (a_data, a_r, a_c) = matrix(m, k, transposed[0]);
            let (b_data, b_r, b_c) = matrix(k, n, transposed[1]);
            let a = Mat::strided(&a_data, a_r, a_c, a_c + gap);
            let b = Mat::strided(&b_data, b_r, b_c, b_c + gap);
            let (a, b) = (if transposed[0] { a.t() } else { a }, if transposed[1] { b.t() } else { b });
            let before = random(m * (n + gap));
            let mut out = before.clone();
            let write = if add { Write::Add } else { Write::Replace };
            matmul(&mut out, n + gap, write, 0.5, a, b, n_thread);
            let at = |x: &Mat, i: usize, j: usize| f64::from(x.data[i * x.row_stride + j * x.col_stride]);
            for i in 0..m {
                for j in 0..n {
                    let products = (0..k).map(|l| at(&a, i, l) * at(&b, l, j));
                    let (sum, size) = products.fold((0.0, 0.0), |(s, t), p| (s + p, t + p.abs()));
                    let old = if add { f64::from(before[i * (n + gap) + j]) } else { 0.0 };
                    let got = f64::from(out[i * (n + gap) + j]);
                    prop_assert!((got - (old + 0.5 * sum)).abs() <= 1e-6 * (size + old.abs()), "{got} at {i}, {j}");
                }
                let gap_kept = (n..n + gap).all(|j| out[i * (n + gap) + j] == before[i * (n + gap) + j]);
                prop_assert!(gap_kept, "wrote between the rows");
            }
        }
    }
}
