//! The model as a ggml graph, written once for both versions. Shapes stand in ggml's order, fastest first.

use param_model::{Activation, Config, Part};

use crate::attention::{Cache, Span};
use crate::ops::{Context, Graph, Tensor};
use crate::version;
use crate::weights::Weights;

/// A graph built for a span of tokens.
pub struct Forward {
    pub graph: Graph,
    pub span: Span,
    pub tokens: Tensor,    // i32 [n_token]
    pub positions: Tensor, // i32 [n_token]
    pub last: Tensor,      // i32 [1]: the token whose logits are wanted
    pub attention: version::AttentionInputs,
    pub logits: Tensor, // f32 [n_vocab, 1]
}

/// Bound on the nodes and views of a graph.
pub fn n_node(config: &Config) -> usize {
    // About 50 to a block, and two for each chosen expert.
    (64 + 2 * config.n_expert_used) * (config.n_layer + 1)
}

/// Builds the graph from tokens to the logits of the last one.
pub fn build(
    ctx: &Context,
    config: &Config,
    weights: &Weights,
    cache: &Cache,
    span: Span,
    plain_attention: bool,
) -> Forward {
    let graph = ctx.graph(n_node(config));
    let index = |n| ctx.tensor(gguf::GgmlType::I32, &[n]).input();
    let (tokens, positions, last) = (index(span.n_token), index(span.n_token), index(1));
    let attention = version::attention_inputs(ctx, span, plain_attention);
    let b = Builder { ctx, graph, config, weights };

    let embedded = ctx.get_rows(weights.get(Part::TokenEmbd, None), tokens);
    let mut x = ctx.add(embedded, ctx.get_rows(weights.get(Part::PositionEmbd, None), positions)); // [n_embd, n_token]
    for i in 0..config.n_layer {
        let normed = b.norm(x, Part::AttnNormScale, Part::AttnNormShift, Some(i));
        let project = |weight, bias| b.linear(normed, weight, bias, i);
        let qkv = [
            project(Part::AttnQ, Part::AttnQBias),
            project(Part::AttnK, Part::AttnKBias),
            project(Part::AttnV, Part::AttnVBias),
        ];
        let mut attended = attention.attend(ctx, graph, cache, i, qkv);
        if i + 1 == config.n_layer && span.n_token > 1 {
            // After the last attention only the token whose logits are wanted goes on, as in llama.cpp.
            attended = ctx.get_rows(attended, last);
            x = ctx.get_rows(x, last);
        }
        x = ctx.add(x, b.linear(attended, Part::AttnOut, Part::AttnOutBias, i));
        let normed = b.norm(x, Part::FfnNormScale, Part::FfnNormShift, Some(i));
        x = ctx.add(x, if config.is_moe(i) { b.experts(normed, i) } else { b.dense(normed, i) });
    }
    let normed = b.norm(x, Part::OutputNormScale, Part::OutputNormShift, None);
    let logits = ctx.mul_mat(weights.head, normed).output();
    // Where a single token runs, nothing reads `last`, and inputs must have memory all the same.
    graph.expand(last);
    graph.expand(logits);
    Forward { graph, span, tokens, positions, last, attention, logits }
}

struct Builder<'a> {
    ctx: &'a Context,
    graph: Graph,
    config: &'a Config,
    weights: &'a Weights,
}

impl Builder<'_> {
    fn norm(&self, x: Tensor, scale: Part, shift: Part, block: Option<usize>) -> Tensor {
        let normed = self.ctx.norm(x, self.config.norm_eps);
        self.ctx.add(self.ctx.mul(normed, self.weights.get(scale, block)), self.weights.get(shift, block))
    }

    fn linear(&self, x: Tensor, weight: Part, bias: Part, block: usize) -> Tensor {
        let product = self.ctx.mul_mat(self.weights.get(weight, block), x);
        self.ctx.add_bias(product, self.weights.find(bias, block))
    }

    fn activate(&self, x: Tensor, activation: Activation) -> Tensor {
        match activation {
            Activation::GeluErf => version::gelu_erf(self.ctx, x),
            Activation::GeluTanh => self.ctx.gelu(x),
        }
    }

    /// x is [n_embd, n_token].
    fn dense(&self, x: Tensor, block: usize) -> Tensor {
        let hidden = self.linear(x, Part::FfnUp, Part::FfnUpBias, block);
        let hidden = self.activate(hidden, self.config.dense_activation);
        self.linear(hidden, Part::FfnDown, Part::FfnDownBias, block)
    }

    /// x is [n_embd, n_token].
    fn experts(&self, x: Tensor, block: usize) -> Tensor {
        let (ctx, weights) = (self.ctx, self.weights);
        let (n_embd, n_token) = (x.ne(0), x.ne(1));
        let (n_expert, n_used) = (self.config.n_expert as i64, self.config.n_expert_used as i64);
        let logits = ctx.mul_mat(weights.get(Part::Router, block), x); // [n_expert, n_token]
        let chosen = version::top_k(ctx, logits, n_used); // i32 [n_used, n_token], best first
        let gates = ctx.get_rows(ctx.reshape_3d(logits, 1, n_expert, n_token), chosen); // [1, n_used, n_token]
        let gates = ctx.soft_max(ctx.reshape_2d(gates, n_used, n_token));
        let gates = ctx.reshape_3d(gates, 1, n_used, n_token);
        self.graph.expand(gates);

        let product = |x, weight, bias| {
            let y = ctx.mul_mat_id(weights.get(weight, block), x, chosen);
            weights.find(bias, block).map_or(y, |bias| version::add_chosen(ctx, y, bias, chosen))
        };
        let x = ctx.reshape_3d(x, n_embd, 1, n_token);
        let hidden = product(x, Part::ExpertUp, Part::ExpertUpBias); // [n_ff, n_used, n_token]
        let hidden = self.activate(hidden, self.config.expert_activation);
        let out = product(hidden, Part::ExpertDown, Part::ExpertDownBias); // [n_embd, n_used, n_token]
        let weighted = ctx.mul(out, gates);
        let of_choice = |i: usize| ctx.view_2d(weighted, n_embd, n_token, weighted.nb(2), i * weighted.nb(1));
        (1..n_used as usize).fold(of_choice(0), |sum, i| ctx.add(sum, of_choice(i)))
    }
}
