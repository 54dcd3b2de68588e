//! The flags of param-train, and what they make of a preset's and a run's settings.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, Parser, ValueEnum};
use param::cli::{Usage, VERSION};
use param::device::DeviceArg;
use param_model::Config;
use param_train::data::Layout;
use param_train::inherit::Source;
use param_train::optimizer::{Decay, Muon};
use param_train::recipe::Recipe;
use param_train::schedule::Curve;
use param_train::settings::{Dropping, Dtype, Matmul, Recompute, Settings};
use param_train::spikes;

/// Train a PARAM model on text: a tokenizer, then the model, in checkpoints that param-convert takes.
///
/// Checkpoints go to DIR/checkpoints, with links DIR/last and DIR/best; losses to DIR/metrics.jsonl; tokens to DIR/tokens.
/// DIR/report.html, to be opened in a browser, and DIR/tensorboard show the run while it goes.
/// Ctrl-C saves and stops; --resume goes on where the newest checkpoint is, bit for bit.
#[derive(Parser)]
#[command(version = VERSION)]
pub struct Flags {
    #[command(flatten)]
    pub task: Task,
    /// Folder of the run
    #[arg(long, value_name = "DIR", required_unless_present_any = ["eval", "benchmark", "dry_run", "tokenize_only"])]
    pub out: Option<PathBuf>,
    #[command(flatten)]
    pub data: Data,
    #[command(flatten)]
    pub model: Model,
    #[command(flatten)]
    pub training: Training,
    /// Where the model is trained
    #[arg(long, value_enum, default_value = "auto")]
    pub device: DeviceArg,
    /// Threads [default: all cores]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Print where the time of a step goes
    #[arg(long)]
    pub profile: bool,
    /// Keep no report.html and no event files for TensorBoard
    #[arg(long)]
    pub no_report: bool,
    /// Steps between lines in a log (a terminal has a bar)
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    pub log_every: u64,
}

#[derive(Args)]
pub struct Task {
    /// Continue the run in --out with its own settings; flags given again change them from here on
    #[arg(long)]
    pub resume: bool,
    /// Write a randomly initialised model and stop
    #[arg(long, conflicts_with_all = ["resume", "eval"])]
    pub init_only: bool,
    /// Report the loss of --checkpoint on --data and stop
    #[arg(long, requires = "checkpoint", conflicts_with = "resume")]
    pub eval: bool,
    /// Tokenize --data, print how fast, and stop; with --out, the tokens and tokenizer.json stay in DIR/tokens for training
    #[arg(long, conflicts_with_all = ["resume", "init_only", "eval", "dry_run", "benchmark"])]
    pub tokenize_only: bool,
    /// Print the number of parameters, the memory needed by kind and an estimate of the time, and stop
    #[arg(long, conflicts_with_all = ["resume", "init_only", "eval", "benchmark"])]
    pub dry_run: bool,
    /// Measure N steps on random tokens, print one JSON object, and stop
    #[arg(long, value_name = "N", conflicts_with_all = ["resume", "init_only", "eval"],
        value_parser = clap::value_parser!(u64).range(1..))]
    pub benchmark: Option<u64>,
    /// Checkpoint to evaluate: a folder or a .safetensors file, config and tokenizer beside it
    #[arg(long, value_name = "PATH", requires = "eval")]
    pub checkpoint: Option<PathBuf>,
}

#[derive(Args)]
#[command(next_help_heading = "Data")]
pub struct Data {
    /// Text: files, folders (searched through) and globs of .txt, .md, source code or .jsonl, also .gz and .zst, and .parquet;
    /// PATH:WEIGHT makes each a data set with its share of the rows
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub data: Vec<PathBuf>,
    /// Text to validate on [default: a part held out of --data]
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub eval_data: Vec<PathBuf>,
    /// Part of the documents held out (of a single document: its end) [default: 0.05]
    #[arg(long, value_name = "FRACTION", conflicts_with = "eval_data")]
    pub holdout: Option<f64>,
    /// Endings of the files to take from folders, such as rs,md [default: all text]
    #[arg(long, value_name = "EXT", value_delimiter = ',')]
    pub ext: Vec<String>,
    /// Field of a JSON line, or column of a Parquet file, that holds the text [default: text]
    #[arg(long, value_name = "NAME")]
    pub text_field: Option<String>,
    /// A tokenizer.json (byte-level BPE) to use [default: one is trained on --data]
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Size of the tokenizer to train [default: the model's vocab_size]
    #[arg(long, value_name = "N", conflicts_with_all = ["tokenizer", "chars"])]
    pub vocab_size: Option<usize>,
    /// One token per character
    #[arg(long, conflicts_with = "tokenizer")]
    pub chars: bool,
}

#[derive(Args)]
#[command(next_help_heading = "Model")]
pub struct Model {
    /// Size of the model
    #[arg(long, value_name = "NAME", value_parser = clap::builder::PossibleValuesParser::new(Config::preset_names()))]
    pub preset: Option<String>,
    /// Hyperparameters from a config.json or a preset's .toml instead
    #[arg(long, value_name = "FILE", conflicts_with = "preset")]
    pub config: Option<PathBuf>,
    /// Start from the weights, config and tokenizer of a checkpoint: a run's folder, or a .safetensors file with both beside it
    #[arg(long, value_name = "PATH", conflicts_with_all = ["preset", "config", "tokenizer", "vocab_size", "chars", "resume", "eval"])]
    pub init_from: Option<PathBuf>,
    /// Make experts of the dense layers of --init-from, each a copy; how many is said by --set num_experts=8 --set top_k=2
    #[arg(long, requires = "init_from")]
    pub upcycle: bool,
    /// Noise in the copies, as a fraction of their weights' root mean square [default: 0: the router tells them apart]
    #[arg(long, value_name = "FRACTION", requires = "upcycle")]
    pub upcycle_noise: Option<f32>,
    /// One hyperparameter by its key in config.json, such as num_layers=4
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Tokens of a row, and positions of the model (--init-from keeps those it has, and adds what is missing)
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// Dropout probability
    #[arg(long, value_name = "P")]
    pub dropout: Option<f32>,
    /// Weight of the loss that balances the experts' load; may change when resuming [default: the config's, 0.01]
    #[arg(long, value_name = "WEIGHT")]
    pub aux_weight: Option<f32>,
    /// Weight of the router's z loss; may change when resuming [default: the config's, 0.001]
    #[arg(long, value_name = "WEIGHT")]
    pub z_weight: Option<f32>,
}

#[derive(Args)]
#[command(next_help_heading = "Training")]
pub struct Training {
    /// Optimizer steps [default: 2000]
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// Passes over the training data instead of steps
    #[arg(long, value_name = "X", conflicts_with = "steps")]
    pub epochs: Option<f64>,
    /// Rows per batch, or auto: as many as the GPU has memory for, a power of two [default: 16]
    #[arg(long, value_name = "B", value_parser = parse_batch_size)]
    pub batch_size: Option<BatchSize>,
    /// Batches per step [default: 1]
    #[arg(long, value_name = "N")]
    pub accumulate: Option<usize>,
    /// Steps over which the batches per step rise from one to --accumulate [default: 0]
    #[arg(long, value_name = "N")]
    pub accumulate_warmup: Option<u64>,
    /// Settings to begin with; flags change single ones [default: recommended]
    #[arg(long, value_name = "NAME", conflicts_with = "optimizer")]
    pub recipe: Option<RecipeName>,
    /// What moves the matrices of blocks; embeddings, norms, biases and routers are AdamW's always [default: muon]
    #[arg(long, value_name = "NAME")]
    pub optimizer: Option<OptimizerName>,
    /// Highest learning rate [default: 0.1 over the root of the model's width]
    #[arg(long)]
    pub lr: Option<f32>,
    /// Last learning rate as a fraction of --lr [default: 0.1]
    #[arg(long, value_name = "FRACTION")]
    pub min_lr: Option<f32>,
    /// Steps over which the learning rate rises [default: a twentieth of all, at most 2000]
    #[arg(long, value_name = "N")]
    pub warmup: Option<u64>,
    /// How the learning rate falls [default: cosine]
    #[arg(long)]
    pub schedule: Option<ScheduleName>,
    /// Part of the run over which wsd decays [default: 0.2]
    #[arg(long, value_name = "FRACTION")]
    pub decay_fraction: Option<f32>,
    /// Highest learning rate of what Muon moves [default: 1.2 times --lr]
    #[arg(long, value_name = "LR")]
    pub muon_lr: Option<f32>,
    /// Muon's decay of the running sum of gradients [default: 0.95, in runs of less than 3000 steps down to 0.8]
    #[arg(long)]
    pub momentum: Option<f32>,
    /// Factor of the learning rate of tensors by their names in the checkpoint, such as 'token_emb=2'
    #[arg(long, value_name = "REGEX=FACTOR", value_parser = parse_factor)]
    pub lr_scale: Vec<(String, f32)>,
    /// AdamW's decay of the first moment [default: 0.9]
    #[arg(long)]
    pub beta1: Option<f32>,
    /// AdamW's decay of the second moment [default: 0.95]
    #[arg(long)]
    pub beta2: Option<f32>,
    /// Decoupled weight decay of matrices and embeddings [default: 0.1]
    #[arg(long)]
    pub weight_decay: Option<f32>,
    /// Decay norms and biases as well, as the reference does
    #[arg(long)]
    pub decay_all: bool,
    /// No weight decay of tensors by their names in the checkpoint
    #[arg(long, value_name = "REGEX")]
    pub no_decay: Vec<String>,
    /// What to do about a loss or gradient norm far above those before: leave the step out, or scale its gradients down
    #[arg(long, value_name = "ACTION")]
    pub spikes: Option<SpikesName>,
    /// Standard deviations above the mean that make a spike [default: 6]
    #[arg(long, value_name = "Z", requires = "spikes")]
    pub spike_z: Option<f32>,
    /// What matrix products are computed in [default: f32]
    #[arg(long, value_name = "TYPE")]
    pub dtype: Option<DtypeName>,
    /// How a GPU multiplies matrices [default: mma]
    #[arg(long, value_name = "HOW")]
    pub matmul: Option<MatmulName>,
    /// Keep dense products of a GPU in bf16 or tf32 to kernels of this program, where NVIDIA's cuBLASLt is found as well
    #[arg(long)]
    pub no_cublaslt: bool,
    /// Let a GPU add long sums in any order, which is faster; two runs, or a resumed one, then differ in the last bits
    #[arg(long)]
    pub non_deterministic: bool,
    /// Compute again in the backward pass what would have been kept for it, for less memory: of every block, or of its feed-forward half
    #[arg(long, value_name = "WHAT", num_args = 0..=1, require_equals = true, default_missing_value = "blocks")]
    pub recompute: Option<RecomputeName>,
    /// Largest gradient norm [default: 1]
    #[arg(long)]
    pub clip: Option<f32>,
    /// Drop what exceeds an expert's capacity (the config's factors), as the reference does
    #[arg(long)]
    pub capacity: bool,
    /// Change per step of the bias by which an expert is chosen more or less, in a model with --set use_selection_bias=true
    /// [default: 0.01]
    #[arg(long, value_name = "RATE")]
    pub bias_rate: Option<f32>,
    /// Leave tensors as they are whose checkpoint names match, such as 'moe\.experts' or '^token_emb' (repeatable)
    #[arg(long, value_name = "REGEX")]
    pub freeze: Vec<String>,
    /// How documents become rows [default: packed]
    #[arg(long)]
    pub layout: Option<LayoutName>,
    /// Keep each document of a packed row from seeing those before it
    #[arg(long)]
    pub isolate_documents: bool,
    /// Take documents in the order of the files, every epoch the same
    #[arg(long)]
    pub no_shuffle: bool,
    /// Seed of everything random [default: 42]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Steps between evaluations [default: a tenth of all]
    #[arg(long, value_name = "N")]
    pub eval_every: Option<u64>,
    /// Most batches of an evaluation, 0 for all [default: 0]
    #[arg(long, value_name = "N")]
    pub eval_batches: Option<usize>,
    /// Steps between checkpoints, besides those of the best evaluations [default: a tenth of all]
    #[arg(long, value_name = "N")]
    pub save_every: Option<u64>,
    /// Checkpoints to keep, besides the best [default: 2]
    #[arg(long, value_name = "N")]
    pub keep: Option<usize>,
    /// Steps between samples of text, 0 for none [default: a tenth of all]
    #[arg(long, value_name = "N")]
    pub sample_every: Option<u64>,
    /// Tokens of a sample [default: 64]
    #[arg(long, value_name = "N")]
    pub sample_tokens: Option<usize>,
    /// Text for samples to continue [default: none]
    #[arg(long, value_name = "TEXT")]
    pub sample_prompt: Option<String>,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum RecipeName {
    /// What was measured to learn most per token
    Recommended,
    /// The reference implementation's settings exactly
    Reference,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum OptimizerName {
    /// Momentum made orthogonal
    Muon,
    /// AdamW for everything
    Adamw,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum SpikesName {
    Skip,
    Clip,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum ScheduleName {
    Cosine,
    Linear,
    Constant,
    /// Constant, then a line down (warmup-stable-decay)
    Wsd,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum DtypeName {
    /// Exact
    F32,
    /// Factors rounded to 10 bits of mantissa: on a GPU
    Tf32,
    /// Factors rounded to bf16, sums in f32, parameters kept in f32: faster where the processor multiplies bf16
    Bf16,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum MatmulName {
    /// By each warp: any type on any GPU
    Mma,
    /// By four warps together: --dtype bf16 on GPUs of compute capability 9.0 (H100, H200)
    Wgmma,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum RecomputeName {
    /// Keep everything
    Nothing,
    /// What is widest: about half of the memory of the activations, for half of the arithmetic of `blocks`
    FeedForward,
    /// All but the blocks' inputs, for a third more arithmetic
    Blocks,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum LayoutName {
    /// Documents one after the other with end-of-text between, no padding
    Packed,
    /// One document a row, cut off or padded, as in the reference
    Document,
}

/// --batch-size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchSize {
    /// As many rows as the GPU has memory for.
    Auto,
    /// So many.
    Rows(usize),
}

fn parse_batch_size(text: &str) -> Result<BatchSize, String> {
    match text {
        "auto" => Ok(BatchSize::Auto),
        _ => text.parse().map(BatchSize::Rows).map_err(|_| "expected a number of rows, or auto".to_owned()),
    }
}

fn parse_factor(assignment: &str) -> Result<(String, f32), String> {
    let expected = || "expected REGEX=FACTOR, such as 'token_emb=2'".to_owned();
    let (pattern, factor) = assignment.rsplit_once('=').ok_or_else(expected)?;
    Ok((pattern.to_owned(), factor.parse().map_err(|_| expected())?))
}

impl Flags {
    /// Threads to use.
    pub fn n_thread(&self) -> usize {
        self.threads.map_or_else(param_kernels::available_threads, usize::from)
    }

    /// Settings of a new run of `steps` steps for `config`, in rows as long as the flags say.
    pub fn settings(&self, config: &Config, steps: u64) -> Result<Settings> {
        let settings = self.training.settings(config, steps);
        self.training.check(config, &settings)?;
        Ok(Settings { context: self.model.context.unwrap_or(settings.context), ..settings })
    }
}

impl Model {
    /// The hyperparameters that the flags name, before the tokenizer sets the vocabulary's size.
    pub fn config(&self) -> Result<Config> {
        let origin = match (&self.preset, &self.config, &self.init_from) {
            (_, Some(path), _) => Config::from_file(path)?,
            (Some(name), None, _) => Config::preset(name)?,
            (None, None, Some(path)) => Source::open(path)?.config().clone(),
            (None, None, None) => bail!(Usage(
                "--preset NAME or --config FILE is needed to know the model's size, or --init-from PATH".into()
            )),
        };
        let base: serde_json::Value = serde_json::from_str(&origin.to_json())?;
        let mut changed = base.clone();
        let mut keys = Vec::new();
        for assignment in &self.set {
            let Some((key, value)) = assignment.split_once('=') else {
                bail!(Usage(format!("--set {assignment}: expected KEY=VALUE, such as num_layers=4")));
            };
            changed[key] = serde_json::from_str(value).unwrap_or_else(|_| value.into());
            keys.push(key);
        }
        let mut config = Config::from_json(&changed.to_string(), "--set").map_err(|e| Usage(e.to_string()))?;
        // A key is known if the config writes it; one that is optional is written only where it is not at its default.
        let written: serde_json::Value = serde_json::from_str(&config.to_json())?;
        if let Some(key) = keys.iter().find(|&key| base.get(key).is_none() && written.get(key).is_none()) {
            bail!(Usage(format!("--set {key}: config.json has no such key, or this is its default anyway")));
        }
        if self.upcycle && !keys.contains(&"expert_activation") {
            // Experts begin by computing what the dense layers did.
            config.expert_activation = origin.dense_activation;
        }
        let n_learned = if self.init_from.is_some() { config.n_ctx } else { 0 };
        config.n_ctx = self.context.map_or(config.n_ctx, |n| n.max(n_learned));
        config.dropout = self.dropout.unwrap_or(config.dropout);
        self.weigh_losses(config)
    }

    /// `config` with the weights that the flags give the router's losses. A weight that is given is in force.
    pub fn weigh_losses(&self, mut config: Config) -> Result<Config> {
        if self.aux_weight.or(self.z_weight).is_some() && !config.use_aux_loss {
            // That switch gates both losses.
            (config.use_aux_loss, config.aux_loss_weight, config.router_z_loss_weight) = (true, 0.0, 0.0);
        }
        set(&mut config.aux_loss_weight, self.aux_weight);
        set(&mut config.router_z_loss_weight, self.z_weight);
        set(&mut config.use_router_z_loss, self.z_weight.map(|_| true));
        config.checked("the command line").map_err(|e| Usage(e.to_string()).into())
    }

    /// The preset or the file.
    pub fn name(&self) -> Option<String> {
        let path = self.config.as_ref().or(self.init_from.as_ref());
        self.preset.clone().or_else(|| path.map(|path| path.display().to_string()))
    }

    /// Whether any flag describes a model; how its losses are weighed belongs to training.
    pub fn is_given(&self) -> bool {
        self.preset.is_some()
            || self.config.is_some()
            || !self.set.is_empty()
            || self.context.is_some()
            || self.dropout.is_some()
    }
}

impl Training {
    /// Steps where no flag says how many.
    pub const STEPS: u64 = 2000;

    /// Steps that the flags ask for, given those in some number of epochs.
    pub fn steps(&self, steps_in: impl Fn(f64) -> u64) -> Result<Option<u64>> {
        match self.epochs {
            Some(epochs) if !(epochs > 0.0 && epochs.is_finite()) => {
                bail!(Usage(format!("--epochs {epochs}: expected a positive number")))
            }
            Some(epochs) => Ok(Some(steps_in(epochs))),
            None => Ok(self.steps),
        }
    }

    /// Refuses what would have no effect.
    pub fn check(&self, config: &Config, settings: &Settings) -> Result<()> {
        let of_muon = [("muon-lr", self.muon_lr), ("momentum", self.momentum)];
        if let Some((flag, _)) = of_muon.iter().find(|(_, given)| given.is_some() && settings.muon.is_none()) {
            bail!(Usage(format!("--{flag}: AdamW moves everything here: it is a setting of --optimizer muon")));
        }
        if self.bias_rate.is_some() && !config.use_selection_bias {
            bail!(Usage(
                "--bias-rate: the model has no selection bias: it begins with --set use_selection_bias=true".into()
            ));
        }
        Ok(())
    }

    /// Settings of a new run of `steps` steps for `config`.
    pub fn settings(&self, config: &Config, steps: u64) -> Settings {
        let recipe = match (self.recipe, self.optimizer) {
            (Some(RecipeName::Reference), _) => Recipe::Reference,
            (_, Some(OptimizerName::Adamw)) => Recipe::AdamW,
            _ => Recipe::Recommended,
        };
        self.apply(recipe.settings(config, steps))
    }

    /// `settings` with what the flags say instead.
    pub fn apply(&self, mut settings: Settings) -> Settings {
        let s = &mut settings;
        set(&mut s.seed, self.seed);
        if let Some(BatchSize::Rows(n)) = self.batch_size {
            s.batch_size = n;
        }
        set(&mut s.accumulation, self.accumulate);
        set(&mut s.accumulation_warmup, self.accumulate_warmup);
        set(&mut s.schedule.peak, self.lr);
        match (self.optimizer, s.muon) {
            (Some(OptimizerName::Adamw), _) => s.muon = None,
            (Some(OptimizerName::Muon), None) => {
                s.muon = Some(Muon { lr: Muon::LR_RATIO * s.schedule.peak, momentum: Muon::MOMENTUM })
            }
            _ => {}
        }
        if let Some(muon) = &mut s.muon {
            set(&mut muon.lr, self.muon_lr.or(self.lr.map(|lr| Muon::LR_RATIO * lr)));
            set(&mut muon.momentum, self.momentum);
        }
        set(&mut s.lr_scale, (!self.lr_scale.is_empty()).then(|| self.lr_scale.clone()));
        set(&mut s.no_decay, (!self.no_decay.is_empty()).then(|| self.no_decay.clone()));
        let spikes = self.spikes.map(|name| {
            let action = match name {
                SpikesName::Skip => spikes::Action::Skip,
                SpikesName::Clip => spikes::Action::Clip,
            };
            Some(spikes::Rule { z: self.spike_z.unwrap_or(6.0), action })
        });
        set(&mut s.spikes, spikes);
        set(&mut s.schedule.final_fraction, self.min_lr);
        set(&mut s.schedule.warmup, self.warmup);
        set(&mut s.schedule.decay_fraction, self.decay_fraction);
        set(&mut s.adamw.beta1, self.beta1);
        set(&mut s.adamw.beta2, self.beta2);
        set(&mut s.adamw.weight_decay, self.weight_decay);
        set(&mut s.clip, self.clip);
        set(&mut s.eval_every, self.eval_every);
        set(&mut s.eval_batches, self.eval_batches);
        set(&mut s.save_every, self.save_every);
        set(&mut s.keep, self.keep);
        set(&mut s.sample_every, self.sample_every);
        set(&mut s.sample_tokens, self.sample_tokens);
        set(&mut s.sample_prompt, self.sample_prompt.clone());
        set(&mut s.adamw.decay, self.decay_all.then_some(Decay::All));
        set(&mut s.bias_rate, self.bias_rate);
        set(&mut s.freeze, Some(self.freeze.clone()).filter(|patterns| !patterns.is_empty()));
        set(&mut s.dropping, self.capacity.then_some(Dropping::ByCapacity));
        let curve = self.schedule.map(|name| match name {
            ScheduleName::Cosine => Curve::Cosine,
            ScheduleName::Linear => Curve::Linear,
            ScheduleName::Constant => Curve::Constant,
            ScheduleName::Wsd => Curve::Wsd,
        });
        set(&mut s.schedule.curve, curve);
        let dtype = self.dtype.map(|name| match name {
            DtypeName::F32 => Dtype::F32,
            DtypeName::Tf32 => Dtype::Tf32,
            DtypeName::Bf16 => Dtype::Bf16,
        });
        set(&mut s.dtype, dtype);
        let matmul = self.matmul.map(|name| match name {
            MatmulName::Mma => Matmul::Mma,
            MatmulName::Wgmma => Matmul::Wgmma,
        });
        set(&mut s.matmul, matmul);
        set(&mut s.cublaslt, self.no_cublaslt.then_some(false));
        set(&mut s.deterministic, self.non_deterministic.then_some(false));
        let recompute = self.recompute.map(|name| match name {
            RecomputeName::Nothing => Recompute::Nothing,
            RecomputeName::FeedForward => Recompute::FeedForward,
            RecomputeName::Blocks => Recompute::Blocks,
        });
        set(&mut s.recompute, recompute);
        set(&mut s.shuffle, self.no_shuffle.then_some(false));
        let layout = self.layout.map(|name| match name {
            LayoutName::Packed => Layout::Packed,
            LayoutName::Document => Layout::OneDocumentPerRow,
        });
        set(&mut s.layout, layout);
        set(&mut s.isolate_documents, self.isolate_documents.then_some(true));
        settings
    }
}

fn set<T>(setting: &mut T, given: Option<T>) {
    if let Some(value) = given {
        *setting = value;
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_flags_are_consistent() {
        Flags::command().debug_assert();
    }

    #[test]
    fn a_weight_given_is_in_force_and_leaves_the_other_as_it_was() {
        let weights = |args: &[&str]| {
            let flags = ["param-train", "--preset", "param-tiny", "--out", "x"].iter().chain(args);
            let config = Flags::parse_from(flags).model.config().unwrap();
            let on = |flag: bool, weight: f32| if flag { weight } else { 0.0 };
            let z = on(config.use_router_z_loss, config.router_z_loss_weight);
            (on(config.use_aux_loss, config.aux_loss_weight), on(config.use_aux_loss, z))
        };
        assert_eq!(weights(&["--aux-weight=0.5"]), (0.5, 0.001));
        assert_eq!(weights(&["--z-weight=0.5", "--set=use_router_z_loss=false"]), (0.01, 0.5));
        assert_eq!(weights(&["--z-weight=0.5", "--set=use_aux_loss=false"]), (0.0, 0.5));
        assert_eq!(weights(&["--aux-weight=0.5", "--set=use_aux_loss=false"]), (0.5, 0.0));
    }

    #[test]
    fn set_changes_a_key_and_refuses_strangers() {
        let model = |set: &[&str]| {
            let flags = ["param-train", "--preset", "param-tiny", "--out", "x"].into_iter();
            Flags::parse_from(flags.chain(set.iter().flat_map(|s| ["--set", s]))).model.config()
        };
        let config = model(&["num_layers=2", "moe_phase=1", "expert_activation=gelu_tanh"]).unwrap();
        assert_eq!((config.n_layer, config.moe_phase), (2, 1));
        for (bad, word) in [("n_layer=2", "no such key"), ("num_layers", "KEY=VALUE"), ("num_heads=5", "num_heads")] {
            let error = model(&[bad]).unwrap_err();
            assert!(error.is::<Usage>() && error.to_string().contains(word), "{error}");
        }
    }
}
