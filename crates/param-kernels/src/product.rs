//! Products of matrices that change from call to call, as training multiplies them: both factors in f32 or bf16, transposed or not,
//! rows gathered or not. The right factor is packed into tiles strip by strip, and the tiles' own kernels do the rest.

use std::ops::Range;

use crate::Kernels;
use crate::isa::LANES;
use crate::matrix::{Factor, Precision};
use crate::packing::Packing;
use crate::tiles::TILE_ROWS;

/// Rows of the left factor that pass over packed tiles together.
const ROWS: usize = 32;
/// Words of packed tiles that stay in the second-level cache.
const PACKED: usize = 96 << 10;

/// What one thread needs to multiply; grows to what was needed most.
#[derive(Default)]
pub struct Workspace {
    tiles: Vec<u32>,    // [n_tile, n_word, 16]
    rows: Vec<u32>,     // [ROWS, n_word]
    products: Vec<f32>, // [ROWS, n_tile * 16], whole tiles of rows
    totals: Vec<f32>,   // [n_row, n_col] of a part of a product
}

/// The first `n` elements of `buffer` from a cache line's start on.
fn aligned<T: Clone + Default>(buffer: &mut Vec<T>, n: usize) -> &mut [T] {
    const LINE: usize = 64;
    let needed = n + LINE / size_of::<T>();
    if buffer.len() < needed {
        buffer.resize(needed, T::default());
    }
    let start = buffer.as_ptr().align_offset(LINE);
    &mut buffer[start..start + n]
}

/// A product `left right`, [m, depth] by [depth, n].
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    left: Factor<'a>,
    right: Factor<'a>,
    precision: Precision,
}

impl<'a> Product<'a> {
    /// The product of two factors rounded to `precision`.
    ///
    /// # Panics
    /// If their inner dimensions differ.
    pub fn new(precision: Precision, left: Factor<'a>, right: Factor<'a>) -> Self {
        assert_eq!(left.shape().1, right.shape().0, "inner dimensions of a product");
        Self { left, right, precision }
    }

    /// Multiplications and additions.
    pub fn n_operation(&self) -> f64 {
        let ((m, depth), (_, n)) = (self.left.shape(), self.right.shape());
        2.0 * m as f64 * depth as f64 * n as f64
    }

    /// Columns of a strip, of which a part [`Product::step`] deep stays in cache when packed.
    const STRIP: usize = 128;
    /// The same where sums are added to what is there, [`Product::short_step`] at a time.
    pub const WIDE_STRIP: usize = 384;

    /// Columns that are best computed together: a strip, or more of them where the depth is small.
    pub fn strip(&self) -> usize {
        let n_word = self.precision.words(self.left.shape().1).max(1);
        (PACKED / n_word / Self::STRIP * Self::STRIP).clamp(Self::STRIP, 2 * Self::STRIP)
    }

    /// How much of the depth to sum at a time.
    fn step(precision: Precision) -> usize {
        PACKED / Self::STRIP * precision.per_word()
    }

    /// The same for wide strips.
    pub fn short_step(precision: Precision) -> usize {
        PACKED / Self::WIDE_STRIP * precision.per_word()
    }

    /// Rows that are computed together, before any of them is written.
    pub const ROWS: usize = ROWS;

    /// Computes `rows` by `cols` of the product, at best [`Product::strip`] columns, and gives each row's part to
    /// `write(row, sums [cols.len()])`. A sum does not depend on the rows and columns it is computed with.
    ///
    /// # Panics
    /// If `rows` or `cols` lie outside or begin at odd numbers.
    pub fn compute(
        &self,
        kernels: &Kernels,
        rows: Range<usize>,
        cols: Range<usize>,
        workspace: &mut Workspace,
        mut write: impl FnMut(usize, &mut [f32]),
    ) {
        let (depth, step) = (self.left.shape().1, Self::step(self.precision));
        if depth <= step {
            self.compute_steps(kernels, rows, cols, step, workspace, |row, _, sums| write(row, sums));
            return;
        }
        let n_col = cols.len();
        let mut totals = std::mem::take(&mut workspace.totals);
        let parts = aligned(&mut totals, rows.len() * n_col);
        self.compute_steps(kernels, rows.clone(), cols, step, workspace, |row, is_first, sums| {
            let total = &mut parts[(row - rows.start) * n_col..][..n_col];
            match is_first {
                true => total.copy_from_slice(sums),
                false => kernels.axpy(1.0, sums, total),
            }
        });
        for (row, total) in rows.zip(parts.chunks_exact_mut(n_col.max(1))) {
            write(row, total);
        }
        workspace.totals = totals;
    }

    /// Like [`Product::compute`], but gives `write(row, is_first, sums)` what `step` of the depth adds up to, as often as there are
    /// steps. Without depth every row is given zeros once.
    ///
    /// # Panics
    /// If `rows` or `cols` lie outside or begin at odd numbers, or `step` is odd or 0.
    pub fn compute_steps(
        &self,
        kernels: &Kernels,
        rows: Range<usize>,
        cols: Range<usize>,
        step: usize,
        workspace: &mut Workspace,
        mut write: impl FnMut(usize, bool, &mut [f32]),
    ) {
        let ((m, depth), (_, n)) = (self.left.shape(), self.right.shape());
        assert!(rows.end <= m && cols.end <= n && step > 0 && step.is_multiple_of(2));
        assert!(rows.start.is_multiple_of(2) && cols.start.is_multiple_of(2), "a part that begins within a word");
        let n_tile = cols.len().div_ceil(TILE_ROWS);
        let width = n_tile * TILE_ROWS;
        let to = self.precision;
        for first in (0..depth.max(1)).step_by(step) {
            let words = first / to.per_word()..to.words(depth.min(first.saturating_add(step)));
            let n_word = words.len();
            let tiles = aligned(&mut workspace.tiles, n_tile * n_word * TILE_ROWS);
            let packing = if self.right.transposed { Packing::Rows } else { Packing::Cols };
            kernels.pack(&self.right.matrix, packing, to, cols.start, words.clone(), tiles);
            for block in rows.clone().step_by(ROWS) {
                let n_row = ROWS.min(rows.end - block);
                let products = aligned(&mut workspace.products, n_row.next_multiple_of(LANES) * width);
                if depth == 0 || width == 0 {
                    products.fill(0.0);
                } else {
                    self.block(
                        kernels,
                        block..block + n_row,
                        words.clone(),
                        tiles,
                        n_tile,
                        &mut workspace.rows,
                        products,
                    );
                }
                for (i, products) in products.chunks_exact_mut(width.max(1)).take(n_row).enumerate() {
                    write(block + i, first == 0, &mut products[..cols.len()]);
                }
            }
        }
    }

    /// Up to [`ROWS`] rows by packed tiles. `products` has room for whole tiles of rows.
    fn block(
        &self,
        kernels: &Kernels,
        rows: Range<usize>,
        words: Range<usize>,
        tiles: &[u32],
        n_tile: usize,
        packed: &mut Vec<u32>,
        products: &mut [f32],
    ) {
        let (left, to, n_word) = (&self.left.matrix, self.precision, words.len());
        let width = n_tile * TILE_ROWS;
        let tiles = bytemuck::cast_slice(tiles);
        if self.left.transposed {
            // Its rows are columns of what is stored: interleaved they are copied, not transposed.
            let packed = aligned(packed, rows.len().next_multiple_of(LANES) * n_word);
            kernels.pack(left, Packing::Cols, to, rows.start, words, packed);
            for (x, out) in packed.chunks_exact(LANES * n_word).zip(products.chunks_exact_mut(LANES * width)) {
                match to {
                    Precision::F32 => kernels.matmul_interleaved_f32(tiles, n_tile, bytemuck::cast_slice(x), out),
                    Precision::Bf16 => kernels.matmul_interleaved_bf16(tiles, n_tile, bytemuck::cast_slice(x), out),
                }
            }
            return;
        }
        let products = &mut products[..rows.len() * width];
        let mut x: [&[u32]; ROWS] = [&[]; ROWS];
        // Rows that end within a word could bring along what lies behind them.
        let is_whole = words.end * to.per_word() <= left.n_col || left.stride == to.words(left.n_col);
        if left.precision == to && is_whole {
            for (x, row) in x.iter_mut().zip(rows.clone()) {
                *x = left.row(row, words.clone());
            }
        } else {
            let packed = aligned(packed, rows.len().next_multiple_of(LANES) * n_word);
            kernels.pack(left, Packing::RowByRow, to, rows.start, words, packed);
            for (x, row) in x.iter_mut().zip(packed.chunks_exact(n_word).take(rows.len())) {
                *x = row;
            }
        }
        match to {
            Precision::Bf16 => kernels.matmul_bf16(tiles, n_tile, &x[..rows.len()], products),
            Precision::F32 => {
                let mut floats: [&[f32]; ROWS] = [&[]; ROWS];
                for (floats, x) in floats.iter_mut().zip(x) {
                    *floats = bytemuck::cast_slice(x);
                }
                kernels.matmul_f32(tiles, n_tile, &floats[..rows.len()], products);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::Matrix;
    use half::bf16;
    use proptest::prelude::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// A stored matrix of `n_row` rows among others, with columns before and behind.
    struct Stored {
        precision: Precision,
        words: Vec<u32>,
        shape: (usize, usize),
        index: Option<Vec<u32>>,
        margin: usize,
    }

    impl Stored {
        fn random(
            precision: Precision,
            shape: (usize, usize),
            gathered: bool,
            margin: usize,
            rng: &mut ChaCha8Rng,
        ) -> Self {
            let (n_row, n_col) = (shape.0 + 2, shape.1 + 2 * margin);
            let kernels = Kernels::supported()[0];
            let mut words = vec![0; n_row * precision.words(n_col)];
            for row in words.chunks_exact_mut(precision.words(n_col).max(1)) {
                let x: Vec<f32> = (0..n_col).map(|_| rng.random_range(-1.0..1.0)).collect();
                precision.store(kernels, &x, row);
            }
            let index = gathered.then(|| (0..shape.0).map(|_| rng.random_range(0..n_row as u32)).collect());
            Stored { precision, words, shape, index, margin }
        }

        fn matrix(&self) -> Matrix<'_> {
            let whole = Matrix::new(self.precision, &self.words, self.shape.0 + 2, self.shape.1 + 2 * self.margin);
            let rows = match &self.index {
                Some(index) => whole.gathered(index),
                None => whole.rows(1..1 + self.shape.0),
            };
            if self.margin == 0 { rows } else { rows.cols(self.margin..self.margin + self.shape.1) }
        }

        /// Element as the product reads it.
        fn get(&self, i: usize, j: usize, to: Precision) -> f64 {
            let x = f32::from_bits(self.matrix().get(i, j));
            f64::from(if to == Precision::Bf16 { bf16::from_f32(x).to_f32() } else { x })
        }
    }

    fn precision() -> impl Strategy<Value = Precision> {
        prop::sample::select(&[Precision::F32, Precision::Bf16][..])
    }

    proptest! {
        /// Error bound: products are exact in f64; each of the depth's additions in f32 rounds once, 2^-24 of the sum of magnitudes.
        #[test]
        fn every_isa_multiplies_every_layout(
            to in precision(), stored in [any::<bool>(), any::<bool>()], transposed in any::<[bool; 2]>(), gathered in any::<[bool; 2]>(),
            whole: bool, margin in prop::sample::select(&[0usize, 2][..]), (m, depth, n) in (1usize..70, 0usize..80, 1usize..70),
            (skip_rows, skip_cols) in (0usize..10, 0usize..10), step in prop::sample::select(&[2usize, 16, 34, usize::MAX - 1][..]), seed: u64,
        ) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let stored = stored.map(|narrow| if narrow && to == Precision::Bf16 { Precision::Bf16 } else { Precision::F32 });
            let mut factor = |i: usize, (rows, cols): (usize, usize)| {
                let shape = if transposed[i] { (cols, rows) } else { (rows, cols) };
                Stored::random(stored[i], shape, gathered[i], margin, &mut rng)
            };
            let (left, right) = (factor(0, (m, depth)), factor(1, (depth, n)));
            let product = Product::new(
                to,
                Factor { matrix: left.matrix(), transposed: transposed[0] },
                Factor { matrix: right.matrix(), transposed: transposed[1] },
            );
            let rows = (skip_rows & !1).min(m - 1) & !1..m;
            let cols = (skip_cols & !1).min(n - 1) & !1..n;
            let mut workspace = Workspace::default();
            for k in Kernels::supported() {
                let mut sums = vec![f32::NAN; m * n];
                let mut write = |row: usize, is_first: bool, part: &mut [f32]| {
                    let out = &mut sums[row * n + cols.start..row * n + cols.end];
                    for (out, part) in out.iter_mut().zip(part) {
                        *out = if is_first { *part } else { *out + *part };
                    }
                };
                if whole {
                    product.compute(k, rows.clone(), cols.clone(), &mut workspace, |row, part| write(row, true, part));
                } else {
                    product.compute_steps(k, rows.clone(), cols.clone(), step, &mut workspace, &mut write);
                }
                let at = |x: &Stored, i: usize, a: usize, b: usize| if transposed[i] { x.get(b, a, to) } else { x.get(a, b, to) };
                for i in 0..m {
                    for j in 0..n {
                        let got = sums[i * n + j];
                        if !rows.contains(&i) || !cols.contains(&j) {
                            prop_assert!(got.is_nan());
                            continue;
                        }
                        let products = (0..depth).map(|d| at(&left, 0, i, d) * at(&right, 1, d, j));
                        let (sum, size) = products.fold((0.0, 0.0), |(s, t), p| (s + p, t + p.abs()));
                        let bound = (depth + 2) as f64 * 2f64.powi(-24) * size;
                        prop_assert!((f64::from(got) - sum).abs() <= bound, "{}: {got} for {sum} at {i}, {j}", k.isa());
                    }
                }
            }
        }

        /// Error bound: one rounding per row, 2^-24 of the sum of magnitudes.
        #[test]
        fn every_isa_adds_up_columns(precision in precision(), gathered: bool, (n_row, n_col) in (0usize..40, 1usize..70), seed: u64) {
            let stored = Stored::random(precision, (n_row, n_col), gathered, 0, &mut ChaCha8Rng::seed_from_u64(seed));
            for k in Kernels::supported() {
                let mut sums = vec![1.0; n_col];
                k.add_column_sums(&stored.matrix(), &mut sums);
                for (j, got) in sums.iter().enumerate() {
                    let column = (0..n_row).map(|i| stored.get(i, j, Precision::F32));
                    let (want, size) = column.fold((1.0, 1.0), |(s, t), x| (s + x, t + x.abs()));
                    prop_assert!((f64::from(*got) - want).abs() <= (n_row + 1) as f64 * 2f64.powi(-24) * size, "{}: {got} for {want}", k.isa());
                }
            }
        }

        #[test]
        fn what_is_stored_is_loaded(x in prop::collection::vec(-9.0f32..9.0, 0..50), precision in precision()) {
            for k in Kernels::supported() {
                let mut words = vec![0; precision.words(x.len())];
                precision.store(k, &x, &mut words);
                let mut y = vec![0.0; x.len()];
                precision.load(k, &words, &mut y);
                for (&x, &y) in x.iter().zip(&y) {
                    let want = if precision == Precision::Bf16 { bf16::from_f32(x).to_f32() } else { x };
                    prop_assert_eq!(y, want);
                }
            }
        }
    }
}
