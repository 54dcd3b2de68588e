//! One pre-norm block, forward and backward: x += drop(MHA(LN1(x))); x += drop(FF(LN2(x))), FF dense or of experts.

use std::collections::HashMap;

use param_kernels::{Kernels, Matrix, Product};
use param_model::{Config, Part};

use super::buffers::Buffers;
use super::dropout::Dropout;
use super::linear::Write;
use super::machine::{Machine, ROWS};
use super::profile::Section;
use super::router::{self, Capacity, Noise, Routing, Scorer};
use super::values::Values;
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
    Experts { router: usize, noise: Option<usize>, selection_bias: Option<usize>, up: Affine, down: Affine },
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

/// Activations that the backward pass needs, besides the block's input; [n_token, n_embd] unless noted.
pub struct Saved {
    norm1: norm::Saved,
    qkv: [Values; 3],
    attended: Values,
    middle: Vec<f32>, // after the attention's residual
    /// Of the feed-forward half; nothing where it will be computed again.
    ffn: Option<(norm::Saved, SavedFfn)>,
}

enum SavedFfn {
    /// Before the nonlinearity, [n_token, n_ff].
    Dense(Values),
    Experts(experts::Saved, Option<Noise>),
}

impl Saved {
    /// Gives the memory back.
    pub fn give(mut self, buffers: &mut Buffers) {
        self.give_feed_forward(buffers);
        let Saved { qkv, attended, middle, .. } = self;
        qkv.into_iter().chain([attended]).for_each(|values| values.give(buffers));
        buffers.give(middle);
    }

    /// Gives back what is of the feed-forward half: [`Block::backward`] computes it again.
    pub fn give_feed_forward(&mut self, buffers: &mut Buffers) {
        match self.ffn.take() {
            Some((_, SavedFfn::Dense(pre))) => pre.give(buffers),
            Some((_, SavedFfn::Experts(experts::Saved { pre, y }, _))) => {
                pre.give(buffers);
                y.give(buffers);
            }
            None => {}
        }
    }
}

/// What a block's forward pass leaves.
pub struct Forward {
    /// For the backward pass.
    pub saved: Saved,
    /// Of an MoE block.
    pub routing: Option<Routing>,
}

/// What routers need to know of a pass.
pub struct Choice {
    /// Draws of the router's noise [n_token, n_expert], if it has any.
    pub normal: Option<Vec<f32>>,
    /// Tokens that an expert takes.
    pub capacity: Capacity,
}

impl Block {
    pub fn new(config: &Config, block: usize, index: &HashMap<(Part, Option<usize>), usize>) -> Self {
        let at = |part| index[&(part, Some(block))];
        let affine = |weight, bias| Affine { weight: at(weight), bias: index.get(&(bias, Some(block))).copied() };
        let ffn = if config.is_moe(block) {
            Ffn::Experts {
                router: at(Part::Router),
                noise: index.get(&(Part::RouterNoise, Some(block))).copied(),
                selection_bias: index.get(&(Part::SelectionBias, Some(block))).copied(),
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

    /// The whole block, its output to `out` [n_token, n_embd].
    pub fn forward(
        &self,
        machine: &mut Machine,
        params: &[Vec<f32>],
        x: &[f32], // [n_token, n_embd]
        choice: Choice,
        pass: Pass,
        out: &mut [f32],
    ) -> Forward {
        let mut saved = self.attention(machine, params, x, pass);
        let (ffn, routing) = self.feed_forward(machine, params, &saved.middle, choice, pass, Some(out));
        saved.ffn = Some(ffn);
        Forward { saved, routing }
    }

    /// The attention half.
    fn attention(&self, machine: &mut Machine, params: &[Vec<f32>], x: &[f32], pass: Pass) -> Saved {
        let config = pass.config;
        let n_embd = config.n_embd;
        let n_token = x.len() / n_embd;
        let take = |machine: &mut Machine| Values::take(&mut machine.buffers, machine.precision, n_token, n_embd);
        let mut normed = take(machine);

        machine.profile.enter(Section::Norm);
        let affine1 = affine(params, self.norm1);
        let norm1 = norm::forward(machine, &mut normed, x, affine1, config.norm_eps);
        machine.profile.enter(Section::Projections);
        let qkv = self.qkv.map(|affine| {
            let mut y = take(machine);
            affine.forward(machine, params, &mut y, normed.matrix(), n_embd);
            y
        });
        machine.profile.enter(Section::Attention);
        let mut attended = take(machine);
        let dropout = pass.dropout(Site::Attention);
        attention::forward(machine, &inputs(&qkv, &pass, dropout.as_ref()), &mut attended);
        machine.profile.enter(Section::Projections);
        let mut middle = machine.buffers.take(x.len());
        let dropout = pass.dropout(Site::AttentionOut);
        self.attn_out.forward_residual(machine, params, &mut middle, x, attended.matrix(), n_embd, dropout.as_ref());
        normed.give(&mut machine.buffers);
        Saved { norm1, qkv, attended, middle, ffn: None }
    }

    /// The feed-forward half after `middle` [n_token, n_embd], its output to `out` if anyone wants it.
    fn feed_forward(
        &self,
        machine: &mut Machine,
        params: &[Vec<f32>],
        middle: &[f32],
        choice: Choice,
        pass: Pass,
        out: Option<&mut [f32]>,
    ) -> ((norm::Saved, SavedFfn), Option<Routing>) {
        let config = pass.config;
        let n_embd = config.n_embd;
        let n_token = middle.len() / n_embd;
        let mut normed = Values::take(&mut machine.buffers, machine.precision, n_token, n_embd);
        machine.profile.enter(Section::Norm);
        let affine2 = affine(params, self.norm2);
        let dropout = pass.dropout(Site::FfnOut);
        let (norm2, ffn, routing);
        match &self.ffn {
            Ffn::Dense { up, down } => {
                norm2 = norm::forward(machine, &mut normed, middle, affine2, config.norm_eps);
                machine.profile.enter(Section::Dense);
                let n_ff = config.n_ff();
                let [mut pre, mut hidden] =
                    [(); 2].map(|()| Values::take(&mut machine.buffers, machine.precision, n_token, n_ff));
                up.forward_activated(machine, params, [&mut pre, &mut hidden], normed.matrix(), config);
                if let Some(out) = out {
                    down.forward_residual(machine, params, out, middle, hidden.matrix(), n_ff, dropout.as_ref());
                }
                hidden.give(&mut machine.buffers);
                (ffn, routing) = (SavedFfn::Dense(pre), None);
            }
            Ffn::Experts { router, noise, selection_bias, up, down } => {
                let Choice { normal, capacity } = choice;
                let (n_expert, k) = (config.n_expert, config.n_expert_used);
                let scorer =
                    Scorer { weight: &params[*router], noise: normal.as_ref().and(*noise).map(|at| &params[at][..]) };
                let n_score = scorer.n_score() * n_expert;
                let mut scores = vec![0.0; n_token * n_score];
                let more = (&mut scores[..], n_score);
                norm2 =
                    norm::forward_with(machine, &mut normed, middle, affine2, config.norm_eps, more, |x, scores| {
                        scorer.score(x, n_embd, scores);
                    });
                machine.profile.enter(Section::Router);
                let (logits, drawn) = router::split(scores, normal.filter(|_| noise.is_some()), n_expert);
                let bias = selection_bias.map(|at| &params[at][..]);
                let chosen = router::forward(machine, logits, drawn.as_ref(), bias, (k, n_expert), capacity);
                machine.profile.enter(Section::Experts);
                let weights = expert_weights(params, *up, *down);
                let of_expert = pass.dropout(Site::Expert);
                let dropouts = (of_expert.as_ref(), dropout.as_ref());
                let mut out = out;
                if let Some(out) = &mut out {
                    out.copy_from_slice(middle);
                }
                let saved = experts::forward(machine, out, &normed, &weights, &chosen, pass.experts(), dropouts);
                (ffn, routing) = (SavedFfn::Experts(saved, drawn), Some(chosen));
            }
        }
        normed.give(&mut machine.buffers);
        machine.profile.enter(Section::Other);
        ((norm2, ffn), routing)
    }

    /// Turns `dx`, the gradient of the block's output, into that of its input `x`, adds to `grads`, and gives back the memory of
    /// `saved`, or of what is computed again in its place. `router_weights` are the factors of the aux and z losses in the total.
    pub fn backward(
        &self,
        machine: &mut Machine,
        params: &[Vec<f32>],
        grads: &mut [Vec<f32>],
        x: &[f32], // [n_token, n_embd]
        saved: Option<Saved>,
        choice: Choice,
        routing: Option<&Routing>,
        dx: &mut [f32], // [n_token, n_embd]
        router_weights: (f32, f32),
        pass: Pass,
    ) {
        let config = pass.config;
        let n_embd = config.n_embd;
        let n_token = x.len() / n_embd;
        let saved = saved.unwrap_or_else(|| self.attention(machine, params, x, pass));
        let Saved { norm1, qkv, attended, middle, ffn } = saved;
        let (norm2, ffn) = ffn.unwrap_or_else(|| self.feed_forward(machine, params, &middle, choice, pass, None).0);
        let take = |machine: &mut Machine| Values::take(&mut machine.buffers, machine.precision, n_token, n_embd);
        let mut dnormed = machine.buffers.take(dx.len()); // [n_token, n_embd], of a branch's input
        let mut normed = take(machine);

        // The normed rows were not kept: one more pass over them costs less than their memory.
        let affine2 = affine(params, self.norm2);
        machine.profile.enter(Section::Norm);
        norm::forward(machine, &mut normed, &middle, affine2, config.norm_eps);
        match (&self.ffn, ffn) {
            (Ffn::Dense { up, down }, SavedFfn::Dense(pre)) => {
                machine.profile.enter(Section::Dense);
                let dy = dropped(machine, dx, n_embd, pass.dropout(Site::FfnOut));
                let (activation, n_ff) = (config.dense_activation, config.n_ff());
                let [mut dpre, mut hidden] =
                    [(); 2].map(|()| Values::take(&mut machine.buffers, machine.precision, n_token, n_ff));
                let weight = Matrix::f32(&params[down.weight], n_embd, n_ff);
                let product = Product::new(machine.precision, dy.matrix().factor(), weight.factor());
                let outs = [&mut dpre.words[..], &mut hidden.words[..]];
                let shape = (n_ff, machine.precision.per_word());
                machine.multiply(
                    outs,
                    shape,
                    &[0, n_token],
                    |_| product,
                    |[dpre, hidden], row, cols, sums| {
                        activation::backward(activation, &pre, row, cols, sums, (dpre, hidden));
                    },
                );
                down.backward_parameters(machine, grads, &dy, hidden.matrix(), n_ff);
                let weight = Matrix::f32(&params[up.weight], n_ff, n_embd);
                linear::backward_input(machine, &mut dnormed, Write::Replace, dpre.matrix(), weight, n_embd);
                up.backward_parameters(machine, grads, &dpre, normed.matrix(), n_embd);
                [dy, dpre, hidden, pre].into_iter().for_each(|values| values.give(&mut machine.buffers));
            }
            (Ffn::Experts { router, noise: noise_weight, up, down, .. }, SavedFfn::Experts(saved, noise)) => {
                machine.profile.enter(Section::Experts);
                let routing = routing.expect("an MoE block was routed");
                let mut dout = machine.buffers.take(dx.len()); // [n_token, n_embd]
                dout.copy_from_slice(dx);
                if let Some(dropout) = pass.dropout(Site::FfnOut) {
                    dropout.apply_all(machine, &mut dout);
                }
                let drouting = experts::backward_routing(machine, &dout, &saved, routing, n_embd);
                machine.profile.enter(Section::Router);
                let dlogits = routing.backward(machine, &drouting, router_weights); // [n_token, n_expert]
                let gradients = noise.zip(*noise_weight).map(|(noise, at)| (noise.backward(&dlogits), at));
                for (i, (d, at)) in [(dlogits, *router)].into_iter().chain(gradients).enumerate() {
                    let (d, weight) = (Matrix::f32(&d, n_token, config.n_expert), &params[at]);
                    let weight = Matrix::f32(weight, config.n_expert, n_embd);
                    let write = if i == 0 { Write::Replace } else { Write::Add };
                    linear::backward_input(machine, &mut dnormed, write, d, weight, n_embd);
                    linear::backward_weight(machine, &mut grads[at], d, normed.matrix(), n_embd);
                }
                machine.profile.enter(Section::Experts);
                let dweights = expert_gradients(grads, *up, *down);
                let weights = expert_weights(params, *up, *down);
                let dropout = pass.dropout(Site::Expert);
                experts::backward(
                    machine,
                    &dout,
                    &normed,
                    &mut dnormed,
                    &weights,
                    dweights,
                    saved,
                    routing,
                    pass.experts(),
                    dropout.as_ref(),
                );
                machine.buffers.give(dout);
            }
            _ => unreachable!("a block's activations are of its own kind"),
        }
        norm_backward(machine, params, grads, (self.norm2, &norm2), &middle, &dnormed, dx);
        machine.buffers.give(middle);

        machine.profile.enter(Section::Projections);
        let dy = dropped(machine, dx, n_embd, pass.dropout(Site::AttentionOut));
        let mut dattended = take(machine);
        let weight = Matrix::f32(&params[self.attn_out.weight], n_embd, n_embd);
        let product = Product::new(machine.precision, dy.matrix().factor(), weight.factor());
        linear::store(machine, &mut dattended, product, None);
        self.attn_out.backward_parameters(machine, grads, &dy, attended.matrix(), n_embd);
        machine.profile.enter(Section::Attention);
        let mut dqkv = [(); 3].map(|()| take(machine));
        let dropout = pass.dropout(Site::Attention);
        attention::backward(machine, &inputs(&qkv, &pass, dropout.as_ref()), &attended, &dattended, &mut dqkv);
        machine.profile.enter(Section::Norm);
        norm::forward(machine, &mut normed, x, affine(params, self.norm1), config.norm_eps);
        machine.profile.enter(Section::Projections);
        for (i, (affine, dy)) in self.qkv.iter().zip(&dqkv).enumerate() {
            let write = if i == 0 { Write::Replace } else { Write::Add };
            let weight = Matrix::f32(&params[affine.weight], n_embd, n_embd);
            linear::backward_input(machine, &mut dnormed, write, dy.matrix(), weight, n_embd);
            affine.backward_parameters(machine, grads, dy, normed.matrix(), n_embd);
        }
        norm_backward(machine, params, grads, (self.norm1, &norm1), x, &dnormed, dx);
        machine.buffers.give(dnormed);
        for values in dqkv.into_iter().chain(qkv).chain([dy, dattended, attended, normed]) {
            values.give(&mut machine.buffers);
        }
        machine.profile.enter(Section::Other);
    }
}

fn norm_backward(
    machine: &mut Machine,
    params: &[Vec<f32>],
    grads: &mut [Vec<f32>],
    (at, saved): ([usize; 2], &norm::Saved),
    x: &[f32],
    dy: &[f32],
    dx: &mut [f32],
) {
    machine.profile.enter(Section::Norm);
    let [dscale, dshift] = grads.get_disjoint_mut(at).expect("scale and shift are two tensors");
    norm::backward(machine, dy, x, &params[at[0]], saved, dx, (dscale, dshift));
}

/// Scale and shift.
fn affine(params: &[Vec<f32>], at: [usize; 2]) -> norm::Affine<'_> {
    (&params[at[0]], &params[at[1]])
}

impl Affine {
    fn bias(self, params: &[Vec<f32>]) -> Option<&[f32]> {
        self.bias.map(|b| &params[b][..])
    }

    /// `y = x W^T + b`.
    fn forward(self, machine: &mut Machine, params: &[Vec<f32>], y: &mut Values, x: Matrix, n_in: usize) {
        let weight = Matrix::f32(&params[self.weight], y.n_col, n_in);
        linear::forward(machine, y, x, weight, self.bias(params));
    }

    /// `pre = x W^T + b` and `hidden = gelu(pre)`.
    fn forward_activated(
        self,
        machine: &mut Machine,
        params: &[Vec<f32>],
        [pre, hidden]: [&mut Values; 2],
        x: Matrix,
        config: &Config,
    ) {
        let (kernels, precision, kind) = (Kernels::get(), machine.precision, config.dense_activation);
        let (n_row, n_out) = (pre.n_row(), pre.n_col);
        let bias = self.bias(params);
        let weight = Matrix::f32(&params[self.weight], n_out, config.n_embd);
        let product = Product::new(precision, x.factor(), weight.t());
        let outs = [&mut pre.words[..], &mut hidden.words[..]];
        machine.multiply(
            outs,
            (n_out, precision.per_word()),
            &[0, n_row],
            |_| product,
            |[pre, hidden], _, cols, sums| {
                if let Some(bias) = bias {
                    kernels.axpy(1.0, &bias[cols], sums);
                }
                precision.store(kernels, sums, pre);
                activation::in_place(kind, sums);
                precision.store(kernels, sums, hidden);
            },
        );
    }

    /// `out = residual + drop(x W^T + b)`.
    fn forward_residual(
        self,
        machine: &mut Machine,
        params: &[Vec<f32>],
        out: &mut [f32],  // [n_row, n_out]
        residual: &[f32], // [n_row, n_out]
        x: Matrix,
        n_in: usize,
        dropout: Option<&Dropout>,
    ) {
        let kernels = Kernels::get();
        let n_out = params[self.weight].len() / n_in;
        let bias = self.bias(params);
        let product = Product::new(machine.precision, x.factor(), Matrix::f32(&params[self.weight], n_out, n_in).t());
        let n_row = out.len() / n_out;
        machine.multiply(
            [out],
            (n_out, 1),
            &[0, n_row],
            |_| product,
            |[out], row, cols, sums| {
                if let Some(bias) = bias {
                    kernels.axpy(1.0, &bias[cols.clone()], sums);
                }
                if let Some(dropout) = dropout {
                    dropout.apply(row * n_out + cols.start, sums);
                }
                out.copy_from_slice(&residual[row * n_out + cols.start..row * n_out + cols.end]);
                kernels.axpy(1.0, sums, out);
            },
        );
    }

    /// Adds to the gradients of weight and bias, given those of the output and the input.
    fn backward_parameters(self, machine: &mut Machine, grads: &mut [Vec<f32>], dy: &Values, x: Matrix, n_in: usize) {
        let (dweight, dbias) = self.gradients(grads);
        linear::backward_weight(machine, dweight, dy.matrix(), x, n_in);
        if let Some(dbias) = dbias {
            linear::add_column_sums(machine, dy.matrix(), dbias);
        }
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

fn inputs<'a>(qkv: &'a [Values; 3], pass: &Pass<'a>, dropout: Option<&'a Dropout>) -> attention::Inputs<'a> {
    attention::Inputs { shape: pass.attention(), qkv, mask: pass.sequences.mask, first: pass.sequences.first, dropout }
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

/// `drop(x)` [n_row, n_col] as products read it.
fn dropped(machine: &mut Machine, x: &[f32], n_col: usize, dropout: Option<Dropout>) -> Values {
    let (kernels, precision) = (Kernels::get(), machine.precision);
    let mut values = Values::take(&mut machine.buffers, precision, x.len() / n_col, n_col);
    let n_word = values.n_word();
    machine.team.for_each_chunk(&mut values.words, ROWS * n_word, |i, words| {
        let mut row = vec![0.0; n_col];
        for (i, words) in (i * ROWS..).zip(words.chunks_exact_mut(n_word)) {
            row.copy_from_slice(&x[i * n_col..(i + 1) * n_col]);
            if let Some(dropout) = &dropout {
                dropout.apply(i * n_col, &mut row);
            }
            precision.store(kernels, &row, words);
        }
    });
    values
}
