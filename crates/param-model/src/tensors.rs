//! The one table of a model's tensors: names in checkpoint and GGUF, shapes, roles, initialisation.
//! The trainer, the converter and the runtime all iterate it.

use crate::config::Config;

/// What a tensor is within a model or a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the names are the field's own
pub enum Part {
    TokenEmbd,
    PositionEmbd,
    AttnNormScale,
    AttnNormShift,
    AttnQ,
    AttnQBias,
    AttnK,
    AttnKBias,
    AttnV,
    AttnVBias,
    AttnOut,
    AttnOutBias,
    FfnNormScale,
    FfnNormShift,
    Router,
    RouterNoise,
    SelectionBias,
    ExpertUp,
    ExpertUpBias,
    ExpertDown,
    ExpertDownBias,
    FfnUp,
    FfnUpBias,
    FfnDown,
    FfnDownBias,
    OutputNormScale,
    OutputNormShift,
}

/// What kind of quantity a tensor holds: decides its quantization and its weight decay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Token embedding, which is also the output head.
    TokenEmbedding,
    /// Learned absolute positions.
    PositionEmbedding,
    /// Query, key, value and output projections.
    Attention,
    /// Dense feed-forward matrices.
    FeedForward,
    /// Stacked matrices of the experts.
    Expert,
    /// The router's matrix and that of its training noise.
    Router,
    /// LayerNorm scale and shift.
    Norm,
    /// Any bias.
    Bias,
}

impl Role {
    /// The roles in the order in which reports list them.
    pub const ALL: [Role; 8] = [
        Role::TokenEmbedding,
        Role::PositionEmbedding,
        Role::Attention,
        Role::FeedForward,
        Role::Expert,
        Role::Router,
        Role::Norm,
        Role::Bias,
    ];

    /// A short name for reports.
    pub fn name(self) -> &'static str {
        match self {
            Role::TokenEmbedding => "token embedding / head",
            Role::PositionEmbedding => "positions",
            Role::Attention => "attention",
            Role::FeedForward => "dense feed-forward",
            Role::Expert => "experts",
            Role::Router => "routers",
            Role::Norm => "norms",
            Role::Bias => "biases",
        }
    }
}

/// How a tensor starts out (reference/MODEL §5; trainer only).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// N(0, std²).
    Normal {
        /// Standard deviation.
        std: f32,
    },
    /// N(0, std²) cut at ±2 std.
    TruncatedNormal {
        /// Standard deviation before the cut.
        std: f32,
    },
}

/// One tensor of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    /// What it is.
    pub part: Part,
    /// The block it belongs to, if any.
    pub block: Option<usize>,
    /// Name in a checkpoint.
    pub checkpoint: String,
    /// Name in a GGUF file; `None` where inference has no use for it (the router's noise).
    pub gguf: Option<String>,
    /// Shape in a checkpoint, slowest dimension first.
    pub shape: Vec<usize>,
    /// Quantity it holds.
    pub role: Role,
    /// Initialisation.
    pub init: Init,
}

impl TensorSpec {
    /// Whether gradients train it: the selection bias follows the experts' load instead.
    pub fn has_gradient(&self) -> bool {
        self.part != Part::SelectionBias
    }

    /// Number of elements.
    pub fn n_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the checkpoint stores it input-major ([E, in, out]), so that conversion to GGUF transposes each expert.
    pub fn is_input_major(&self) -> bool {
        self.role == Role::Expert
    }

    /// Shape in GGUF, slowest dimension first (`ne` reversed): experts output-major, expert biases without the
    /// reference's middle dimension of one.
    pub fn gguf_shape(&self) -> Vec<usize> {
        match (self.role, &self.shape[..]) {
            (Role::Expert, &[n_expert, n_in, n_out]) => vec![n_expert, n_out, n_in],
            (Role::Bias, &[n_expert, 1, n_out]) => vec![n_expert, n_out],
            (_, shape) => shape.to_vec(),
        }
    }

    /// Whether it is a matrix that a matmul reads (a stack of them for experts), as opposed to a vector or a position.
    pub fn is_matrix(&self) -> bool {
        matches!(self.role, Role::TokenEmbedding | Role::Attention | Role::FeedForward | Role::Expert)
    }
}

/// Checkpoint name of the tied head: a second copy of [`Part::TokenEmbd`], which wins where the two differ.
pub const TIED_HEAD: &str = "out_head.weight";
/// GGUF name of the head, in files that carry one.
pub const GGUF_HEAD: &str = "output.weight";

/// Checkpoint name of the causal-mask buffer of a block: [n_ctx, n_ctx] f32, 1 above the diagonal, else 0.
/// Not a parameter: written for the reference's loader, ignored on reading.
pub fn mask_name(block: usize) -> String {
    format!("transformer_blocks.{block}.mhaunit.mask")
}

/// Every parameter of a model, each once, in the order of the forward pass.
pub fn tensors(config: &Config) -> Vec<TensorSpec> {
    let mut table = Vec::new();
    table.push(spec(config, Part::TokenEmbd, None));
    table.push(spec(config, Part::PositionEmbd, None));
    for block in 0..config.n_layer {
        let mut add = |part| table.push(spec(config, part, Some(block)));
        add(Part::AttnNormScale);
        add(Part::AttnNormShift);
        for (weight, bias) in
            [(Part::AttnQ, Part::AttnQBias), (Part::AttnK, Part::AttnKBias), (Part::AttnV, Part::AttnVBias)]
        {
            add(weight);
            if config.qkv_bias {
                add(bias);
            }
        }
        add(Part::AttnOut);
        add(Part::AttnOutBias);
        add(Part::FfnNormScale);
        add(Part::FfnNormShift);
        if config.is_moe(block) {
            add(Part::Router);
            if config.use_noisy_top_k {
                add(Part::RouterNoise);
            }
            if config.use_selection_bias {
                add(Part::SelectionBias);
            }
            for (weight, bias) in [(Part::ExpertUp, Part::ExpertUpBias), (Part::ExpertDown, Part::ExpertDownBias)] {
                add(weight);
                if config.expert_bias {
                    add(bias);
                }
            }
        } else {
            add(Part::FfnUp);
            add(Part::FfnUpBias);
            add(Part::FfnDown);
            add(Part::FfnDownBias);
        }
    }
    table.push(spec(config, Part::OutputNormScale, None));
    table.push(spec(config, Part::OutputNormShift, None));
    table
}

fn spec(config: &Config, part: Part, block: Option<usize>) -> TensorSpec {
    let (n_embd, n_ff, n_expert) = (config.n_embd, config.n_ff(), config.n_expert);
    let linear = |n_in: usize| {
        if config.use_switch_tfm_init {
            Init::TruncatedNormal { std: (config.switch_tfm_init_scale / n_in as f32).sqrt() }
        } else {
            Init::Normal { std: 0.02 }
        }
    };
    // The residual scaling reaches only the experts' second matrices: the reference matches names ending in c_proj.
    let residual = Init::Normal { std: 0.02 / (2.0 * config.n_layer as f32).sqrt() };
    use Init::{Ones, Zeros};
    use Part::*;
    use Role::{Attention, Bias, Expert, FeedForward, Norm};
    let (checkpoint, gguf, shape, role, init) = match part {
        TokenEmbd => {
            let shape = vec![config.n_vocab, n_embd];
            ("token_emb.weight", "token_embd.weight", shape, Role::TokenEmbedding, linear(n_embd))
        }
        PositionEmbd => {
            let (shape, init) = (vec![config.n_ctx, n_embd], Init::Normal { std: 0.02 });
            ("position_emb.weight", "position_embd.weight", shape, Role::PositionEmbedding, init)
        }
        AttnNormScale => ("norm1.scale", "attn_norm.weight", vec![n_embd], Norm, Ones),
        AttnNormShift => ("norm1.shift", "attn_norm.bias", vec![n_embd], Norm, Zeros),
        AttnQ => ("mhaunit.W_query.weight", "attn_q.weight", vec![n_embd, n_embd], Attention, linear(n_embd)),
        AttnQBias => ("mhaunit.W_query.bias", "attn_q.bias", vec![n_embd], Bias, Zeros),
        AttnK => ("mhaunit.W_key.weight", "attn_k.weight", vec![n_embd, n_embd], Attention, linear(n_embd)),
        AttnKBias => ("mhaunit.W_key.bias", "attn_k.bias", vec![n_embd], Bias, Zeros),
        AttnV => ("mhaunit.W_value.weight", "attn_v.weight", vec![n_embd, n_embd], Attention, linear(n_embd)),
        AttnVBias => ("mhaunit.W_value.bias", "attn_v.bias", vec![n_embd], Bias, Zeros),
        AttnOut => ("mhaunit.out_proj.weight", "attn_output.weight", vec![n_embd, n_embd], Attention, linear(n_embd)),
        AttnOutBias => ("mhaunit.out_proj.bias", "attn_output.bias", vec![n_embd], Bias, Zeros),
        FfnNormScale => ("norm2.scale", "ffn_norm.weight", vec![n_embd], Norm, Ones),
        FfnNormShift => ("norm2.shift", "ffn_norm.bias", vec![n_embd], Norm, Zeros),
        Router => {
            ("moe.router.w_g.weight", "ffn_gate_inp.weight", vec![n_expert, n_embd], Role::Router, linear(n_embd))
        }
        RouterNoise => ("moe.router.w_noise.weight", "", vec![n_expert, n_embd], Role::Router, linear(n_embd)),
        SelectionBias => ("moe.router.selection_bias", "exp_probs_b.bias", vec![n_expert], Bias, Zeros),
        ExpertUp => ("moe.experts.c_fc", "ffn_up_exps.weight", vec![n_expert, n_embd, n_ff], Expert, linear(n_embd)),
        ExpertUpBias => ("moe.experts.fc_bias", "ffn_up_exps.bias", vec![n_expert, 1, n_ff], Bias, Zeros),
        ExpertDown => ("moe.experts.c_proj", "ffn_down_exps.weight", vec![n_expert, n_ff, n_embd], Expert, residual),
        ExpertDownBias => ("moe.experts.proj_bias", "ffn_down_exps.bias", vec![n_expert, 1, n_embd], Bias, Zeros),
        FfnUp => ("moe.layers.0.weight", "ffn_up.weight", vec![n_ff, n_embd], FeedForward, linear(n_embd)),
        FfnUpBias => ("moe.layers.0.bias", "ffn_up.bias", vec![n_ff], Bias, Zeros),
        FfnDown => ("moe.layers.2.weight", "ffn_down.weight", vec![n_embd, n_ff], FeedForward, linear(n_ff)),
        FfnDownBias => ("moe.layers.2.bias", "ffn_down.bias", vec![n_embd], Bias, Zeros),
        OutputNormScale => ("final_norm.scale", "output_norm.weight", vec![n_embd], Norm, Ones),
        OutputNormShift => ("final_norm.shift", "output_norm.bias", vec![n_embd], Norm, Zeros),
    };
    let (checkpoint, gguf_name) = match block {
        Some(i) => (format!("transformer_blocks.{i}.{checkpoint}"), format!("blk.{i}.{gguf}")),
        None => (checkpoint.to_owned(), gguf.to_owned()),
    };
    TensorSpec { part, block, checkpoint, gguf: (!gguf.is_empty()).then_some(gguf_name), shape, role, init }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_fit_gguf() {
        for preset in Config::preset_names() {
            let table = tensors(&Config { use_selection_bias: true, ..Config::preset(preset).unwrap() });
            let mut checkpoint = table.iter().map(|t| &t.checkpoint).collect::<Vec<_>>();
            let mut gguf = table.iter().filter_map(|t| t.gguf.as_ref()).collect::<Vec<_>>();
            assert!(gguf.iter().all(|n| n.len() <= 63));
            for names in [&mut checkpoint, &mut gguf] {
                let n = names.len();
                names.sort();
                names.dedup();
                assert_eq!(names.len(), n, "a name stands twice in {preset}");
            }
        }
    }

    #[test]
    fn flagship_has_the_reference_checkpoints_tensor_count_and_bytes() {
        // 245 tensors and 2,368,426,952 bytes in all: with the tied head twice and one mask per block.
        let config = Config::preset("param-0.5b").unwrap();
        let table = tensors(&config);
        assert_eq!(table.len() + 1 + config.n_layer, 245);
        let floats = table.iter().map(TensorSpec::n_elements).sum::<usize>()
            + config.n_vocab * config.n_embd
            + config.n_layer * config.n_ctx * config.n_ctx;
        let header = 2_368_426_952 - 4 * floats;
        assert!((10_000..60_000).contains(&header), "{header} bytes left for the header");
    }

    #[test]
    fn gguf_shapes_are_output_major() {
        let config = Config::preset("param-0.5b").unwrap();
        let shape = |part, block| {
            let table = tensors(&config);
            table.iter().find(|t| t.part == part && t.block == block).unwrap().gguf_shape()
        };
        assert_eq!(shape(Part::ExpertUp, Some(0)), [8, 3072, 768]);
        assert_eq!(shape(Part::ExpertDown, Some(0)), [8, 768, 3072]);
        assert_eq!(shape(Part::ExpertUpBias, Some(0)), [8, 3072]);
        assert_eq!(shape(Part::FfnUp, Some(1)), [3072, 768]);
    }
}
