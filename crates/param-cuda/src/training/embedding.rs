//! Token plus learned position embedding, forward and backward.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::{Dropped, View};
use crate::args;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::kernel::{Arg, Grid, Kernel, Module};
use crate::stream::Stream;

const PTX: &str = include_str!("../../ptx/train_embedding.ptx");
const THREADS: u32 = 256;
const WARP: usize = 32;
/// Rows of the sorted order that a block adds up.
const PIECE: usize = 32;

/// `Scatter` in train_embedding.cu, field by field.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Scatter {
    dx: u64,
    bits: u64,
    ids: u64,
    order: u64,
    dtoken: u64,
    parts: u64,
    n: u32,
    d: u32,
    scale: f32,
    unused: u32,
}

/// Numbers of rows by their ids, and of equal ids in their own order: what [`Embedding::backward`] goes by.
pub fn sorted(ids: &[u32]) -> Vec<u32> {
    let mut keys = ids.iter().zip(0u64..).map(|(id, row)| u64::from(*id) << 32 | row).collect::<Vec<_>>();
    keys.sort_unstable();
    keys.into_iter().map(|key| key as u32).collect()
}

/// The kernels. Rows have a multiple of 4 columns.
#[derive(Debug)]
pub struct Embedding {
    forward: Kernel,
    scatter: Kernel,
    join: Kernel,
    positions: Kernel,
}

/// The address of the bits, or null, and the factor of what is kept.
fn dropped(dropped: Option<Dropped<'_>>, n: usize) -> (Option<View<'_, u32>>, f32) {
    assert!(dropped.is_none_or(|d| d.bits.len() >= n.div_ceil(32)), "too few bits for {n} elements");
    (dropped.map(|d| d.bits), dropped.map_or(1.0, |d| d.scale))
}

impl Embedding {
    /// Loads the kernels.
    ///
    /// # Errors
    /// [`crate::Error::Call`], [`crate::Error::Kernel`].
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let module = Module::load(gpu, PTX)?;
        Ok(Self {
            forward: module.kernel("embedding_forward")?,
            scatter: module.kernel("embedding_scatter")?,
            join: module.kernel("embedding_join")?,
            positions: module.kernel("embedding_positions")?,
        })
    }

    /// `x[i] = token[ids[i]] + position[i % n_col]`, dropped. `ids` are numbers of rows of `token`.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn forward(
        &self,
        stream: &Stream,
        ids: View<u32>,      // [n_row, n_col]
        n_col: usize,        //
        token: View<f32>,    // [n_vocab, n_embd]
        position: View<f32>, // [n_ctx, n_embd]
        dropout: Option<Dropped>,
        x: View<f32>, // [n_row, n_col, n_embd]
    ) -> Result<()> {
        let n = ids.len();
        if n == 0 {
            return Ok(());
        }
        let d = x.len() / n;
        assert!(x.len() == n * d && d > 0 && d.is_multiple_of(4) && n_col > 0 && n.is_multiple_of(n_col));
        assert!(token.len().is_multiple_of(d) && position.len() >= n_col * d);
        let (bits, scale) = dropped(dropout, n * d);
        let blocks = n.div_ceil(THREADS as usize / WARP) as u32;
        let grid = Grid { blocks: [blocks, 1, 1], threads: THREADS, shared: 0 };
        let (token, position, x) = (token.aligned(), position.aligned(), x.aligned());
        let args = args![ids, token, position, bits, x, n as u32, n_col as u32, d as u32, scale];
        // SAFETY: the kernel's arguments; lengths were checked above, and ids are rows of `token`, as the caller was told.
        unsafe { self.forward.launch(stream, grid, &args) }
    }

    /// Elements of scratch memory that [`Embedding::backward`] needs.
    pub fn scratch_len(n_token: usize, n_embd: usize) -> usize {
        2 * n_token.div_ceil(PIECE) * n_embd
    }

    /// Adds to `dtoken` and `dposition` the gradients of [`Embedding::forward`] given `dx`, with the same `ids` and dropout. `order` is
    /// what [`sorted`] makes of the ids.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn backward(
        &self,
        stream: &Stream,
        dx: View<f32>, // [n_row, n_col, n_embd]
        dropout: Option<Dropped>,
        ids: View<u32>,       // [n_row, n_col]
        order: View<u32>,     // [n_row, n_col]
        n_col: usize,         //
        dtoken: View<f32>,    // [n_vocab, n_embd]
        dposition: View<f32>, // [n_ctx, n_embd]
        scratch: View<f32>,   // [scratch_len]
    ) -> Result<()> {
        let n = ids.len();
        if n == 0 {
            return Ok(());
        }
        let d = dx.len() / n;
        assert!(dx.len() == n * d && d > 0 && d.is_multiple_of(4) && n_col > 0 && n.is_multiple_of(n_col));
        assert!(order.len() == n && dtoken.len().is_multiple_of(d) && dposition.len() >= n_col * d);
        assert!(scratch.len() >= Self::scratch_len(n, d));
        let (bits, scale) = dropped(dropout, n * d);
        let args = Scatter {
            dx: dx.aligned().address(),
            bits: bits.map_or(0, View::address),
            ids: ids.address(),
            order: order.address(),
            dtoken: dtoken.aligned().address(),
            parts: scratch.aligned().address(),
            n: n as u32,
            d: d as u32,
            scale,
            unused: 0,
        };
        let n_piece = n.div_ceil(PIECE) as u32;
        let grid = Grid { blocks: [n_piece, 1, 1], threads: THREADS, shared: 0 };
        // SAFETY: the kernel's argument; lengths were checked above, ids are rows of `dtoken` and the order those of `dx`, as the
        // caller was told.
        unsafe { self.scatter.launch(stream, grid, &[Arg::value(args)]) }?;
        if n_piece > 1 {
            let grid = Grid { blocks: [n_piece, d.div_ceil(4 * WARP) as u32, 1], threads: THREADS, shared: 0 };
            // SAFETY: as above; a part is read only where one was left.
            unsafe { self.join.launch(stream, grid, &[Arg::value(args)]) }?;
        }
        let grid = Grid { blocks: [n_col as u32, 1, 1], threads: THREADS, shared: 0 };
        let args = args![dx, bits, dposition.aligned(), (n / n_col) as u32, n_col as u32, d as u32, scale];
        // SAFETY: the kernel's arguments, whose lengths were checked above.
        unsafe { self.positions.launch(stream, grid, &args) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Random, gpu};
    use super::*;
    use param_cuda_emulation::Schedule;
    use proptest::prelude::*;

    /// Error bounds: none forward (one sum, one product, each rounded once, as in f32); 1e-6 of the sum of sizes backward.
    fn check(
        ids: &[u32],
        n_col: usize,
        n_vocab: usize,
        d: usize,
        drops: bool,
        seed: u64,
        schedule: Schedule,
    ) -> std::result::Result<(), TestCaseError> {
        let mut random = Random::new(seed);
        let n = ids.len();
        let (token, position) = (random.floats(n_vocab * d, 1.0), random.floats((n_col + 1) * d, 1.0));
        let (dx, words) = (random.floats(n * d, 1.0), random.words((n * d).div_ceil(32)));
        let (before, before_position) = (random.floats(token.len(), 1.0), random.floats(position.len(), 1.0));
        let factor = |i: usize| match drops {
            true if words[i / 32] >> (i % 32) & 1 == 0 => 0.0,
            true => 1.25,
            false => 1.0f32,
        };
        param_cuda_emulation::schedule(Some(schedule));
        let gpu = gpu();
        let stream = Stream::new(&gpu).unwrap();
        let embedding = Embedding::new(&gpu).unwrap();
        let upload = |x: &[f32]| gpu.upload("", x).unwrap();
        let [on_ids, on_order, bits] = [ids, &sorted(ids), &words].map(|x| gpu.upload("", x).unwrap());
        let [on_token, on_position, on_dx] = [&token, &position, &dx].map(|x| upload(x));
        let [dtoken, dposition] = [&before, &before_position].map(|x| upload(x));
        let x = gpu.alloc::<f32>("", n * d).unwrap();
        let scratch = upload(&vec![f32::NAN; Embedding::scratch_len(n, d)]);
        let dropout = drops.then(|| Dropped { bits: bits.view(), scale: 1.25 });
        embedding
            .forward(&stream, on_ids.view(), n_col, on_token.view(), on_position.view(), dropout, x.view())
            .unwrap();
        let (grads, order) = ((dtoken.view(), dposition.view()), on_order.view());
        embedding
            .backward(&stream, on_dx.view(), dropout, on_ids.view(), order, n_col, grads.0, grads.1, scratch.view())
            .unwrap();
        stream.synchronize().unwrap();
        param_cuda_emulation::schedule(None);

        let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
        let (mut want, mut want_position) = (wide(&before), wide(&before_position));
        let (mut size, mut size_position) = (vec![1.0; want.len()], vec![1.0; want_position.len()]);
        for (i, got) in x.to_vec().unwrap().into_iter().enumerate() {
            let (row, col) = (i / d, i % d);
            let (at, at_position) = (ids[row] as usize * d + col, row % n_col * d + col);
            prop_assert_eq!(got, (token[at] + position[at_position]) * factor(i));
            let g = f64::from(dx[i]) * f64::from(factor(i));
            want[at] += g;
            size[at] += g.abs();
            want_position[at_position] += g;
            size_position[at_position] += g.abs();
        }
        let all = [(dtoken, want, size), (dposition, want_position, size_position)];
        for (got, want, size) in all {
            for (i, got) in got.to_vec().unwrap().into_iter().enumerate() {
                let (want, size) = (want[i], size[i]);
                prop_assert!((f64::from(got) - want).abs() <= 1e-6 * size, "element {i}: {got} for {want}");
            }
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn tokens_and_positions_are_added_and_their_gradients_collected(
            n_row in 1usize..9, n_col in 1usize..40, n_vocab in 1usize..40, skewed: bool, eighths in 1usize..6, drops: bool,
            schedule in 0usize..4, seed: u64,
        ) {
            let mut random = Random::new(seed ^ 1);
            // Squared, few tokens have most of the rows, so that some go over many pieces.
            let mut id = || {
                let x = random.below(1000) as f64 / 1000.0;
                ((if skewed { x.powi(4) } else { x }) * n_vocab as f64) as u32
            };
            let ids = (0..n_row * n_col).map(|_| id()).collect::<Vec<_>>();
            check(&ids, n_col, n_vocab, 8 * eighths, drops, seed, Schedule::ALL[schedule])?;
        }
    }

    /// A token that has all rows, tokens that end where pieces do, and one row only; more columns than a block has threads for.
    #[test]
    fn pieces_are_joined_wherever_tokens_end() {
        let runs = |runs: &[(u32, usize)]| runs.iter().flat_map(|(id, n)| vec![*id; *n]).collect::<Vec<_>>();
        let cases = [
            runs(&[(2, 1)]),
            runs(&[(2, 32)]),
            runs(&[(2, 320)]),
            runs(&[(0, 32), (1, 32), (2, 33)]),
            runs(&[(0, 31), (1, 34), (2, 63), (3, 32)]),
            runs(&[(3, 64), (2, 31), (1, 1), (0, 100)]),
        ];
        for (ids, schedule) in cases.iter().zip(Schedule::ALL.into_iter().cycle()) {
            check(ids, ids.len(), 4, 8, true, 3, schedule).unwrap();
        }
        check(&runs(&[(0, 40), (1, 3)]), 43, 2, 1032, true, 4, Schedule::Seed(1)).unwrap();
    }

    #[test]
    fn equal_ids_stay_in_their_order() {
        assert_eq!(sorted(&[5, 1, 5, 0, 1]), [3, 1, 4, 0, 2]);
    }
}
