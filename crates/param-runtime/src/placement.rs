//! Where a model runs, and what of it a GPU holds.

use gguf::{GgmlType, Gguf};
use param_model::{Config, GGUF_HEAD, Part, tensors};

/// Which device a model is to run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The CPU.
    #[default]
    Cpu,
    /// A GPU with as much of the model as fits there, or the CPU where there is none; [`crate::Model::device_note`] says why.
    Auto,
    /// A GPU, or an error.
    Cuda,
}

/// How a GPU that holds the whole model runs single tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GpuDecode {
    /// One sequence by one kernel for the whole token, several by the graph.
    #[default]
    Auto,
    /// The kernels that run prompts, launched together as a graph.
    Graph,
}

/// How a model is opened. The default runs it on the CPU.
#[derive(Clone, Debug, Default)]
pub struct ModelOptions {
    /// Where it runs.
    pub device: Device,
    /// How many blocks a GPU holds, counted from the last one, which the head follows; with as many as the model has, it holds
    /// everything. `None`: as many as fit.
    pub gpu_layers: Option<usize>,
    /// Leaves the experts, which are most of a model's weights, to the CPU.
    pub experts_on_cpu: bool,
    /// How single tokens run on a GPU.
    pub gpu_decode: GpuDecode,
}

/// What a GPU holds besides embeddings, final norm and head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    /// Blocks from this one on.
    pub first_block: usize,
    /// But not the feed-forward layers of MoE blocks.
    pub experts_on_cpu: bool,
}

impl Placement {
    /// Whether the GPU runs a block's attention.
    pub fn has_attention(&self, block: usize) -> bool {
        block >= self.first_block
    }

    /// Whether it runs a block's feed-forward layer.
    pub fn has_ffn(&self, config: &Config, block: usize) -> bool {
        self.has_attention(block) && !(self.experts_on_cpu && config.is_moe(block))
    }

    /// Whether it runs everything.
    pub fn is_whole(&self, config: &Config) -> bool {
        self.first_block == 0 && (!self.experts_on_cpu || config.n_moe() == 0)
    }

    /// The placement that `options` ask for, or without a number of layers the largest that takes at most `available` bytes.
    /// `None` if not even the head fits.
    pub fn choose(gguf: &Gguf, config: &Config, options: &ModelOptions, available: usize) -> Option<Placement> {
        let experts_on_cpu = options.experts_on_cpu;
        let at = |first_block| Placement { first_block, experts_on_cpu };
        if let Some(n) = options.gpu_layers {
            return Some(at(config.n_layer.saturating_sub(n)));
        }
        (0..=config.n_layer).map(at).find(|placement| placement.bytes(gguf, config) <= available as u64)
    }

    /// Bytes of weights on the GPU.
    pub fn bytes(&self, gguf: &Gguf, config: &Config) -> u64 {
        let is_ffn = |part: Part| {
            matches!(
                part,
                Part::Router
                    | Part::SelectionBias
                    | Part::ExpertUp
                    | Part::ExpertUpBias
                    | Part::ExpertDown
                    | Part::ExpertDownBias
                    | Part::FfnUp
                    | Part::FfnUpBias
                    | Part::FfnDown
                    | Part::FfnDownBias
            )
        };
        let is_here = |part: Part, block: Option<usize>| match block {
            Some(block) if is_ffn(part) => self.has_ffn(config, block),
            Some(block) => self.has_attention(block),
            None => true,
        };
        let names =
            tensors(config).into_iter().filter(|spec| is_here(spec.part, spec.block)).filter_map(|spec| spec.gguf);
        names.chain([GGUF_HEAD.to_owned()]).filter_map(|name| gguf.tensor(&name)).map(bytes_on_gpu).sum()
    }
}

/// What a tensor takes there: as stored where kernels read its type, else in f16.
fn bytes_on_gpu(info: &gguf::TensorInfo) -> u64 {
    if format(info.ty).is_some() { info.n_bytes } else { 2 * info.n_elements() }
}

/// The format that kernels read a type in, if they do.
pub(crate) fn format(ty: GgmlType) -> Option<param_cuda::model::Format> {
    use param_cuda::model::Format;
    Some(match ty {
        GgmlType::F32 => Format::F32,
        GgmlType::F16 => Format::F16,
        GgmlType::BF16 => Format::Bf16,
        GgmlType::Q8_0 => Format::Q8_0,
        GgmlType::Q4_K => Format::Q4K,
        GgmlType::Q6_K => Format::Q6K,
        _ => return None,
    })
}
