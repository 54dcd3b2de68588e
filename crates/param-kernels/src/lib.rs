//! The CPU kernels of PARAM: one op one file, each written once as plain Rust shaped to vectorise, compiled for every
//! instruction set worth having and chosen at run time ([`Kernels`]); and the executor that runs them together ([`Team`]).

#![allow(clippy::needless_range_loop, reason = "indexed lanes are the form that vectorises")]
#![allow(clippy::excessive_precision, reason = "coefficients are kept as they were fitted")]

mod attention;
mod dispatch;
mod dot;
mod gelu;
mod isa;
mod layer_norm;
mod math;
mod matrix;
mod optimizer;
mod packing;
mod prefetch;
mod probe;
mod product;
mod softmax;
mod spmd;
mod tiles;
mod topk;

pub use attention::{
    KV_BLOCK, KV_PAGE, Pages, QUERY_TILE, attention_scratch_len, key_index, key_scale_index, kv_page_len,
    kv_scales_len, value_index,
};
pub use dispatch::Kernels;
pub use matrix::{Factor, Matrix, Precision};
pub use optimizer::AdamWStep;
pub use packing::Packing;
pub use prefetch::{prefetch, prefetch_for_later};
pub use probe::{Arithmetic, arithmetic_peak};
pub use product::{Product, Workspace};
pub use spmd::{Team, Tile, available_threads};
pub use tiles::{ActivationBlock, Inputs, Operand, TILE_ROWS, TileFormat};
pub use topk::top_k;
