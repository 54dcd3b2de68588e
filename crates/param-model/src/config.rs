//! The hyperparameters of a PARAM model, under the reference's `config.json` keys and as TOML presets.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// The nonlinearity of a feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x · Φ(x)` with the exact normal distribution: `0.5 x (1 + erf(x / √2))`.
    GeluErf,
    /// The tanh approximation: `0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))`.
    GeluTanh,
}

impl Activation {
    /// The name under which it stands in `config.json` and in GGUF metadata.
    pub fn name(self) -> &'static str {
        match self {
            Activation::GeluErf => "gelu_erf",
            Activation::GeluTanh => "gelu_tanh",
        }
    }

    /// The activation of that [`name`](Self::name), if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        [Activation::GeluErf, Activation::GeluTanh].into_iter().find(|a| a.name() == name)
    }
}

/// Hyperparameters of one model. Serialised under the key names of the reference's `config.json`; what the
/// reference hard-codes (activations, MoE phase, epsilon) is written only where it differs from the reference.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Rows of the token embedding and of the tied head.
    #[serde(rename = "vocab_size")]
    pub n_vocab: usize,
    /// Learned positions: the longest sequence the model can attend over.
    #[serde(rename = "context_length")]
    pub n_ctx: usize,
    /// Width of the residual stream.
    #[serde(rename = "emb_dim")]
    pub n_embd: usize,
    /// Attention heads; each takes a contiguous slice of `n_embd / n_head`.
    #[serde(rename = "num_heads")]
    pub n_head: usize,
    /// Blocks.
    #[serde(rename = "num_layers")]
    pub n_layer: usize,
    /// Dropout probability in training, at the embedding, the attention probabilities, the experts and both residuals.
    #[serde(rename = "dropout_rate", default)]
    pub dropout: f32,
    /// Whether the query, key and value projections have biases.
    #[serde(default)]
    pub qkv_bias: bool,
    /// Whether the experts have biases. Every other bias always exists.
    #[serde(rename = "bias", default = "yes")]
    pub expert_bias: bool,
    /// Experts chosen per token.
    #[serde(rename = "top_k")]
    pub n_expert_used: usize,
    /// Experts per MoE block; 1 makes every block dense.
    #[serde(rename = "num_experts")]
    pub n_expert: usize,
    /// Block `i` is a mixture of experts iff `i % moe_stride == moe_phase`.
    #[serde(rename = "stride")]
    pub moe_stride: usize,
    /// See [`moe_stride`](Self::moe_stride).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub moe_phase: usize,
    /// Whether the load-balancing loss enters the training loss (and with it, as in the reference, the z loss).
    #[serde(default = "yes")]
    pub use_aux_loss: bool,
    /// Whether the router z loss enters the training loss.
    #[serde(default = "yes")]
    pub use_router_z_loss: bool,
    /// Whether the router has a learned noise: `logits += softplus(x Wnoise^T) · N(0, 1)` in training.
    #[serde(default = "yes")]
    pub use_noisy_top_k: bool,
    /// Whether a bias per expert decides with the logits which experts are chosen, though not how they are weighed: moved after
    /// each step of training by the experts' load, it balances without a loss (Wang et al. 2024). The reference has none.
    #[serde(default, skip_serializing_if = "is_no")]
    pub use_selection_bias: bool,
    /// Weight of the load-balancing loss, summed over blocks.
    #[serde(default = "aux_loss_weight")]
    pub aux_loss_weight: f32,
    /// Weight of the router z loss, summed over blocks.
    #[serde(default = "router_z_loss_weight")]
    pub router_z_loss_weight: f32,
    /// Capacity factor of an expert in training, where the capacity rule is in force.
    #[serde(default = "train_capacity")]
    pub train_capacity: f64,
    /// Capacity factor of an expert in evaluation, where the capacity rule is in force.
    #[serde(default = "eval_capacity")]
    pub eval_capacity: f64,
    /// Least capacity of an expert, in tokens, where the capacity rule is in force.
    #[serde(default = "min_capacity")]
    pub min_capacity: usize,
    /// Truncated-normal initialisation by fan-in; otherwise N(0, 0.02).
    #[serde(default = "yes")]
    pub use_switch_tfm_init: bool,
    /// Variance scale of the truncated-normal initialisation.
    #[serde(default = "one")]
    pub switch_tfm_init_scale: f32,
    /// The reference's switch for a float32 router. Routers are always float32 here; kept so the file round-trips.
    #[serde(default = "yes")]
    pub router_use_full_prec: bool,
    /// Nonlinearity of the experts.
    #[serde(default = "gelu_erf", skip_serializing_if = "is_gelu_erf")]
    pub expert_activation: Activation,
    /// Nonlinearity of the dense blocks.
    #[serde(default = "gelu_tanh", skip_serializing_if = "is_gelu_tanh")]
    pub dense_activation: Activation,
    /// Added to the variance inside the root of every LayerNorm.
    #[serde(default = "norm_eps", skip_serializing_if = "is_norm_eps")]
    pub norm_eps: f32,
}

fn yes() -> bool {
    true
}
fn is_no(flag: &bool) -> bool {
    !flag
}
fn one() -> f32 {
    1.0
}
fn aux_loss_weight() -> f32 {
    0.01
}
fn router_z_loss_weight() -> f32 {
    0.001
}
fn train_capacity() -> f64 {
    1.25
}
fn eval_capacity() -> f64 {
    2.0
}
fn min_capacity() -> usize {
    4
}
fn gelu_erf() -> Activation {
    Activation::GeluErf
}
fn gelu_tanh() -> Activation {
    Activation::GeluTanh
}
fn norm_eps() -> f32 {
    1e-5
}
fn is_zero(n: &usize) -> bool {
    *n == 0
}
fn is_gelu_erf(a: &Activation) -> bool {
    *a == gelu_erf()
}
fn is_gelu_tanh(a: &Activation) -> bool {
    *a == gelu_tanh()
}
fn is_norm_eps(eps: &f32) -> bool {
    *eps == norm_eps()
}

/// The presets, smallest first: name and TOML text.
const PRESETS: [(&str, &str); 6] = [
    ("param-tiny", include_str!("../../../models/param-tiny.toml")),
    ("param-mini", include_str!("../../../models/param-mini.toml")),
    ("param-mid", include_str!("../../../models/param-mid.toml")),
    ("param-124m", include_str!("../../../models/param-124m.toml")),
    ("param-0.5b", include_str!("../../../models/param-0.5b.toml")),
    ("param-0.7b", include_str!("../../../models/param-0.7b.toml")),
];

/// No dimension of a model may pass this: products of three of them still fit in 64 bits.
const MAX_DIM: usize = 1 << 20;

impl Config {
    /// Names of the presets, smallest first.
    pub fn preset_names() -> impl Iterator<Item = &'static str> {
        PRESETS.iter().map(|(name, _)| *name)
    }

    /// The preset of that name.
    pub fn preset(name: &str) -> Result<Self, Error> {
        let (_, text) = PRESETS.iter().find(|(n, _)| *n == name).ok_or_else(|| Error::UnknownPreset {
            name: name.to_owned(),
            known: Self::preset_names().collect::<Vec<_>>().join(", "),
        })?;
        Self::from_toml(text, &format!("preset {name}"))
    }

    /// Reads a `config.json` or, by its ending, a `.toml` preset file, and checks it.
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::Io { path: path.to_owned(), error })?;
        let origin = path.display().to_string();
        if path.extension().is_some_and(|e| e == "toml") {
            Self::from_toml(&text, &origin)
        } else {
            Self::from_json(&text, &origin)
        }
    }

    /// Parses and checks JSON text; `origin` names it in errors.
    pub fn from_json(text: &str, origin: &str) -> Result<Self, Error> {
        let config: Self = serde_json::from_str(text)
            .map_err(|e| Error::Config { origin: origin.to_owned(), problem: e.to_string() })?;
        config.checked(origin)
    }

    fn from_toml(text: &str, origin: &str) -> Result<Self, Error> {
        let config: Self =
            toml::from_str(text).map_err(|e| Error::Config { origin: origin.to_owned(), problem: e.to_string() })?;
        config.checked(origin)
    }

    /// The text of a `config.json`.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("numbers and booleans always serialise") + "\n"
    }

    /// Checks that the numbers describe a model that can exist; `origin` names their source in the error.
    pub fn checked(self, origin: &str) -> Result<Self, Error> {
        let fail = |problem: String| Err(Error::Config { origin: origin.to_owned(), problem });
        let dims = [
            ("vocab_size", self.n_vocab),
            ("context_length", self.n_ctx),
            ("emb_dim", self.n_embd),
            ("num_heads", self.n_head),
            ("num_layers", self.n_layer),
            ("num_experts", self.n_expert),
            ("top_k", self.n_expert_used),
            ("stride", self.moe_stride),
        ];
        for (key, value) in dims {
            if value == 0 || value > MAX_DIM {
                return fail(format!("`{key}` is {value}: expected 1 to {MAX_DIM}"));
            }
        }
        if !self.n_embd.is_multiple_of(self.n_head) {
            return fail(format!("`emb_dim` {} is not a multiple of `num_heads` {}", self.n_embd, self.n_head));
        }
        if self.n_expert_used > self.n_expert {
            return fail(format!("`top_k` {} is more than `num_experts` {}", self.n_expert_used, self.n_expert));
        }
        if self.moe_phase >= self.moe_stride {
            return fail(format!("`moe_phase` {} must be below `stride` {}", self.moe_phase, self.moe_stride));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return fail(format!("`dropout_rate` is {}: expected 0 up to, not including, 1", self.dropout));
        }
        let positive = [
            ("switch_tfm_init_scale", self.switch_tfm_init_scale as f64),
            ("train_capacity", self.train_capacity),
            ("eval_capacity", self.eval_capacity),
            ("norm_eps", self.norm_eps as f64),
        ];
        for (key, value) in positive {
            if !(value > 0.0 && value.is_finite()) {
                return fail(format!("`{key}` is {value}: expected a positive number"));
            }
        }
        for (key, value) in
            [("aux_loss_weight", self.aux_loss_weight), ("router_z_loss_weight", self.router_z_loss_weight)]
        {
            if !(value >= 0.0 && value.is_finite()) {
                return fail(format!("`{key}` is {value}: expected zero or more"));
            }
        }
        Ok(self)
    }

    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.n_embd / self.n_head
    }

    /// Hidden width of every expert and dense feed-forward layer: the family fixes it at four times the residual.
    pub fn n_ff(&self) -> usize {
        4 * self.n_embd
    }

    /// Whether block `i` routes its tokens to experts.
    pub fn is_moe(&self, block: usize) -> bool {
        self.n_expert > 1 && block % self.moe_stride == self.moe_phase
    }

    /// The MoE blocks' numbers.
    pub fn moe_blocks(&self) -> impl Iterator<Item = usize> {
        (0..self.n_layer).filter(|&i| self.is_moe(i))
    }

    /// Number of MoE blocks.
    pub fn n_moe(&self) -> usize {
        self.moe_blocks().count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensors::tensors;

    fn n_params(config: &Config) -> usize {
        tensors(config).iter().map(|t| t.n_elements()).sum()
    }

    #[test]
    fn presets_parse_and_have_the_sizes_their_names_say() {
        let sizes = Config::preset_names().map(|n| n_params(&Config::preset(n).unwrap())).collect::<Vec<_>>();
        let expected = [1.0e6, 10.0e6, 38.7e6, 124.0e6, 477.0e6, 725.0e6];
        for (size, expected) in sizes.iter().zip(expected) {
            assert!((*size as f64 / expected - 1.0).abs() < 0.15, "{size} parameters, expected about {expected}");
        }
        assert_eq!(sizes[4], 477_017_088);
    }

    #[test]
    fn reference_json_round_trips_to_the_same_keys_and_values() {
        let config = Config::preset("param-0.5b").unwrap();
        let json: serde_json::Value = serde_json::from_str(&config.to_json()).unwrap();
        let keys = json.as_object().unwrap();
        assert_eq!(keys.len(), 22, "{keys:?}");
        assert_eq!((&json["top_k"], &json["bias"], &json["stride"]), (&3.into(), &true.into(), &2.into()));
        assert_eq!(Config::from_json(&config.to_json(), "test").unwrap(), config);
    }

    #[test]
    fn impossible_numbers_are_refused_by_name() {
        let good = Config::preset("param-tiny").unwrap();
        let cases = [
            ("emb_dim", Config { n_embd: good.n_head * 3 + 1, ..good.clone() }),
            ("top_k", Config { n_expert_used: good.n_expert + 1, ..good.clone() }),
            ("vocab_size", Config { n_vocab: 0, ..good.clone() }),
            ("context_length", Config { n_ctx: usize::MAX, ..good.clone() }),
            ("dropout_rate", Config { dropout: 1.0, ..good.clone() }),
            ("moe_phase", Config { moe_phase: good.moe_stride, ..good.clone() }),
            ("aux_loss_weight", Config { aux_loss_weight: f32::NAN, ..good.clone() }),
        ];
        for (key, config) in cases {
            let error = config.checked("here").unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("here"), "{error}");
        }
    }
}
