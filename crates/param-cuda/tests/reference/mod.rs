//! Tiny random models as files would hold them, and their forward pass in f64, written down once more from the definition.

use std::borrow::Cow;
use std::sync::Arc;

use half::{bf16, f16};
use param_cuda::model::{Activation, Format, Model};
use param_cuda::{BlockWeights, DeviceModel, FeedForwardWeights, Gpu, NormWeights, OuterWeights, Weights};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[derive(Clone, Debug)]
pub struct Shape {
    pub n_vocab: usize,
    pub n_ctx: usize,
    pub n_head: usize,
    pub head_dim: usize,
    pub n_layer: usize,
    pub n_ff: usize,
    pub n_expert: usize,
    pub n_used: usize,
    /// Every `stride`th block is MoE.
    pub stride: usize,
    /// Of queries, keys, values, output, up, down, token embedding, head.
    pub formats: [Format; 8],
    pub cache_f32: bool,
    pub biases: bool,
    pub selection_bias: bool,
}

impl Shape {
    pub fn n_embd(&self) -> usize {
        self.n_head * self.head_dim
    }
}

/// A stack of matrices as stored, and what that means.
struct Tensor {
    format: Format,
    n_row: usize,
    n_col: usize,
    stored: Vec<u8>,
    values: Vec<f64>,
    bias: Vec<f32>,
}

/// Bytes of random blocks whose values have about the deviation `scale`, and the values.
fn random_weights(format: Format, n: usize, scale: f32, rng: &mut impl Rng) -> (Vec<u8>, Vec<f64>) {
    let (mut stored, mut values) = (Vec::new(), Vec::new());
    let half = |scale: f32, rng: &mut dyn Rng, stored: &mut Vec<u8>| {
        let d = f16::from_f32(scale * (0.5 + rng.random::<f32>()));
        stored.extend(d.to_le_bytes());
        f64::from(d.to_f32())
    };
    match format {
        Format::F32 | Format::F16 | Format::Bf16 => {
            for _ in 0..n {
                let value = scale * 1.7 * (rng.random::<f32>() * 2.0 - 1.0);
                match format {
                    Format::F32 => {
                        stored.extend(value.to_le_bytes());
                        values.push(f64::from(value));
                    }
                    Format::F16 => {
                        stored.extend(f16::from_f32(value).to_le_bytes());
                        values.push(f16::from_f32(value).to_f64());
                    }
                    _ => {
                        stored.extend(bf16::from_f32(value).to_le_bytes());
                        values.push(bf16::from_f32(value).to_f64());
                    }
                }
            }
        }
        Format::Q8_0 => {
            for _ in 0..n / 32 {
                let d = half(scale / 74.0, rng, &mut stored);
                for _ in 0..32 {
                    let q = rng.random::<i8>();
                    stored.push(q as u8);
                    values.push(d * f64::from(q));
                }
            }
        }
        Format::Q4K => {
            for _ in 0..n / 256 {
                let d = half(scale / 150.0, rng, &mut stored);
                let least = half(scale / 20.0, rng, &mut stored);
                let packed: [u8; 12] = rng.random();
                let quants: [u8; 128] = std::array::from_fn(|_| rng.random());
                stored.extend(packed);
                stored.extend(quants);
                for i in 0..256 {
                    let piece = i / 32;
                    let (s, m) = if piece < 4 {
                        (packed[piece] & 63, packed[piece + 4] & 63)
                    } else {
                        (
                            packed[piece + 4] & 15 | packed[piece - 4] >> 6 << 4,
                            packed[piece + 4] >> 4 | packed[piece] >> 6 << 4,
                        )
                    };
                    let byte = quants[i / 64 * 32 + i % 32];
                    let q = if piece % 2 == 0 { byte & 15 } else { byte >> 4 };
                    values.push(d * f64::from(s) * f64::from(q) - least * f64::from(m) / 1.0);
                }
            }
        }
        Format::Q6K => {
            for _ in 0..n / 256 {
                let low: [u8; 128] = std::array::from_fn(|_| rng.random());
                let high: [u8; 64] = std::array::from_fn(|_| rng.random());
                let scales: [i8; 16] = std::array::from_fn(|_| rng.random());
                stored.extend(low);
                stored.extend(high);
                stored.extend(scales.map(|s| s as u8));
                let d = half(scale / 1300.0, rng, &mut stored);
                for i in 0..256 {
                    let (block, quarter, l) = (i / 128, i % 128 / 32, i % 32);
                    let byte = low[block * 64 + quarter % 2 * 32 + l];
                    let nibble = if quarter < 2 { byte & 15 } else { byte >> 4 };
                    let top = high[block * 32 + l] >> (2 * quarter) & 3;
                    let q = i32::from(nibble | top << 4) - 32;
                    values.push(d * f64::from(scales[i / 16]) * f64::from(q));
                }
            }
        }
    }
    (stored, values)
}

fn random_vector(n: usize, middle: f32, rng: &mut impl Rng) -> Vec<f32> {
    (0..n).map(|_| middle + 0.3 * (rng.random::<f32>() * 2.0 - 1.0)).collect()
}

impl Tensor {
    fn random(format: Format, n_matrix: usize, n_row: usize, n_col: usize, bias: bool, rng: &mut impl Rng) -> Tensor {
        let scale = 1.0 / (n_col as f32).sqrt();
        let (stored, values) = random_weights(format, n_matrix * n_row * n_col, scale, rng);
        let bias = if bias { random_vector(n_matrix * n_row, 0.0, rng) } else { Vec::new() };
        Tensor { format, n_row, n_col, stored, values, bias }
    }

    fn weights(&self, n_matrix: usize) -> Weights<'_> {
        let Tensor { format, n_row, n_col, .. } = *self;
        Weights { format, n_matrix, n_row, n_col, stored: Cow::Borrowed(&self.stored), bias: &self.bias }
    }

    fn multiply(&self, matrix: usize, x: &[f64]) -> Vec<f64> {
        let first = matrix * self.n_row;
        (first..first + self.n_row)
            .map(|row| {
                let weights = &self.values[row * self.n_col..(row + 1) * self.n_col];
                let bias = self.bias.get(row).map_or(0.0, |b| f64::from(*b));
                weights.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + bias
            })
            .collect()
    }
}

struct Norm {
    scale: Vec<f32>,
    shift: Vec<f32>,
}

impl Norm {
    fn random(n: usize, rng: &mut impl Rng) -> Norm {
        Norm { scale: random_vector(n, 1.0, rng), shift: random_vector(n, 0.0, rng) }
    }

    fn weights(&self) -> NormWeights<'_> {
        NormWeights { scale: &self.scale, shift: &self.shift }
    }

    fn run(&self, x: &[f64]) -> Vec<f64> {
        let n = x.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
        let scale = 1.0 / (variance + f64::from(EPS)).sqrt();
        let parameters = self.scale.iter().zip(&self.shift);
        x.iter().zip(parameters).map(|(x, (w, b))| (x - mean) * scale * f64::from(*w) + f64::from(*b)).collect()
    }
}

struct Block {
    norm1: Norm,
    qkv: [Tensor; 3],
    out: Tensor,
    norm2: Norm,
    router: Vec<f32>,
    selection_bias: Vec<f32>,
    up: Tensor,
    down: Tensor,
}

const EPS: f32 = 1e-5;

pub struct TinyModel {
    pub shape: Shape,
    token_embd: Tensor,
    pub position_embd: Vec<f32>,
    blocks: Vec<Block>,
    output_norm: Norm,
    head: Tensor,
}

/// Keys and values of every block and position: [n_layer][n_position][2][n_embd].
pub type Sequence = Vec<Vec<[Vec<f64>; 2]>>;

fn erf(x: f64) -> f64 {
    // The series converges fast enough for what occurs here.
    if x.abs() > 5.0 {
        return x.signum();
    }
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > 1e-17 * sum.abs() {
        n += 1.0;
        term *= -x * x / n;
        sum += term / (2.0 * n + 1.0);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

impl TinyModel {
    pub fn random(shape: &Shape, seed: u64) -> TinyModel {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let rng = &mut rng;
        let (n_embd, n_ff) = (shape.n_embd(), shape.n_ff);
        let formats = shape.formats;
        let block = |i: usize, rng: &mut ChaCha8Rng| {
            let is_moe = i.is_multiple_of(shape.stride) && shape.n_expert > 1;
            let n_matrix = if is_moe { shape.n_expert } else { 1 };
            Block {
                norm1: Norm::random(n_embd, rng),
                qkv: [0, 1, 2].map(|j| Tensor::random(formats[j], 1, n_embd, n_embd, shape.biases, rng)),
                out: Tensor::random(formats[3], 1, n_embd, n_embd, shape.biases, rng),
                norm2: Norm::random(n_embd, rng),
                router: if is_moe { random_vector(n_matrix * n_embd, 0.0, rng) } else { Vec::new() },
                selection_bias: if is_moe && shape.selection_bias {
                    random_vector(n_matrix, 0.0, rng)
                } else {
                    Vec::new()
                },
                up: Tensor::random(formats[4], n_matrix, n_ff, n_embd, shape.biases, rng),
                down: Tensor::random(formats[5], n_matrix, n_embd, n_ff, shape.biases, rng),
            }
        };
        TinyModel {
            token_embd: Tensor::random(formats[6], 1, shape.n_vocab, n_embd, false, rng),
            position_embd: random_vector(shape.n_ctx * n_embd, 0.0, rng),
            blocks: (0..shape.n_layer).map(|i| block(i, rng)).collect(),
            output_norm: Norm::random(n_embd, rng),
            head: Tensor::random(formats[7], 1, shape.n_vocab, n_embd, false, rng),
            shape: shape.clone(),
        }
    }

    pub fn upload(&self, gpu: &Arc<Gpu>) -> DeviceModel {
        let shape = &self.shape;
        let dims = Model {
            n_vocab: shape.n_vocab as u32,
            n_ctx: shape.n_ctx as u32,
            n_embd: shape.n_embd() as u32,
            n_head: shape.n_head as u32,
            head_dim: shape.head_dim as u32,
            n_layer: shape.n_layer as u32,
            n_ff: shape.n_ff as u32,
            n_expert: shape.n_expert as u32,
            n_used: shape.n_used as u32,
            expert_activation: Activation::GeluErf as u32,
            dense_activation: Activation::GeluTanh as u32,
            norm_eps: EPS,
            cache_f32: shape.cache_f32.into(),
            ..Model::default()
        };
        let outer = OuterWeights {
            token_embd: self.token_embd.weights(1),
            position_embd: &self.position_embd,
            output_norm: self.output_norm.weights(),
            head: Some(self.head.weights(1)),
        };
        let mut upload = DeviceModel::begin(gpu, &dims, &outer).unwrap();
        for block in &self.blocks {
            let n_matrix = if block.router.is_empty() { 1 } else { shape.n_expert };
            let [q, k, v] = &block.qkv;
            let weights = BlockWeights {
                norm1: block.norm1.weights(),
                q: q.weights(1),
                k: k.weights(1),
                v: v.weights(1),
                out: block.out.weights(1),
                norm2: block.norm2.weights(),
                ffn: Some(FeedForwardWeights {
                    router: &block.router,
                    selection_bias: &block.selection_bias,
                    up: block.up.weights(n_matrix),
                    down: block.down.weights(n_matrix),
                }),
            };
            upload.block(Some(&weights)).unwrap();
        }
        upload.end().unwrap()
    }

    pub fn sequence(&self) -> Sequence {
        vec![Vec::new(); self.shape.n_layer]
    }

    /// Logits after one more token.
    pub fn forward(&self, sequence: &mut Sequence, token: u32) -> Vec<f64> {
        let n_embd = self.shape.n_embd();
        let (token, position) = (token as usize, sequence[0].len());
        let embedded = &self.token_embd.values[token * n_embd..(token + 1) * n_embd];
        let placed = &self.position_embd[position * n_embd..(position + 1) * n_embd];
        let mut x: Vec<f64> = embedded.iter().zip(placed).map(|(t, p)| t + f64::from(*p)).collect();
        for (block, cache) in self.blocks.iter().zip(sequence) {
            let normed = block.norm1.run(&x);
            let [q, k, v] = block.qkv.each_ref().map(|tensor| tensor.multiply(0, &normed));
            let kept = |x: Vec<f64>| {
                if self.shape.cache_f32 { x } else { x.iter().map(|x| f16::from_f64(*x).to_f64()).collect() }
            };
            cache.push([kept(k), kept(v)]);
            let mut attended = vec![0.0; n_embd];
            for head in 0..self.shape.n_head {
                let cols = head * self.shape.head_dim..(head + 1) * self.shape.head_dim;
                let score = |k: &Vec<f64>| -> f64 {
                    let dot: f64 = q[cols.clone()].iter().zip(&k[cols.clone()]).map(|(q, k)| q * k).sum();
                    (dot / (self.shape.head_dim as f64).sqrt()).exp()
                };
                let weights: Vec<f64> = cache.iter().map(|[k, _]| score(k)).collect();
                let total: f64 = weights.iter().sum();
                for (weight, [_, v]) in weights.iter().zip(cache.iter()) {
                    for col in cols.clone() {
                        attended[col] += weight / total * v[col];
                    }
                }
            }
            let y = block.out.multiply(0, &attended);
            x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
            let normed = block.norm2.run(&x);
            for (expert, weight) in self.route(block, &normed) {
                let hidden = block.up.multiply(expert, &normed).into_iter().map(|h| {
                    if block.router.is_empty() {
                        let inner = (2.0 / std::f64::consts::PI).sqrt() * (h + 0.044715 * h * h * h);
                        0.5 * h * (1.0 + inner.tanh())
                    } else {
                        0.5 * h * (1.0 + erf(h / 2f64.sqrt()))
                    }
                });
                let y = block.down.multiply(expert, &hidden.collect::<Vec<_>>());
                x.iter_mut().zip(y).for_each(|(x, y)| *x += weight * y);
            }
        }
        self.head.multiply(0, &self.output_norm.run(&x))
    }

    fn route(&self, block: &Block, x: &[f64]) -> Vec<(usize, f64)> {
        if block.router.is_empty() {
            return vec![(0, 1.0)];
        }
        let logits: Vec<f64> = block
            .router
            .chunks_exact(x.len())
            .map(|row| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum())
            .collect();
        let biased = |e: usize| logits[e] + block.selection_bias.get(e).map_or(0.0, |b| f64::from(*b));
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| biased(*b).total_cmp(&biased(*a)).then(a.cmp(b)));
        order.truncate(self.shape.n_used);
        let total: f64 = order.iter().map(|e| logits[*e].exp()).sum();
        order.into_iter().map(|e| (e, logits[e].exp() / total)).collect()
    }
}
