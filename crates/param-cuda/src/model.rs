//! A model in device memory as kernels see it: the structures of kernels/model.cuh, field by field. Addresses are the GPU's; 0 is null.

use bytemuck::{Pod, Zeroable};

/// How a matrix is stored: `Format` in model.cuh, where the planes are described.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
#[allow(missing_docs)]
pub enum Format {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4K,
    Q6K,
}

/// A stack of matrices.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Matrix {
    pub data: u64,
    pub bias: u64,
    pub matrix_bytes: u64,
    pub n_row: u32,
    pub n_col: u32,
    pub format: u32,
    pub unused: u32,
}

/// LayerNorm parameters.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Norm {
    pub scale: u64,
    pub shift: u64,
}

/// One block.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Block {
    pub norm1: Norm,
    pub q: Matrix,
    pub k: Matrix,
    pub v: Matrix,
    pub out: Matrix,
    pub norm2: Norm,
    pub router: u64,
    pub selection_bias: u64,
    pub up: Matrix,
    pub down: Matrix,
}

/// The GELU of a feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs)]
pub enum Activation {
    GeluErf,
    GeluTanh,
}

/// The whole model.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Model {
    pub blocks: u64,
    pub token_embd: Matrix,
    pub position_embd: u64,
    pub output_norm: Norm,
    pub head: Matrix,
    pub n_vocab: u32,
    pub n_ctx: u32,
    pub n_embd: u32,
    pub n_head: u32,
    pub head_dim: u32,
    pub n_layer: u32,
    pub n_ff: u32,
    pub n_expert: u32,
    pub n_used: u32,
    pub expert_activation: u32,
    pub dense_activation: u32,
    pub norm_eps: f32,
    pub cache_f32: u32,
    pub unused: u32,
}
