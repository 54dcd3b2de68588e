//! A model on a GPU: what is placed there, its weights on their way, and the passes that run it.

mod ahead;
mod engine;
mod weights;

pub(crate) use ahead::Request;
pub(crate) use engine::GpuEngine;

use std::sync::Arc;

use param_cuda::{DeviceModel, Gpu};
use param_model::{Activation, Config};

use crate::error::{Error, Result};
use crate::kv_cache::CacheType;
use crate::model::Model;
use crate::placement::{GpuDecode, ModelOptions, Placement};

/// Kept free for kernels' code, buffers of a batch and what else the driver takes, besides one sequence's cache.
const RESERVE: usize = 256 << 20;

/// What a GPU holds of a model.
#[derive(Debug)]
pub(crate) struct GpuModel {
    pub placement: Placement,
    pub device: Arc<DeviceModel>,
    pub decode: GpuDecode,
    /// Bytes of weights there.
    n_bytes: u64,
}

impl GpuModel {
    /// Opens the GPU and brings it as much of the model as `options` ask for, or as fits.
    pub fn new(model: &Model, options: &ModelOptions) -> Result<GpuModel> {
        let gpu = param_cuda::open().map_err(Error::NoGpu)?;
        let config = model.config();
        let dims = dims(config, model.default_cache_type());
        let (free, total) = gpu.memory()?;
        // Of a small card, or one that others use, not everything may be kept free.
        let available = free.saturating_sub(cache_bytes(config, &dims) + RESERVE.min(total / 8));
        let placement = Placement::choose(&model.gguf, config, options, available).ok_or_else(|| {
            let nothing = Placement { first_block: config.n_layer, experts_on_cpu: true };
            let bytes = nothing.bytes(&model.gguf, config);
            Error::GpuMemory { what: "its embeddings and head", bytes, available }
        })?;
        let n_bytes = placement.bytes(&model.gguf, config);
        let device = Arc::new(weights::upload(&gpu, model, &dims, placement)?);
        Ok(GpuModel { placement, device, decode: options.gpu_decode, n_bytes })
    }

    /// The GPU it is on.
    pub fn gpu(&self) -> &Arc<Gpu> {
        self.device.gpu()
    }

    /// How keys and values are kept there.
    pub fn cache_type(&self) -> CacheType {
        if self.device.model().cache_f32 == 0 { CacheType::F16 } else { CacheType::F32 }
    }

    /// The GPU and what it holds, in words.
    pub fn describe(&self, model: &Model) -> String {
        let config = model.config();
        let (name, mib) = (self.gpu().name(), self.n_bytes >> 20);
        let Placement { first_block, experts_on_cpu } = self.placement;
        if self.placement.is_whole(config) {
            return format!("{name}, {mib} MiB of weights");
        }
        let blocks = match first_block {
            0 => format!("all {} blocks", config.n_layer),
            _ => format!("the last {} of {} blocks", config.n_layer - first_block, config.n_layer),
        };
        let experts = if experts_on_cpu { " without their experts" } else { "" };
        format!("{name}, {mib} MiB of weights: {blocks}{experts}, the rest on the CPU")
    }
}

fn cache_bytes(config: &Config, dims: &param_cuda::model::Model) -> usize {
    2 * config.n_layer * config.n_embd * config.n_ctx * if dims.cache_f32 == 0 { 2 } else { 4 }
}

/// Sizes and choices as kernels take them.
fn dims(config: &Config, cache_type: CacheType) -> param_cuda::model::Model {
    let has_experts = config.n_moe() > 0;
    let activation = |activation| match activation {
        Activation::GeluErf => param_cuda::model::Activation::GeluErf as u32,
        Activation::GeluTanh => param_cuda::model::Activation::GeluTanh as u32,
    };
    param_cuda::model::Model {
        n_vocab: config.n_vocab as u32,
        n_ctx: config.n_ctx as u32,
        n_embd: config.n_embd as u32,
        n_head: config.n_head as u32,
        head_dim: config.head_dim() as u32,
        n_layer: config.n_layer as u32,
        n_ff: config.n_ff() as u32,
        n_expert: if has_experts { config.n_expert as u32 } else { 0 },
        n_used: if has_experts { config.n_expert_used as u32 } else { 0 },
        expert_activation: activation(config.expert_activation),
        dense_activation: activation(config.dense_activation),
        norm_eps: config.norm_eps,
        cache_f32: u32::from(cache_type == CacheType::F32),
        ..Default::default()
    }
}
