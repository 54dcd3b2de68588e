//! Everything that decides how a run trains, besides the model and the data: saved with every checkpoint.

use serde::{Deserialize, Serialize};

use crate::cpu::{Capacity, Compute, Precision};
use crate::data::Layout;
use crate::error::Error;
use crate::optimizer::{AdamW, Group, Muon};
use crate::schedule::Schedule;
use crate::spikes;
use param_kernels::Arithmetic;
use param_model::{Config, tensors};

/// How many tokens an expert takes in training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dropping {
    /// All that chose it.
    Never,
    /// As many as the config's capacity factors give, as in the reference.
    ByCapacity,
}

impl Dropping {
    /// The capacity in force in training or in evaluation.
    pub fn capacity(self, config: &Config, training: bool) -> Capacity {
        let factor = if training { config.train_capacity } else { config.eval_capacity };
        match self {
            Dropping::Never => Capacity::Unlimited,
            Dropping::ByCapacity => Capacity::Factor { factor, min: config.min_capacity },
        }
    }
}

/// What matrix products are computed in; parameters, norms, the router and the loss are f32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// Exactly.
    #[default]
    F32,
    /// Factors of products rounded to 10 bits of mantissa, everything else exactly: for GPUs.
    Tf32,
    /// Factors of products, and the activations kept for the backward pass, rounded to bf16; sums are f32.
    Bf16,
}

impl Dtype {
    /// The multiply-adds that matrix products in it are made of.
    pub fn arithmetic(self) -> Arithmetic {
        match self {
            Dtype::F32 | Dtype::Tf32 => Arithmetic::F32,
            Dtype::Bf16 => Arithmetic::Bf16,
        }
    }
}

/// How a GPU multiplies matrices; what comes out differs by no more than rounding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Matmul {
    /// By each warp: any type on any GPU.
    #[default]
    Mma,
    /// By four warps together: bf16 on GPUs of compute capability 9.0 (H100, H200).
    Wgmma,
}

/// What is computed again in the backward pass, for less memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// Everything is kept.
    #[default]
    Nothing,
    /// The feed-forward half of every block, whose rows are the widest: the arithmetic of its forward pass, but for the last product of
    /// dense ones.
    FeedForward,
    /// The blocks, but for their inputs: a third more arithmetic.
    Blocks,
}

/// Checkpoints of before there were levels say `true` or `false`.
fn recompute<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Recompute, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Whether(bool),
        What(Recompute),
    }
    Ok(match Either::deserialize(deserializer)? {
        Either::Whether(false) => Recompute::Nothing,
        Either::Whether(true) => Recompute::Blocks,
        Either::What(recompute) => recompute,
    })
}

/// Settings of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Seed of initialisation, data order, dropout and noise.
    pub seed: u64,
    /// Rows of a batch.
    pub batch_size: usize,
    /// Batches whose gradients make one step.
    pub accumulation: usize,
    /// Steps over which they rise to that from one; at once where 0.
    #[serde(default)]
    pub accumulation_warmup: u64,
    /// Tokens of a row.
    pub context: usize,
    /// How documents become rows.
    #[serde(with = "layout")]
    pub layout: Layout,
    /// Whether documents and rows are shuffled, each epoch anew.
    #[serde(default = "yes")]
    pub shuffle: bool,
    /// Keeps each document of a packed row from seeing those before it.
    #[serde(default)]
    pub isolate_documents: bool,
    /// Learning rate by step; `schedule.total` is the length of the run.
    pub schedule: Schedule,
    /// Optimizer of what Muon does not move.
    pub adamw: AdamW,
    /// Optimizer of the matrices of blocks; AdamW as well where `None`.
    #[serde(default)]
    pub muon: Option<Muon>,
    /// Factors of the learning rates of tensors whose checkpoint names match a pattern, the last one that does.
    #[serde(default)]
    pub lr_scale: Vec<(String, f32)>,
    /// Patterns of checkpoint names of tensors without weight decay.
    #[serde(default)]
    pub no_decay: Vec<String>,
    /// What is done about loss spikes; nothing where `None`.
    #[serde(default)]
    pub spikes: Option<spikes::Rule>,
    /// What matrix products are computed in.
    #[serde(default)]
    pub dtype: Dtype,
    /// How a GPU multiplies them.
    #[serde(default)]
    pub matmul: Matmul,
    /// Whether dense products of a GPU may be NVIDIA's cuBLASLt's, where its library is found.
    #[serde(default = "yes")]
    pub cublaslt: bool,
    /// Whether a GPU gives the same bits twice, or may add sums in any order.
    #[serde(default = "yes")]
    pub deterministic: bool,
    /// What is computed again in the backward pass.
    #[serde(default, deserialize_with = "recompute")]
    pub recompute: Recompute,
    /// Largest gradient norm; larger ones are scaled down to it.
    pub clip: f32,
    /// What an overfull expert does.
    pub dropping: Dropping,
    /// How far a step moves the selection bias of an expert that got more or less than its share, where the model has one.
    #[serde(default = "bias_rate")]
    pub bias_rate: f32,
    /// Patterns (regular expressions) of the checkpoint names of tensors that stay as they are.
    #[serde(default)]
    pub freeze: Vec<String>,
    /// Steps between evaluations; none but the last where 0.
    pub eval_every: u64,
    /// Most batches of an evaluation; all where 0.
    pub eval_batches: usize,
    /// Steps between checkpoints; none but the last where 0.
    pub save_every: u64,
    /// Checkpoints kept besides the best.
    pub keep: usize,
    /// Steps between samples of text; none where 0.
    pub sample_every: u64,
    /// Tokens of a sample.
    pub sample_tokens: usize,
    /// What samples continue.
    pub sample_prompt: String,
}

/// What balanced best, at the lowest loss, in benches/runs/2026-11-28-learning.md. Wang et al. 2024 found 1e-3, but for gates between 0 and
/// 1, where here the bias is added to logits.
pub fn bias_rate() -> f32 {
    1e-2
}

fn yes() -> bool {
    true
}

impl Settings {
    /// How a model is computed under these settings.
    pub fn compute(&self, n_thread: usize) -> Compute {
        let precision = match self.dtype {
            Dtype::F32 | Dtype::Tf32 => Precision::F32,
            Dtype::Bf16 => Precision::Bf16,
        };
        Compute { n_thread, precision, recompute: self.recompute }
    }

    /// Batches of step `step`, from 0.
    pub fn n_batch(&self, step: u64) -> u64 {
        let all = self.accumulation as u64;
        if step >= self.accumulation_warmup { all } else { 1 + (all - 1) * step / self.accumulation_warmup }
    }

    /// Number of the first batch of step `step`, from 0.
    pub fn first_batch(&self, step: u64) -> u64 {
        let warming = step.min(self.accumulation_warmup);
        (0..warming).map(|step| self.n_batch(step)).sum::<u64>() + (step - warming) * self.accumulation as u64
    }

    /// Steps that `n_batch` batches make, the last one perhaps with more.
    pub fn steps_of(&self, n_batch: u64) -> u64 {
        let warming = self.first_batch(self.accumulation_warmup);
        match n_batch.checked_sub(warming) {
            Some(rest) => self.accumulation_warmup + rest.div_ceil(self.accumulation as u64),
            None => (0..self.accumulation_warmup)
                .find(|&step| self.first_batch(step) >= n_batch)
                .unwrap_or(self.accumulation_warmup),
        }
    }

    /// Muon's learning rate of step `step`, from 0: the others' curve up to its own highest.
    pub fn muon_lr(&self, step: u64) -> f32 {
        self.muon.map_or(0.0, |muon| self.schedule.at(step) / self.schedule.peak * muon.lr)
    }

    /// Checks the numbers against each other and the model.
    pub fn check(&self, config: &Config) -> Result<(), Error> {
        let fail = |flag: &'static str, problem: String| Err(Error::Setting { flag, problem });
        let at_least_one = [
            ("batch-size", self.batch_size as u64),
            ("accumulate", self.accumulation as u64),
            ("context", self.context as u64),
            ("steps", self.schedule.total),
            ("keep", self.keep as u64),
        ];
        for (flag, value) in at_least_one {
            if value == 0 {
                return fail(flag, "must be at least 1".to_owned());
            }
        }
        if self.context > config.n_ctx {
            let problem = format!("{} is more than the model's {} positions", self.context, config.n_ctx);
            return fail("context", problem);
        }
        if self.dtype == Dtype::Bf16 && !config.head_dim().is_multiple_of(2) {
            let problem = format!("bf16 needs heads of an even width: the model's is {}", config.head_dim());
            return fail("dtype", problem);
        }
        if self.matmul == Matmul::Wgmma && self.dtype != Dtype::Bf16 {
            return fail("matmul", "wgmma multiplies bf16: it needs --dtype bf16".to_owned());
        }
        if self.isolate_documents && self.layout != Layout::Packed {
            return fail("isolate-documents", "is for packed rows: others have one document each".to_owned());
        }
        let positive = |x: f32| x > 0.0 && x.is_finite();
        let unit = |x: f32| (0.0..=1.0).contains(&x);
        let numbers = [
            ("lr", positive(self.schedule.peak), self.schedule.peak, "a positive number"),
            ("clip", positive(self.clip), self.clip, "a positive number"),
            ("min-lr", unit(self.schedule.final_fraction), self.schedule.final_fraction, "a fraction of --lr, 0 to 1"),
            ("decay-fraction", unit(self.schedule.decay_fraction), self.schedule.decay_fraction, "0 to 1"),
            ("beta1", unit(self.adamw.beta1) && self.adamw.beta1 < 1.0, self.adamw.beta1, "0 up to, not including, 1"),
            ("beta2", unit(self.adamw.beta2) && self.adamw.beta2 < 1.0, self.adamw.beta2, "0 up to, not including, 1"),
            ("bias-rate", self.bias_rate >= 0.0 && self.bias_rate.is_finite(), self.bias_rate, "zero or more"),
            ("weight-decay", self.adamw.weight_decay >= 0.0, self.adamw.weight_decay, "zero or more"),
        ];
        for (flag, holds, value, expected) in numbers {
            if !holds {
                return fail(flag, format!("is {value}: expected {expected}"));
            }
        }
        if let Some(Muon { lr, momentum }) = self.muon {
            if !positive(lr) {
                return fail("muon-lr", format!("is {lr}: expected a positive number"));
            }
            if !(0.0..1.0).contains(&momentum) {
                return fail("momentum", format!("is {momentum}: expected 0 up to, not including, 1"));
            }
        }
        if let Some((pattern, factor)) =
            self.lr_scale.iter().find(|(_, factor)| !(*factor >= 0.0 && factor.is_finite()))
        {
            return fail("lr-scale", format!("{pattern}={factor}: expected a factor of zero or more"));
        }
        if let Some(rule) = self.spikes.filter(|rule| !positive(rule.z)) {
            return fail("spike-z", format!("is {}: expected a positive number", rule.z));
        }
        if self.accumulation_warmup > 0 && self.accumulation == 1 {
            return fail("accumulate-warmup", "has nothing to rise to: give --accumulate as well".to_owned());
        }
        Group::all(&tensors(config), self)?;
        Ok(())
    }
}

/// [`Layout`] by name.
mod layout {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use super::Layout;

    const NAMES: [(Layout, &str); 2] = [(Layout::Packed, "packed"), (Layout::OneDocumentPerRow, "document")];

    pub fn serialize<S: Serializer>(layout: &Layout, out: S) -> Result<S::Ok, S::Error> {
        let (_, name) = NAMES.iter().find(|(l, _)| l == layout).expect("every layout has a name");
        out.serialize_str(name)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Layout, D::Error> {
        let text = String::deserialize(from)?;
        let found = NAMES.iter().find(|(_, name)| *name == text);
        found.map(|(layout, _)| *layout).ok_or_else(|| D::Error::custom(format!("unknown layout `{text}`")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Recipe;

    #[test]
    fn batches_of_a_step_rise_to_all_of_them() {
        let base = Recipe::Recommended.settings(&Config::preset("param-tiny").unwrap(), 20);
        let settings = Settings { accumulation: 4, accumulation_warmup: 6, ..base };
        let counts = (0..9).map(|step| settings.n_batch(step)).collect::<Vec<_>>();
        assert_eq!(counts, [1, 1, 2, 2, 3, 3, 4, 4, 4]);
        for step in 0..9 {
            assert_eq!(settings.first_batch(step), counts[..step as usize].iter().sum::<u64>());
        }
        assert_eq!([1, 3, 12, 13, 16, 17].map(|n| settings.steps_of(n)), [1, 3, 6, 7, 7, 8]);
    }
}
