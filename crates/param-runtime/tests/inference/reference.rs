//! The model written out naively in f64, and the runtime against it.

use std::collections::HashMap;

use gguf::GgmlType;
use param_model::{Activation, Config};
use param_runtime::{Point, Rows, Session, SessionOptions, Trace};

use crate::tiny::{Tiny, config, tokens};

/// The tensors of a tiny model, and what a pass over some tokens computes.
struct Reference<'a> {
    config: &'a Config,
    tensors: HashMap<&'a str, &'a [f32]>,
    hidden: HashMap<Point, Vec<f64>>, // [n_token, n_embd]
    chosen: HashMap<usize, Vec<u32>>, // [n_token, n_expert_used]
}

impl<'a> Reference<'a> {
    fn new(tiny: &'a Tiny) -> Self {
        let tensors = tiny.tensors.iter().map(|(name, _, values, _)| (name.as_str(), values.as_slice())).collect();
        Reference { config: &tiny.config, tensors, hidden: HashMap::new(), chosen: HashMap::new() }
    }

    fn tensor(&self, name: &str) -> &'a [f32] {
        self.tensors[name]
    }

    /// `w[matrix] x + b[matrix]`, without the bias where there is none.
    fn linear(&self, name: &str, matrix: usize, n_out: usize, x: &[f64]) -> Vec<f64> {
        let n_in = x.len();
        let weight = &self.tensor(&format!("{name}.weight"))[matrix * n_out * n_in..(matrix + 1) * n_out * n_in];
        let bias = self.tensors.get(format!("{name}.bias").as_str());
        let rows = weight.chunks_exact(n_in).enumerate();
        rows.map(|(o, row)| {
            let dot: f64 = row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
            dot + bias.map_or(0.0, |b| f64::from(b[matrix * n_out + o]))
        })
        .collect()
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let n = x.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        let (scale, shift) = (self.tensor(&format!("{name}.weight")), self.tensor(&format!("{name}.bias")));
        let rstd = 1.0 / (variance + f64::from(self.config.norm_eps)).sqrt();
        (0..x.len()).map(|i| (x[i] - mean) * rstd * f64::from(scale[i]) + f64::from(shift[i])).collect()
    }

    fn show(&mut self, point: Point, x: &[f64]) {
        self.hidden.entry(point).or_default().extend(x);
    }

    /// Logits of every token: [n_token][n_vocab].
    fn run(&mut self, tokens: &[u32]) -> Vec<Vec<f64>> {
        let (n_embd, n_head, hd) = (self.config.n_embd, self.config.n_head, self.config.head_dim());
        let row =
            |t: &[f32], i: usize| t[i * n_embd..(i + 1) * n_embd].iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
        let (token_embd, position_embd) = (self.tensor("token_embd.weight"), self.tensor("position_embd.weight"));
        let mut stream: Vec<Vec<f64>> = Vec::new();
        for (i, &token) in tokens.iter().enumerate() {
            stream.push(add(&row(token_embd, token as usize), &row(position_embd, i)));
            self.show(Point::Embed, &stream[i]);
        }
        for block in 0..self.config.n_layer {
            let name = |part: &str| format!("blk.{block}.{part}");
            let normed: Vec<_> = stream.iter().map(|x| self.norm(&name("attn_norm"), x)).collect();
            let project = |part: &str| -> Vec<Vec<f64>> {
                normed.iter().map(|x| self.linear(&name(part), 0, n_embd, x)).collect()
            };
            let (q, k, v) = (project("attn_q"), project("attn_k"), project("attn_v"));
            for i in 0..tokens.len() {
                let mut attended = vec![0.0; n_embd];
                for head in 0..n_head {
                    let at = head * hd..(head + 1) * hd;
                    let score = |j: usize| -> f64 {
                        q[i][at.clone()].iter().zip(&k[j][at.clone()]).map(|(q, k)| q * k).sum::<f64>()
                            / (hd as f64).sqrt()
                    };
                    let weights = softmax(&(0..=i).map(score).collect::<Vec<_>>());
                    for (j, w) in weights.iter().enumerate() {
                        for d in at.clone() {
                            attended[d] += w * v[j][d];
                        }
                    }
                }
                stream[i] = add(&stream[i], &self.linear(&name("attn_output"), 0, n_embd, &attended));
                let x = stream[i].clone();
                self.show(Point::AfterAttention(block), &x);
                let normed = self.norm(&name("ffn_norm"), &x);
                self.show(Point::Norm2(block), &normed);
                let ffn = self.feed_forward(block, &normed);
                self.show(Point::Ffn(block), &ffn);
                stream[i] = add(&x, &ffn);
                self.show(Point::Out(block), &stream[i]);
            }
        }
        let mut logits = Vec::new();
        for x in &stream {
            let normed = self.norm("output_norm", x);
            self.show(Point::FinalNorm, &normed);
            logits.push(
                token_embd
                    .chunks_exact(n_embd)
                    .map(|w| normed.iter().zip(w).map(|(x, w)| x * f64::from(*w)).sum())
                    .collect(),
            );
        }
        logits
    }

    fn feed_forward(&mut self, block: usize, x: &[f64]) -> Vec<f64> {
        let (n_embd, n_ff) = (self.config.n_embd, self.config.n_ff());
        let layer = |suffix: &str, expert: usize, activation: Activation| {
            let hidden = self.linear(&format!("blk.{block}.ffn_up{suffix}"), expert, n_ff, x);
            let hidden: Vec<_> = hidden.into_iter().map(|h| gelu(activation, h)).collect();
            self.linear(&format!("blk.{block}.ffn_down{suffix}"), expert, n_embd, &hidden)
        };
        if !self.config.is_moe(block) {
            return layer("", 0, self.config.dense_activation);
        }
        let logits = self.linear(&format!("blk.{block}.ffn_gate_inp"), 0, self.config.n_expert, x);
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        order.truncate(self.config.n_expert_used);
        let weights = softmax(&order.iter().map(|&e| logits[e]).collect::<Vec<_>>());
        let mut y = vec![0.0; n_embd];
        for (&expert, weight) in order.iter().zip(weights) {
            let out = layer("_exps", expert, self.config.expert_activation);
            y = add(&y, &out.iter().map(|v| v * weight).collect::<Vec<_>>());
        }
        self.chosen.entry(block).or_default().extend(order.iter().map(|&e| e as u32));
        y
    }
}

fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::MIN, f64::max);
    let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
    x.iter().map(|x| (x - max).exp() / sum).collect()
}

fn gelu(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        Activation::GeluErf => {
            // Phi(x) by its Taylor series: 1/2 + phi(x) (x + x^3/3 + x^5/(3 5) + ...).
            let (mut term, mut sum) = (x, x);
            for n in 1..200 {
                term *= x * x / f64::from(2 * n + 1);
                sum += term;
            }
            x * (0.5 + (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt() * sum)
        }
    }
}

fn assert_close(what: &str, got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let worst = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).abs()).fold(0.0, f64::max);
    assert!(worst <= 1e-4, "{what}: off by {worst}");
}

/// Every logit, hidden state and routing decision within 1e-4 of f64.
fn check(config: Config) {
    let tiny = Tiny::new(config, GgmlType::F32, None);
    let tokens = tokens(70);
    let mut reference = Reference::new(&tiny);
    let want = reference.run(&tokens);

    let model = tiny.open().unwrap();
    let mut session = Session::new(&model, &SessionOptions::default()).unwrap();
    session.push(&tokens).unwrap();
    let (mut n_hidden, mut n_routing) = (0, 0);
    let logits = session
        .forward_traced(Rows::All, &mut |trace| match trace {
            Trace::Hidden { point, values } => {
                assert_close(&format!("{point:?}"), values, &reference.hidden[&point]);
                n_hidden += 1;
            }
            Trace::Routing { block, experts, weights, logits } => {
                assert_eq!(experts, reference.chosen[&block]);
                let (n_expert, n_used) = (tiny.config.n_expert, tiny.config.n_expert_used);
                for (token, weights) in weights.chunks_exact(n_used).enumerate() {
                    let chosen = experts[token * n_used..(token + 1) * n_used].iter();
                    let chosen: Vec<_> = chosen.map(|&e| f64::from(logits[token * n_expert + e as usize])).collect();
                    assert_close("weights", weights, &softmax(&chosen));
                }
                n_routing += 1;
            }
        })
        .unwrap();
    assert_close("logits", logits, &want.concat());
    assert_eq!((n_hidden, n_routing), (2 + 4 * tiny.config.n_layer, tiny.config.n_moe()));
}

#[test]
fn the_reference_architecture_is_computed_exactly() {
    check(config());
}

#[test]
fn every_variant_in_the_metadata_is_honoured() {
    check(Config {
        moe_phase: 1,
        qkv_bias: true,
        expert_bias: false,
        expert_activation: Activation::GeluTanh,
        dense_activation: Activation::GeluErf,
        norm_eps: 1e-3,
        ..config()
    });
    check(Config { moe_stride: 1, n_expert_used: 5, ..config() });
    check(Config { n_expert: 1, n_expert_used: 1, ..config() });
    // A head width that no register divides.
    check(Config { n_embd: 60, n_head: 3, ..config() });
}
