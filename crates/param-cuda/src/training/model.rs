//! What is trained: sizes, and where each parameter stands in the one vector of all of them.

use std::ops::Range;

use crate::model::Activation;

/// Elements of the vector of all parameters.
pub type Place = Range<usize>;

/// A model to train, and where its parameters stand. Places begin at multiples of [`ALIGNMENT`] elements, but for matrices that follow one
/// another.
#[derive(Clone, Debug)]
#[allow(missing_docs)] // sizes by their usual names
pub struct Model {
    pub n_vocab: usize,
    pub n_ctx: usize,
    pub n_embd: usize,
    pub n_head: usize,
    pub n_ff: usize,
    /// Experts of an MoE block, and how many a token takes; 0 in a model of dense blocks.
    pub n_expert: usize,
    pub n_used: usize,
    pub expert_activation: Activation,
    pub dense_activation: Activation,
    pub norm_eps: f32,
    /// Part of the activations that is dropped.
    pub dropout: f32,
    /// Factors of the load-balancing and z losses in the total.
    pub router_loss_weights: (f32, f32),
    /// [n_vocab, n_embd], the head as well.
    pub token: Place,
    /// [n_ctx, n_embd].
    pub position: Place,
    pub output_norm: NormPlaces,
    pub blocks: Vec<BlockPlaces>,
    /// Elements of all parameters, with what lies between them.
    pub n_param: usize,
}

/// Elements at whose multiples parameters begin.
pub const ALIGNMENT: usize = 64;

/// Scale and shift, [n_embd] each.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct NormPlaces {
    pub scale: Place,
    pub shift: Place,
}

/// The parameters of a block.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct BlockPlaces {
    pub norm1: NormPlaces,
    /// Queries', keys' and values' matrices, one after the other: [3, n_embd, n_embd].
    pub qkv: Place,
    /// [3, n_embd].
    pub qkv_bias: Option<Place>,
    /// [n_embd, n_embd].
    pub out: Place,
    pub out_bias: Option<Place>,
    pub norm2: NormPlaces,
    pub ffn: FfnPlaces,
}

/// The parameters of a feed-forward part.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub enum FfnPlaces {
    /// `up` [n_ff, n_embd], `down` [n_embd, n_ff].
    Dense { up: Place, up_bias: Option<Place>, down: Place, down_bias: Option<Place> },
    /// `router` and `noise` [n_expert, n_embd]; `up` [n_expert, n_embd, n_ff], `down` [n_expert, n_ff, n_embd], both input-major.
    Experts {
        router: Place,
        noise: Option<Place>,
        selection_bias: Option<Place>,
        up: Place,
        up_bias: Option<Place>,
        down: Place,
        down_bias: Option<Place>,
    },
}

impl Model {
    /// Blocks with experts.
    pub fn n_moe(&self) -> usize {
        self.blocks.iter().filter(|block| block.is_moe()).count()
    }

    /// Whether routers have noise.
    pub fn has_noise(&self) -> bool {
        self.blocks.iter().any(|block| matches!(block.ffn, FfnPlaces::Experts { noise: Some(_), .. }))
    }

    /// Scores of a token in a router: logits, and what scales their noise.
    pub fn n_score(&self) -> usize {
        self.n_expert * (1 + usize::from(self.has_noise()))
    }
}

impl BlockPlaces {
    /// Whether it has experts.
    pub fn is_moe(&self) -> bool {
        matches!(self.ffn, FfnPlaces::Experts { .. })
    }
}
