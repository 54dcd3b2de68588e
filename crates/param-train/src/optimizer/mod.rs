//! One step over all parameters: AdamW, or Muon for the matrices of blocks; learning rates and decay by tensor; gradient clipping.

mod adamw;
mod muon;

use param_kernels::{AdamWStep, Kernels, Team};
use param_model::{Role, TensorSpec};
use regex::Regex;

use crate::error::Error;
use crate::settings::Settings;

pub use adamw::{AdamW, Decay};
pub(crate) use muon::polynomials;
pub use muon::{Muon, Scratch as MuonScratch};

/// Elements per task: fixed, so that sums do not depend on the number of threads.
const PART: usize = 1 << 14;

/// What the optimizer does with one tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    /// Whether Muon moves it, with AdamW's second moment not kept; else AdamW.
    pub is_muons: bool,
    /// Factor of its learning rate.
    pub lr_scale: f32,
    /// Whether weight decay pulls it towards zero.
    pub decays: bool,
    /// Whether it stays as it is.
    pub is_frozen: bool,
}

/// A tensor as Muon takes it: a matrix, or a stack of them.
fn is_muons(spec: &TensorSpec) -> bool {
    // The router's few rows, embeddings and the head learn better by AdamW (Jordan et al. 2024).
    matches!(spec.role, Role::Attention | Role::FeedForward | Role::Expert)
}

impl Group {
    /// Of every tensor, as `settings` have it.
    ///
    /// # Errors
    /// A pattern that is no regular expression, or that no tensor's name matches; nothing left to train.
    pub fn all(table: &[TensorSpec], settings: &Settings) -> Result<Vec<Self>, Error> {
        let mut groups = table
            .iter()
            .map(|spec| Self {
                is_muons: settings.muon.is_some() && is_muons(spec),
                lr_scale: 1.0,
                decays: settings.adamw.decay == Decay::All || !matches!(spec.role, Role::Norm | Role::Bias),
                is_frozen: false,
            })
            .collect::<Vec<_>>();
        for (pattern, factor) in &settings.lr_scale {
            matching(table, "lr-scale", pattern)?.into_iter().for_each(|i| groups[i].lr_scale = *factor);
        }
        for pattern in &settings.no_decay {
            matching(table, "no-decay", pattern)?.into_iter().for_each(|i| groups[i].decays = false);
        }
        for pattern in &settings.freeze {
            matching(table, "freeze", pattern)?.into_iter().for_each(|i| groups[i].is_frozen = true);
        }
        if groups.iter().all(|group| group.is_frozen) {
            return Err(Error::Setting { flag: "freeze", problem: "nothing is left to train".to_owned() });
        }
        Ok(groups)
    }
}

/// The tensors whose checkpoint names `pattern` matches somewhere.
///
/// # Errors
/// As for [`Group::all`], naming the flag.
fn matching(table: &[TensorSpec], flag: &'static str, pattern: &str) -> Result<Vec<usize>, Error> {
    let fail = |problem: String| Error::Setting { flag, problem };
    let regex = Regex::new(pattern).map_err(|e| fail(format!("`{pattern}` is no regular expression: {e}")))?;
    let found = (0..table.len()).filter(|&i| regex.is_match(&table[i].checkpoint)).collect::<Vec<_>>();
    if found.is_empty() {
        let some = table.iter().step_by(table.len().div_ceil(4).max(1)).map(|spec| format!("`{}`", spec.checkpoint));
        let some = some.collect::<Vec<_>>().join(", ");
        return Err(fail(format!("no tensor's name matches `{pattern}`; names are such as {some}")));
    }
    Ok(found)
}

/// First and second moments, in the tensor table's order.
#[derive(Clone, Debug)]
pub struct Moments {
    /// Running mean of the gradients; of Muon's tensors, their running sum.
    pub first: Vec<Vec<f32>>,
    /// Running mean of their squares; of Muon's tensors, nothing.
    pub second: Vec<Vec<f32>>,
}

impl Moments {
    /// Before the first step.
    pub fn zeros(table: &[TensorSpec], groups: &[Group]) -> Self {
        let zeros = |n: usize| vec![0.0; n];
        let second = |(spec, group): (&TensorSpec, &Group)| zeros(if group.is_muons { 0 } else { spec.n_elements() });
        Self {
            first: table.iter().map(|spec| zeros(spec.n_elements())).collect(),
            second: table.iter().zip(groups).map(second).collect(),
        }
    }
}

/// A step's numbers.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Its number, from 1.
    pub number: u64,
    /// Learning rate.
    pub lr: f32,
    /// Muon's.
    pub muon_lr: f32,
    /// What gradients are multiplied by as they are read: clipping.
    pub grad_scale: f32,
}

/// A stretch of a tensor that one task moves.
struct Task<'a> {
    p: &'a mut [f32],
    g: &'a mut [f32],
    first: &'a mut [f32],
    second: &'a mut [f32],
    how: How,
}

#[derive(Clone, Copy)]
enum How {
    AdamW(AdamWStep),
    Muon { muon: Muon, shape: (usize, usize), lr: f32, keep: f32 },
}

/// One step of all parameters that gradients train and that are not frozen. Their gradients become zero.
pub fn step(
    team: &mut Team,
    scratch: &mut Vec<MuonScratch>,
    (table, groups): (&[TensorSpec], &[Group]),
    params: &mut [Vec<f32>],
    grads: &mut [Vec<f32>],
    moments: &mut Moments,
    settings: &Settings,
    at: Step,
) {
    let kernels = Kernels::get();
    let Moments { first, second } = moments;
    let mut tasks = Vec::new();
    let tensors = params.iter_mut().zip(grads).zip(first.iter_mut().zip(second));
    for ((spec, group), ((p, g), (first, second))) in table.iter().zip(groups).zip(tensors) {
        if group.is_frozen || !spec.has_gradient() {
            continue;
        }
        let decay = if group.decays { settings.adamw.weight_decay } else { 0.0 };
        let lr = group.lr_scale * if group.is_muons { at.muon_lr } else { at.lr };
        let keep = 1.0 - lr * decay;
        match settings.muon.filter(|_| group.is_muons) {
            Some(muon) => {
                let &[.., n_row, n_col] = &spec.shape[..] else { unreachable!("Muon's tensors are matrices") };
                let how = How::Muon { muon, shape: (n_row, n_col), lr, keep };
                let parts = p.chunks_mut(n_row * n_col).zip(g.chunks_mut(n_row * n_col));
                let parts = parts.zip(first.chunks_mut(n_row * n_col));
                tasks.extend(parts.map(|((p, g), first)| Task { p, g, first, second: &mut [], how }));
            }
            None => {
                let how = How::AdamW(settings.adamw.at(lr, at.number, at.grad_scale, keep));
                let parts = p.chunks_mut(PART).zip(g.chunks_mut(PART));
                let parts = parts.zip(first.chunks_mut(PART).zip(second.chunks_mut(PART)));
                tasks.extend(parts.map(|((p, g), (first, second))| Task { p, g, first, second, how }));
            }
        }
    }
    // The longest first, so that no thread is left with one at the end: a matrix is one task.
    tasks.sort_by_key(|task| std::cmp::Reverse(task.p.len()));
    let starts = (0..=tasks.len()).collect::<Vec<_>>();
    scratch.resize_with(team.n_thread(), MuonScratch::default);
    team.for_each_tile(scratch, &mut tasks, 1, &starts, 1, |scratch, mut tile| {
        let row = tile.rows().start;
        for Task { p, g, first, second, how } in tile.row_mut(row) {
            match how {
                How::AdamW(step) => kernels.adamw(p, g, first, second, step),
                How::Muon { muon, shape, lr, keep } => {
                    muon.step(scratch, (p, g, first), *shape, (*lr, at.grad_scale, *keep));
                }
            }
        }
    });
}

/// Euclidean norm of all gradients together.
pub fn global_norm(team: &mut Team, grads: &[Vec<f32>]) -> f64 {
    let kernels = Kernels::get();
    let parts = grads.iter().flat_map(|g| g.chunks(PART)).collect::<Vec<_>>();
    let mut squares = vec![0.0; parts.len()];
    team.for_each_chunk(&mut squares, 1, |i, square| square[0] = kernels.sum_of_squares(parts[i]));
    squares.iter().sum::<f64>().sqrt()
}

/// Factor that brings gradients of that norm within `max_norm`, as PyTorch's `clip_grad_norm_` computes it.
pub fn clip_factor(norm: f64, max_norm: f32) -> f32 {
    (f64::from(max_norm) / (norm + 1e-6)).min(1.0) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::init::initialise;
    use crate::recipe::Recipe;
    use param_model::{Config, tensors};

    /// What a step of 1e-2 makes of a small model's parameters, all gradients being 1: their table, before, after.
    fn step_of(settings: &Settings, config: &Config) -> (Vec<TensorSpec>, Vec<Vec<f32>>, Vec<Vec<f32>>) {
        let table = tensors(config);
        let groups = Group::all(&table, settings).unwrap();
        let before = initialise(config, 1);
        let mut params = before.clone();
        let mut grads = before.iter().map(|p| vec![1.0; p.len()]).collect::<Vec<_>>();
        let mut moments = Moments::zeros(&table, &groups);
        let at = Step { number: 1, lr: 1e-2, muon_lr: 1e-2, grad_scale: 1.0 };
        let (team, scratch) = (&mut Team::new(2), &mut Vec::new());
        step(team, scratch, (&table, &groups), &mut params, &mut grads, &mut moments, settings, at);
        assert!(grads.iter().flatten().all(|g| *g == 0.0));
        (table, before, params)
    }

    #[test]
    fn rates_and_decay_are_those_of_the_patterns_that_match() {
        let config = Config::preset("param-tiny").unwrap();
        let base = Recipe::AdamW.settings(&config, 10);
        let settings = Settings {
            lr_scale: vec![("experts".to_owned(), 2.0), ("c_fc".to_owned(), 0.0)],
            no_decay: vec!["token_emb".to_owned()],
            ..base
        };
        let (table, before, after) = step_of(&settings, &config);
        for (spec, (before, after)) in table.iter().zip(before.iter().zip(&after)) {
            let name = &spec.checkpoint;
            // The first step of AdamW is the learning rate, whatever the gradient.
            let lr = match () {
                () if name.contains("c_fc") => 0.0,
                () if name.contains("experts") => 2e-2,
                () => 1e-2,
            };
            let decays = !matches!(spec.role, Role::Norm | Role::Bias) && !name.contains("token_emb");
            let decay = if decays { settings.adamw.weight_decay } else { 0.0 };
            for (before, after) in before.iter().zip(after) {
                let want = before * (1.0 - lr * decay) - lr;
                assert!((after - want).abs() <= 1e-6, "{name}: {after}, expected {want}");
            }
        }
    }

    #[test]
    fn muon_moves_the_matrices_of_blocks_and_nothing_else() {
        let config = Config::preset("param-tiny").unwrap();
        let [adamw, muon] = [Recipe::AdamW, Recipe::Recommended].map(|r| step_of(&r.settings(&config, 10), &config));
        for (i, spec) in muon.0.iter().enumerate() {
            let is_block_matrix = matches!(spec.role, Role::Attention | Role::FeedForward | Role::Expert);
            assert_eq!(adamw.2[i] != muon.2[i], is_block_matrix, "{}", spec.checkpoint);
        }
    }

    #[test]
    fn patterns_that_match_nothing_are_refused_by_name() {
        let config = Config::preset("param-tiny").unwrap();
        let base = Recipe::Recommended.settings(&config, 10);
        for (settings, flag) in [
            (Settings { lr_scale: vec![("no such".to_owned(), 1.0)], ..base.clone() }, "--lr-scale"),
            (Settings { no_decay: vec!["(".to_owned()], ..base.clone() }, "--no-decay"),
        ] {
            let error = Group::all(&tensors(&config), &settings).unwrap_err().to_string();
            assert!(error.starts_with(flag), "{error}");
        }
    }
}
