//! The whole model on the CPU in f32, forward and backward: the oracle that every other back end is held against.

pub mod activation;
pub mod attention;
mod block;
pub mod buffers;
pub mod dropout;
pub mod embedding;
pub mod experts;
pub mod head;
pub mod linear;
pub mod norm;
pub mod router;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use param_model::{Config, Part, TensorSpec, tensors};
use rand_distr::{Distribution, StandardNormal};

use crate::random::{Key, Site};
use block::{Block, Saved};
use buffers::Buffers;
use dropout::Dropout;
use head::CrossEntropy;
pub use router::{Capacity, Routing};

/// A model's structure: where each parameter stands among the vectors of the tensor table's order.
pub struct Model {
    config: Config,
    table: Vec<TensorSpec>,
    index: HashMap<(Part, Option<usize>), usize>,
    blocks: Vec<Block>,
    buffers: Buffers,
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
fn router_loss_weights(config: &Config) -> (f32, f32) {
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
    blocks: Vec<Saved>,
    x: Vec<f32>, // [n_token, n_embd], output of the last block
    norm: norm::Saved,
    normed: Vec<f32>, // [n_token, n_embd]
}

impl Model {
    /// The model of `config`.
    pub fn new(config: &Config) -> Self {
        let table = tensors(config);
        let index = table.iter().enumerate().map(|(i, t)| ((t.part, t.block), i)).collect();
        let blocks = (0..config.n_layer).map(|i| Block::new(config, i, &index)).collect();
        Self { config: config.clone(), table, index, blocks, buffers: Buffers::default() }
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

    /// Loss over `targets` [n_row, n_col] ([`crate::data::IGNORED`] where none counts), without gradients.
    pub fn loss(&mut self, params: &[Vec<f32>], sequences: Sequences, targets: &[i32], mode: Mode) -> Losses {
        let mut forward = self.forward(params, sequences, mode, false);
        let routings = std::mem::take(&mut forward.blocks).into_iter().filter_map(Saved::into_routing).collect();
        let (token, n_embd) = (self.at(Part::TokenEmbd), self.config.n_embd);
        let cross_entropy =
            head::cross_entropy(&forward.normed, &params[token], targets, n_embd, None, &mut self.buffers);
        self.recycle(forward);
        Losses { cross_entropy, routings }
    }

    /// Logits of position `row * n_col + col` for each of `positions`, [positions.len(), n_vocab].
    pub fn logits(&mut self, params: &[Vec<f32>], sequences: Sequences, positions: &[usize], mode: Mode) -> Vec<f32> {
        let forward = self.forward(params, sequences, mode, false);
        let n_embd = self.config.n_embd;
        let rows = positions.iter().flat_map(|&p| &forward.normed[p * n_embd..][..n_embd]).copied().collect::<Vec<_>>();
        let mut logits = vec![0.0; positions.len() * self.config.n_vocab];
        let head = &params[self.at(Part::TokenEmbd)];
        linear::forward(&mut logits, &rows, head, None, (n_embd, self.config.n_vocab));
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
        let mut dnormed = self.buffers.take(forward.normed.len()); // [n_token, n_embd]
        let gradients =
            head::Gradients { scale: 1.0 / scale.n_target as f32, dx: &mut dnormed, dweight: &mut grads[token] };
        let cross_entropy =
            head::cross_entropy(&forward.normed, &params[token], targets, n_embd, Some(gradients), &mut self.buffers);
        let mut dx = self.buffers.take_zeroed(forward.x.len()); // [n_token, n_embd]
        let (norm_scale, norm_shift) = (self.at(Part::OutputNormScale), self.at(Part::OutputNormShift));
        let [dscale, dshift] = grads.get_disjoint_mut([norm_scale, norm_shift]).expect("two tensors");
        norm::backward(&dnormed, &forward.x, &params[norm_scale], &forward.norm, &mut dx, dscale, dshift);
        self.buffers.give(dnormed);

        let (aux_weight, z_weight) = router_loss_weights(&self.config);
        let share = 1.0 / scale.n_batch as f32;
        let weights = (aux_weight * share, z_weight * share);
        let mut routings = Vec::new();
        for (i, saved) in std::mem::take(&mut forward.blocks).into_iter().enumerate().rev() {
            let pass = block::Pass { config: &self.config, sequences, dropout: mode.dropout, index: i };
            let routing = self.blocks[i].backward(params, grads, saved, &mut dx, weights, pass, &mut self.buffers);
            routings.extend(routing);
        }
        routings.reverse();
        if let Some(dropout) = Dropout::new(self.config.dropout, mode.dropout, 0, Site::Embedding) {
            dropout.apply_all(&mut dx);
        }
        let [dtoken, dposition] = grads.get_disjoint_mut([token, self.at(Part::PositionEmbd)]).expect("two tensors");
        embedding::backward(&dx, sequences.ids, sequences.n_col, dtoken, dposition, n_embd);
        self.buffers.give(dx);
        self.recycle(forward);
        Losses { cross_entropy, routings }
    }

    /// Hidden states after the final norm; what the backward pass needs is kept iff `keep`, routings always.
    fn forward(&mut self, params: &[Vec<f32>], sequences: Sequences, mode: Mode, keep: bool) -> Forward {
        let Self { config, buffers, .. } = self;
        let n_embd = config.n_embd;
        let n_token = sequences.ids.len();
        assert!(sequences.n_col <= config.n_ctx && n_token.is_multiple_of(sequences.n_col));
        let mut x = buffers.take(n_token * n_embd); // [n_token, n_embd]
        let (token, position) = (self.index[&(Part::TokenEmbd, None)], self.index[&(Part::PositionEmbd, None)]);
        embedding::forward(&mut x, sequences.ids, sequences.n_col, &params[token], &params[position], n_embd);
        if let Some(dropout) = Dropout::new(config.dropout, mode.dropout, 0, Site::Embedding) {
            dropout.apply_all(&mut x);
        }
        let mut blocks = Vec::with_capacity(config.n_layer);
        let mut n_moe = 0;
        for (i, block) in self.blocks.iter().enumerate() {
            let normal = match mode.noise {
                NoiseSource::Drawn(key) if config.is_moe(i) => {
                    let mut rng = key.stream(i, Site::Router);
                    Some((0..n_token * config.n_expert).map(|_| StandardNormal.sample(&mut rng)).collect())
                }
                NoiseSource::Given(given) if config.is_moe(i) => Some(given[n_moe].clone()),
                _ => None,
            };
            n_moe += usize::from(config.is_moe(i));
            let pass = block::Pass { config, sequences, dropout: mode.dropout, index: i };
            let (out, mut saved) = block.forward(params, x, normal, mode.capacity, pass, buffers);
            if !keep {
                saved.recycle(buffers);
            }
            blocks.push(saved);
            x = out;
        }
        let mut normed = buffers.take(x.len());
        let (scale, shift) = (self.index[&(Part::OutputNormScale, None)], self.index[&(Part::OutputNormShift, None)]);
        let norm = norm::forward(&mut normed, &x, &params[scale], &params[shift], config.norm_eps);
        Forward { blocks, x, norm, normed }
    }

    fn recycle(&mut self, forward: Forward) {
        self.buffers.give(forward.x);
        self.buffers.give(forward.normed);
    }
}
