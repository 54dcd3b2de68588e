//! Recipes: the settings that a run begins with, before flags change some of them.

use param_model::Config;

use crate::data::Layout;
use crate::optimizer::{AdamW, Decay, Muon};
use crate::schedule::{Curve, Schedule};
use crate::settings::{Dropping, Dtype, Matmul, Recompute, Settings, bias_rate};

/// Where a run's settings come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recipe {
    /// What was measured to learn most per token.
    #[default]
    Recommended,
    /// AdamW alone, at its best: what the recommended recipe is compared with.
    AdamW,
    /// The reference implementation's own (reference/MODEL §7 and §8).
    Reference,
}

impl Recipe {
    /// Settings of a run of `steps` steps for `config`.
    pub fn settings(self, config: &Config, steps: u64) -> Settings {
        let tenth = steps.div_ceil(10).max(1);
        let base = Settings {
            seed: 42,
            batch_size: 16,
            accumulation: 1,
            accumulation_warmup: 0,
            context: config.n_ctx,
            layout: Layout::Packed,
            shuffle: true,
            isolate_documents: false,
            schedule: Schedule {
                // Falls as one over the root of the width, as Muon's does: the evidence is benches/runs/2026-11-28-learning.md, from
                // widths of 96 to 384.
                peak: 0.1 / (config.n_embd as f32).sqrt(),
                warmup: (steps / 20).min(2000),
                total: steps,
                curve: Curve::Cosine,
                final_fraction: 0.1,
                decay_fraction: 0.2,
            },
            adamw: AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decay: Decay::Matrices },
            muon: None,
            lr_scale: Vec::new(),
            no_decay: Vec::new(),
            spikes: None,
            dtype: Dtype::F32,
            matmul: Matmul::Mma,
            cublaslt: true,
            deterministic: true,
            recompute: Recompute::Nothing,
            clip: 1.0,
            dropping: Dropping::Never,
            bias_rate: bias_rate(),
            freeze: Vec::new(),
            eval_every: tenth,
            eval_batches: 0,
            save_every: tenth,
            keep: 2,
            sample_every: tenth,
            sample_tokens: 64,
            sample_prompt: String::new(),
        };
        match self {
            Recipe::AdamW => base,
            Recipe::Recommended => {
                // Short runs do better with a short memory: the same page of evidence.
                let momentum = (1.0 - 150.0 / steps as f32).clamp(0.8, Muon::MOMENTUM);
                let muon = Muon { lr: Muon::LR_RATIO * base.schedule.peak, momentum };
                Settings { muon: Some(muon), ..base }
            }
            Recipe::Reference => Settings {
                batch_size: 8,
                layout: Layout::OneDocumentPerRow,
                shuffle: false,
                schedule: Schedule {
                    peak: 5e-5,
                    warmup: 0,
                    curve: Curve::Linear,
                    final_fraction: 0.0,
                    ..base.schedule
                },
                adamw: AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, decay: Decay::All },
                dropping: Dropping::ByCapacity,
                ..base
            },
        }
    }
}
