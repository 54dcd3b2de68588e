//! Products of rows with a model's matrices: which kernel, how many blocks, and how a long sum is split when few blocks would run.

use bytemuck::{Pod, Zeroable};

use crate::caches::CacheTable;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::kernel::{Arg, Grid, Kernel, Module};
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
    pub unused: u32,
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
    kernels: BTreeMap<u32, Vec<Kernel>>,
    n_multiprocessor: u32,
}

impl Products {
    pub(super) fn new(gpu: &Arc<Gpu>, formats: impl Iterator<Item = Format>) -> Result<Products> {
        let mut products = Products { kernels: BTreeMap::new(), n_multiprocessor: gpu.n_multiprocessor() as u32 };
        for format in formats {
            if products.kernels.contains_key(&(format as u32)) {
                continue;
            }
            let (ptx, names) = format.kernels();
            let module = Module::load(gpu, ptx)?;
            let mut kernels = Vec::new();
            for (i, name) in names.iter().enumerate() {
                let kernel = module.kernel(name)?;
                kernel.allow_shared(format.shapes()[i].shared(format))?;
                kernels.push(kernel);
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
        let which = self.shape(&product, n_matrix);
        let n_split = self.splits(&product, which, room);
        // SAFETY: the caller's promise.
        unsafe { self.launch_as(stream, product, n_matrix, which, n_split) }?;
        Ok(n_split)
    }

    /// How many rows a matrix meets: where there are experts, on average.
    fn mean_rows(product: &Product) -> u32 {
        if product.offsets != 0 { product.n_row.div_ceil(product.n_expert) } else { product.n_row }
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
                let n_expert = if product.offsets != 0 { product.n_expert } else { 1 };
                let n = mean / wide.n_row * product.w[0].n_row.div_ceil(wide.n_column) * n_matrix * n_expert;
                if n * 4 >= self.n_multiprocessor * 3 { 3 } else { 2 }
            }
        }
    }

    fn splits(&self, product: &Product, which: usize, room: usize) -> u32 {
        if product.output_kind != Output::Partial as u32 {
            return 1;
        }
        let format = Format::of(&product.w[0]);
        let (shape, tile_k) = (format.shapes()[which], if format == Format::F32 { TILE_K_F32 } else { TILE_K });
        let n_expert = if product.offsets != 0 { product.n_expert } else { 1 };
        let row_tiles = Self::mean_rows(product).div_ceil(shape.n_row) * n_expert;
        let blocks = row_tiles * product.w[0].n_row.div_ceil(shape.n_column);
        let part = u64::from(product.n_row) * u64::from(product.output_stride);
        let room = u32::try_from(room as u64 / part.max(1)).unwrap_or(u32::MAX);
        let k_tiles = product.w[0].n_col.div_ceil(tile_k);
        (2 * self.n_multiprocessor / blocks.max(1)).min(k_tiles / 2).min(MAX_SPLIT).min(room).max(1)
    }

    /// # Safety
    /// As [`Products::launch`].
    pub(super) unsafe fn launch_as(
        &self,
        stream: &Stream,
        mut product: Product,
        n_matrix: u32,
        which: usize,
        n_split: u32,
    ) -> Result<()> {
        let format = Format::of(&product.w[0]);
        let shape = format.shapes()[which];
        // With experts, as many tiles as there can be: each may end with one that is not full.
        let row_tiles = if product.offsets != 0 {
            product.n_row / shape.n_row + product.n_expert.min(product.n_row)
        } else {
            product.n_row.div_ceil(shape.n_row)
        };
        product.n_split = n_split;
        let grid = Grid {
            blocks: [product.w[0].n_row.div_ceil(shape.n_column), row_tiles, n_matrix * n_split],
            threads: shape.threads(),
            shared: shape.shared(format),
        };
        // SAFETY: the argument is the kernel's; the rest is the caller's promise.
        unsafe { self.kernels[&(format as u32)][which].launch(stream, grid, &[Arg::value(product)]) }
    }
}
