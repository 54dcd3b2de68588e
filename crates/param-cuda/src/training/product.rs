//! `C = A B` on tensor cores, 90% of a step: factors stored either way round, rows gathered, matrices in groups whose sizes only the
//! GPU knows, and what follows a product while its sums are at hand.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::cublaslt::CublasLt;
use super::{Dropped, Element, Rows, View};
use crate::args;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::kernel::{Arg, Grid, Kernel, Module};
use crate::model::Activation;
use crate::stream::Stream;

#[cfg(test)]
mod tests;

/// How products are computed; their sums are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Arithmetic {
    /// Of f32, each split into two parts of 11 bits, three products for each: what is lost is about 2^-21 of a product.
    F32,
    /// Of f32 rounded to 11 bits: 2^-11 of a factor is lost.
    Tf32,
    /// Of bf16.
    Bf16,
}

impl Arithmetic {
    /// Type of the factors.
    pub fn element(self) -> Element {
        match self {
            Arithmetic::F32 | Arithmetic::Tf32 => Element::F32,
            Arithmetic::Bf16 => Element::Bf16,
        }
    }

    /// Elements of sums that a tile is deep.
    fn tile_k(self) -> usize {
        TILE_BYTES / self.element().bytes()
    }
}

/// How products are multiplied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Matmul {
    /// By each warp (`mma.sync`): any arithmetic on any GPU.
    #[default]
    Mma,
    /// Large ones by four warps together (`wgmma`), of bf16 on compute capability 9.0 alone. Not the default until it has been measured
    /// on a GPU.
    Wgmma,
}

impl Matmul {
    /// Refuses what it does not multiply.
    ///
    /// # Errors
    /// [`Error::Matmul`].
    pub fn check(self, gpu: &Gpu, arithmetic: Arithmetic) -> Result<()> {
        let problem = match (self, arithmetic, gpu.capability()) {
            (Matmul::Mma, ..) | (Matmul::Wgmma, Arithmetic::Bf16, (9, 0)) => return Ok(()),
            (Matmul::Wgmma, Arithmetic::Bf16, (major, minor)) => {
                format!("a GPU of compute capability 9.0: that of {} is {major}.{minor}", gpu.name())
            }
            (Matmul::Wgmma, Arithmetic::F32 | Arithmetic::Tf32, _) => format!("bf16: this is {arithmetic:?}"),
        };
        Err(Error::Matmul { matmul: "wgmma", problem })
    }
}

/// A factor of a product, or a stack of them: its matrices' rows follow one another.
#[derive(Clone, Copy, Debug)]
pub struct Factor<'a> {
    /// As stored.
    pub rows: Rows<'a>,
    /// Whether the transpose of what is stored is the factor.
    pub transposed: bool,
    /// The row of `rows` in the place of each row, of `A` alone.
    pub gather: Option<View<'a, u32>>,
}

impl<'a> Factor<'a> {
    /// The matrix as it is stored.
    pub fn new(rows: Rows<'a>) -> Self {
        Self { rows, transposed: false, gather: None }
    }

    /// Its transpose.
    pub fn transposed(rows: Rows<'a>) -> Self {
        Self { rows, transposed: true, gather: None }
    }

    /// Row `i` as stored is row `rows[i]` of what was given.
    pub fn gathered(self, rows: View<'a, u32>) -> Self {
        Self { gather: Some(rows), ..self }
    }

    /// Multiplications and additions of its product with `b`; of groups whose rows only the GPU knows as if all there is room for were taken.
    pub(super) fn n_operation(&self, b: &Factor, groups: Groups) -> f64 {
        let Shape { m, n, k, n_matrix, n_sum_group, .. } = Shape::new(self, b, groups);
        // Groups of sums share the depth among their matrices.
        2.0 * m as f64 * n as f64 * k as f64 * (n_matrix / n_sum_group.max(1)).max(1) as f64
    }

    /// Rows and columns as stored, of all matrices.
    fn stored(&self) -> (usize, usize) {
        (self.gather.map_or(self.rows.n_row(), View::len), self.rows.n_col())
    }
}

impl<'a> From<Rows<'a>> for Factor<'a> {
    fn from(rows: Rows<'a>) -> Self {
        Self::new(rows)
    }
}

/// Which matrices are multiplied. `starts` holds `n + 1` ascending rows, the last no more than there are.
#[derive(Clone, Copy, Debug)]
pub enum Groups<'a> {
    /// `A` [m, k] with `B` [k, n] to `C` [m, n].
    One,
    /// Rows `starts[g]..starts[g + 1]` of `A` with matrix `g` of `B` [n, k, n_col] to the same rows of `C`; biases are [n, n_col].
    Rows {
        /// [n + 1], on the GPU.
        starts: View<'a, u32>,
        /// Groups.
        n: usize,
    },
    /// Sums over rows `starts[g]..starts[g + 1]` of `A`, which is transposed, and of `B` to matrix `g` of `C` [n, m, n_col].
    Sums {
        /// [n + 1], on the GPU.
        starts: View<'a, u32>,
        /// Groups.
        n: usize,
    },
    /// Matrix `g` of `A` with matrix `g` of `B` to matrix `g` of `C`.
    Stack {
        /// Matrices.
        n: usize,
    },
}

/// What becomes of the sums. `C` has the rows of all groups.
#[derive(Clone, Copy, Debug)]
pub enum Write<'a> {
    /// `C = sums`, in f32 or bf16.
    Replace(Rows<'a>),
    /// `C += sums`, in f32.
    Add(Rows<'a>),
    /// `out = drop(sums + bias)`.
    Biased {
        /// In f32 or bf16.
        out: Rows<'a>,
        /// [n_col], of [`Groups::Rows`] [n, n_col].
        bias: Option<View<'a, f32>>,
        /// Over element `row * n_col + col`.
        dropout: Option<Dropped<'a>>,
    },
    /// `pre = sums + bias`, `hidden = gelu(sums + bias)`.
    Activated {
        /// In f32 or bf16.
        pre: Rows<'a>,
        /// In the type of `pre`.
        hidden: Rows<'a>,
        /// As of [`Write::Biased`].
        bias: Option<View<'a, f32>>,
        /// Which GELU.
        activation: Activation,
    },
    /// The sums are the gradient of `gelu(pre)`: `dpre = sums gelu'(pre)`, `hidden = gelu(pre)`.
    ActivationBackward {
        /// In f32 or bf16.
        pre: Rows<'a>,
        /// In the type of `pre`; it may be `pre` itself.
        dpre: Rows<'a>,
        /// In the type of `pre`.
        hidden: Rows<'a>,
        /// Which GELU.
        activation: Activation,
    },
    /// `out = residual + drop(sums + bias)`, both in f32; they may be the same.
    Residual {
        /// In f32.
        out: Rows<'a>,
        /// In f32.
        residual: Rows<'a>,
        /// As of [`Write::Biased`].
        bias: Option<View<'a, f32>>,
        /// As of [`Write::Biased`].
        dropout: Option<Dropped<'a>>,
    },
    /// `out = sum_scale sums + with_scale with + diagonal I`, of matrices that are symmetric, so that half of them is computed. `out` is
    /// none of the factors, nor `with`.
    Symmetric {
        /// In f32.
        out: Rows<'a>,
        /// Factor of the sums.
        sum_scale: f32,
        /// In f32, and its factor.
        with: Option<(Rows<'a>, f32)>,
        /// Added to elements of the diagonal.
        diagonal: f32,
    },
}

/// `Write` in train_product_args.cuh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Kind {
    Replace,
    Add,
    Parts,
    Biased,
    Activated,
    ActivationBackward,
    Residual,
    Symmetric,
    AddAtomically,
}

/// `Product` in train_product_args.cuh, field by field.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct Product {
    a: u64,
    b: u64,
    a_matrix: u64,
    b_matrix: u64,
    gather: u64,
    starts: u64,
    out: u64,
    second: u64,
    with: u64,
    bias: u64,
    bits: u64,
    parts: u64,
    a_stride: u32,
    b_stride: u32,
    out_stride: u32,
    second_stride: u32,
    with_stride: u32,
    m: u32,
    n: u32,
    k: u32,
    n_row_tile: u32,
    n_col_tile: u32,
    groups: u32,
    n_group: u32,
    n_part: u32,
    write: u32,
    stored: u32,
    activation: u32,
    drop_scale: f32,
    sum_scale: f32,
    with_scale: f32,
    diagonal: f32,
}

/// Bytes of a tile's rows.
const TILE_BYTES: usize = 128;

/// A shape of tiles of C, by kernels of its own: `PRODUCT` in train_product.cuh and train_product_wgmma.cu.
#[derive(Clone, Copy, Debug)]
struct Tile {
    rows: usize,
    cols: usize,
    stages: usize,
    /// Threads of its block.
    threads: u32,
    /// Clocks of a multiprocessor that has enough blocks for a tile of k, in products of one pass, and for the rest of a block.
    clocks: usize,
    other_clocks: usize,
}

/// Clocks reckoned for an H100, whose tensor cores take 1.6 for each mma.sync; the small one is bound by shared memory.
const TILES: [Tile; 2] = [
    Tile { rows: 64, cols: 64, stages: 4, threads: 128, clocks: 400, other_clocks: 900 },
    Tile { rows: 128, cols: 128, stages: 3, threads: 128, clocks: 850, other_clocks: 2500 },
];

/// Tiles by warpgroups, in the order after [`TILES`]. Clocks by reckoning alone: the tensor cores take 1,024 for a tile of k of the large
/// one, and 512 of the other, whose factors take shared memory 640; the large one has its multiprocessor to itself, so that nothing
/// hides its first copies, nor the writing of its sums.
const WGMMA_TILES: [Tile; 2] = [
    Tile { rows: 128, cols: 128, stages: 3, threads: 256, clocks: 720, other_clocks: 2500 },
    Tile { rows: 128, cols: 256, stages: 4, threads: 256, clocks: 1250, other_clocks: 6500 },
];

impl Tile {
    /// Bytes of dynamic shared memory: the stages, and in their place the sums.
    fn shared(self) -> u32 {
        let stages = self.stages * (self.rows + self.cols) * TILE_BYTES;
        let sums = self.rows * (self.cols + 8) * 4;
        stages.max(sums) as u32
    }
}

/// The kernels of a shape of tiles, by whether A is transposed, and B.
type Kernels = (Tile, [[Kernel; 2]; 2]);

/// What is to become of sums, as far as plans differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Add,
    Symmetric,
    Other,
}

/// Parts of a sum at most.
const MAX_PART: usize = 32;
/// Threads of a block of `train_product_parts`.
const PARTS_THREADS: usize = 256;
/// Clocks of its launch, and bytes that a multiprocessor adds up in one.
const PARTS_CLOCKS: usize = 3500;
const PARTS_BYTES_PER_CLOCK: usize = 20;

/// Which tiles, and in how many parts sums are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    /// Of [`Products::tiles`].
    tile: usize,
    n_part: usize,
}

/// What is multiplied, in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Matrices of C.
    n_matrix: usize,
    /// Rows of C are those of [`Groups::Rows`], in that many groups.
    n_row_group: Option<usize>,
    /// Sums are those of [`Groups::Sums`], in that many groups.
    n_sum_group: usize,
}

impl Shape {
    /// # Panics
    /// Where factors and groups do not fit each other.
    pub(super) fn new(a: &Factor, b: &Factor, groups: Groups) -> Self {
        let ((a_row, a_col), (b_row, b_col)) = (a.stored(), b.stored());
        assert!(b.gather.is_none(), "rows of B are not gathered");
        let each = |n_row: usize, n: usize| {
            assert!(n > 0 && n_row.is_multiple_of(n), "{n_row} rows of {n} matrices");
            n_row / n
        };
        let turned = |turn: bool, (n_row, n_col): (usize, usize)| if turn { (n_col, n_row) } else { (n_row, n_col) };
        let check =
            |starts: View<u32>, n: usize| assert_eq!(starts.len(), n + 1, "one start more than there are groups");
        let (n_a, n_b, n_matrix, n_row_group, n_sum_group) = match groups {
            Groups::One => (1, 1, 1, None, 1),
            Groups::Rows { starts, n } => {
                check(starts, n);
                assert!(!a.transposed, "groups of rows as stored");
                (1, n, 1, Some(n), 1)
            }
            Groups::Sums { starts, n } => {
                check(starts, n);
                assert!(a.transposed && !b.transposed, "sums over rows as stored");
                (1, 1, n, None, n)
            }
            Groups::Stack { n } => {
                assert!(a.gather.is_none(), "rows of stacks are not gathered");
                (n, n, n, None, 1)
            }
        };
        let (m, k) = turned(a.transposed, (each(a_row, n_a), a_col));
        let (b_k, n) = turned(b.transposed, (each(b_row, n_b), b_col));
        assert_eq!(k, b_k, "A [{m}, {k}] times B [{b_k}, {n}]");
        Self { m, n, k, n_matrix, n_row_group, n_sum_group }
    }

    fn n_out_row(self) -> usize {
        self.n_matrix * self.m
    }

    /// Tiles of rows that each of the matrices has at most.
    fn row_tiles(self, rows: usize) -> usize {
        match self.n_row_group {
            Some(n) => self.m / rows + n.min(self.m),
            None => self.m.div_ceil(rows),
        }
    }

    /// Tiles that are computed: of a symmetric matrix those with anything on the diagonal or above it.
    fn tiles(self, tile: Tile, is_symmetric: bool) -> usize {
        let (rows, cols) = (self.row_tiles(tile.rows), self.n.div_ceil(tile.cols));
        let above = |col: usize| ((col + 1) * tile.cols).div_ceil(tile.rows).min(rows);
        let each = if is_symmetric { (0..cols).map(above).sum() } else { rows * cols };
        each * self.n_matrix
    }

    /// Elements of `parts` for each part.
    fn part_len(self) -> usize {
        self.n_out_row() * self.n.next_multiple_of(4)
    }
}

/// The kernels of products in one arithmetic.
#[derive(Clone, Debug)]
pub struct Products {
    arithmetic: Arithmetic,
    cublaslt: Option<Arc<CublasLt>>,
    /// Whether parts of sums meet in an order of their own.
    is_deterministic: bool,
    /// [`TILES`], and where products are by warpgroups [`WGMMA_TILES`].
    tiles: Vec<Kernels>,
    parts: Kernel,
    n_multiprocessor: usize,
}

impl Products {
    /// Loads them.
    ///
    /// # Errors
    /// [`Error::Matmul`], or a module or a kernel that the driver refuses.
    pub fn new(gpu: &Arc<Gpu>, arithmetic: Arithmetic, matmul: Matmul) -> Result<Self> {
        matmul.check(gpu, arithmetic)?;
        // Of a module, the kernels of each of some tiles.
        macro_rules! kernels {
            ($name:literal, $tiles:expr, $($size:literal),*) => {{
                let module = Module::load(gpu, include_str!(concat!("../../ptx/train_product_", $name, ".ptx")))?;
                let names = [$([
                    [concat!("train_product_", $name, "_nn_", $size), concat!("train_product_", $name, "_nt_", $size)],
                    [concat!("train_product_", $name, "_tn_", $size), concat!("train_product_", $name, "_tt_", $size)],
                ]),*];
                load(&module, $tiles.into_iter().zip(names))?
            }};
        }
        let mut tiles = match arithmetic {
            Arithmetic::F32 => kernels!("f32", TILES, "64", "128"),
            Arithmetic::Tf32 => kernels!("tf32", TILES, "64", "128"),
            Arithmetic::Bf16 => kernels!("bf16", TILES, "64", "128"),
        };
        match matmul {
            Matmul::Mma => {}
            Matmul::Wgmma => tiles.extend(kernels!("wgmma", WGMMA_TILES, "128x128", "128x256")),
        }
        let parts =
            Module::load(gpu, include_str!("../../ptx/train_product_parts.ptx"))?.kernel("train_product_parts")?;
        Ok(Self {
            arithmetic,
            cublaslt: None,
            is_deterministic: true,
            tiles,
            parts,
            n_multiprocessor: gpu.n_multiprocessor(),
        })
    }

    /// The same, but plain dense products by cuBLASLt where its library is found, for which these kernels stand in otherwise.
    ///
    /// # Errors
    /// [`crate::Error::Call`]: a library that was found and fails.
    pub fn with_cublaslt(self, gpu: &Arc<Gpu>) -> Result<Self> {
        Ok(Self { cublaslt: CublasLt::open(gpu, self.arithmetic)?.map(Arc::new), ..self })
    }

    /// Whether some are cuBLASLt's.
    pub(super) fn uses_cublaslt(&self) -> bool {
        self.cublaslt.is_some()
    }

    /// The same, but several blocks that share the sums of a [`Write::Add`] add them where they belong, whichever comes first: two runs
    /// differ in the last bits.
    pub fn non_deterministic(self) -> Self {
        Self { is_deterministic: false, ..self }
    }

    /// Elements of the workspace with which [`Write::Replace`] and [`Write::Add`] are fastest. With fewer, or none, they are right as well.
    ///
    /// # Panics
    /// Where factors and groups do not fit each other.
    #[cfg(test)]
    pub fn workspace_len(&self, a: Factor, b: Factor, groups: Groups) -> usize {
        let shape = Shape::new(&a, &b, groups);
        match self.plan(shape, shape.part_len().saturating_mul(MAX_PART), Wanted::Other) {
            Plan { n_part: 1, .. } => 0,
            Plan { n_part, .. } => n_part * shape.part_len(),
        }
    }

    /// The fastest plan whose parts lie in a workspace of `room` elements.
    fn plan(&self, shape: Shape, room: usize, write: Wanted) -> Plan {
        let passes = if self.arithmetic == Arithmetic::F32 { 3 } else { 1 };
        let k_tiles = (shape.k / shape.n_sum_group).div_ceil(self.arithmetic.tile_k()).max(1);
        let atomically = write == Wanted::Add && !self.is_deterministic;
        let most = match shape.part_len() {
            0 => 1,
            _ if shape.n_row_group.is_some() => 1,
            _ if atomically => MAX_PART,
            len => (room / len).max(1),
        };
        let mut best = (usize::MAX, Plan { tile: 0, n_part: 1 });
        for (tile, &(sizes, _)) in self.tiles.iter().enumerate() {
            let n_tile = shape.tiles(sizes, write == Wanted::Symmetric);
            for n_part in 1..=most.min(MAX_PART).min(k_tiles) {
                let each = k_tiles.div_ceil(n_part) * sizes.clocks * passes + sizes.other_clocks;
                // Read and written in the second-level cache, by other work's side; or written, read by another kernel and written.
                let (launch, times) = if atomically { (0, n_part) } else { (PARTS_CLOCKS, 2 * n_part + 1) };
                let bytes = times * shape.part_len() * 4;
                let adding = launch + bytes / (self.n_multiprocessor * PARTS_BYTES_PER_CLOCK);
                let clocks =
                    (n_tile * n_part).div_ceil(self.n_multiprocessor) * each + if n_part > 1 { adding } else { 0 };
                // Of equals the larger tiles: they read less.
                if clocks <= best.0 && (clocks < best.0 || n_part == 1) {
                    best = (clocks, Plan { tile, n_part });
                }
            }
        }
        best.1
    }

    /// Queues `C = A B`. A workspace of [`Products::workspace_len`] lets several blocks share long sums; the results do not depend on
    /// anything but shapes and the workspace's size, unless [`Products::non_deterministic`] said otherwise.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    ///
    /// # Panics
    /// Where shapes or types do not fit each other.
    pub fn compute(
        &self,
        stream: &Stream,
        a: Factor,
        b: Factor,
        groups: Groups,
        write: Write,
        workspace: Option<View<f32>>,
    ) -> Result<()> {
        if let Some(cublaslt) = &self.cublaslt
            && cublaslt.compute(stream, (a, b), groups, write, workspace)?
        {
            return Ok(());
        }
        let shape = Shape::new(&a, &b, groups);
        let room = if matches!(write, Write::Replace(_) | Write::Add(_)) { workspace.map_or(0, View::len) } else { 0 };
        let wanted = match write {
            Write::Add(_) => Wanted::Add,
            Write::Symmetric { .. } => Wanted::Symmetric,
            _ => Wanted::Other,
        };
        let plan = self.plan(shape, room, wanted);
        self.compute_as(stream, a, b, groups, write, workspace, plan)
    }

    fn compute_as(
        &self,
        stream: &Stream,
        a: Factor,
        b: Factor,
        groups: Groups,
        write: Write,
        workspace: Option<View<f32>>,
        plan: Plan,
    ) -> Result<()> {
        let shape = Shape::new(&a, &b, groups);
        let Shape { m, n, k, n_matrix, .. } = shape;
        if m == 0 || n == 0 {
            return Ok(());
        }
        for factor in [&a, &b] {
            assert_eq!(factor.rows.element(), self.arithmetic.element(), "factors of {:?}", self.arithmetic);
            let chunks = factor.rows.n_row() * factor.rows.stride() / self.arithmetic.element().per_copy();
            assert!(u32::try_from(chunks).is_ok(), "a factor of {chunks} times 16 bytes");
        }
        let number = |n: usize| u32::try_from(n).unwrap_or_else(|_| panic!("{n} rows or columns"));
        let stride = |rows: Rows| number(rows.stride() / rows.element().per_copy());
        let bytes = |rows: Rows, n: usize| (rows.n_row() / n * rows.stride() * rows.element().bytes()) as u64;
        let (kind, starts, n_group, matrices) = match groups {
            Groups::One => (0, 0, 1, (0, 0)),
            Groups::Rows { starts, n } => (1, starts.address(), n, (0, bytes(b.rows, n))),
            Groups::Sums { starts, n } => (2, starts.address(), n, (0, 0)),
            Groups::Stack { n } => (3, 0, n, (bytes(a.rows, n), bytes(b.rows, n))),
        };
        let (tile, kernels) = &self.tiles[plan.tile];
        let (n_row_tile, n_col_tile) = (shape.row_tiles(tile.rows), n.div_ceil(tile.cols));
        let mut product = Product {
            a: a.rows.address(),
            b: b.rows.address(),
            a_matrix: matrices.0,
            b_matrix: matrices.1,
            gather: a.gather.map_or(0, View::address),
            starts,
            a_stride: stride(a.rows),
            b_stride: stride(b.rows),
            m: number(m),
            n: number(n),
            k: number(k),
            n_row_tile: number(n_row_tile),
            n_col_tile: number(n_col_tile),
            groups: kind,
            n_group: number(n_group),
            n_part: number(plan.n_part),
            ..Product::default()
        };
        let out = self.describe(&mut product, shape, groups, write);
        let in_parts = plan.n_part > 1;
        assert!(
            !in_parts || matches!(write, Write::Replace(_) | Write::Add(_)) && shape.n_row_group.is_none(),
            "in parts"
        );
        let meet_later = in_parts && (self.is_deterministic || matches!(write, Write::Replace(_)));
        if in_parts && !meet_later {
            product.write = Kind::AddAtomically as u32;
        }
        if meet_later {
            let parts = workspace.expect("parts have a workspace");
            assert!(
                parts.len() >= plan.n_part * shape.part_len(),
                "{} elements for {} parts",
                parts.len(),
                plan.n_part
            );
            assert!(parts.address().is_multiple_of(16), "a workspace begins at a multiple of 16 bytes");
            product.parts = parts.address();
            product.write = Kind::Parts as u32;
        }
        let blocks = [number(n_row_tile * n_col_tile), product.n_part, number(n_matrix)];
        let kernel = &kernels[usize::from(a.transposed)][usize::from(b.transposed)];
        let grid = Grid { blocks, threads: tile.threads, shared: tile.shared() };
        // SAFETY: the argument is the kernel's. Tiles of A, B, C and what has its shape end where `Shape` and `describe` found that
        // these end; groups and gathered rows lie inside by this operation's contract; parts were measured above.
        unsafe { kernel.launch(stream, grid, &[Arg::value(product)])? };
        if meet_later {
            let quads = shape.part_len() / 4;
            let blocks = [number(quads.div_ceil(PARTS_THREADS)), 1, 1];
            let grid = Grid { blocks, threads: PARTS_THREADS as u32, shared: 0 };
            let adds = u32::from(matches!(write, Write::Add(_)));
            let (n_row, stored) = (number(shape.n_out_row()), product.stored);
            let args = args![product.parts, product.n_part, out, n_row, product.n, product.out_stride, stored, adds];
            // SAFETY: the arguments are the kernel's; it reads the parts just measured, and `out` was found to have their shape.
            unsafe { self.parts.launch(stream, grid, &args)? };
        }
        Ok(())
    }

    /// Says in `product` what becomes of the sums, and returns where they go.
    ///
    /// # Panics
    /// Where shapes or types do not fit.
    fn describe<'a>(&self, product: &mut Product, shape: Shape, groups: Groups, write: Write<'a>) -> Rows<'a> {
        let fits = |what: &str, rows: Rows, element: Option<Element>| {
            assert_eq!((rows.n_row(), rows.n_col()), (shape.n_out_row(), shape.n), "shape of {what}");
            assert!(element.is_none_or(|e| e == rows.element()), "{what} in {:?}", rows.element());
            u32::try_from(rows.stride()).unwrap_or_else(|_| panic!("{what} of rows {} apart", rows.stride()))
        };
        let n_bias = shape.n_row_group.unwrap_or(1);
        let bias = |bias: Option<View<f32>>| {
            bias.map_or(0, |b| {
                assert_eq!(b.len(), n_bias * shape.n, "a bias for each of {n_bias} times {} columns", shape.n);
                b.address()
            })
        };
        let is_rows = matches!(groups, Groups::One | Groups::Rows { .. });
        let (kind, out) = match write {
            Write::Replace(out) => {
                product.out_stride = fits("what is replaced", out, None);
                (Kind::Replace, out)
            }
            Write::Add(out) => {
                product.out_stride = fits("what is added to", out, Some(Element::F32));
                (Kind::Add, out)
            }
            Write::Biased { out, bias: b, dropout } => {
                assert!(is_rows, "rows with a bias");
                product.out_stride = fits("the output", out, None);
                product.bias = bias(b);
                drops(product, shape, dropout);
                (Kind::Biased, out)
            }
            Write::Activated { pre, hidden, bias: b, activation } => {
                assert!(is_rows, "rows with a bias");
                product.out_stride = fits("`pre`", pre, None);
                product.second_stride = fits("`hidden`", hidden, Some(pre.element()));
                product.second = hidden.address();
                product.bias = bias(b);
                product.activation = activation as u32;
                (Kind::Activated, pre)
            }
            Write::ActivationBackward { pre, dpre, hidden, activation } => {
                product.with_stride = fits("`pre`", pre, None);
                product.out_stride = fits("`dpre`", dpre, Some(pre.element()));
                product.second_stride = fits("`hidden`", hidden, Some(pre.element()));
                product.with = pre.address();
                product.second = hidden.address();
                product.activation = activation as u32;
                (Kind::ActivationBackward, dpre)
            }
            Write::Residual { out, residual, bias: b, dropout } => {
                assert!(is_rows, "rows with a bias");
                product.out_stride = fits("the output", out, Some(Element::F32));
                product.with_stride = fits("the residual", residual, Some(Element::F32));
                product.with = residual.address();
                product.bias = bias(b);
                drops(product, shape, dropout);
                (Kind::Residual, out)
            }
            Write::Symmetric { out, sum_scale, with, diagonal } => {
                assert_eq!(shape.m, shape.n, "a symmetric matrix is square");
                assert!(matches!(groups, Groups::One | Groups::Stack { .. }), "symmetric sums in groups");
                product.out_stride = fits("the output", out, Some(Element::F32));
                if let Some((with, scale)) = with {
                    product.with_stride = fits("what is added", with, Some(Element::F32));
                    product.with = with.address();
                    product.with_scale = scale;
                }
                product.sum_scale = sum_scale;
                product.diagonal = diagonal;
                assert!(![product.a, product.b, product.with].contains(&out.address()), "a symmetric result in place");
                (Kind::Symmetric, out)
            }
        };
        product.write = kind as u32;
        product.out = out.address();
        product.stored = out.element() as u32;
        out
    }
}

/// Kernels by their names, each with the shared memory of its tiles.
fn load(module: &Arc<Module>, tiles: impl Iterator<Item = (Tile, [[&'static str; 2]; 2])>) -> Result<Vec<Kernels>> {
    let load = |name, tile: Tile| {
        let kernel = module.kernel(name)?;
        kernel.allow_shared(tile.shared())?;
        Ok(kernel)
    };
    tiles
        .map(|(tile, [[nn, nt], [tn, tt]])| {
            Ok((tile, [[load(nn, tile)?, load(nt, tile)?], [load(tn, tile)?, load(tt, tile)?]]))
        })
        .collect()
}

fn drops(product: &mut Product, shape: Shape, dropout: Option<Dropped>) {
    if let Some(Dropped { bits, scale }) = dropout {
        let needed = (shape.n_out_row() * shape.n).div_ceil(32);
        assert!(bits.len() >= needed, "{} words of {needed} that say what is dropped", bits.len());
        product.bits = bits.address();
        product.drop_scale = scale;
    }
}
