//! A new run's first parameters from an existing checkpoint: the same model, one with more positions, or a dense one made a mixture
//! of experts that begin as copies of its feed-forward layers (Komatsuzaki et al. 2023, sparse upcycling).

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use param_model::checkpoint::{CONFIG_FILE, TOKENIZER_FILE};
use param_model::{Checkpoint, Config, Init, Part, TensorSpec, Tokenizer, tensors};
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;

use crate::error::Error;
use crate::init::{initial, tensor_stream};

/// A checkpoint that a run can start from.
pub struct Source {
    checkpoint: Checkpoint,
    config: Config,
}

/// Where each tensor of a new model comes from.
pub struct Plan {
    entries: Vec<(TensorSpec, Origin)>,
}

enum Origin {
    /// As it is in the checkpoint, whose rows may be fewer: the rest begins as in a new model.
    Copied(TensorSpec),
    /// For each expert a copy of the dense layer's.
    Experts(TensorSpec),
    /// As in a new model.
    Drawn,
}

impl Source {
    /// Opens a checkpoint: `path` as for [`Checkpoint::open`], its `config.json` beside the weights.
    ///
    /// # Errors
    /// What cannot be read, or a config of another model.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let checkpoint = Checkpoint::open(path)?;
        let config = Config::from_file(&checkpoint.folder().join(CONFIG_FILE))?;
        checkpoint.check(&config)?;
        Ok(Self { checkpoint, config })
    }

    /// The checkpoint's model.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The tokenizer beside its weights.
    ///
    /// # Errors
    /// That there is none, or it cannot be read.
    pub fn tokenizer(&self) -> Result<Tokenizer, Error> {
        Ok(Tokenizer::from_file(&self.checkpoint.folder().join(TOKENIZER_FILE))?)
    }

    /// How the parameters of `config` come from this checkpoint, such that it begins by computing what the checkpoint's model does.
    /// Only with `upcycle` do dense layers become experts: of equal outputs any weights that sum to one make the same output.
    ///
    /// # Errors
    /// A tensor that does not fit, is missing, or would be lost.
    pub fn plan(&self, config: &Config, upcycle: bool) -> Result<Plan, Error> {
        let fail = |spec: &TensorSpec, problem: String| {
            let (path, tensor) = (self.checkpoint.path().to_owned(), spec.checkpoint.clone());
            Err(Error::Model(param_model::Error::Tensor { path, tensor, problem }))
        };
        let setting = |flag: &'static str, problem: String| Err(Error::Setting { flag, problem });
        if config.n_head != self.config.n_head {
            let (theirs, ours) = (self.config.n_head, config.n_head);
            return setting(
                "set num_heads",
                format!("{theirs} in the checkpoint, {ours} here: its heads would be cut apart"),
            );
        }
        if upcycle && self.config.n_moe() > 0 {
            return setting("upcycle", "the checkpoint is a mixture of experts already".to_owned());
        }
        if upcycle && config.n_moe() == 0 {
            let problem = "no block would have experts: add --set num_experts=8 --set top_k=2";
            return setting("upcycle", problem.to_owned());
        }
        let theirs = tensors(&self.config);
        let mut left = theirs.iter().map(|spec| ((spec.part, spec.block), spec)).collect::<HashMap<_, _>>();
        let mut entries = Vec::new();
        for spec in tensors(config) {
            let dense = dense_part(spec.part).filter(|_| upcycle);
            let origin = if let Some(from) = left.remove(&(spec.part, spec.block)) {
                let grows = spec.part == Part::PositionEmbd && from.shape[0] < spec.shape[0];
                if from.shape != spec.shape && !(grows && from.shape[1..] == spec.shape[1..]) {
                    return fail(&spec, format!("is {:?}, and {:?} in the new run's model", from.shape, spec.shape));
                }
                Origin::Copied(from.clone())
            } else if let Some(from) = dense.and_then(|part| left.remove(&(part, spec.block))) {
                Origin::Experts(from.clone())
            } else if spec.init == Init::Zeros || is_router(spec.part) && (upcycle || spec.gguf.is_none()) {
                Origin::Drawn
            } else {
                let dense = is_router(spec.part) || dense_part(spec.part).is_some();
                let hint = if dense { ": --upcycle makes experts of dense layers" } else { "" };
                return fail(&spec, format!("missing, but the new run's model has it{hint}"));
            };
            entries.push((spec, origin));
        }
        // What inference has no use for can go.
        match theirs.iter().find(|spec| left.contains_key(&(spec.part, spec.block)) && spec.gguf.is_some()) {
            Some(lost) => fail(lost, "would be lost: the new run's model has no such tensor".to_owned()),
            None => Ok(Plan { entries }),
        }
    }

    /// Parameters in the order of the plan's table. What is new is drawn by `seed`; normal noise of `noise` times their root mean
    /// square is added to the matrices that become experts.
    ///
    /// # Errors
    /// A tensor that cannot be read.
    pub fn params(&self, plan: &Plan, seed: u64, noise: f32) -> Result<Vec<Vec<f32>>, Error> {
        let make = |(index, (spec, origin)): (usize, &(TensorSpec, Origin))| -> Result<Vec<f32>, Error> {
            match origin {
                Origin::Drawn => Ok(initial(spec, seed, index)),
                Origin::Copied(from) => {
                    let mut values = self.checkpoint.get(from)?.to_f32();
                    if values.len() < spec.n_elements() {
                        values.extend_from_slice(&initial(spec, seed, index)[values.len()..]);
                    }
                    Ok(values)
                }
                Origin::Experts(from) => {
                    let dense = self.checkpoint.get(from)?.to_f32();
                    let dense = if spec.is_input_major() { transposed(&dense, from.shape[1]) } else { dense };
                    let mut values = dense.repeat(spec.shape[0]);
                    if noise > 0.0 && spec.is_input_major() {
                        let square = dense.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>() / dense.len() as f64;
                        let std = noise * square.sqrt() as f32;
                        let mut rng = tensor_stream(seed, index);
                        values
                            .iter_mut()
                            .for_each(|w| *w += std * Distribution::<f32>::sample(&StandardNormal, &mut rng));
                    }
                    Ok(values)
                }
            }
        };
        plan.entries.par_iter().enumerate().map(make).collect()
    }
}

/// What an expert's part was in a dense layer.
fn dense_part(part: Part) -> Option<Part> {
    match part {
        Part::ExpertUp => Some(Part::FfnUp),
        Part::ExpertUpBias => Some(Part::FfnUpBias),
        Part::ExpertDown => Some(Part::FfnDown),
        Part::ExpertDownBias => Some(Part::FfnDownBias),
        _ => None,
    }
}

fn is_router(part: Part) -> bool {
    matches!(part, Part::Router | Part::RouterNoise)
}

/// The transpose of a matrix of `n_col` columns.
fn transposed(x: &[f32], n_col: usize) -> Vec<f32> {
    (0..n_col).flat_map(|col| x[col..].iter().step_by(n_col)).copied().collect()
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let count = |of: fn(&Origin) -> bool| self.entries.iter().filter(|(_, origin)| of(origin)).count();
        write!(f, "{} tensors copied", count(|origin| matches!(origin, Origin::Copied(_))))?;
        for (spec, origin) in &self.entries {
            match origin {
                Origin::Copied(from) if from.shape[0] < spec.shape[0] => {
                    write!(f, ", positions {} to {} new", from.shape[0], spec.shape[0] - 1)?;
                }
                _ => {}
            }
        }
        let n_experts = count(|origin| matches!(origin, Origin::Experts(_)));
        let n_drawn = count(|origin| matches!(origin, Origin::Drawn));
        for (n, what) in [(n_experts, "made experts of dense layers"), (n_drawn, "new")] {
            if n > 0 {
                write!(f, ", {n} {what}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use param_model::Activation;

    use super::*;
    use crate::checkpoint::write_model;
    use crate::cpu::{Compute, Mode, Model, Sequences};
    use crate::init::initialise;
    use crate::random::stream;
    use rand::RngExt;

    fn dense() -> Config {
        let tiny = Config::preset("param-tiny").unwrap();
        Config { n_vocab: 40, n_ctx: 12, n_embd: 24, n_head: 3, n_layer: 4, n_expert: 1, n_expert_used: 1, ..tiny }
    }

    /// A checkpoint with nothing at its initial value, where biases are zero.
    fn saved(config: &Config) -> (tempfile::TempDir, Source, Vec<Vec<f32>>) {
        let folder = tempfile::tempdir().unwrap();
        let mut params = initialise(config, 3);
        let mut rng = stream(4, 0);
        params.iter_mut().flatten().for_each(|p| *p += 0.2 * (rng.random::<f32>() - 0.5));
        write_model(folder.path(), config, None, &params).unwrap();
        let source = Source::open(folder.path()).unwrap();
        (folder, source, params)
    }

    fn loss(config: &Config, params: &[Vec<f32>]) -> f64 {
        let ids = (0..36).map(|i| i * 7 % 40).collect::<Vec<u32>>();
        let targets = ids.iter().map(|&id| (id as i32 + 3) % 40).collect::<Vec<_>>();
        let sequences = Sequences { ids: &ids, n_col: 12, mask: None, first: None };
        Model::new(config, Compute::default()).loss(params, sequences, &targets, Mode::INFERENCE).ce()
    }

    #[test]
    fn an_upcycled_model_computes_what_the_dense_one_does() {
        let (_folder, source, params) = saved(&dense());
        let expected = loss(&dense(), &params);
        for (stride, k) in [(2, 2), (1, 3), (1, 1)] {
            let config = Config {
                n_expert: 4,
                n_expert_used: k,
                moe_stride: stride,
                expert_activation: Activation::GeluTanh,
                use_selection_bias: stride == 1,
                ..dense()
            };
            let plan = source.plan(&config, true).unwrap();
            let upcycled = source.params(&plan, 1, 0.0).unwrap();
            let got = loss(&config, &upcycled);
            assert!((got - expected).abs() <= 1e-5 * expected, "stride {stride}, top-{k}: {got}, expected {expected}");
            let other_gelu = loss(&Config { expert_activation: Activation::GeluErf, ..config.clone() }, &upcycled);
            assert!(other_gelu != got, "the test cannot tell the activations apart");
            let noisy = source.params(&plan, 1, 0.5).unwrap();
            for ((spec, clean), noisy) in tensors(&config).iter().zip(&upcycled).zip(&noisy) {
                assert_eq!(clean != noisy, spec.is_input_major(), "{}", spec.checkpoint);
            }
        }
    }

    #[test]
    fn more_positions_begin_as_in_a_new_model_and_the_rest_is_copied() {
        let (_folder, source, params) = saved(&dense());
        let config = Config { n_ctx: 20, ..dense() };
        let plan = source.plan(&config, false).unwrap();
        assert_eq!(plan.to_string(), format!("{} tensors copied, positions 12 to 19 new", params.len()));
        let (grown, fresh) = (source.params(&plan, 9, 0.0).unwrap(), initialise(&config, 9));
        for (i, spec) in tensors(&config).iter().enumerate() {
            let expected = match spec.part {
                Part::PositionEmbd => [&params[i][..], &fresh[i][12 * 24..]].concat(),
                _ => params[i].clone(),
            };
            assert!(grown[i] == expected, "{}", spec.checkpoint);
        }
    }

    #[test]
    fn what_only_training_needs_comes_and_goes() {
        let base = Config { n_expert: 4, n_expert_used: 2, ..dense() };
        let (_folder, source, params) = saved(&base);
        let config = Config { use_noisy_top_k: false, use_selection_bias: true, ..base.clone() };
        let plan = source.plan(&config, false).unwrap();
        assert!(plan.to_string().ends_with(", 2 new"), "{plan}");
        let got = loss(&config, &source.params(&plan, 1, 0.0).unwrap());
        assert!(got == loss(&base, &params));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let moe = Config { n_expert: 4, n_expert_used: 2, ..dense() };
        let (_dense_folder, from_dense, _) = saved(&dense());
        let (_moe_folder, from_moe, _) = saved(&moe);
        for (source, config, upcycle, parts) in [
            (
                &from_dense,
                moe.clone(),
                false,
                &["`transformer_blocks.0.moe.router.w_g.weight`: missing", "--upcycle"][..],
            ),
            (&from_moe, dense(), false, &["`transformer_blocks.0.moe.layers.0.weight`: missing"]),
            (&from_moe, moe.clone(), true, &["--upcycle", "mixture of experts already"]),
            (&from_dense, dense(), true, &["--upcycle", "num_experts"]),
            (
                &from_dense,
                Config { expert_bias: false, ..moe.clone() },
                true,
                &["`transformer_blocks.0.moe.layers.0.bias`: would be lost"],
            ),
            (&from_dense, Config { n_embd: 48, ..dense() }, false, &["`token_emb.weight`: is [40, 24], and [40, 48]"]),
            (&from_dense, Config { n_ctx: 8, ..dense() }, false, &["`position_emb.weight`: is [12, 24], and [8, 24]"]),
            (&from_dense, Config { n_layer: 5, ..dense() }, false, &["`transformer_blocks.4.norm1.scale`: missing"]),
            (
                &from_dense,
                Config { n_layer: 3, ..dense() },
                false,
                &["`transformer_blocks.3.norm1.scale`: would be lost"],
            ),
            (
                &from_moe,
                Config { n_expert: 5, ..moe.clone() },
                false,
                &["`transformer_blocks.0.moe.router.w_g.weight`: is [4, 24]"],
            ),
            (&from_dense, Config { n_head: 2, ..dense() }, false, &["num_heads", "3 in the checkpoint, 2 here"]),
        ] {
            let error = source.plan(&config, upcycle).err().unwrap().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
    }
}
