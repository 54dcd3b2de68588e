//! What computes: the threads and their workspaces, memory kept from step to step, the precision of products, and the clock.

use std::ops::Range;

use param_kernels::{Kernels, Precision, Product, Team, Tile, Workspace, prefetch_for_later};

use super::buffers::Buffers;
use super::profile::Profile;
use crate::settings::Recompute;

/// How a model is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compute {
    /// Threads.
    pub n_thread: usize,
    /// What the factors of matrix products, and the activations kept for the backward pass, are rounded to.
    pub precision: Precision,
    /// What is computed again in the backward pass.
    pub recompute: Recompute,
}

impl Default for Compute {
    /// All the CPUs there are, exact, nothing computed twice.
    fn default() -> Self {
        Self { n_thread: param_kernels::available_threads(), precision: Precision::F32, recompute: Recompute::Nothing }
    }
}

/// The means of a model's passes.
pub struct Machine {
    pub team: Team,
    pub scratch: Vec<Scratch>, // [n_thread]
    pub precision: Precision,
    pub buffers: Buffers,
    pub profile: Profile,
}

/// What one thread computes in.
#[derive(Default)]
pub struct Scratch {
    pub workspace: Workspace,
    floats: [Vec<f32>; 3],
    words: [Vec<u32>; 2],
}

impl Scratch {
    /// The workspace, and buffers with whatever values their last user left.
    pub fn buffers(
        &mut self,
        n_float: [usize; 3],
        n_word: [usize; 2],
    ) -> (&mut Workspace, [&mut [f32]; 3], [&mut [u32]; 2]) {
        fn grown<T: Clone + Default>(buffer: &mut Vec<T>, n: usize) -> &mut [T] {
            if buffer.len() < n {
                buffer.resize(n, T::default());
            }
            &mut buffer[..n]
        }
        let Self { workspace, floats: [a, b, c], words: [d, e] } = self;
        let floats = [grown(a, n_float[0]), grown(b, n_float[1]), grown(c, n_float[2])];
        (workspace, floats, [grown(d, n_word[0]), grown(e, n_word[1])])
    }
}

/// Rows of a task, at most: what a packed strip is used for before the next one is packed.
const MOST_ROWS: usize = 1024;
/// Tasks that each thread should find, so that none waits long for the others.
const TASKS_PER_THREAD: usize = 2;
/// Rows or columns that threads share out elsewhere.
pub const ROWS: usize = 64;

impl Machine {
    pub fn new(compute: Compute) -> Self {
        let team = Team::new(compute.n_thread);
        let scratch = (0..team.n_thread()).map(|_| Scratch::default()).collect();
        let precision = compute.precision;
        Self { team, scratch, precision, buffers: Buffers::default(), profile: Profile::default() }
    }

    /// Computes a product for each group of rows and hands every part of a row of sums to
    /// `write(parts of the outputs' rows, row, columns, sums)`. `outs` are matrices of `n_col` columns, `per_elem` of them to an
    /// element; group `g` is their rows `starts[g]..starts[g + 1]`, which are the rows of `product(g)`.
    pub fn multiply<'a, T: Send, const N: usize>(
        &mut self,
        outs: [&mut [T]; N],
        (n_col, per_elem): (usize, usize),
        starts: &[usize], // [n_group + 1]
        product: impl Fn(usize) -> Product<'a> + Sync,
        write: impl Fn([&mut [T]; N], usize, Range<usize>, &mut [f32]) + Sync,
    ) {
        let strip = product(0).strip();
        self.for_each_part(outs, (n_col, per_elem), starts, strip, |workspace, group, rows, cols, mut tile| {
            product(group).compute(Kernels::get(), rows, cols.clone(), workspace, |row, sums| {
                let row = starts[group] + row;
                ask(&mut tile, row + Product::ROWS);
                write(tile.rows_mut(row), row, cols.clone(), sums);
            });
        });
        self.profile.add_operations((0..starts.len() - 1).map(|g| product(g).n_operation()).sum());
    }

    /// Adds a product to each group of the rows of `out` [n_row, n_col]: for gradients of weights, whose depth is many tokens.
    pub fn multiply_add<'a>(
        &mut self,
        out: &mut [f32],
        n_col: usize,
        starts: &[usize], // [n_group + 1]
        product: impl Fn(usize) -> Product<'a> + Sync,
    ) {
        let kernels = Kernels::get();
        let step = Product::short_step(self.precision);
        self.for_each_part([out], (n_col, 1), starts, Product::WIDE_STRIP, |workspace, group, rows, cols, mut tile| {
            product(group).compute_steps(kernels, rows, cols, step, workspace, |row, _, sums| {
                ask(&mut tile, starts[group] + row + Product::ROWS);
                kernels.axpy(1.0, sums, tile.row_mut(starts[group] + row));
            });
        });
        self.profile.add_operations((0..starts.len() - 1).map(|g| product(g).n_operation()).sum());
    }

    /// Cuts groups of rows into parts, and runs `f(workspace, group, rows of the group, columns, part of the outputs)` for each.
    fn for_each_part<T: Send, const N: usize>(
        &mut self,
        outs: [&mut [T]; N],
        (n_col, per_elem): (usize, usize),
        starts: &[usize],
        strip: usize,
        f: impl Fn(&mut Workspace, usize, Range<usize>, Range<usize>, Tile<'_, T, N>) + Sync,
    ) {
        let n_row = starts[starts.len() - 1] - starts[0];
        let n_strip = n_col.div_ceil(strip);
        let wanted = n_row * n_strip / (TASKS_PER_THREAD * self.team.n_thread());
        let blocks = Blocks::new(starts, wanted.next_multiple_of(32).clamp(ROWS, MOST_ROWS));
        let n_elem = n_col.div_ceil(per_elem);
        self.team.for_each_tiles(&mut self.scratch, outs, n_elem, &blocks.starts, strip / per_elem, |scratch, tile| {
            let group = blocks.group[tile.group()];
            let cols = tile.cols().start * per_elem..n_col.min(tile.cols().end * per_elem);
            let rows = tile.rows().start - starts[group]..tile.rows().end - starts[group];
            f(&mut scratch.workspace, group, rows, cols, tile);
        });
    }
}

/// Asks for a row of the outputs that will be written after the next products: they are larger than the caches.
fn ask<T, const N: usize>(tile: &mut Tile<'_, T, N>, row: usize) {
    if tile.rows().contains(&row) {
        tile.rows_mut(row).into_iter().for_each(|part| prefetch_for_later(part));
    }
}

/// Groups of rows cut into blocks.
struct Blocks {
    starts: Vec<usize>, // [n_block + 1]
    group: Vec<usize>,  // [n_block]
}

impl Blocks {
    fn new(starts: &[usize], most: usize) -> Self {
        let mut blocks = Blocks { starts: vec![starts[0]], group: Vec::new() };
        for (group, rows) in starts.windows(2).enumerate() {
            for first in (rows[0]..rows[1]).step_by(most) {
                blocks.starts.push(rows[1].min(first + most));
                blocks.group.push(group);
            }
        }
        blocks
    }
}
