//! Keys and values of several sequences in the GPU's memory, laid out as `Caches` in kernels/model.cuh.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use crate::device_model::DeviceModel;
use crate::error::Result;
use crate::memory::Buffer;

/// The caches as kernels take them.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
#[allow(missing_docs)]
pub struct CacheTable {
    pub data: u64,
    pub stride: u64,
    pub n_ctx: u32,
    pub n_sequence: u32,
}

/// Memory for the keys and values of `n_sequence` sequences.
#[derive(Debug)]
pub struct Caches {
    table: CacheTable,
    _data: Buffer<u8>,
}

impl Caches {
    /// Of `n_ctx` positions each, for all blocks of the model.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::Call`].
    pub fn new(model: &Arc<DeviceModel>, n_sequence: usize, n_ctx: usize) -> Result<Caches> {
        let stride = Self::bytes_per_sequence(model, n_ctx);
        let data = model.gpu().alloc("the kv cache", n_sequence.saturating_mul(stride))?;
        let table = CacheTable {
            data: data.address(),
            stride: stride as u64,
            n_ctx: n_ctx as u32,
            n_sequence: n_sequence as u32,
        };
        Ok(Caches { table, _data: data })
    }

    /// Bytes that one sequence takes.
    pub fn bytes_per_sequence(model: &DeviceModel, n_ctx: usize) -> usize {
        let model = model.model();
        let element = if model.cache_f32 != 0 { 4 } else { 2 };
        2 * model.n_layer as usize * (model.n_head * model.head_dim) as usize * n_ctx * element
    }

    /// What kernels are given; valid as long as the caches live.
    pub fn table(&self) -> CacheTable {
        self.table
    }
}
