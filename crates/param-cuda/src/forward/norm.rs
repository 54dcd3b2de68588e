//! The step between products: adds what the last one gave, normalises, routes.

use bytemuck::{Pod, Zeroable};

use crate::model::{Matrix, Norm};

/// Weights that are read soon, asked for while memory is idle: `Ahead` in norm.cu.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Ahead {
    pub data: u64,
    pub bytes: u64,
}

/// Of how many matrices at most.
pub(super) const MAX_AHEAD: usize = 5;
/// Bytes of all of them at most: half of an H100's second-level cache.
const MAX_AHEAD_BYTES: u64 = 24 << 20;
/// Rows up to which it is worth while: many keep memory busy.
const MAX_AHEAD_ROWS: u32 = 128;

/// As many of the stacks of `n` matrices as there is room for.
pub(super) fn ahead(n_row: u32, stacks: &[(Matrix, u32)]) -> [Ahead; MAX_AHEAD] {
    let mut all = [Ahead::default(); MAX_AHEAD];
    let mut left = if n_row <= MAX_AHEAD_ROWS { MAX_AHEAD_BYTES } else { 0 };
    for (ahead, (matrix, n)) in all.iter_mut().zip(stacks) {
        let bytes = matrix.matrix_bytes * u64::from(*n);
        if matrix.data != 0 && bytes <= left {
            left -= bytes;
            *ahead = Ahead { data: matrix.data, bytes };
        }
    }
    all
}

/// `NormArgs` in norm.cu, field by field.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct NormArgs {
    pub x: u64,
    pub y: u64,
    pub slots: u64,
    pub rows: u64,
    pub norm: Norm,
    pub f16: u64,
    pub bf16: u64,
    pub f32: u64,
    pub router: u64,
    pub selection_bias: u64,
    pub choices: u64,
    pub weights: u64,
    pub not_finite: u64,
    pub arrived: u64,
    pub offsets: u64,
    pub list: u64,
    pub ahead: [Ahead; MAX_AHEAD],
    pub n_embd: u32,
    pub stride: u32,
    pub n_part: u32,
    pub n_expert: u32,
    pub n_used: u32,
    pub eps: f32,
}

/// Threads of a block of `layer_norm`.
pub(super) const THREADS: u32 = 256;
/// The most experts it can choose among, and the most choices a row can have.
pub(super) const MAX_EXPERT: u32 = 256;
pub(super) const MAX_USED: u32 = 32;
/// Choices of all rows up to which it groups them by expert itself: 1024 at most; tests go both ways with few.
pub(super) const MAX_ENTRY: u32 = if cfg!(test) { 50 } else { 1024 };
