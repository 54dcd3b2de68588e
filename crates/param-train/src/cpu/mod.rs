//! The whole model on the CPU, forward and backward; in f32 the oracle that every other back end is held against.

mod activation;
mod attention;
mod block;
mod buffers;
mod dropout;
mod embedding;
mod experts;
mod head;
mod learner;
mod linear;
mod machine;
mod norm;
mod plan;
mod profile;
mod router;
#[cfg(test)]
pub(crate) mod tests;
mod values;

use std::collections::HashMap;

pub use param_kernels::Precision;
use param_kernels::Team;
use param_model::{Config, Part, TensorSpec, tensors};
use rand_distr::{Distribution, StandardNormal};

use crate::random::{Key, Site};
use crate::settings::Recompute;
use block::{Block, Saved};
use dropout::Dropout;
pub use head::CrossEntropy;
pub use learner::{CpuLearner, CpuModel};
pub use machine::Compute;
use machine::Machine;
pub use plan::{Memory, operations_per_token};
pub use profile::{Profile, Section, Spent};
pub use router::{Capacity, Routing};
use values::Values;

/// A model's structure: where each parameter stands among the vectors of the tensor table's order.
pub struct Model {
    config: Config,
    table: Vec<TensorSpec>,
    index: HashMap<(Part, Option<usize>), usize>,
    blocks: Vec<Block>,
    machine: Machine,
    recompute: Recompute,
}

/// Token sequences of equal length.
#[derive(Clone, Copy)]
pub struct Sequences<'a> {
    /// Token ids, [n_row, n_col].
    pub ids: &'a [u32],
    /// Length of a sequence.
    pub n_col: usize,
    /// Which positions are real and not padding, [n_row, n_col]; all where `None`.
    pub mask: Option<&'a [bool]>,
    /// The first position of its sequence that each sees, at most its own and falling nowhere along a sequence, [n_row, n_col];
    /// 0 where `None`.
    pub first: Option<&'a [u32]>,
}

/// Where the router's standard normal draws come from.
#[derive(Clone, Copy)]
pub enum NoiseSource<'a> {
    /// No noise.
    Off,
    /// Drawn by address.
    Drawn(Key),
    /// Given: one [n_token, n_expert] per MoE block, in order.
    Given(&'a [Vec<f32>]),
}

impl NoiseSource<'_> {
    /// Draws for a block's router [n_token, n_expert], the same ones whenever they are asked for.
    pub(crate) fn normal(&self, config: &Config, block: usize, n_token: usize) -> Option<Vec<f32>> {
        if !config.is_moe(block) {
            return None;
        }
        match self {
            NoiseSource::Off => None,
            NoiseSource::Drawn(key) => {
                let mut rng = key.stream(block, Site::Router);
                Some((0..n_token * config.n_expert).map(|_| StandardNormal.sample(&mut rng)).collect())
            }
            NoiseSource::Given(given) => {
                let n_before = config.moe_blocks().take_while(|&i| i < block).count();
                Some(given[n_before].clone())
            }
        }
    }
}

/// How a forward pass treats its tokens.
#[derive(Clone, Copy)]
pub struct Mode<'a> {
    /// Drops activations by this key at the config's rate; none where `None`.
    pub dropout: Option<Key>,
    /// Tokens an expert takes.
    pub capacity: Capacity,
    /// The router's noise.
    pub noise: NoiseSource<'a>,
}

impl Mode<'static> {
    /// Deterministic inference: no dropout, no noise, no dropped tokens.
    pub const INFERENCE: Self = Mode { dropout: None, capacity: Capacity::Unlimited, noise: NoiseSource::Off };
}

/// The parts of a loss over one batch.
#[derive(Clone, Debug, Default)]
pub struct Losses {
    /// Cross-entropy of the next token.
    pub cross_entropy: CrossEntropy,
    /// The routing of each MoE block, in order, with its unweighted losses.
    pub routings: Vec<Routing>,
}

impl Losses {
    /// Mean cross-entropy per target, nats.
    pub fn ce(&self) -> f64 {
        self.cross_entropy.sum / self.cross_entropy.n_target as f64
    }

    /// Load-balancing loss summed over blocks, unweighted.
    pub fn aux(&self) -> f64 {
        self.routings.iter().map(|r| r.aux).sum()
    }

    /// Router z loss summed over blocks, unweighted.
    pub fn z(&self) -> f64 {
        self.routings.iter().map(|r| r.z).sum()
    }

    /// The training loss: cross-entropy plus the weighted router losses.
    pub fn total(&self, config: &Config) -> f64 {
        let (aux_weight, z_weight) = router_loss_weights(config);
        self.ce() + f64::from(aux_weight) * self.aux() + f64::from(z_weight) * self.z()
    }
}

/// Weights in force of the load-balancing and z losses: in the reference the first's switch gates both.
pub(crate) fn router_loss_weights(config: &Config) -> (f32, f32) {
    let on = |flag: bool, weight: f32| if flag { weight } else { 0.0 };
    let z = on(config.use_router_z_loss, config.router_z_loss_weight);
    (on(config.use_aux_loss, config.aux_loss_weight), on(config.use_aux_loss, z))
}

/// How a batch counts in the gradients.
#[derive(Clone, Copy)]
pub struct GradientScale {
    /// Targets over all batches whose gradients are added up.
    pub n_target: usize,
    /// Number of those batches.
    pub n_batch: usize,
}

/// A forward pass up to the final norm.
struct Forward {
    /// The inputs of all blocks, and the output of the last, where a backward pass follows; else only that: [n_token, n_embd] each.
    xs: Vec<Vec<f32>>,
    /// Where a backward pass follows: of each block, or none where it will be computed again.
    saved: Vec<Option<Saved>>,
    routings: Vec<Option<Routing>>, // [n_layer]
    norm: norm::Saved,
    normed: Values, // [n_token, n_embd]
}

impl Model {
    /// The model of `config`, computed as `compute` says.
    pub fn new(config: &Config, compute: Compute) -> Self {
        let table = tensors(config);
        let index = table.iter().enumerate().map(|(i, t)| ((t.part, t.block), i)).collect();
        let blocks = (0..config.n_layer).map(|i| Block::new(config, i, &index)).collect();
        let machine = Machine::new(compute);
        Self { config: config.clone(), table, index, blocks, machine, recompute: compute.recompute }
    }

    /// Its hyperparameters.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Its tensors; parameters and gradients are vectors in this order.
    pub fn table(&self) -> &[TensorSpec] {
        &self.table
    }

    /// Zeros in the shape of the parameters.
    pub fn zeros(&self) -> Vec<Vec<f32>> {
        self.table.iter().map(|t| vec![0.0; t.n_elements()]).collect()
    }

    fn at(&self, part: Part) -> usize {
        self.index[&(part, None)]
    }

    /// Its tensors, and the threads it is computed with.
    pub fn table_and_team(&mut self) -> (&[TensorSpec], &mut Team) {
        (&self.table, &mut self.machine.team)
    }

    /// Where the time went.
    pub fn profile(&mut self) -> &mut Profile {
        &mut self.machine.profile
    }

    /// Loss over `targets` [n_row, n_col] ([`crate::data::IGNORED`] where none counts), without gradients.
    pub fn loss(&mut self, params: &[Vec<f32>], sequences: Sequences, targets: &[i32], mode: Mode) -> Losses {
        let forward = self.forward(params, sequences, mode, false);
        let token = self.at(Part::TokenEmbd);
        self.machine.profile.enter(Section::Head);
        let cross_entropy = head::cross_entropy(&mut self.machine, &forward.normed, &params[token], targets, None);
        let routings = self.recycle(forward);
        Losses { cross_entropy, routings }
    }

    /// Logits of position `row * n_col + col` for each of `positions`, [positions.len(), n_vocab].
    pub fn logits(&mut self, params: &[Vec<f32>], sequences: Sequences, positions: &[usize], mode: Mode) -> Vec<f32> {
        let forward = self.forward(params, sequences, mode, false);
        let mut logits = vec![0.0; positions.len() * self.config.n_vocab];
        let weight = &params[self.at(Part::TokenEmbd)];
        let positions = positions.iter().map(|&p| p as u32).collect::<Vec<_>>();
        let x = forward.normed.matrix().gathered(&positions);
        self.machine.profile.enter(Section::Head);
        head::logits(&mut self.machine, &mut logits, x, weight, self.config.n_embd);
        self.recycle(forward);
        logits
    }

    /// Loss, and its gradients added to `grads`, each scaled by its share of the batches in `scale`.
    pub fn loss_and_gradients(
        &mut self,
        params: &[Vec<f32>],
        grads: &mut [Vec<f32>],
        sequences: Sequences,
        targets: &[i32],
        mode: Mode,
        scale: GradientScale,
    ) -> Losses {
        let mut forward = self.forward(params, sequences, mode, true);
        let (token, n_embd) = (self.at(Part::TokenEmbd), self.config.n_embd);
        let (norm_scale, norm_shift) = (self.at(Part::OutputNormScale), self.at(Part::OutputNormShift));
        let position = self.at(Part::PositionEmbd);
        let Self { config, blocks, machine, recompute, .. } = self;
        machine.profile.enter(Section::Head);
        let x = forward.xs.pop().expect("the last block's output"); // [n_token, n_embd]
        let mut dnormed = machine.buffers.take(x.len()); // [n_token, n_embd]
        let gradients =
            head::Gradients { scale: 1.0 / scale.n_target as f32, dx: &mut dnormed, dweight: &mut grads[token] };
        let cross_entropy = head::cross_entropy(machine, &forward.normed, &params[token], targets, Some(gradients));
        machine.profile.enter(Section::Norm);
        let mut dx = machine.buffers.take(x.len()); // [n_token, n_embd]
        dx.fill(0.0);
        let [dscale, dshift] = grads.get_disjoint_mut([norm_scale, norm_shift]).expect("two tensors");
        norm::backward(machine, &dnormed, &x, &params[norm_scale], &forward.norm, &mut dx, (dscale, dshift));
        machine.buffers.give(dnormed);
        machine.buffers.give(x);

        let (aux_weight, z_weight) = router_loss_weights(config);
        let share = 1.0 / scale.n_batch as f32;
        let weights = (aux_weight * share, z_weight * share);
        for index in (0..blocks.len()).rev() {
            let pass = block::Pass { config, sequences, dropout: mode.dropout, index };
            let x = forward.xs.pop().expect("an input of every block");
            let saved = forward.saved.pop().expect("an entry of every block");
            let normal = match recompute {
                Recompute::Nothing => None,
                Recompute::FeedForward | Recompute::Blocks => mode.noise.normal(config, index, sequences.ids.len()),
            };
            let choice = block::Choice { normal, capacity: mode.capacity };
            let routing = forward.routings[index].as_ref();
            blocks[index].backward(machine, params, grads, &x, saved, choice, routing, &mut dx, weights, pass);
            machine.buffers.give(x);
        }
        machine.profile.enter(Section::Embedding);
        if let Some(dropout) = Dropout::new(config.dropout, mode.dropout, 0, Site::Embedding) {
            dropout.apply_all(machine, &mut dx);
        }
        let [dtoken, dposition] = grads.get_disjoint_mut([token, position]).expect("two tensors");
        embedding::backward(machine, &dx, sequences.ids, sequences.n_col, dtoken, dposition, n_embd);
        machine.buffers.give(dx);
        let routings = self.recycle(forward);
        Losses { cross_entropy, routings }
    }

    /// Hidden states after the final norm; what the backward pass needs is kept iff `keep`, routings always.
    fn forward(&mut self, params: &[Vec<f32>], sequences: Sequences, mode: Mode, keep: bool) -> Forward {
        let (token, position) = (self.at(Part::TokenEmbd), self.at(Part::PositionEmbd));
        let output_norm = [Part::OutputNormScale, Part::OutputNormShift].map(|part| &params[self.at(part)][..]);
        let Self { config, machine, recompute, .. } = self;
        let n_embd = config.n_embd;
        let n_token = sequences.ids.len();
        assert!(sequences.n_col <= config.n_ctx && n_token.is_multiple_of(sequences.n_col));
        machine.profile.enter(Section::Embedding);
        let mut x = machine.buffers.take(n_token * n_embd); // [n_token, n_embd]
        embedding::forward(machine, &mut x, sequences.ids, sequences.n_col, &params[token], &params[position], n_embd);
        if let Some(dropout) = Dropout::new(config.dropout, mode.dropout, 0, Site::Embedding) {
            dropout.apply_all(machine, &mut x);
        }
        let (mut xs, mut all_saved, mut routings) = (Vec::new(), Vec::new(), Vec::new());
        for (index, block) in self.blocks.iter().enumerate() {
            let choice = block::Choice { normal: mode.noise.normal(config, index, n_token), capacity: mode.capacity };
            let pass = block::Pass { config, sequences, dropout: mode.dropout, index };
            let mut out = machine.buffers.take(x.len());
            let block::Forward { mut saved, routing } = block.forward(machine, params, &x, choice, pass, &mut out);
            let input = std::mem::replace(&mut x, out);
            let kept = match *recompute {
                Recompute::Nothing if keep => Some(saved),
                Recompute::FeedForward if keep => {
                    saved.give_feed_forward(&mut machine.buffers);
                    Some(saved)
                }
                _ => {
                    saved.give(&mut machine.buffers);
                    None
                }
            };
            if keep {
                xs.push(input);
                all_saved.push(kept);
            } else {
                machine.buffers.give(input);
            }
            routings.push(routing);
        }
        machine.profile.enter(Section::Norm);
        let mut normed = Values::take(&mut machine.buffers, machine.precision, n_token, n_embd);
        let affine = (output_norm[0], output_norm[1]);
        let norm = norm::forward(machine, &mut normed, &x, affine, config.norm_eps);
        xs.push(x);
        machine.profile.enter(Section::Other);
        Forward { xs, saved: all_saved, routings, norm, normed }
    }

    /// Gives back a pass' memory, but for the routings of its MoE blocks.
    fn recycle(&mut self, forward: Forward) -> Vec<Routing> {
        forward.normed.give(&mut self.machine.buffers);
        forward.xs.into_iter().for_each(|x| self.machine.buffers.give(x));
        self.machine.profile.enter(Section::Other);
        forward.routings.into_iter().flatten().collect()
    }
}
