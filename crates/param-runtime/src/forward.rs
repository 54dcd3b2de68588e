//! The forward pass over one batch of tokens, of one sequence or of several: a plain loop over the blocks, each step run by the
//! whole team.

use std::ops::Range;

use param_kernels::{Kernels, QUERY_TILE, Team};

use crate::activations::{Activations, ROWS};
use crate::candidates::Best;
use crate::error::{Error, FirstError, Result, resize, zeroed};
use crate::feed_forward::feed_forward;
use crate::kv_cache::KvCache;
use crate::matmul::{MAX_STRIP, project};
use crate::model::Model;
use crate::routing::Routing;
use crate::scratch::Scratch;
use crate::trace::{Observer, Point, Trace};
use crate::weights::{Block, Matrix, Norm};

/// Consecutive tokens of a sequence within a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    /// Which cache is theirs.
    pub sequence: usize,
    /// Tokens of the sequence before them.
    pub n_past: usize,
    /// Their rows in the batch: from here up to the next span.
    pub first_row: usize,
}

/// Buffers of a forward pass, and the threads that fill them.
pub(crate) struct Forward {
    team: Team,
    kernels: &'static Kernels,
    n_batch: usize,
    scratch: Vec<Scratch>, // [n_thread]
    routing: Routing,
    x: Vec<f32>,             // [n_batch, n_embd] residual stream
    y: Vec<f32>,             // [n_batch, n_embd] output of attention or feed-forward, not yet added to it
    qkv: Vec<f32>,           // [3, n_token, n_embd]
    normed: Activations,     // [n_batch, n_embd]
    attended: Activations,   // [n_batch, n_embd]
    hidden: Activations,     // [n_batch * n_used, n_ff]
    logits: Vec<f32>,        // [n_row, n_vocab]
    best: Vec<Best>,         // [n_row]
    tile_starts: Vec<usize>, // first row of each tile of queries, and where the last one ends
    tile_spans: Vec<usize>,  // the span of each
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
        let buffer = |rows: usize| zeroed(WHAT, rows.saturating_mul(config.n_embd));
        let team = Team::new(n_thread);
        Ok(Forward {
            scratch: (0..team.n_thread()).map(|_| Scratch::new(config.head_dim())).collect(),
            team,
            kernels: Kernels::get(),
            n_batch,
            routing: Routing::new(n_batch, config.n_expert, n_used)?,
            x: buffer(n_batch)?,
            y: buffer(n_batch)?,
            qkv: buffer(n_batch.saturating_mul(3))?,
            normed: Activations::default(),
            attended: Activations::default(),
            hidden: Activations::default(),
            logits: Vec::new(),
            best: Vec::new(),
            tile_starts: Vec::new(),
            tile_spans: Vec::new(),
        })
    }

    /// Threads at work.
    pub fn n_thread(&self) -> usize {
        self.team.n_thread()
    }

    /// Runs `tokens`, cut into `spans` in order of their rows, through the blocks. Leaves the residual stream for
    /// [`Forward::head`].
    pub fn run(
        &mut self,
        model: &Model,
        caches: &mut [KvCache],
        spans: &[Span],
        tokens: &[u32],
        mut observer: Observer<'_, '_>,
    ) -> Result<()> {
        let config = model.config();
        let n = tokens.len() * config.n_embd;
        self.begin(model, spans, tokens)?;
        // Reborrowed by hand: `as_deref_mut` would tie the observer's own lifetime to the call.
        let lent = observer.as_mut().map(|o| &mut **o as &mut dyn FnMut(Trace<'_>));
        self.blocks(model, caches, spans, tokens.len(), 0..config.n_layer, lent)?;
        if observer.is_some() {
            show(&mut observer, Point::Out(config.n_layer - 1), &self.x[..n]);
            self.norm(&model.output_norm, config.norm_eps, tokens.len(), false, model.head())?;
            show(&mut observer, Point::FinalNorm, &self.normed.floats[..n]);
        }
        Ok(())
    }

    /// Makes the embeddings of `tokens` the residual stream, which blocks then run on.
    pub fn begin(&mut self, model: &Model, spans: &[Span], tokens: &[u32]) -> Result<()> {
        self.embed(model, spans, tokens)?;
        self.cut_queries(spans, tokens.len());
        Ok(())
    }

    /// Runs some consecutive blocks on the residual stream.
    pub fn blocks(
        &mut self,
        model: &Model,
        caches: &mut [KvCache],
        spans: &[Span],
        n_token: usize,
        blocks: Range<usize>,
        mut observer: Observer<'_, '_>,
    ) -> Result<()> {
        let config = model.config();
        let n = n_token * config.n_embd;
        if blocks.is_empty() {
            return Ok(());
        }
        for i in blocks.clone() {
            let block = &model.blocks[i];
            let is_first = i == blocks.start;
            self.norm(&block.norm1, config.norm_eps, n_token, !is_first, &block.q.weight)?;
            show(&mut observer, if i == 0 { Point::Embed } else { Point::Out(i - 1) }, &self.x[..n]);
            self.attention(model, block, i, caches, spans, n_token)?;
            self.norm(&block.norm2, config.norm_eps, n_token, true, &block.ffn.up.weight)?;
            show(&mut observer, Point::AfterAttention(i), &self.x[..n]);
            show(&mut observer, Point::Norm2(i), &self.normed.floats[..n]);
            self.feed_forward(model, block, n_token)?;
            if let (Some(_), Some(observer)) = (&block.ffn.router, &mut observer) {
                let Routing { logits, experts, weights, .. } = &self.routing;
                observer(Trace::Routing {
                    block: i,
                    logits: &logits[..n_token * config.n_expert],
                    experts: &experts[..n_token * config.n_expert_used],
                    weights: &weights[..n_token * config.n_expert_used],
                });
            }
            show(&mut observer, Point::Ffn(i), &self.y[..n]);
        }
        self.add(n);
        Ok(())
    }

    /// Runs the feed-forward layer of one block on the residual stream.
    pub fn ffn(&mut self, model: &Model, block: usize, n_token: usize) -> Result<()> {
        let config = model.config();
        let block = &model.blocks[block];
        self.norm(&block.norm2, config.norm_eps, n_token, false, &block.ffn.up.weight)?;
        self.feed_forward(model, block, n_token)?;
        self.add(n_token * config.n_embd);
        Ok(())
    }

    /// Adds the first `n` of `y` to the residual stream.
    fn add(&mut self, n: usize) {
        let (y, kernels, chunk) = (&self.y, self.kernels, ROWS * self.x.len() / self.n_batch);
        self.team.for_each_chunk(&mut self.x[..n], chunk, |i, x| {
            kernels.axpy(1.0, &y[i * chunk..i * chunk + x.len()], x);
        });
    }

    /// The residual stream, [n_batch, n_embd].
    pub fn residual(&mut self) -> &mut [f32] {
        &mut self.x
    }

    /// Logits of rows `rows` of the batch just run, written from row `at` of the logits buffer on, and for each the `n_best` largest
    /// of them, picked as they are computed.
    pub fn head(&mut self, model: &Model, rows: &[usize], at: usize, n_best: usize) -> Result<()> {
        let config = model.config();
        let (n_embd, n_vocab, head) = (config.n_embd, config.n_vocab, model.head());
        let step = NormStep::new(&model.output_norm, config.norm_eps, "the logits");
        let x = &self.x;
        let none = (&mut [] as &mut [()], 0);
        self.normed.fill(&mut self.team, head, rows.len(), n_embd, none, step.what, |first, _, out| {
            for (&row, out) in rows[first..].iter().zip(out.chunks_exact_mut(n_embd)) {
                step.run(&x[row * n_embd..(row + 1) * n_embd], out);
            }
        })?;
        step.failure.into_result()?;
        resize("the logits", &mut self.logits, (at + rows.len()).saturating_mul(n_vocab))?;
        for scratch in &mut self.scratch {
            scratch.best.resize(rows.len(), Best::default());
            scratch.best.iter_mut().for_each(|best| best.reset(n_best));
        }
        let failure = FirstError::default();
        let (normed, logits) = (&self.normed, &mut self.logits[at * n_vocab..]);
        self.team.for_each_tile(
            &mut self.scratch,
            logits,
            n_vocab,
            &[0, rows.len()],
            MAX_STRIP,
            |scratch, mut tile| {
                let (rows, cols) = (tile.rows(), tile.cols());
                for first in rows.clone().step_by(head.max_rows()) {
                    scratch.rows.clear();
                    scratch.rows.extend(first..rows.end.min(first + head.max_rows()));
                    let products = &mut scratch.products;
                    failure.keep(head.multiply(&model.gguf, 0, cols.clone(), normed, &scratch.rows, products));
                    for (i, &row) in scratch.rows.iter().enumerate() {
                        let logits = products.row_mut(i);
                        scratch.best[row].add(cols.start, logits);
                        tile.row_mut(row).copy_from_slice(logits);
                    }
                }
            },
        );
        failure.into_result()?;
        self.best.resize(at + rows.len(), Best::default());
        for (row, best) in self.best[at..].iter_mut().enumerate() {
            best.reset(n_best);
            self.scratch.iter().for_each(|scratch| best.merge(&scratch.best[row]));
        }
        Ok(())
    }

    /// What [`Forward::head`] wrote: [n_row, n_vocab].
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// The largest logits of each row.
    pub fn best(&self) -> &[Best] {
        &self.best
    }

    /// Token plus position embedding into the residual stream.
    fn embed(&mut self, model: &Model, spans: &[Span], tokens: &[u32]) -> Result<()> {
        let n_embd = model.config().n_embd;
        let rows = self.x.chunks_exact_mut(n_embd).zip(self.y.chunks_exact_mut(n_embd));
        let mut next = 0;
        let mut span = Span { sequence: 0, n_past: 0, first_row: 0 };
        for ((i, &token), (x, position)) in tokens.iter().enumerate().zip(rows) {
            if spans.get(next).is_some_and(|span| span.first_row == i) {
                (span, next) = (spans[next], next + 1);
            }
            model.token_embd.read_row(&model.gguf, token as usize, x)?;
            model.position_embd.read_row(&model.gguf, span.n_past + i - span.first_row, position)?;
            self.kernels.axpy(1.0, position, x);
        }
        Ok(())
    }

    /// Tiles of queries, none of which reaches over two spans.
    fn cut_queries(&mut self, spans: &[Span], n_token: usize) {
        self.tile_starts.clear();
        self.tile_spans.clear();
        for (i, span) in spans.iter().enumerate() {
            let end = spans.get(i + 1).map_or(n_token, |next| next.first_row);
            for start in (span.first_row..end).step_by(QUERY_TILE) {
                self.tile_starts.push(start);
                self.tile_spans.push(i);
            }
        }
        self.tile_starts.push(n_token);
    }

    /// Adds `y` to the residual stream, if it is to be added, and normalises that into `normed`, ready for `weights`.
    fn norm(&mut self, norm: &Norm, eps: f32, n_row: usize, add: bool, weights: &Matrix) -> Result<()> {
        let n_embd = norm.scale.len();
        let step = NormStep::new(norm, eps, &weights.name);
        let (y, kernels) = (&self.y, self.kernels);
        let x = (&mut self.x[..n_row * n_embd], n_embd);
        self.normed.fill(&mut self.team, weights, n_row, n_embd, x, step.what, |first, x, out| {
            if add {
                kernels.axpy(1.0, &y[first * n_embd..first * n_embd + x.len()], x);
            }
            step.run(x, out);
        })?;
        step.failure.into_result()
    }

    /// `y = attention(normed)`.
    fn attention(
        &mut self,
        model: &Model,
        block: &Block,
        index: usize,
        caches: &mut [KvCache],
        spans: &[Span],
        n_token: usize,
    ) -> Result<()> {
        let config = model.config();
        let (n_embd, head_dim, kernels) = (config.n_embd, config.head_dim(), self.kernels);
        let n = n_token * n_embd;
        let qkv = [&block.q, &block.k, &block.v];
        let form = block.q.weight.form();
        if qkv.iter().all(|linear| linear.weight.form() == form) {
            let starts = [0, n_token, 2 * n_token, 3 * n_token];
            project(
                &mut self.team,
                &mut self.scratch,
                &model.gguf,
                &qkv,
                &self.normed,
                &starts,
                &mut self.qkv[..3 * n],
            )?;
        } else {
            for (linear, out) in qkv.into_iter().zip(self.qkv.chunks_exact_mut(n)) {
                self.normed.convert(&mut self.team, &linear.weight, n_token, &linear.weight.name)?;
                project(&mut self.team, &mut self.scratch, &model.gguf, &[linear], &self.normed, &[0, n_token], out)?;
            }
        }
        let (q, kv) = self.qkv[..3 * n].split_at(n);
        let (k, v) = kv.split_at(n);
        for (i, span) in spans.iter().enumerate() {
            let end = spans.get(i + 1).map_or(n_token, |next| next.first_row);
            let rows = span.first_row * n_embd..end * n_embd;
            caches[span.sequence].store(&mut self.team, index, span.n_past, &k[rows.clone()], &v[rows]);
        }

        let (scale, caches, tile_spans) = (1.0 / (head_dim as f32).sqrt(), &*caches, &self.tile_spans);
        let attended = self.attended.floats_mut(n_token, n_embd)?;
        self.team.for_each_tile(
            &mut self.scratch,
            attended,
            n_embd,
            &self.tile_starts,
            head_dim,
            |scratch, mut tile| {
                let (rows, cols, span) = (tile.rows(), tile.cols(), spans[tile_spans[tile.group()]]);
                let queries = &mut scratch.queries[..rows.len() * head_dim];
                for (row, query) in rows.clone().zip(queries.chunks_exact_mut(head_dim)) {
                    let q = &q[row * n_embd..(row + 1) * n_embd][cols.clone()];
                    for (query, q) in query.iter_mut().zip(q) {
                        *query = q * scale;
                    }
                }
                let out = &mut scratch.attended[..rows.len() * head_dim];
                let n_past = span.n_past + rows.start - span.first_row;
                let head = cols.start / head_dim;
                if rows.len() == 1 {
                    // What the next task reads, unless another thread takes it: heads lie far apart in memory.
                    caches[span.sequence].prefetch(index, head + 1);
                }
                caches[span.sequence].attend(kernels, index, head, n_past, queries, &mut scratch.keys_values, out);
                for (row, out) in rows.zip(out.chunks_exact(head_dim)) {
                    tile.row_mut(row).copy_from_slice(out);
                }
            },
        );
        let linear = &block.out;
        self.attended.convert(&mut self.team, &linear.weight, n_token, &linear.weight.name)?;
        let y = &mut self.y[..n];
        project(&mut self.team, &mut self.scratch, &model.gguf, &[linear], &self.attended, &[0, n_token], y)
    }

    /// `y = ffn(normed)`: the chosen experts of a MoE block, weighted; or the one feed-forward layer of a dense block.
    fn feed_forward(&mut self, model: &Model, block: &Block, n_token: usize) -> Result<()> {
        let config = model.config();
        let activation = match &block.ffn.router {
            Some(router) => {
                let x = &self.normed.floats[..n_token * config.n_embd];
                let n_used = config.n_expert_used;
                self.routing.route(&mut self.team, self.kernels, router, x, config.n_embd, n_used);
                config.expert_activation
            }
            None => {
                self.routing.dense(n_token);
                config.dense_activation
            }
        };
        feed_forward(
            &mut self.team,
            &mut self.scratch,
            &model.gguf,
            &block.ffn,
            activation,
            &self.routing,
            &self.normed,
            &mut self.hidden,
            &mut self.y[..n_token * config.n_embd],
        )
    }
}

/// LayerNorm of some rows, which is also where values that are not finite are noticed: every other result flows into one.
struct NormStep<'a> {
    norm: &'a Norm,
    eps: f32,
    /// What follows, for the error.
    what: &'a str,
    failure: FirstError,
}

impl<'a> NormStep<'a> {
    fn new(norm: &'a Norm, eps: f32, what: &'a str) -> Self {
        NormStep { norm, eps, what, failure: FirstError::default() }
    }

    /// Normalises up to [`ROWS`] rows of `x` into `out`.
    fn run(&self, x: &[f32], out: &mut [f32]) {
        let n_embd = self.norm.scale.len();
        let n_row = x.len() / n_embd;
        let (mut mean, mut rstd) = ([0.0; ROWS], [0.0; ROWS]);
        let (mean, rstd) = (&mut mean[..n_row], &mut rstd[..n_row]);
        Kernels::get().layer_norm(x, &self.norm.scale, &self.norm.shift, self.eps, out, mean, rstd);
        // Of infinite variance the root's inverse is 0, of NaN NaN.
        if let Some(row) = rstd.iter().position(|rstd| rstd.is_nan() || *rstd == 0.0) {
            let row = &x[row * n_embd..(row + 1) * n_embd];
            let index = row.iter().position(|x| !x.is_finite()).unwrap_or(0);
            let what = format!("the input of {}", self.what);
            self.failure.keep(Err(Error::NotFinite { what, index, value: row[index] }));
        }
    }
}
