//! Muon (Jordan et al. 2024): momentum whose singular values are all made one, by products alone; many matrices of a shape at once.
//!
//! Polynomials of degree 5 of a matrix's singular values are products with functions of the Gram matrix `G` of its shorter side, all of
//! them symmetric, so that half of each is computed; the matrix itself is read to make `G` and to multiply it by what they amount to.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::{Arithmetic, Element, Factor, Groups, Matmul, Numbers, Outcome, Products, Rows, View, Write};
use crate::args;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::kernel::{Grid, Kernel, Module};
use crate::stream::Stream;

#[cfg(test)]
mod tests;

/// Root mean square of an update at a learning rate of 1, whatever the shape (Liu et al. 2025).
const RMS: f32 = 0.2;
const THREADS: usize = 256;
/// Of a sum of squares: N_PART in train_muon.cu.
const N_PART: usize = 32;

/// Where a matrix lies, and how it is moved: `Matrix` in train_muon.cu. Both places are multiples of 4.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct MuonMatrix {
    /// Its first element in parameters, gradients and copies.
    pub begin: u64,
    /// Its first element in running sums.
    pub moment: u64,
    /// Factor of its learning rate.
    pub lr_scale: f32,
    /// Weight decay, or 0.
    pub decay: f32,
}

/// All that Muon moves and reads.
#[derive(Clone, Copy, Debug)]
pub struct MuonState<'a> {
    /// Of all tensors.
    pub params: View<'a, f32>,
    /// In the places of `params`; those of the matrices become zero.
    pub grads: View<'a, f32>,
    /// Running sums of gradients.
    pub sums: View<'a, f32>,
    /// `params` in bf16, rewritten.
    pub copies: Option<View<'a, u16>>,
    /// One: `muon_lr`.
    pub numbers: View<'a, Numbers>,
    /// One: `grad_scale`.
    pub outcome: View<'a, Outcome>,
}

/// The kernels of Muon.
#[derive(Clone, Debug)]
pub struct Muon {
    products: Products,
    update: Kernel,
    squares: Kernel,
    scale: Kernel,
    apply: Kernel,
}

/// Parts of the scratch memory of `n` matrices.
struct Scratch<'a> {
    updates: View<'a, u8>,      // [n, n_row, n_col] f32
    steps: View<'a, u8>,        // the same
    squares: [View<'a, u8>; 4], // [n, m, m] f32 each
    parts: View<'a, f64>,       // [n, N_PART]
    roots: View<'a, f32>,       // [n]
}

fn scratch_len(n: usize, (n_row, n_col): (usize, usize)) -> usize {
    let m = n_row.min(n_col);
    // Roots are padded to 16 bytes.
    n * (2 * n_row * n_col + 4 * m * m + 2 * N_PART) + n.next_multiple_of(4)
}

impl<'a> Scratch<'a> {
    fn new(all: View<'a, f32>, n: usize, (n_row, n_col): (usize, usize)) -> Self {
        let mut at = 0;
        let mut take = |len: usize| {
            at += len;
            all.part(at - len..at)
        };
        let m = n_row.min(n_col);
        let [updates, steps] = [(); 2].map(|()| take(n * n_row * n_col).cast());
        let squares = [(); 4].map(|()| take(n * m * m).cast());
        let parts = take(n * 2 * N_PART).cast();
        Self { updates, steps, squares, parts, roots: take(n) }
    }
}

impl Muon {
    /// Loads them.
    ///
    /// # Errors
    /// [`crate::Error`]: a module or a kernel that the driver refuses.
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let module = Module::load(gpu, include_str!("../../ptx/train_muon.ptx"))?;
        Ok(Self {
            products: Products::new(gpu, Arithmetic::F32, Matmul::Mma)?,
            update: module.kernel("train_muon_update")?,
            squares: module.kernel("train_muon_squares")?,
            scale: module.kernel("train_muon_scale")?,
            apply: module.kernel("train_muon_apply")?,
        })
    }

    /// Elements of scratch memory for `n` matrices of that shape at a time.
    pub fn scratch_len(n: usize, shape: (usize, usize)) -> usize {
        scratch_len(n, shape)
    }

    /// Queues a step of all `matrices`, each of that shape and row by row, as many at a time as the scratch memory holds. `polynomials`
    /// are the coefficients of `a s + b s^3 + c s^5`, one after another. Where `grad_scale` is 0, gradients become zero and nothing else
    /// changes.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// Where the shape is no multiple of 4, or scratch memory is too little for one matrix.
    pub fn step(
        &self,
        stream: &Stream,
        state: MuonState,
        matrices: View<MuonMatrix>,
        shape: (usize, usize),
        momentum: f32,
        polynomials: &[[f32; 3]],
        scratch: View<f32>,
    ) -> Result<()> {
        let (n_row, n_col) = shape;
        assert!(n_row > 0 && n_col > 0, "matrices of nothing");
        assert!(n_row.is_multiple_of(4) && n_col.is_multiple_of(4), "[{n_row}, {n_col}]: no multiples of 4");
        assert!(!polynomials.is_empty(), "no polynomial");
        assert_eq!(state.params.len(), state.grads.len(), "a gradient for each parameter");
        assert!(state.copies.is_none_or(|c| c.len() == state.params.len()), "a copy of each parameter");
        assert!(!state.numbers.is_empty() && !state.outcome.is_empty(), "a step's numbers");
        for address in [state.params.address(), state.grads.address(), state.sums.address(), scratch.address()] {
            assert!(address.is_multiple_of(16), "what is moved begins at a multiple of 16 bytes");
        }
        assert!(state.copies.is_none_or(|c| c.address().is_multiple_of(8)), "copies begin at a multiple of 8 bytes");
        // As a launch's grid has it.
        let most = matrices.len().min(1 << 15);
        let Some(piece) = (1..=most).rev().find(|&n| scratch_len(n, shape) <= scratch.len()) else {
            assert!(matrices.is_empty(), "{} elements of scratch memory for a matrix", scratch.len());
            return Ok(());
        };
        // Pieces of about one size.
        let piece = matrices.len().div_ceil(matrices.len().div_ceil(piece));
        for first in (0..matrices.len()).step_by(piece) {
            let matrices = matrices.part(first..matrices.len().min(first + piece));
            self.step_piece(stream, state, matrices, shape, momentum, polynomials, scratch)?;
        }
        Ok(())
    }

    fn step_piece(
        &self,
        stream: &Stream,
        state: MuonState,
        matrices: View<MuonMatrix>,
        (n_row, n_col): (usize, usize),
        momentum: f32,
        polynomials: &[[f32; 3]],
        scratch: View<f32>,
    ) -> Result<()> {
        let n = matrices.len();
        let Scratch { updates, steps, squares, parts, roots } = Scratch::new(scratch, n, (n_row, n_col));
        let (size, is_wide, m) = (n_row * n_col, n_row <= n_col, n_row.min(n_col));
        let number = |n: usize| u32::try_from(n).unwrap_or_else(|_| panic!("a matrix of {n} elements"));
        let grid = |size: usize| Grid {
            blocks: [number(size.div_ceil(4 * THREADS)), n as u32, 1],
            threads: THREADS as u32,
            shared: 0,
        };
        let args = args![matrices, state.grads, state.sums, updates, state.outcome, momentum, number(size)];
        // SAFETY: the arguments are the kernel's; where matrices lie is right by this operation's contract, `updates` has room for n.
        unsafe { self.update.launch(stream, grid(size), &args)? };

        let whole = |view| Rows::new(view, Element::F32, n * n_row, n_col);
        let square = |view| Rows::new(view, Element::F32, n * m, m);
        let (x, groups) = (whole(updates), Groups::Stack { n });
        let [gram, mut power, step, mut total] = squares.map(square);
        let symmetric = |out, a: Factor, b: Factor, sum_scale, with, diagonal| {
            let write = Write::Symmetric { out, sum_scale, with, diagonal };
            self.products.compute(stream, a, b, groups, write, None)
        };
        let of = |a: Rows, b: Rows, out| symmetric(out, Factor::new(a), Factor::new(b), 1.0, None, 0.0);
        match is_wide {
            true => symmetric(gram, Factor::new(x), Factor::transposed(x), 1.0, None, 0.0)?,
            false => symmetric(gram, Factor::transposed(x), Factor::new(x), 1.0, None, 0.0)?,
        }
        let args = args![gram, parts, number(m * m)];
        let all = Grid { blocks: [N_PART as u32, n as u32, 1], ..grid(1) };
        // SAFETY: the arguments are the kernel's, with room for n matrices.
        unsafe { self.squares.launch(stream, all, &args)? };
        let args = args![gram, parts, roots, number(m * m)];
        // SAFETY: as above.
        unsafe { self.scale.launch(stream, grid(m * m), &args)? };
        for (i, &[a, b, c]) in polynomials.iter().enumerate() {
            // step = a + b G + c G^2, the first of which is their product so far.
            let step = if i == 0 { total } else { step };
            symmetric(step, Factor::new(gram), Factor::new(gram), c, Some((gram, b)), a)?;
            if i > 0 {
                of(step, total, power)?;
                (total, power) = (power, total);
            }
            if i + 1 < polynomials.len() {
                of(step, gram, power)?;
                of(step, power, gram)?;
            }
        }
        let (a, b) = if is_wide { (total, x) } else { (x, total) };
        let write = Write::Replace(whole(steps));
        self.products.compute(stream, Factor::new(a), Factor::new(b), groups, write, None)?;
        let lr_factor = RMS * (n_row.max(n_col) as f32).sqrt();
        let (numbers, outcome) = (state.numbers, state.outcome);
        let args = args![matrices, state.params, state.copies, steps, roots, numbers, outcome, lr_factor, number(size)];
        // SAFETY: as of the first.
        unsafe { self.apply.launch(stream, grid(size), &args) }
    }
}
