//! Products of rows with a model's matrices: which kernel, how many blocks, and how a long sum is split when few blocks would run.

use bytemuck::{Pod, Zeroable};

use crate::caches::CacheTable;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::kernel::{Arg, Grid, Kernel, Module};
use crate::memory::Buffer;
use crate::model::{Format, Matrix};
use crate::stream::Stream;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Type of activations: what a product reads depends on how its matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Element {
    F32,
    F16,
    Bf16,
}

impl Element {
    pub(super) fn bytes(self) -> usize {
        if self == Element::F32 { 4 } else { 2 }
    }
}

/// Where results go: `Output` in product_args.cuh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Output {
    Partial,
    Activated,
    Qkv,
}

/// `Product` in product_args.cuh, field by field.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Product {
    pub w: [Matrix; 3],
    pub input: u64,
    pub output: u64,
    pub offsets: u64,
    pub list: u64,
    pub weights: u64,
    pub slots: u64,
    pub positions: u64,
    pub caches: CacheTable,
    pub input_stride: u32,
    pub output_stride: u32,
    pub n_row: u32,
    pub n_expert: u32,
    pub n_used: u32,
    pub gathers: u32,
    pub n_split: u32,
    pub output_kind: u32,
    pub activation: u32,
    pub element: u32,
    pub first_matrix: u32,
    pub layer: u32,
    pub n_head: u32,
    pub head_dim: u32,
    pub cache_f32: u32,
    pub k_shift: u32,
    /// In the place of `offsets` and `list`, where [`Products::finds_rows`].
    pub choices: u64,
    pub per_split: u32,
    pub n_tile: u32,
    pub n_stage: u32,
    pub inverse: u32,
}

/// A shape of tiles, each a kernel of its own: `PRODUCTS` in product.cuh.
#[derive(Clone, Copy, Debug)]
struct Shape {
    n_row: u32,
    n_column: u32,
    /// Groups of 2 n_column threads.
    n_group: u32,
    stages: u32,
}

/// By rows, fewest first.
const SHAPES: [Shape; 4] = [
    Shape { n_row: 16, n_column: 64, n_group: 2, stages: 4 },
    Shape { n_row: 32, n_column: 64, n_group: 2, stages: 4 },
    Shape { n_row: 64, n_column: 64, n_group: 2, stages: 3 },
    Shape { n_row: 128, n_column: 128, n_group: 1, stages: 3 },
];
/// Of matrices in F32.
const SHAPES_F32: [Shape; 3] = [
    Shape { n_row: 16, n_column: 64, n_group: 2, stages: 4 },
    Shape { n_row: 32, n_column: 64, n_group: 2, stages: 4 },
    Shape { n_row: 64, n_column: 64, n_group: 2, stages: 4 },
];
/// Kernels for few rows, behind those of [`SHAPES`]: `PRODUCTS_OF_FEW` in product_few.cuh.
#[derive(Clone, Copy, Debug)]
struct FewShape {
    n_row: u32,
    /// Times 16 rows of W that a warp takes.
    n_column: u32,
}

const FEW_SHAPES: [FewShape; 3] =
    [FewShape { n_row: 16, n_column: 1 }, FewShape { n_row: 32, n_column: 1 }, FewShape { n_row: 64, n_column: 2 }];
const FEW_WARPS: u32 = 8;
/// Columns of the rows that lie in shared memory at a time, and columns that a warp takes at a time.
const FEW_COLUMNS: u32 = 768;
const FEW_SLICE: u32 = 64;
/// Rows that the kernels for few are given at most: a matrix's, and on average those of an expert.
const FEW_ROWS: u32 = if cfg!(test) { 48 } else { 256 };
const FEW_ROWS_OF_EXPERT: u32 = if cfg!(test) { 40 } else { 128 };
/// Rows that a matrix meets from which on it is unpacked to f16 beforehand, instead of for each tile of rows.
pub(super) const EXPAND_ROWS: u32 = if cfg!(test) { 60 } else { 512 };
/// Choices among which every block of theirs looks for its own.
const FEW_ENTRIES: u32 = 1024;

/// How a product is computed: by which kernel, in how many parts, over how many blocks of columns, and in kernels for few rows by how
/// many warps a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub which: usize,
    pub n_split: u32,
    pub k_warps: u32,
    /// Fewer than there are tiles: each block goes on from one to another, in kernels for few rows whose columns all find room.
    pub blocks: u32,
}

impl FewShape {
    /// Rows of W in a tile.
    fn width(self, k_warps: u32) -> u32 {
        16 * self.n_column * FEW_WARPS / k_warps
    }

    /// Slices in each part of a sum.
    fn per_split(self, n_col: u32, plan: Plan) -> u32 {
        n_col.div_ceil(FEW_SLICE).div_ceil(plan.n_split)
    }

    /// Slices for which a warp has room: no more than it needs, where it does not go on to another tile.
    fn stages(self, format: Format, n_col: u32, plan: Plan, n_out: u32) -> u32 {
        let most = match (self.n_column, format) {
            (1, _) => 6,
            (_, Format::Q6K) => 3,
            _ => 4,
        };
        let is_single = plan.blocks >= n_out.div_ceil(self.width(plan.k_warps));
        if is_single { self.per_split(n_col, plan).div_ceil(plan.k_warps).min(most) } else { most }
    }

    fn shared(self, format: Format, n_col: u32, plan: Plan, n_out: u32) -> u32 {
        let (slice, pad) = match format {
            Format::F16 | Format::Bf16 => (2048, 16),
            Format::Q8_0 => (1536, 16),
            Format::Q4K => (768, 64),
            Format::Q6K | Format::F32 => (2048, 64),
        };
        let (n_slice, width) = (self.per_split(n_col, plan), self.width(plan.k_warps));
        let is_single = plan.blocks >= n_out.div_ceil(width);
        let stages = self.stages(format, n_col, plan, n_out);
        let rows = self.n_row * ((n_slice * FEW_SLICE).min(FEW_COLUMNS) * 2 + pad);
        let all = rows + FEW_WARPS * stages * self.n_column * slice;
        if is_single { all.max(plan.k_warps * self.n_row * (width + 4) * 4) } else { all }
    }

    /// The most that it is launched with.
    fn most_shared(self, format: Format) -> u32 {
        [1, 8]
            .map(|k_warps| {
                let plan = Plan { which: 0, n_split: 1, k_warps, blocks: 1 };
                [1 << 16, 1].map(|n_out| self.shared(format, 1 << 16, plan, n_out)).into_iter().max().unwrap_or(0)
            })
            .into_iter()
            .max()
            .unwrap_or(0)
    }
}

/// Columns of W that a stage holds.
const TILE_K: u32 = 64;
const TILE_K_F32: u32 = 32;
const PITCH_F32: u32 = 36;
/// Parts of a sum at most.
pub(super) const MAX_SPLIT: u32 = 8;

impl Format {
    /// What kernels multiply matrices of this format by.
    pub(super) fn element(self) -> Element {
        match self {
            Format::F32 => Element::F32,
            Format::Bf16 => Element::Bf16,
            Format::F16 | Format::Q8_0 | Format::Q4K | Format::Q6K => Element::F16,
        }
    }

    pub(super) fn of(matrix: &Matrix) -> Format {
        const FORMATS: [Format; 6] = [Format::F32, Format::F16, Format::Bf16, Format::Q8_0, Format::Q4K, Format::Q6K];
        FORMATS[matrix.format as usize]
    }

    /// Bytes that a stage of quants takes for each row of W: `Raw` in product.cuh.
    fn raw_bytes(self) -> u32 {
        match self {
            Format::F32 | Format::F16 | Format::Bf16 => 0,
            Format::Q8_0 => 64 + 2 * 16,
            Format::Q4K => 32 + 16,
            Format::Q6K => 64 + 32 + 16 + 16,
        }
    }

    /// The kernel that unpacks it to f16, where it is quantized.
    fn expand(self) -> Option<&'static str> {
        match self {
            Format::F32 | Format::F16 | Format::Bf16 => None,
            Format::Q8_0 => Some("product_q8_0_expand"),
            Format::Q4K => Some("product_q4_k_expand"),
            Format::Q6K => Some("product_q6_k_expand"),
        }
    }

    fn shapes(self) -> &'static [Shape] {
        if self == Format::F32 { &SHAPES_F32 } else { &SHAPES }
    }

    fn kernels(self) -> (&'static str, &'static [&'static str]) {
        macro_rules! product {
            ($name:literal) => {
                (
                    include_str!(concat!("../../ptx/product_", $name, ".ptx")),
                    &[
                        concat!("product_", $name, "_16"),
                        concat!("product_", $name, "_32"),
                        concat!("product_", $name, "_64"),
                        concat!("product_", $name, "_128"),
                        concat!("product_", $name, "_few_16"),
                        concat!("product_", $name, "_few_32"),
                        concat!("product_", $name, "_few_64"),
                    ],
                )
            };
        }
        match self {
            Format::F32 => {
                (include_str!("../../ptx/product_f32.ptx"), &["product_f32_16", "product_f32_32", "product_f32_64"])
            }
            Format::F16 => product!("f16"),
            Format::Bf16 => product!("bf16"),
            Format::Q8_0 => product!("q8_0"),
            Format::Q4K => product!("q4_k"),
            Format::Q6K => product!("q6_k"),
        }
    }
}

impl Shape {
    fn threads(self) -> u32 {
        2 * self.n_column * self.n_group
    }

    fn shared(self, format: Format) -> u32 {
        if format == Format::F32 {
            return self.stages * (self.n_row + self.n_column) * PITCH_F32 * 4;
        }
        let raw = format.raw_bytes();
        let buffers = match raw {
            0 => self.stages,
            // So that two blocks find room on a multiprocessor.
            65.. if self.n_row == 128 => 1,
            _ => 2,
        };
        let tile = TILE_K * 2;
        let tiles = self.stages * (self.n_row * tile + self.n_column * raw) + buffers * self.n_column * tile;
        // What was summed up takes their place in the end.
        self.n_group * tiles.max(self.n_row * (self.n_column + 8) * 4)
    }
}

/// The kernels of the formats that a model has.
#[derive(Debug)]
pub(super) struct Products {
    /// Of each shape, where blocks of the GPU have shared memory enough.
    kernels: BTreeMap<u32, Vec<Option<Kernel>>>,
    /// What unpacks a quantized format, and room for what comes of it.
    expand: BTreeMap<u32, Kernel>,
    expanded: Buffer<u8>,
    n_multiprocessor: u32,
}

impl Products {
    /// With room for `n_expanded` weights that are unpacked.
    pub(super) fn new(gpu: &Arc<Gpu>, formats: impl Iterator<Item = Format>, n_expanded: usize) -> Result<Products> {
        let mut products = Products {
            kernels: BTreeMap::new(),
            expand: BTreeMap::new(),
            expanded: gpu.alloc("unpacked weights", 2 * n_expanded)?,
            n_multiprocessor: gpu.n_multiprocessor() as u32,
        };
        for format in formats.chain((n_expanded > 0).then_some(Format::F16)) {
            if products.kernels.contains_key(&(format as u32)) {
                continue;
            }
            let (ptx, names) = format.kernels();
            let module = Module::load(gpu, ptx)?;
            if let Some(name) = format.expand() {
                products.expand.insert(format as u32, module.kernel(name)?);
            }
            let mut kernels = Vec::new();
            for (i, name) in names.iter().enumerate() {
                let kernel = module.kernel(name)?;
                if let Some(shape) = format.shapes().get(i) {
                    kernel.allow_shared(shape.shared(format))?;
                    kernels.push(Some(kernel));
                } else {
                    let shape = FEW_SHAPES[i - SHAPES.len()];
                    kernels.push(kernel.allow_shared(shape.most_shared(format)).is_ok().then_some(kernel));
                }
            }
            products.kernels.insert(format as u32, kernels);
        }
        Ok(products)
    }

    /// Queues `product` for its first `n_matrix` matrices, which are of one format and one size. A sum is split over as many blocks as
    /// fill the GPU, where results are partial and `room` elements of f32 let it; gives the number of parts that are to be added.
    ///
    /// # Safety
    /// As [`Kernel::launch`]: every address in `product` must be valid for what it is used for.
    pub(super) unsafe fn launch(&self, stream: &Stream, product: Product, n_matrix: u32, room: usize) -> Result<u32> {
        let plan = self.plan(&product, n_matrix, room);
        let mut product = product;
        if plan.which < SHAPES.len() && Self::mean_rows(&product) >= EXPAND_ROWS {
            // SAFETY: the caller's promise.
            unsafe { self.expand(stream, &mut product, n_matrix) }?;
        }
        // SAFETY: the caller's promise.
        unsafe { self.launch_as(stream, product, n_matrix, plan) }?;
        Ok(plan.n_split)
    }

    /// Queues unpacking of what `product` multiplies by, and lets it multiply by that, if it is quantized and there is room.
    ///
    /// # Safety
    /// As [`Products::launch`].
    pub(super) unsafe fn expand(&self, stream: &Stream, product: &mut Product, n_matrix: u32) -> Result<()> {
        let w = product.w[0];
        let n_stack = if Self::has_experts(product) { product.n_expert } else { 1 };
        let bytes = 2 * u64::from(w.n_row) * u64::from(w.n_col);
        let Some(kernel) = self.expand.get(&w.format) else { return Ok(()) };
        if u64::from(n_matrix * n_stack) * bytes > self.expanded.len() as u64 {
            return Ok(());
        }
        for (i, w) in (0..).zip(&mut product.w[..n_matrix as usize]) {
            let to = self.expanded.address() + i * bytes;
            let blocks = [w.n_row.div_ceil(128), w.n_col.div_ceil(TILE_K), n_stack];
            let grid = Grid { blocks, threads: 256, shared: 0 };
            // SAFETY: the kernel's arguments, with room as was just seen; the rest is the caller's promise.
            unsafe { kernel.launch(stream, grid, &[Arg::value(*w), Arg::value(to)]) }?;
            (w.data, w.matrix_bytes, w.format) = (to, bytes, Format::F16 as u32);
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn expanded(&self) -> &Buffer<u8> {
        &self.expanded
    }

    fn has_experts(product: &Product) -> bool {
        product.offsets != 0 || product.choices != 0
    }

    /// Whether the kernel for `product`, which has `choices`, finds each expert's rows by itself. Its other rows, those that are not
    /// of tokens, then lie in the order of entries.
    pub(super) fn finds_rows(&self, product: &Product, room: usize) -> bool {
        product.n_row <= FEW_ENTRIES && self.plan_few(product, 1, room).is_some()
    }

    /// How many rows a matrix meets: where there are experts, on average.
    fn mean_rows(product: &Product) -> u32 {
        if Self::has_experts(product) { product.n_row.div_ceil(product.n_expert) } else { product.n_row }
    }

    /// Into how many parts a sum may be split.
    fn max_split(product: &Product, room: usize) -> u32 {
        if product.output_kind != Output::Partial as u32 {
            return 1;
        }
        let part = u64::from(product.n_row) * u64::from(product.output_stride);
        u32::try_from(room as u64 / part.max(1)).unwrap_or(u32::MAX).clamp(1, MAX_SPLIT)
    }

    fn plan(&self, product: &Product, n_matrix: u32, room: usize) -> Plan {
        self.plan_few(product, n_matrix, room).unwrap_or_else(|| {
            let which = self.shape(product, n_matrix);
            self.plan_of(product, which, self.splits(product, which, room))
        })
    }

    /// By that kernel, every tile by a block of its own.
    pub(super) fn plan_of(&self, product: &Product, which: usize, n_split: u32) -> Plan {
        let width = match Format::of(&product.w[0]).shapes().get(which) {
            Some(shape) => shape.n_column,
            None => FEW_SHAPES[which - SHAPES.len()].width(1),
        };
        Plan { which, n_split, k_warps: 1, blocks: product.w[0].n_row.div_ceil(width) }
    }

    fn plan_few(&self, product: &Product, n_matrix: u32, room: usize) -> Option<Plan> {
        let (n_out, n_col) = (product.w[0].n_row, product.w[0].n_col);
        let mean = Self::mean_rows(product);
        let has_experts = Self::has_experts(product);
        let kernels = &self.kernels[&(Format::of(&product.w[0]) as u32)];
        let has = |which: usize| kernels.get(which).is_some_and(Option::is_some);
        if u64::from(n_out) * u64::from(n_col) >= 1 << 31
            || mean > if has_experts { FEW_ROWS_OF_EXPERT } else { FEW_ROWS }
        {
            return None;
        }
        let n_slice = n_col.div_ceil(FEW_SLICE);
        let max_split = Self::max_split(product, room);

        // A matrix of very many rows: every multiprocessor goes through its part of it.
        let is_plain = product.output_kind == Output::Partial as u32 && !has_experts && product.weights == 0;
        let which = SHAPES.len() + usize::from(mean > 16) + usize::from(mean > 32);
        let shape = FEW_SHAPES[which - SHAPES.len()];
        if is_plain
            && room == 0
            && mean <= 128
            && n_col <= FEW_COLUMNS
            && n_out >= 2 * shape.width(1) * self.n_multiprocessor
        {
            let plan =
                Plan { which, n_split: 1, k_warps: 1, blocks: self.n_multiprocessor / mean.div_ceil(shape.n_row) };
            return has(which).then_some(plan);
        }

        // Up to 64 rows of a dense matrix make more blocks in tiles of 32.
        let wide = if has_experts { mean > 40 } else { mean > 64 };
        let which = SHAPES.len() + usize::from(mean > 16) + usize::from(wide);
        let shape = FEW_SHAPES[which - SHAPES.len()];
        let row_tiles = mean.div_ceil(shape.n_row) * if has_experts { product.n_expert } else { 1 };
        // The widest tiles, for which the rows are read least often, that keep every multiprocessor at work; or else the most blocks.
        let mut best: Option<(u32, Plan)> = None;
        for k_warps in [1, 2, 4, 8] {
            let least = n_slice.div_ceil(FEW_COLUMNS / FEW_SLICE).min(max_split);
            for n_split in least..=max_split {
                if n_slice.div_ceil(n_split) < k_warps && (k_warps > 1 || n_split > least) {
                    break;
                }
                let blocks = n_out.div_ceil(shape.width(k_warps));
                let all = blocks * row_tiles * n_matrix * n_split;
                let is_enough = best.is_some_and(|(most, _)| most >= self.n_multiprocessor);
                if !is_enough && best.is_none_or(|(most, _)| all > most) {
                    best = Some((all, Plan { which, n_split, k_warps, blocks }));
                }
            }
        }
        best.map(|(_, plan)| plan).filter(|plan| has(plan.which))
    }

    fn shape(&self, product: &Product, n_matrix: u32) -> usize {
        let mean = Self::mean_rows(product);
        match mean {
            0..=16 => 0,
            17..=32 => 1,
            _ if Format::of(&product.w[0]) == Format::F32 => 2,
            _ => {
                // Wide tiles where they alone occupy most of the GPU.
                let wide = SHAPES[3];
                let n_expert = if Self::has_experts(product) { product.n_expert } else { 1 };
                let n = mean / wide.n_row * product.w[0].n_row.div_ceil(wide.n_column) * n_matrix * n_expert;
                if n * 4 >= self.n_multiprocessor * 3 { 3 } else { 2 }
            }
        }
    }

    fn splits(&self, product: &Product, which: usize, room: usize) -> u32 {
        let format = Format::of(&product.w[0]);
        let (shape, tile_k) = (format.shapes()[which], if format == Format::F32 { TILE_K_F32 } else { TILE_K });
        let n_expert = if Self::has_experts(product) { product.n_expert } else { 1 };
        let row_tiles = Self::mean_rows(product).div_ceil(shape.n_row) * n_expert;
        let blocks = row_tiles * product.w[0].n_row.div_ceil(shape.n_column);
        let k_tiles = product.w[0].n_col.div_ceil(tile_k);
        (2 * self.n_multiprocessor / blocks.max(1)).min(k_tiles / 2).min(Self::max_split(product, room)).max(1)
    }

    /// # Safety
    /// As [`Products::launch`].
    pub(super) unsafe fn launch_as(
        &self,
        stream: &Stream,
        mut product: Product,
        n_matrix: u32,
        plan: Plan,
    ) -> Result<()> {
        let format = Format::of(&product.w[0]);
        let (n_row, threads, shared) = match format.shapes().get(plan.which) {
            Some(shape) => (shape.n_row, shape.threads(), shape.shared(format)),
            None => {
                let shape = FEW_SHAPES[plan.which - SHAPES.len()];
                let (n_col, n_out) = (product.w[0].n_col, product.w[0].n_row);
                let shared = shape.shared(format, n_col, plan, n_out);
                product.k_shift = plan.k_warps.trailing_zeros();
                product.per_split = shape.per_split(n_col, plan);
                product.n_tile = n_out.div_ceil(shape.width(plan.k_warps));
                product.n_stage = shape.stages(format, n_col, plan, n_out);
                // Exact for entries up to 2^16: n_used is at most 32. 1 has none.
                product.inverse = u32::try_from((1u64 << 32).div_ceil(u64::from(product.n_used.max(1)))).unwrap_or(0);
                (shape.n_row, FEW_WARPS * 32, shared)
            }
        };
        // With experts, as many tiles as there can be: each may end with one that is not full.
        let row_tiles = if product.choices != 0 {
            // No row chooses an expert twice.
            (product.n_row / product.n_used).div_ceil(n_row) * product.n_expert
        } else if product.offsets != 0 {
            product.n_row / n_row + product.n_expert.min(product.n_row)
        } else {
            product.n_row.div_ceil(n_row)
        };
        product.n_split = plan.n_split;
        let grid = Grid { blocks: [plan.blocks, row_tiles, n_matrix * plan.n_split], threads, shared };
        let kernel = self.kernels[&(format as u32)][plan.which].as_ref();
        let Some(kernel) = kernel else { unreachable!("a plan names kernels that are there") };
        // SAFETY: the argument is the kernel's; the rest is the caller's promise.
        unsafe { kernel.launch(stream, grid, &[Arg::value(product)]) }
    }
}
