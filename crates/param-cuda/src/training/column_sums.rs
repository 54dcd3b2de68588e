//! Sums of a matrix's columns, over all rows or over those of each group: gradients of biases.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::{Element, Rows, View};
use crate::args;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::kernel::{Arg, Grid, Kernel, Module};
use crate::stream::Stream;

const PTX: &str = include_str!("../../ptx/train_column_sums.ptx");
const THREADS: u32 = 256;
const WARP: usize = 32;
/// Rows of a block, if groups were of one size and there were no limit.
const PART: usize = 128;
/// Blocks that share a group's rows, at most.
const MAX_PART: usize = 64;

/// `ColumnSums` in train_column_sums.cu, field by field.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Args {
    x: u64,
    starts: u64,
    parts: u64,
    n_row: u32,
    n_col: u32,
    stride: u32,
    unused: u32,
}

/// The kernels.
#[derive(Debug)]
pub struct ColumnSums {
    sum_f32: Kernel,
    sum_bf16: Kernel,
    add: Kernel,
}

/// Blocks that share the rows of each of `n_group` groups.
fn n_part(n_row: usize, n_group: usize) -> usize {
    n_row.div_ceil(n_group * PART).clamp(1, MAX_PART)
}

impl ColumnSums {
    /// Loads the kernels.
    ///
    /// # Errors
    /// [`crate::Error::Call`], [`crate::Error::Kernel`].
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let module = Module::load(gpu, PTX)?;
        Ok(Self {
            sum_f32: module.kernel("column_sums_f32")?,
            sum_bf16: module.kernel("column_sums_bf16")?,
            add: module.kernel("column_sums_add")?,
        })
    }

    /// Elements of scratch memory that [`ColumnSums::add`] needs; one group where there are no `starts`.
    pub fn scratch_len(n_row: usize, n_group: usize, n_col: usize) -> usize {
        n_group * n_part(n_row, n_group) * n_col
    }

    /// Adds to row `g` of `out` the sums over rows `starts[g]..starts[g + 1]` of `x`, or to its only row those over all. `starts` never
    /// fall, and end within `x`.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn add(
        &self,
        stream: &Stream,
        x: Rows,                   // [n_row, n_col]
        starts: Option<View<u32>>, // [n_group + 1]
        out: View<f32>,            // [n_group, n_col]
        scratch: View<f32>,        // [scratch_len]
    ) -> Result<()> {
        let (n_row, n_col) = (x.n_row(), x.n_col());
        let n_group = starts.map_or(1, |starts| starts.len() - 1);
        assert!(n_group > 0 && out.len() == n_group * n_col, "{} sums of {n_group} groups of {n_col}", out.len());
        assert!(scratch.len() >= Self::scratch_len(n_row, n_group, n_col));
        if n_row == 0 || n_col == 0 {
            return Ok(());
        }
        let n_part = n_part(n_row, n_group);
        let args = Args {
            x: x.address(),
            starts: starts.map_or(0, View::address),
            parts: scratch.address(),
            n_row: n_row as u32,
            n_col: n_col as u32,
            stride: x.stride() as u32,
            unused: 0,
        };
        let kernel = match x.element() {
            Element::F32 => &self.sum_f32,
            Element::Bf16 => &self.sum_bf16,
        };
        let tiles = n_col.div_ceil(WARP * x.element().per_copy());
        let grid = Grid { blocks: [tiles as u32, n_part as u32, n_group as u32], threads: THREADS, shared: 0 };
        // SAFETY: the kernel's argument; it keeps to the rows of `x` whatever `starts` say, and to `scratch`, whose length was checked.
        unsafe { kernel.launch(stream, grid, &[Arg::value(args)]) }?;
        let grid = Grid { blocks: [n_col.div_ceil(WARP) as u32, n_group as u32, 1], threads: THREADS, shared: 0 };
        // SAFETY: the kernel's arguments: the parts that were just left, and `out`, whose length was checked.
        unsafe { self.add.launch(stream, grid, &args![scratch, n_part as u32, out, n_col as u32]) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Random, Stored, gpu, rounded};
    use super::*;
    use param_cuda_emulation::Schedule;
    use proptest::prelude::*;

    /// Error bound: 1e-6 of the sum of sizes, a few roundings of sums of up to 300 terms in parts of 16.
    fn check(
        n_row: usize,
        n_col: usize,
        ends: Option<Vec<u32>>, // of groups, the last being `n_row` or less
        element: Element,
        seed: u64,
        schedule: Schedule,
    ) -> std::result::Result<(), TestCaseError> {
        let mut random = Random::new(seed);
        let x = rounded(&random.floats(n_row * n_col, 1.0), element);
        let n_group = ends.as_ref().map_or(1, Vec::len);
        let before = random.floats(n_group * n_col, 1.0);
        param_cuda_emulation::schedule(Some(schedule));
        let gpu = gpu();
        let stream = Stream::new(&gpu).unwrap();
        let sums = ColumnSums::new(&gpu).unwrap();
        let stored = Stored::new(&gpu, &x, element, n_col);
        let starts = ends.as_ref().map(|ends| [&[0][..], ends].concat());
        let on_gpu = starts.as_ref().map(|starts| gpu.upload("", starts).unwrap());
        let out = gpu.upload("", &before).unwrap();
        let scratch = gpu.upload("", &vec![f32::NAN; ColumnSums::scratch_len(n_row, n_group, n_col)]).unwrap();
        sums.add(&stream, stored.rows(), on_gpu.as_ref().map(|s| s.view()), out.view(), scratch.view()).unwrap();
        stream.synchronize().unwrap();
        param_cuda_emulation::schedule(None);
        let out = out.to_vec().unwrap();
        let starts = starts.unwrap_or_else(|| vec![0, n_row as u32]);
        for (g, range) in starts.windows(2).enumerate() {
            for i in 0..n_col {
                let of = |row: u32| f64::from(x[row as usize * n_col + i]);
                let at = f64::from(before[g * n_col + i]);
                let want = at + (range[0]..range[1]).map(of).sum::<f64>();
                let size = 1.0 + (range[0]..range[1]).map(|row| of(row).abs()).sum::<f64>();
                let got = f64::from(out[g * n_col + i]);
                prop_assert!((got - want).abs() <= 1e-6 * size, "group {g}, column {i}: {got} for {want}");
            }
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn columns_are_added_up_by_group(
            n_row in 1usize..70, n_col in 1usize..80, cuts in prop::collection::vec(0usize..70, 0..5), grouped: bool, narrow: bool,
            seed: u64, schedule in 0usize..4,
        ) {
            let mut ends = cuts.iter().map(|cut| (*cut).min(n_row) as u32).chain([n_row as u32]).collect::<Vec<_>>();
            ends.sort_unstable();
            let element = if narrow { Element::Bf16 } else { Element::F32 };
            check(n_row, n_col, grouped.then_some(ends), element, seed, Schedule::ALL[schedule])?;
        }
    }

    #[test]
    fn many_rows_are_shared_and_rows_beyond_the_groups_left_out() {
        for (element, schedule) in [(Element::Bf16, Schedule::Reversed), (Element::F32, Schedule::Seed(1))] {
            check(300, 300, None, element, 1, schedule).unwrap();
            check(300, 20, Some(vec![0, 250, 250, 290]), element, 2, schedule).unwrap();
        }
    }
}
