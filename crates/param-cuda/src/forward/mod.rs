//! Many rows of tokens through a model: prompts, and batches of sequences that go on by one token each. All work is queued on a stream,
//! in grids that depend only on how many rows there are, so that a stream can record it.

mod attention;
mod norm;
mod product;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::args;
use crate::caches::Caches;
use crate::device_model::DeviceModel;
use crate::error::Result;
use crate::kernel::{Arg, Grid, Kernel, Module};
use crate::memory::Buffer;
use crate::model::{Block, Format, Matrix, Norm};
use crate::stream::Stream;
use attention::{Attention, AttentionArgs, QUERIES, Span};
use norm::{MAX_ENTRY, MAX_EXPERT, MAX_USED, NormArgs};
#[cfg(test)]
use product::Plan;
use product::{EXPAND_ROWS, Element, MAX_SPLIT, Output, Product, Products};

/// A token at a place in a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Below n_vocab.
    pub token: u32,
    /// Below the caches' n_ctx. All positions before it are in the cache, or are rows before this one.
    pub position: u32,
    /// Which of the caches; [`Row::NO_SEQUENCE`] for a row that only fills up a batch.
    pub sequence: u32,
}

impl Row {
    /// The sequence of a row that only fills up a batch: it changes nothing, and its logits mean nothing.
    pub const NO_SEQUENCE: u32 = u32::MAX;
    /// Such a row.
    pub const PADDING: Row = Row { token: 0, position: 0, sequence: Row::NO_SEQUENCE };
}

/// A forward pass of up to a certain number of rows at a time.
#[derive(Debug)]
pub struct Forward {
    id: u64,
    model: Arc<DeviceModel>,
    caches: Arc<Caches>,
    products: Products,
    attention: Attention,
    embed: Kernel,
    layer_norm: Kernel,
    group: Kernel,
    n_row_max: usize,
    n_logits_max: usize,
    stride: u32,
    stride_ff: u32,
    n_row: u32,
    n_span: u32,
    n_logits: u32,
    /// What the last product left in `y` to be added to each row of the residual stream; 0: nothing.
    n_part: u32,
    // Tokens, positions, slots, rows whose logits are wanted: [3 n_row_max + n_logits_max]; spans apart, which decoding has no use for.
    rows: Buffer<u32>,
    spans: Buffer<Span>,
    x: Buffer<f32>,       // [n_row_max, stride]
    h: [Buffer<u8>; 3],   // normalised, by element: [n_row_max, stride]; empty where no matrix wants it
    q: Buffer<f32>,       // [n_row_max, stride]
    attended: Buffer<u8>, // [n_row_max, stride]
    hidden: Buffer<u8>,   // [n_row_max * n_used, stride_ff]
    y: Buffer<f32>,       // [n_row, n_part, stride]
    choices: Buffer<u32>, // [n_row_max, n_used]
    weights: Buffer<f32>, // [n_row_max, n_used]
    offsets: Buffer<u32>, // [n_expert + 1]
    list: Buffer<u32>,    // [n_row_max, n_used]
    logits: Buffer<f32>,  // [n_logits_max, n_vocab]
    not_finite: Buffer<u32>,
    arrived: Buffer<u32>,
}

const WHAT: &str = "activations";
/// Rows up to which there is room for sums that are split into the most parts.
const SPLIT_ROWS: usize = 256;

impl Forward {
    /// For up to `n_row_max` rows at a time, of which up to `n_logits_max` want logits.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::Call`], [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// For a head size that is no multiple of 8 up to 256, more than 256 experts or 32 choices.
    pub fn new(
        model: &Arc<DeviceModel>,
        caches: &Arc<Caches>,
        n_row_max: usize,
        n_logits_max: usize,
    ) -> Result<Forward> {
        let gpu = model.gpu();
        let m = model.model();
        assert!(m.n_expert <= MAX_EXPERT && m.n_used <= MAX_USED, "{} of {} experts", m.n_used, m.n_expert);
        let placed = |matrix: &&Matrix| matrix.data != 0;
        let matrices: Vec<&Matrix> = model
            .blocks()
            .iter()
            .flat_map(|b| [&b.q, &b.k, &b.v, &b.out, &b.up, &b.down])
            .chain([&m.head])
            .filter(placed)
            .collect();
        let formats = || matrices.iter().map(|matrix| Format::of(matrix));
        let any = |element| formats().any(|format| format.element() == element);
        let bytes = if any(Element::F32) { 4 } else { 2 };

        let n_choice = m.n_used.max(1) as usize;
        let (stride, stride_ff) = (m.n_embd.next_multiple_of(32), m.n_ff.next_multiple_of(32));
        let n_embd = n_row_max * stride as usize;
        let n_hidden = n_row_max * n_choice * stride_ff as usize;
        let n_normalised = n_row_max.max(n_logits_max) * stride as usize;
        let h = |element: Element| gpu.alloc::<u8>(WHAT, if any(element) { n_normalised * element.bytes() } else { 0 });
        // The largest of what is unpacked at a time, if there are ever so many rows.
        let elements = |matrix: &Matrix, n: u32| n as usize * matrix.n_row as usize * matrix.n_col as usize;
        let n_expanded = model.blocks().iter().flat_map(|b| {
            let n = if b.router != 0 { m.n_expert } else { 1 };
            [elements(&b.q, 3), elements(&b.up, n), elements(&b.down, n)]
        });
        let n_expanded = if n_row_max >= EXPAND_ROWS as usize { n_expanded.max().unwrap_or(0) } else { 0 };
        let split = n_row_max.min(SPLIT_ROWS) * MAX_SPLIT as usize;
        let module = |ptx| Module::load(gpu, ptx);
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Ok(Forward {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            products: Products::new(gpu, formats(), n_expanded)?,
            attention: Attention::new(gpu, m)?,
            embed: module(include_str!("../../ptx/embed.ptx"))?.kernel("embed")?,
            layer_norm: module(include_str!("../../ptx/norm.ptx"))?.kernel("layer_norm")?,
            group: module(include_str!("../../ptx/group.ptx"))?.kernel("group_by_expert")?,
            n_row_max,
            n_logits_max,
            stride,
            stride_ff,
            n_row: 0,
            n_span: 0,
            n_logits: 0,
            n_part: 0,
            rows: gpu.alloc(WHAT, 3 * n_row_max + n_logits_max)?,
            spans: gpu.alloc(WHAT, n_row_max)?,
            x: gpu.alloc(WHAT, n_embd)?,
            h: [h(Element::F32)?, h(Element::F16)?, h(Element::Bf16)?],
            q: gpu.alloc(WHAT, n_embd)?,
            attended: gpu.alloc(WHAT, n_embd * bytes)?,
            hidden: gpu.alloc(WHAT, n_hidden * bytes)?,
            y: gpu.alloc(WHAT, n_row_max.max(split) * n_choice * stride as usize)?,
            choices: gpu.alloc(WHAT, n_row_max * n_choice)?,
            weights: gpu.alloc(WHAT, n_row_max * n_choice)?,
            offsets: gpu.alloc(WHAT, m.n_expert as usize + 1)?,
            list: gpu.alloc(WHAT, n_row_max * n_choice)?,
            logits: gpu.alloc(WHAT, n_logits_max * m.n_vocab as usize)?,
            not_finite: gpu.alloc(WHAT, 1)?,
            arrived: gpu.alloc(WHAT, 1)?,
            model: Arc::clone(model),
            caches: Arc::clone(caches),
        })
    }

    /// What the passes that follow run on: `rows`, and of which of them logits are wanted. A sequence's rows lie together in the order
    /// of their positions. Waits for what the GPU was given before; a recorded pass may be launched again after a call with as many
    /// rows, if either every row is one of another sequence both times, or spans are the same.
    ///
    /// # Errors
    /// [`crate::Error::Call`].
    ///
    /// # Panics
    /// For more rows than there is room for, and tokens, positions or sequences that do not exist.
    pub fn set_rows(&mut self, rows: &[Row], logits: &[u32]) -> Result<()> {
        let (n, m, caches) = (self.n_row_max, self.model.model(), self.caches.table());
        assert!(!rows.is_empty() && rows.len() <= n, "{} rows of at most {n}", rows.len());
        assert!(logits.len() <= self.n_logits_max, "logits of {} rows", logits.len());
        for row in rows.iter().filter(|row| row.sequence != Row::NO_SEQUENCE) {
            let fits =
                row.token < m.n_vocab && row.position < caches.n_ctx.min(m.n_ctx) && row.sequence < caches.n_sequence;
            assert!(fits, "{row:?}");
        }
        assert!(logits.iter().all(|&row| (row as usize) < rows.len()), "logits of rows that are not there");
        let mut packed = vec![0; 3 * n + self.n_logits_max];
        for (i, row) in rows.iter().enumerate() {
            (packed[i], packed[n + i], packed[2 * n + i]) = (row.token, row.position, row.sequence);
        }
        packed[3 * n..][..logits.len()].copy_from_slice(logits);
        self.rows.write(0, &packed)?;
        let spans = spans(rows);
        if spans.len() < rows.len() {
            self.spans.write(0, &spans)?;
        }
        (self.n_row, self.n_span, self.n_logits) = (rows.len() as u32, spans.len() as u32, logits.len() as u32);
        self.n_part = 0;
        Ok(())
    }

    /// Of which of the rows the next [`Forward::head`] gives logits. Waits for what the GPU was given before.
    ///
    /// # Errors
    /// [`crate::Error::Call`].
    ///
    /// # Panics
    /// As [`Forward::set_rows`].
    pub fn set_logits(&mut self, rows: &[u32]) -> Result<()> {
        assert!(rows.len() <= self.n_logits_max, "logits of {} rows", rows.len());
        assert!(rows.iter().all(|&row| row < self.n_row), "logits of rows that are not there");
        self.rows.write(3 * self.n_row_max, rows)?;
        self.n_logits = rows.len() as u32;
        Ok(())
    }

    /// The residual stream, [n_row_max, stride]: complete after [`Forward::embed`], [`Forward::attention_part`] and
    /// [`Forward::ffn_part`]; each of them, and what follows, begins with what it holds.
    pub fn x(&mut self) -> &mut Buffer<f32> {
        &mut self.x
    }

    /// Elements from one row of [`Forward::x`] to the next: n_embd rounded up to a multiple of 32, the rest zero.
    pub fn stride(&self) -> usize {
        self.stride as usize
    }

    /// What [`Forward::head`] gives: [n_logits_max, n_vocab].
    pub fn logits(&self) -> &Buffer<f32> {
        &self.logits
    }

    /// Which of all passes there ever were this is.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Becomes 1 if a row of the residual stream is not finite; stays so until it is written.
    pub fn not_finite(&mut self) -> &mut Buffer<u32> {
        &mut self.not_finite
    }

    /// A whole pass over the rows: all blocks, and logits where wanted.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    pub fn run(&mut self, stream: &Stream) -> Result<()> {
        self.embed(stream)?;
        self.blocks(stream, 0..self.model.blocks().len())?;
        self.head(stream)
    }

    /// Begins: the residual stream becomes embeddings.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    pub fn embed(&mut self, stream: &Stream) -> Result<()> {
        let m = self.model.model();
        self.n_part = 0;
        let grid = Grid { blocks: [self.n_row, 1, 1], threads: 256, shared: 0 };
        let (token, position) = (Arg::value(m.token_embd), m.position_embd);
        let args = args![token, position, self.at(0), self.at(1), self.at(2), self.x, m.n_embd, self.stride];
        // SAFETY: the kernel's arguments; tokens and positions were checked to exist, and buffers have room for all rows.
        unsafe { self.embed.launch(stream, grid, &args) }
    }

    /// Some blocks one after the other. What the last one adds to the residual stream is added by whatever comes next:
    /// [`Forward::blocks`], [`Forward::attention_part`] or [`Forward::head`].
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// If one of the blocks has no weights on the GPU.
    pub fn blocks(&mut self, stream: &Stream, blocks: Range<usize>) -> Result<()> {
        for i in blocks {
            self.attend(stream, i)?;
            self.feed_forward(stream, i)?;
        }
        Ok(())
    }

    /// The first half of a block.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// If the block has no weights on the GPU.
    pub fn attention_part(&mut self, stream: &Stream, i: usize) -> Result<()> {
        self.attend(stream, i)?;
        self.settle(stream)
    }

    /// The second half of a block.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// If the feed-forward layer has no weights on the GPU.
    pub fn ffn_part(&mut self, stream: &Stream, i: usize) -> Result<()> {
        self.feed_forward(stream, i)?;
        self.settle(stream)
    }

    /// Logits of the rows that [`Forward::set_rows`] was told.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    pub fn head(&mut self, stream: &Stream) -> Result<()> {
        if self.n_logits == 0 {
            return Ok(());
        }
        let m = *self.model.model();
        let element = Format::of(&m.head).element();
        let mut norm = self.norm(m.output_norm, &[&m.head]);
        norm.rows = self.at(3);
        self.normalise(stream, norm, self.n_logits)?;
        let product = Product {
            input: self.h[element as usize].address(),
            output: self.logits.address(),
            n_row: self.n_logits,
            output_stride: m.n_vocab,
            ..self.product(&[m.head])
        };
        // SAFETY: normalised rows go in, and logits have room for as many.
        unsafe { self.products.launch(stream, product, 1, 0) }?;
        Ok(())
    }

    /// Array `i` of `rows`.
    fn at(&self, i: usize) -> u64 {
        self.rows.address() + (i * self.n_row_max * 4) as u64
    }

    /// The arguments that all products share.
    fn product(&self, w: &[Matrix]) -> Product {
        let m = self.model.model();
        let mut matrices = [w[0]; 3];
        matrices[..w.len()].copy_from_slice(w);
        Product {
            w: matrices,
            slots: self.at(2),
            positions: self.at(1),
            caches: self.caches.table(),
            input_stride: self.stride,
            output_stride: self.stride,
            n_row: self.n_row,
            n_expert: m.n_expert,
            n_used: m.n_used.max(1),
            n_split: 1,
            n_head: m.n_head,
            head_dim: m.head_dim,
            cache_f32: m.cache_f32,
            ..Product::default()
        }
    }

    /// Normalisation of all rows for products with `consumers`, after what is pending was added.
    fn norm(&self, norm: Norm, consumers: &[&Matrix]) -> NormArgs {
        let m = self.model.model();
        let for_element = |element: Element| {
            let wanted = consumers.iter().any(|matrix| Format::of(matrix).element() == element);
            if wanted { self.h[element as usize].address() } else { 0 }
        };
        NormArgs {
            x: self.x.address(),
            y: if self.n_part > 0 { self.y.address() } else { 0 },
            slots: self.at(2),
            norm,
            f32: for_element(Element::F32),
            f16: for_element(Element::F16),
            bf16: for_element(Element::Bf16),
            choices: self.choices.address(),
            weights: self.weights.address(),
            not_finite: self.not_finite.address(),
            offsets: self.offsets.address(),
            list: self.list.address(),
            n_embd: m.n_embd,
            stride: self.stride,
            n_part: self.n_part,
            n_expert: m.n_expert,
            n_used: m.n_used,
            eps: m.norm_eps,
            ..NormArgs::default()
        }
    }

    fn normalise(&self, stream: &Stream, norm: NormArgs, n_row: u32) -> Result<()> {
        let grid = Grid { blocks: [n_row, 1, 1], threads: norm::THREADS, shared: norm.n_embd * 4 };
        // SAFETY: the kernel's argument; rows were checked to exist, and buffers have room for all of them.
        unsafe { self.layer_norm.launch(stream, grid, &[Arg::value(norm)]) }
    }

    /// Adds what is pending, so that the residual stream is complete.
    fn settle(&mut self, stream: &Stream) -> Result<()> {
        if self.n_part > 0 {
            self.normalise(stream, self.norm(Norm::default(), &[]), self.n_row)?;
            self.n_part = 0;
        }
        Ok(())
    }

    /// Matrices in each stack of a feed-forward layer.
    fn n_matrix(&self, block: &Block) -> u32 {
        if block.router != 0 { self.model.model().n_expert } else { 1 }
    }

    fn weights_of(&self, i: usize) -> Block {
        let block = self.model.blocks()[i];
        assert!(block.q.data != 0, "block {i} is not on the GPU");
        block
    }

    fn attend(&mut self, stream: &Stream, i: usize) -> Result<()> {
        let block = self.weights_of(i);
        let m = *self.model.model();
        let mut norm = self.norm(block.norm1, &[&block.q, &block.k, &block.v]);
        norm.ahead = norm::ahead(self.n_row, &[(block.out, 1), (block.up, self.n_matrix(&block))]);
        self.normalise(stream, norm, self.n_row)?;
        self.n_part = 0;

        let qkv = [block.q, block.k, block.v];
        // One launch for those next to each other that are stored alike.
        let mut first = 0;
        for w in qkv.chunk_by(|a, b| a.format == b.format) {
            let product = Product {
                input: self.h[Format::of(&w[0]).element() as usize].address(),
                output: self.q.address(),
                output_kind: Output::Qkv as u32,
                first_matrix: first,
                layer: i as u32,
                ..self.product(w)
            };
            // SAFETY: normalised rows go in; queries and caches have room for all rows.
            unsafe { self.products.launch(stream, product, w.len() as u32, 0) }?;
            first += w.len() as u32;
        }

        let element = Format::of(&block.out).element();
        let attention = AttentionArgs {
            q: self.q.address(),
            output: self.attended.address(),
            slots: self.at(2),
            positions: self.at(1),
            spans: self.spans.address(),
            caches: self.caches.table(),
            stride: self.stride,
            element: element as u32,
            layer: i as u32,
            n_head: m.n_head,
            head_dim: m.head_dim,
            unused: 0,
        };
        // SAFETY: as above; spans are those of the rows.
        unsafe { self.attention.launch(stream, attention, self.n_row, self.n_span) }?;

        let product =
            Product { input: self.attended.address(), output: self.y.address(), ..self.product(&[block.out]) };
        // SAFETY: as above; the launch keeps to y's length.
        self.n_part = unsafe { self.products.launch(stream, product, 1, self.y.len()) }?;
        Ok(())
    }

    fn feed_forward(&mut self, stream: &Stream, i: usize) -> Result<()> {
        let block = self.weights_of(i);
        assert!(block.up.data != 0, "the feed-forward layer of block {i} is not on the GPU");
        let m = *self.model.model();
        let is_moe = block.router != 0;
        let n_choice = if is_moe { m.n_used } else { 1 };
        let n_entry = self.n_row * n_choice;
        let element = Format::of(&block.down).element();
        let mut up = Product {
            input: self.h[Format::of(&block.up).element() as usize].address(),
            output: self.hidden.address(),
            choices: if is_moe { self.choices.address() } else { 0 },
            output_stride: self.stride_ff,
            n_row: n_entry,
            gathers: u32::from(is_moe),
            output_kind: Output::Activated as u32,
            activation: if is_moe { m.expert_activation } else { m.dense_activation },
            element: element as u32,
            ..self.product(&[block.up])
        };
        let mut down = Product {
            input: self.hidden.address(),
            output: self.y.address(),
            choices: up.choices,
            weights: if is_moe { self.weights.address() } else { 0 },
            input_stride: self.stride_ff,
            n_row: n_entry,
            ..self.product(&[block.down])
        };
        let room = self.y.len();
        let must_group = is_moe && !(self.products.finds_rows(&up, 0) && self.products.finds_rows(&down, room));

        let mut norm = self.norm(block.norm2, &[&block.up]);
        (norm.router, norm.selection_bias) = (block.router, block.selection_bias);
        let mut soon = vec![(block.down, self.n_matrix(&block))];
        if let Some(next) = self.model.blocks().get(i + 1) {
            soon.extend([next.q, next.k, next.v, next.out].map(|matrix| (matrix, 1)));
        }
        norm.ahead = norm::ahead(self.n_row, &soon);
        if must_group && n_entry <= MAX_ENTRY {
            norm.arrived = self.arrived.address();
        }
        self.normalise(stream, norm, self.n_row)?;
        self.n_part = 0;

        if must_group {
            if norm.arrived == 0 {
                let grid = Grid { blocks: [m.n_expert, 1, 1], threads: 256, shared: 0 };
                let args = args![self.choices, n_entry, m.n_expert, self.offsets, self.list];
                // SAFETY: the kernel's arguments; choices were just made, at most n_entry of them are listed.
                unsafe { self.group.launch(stream, grid, &args) }?;
            }
            for product in [&mut up, &mut down] {
                product.choices = 0;
                (product.offsets, product.list) = (self.offsets.address(), self.list.address());
            }
        }
        // SAFETY: normalised rows go in; `hidden` has room for every choice of every row.
        unsafe { self.products.launch(stream, up, 1, 0) }?;
        // SAFETY: as above; the launch keeps to y's length.
        let n_split = unsafe { self.products.launch(stream, down, 1, room) }?;
        self.n_part = n_choice * n_split;
        Ok(())
    }
}

/// Runs of rows of one sequence at consecutive positions, of at most as many as a tile of queries has.
fn spans(rows: &[Row]) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        match spans.last_mut() {
            Some(span)
                if span.slot == row.sequence
                    && row.sequence != Row::NO_SEQUENCE
                    && span.position + span.n_row == row.position
                    && span.n_row < QUERIES =>
            {
                span.n_row += 1;
            }
            _ => spans.push(Span { row: i as u32, n_row: 1, slot: row.sequence, position: row.position }),
        }
    }
    spans
}

#[cfg(test)]
mod tests;
