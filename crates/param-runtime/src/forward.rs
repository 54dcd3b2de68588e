//! The forward pass over one batch of tokens at consecutive positions: a plain loop over the blocks, each step run by the
//! whole team.

use gguf::Gguf;
use param_kernels::{Kernels, Team};
use param_model::Activation;

use crate::activations::Activations;
use crate::error::{Result, resize, zeroed};
use crate::kv_cache::KvCache;
use crate::matmul::{Groups, Scratch, matmul};
use crate::model::Model;
use crate::routing::Routing;
use crate::trace::{Observer, Point, Trace};
use crate::weights::{Block, Linear, Norm};

/// Queries that attention takes together.
const QUERY_TILE: usize = 16;
/// Rows handed to a thread at once where a row is little work.
const ROWS: usize = 8;

/// Buffers of a forward pass, and the threads that fill them.
pub(crate) struct Forward {
    team: Team,
    kernels: &'static Kernels,
    scratch: Vec<Scratch>, // [n_thread]
    activations: Activations,
    routing: Routing,
    x: Vec<f32>,          // [n_batch, n_embd] residual stream
    normed: Vec<f32>,     // [n_batch, n_embd]
    q: Vec<f32>,          // [n_batch, n_embd]
    k: Vec<f32>,          // [n_batch, n_embd]
    v: Vec<f32>,          // [n_batch, n_embd]
    y: Vec<f32>,          // [n_batch, n_embd] output of attention or feed-forward
    hidden: Vec<f32>,     // [n_batch * n_used, n_ff]
    expert_out: Vec<f32>, // [n_batch * n_used, n_embd]
    logits: Vec<f32>,     // [n_row, n_vocab]
    query_tiles: Vec<usize>,
}

/// Trace of a hidden state, if anyone asked.
fn show(observer: &mut Observer<'_, '_>, point: Point, values: &[f32]) {
    if let Some(observer) = observer {
        observer(Trace::Hidden { point, values });
    }
}

impl Forward {
    /// Buffers for batches of up to `n_batch` tokens.
    pub fn new(model: &Model, n_batch: usize, n_thread: usize) -> Result<Forward> {
        const WHAT: &str = "the buffers of a batch";
        let config = model.config();
        let n_used = if config.n_moe() > 0 { config.n_expert_used } else { 1 };
        let n_hidden = n_batch.saturating_mul(n_used);
        let buffer = |rows: usize, cols: usize| zeroed(WHAT, rows.saturating_mul(cols));
        let team = Team::new(n_thread);
        let n_embd = config.n_embd;
        Ok(Forward {
            scratch: (0..team.n_thread()).map(|_| Scratch::new(QUERY_TILE * config.head_dim())).collect(),
            team,
            kernels: Kernels::get(),
            activations: Activations::default(),
            routing: Routing::new(n_batch, config.n_expert, n_used)?,
            x: buffer(n_batch, n_embd)?,
            normed: buffer(n_batch, n_embd)?,
            q: buffer(n_batch, n_embd)?,
            k: buffer(n_batch, n_embd)?,
            v: buffer(n_batch, n_embd)?,
            y: buffer(n_batch, n_embd)?,
            hidden: buffer(n_hidden, config.n_ff())?,
            expert_out: buffer(n_hidden, n_embd)?,
            logits: Vec::new(),
            query_tiles: Vec::new(),
        })
    }

    /// Threads at work.
    pub fn n_thread(&self) -> usize {
        self.team.n_thread()
    }

    /// Runs `tokens` through the blocks, after the `n_past` that are in the cache. Leaves the residual stream for
    /// [`Forward::head`].
    pub fn run(
        &mut self,
        model: &Model,
        cache: &mut KvCache,
        tokens: &[u32],
        n_past: usize,
        mut observer: Observer<'_, '_>,
    ) -> Result<()> {
        let config = model.config();
        let (n_token, n_embd) = (tokens.len(), config.n_embd);
        self.embed(model, tokens, n_past)?;
        show(&mut observer, Point::Embed, &self.x[..n_token * n_embd]);
        for (i, block) in model.blocks.iter().enumerate() {
            self.attention(model, block, i, cache, n_token, n_past)?;
            show(&mut observer, Point::AfterAttention(i), &self.x[..n_token * n_embd]);
            self.norm(&block.norm2, 0..n_token, config.norm_eps);
            show(&mut observer, Point::Norm2(i), &self.normed[..n_token * n_embd]);
            self.feed_forward(model, block, n_token)?;
            if block.ffn.router.is_some()
                && let Some(observer) = &mut observer
            {
                let Routing { logits, experts, weights, .. } = &self.routing;
                observer(Trace::Routing {
                    block: i,
                    logits: &logits[..n_token * config.n_expert],
                    experts: &experts[..n_token * config.n_expert_used],
                    weights: &weights[..n_token * config.n_expert_used],
                });
            }
            show(&mut observer, Point::Ffn(i), &self.y[..n_token * n_embd]);
            let y = &self.y;
            let kernels = self.kernels;
            self.team.for_each_chunk(&mut self.x[..n_token * n_embd], ROWS * n_embd, |chunk, x| {
                let start = chunk * ROWS * n_embd;
                kernels.axpy(1.0, &y[start..start + x.len()], x);
            });
            show(&mut observer, Point::Out(i), &self.x[..n_token * n_embd]);
        }
        if observer.is_some() {
            self.norm(&model.output_norm, 0..n_token, config.norm_eps);
            show(&mut observer, Point::FinalNorm, &self.normed[..n_token * n_embd]);
        }
        Ok(())
    }

    /// Logits of the last `n_row` of the `n_token` tokens just run, written from row `at` of the logits buffer on.
    pub fn head(&mut self, model: &Model, n_token: usize, n_row: usize, at: usize) -> Result<()> {
        let config = model.config();
        let (n_embd, n_vocab) = (config.n_embd, config.n_vocab);
        self.norm(&model.output_norm, n_token - n_row..n_token, config.norm_eps);
        let head = model.head();
        let x = &self.normed[..n_row * n_embd];
        self.activations.convert(&mut self.team, head, x, n_embd, "the logits")?;
        let n_logit = (at + n_row).saturating_mul(n_vocab);
        resize("the logits", &mut self.logits, n_logit)?;
        matmul(
            &mut self.team,
            &mut self.scratch,
            &model.gguf,
            head,
            &self.activations,
            &Groups { matrices: &[0], row_starts: &[0, n_row] },
            |row| row,
            &mut self.logits[at * n_vocab..],
            |_, _, dots, out| out.copy_from_slice(dots),
        )
    }

    /// What [`Forward::head`] wrote: [n_row, n_vocab].
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Token plus position embedding into the residual stream.
    fn embed(&mut self, model: &Model, tokens: &[u32], n_past: usize) -> Result<()> {
        let n_embd = model.config().n_embd;
        let rows = self.x.chunks_exact_mut(n_embd).zip(self.y.chunks_exact_mut(n_embd));
        for ((i, &token), (x, position)) in tokens.iter().enumerate().zip(rows) {
            model.token_embd.read_row(&model.gguf, token as usize, x)?;
            model.position_embd.read_row(&model.gguf, n_past + i, position)?;
            self.kernels.axpy(1.0, position, x);
        }
        Ok(())
    }

    /// Normalises rows `rows` of the residual stream into the first rows of `normed`.
    fn norm(&mut self, norm: &Norm, rows: std::ops::Range<usize>, eps: f32) {
        let n_embd = norm.scale.len();
        let (x, kernels) = (&self.x[rows.start * n_embd..rows.end * n_embd], self.kernels);
        self.team.for_each_chunk(&mut self.normed[..x.len()], ROWS * n_embd, |chunk, out| {
            let start = chunk * ROWS * n_embd;
            let n_row = out.len() / n_embd;
            let (mut mean, mut rstd) = ([0.0; ROWS], [0.0; ROWS]);
            let x = &x[start..start + out.len()];
            kernels.layer_norm(x, &norm.scale, &norm.shift, eps, out, &mut mean[..n_row], &mut rstd[..n_row]);
        });
    }

    /// `x += attention(norm1(x))`.
    fn attention(
        &mut self,
        model: &Model,
        block: &Block,
        index: usize,
        cache: &mut KvCache,
        n_token: usize,
        n_past: usize,
    ) -> Result<()> {
        let config = model.config();
        let (n_embd, head_dim, kernels) = (config.n_embd, config.head_dim(), self.kernels);
        let n = n_token * n_embd;
        self.norm(&block.norm1, 0..n_token, config.norm_eps);
        let groups = Groups { matrices: &[0], row_starts: &[0, n_token] };
        let normed = &self.normed[..n];
        let inputs = [(&block.q, &mut self.q), (&block.k, &mut self.k), (&block.v, &mut self.v)];
        for (i, (linear, out)) in inputs.into_iter().enumerate() {
            let weight = &linear.weight;
            if i == 0 || !self.activations.fit(weight) {
                self.activations.convert(&mut self.team, weight, normed, n_embd, &weight.name)?;
            }
            project(
                &mut self.team,
                &mut self.scratch,
                kernels,
                &model.gguf,
                linear,
                &self.activations,
                &groups,
                &mut out[..n],
            )?;
        }
        cache.store(&mut self.team, index, n_past, &self.k[..n], &self.v[..n]);

        self.query_tiles.clear();
        self.query_tiles.extend((0..n_token).step_by(QUERY_TILE).chain([n_token]));
        let (q, scale, cache) = (&self.q, 1.0 / (head_dim as f32).sqrt(), &*cache);
        let attended = &mut self.y[..n];
        self.team.for_each_tile(
            &mut self.scratch,
            attended,
            n_embd,
            &self.query_tiles,
            head_dim,
            |scratch, mut tile| {
                let (rows, cols) = (tile.rows(), tile.cols());
                let (queries, out) = (&mut scratch.queries[..rows.len() * head_dim], &mut scratch.attended);
                for (row, query) in rows.clone().zip(queries.chunks_exact_mut(head_dim)) {
                    let q = &q[row * n_embd..(row + 1) * n_embd][cols.clone()];
                    for (query, q) in query.iter_mut().zip(q) {
                        *query = q * scale;
                    }
                }
                let out = &mut out[..rows.len() * head_dim];
                cache.attend(kernels, index, cols.start / head_dim, n_past + rows.start, queries, out);
                for (row, out) in rows.zip(out.chunks_exact(head_dim)) {
                    tile.row_mut(row).copy_from_slice(out);
                }
            },
        );

        let linear = &block.out;
        let attended = &self.y[..n];
        self.activations.convert(&mut self.team, &linear.weight, attended, n_embd, &linear.weight.name)?;
        matmul(
            &mut self.team,
            &mut self.scratch,
            &model.gguf,
            &linear.weight,
            &self.activations,
            &groups,
            |row| row,
            &mut self.x[..n],
            |_, cols, dots, x| {
                kernels.axpy(1.0, dots, x);
                kernels.axpy(1.0, &linear.bias[cols], x);
            },
        )
    }

    /// `y = ffn(normed)`: the chosen experts of a MoE block, weighted; or the one feed-forward layer of a dense block.
    fn feed_forward(&mut self, model: &Model, block: &Block, n_token: usize) -> Result<()> {
        let config = model.config();
        let (n_embd, n_ff, kernels) = (config.n_embd, config.n_ff(), self.kernels);
        let normed = &self.normed[..n_token * n_embd];
        let (n_used, activation) = match &block.ffn.router {
            Some(router) => {
                let n_used = config.n_expert_used;
                self.routing.route(&mut self.team, kernels, router, normed, n_embd, n_used);
                (n_used, config.expert_activation)
            }
            None => {
                self.routing.dense(n_token);
                (1, config.dense_activation)
            }
        };
        let routing = &self.routing;
        let groups = Groups { matrices: &routing.active, row_starts: &routing.row_starts };
        let n_row = n_token * n_used;

        let up = &block.ffn.up;
        self.activations.convert(&mut self.team, &up.weight, normed, n_embd, &up.weight.name)?;
        let hidden = &mut self.hidden[..n_row * n_ff];
        let gelu = match activation {
            Activation::GeluErf => Kernels::gelu_erf,
            Activation::GeluTanh => Kernels::gelu_tanh,
        };
        matmul(
            &mut self.team,
            &mut self.scratch,
            &model.gguf,
            &up.weight,
            &self.activations,
            &groups,
            |row| routing.token_of_row[row],
            hidden,
            |expert, cols, dots, out| {
                add_bias(kernels, up, expert, cols, dots);
                gelu(kernels, dots, out);
            },
        )?;
        let down = &block.ffn.down;
        self.activations.convert(&mut self.team, &down.weight, hidden, n_ff, &down.weight.name)?;
        let expert_out = &mut self.expert_out[..n_row * n_embd];
        project(&mut self.team, &mut self.scratch, kernels, &model.gguf, down, &self.activations, &groups, expert_out)?;

        self.team.for_each_chunk(&mut self.y[..n_token * n_embd], ROWS * n_embd, |chunk, out| {
            for (i, out) in out.chunks_exact_mut(n_embd).enumerate() {
                let choices = (chunk * ROWS + i) * n_used..(chunk * ROWS + i + 1) * n_used;
                out.fill(0.0);
                for choice in choices {
                    let row = routing.row_of_choice[choice];
                    kernels.axpy(routing.weights[choice], &expert_out[row * n_embd..(row + 1) * n_embd], out);
                }
            }
        });
        Ok(())
    }
}

/// `out = x · weight + bias`, row for row.
fn project(
    team: &mut Team,
    scratch: &mut [Scratch],
    kernels: &Kernels,
    gguf: &Gguf,
    linear: &Linear,
    x: &Activations,
    groups: &Groups<'_>,
    out: &mut [f32],
) -> Result<()> {
    matmul(
        team,
        scratch,
        gguf,
        &linear.weight,
        x,
        groups,
        |row| row,
        out,
        |matrix, cols, dots, out| {
            add_bias(kernels, linear, matrix, cols, dots);
            out.copy_from_slice(dots);
        },
    )
}

/// Adds the bias of columns `cols`, where there is one.
fn add_bias(kernels: &Kernels, linear: &Linear, matrix: usize, cols: std::ops::Range<usize>, dots: &mut [f32]) {
    let bias = linear.bias_of(matrix);
    if !bias.is_empty() {
        kernels.axpy(1.0, &bias[cols], dots);
    }
}
