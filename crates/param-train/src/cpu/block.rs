//! One pre-norm block, forward and backward: x += drop(MHA(LN1(x))); x += drop(FF(LN2(x))), FF dense or of experts.

use std::collections::HashMap;

use param_kernels::Write;
use param_model::{Config, Part};
use rayon::prelude::*;

use super::buffers::Buffers;
use super::dropout::Dropout;
use super::router::{self, Capacity, Noise, Routing};
use super::{Sequences, activation, attention, experts, linear, norm};
use crate::random::{Key, Site};

/// Where a block's parameters stand among the model's.
pub struct Block {
    norm1: [usize; 2],
    qkv: [Affine; 3],
    attn_out: Affine,
    norm2: [usize; 2],
    ffn: Ffn,
}

/// A weight and its bias.
#[derive(Clone, Copy)]
struct Affine {
    weight: usize,
    bias: Option<usize>,
}

enum Ffn {
    Dense { up: Affine, down: Affine },
    Experts { router: usize, noise: Option<usize>, up: Affine, down: Affine },
}

/// What a block needs to know of the pass it is in.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    pub config: &'a Config,
    pub sequences: Sequences<'a>,
    pub dropout: Option<Key>,
    /// Which block it is.
    pub index: usize,
}

impl Pass<'_> {
    fn dropout(&self, site: Site) -> Option<Dropout> {
        Dropout::new(self.config.dropout, self.dropout, self.index, site)
    }

    fn attention(&self) -> attention::Shape {
        let n_col = self.sequences.n_col;
        attention::Shape {
            n_row: self.sequences.ids.len() / n_col,
            n_col,
            n_head: self.config.n_head,
            head_dim: self.config.head_dim(),
        }
    }

    fn experts(&self) -> experts::Shape {
        let config = self.config;
        experts::Shape { n_embd: config.n_embd, n_ff: config.n_ff(), activation: config.expert_activation }
    }
}

/// Activations that the backward pass needs; all [n_token, n_embd] unless noted.
#[derive(Default)]
pub struct Saved {
    x: Vec<f32>,
    norm1: Option<norm::Saved>,
    normed1: Vec<f32>,
    qkv: [Vec<f32>; 3],
    attended: Vec<f32>,
    middle: Vec<f32>, // after the attention's residual
    norm2: Option<norm::Saved>,
    normed2: Vec<f32>,
    ffn: SavedFfn,
}

#[derive(Default)]
#[allow(clippy::large_enum_variant, reason = "one per block, beside megabytes of activations")]
enum SavedFfn {
    #[default]
    Recycled,
    /// Both [n_token, n_ff].
    Dense {
        pre: Vec<f32>,
        hidden: Vec<f32>,
    },
    Experts {
        routing: Routing,
        noise: Option<Noise>,
        saved: Option<experts::Saved>,
    },
}

impl Saved {
    /// Gives the memory back, but for the routing.
    pub fn recycle(&mut self, buffers: &mut Buffers) {
        let Saved { x, normed1, qkv, attended, middle, normed2, ffn, .. } = self;
        let [q, k, v] = qkv;
        for buffer in [x, normed1, q, k, v, attended, middle, normed2] {
            buffers.give(std::mem::take(buffer));
        }
        match ffn {
            SavedFfn::Recycled => {}
            SavedFfn::Dense { pre, hidden } => {
                buffers.give(std::mem::take(pre));
                buffers.give(std::mem::take(hidden));
            }
            SavedFfn::Experts { saved, .. } => {
                if let Some(saved) = saved.take() {
                    saved.recycle(buffers);
                }
            }
        }
    }

    /// The routing of an MoE block.
    pub fn into_routing(self) -> Option<Routing> {
        match self.ffn {
            SavedFfn::Experts { routing, .. } => Some(routing),
            _ => None,
        }
    }
}

impl Block {
    pub fn new(config: &Config, block: usize, index: &HashMap<(Part, Option<usize>), usize>) -> Self {
        let at = |part| index[&(part, Some(block))];
        let affine = |weight, bias| Affine { weight: at(weight), bias: index.get(&(bias, Some(block))).copied() };
        let ffn = if config.is_moe(block) {
            Ffn::Experts {
                router: at(Part::Router),
                noise: index.get(&(Part::RouterNoise, Some(block))).copied(),
                up: affine(Part::ExpertUp, Part::ExpertUpBias),
                down: affine(Part::ExpertDown, Part::ExpertDownBias),
            }
        } else {
            Ffn::Dense { up: affine(Part::FfnUp, Part::FfnUpBias), down: affine(Part::FfnDown, Part::FfnDownBias) }
        };
        Self {
            norm1: [at(Part::AttnNormScale), at(Part::AttnNormShift)],
            qkv: [
                affine(Part::AttnQ, Part::AttnQBias),
                affine(Part::AttnK, Part::AttnKBias),
                affine(Part::AttnV, Part::AttnVBias),
            ],
            attn_out: affine(Part::AttnOut, Part::AttnOutBias),
            norm2: [at(Part::FfnNormScale), at(Part::FfnNormShift)],
            ffn,
        }
    }

    /// Output of the block and what its backward pass needs. `normal` [n_token, n_expert] are the draws of the router's
    /// noise, if it has any.
    pub fn forward(
        &self,
        params: &[Vec<f32>],
        x: Vec<f32>, // [n_token, n_embd]
        normal: Option<Vec<f32>>,
        capacity: Capacity,
        pass: Pass,
        buffers: &mut Buffers,
    ) -> (Vec<f32>, Saved) {
        let config = pass.config;
        let (n, square) = (x.len(), (config.n_embd, config.n_embd));
        let mut saved = Saved { normed1: buffers.take(n), normed2: buffers.take(n), x, ..Saved::default() };

        let [scale, shift] = self.norm1.map(|i| &params[i][..]);
        saved.norm1 = Some(norm::forward(&mut saved.normed1, &saved.x, scale, shift, config.norm_eps));
        saved.qkv = self.qkv.map(|affine| {
            let mut y = buffers.take(n);
            affine.forward(params, &mut y, &saved.normed1, square);
            y
        });
        saved.attended = buffers.take(n);
        let dropout = pass.dropout(Site::Attention);
        attention::forward(&inputs(&saved.qkv, &pass, dropout.as_ref()), &mut saved.attended);
        saved.middle = buffers.take(n);
        self.attn_out.forward(params, &mut saved.middle, &saved.attended, square);
        drop_and_add(&mut saved.middle, &saved.x, pass.dropout(Site::AttentionOut));

        let [scale, shift] = self.norm2.map(|i| &params[i][..]);
        saved.norm2 = Some(norm::forward(&mut saved.normed2, &saved.middle, scale, shift, config.norm_eps));
        let mut out = buffers.take(n);
        saved.ffn = self.ffn_forward(params, &saved.normed2, &mut out, normal, capacity, pass, buffers);
        drop_and_add(&mut out, &saved.middle, pass.dropout(Site::FfnOut));
        (out, saved)
    }

    fn ffn_forward(
        &self,
        params: &[Vec<f32>],
        x: &[f32],       // [n_token, n_embd]
        out: &mut [f32], // [n_token, n_embd]
        normal: Option<Vec<f32>>,
        capacity: Capacity,
        pass: Pass,
        buffers: &mut Buffers,
    ) -> SavedFfn {
        let config = pass.config;
        let (n_embd, n_ff) = (config.n_embd, config.n_ff());
        match &self.ffn {
            Ffn::Dense { up, down } => {
                let mut pre = buffers.take(x.len() / n_embd * n_ff);
                let mut hidden = buffers.take(pre.len());
                up.forward(params, &mut pre, x, (n_embd, n_ff));
                activation::forward(config.dense_activation, &pre, &mut hidden);
                down.forward(params, out, &hidden, (n_ff, n_embd));
                SavedFfn::Dense { pre, hidden }
            }
            Ffn::Experts { router, noise, up, down } => {
                let n_expert = config.n_expert;
                let mut logits = vec![0.0; x.len() / n_embd * n_expert]; // [n_token, n_expert]
                linear::forward(&mut logits, x, &params[*router], None, (n_embd, n_expert));
                let noise = normal.zip(*noise).map(|(normal, at)| Noise::new(x, &params[at], normal, n_embd, n_expert));
                let routing = router::forward(logits, noise.as_ref(), config.n_expert_used, n_expert, capacity);
                let weights = expert_weights(params, *up, *down);
                let dropout = pass.dropout(Site::Expert);
                let saved = experts::forward(out, x, &weights, &routing, pass.experts(), dropout.as_ref(), buffers);
                SavedFfn::Experts { routing, noise, saved: Some(saved) }
            }
        }
    }

    /// Turns `dx`, the gradient of the block's output, into that of its input, adds to `grads`, and gives back the memory
    /// of `saved`. `router_weights` are the factors of the aux and z losses in the total.
    pub fn backward(
        &self,
        params: &[Vec<f32>],
        grads: &mut [Vec<f32>],
        mut saved: Saved,
        dx: &mut [f32], // [n_token, n_embd]
        router_weights: (f32, f32),
        pass: Pass,
        buffers: &mut Buffers,
    ) -> Option<Routing> {
        let square = (pass.config.n_embd, pass.config.n_embd);
        let mut dbranch = buffers.take(dx.len()); // [n_token, n_embd], of a branch's output
        let mut dnormed = buffers.take(dx.len()); // [n_token, n_embd], of a branch's input

        copy_dropped(&mut dbranch, dx, pass.dropout(Site::FfnOut));
        self.ffn_backward(params, grads, &saved, &dbranch, &mut dnormed, router_weights, pass, buffers);
        self.norm_backward(params, grads, (self.norm2, &saved.norm2), &saved.middle, &dnormed, dx);

        copy_dropped(&mut dbranch, dx, pass.dropout(Site::AttentionOut));
        let mut dattended = buffers.take(dx.len());
        self.attn_out.backward(params, grads, &dbranch, &saved.attended, (&mut dattended, Write::Replace), square);
        let mut dqkv = [(); 3].map(|()| buffers.take(dx.len()));
        let [dq, dk, dv] = &mut dqkv;
        let dropout = pass.dropout(Site::Attention);
        let inputs = inputs(&saved.qkv, &pass, dropout.as_ref());
        attention::backward(&inputs, &saved.attended, &dattended, dq, dk, dv);
        for (i, (affine, dy)) in self.qkv.iter().zip(&dqkv).enumerate() {
            let write = if i == 0 { Write::Replace } else { Write::Add };
            affine.backward(params, grads, dy, &saved.normed1, (&mut dnormed, write), square);
        }
        self.norm_backward(params, grads, (self.norm1, &saved.norm1), &saved.x, &dnormed, dx);

        for buffer in dqkv.into_iter().chain([dbranch, dnormed, dattended]) {
            buffers.give(buffer);
        }
        saved.recycle(buffers);
        saved.into_routing()
    }

    fn norm_backward(
        &self,
        params: &[Vec<f32>],
        grads: &mut [Vec<f32>],
        (at, saved): ([usize; 2], &Option<norm::Saved>),
        x: &[f32],
        dy: &[f32],
        dx: &mut [f32],
    ) {
        let saved = saved.as_ref().expect("set by the forward pass");
        let [dscale, dshift] = grads.get_disjoint_mut(at).expect("scale and shift are two tensors");
        norm::backward(dy, x, &params[at[0]], saved, dx, dscale, dshift);
    }

    fn ffn_backward(
        &self,
        params: &[Vec<f32>],
        grads: &mut [Vec<f32>],
        saved: &Saved,
        dy: &[f32],     // [n_token, n_embd]
        dx: &mut [f32], // [n_token, n_embd], replaced
        (aux_weight, z_weight): (f32, f32),
        pass: Pass,
        buffers: &mut Buffers,
    ) {
        let config = pass.config;
        let (n_embd, n_ff) = (config.n_embd, config.n_ff());
        let x = &saved.normed2;
        match (&self.ffn, &saved.ffn) {
            (Ffn::Dense { up, down }, SavedFfn::Dense { pre, hidden }) => {
                let mut dhidden = buffers.take(hidden.len()); // [n_token, n_ff]
                down.backward(params, grads, dy, hidden, (&mut dhidden, Write::Replace), (n_ff, n_embd));
                activation::backward(config.dense_activation, pre, &mut dhidden);
                up.backward(params, grads, &dhidden, x, (dx, Write::Replace), (n_embd, n_ff));
                buffers.give(dhidden);
            }
            (
                Ffn::Experts { router, noise: noise_weight, up, down },
                SavedFfn::Experts { routing, noise, saved: Some(saved) },
            ) => {
                dx.fill(0.0);
                let dropout = pass.dropout(Site::Expert);
                let dweights = expert_gradients(grads, *up, *down);
                let weights = expert_weights(params, *up, *down);
                let (shape, dropout) = (pass.experts(), dropout.as_ref());
                let drouting = experts::backward(dy, dx, &weights, dweights, saved, routing, shape, dropout, buffers);
                let dlogits = routing.backward(&drouting, aux_weight, z_weight); // [n_token, n_expert]
                let shape = (n_embd, config.n_expert);
                linear::backward(&dlogits, x, &params[*router], (dx, Write::Add), &mut grads[*router], None, shape);
                if let (Some(noise), Some(at)) = (noise, *noise_weight) {
                    let dpre = noise.backward(&dlogits);
                    linear::backward(&dpre, x, &params[at], (dx, Write::Add), &mut grads[at], None, shape);
                }
            }
            _ => unreachable!("a block's activations are of its own kind"),
        }
    }
}

impl Affine {
    fn forward(self, params: &[Vec<f32>], y: &mut [f32], x: &[f32], shape: (usize, usize)) {
        linear::forward(y, x, &params[self.weight], self.bias.map(|b| &params[b][..]), shape);
    }

    fn backward(
        self,
        params: &[Vec<f32>],
        grads: &mut [Vec<f32>],
        dy: &[f32],
        x: &[f32],
        dx: (&mut [f32], Write),
        shape: (usize, usize),
    ) {
        let (dweight, dbias) = self.gradients(grads);
        linear::backward(dy, x, &params[self.weight], dx, dweight, dbias, shape);
    }

    fn gradients(self, grads: &mut [Vec<f32>]) -> (&mut [f32], Option<&mut [f32]>) {
        match self.bias {
            Some(bias) => {
                let [weight, bias] = grads.get_disjoint_mut([self.weight, bias]).expect("two tensors");
                (weight, Some(bias))
            }
            None => (&mut grads[self.weight], None),
        }
    }
}

fn inputs<'a>(qkv: &'a [Vec<f32>; 3], pass: &Pass<'a>, dropout: Option<&'a Dropout>) -> attention::Inputs<'a> {
    let [q, k, v] = qkv;
    attention::Inputs { shape: pass.attention(), q, k, v, mask: pass.sequences.mask, dropout }
}

fn expert_weights(params: &[Vec<f32>], up: Affine, down: Affine) -> experts::Weights<&[f32]> {
    let bias = |affine: Affine| affine.bias.map(|b| &params[b][..]);
    experts::Weights { up: &params[up.weight], up_bias: bias(up), down: &params[down.weight], down_bias: bias(down) }
}

fn expert_gradients(grads: &mut [Vec<f32>], up: Affine, down: Affine) -> experts::Weights<&mut [f32]> {
    // The table lists a weight before its bias and up before down.
    let (first, second) = grads.split_at_mut(down.weight);
    let shifted = Affine { weight: 0, bias: down.bias.map(|b| b - down.weight) };
    let ((up, up_bias), (down, down_bias)) = (up.gradients(first), shifted.gradients(second));
    experts::Weights { up, up_bias, down, down_bias }
}

/// `branch = drop(branch) + x`.
fn drop_and_add(branch: &mut [f32], x: &[f32], dropout: Option<Dropout>) {
    if let Some(dropout) = dropout {
        dropout.apply_all(branch);
    }
    const PART: usize = 1 << 13;
    branch.par_chunks_mut(PART).zip(x.par_chunks(PART)).for_each(|(branch, x)| {
        for (b, x) in branch.iter_mut().zip(x) {
            *b += x;
        }
    });
}

/// `to = drop(from)`.
fn copy_dropped(to: &mut [f32], from: &[f32], dropout: Option<Dropout>) {
    to.copy_from_slice(from);
    if let Some(dropout) = dropout {
        dropout.apply_all(to);
    }
}
