//! A model on the GPU, with its gradients and moments: what is queued for a step, forward and backward. Nothing waits for the GPU but
//! [`Learner::reports`] and what reads.

use std::collections::HashMap;
use std::sync::Arc;

use super::adamw::{AdamW, Chunks, Flat, Stretch};
use super::attention::{Attention, AttentionInputs};
use super::column_sums::ColumnSums;
use super::convert::Convert;
use super::cross_entropy::CrossEntropy;
use super::dispatch::Dispatch;
use super::dropout::{Dropout, Dropped};
use super::embedding::Embedding;
use super::experts::Experts;
use super::layout::{self, Backward, KeptFfn, Layout, MatrixSpan, Plan, Span, Statistics};
use super::model::{BlockPlaces, FfnPlaces, Model, NormPlaces, Place};
use super::muon::{Muon, MuonMatrix, MuonState};
use super::norm::{Norm, Scores};
use super::numbers::{Numbers, Outcome};
use super::product::{Factor, Groups, Products, Write};
use super::router::{Gathered, Noise, Router, RouterLosses, Scorer};
use super::routing::{Queues, Routed, RoutingShape};
use super::staging::{Report, Staging};
use super::view::{Rows, View};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::memory::{Buffer, Pinned};
use crate::stream::{Event, Graph, Stream};

/// Sites of dropout, as the CPU numbers them.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Site {
    Embedding,
    Attention,
    AttentionOut,
    Expert,
    FfnOut,
}

/// Some sequences to learn from or to evaluate.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Sequences.
    pub n_row: usize,
    /// [n_row, n_col].
    pub ids: &'a [u32],
    /// What follows each, or a negative number where that does not count, [n_row, n_col].
    pub targets: &'a [i32],
    /// Which are real and not padding, [n_row, n_col].
    pub mask: Option<&'a [bool]>,
    /// The first position that each sees, [n_row, n_col].
    pub first: Option<&'a [u32]>,
    /// Draws of the routers' noise, [n_moe, n_row, n_col, n_expert].
    pub normal: Option<&'a [f32]>,
    /// Tokens that an expert takes at most.
    pub capacity: Option<usize>,
}

/// What the optimizers move, and how.
#[derive(Clone, Debug, Default)]
pub struct Optimizer {
    /// What AdamW moves.
    pub stretches: Vec<Stretch>,
    /// What Muon moves, by shape: all within the first `n_muon` elements.
    pub stacks: Vec<MuonStack>,
    /// What stays as it is.
    pub frozen: Vec<Place>,
    /// Elements at the beginning that have Muon's running sums instead of AdamW's moments.
    pub n_muon: usize,
    /// AdamW's.
    pub beta1: f32,
    /// AdamW's.
    pub beta2: f32,
    /// AdamW's.
    pub eps: f32,
    /// Muon's.
    pub momentum: f32,
    /// Muon's, coefficients of `a s + b s^3 + c s^5` one after another.
    pub polynomials: Vec<[f32; 3]>,
    /// Change of a selection bias in a step.
    pub bias_rate: f32,
}

/// Matrices of one shape.
#[derive(Clone, Debug)]
pub struct MuonStack {
    /// Rows and columns.
    pub shape: (usize, usize),
    /// Where they are, and how they are moved.
    pub matrices: Vec<MuonMatrix>,
}

/// Elements of Muon's scratch memory at most, unless a single matrix takes more.
const MUON_SCRATCH: usize = 128 << 20;

/// Elements of Muon's scratch memory: for as many matrices at a time as there is room for.
fn muon_scratch_len(stacks: &[MuonStack]) -> usize {
    let of_stack = |stack: &MuonStack| {
        let one = Muon::scratch_len(1, stack.shape);
        Muon::scratch_len((MUON_SCRATCH / one).clamp(1, stack.matrices.len()), stack.shape)
    };
    stacks.iter().map(of_stack).max().unwrap_or(0)
}

/// What decides which work is queued: a recorded pass serves all batches that agree in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Pass {
    n_row: usize,
    n_col: usize,
    trains: bool,
    has_mask: bool,
    has_first: bool,
    has_noise: bool,
    capacity: Option<usize>,
}

impl Pass {
    fn n_token(self) -> usize {
        self.n_row * self.n_col
    }
}

/// The kernels.
struct Operations {
    products: Products,
    attention: Attention,
    norm: Norm,
    embedding: Embedding,
    cross_entropy: CrossEntropy,
    column_sums: ColumnSums,
    router: Router,
    dispatch: Dispatch,
    experts: Experts,
    dropout: Dropout,
    convert: Convert,
    adamw: AdamW,
    muon: Option<Muon>,
}

/// Gradients and the optimizers' state; nothing of it where a model is only evaluated.
struct Training {
    optimizer: Optimizer,
    grads: Buffer<f32>,  // [n_param]
    sums: Buffer<f32>,   // [n_muon]
    first: Buffer<f32>,  // [n_param - n_muon]
    second: Buffer<f32>, // [n_param - n_muon]
    chunks: Chunks,
    frozen: Chunks,
    parts: Buffer<f64>, // of the norm
    muon_scratch: Buffer<f32>,
    /// Of each of the optimizer's stacks.
    matrices: Vec<Buffer<MuonMatrix>>,
}

/// A model on a GPU.
pub struct Learner {
    // Graphs go before what they were recorded from.
    passes: HashMap<Pass, Graph>,
    update: Option<Graph>,
    gpu: Arc<Gpu>,
    stream: Stream,
    operations: Operations,
    model: Model,
    plan: Plan,
    layout: Layout,
    arena: Buffer<u8>,
    params: Buffer<f32>,       // [n_param]
    bf16: Option<Buffer<u16>>, // the same in bf16, where products read that
    training: Option<Training>,
    /// Of the forward pass, and of the step.
    numbers: [Buffer<Numbers>; 2],
    outcome: Buffer<Outcome>,
    staging: Staging,
    step_numbers: Pinned<Numbers>,
    step_outcome: Pinned<Outcome>,
    /// Until when `step_numbers` is read.
    step_numbers_read: Option<Event>,
}

/// Refuses sizes that kernels do not take.
///
/// # Errors
/// [`Error::Limit`], [`Error::Unfit`].
pub fn check(model: &ModelSizes) -> Result<()> {
    use crate::error::within;
    let ModelSizes { n_embd, head_dim, n_expert, n_used, element } = *model;
    within("an embedding width", n_embd, 4096)?;
    within("experts", n_expert, 64)?;
    within("experts of a token", n_used, 8)?;
    if !n_embd.is_multiple_of(8) {
        return Err(Error::Unfit { what: "an embedding width", expected: "that is a multiple of 8", value: n_embd });
    }
    if !Attention::takes(element, head_dim) {
        let expected = match element {
            super::view::Element::F32 => "up to 128 that is a multiple of 4",
            super::view::Element::Bf16 => "up to 128 that is a multiple of 8",
        };
        return Err(Error::Unfit { what: "a head width", expected, value: head_dim });
    }
    Ok(())
}

/// What [`check`] looks at.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // sizes by their usual names
pub struct ModelSizes {
    pub n_embd: usize,
    pub head_dim: usize,
    pub n_expert: usize,
    pub n_used: usize,
    pub element: super::view::Element,
}

/// Elements of the f32 scratch memory of sums in two stages.
fn scratch_len(model: &Model, plan: &Plan) -> usize {
    let (n, d) = (plan.n_token(), model.n_embd);
    let n_choice = n * model.n_used;
    [
        Norm::scratch_len(n, d),
        Embedding::scratch_len(n, d),
        ColumnSums::scratch_len(n, 1, 3 * d),
        ColumnSums::scratch_len(n, 1, model.n_ff),
        if model.n_moe() > 0 { ColumnSums::scratch_len(n_choice, model.n_expert, model.n_ff) } else { 0 },
        if model.n_moe() > 0 { Router::scores_backward_scratch_len(n, d, model.n_score()) } else { 0 },
    ]
    .into_iter()
    .max()
    .unwrap_or(0)
}

fn routing_shape(model: &Model, n_token: usize) -> RoutingShape {
    RoutingShape { n_token, n_expert: model.n_expert, k: model.n_used }
}

/// Where everything of `model` under `plan` lies.
fn layout_of(model: &Model, plan: &Plan) -> Layout {
    let n_routing =
        if model.n_moe() > 0 { Router::forward_scratch_len(routing_shape(model, plan.n_token())) } else { 0 };
    Layout::new(model, plan, scratch_len(model, plan), n_routing)
}

/// Bytes of a model in training, by what they hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Parameters, and their copy in bf16.
    pub parameters: u64,
    /// Their gradients.
    pub gradients: u64,
    /// The optimizers' moments.
    pub moments: u64,
    /// What blocks keep for the backward pass.
    pub activations: u64,
    /// What comes and goes within a pass.
    pub working: u64,
}

impl MemoryPlan {
    /// What [`Learner::new`] will take.
    pub fn new(model: &Model, plan: &Plan, optimizer: &Optimizer) -> Self {
        let layout = layout_of(model, plan);
        let f32s = |n: usize| 4 * n as u64;
        let is_narrow = plan.element() == super::view::Element::Bf16;
        let n = model.n_param;
        Self {
            parameters: f32s(n) + if is_narrow { 2 * n as u64 } else { 0 },
            gradients: f32s(n),
            moments: f32s(2 * n - optimizer.n_muon),
            activations: layout.n_kept_byte as u64,
            working: (layout.n_byte - layout.n_kept_byte) as u64 + f32s(muon_scratch_len(&optimizer.stacks)),
        }
    }
}

impl Learner {
    /// A model whose parameters are `params` [n_param].
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], and whatever else the driver fails with.
    ///
    /// # Panics
    /// If there are more or fewer parameters.
    pub fn new(gpu: &Arc<Gpu>, model: Model, plan: Plan, optimizer: Optimizer, params: &[f32]) -> Result<Self> {
        assert_eq!(params.len(), model.n_param, "parameters");
        let head_dim = model.n_embd / model.n_head;
        let element = plan.element();
        let layout = layout_of(&model, &plan);
        let operations = Operations {
            products: Products::new(gpu, plan.arithmetic)?,
            attention: Attention::new(gpu, element, head_dim)?,
            norm: Norm::new(gpu)?,
            embedding: Embedding::new(gpu)?,
            cross_entropy: CrossEntropy::new(gpu)?,
            column_sums: ColumnSums::new(gpu)?,
            router: Router::new(gpu)?,
            dispatch: Dispatch::new(gpu)?,
            experts: Experts::new(gpu)?,
            dropout: Dropout::new(gpu)?,
            convert: Convert::new(gpu)?,
            adamw: AdamW::new(gpu)?,
            muon: if optimizer.stacks.is_empty() { None } else { Some(Muon::new(gpu)?) },
        };
        let n = model.n_param;
        let training = match plan.trains {
            false => None,
            true => {
                let frozen = optimizer.frozen.iter().map(|place| Stretch {
                    begin: place.start,
                    moment: 0,
                    len: place.len(),
                    lr_scale: 0.0,
                    decay: 0.0,
                });
                Some(Training {
                    grads: gpu.alloc("gradients", n)?,
                    sums: gpu.alloc("Muon's sums", optimizer.n_muon)?,
                    first: gpu.alloc("AdamW's first moments", n - optimizer.n_muon)?,
                    second: gpu.alloc("AdamW's second moments", n - optimizer.n_muon)?,
                    chunks: Chunks::new(gpu, &optimizer.stretches)?,
                    frozen: Chunks::new(gpu, &frozen.collect::<Vec<_>>())?,
                    parts: gpu.alloc("parts of the gradients' norm", AdamW::n_part(n))?,
                    muon_scratch: gpu.alloc("Muon's updates", muon_scratch_len(&optimizer.stacks))?,
                    matrices: optimizer
                        .stacks
                        .iter()
                        .map(|stack| gpu.upload("table of matrices", &stack.matrices))
                        .collect::<Result<_>>()?,
                    optimizer,
                })
            }
        };
        let learner = Self {
            passes: HashMap::new(),
            update: None,
            stream: Stream::new(gpu)?,
            operations,
            arena: gpu.alloc("activations and working memory", layout.n_byte)?,
            params: gpu.upload("parameters", params)?,
            bf16: match element {
                super::view::Element::Bf16 => Some(gpu.alloc("parameters in bf16", n)?),
                super::view::Element::F32 => None,
            },
            training,
            numbers: [gpu.alloc("numbers of a pass", 1)?, gpu.alloc("numbers of a step", 1)?],
            outcome: gpu.alloc("outcome of a step", 1)?,
            staging: Staging::new(gpu, &model, &plan)?,
            step_numbers: gpu.pinned("numbers of a step", 1)?,
            step_outcome: gpu.pinned("outcome of a step", 1)?,
            step_numbers_read: None,
            gpu: Arc::clone(gpu),
            model,
            plan,
            layout,
        };
        if let Some(bf16) = &learner.bf16 {
            learner.operations.adamw.copy(&learner.stream, learner.params.view(), bf16.view())?;
        }
        Ok(learner)
    }

    /// Sets the optimizers' moments: Muon's sums [n_muon], AdamW's [n_param - n_muon].
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If there are more, or the model is only evaluated.
    pub fn write_moments(&mut self, sums: &[f32], first: &[f32], second: &[f32]) -> Result<()> {
        let training = self.training.as_mut().expect("a model in training");
        training.sums.write(0, sums)?;
        training.first.write(0, first)?;
        training.second.write(0, second)
    }

    /// The moments, as [`Learner::write_moments`] takes them.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If the model is only evaluated.
    pub fn moments(&self) -> Result<(Vec<f32>, Vec<f32>, Vec<f32>)> {
        let Training { sums, first, second, .. } = self.of_training();
        Ok((sums.to_vec()?, first.to_vec()?, second.to_vec()?))
    }

    /// The parameters.
    ///
    /// # Errors
    /// The driver's.
    pub fn params(&self) -> Result<Vec<f32>> {
        self.params.to_vec()
    }

    /// The gradients added up so far.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If the model is only evaluated.
    pub fn gradients(&self) -> Result<Vec<f32>> {
        self.of_training().grads.to_vec()
    }

    /// Forgets the gradients.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If the model is only evaluated.
    pub fn zero_gradients(&self) -> Result<()> {
        self.stream.zero(self.of_training().grads.view())
    }

    fn of_training(&self) -> &Training {
        self.training.as_ref().expect("a model in training")
    }

    /// Begins a step.
    ///
    /// # Errors
    /// The driver's.
    pub fn begin(&mut self) -> Result<()> {
        self.staging.begin();
        self.stream.zero(self.layout.sums.all(&self.arena))?;
        self.stream.zero(self.layout.step_counts.all(&self.arena))
    }

    /// Queues a batch's forward and backward pass, which adds to the gradients. Of `numbers` those of a pass count.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If the batch is larger than planned, or its contents do not fit the model.
    pub fn accumulate(&mut self, batch: &Batch, numbers: Numbers) -> Result<()> {
        let pass = self.upload(batch, numbers, true)?;
        self.play(pass)?;
        // The one place where a batch's gradients are complete, and after the last batch all: what reduces them over several GPUs goes here.
        self.staging.download(&self.stream, &self.arena, &self.layout)
    }

    /// Uploads a batch while the GPU may still be at work on others.
    fn upload(&mut self, batch: &Batch, numbers: Numbers, trains: bool) -> Result<Pass> {
        let n_token = batch.ids.len();
        assert!(batch.n_row > 0 && n_token > 0 && n_token.is_multiple_of(batch.n_row), "{n_token} tokens in rows");
        let pass = Pass {
            n_row: batch.n_row,
            n_col: n_token / batch.n_row,
            trains,
            has_mask: batch.mask.is_some(),
            has_first: batch.first.is_some(),
            has_noise: batch.normal.is_some(),
            capacity: batch.capacity,
        };
        assert!(
            n_token <= self.plan.n_token() && pass.n_col <= self.model.n_ctx,
            "{n_token} tokens are more than planned"
        );
        self.staging.upload(&self.stream, &self.arena, &self.layout, &self.numbers[0], &self.model, batch, numbers)?;
        Ok(pass)
    }

    /// Queues what a pass is, out of a recording if there is one.
    fn play(&mut self, pass: Pass) -> Result<()> {
        if !self.passes.contains_key(&pass) {
            let graph = self.stream.capture(|stream| self.forward_and_backward(stream, pass))?;
            self.passes.insert(pass, graph);
        }
        // SAFETY: all that was recorded are this learner's buffers, which live as long as its graphs.
        unsafe { self.passes[&pass].launch(&self.stream) }
    }

    /// Queues the norm of the gradients, which [`Learner::reports`] returns: after a step's last batch.
    ///
    /// # Errors
    /// The driver's.
    pub fn measure(&mut self) -> Result<()> {
        self.write_step_numbers(Numbers { clip: f32::INFINITY, most_scale: 1.0, ..Numbers::default() })?;
        let training = self.of_training();
        let adamw = &self.operations.adamw;
        adamw.zero(&self.stream, training.grads.view(), &training.frozen)?;
        adamw.sum_of_squares(&self.stream, training.grads.view(), training.parts.view())?;
        self.clip(&self.stream)?;
        // SAFETY: both are this learner's, and the outcome is read after the stream was waited for.
        unsafe { self.stream.read_later(self.outcome.view(), &mut self.step_outcome) }
    }

    fn clip(&self, stream: &Stream) -> Result<()> {
        let ce_sum = self.layout.sums.view(&self.arena, 1);
        let (numbers, outcome) = (self.numbers[1].view(), self.outcome.view());
        self.operations.adamw.clip(stream, numbers, outcome, ce_sum, self.of_training().parts.view())
    }

    fn write_step_numbers(&mut self, numbers: Numbers) -> Result<()> {
        if let Some(read) = self.step_numbers_read.take() {
            read.synchronize()?;
        }
        self.step_numbers.set(0, numbers);
        // SAFETY: both are this learner's, and the numbers are left alone until the event after it has passed.
        unsafe { self.stream.write_later(&self.step_numbers, self.numbers[1].view())? };
        self.step_numbers_read = Some(Event::record(&self.stream)?);
        Ok(())
    }

    /// Queues the optimizers' step. Of `numbers` those of a step count. Where losses or gradients are not finite, or `most_scale` is 0,
    /// only the gradients become zero.
    ///
    /// # Errors
    /// The driver's.
    pub fn update(&mut self, numbers: Numbers) -> Result<()> {
        self.write_step_numbers(numbers)?;
        if self.update.is_none() {
            self.update = Some(self.stream.capture(|stream| self.optimize(stream))?);
        }
        let graph = self.update.as_ref().expect("recorded above");
        // SAFETY: all that was recorded are this learner's buffers, which live as long as its graphs.
        unsafe { graph.launch(&self.stream) }
    }

    fn optimize(&self, stream: &Stream) -> Result<()> {
        let Training { optimizer, grads, sums, first, second, chunks, muon_scratch, matrices, .. } = self.of_training();
        let (numbers, outcome) = (self.numbers[1].view(), self.outcome.view());
        self.clip(stream)?;
        let flat = Flat {
            params: self.params.view(),
            grads: grads.view(),
            first: first.view(),
            second: second.view(),
            bf16: self.bf16.as_ref().map(Buffer::view),
        };
        let betas = (optimizer.beta1, optimizer.beta2, optimizer.eps);
        self.operations.adamw.step(stream, flat, chunks, betas, numbers, outcome)?;
        if let Some(muon) = &self.operations.muon {
            let state = MuonState {
                params: flat.params,
                grads: flat.grads,
                sums: sums.view(),
                copies: flat.bf16,
                numbers,
                outcome,
            };
            let (momentum, polynomials) = (optimizer.momentum, &optimizer.polynomials);
            for (stack, matrices) in optimizer.stacks.iter().zip(matrices) {
                muon.step(stream, state, matrices.view(), stack.shape, momentum, polynomials, muon_scratch.view())?;
            }
        }
        let biases = self.model.blocks.iter().filter_map(|block| match &block.ffn {
            FfnPlaces::Experts { selection_bias, .. } => Some(selection_bias.as_ref()),
            FfnPlaces::Dense { .. } => None,
        });
        let is_frozen = |place: &Place| optimizer.frozen.contains(place);
        let biases = biases.map(|place| place.filter(|place| !is_frozen(place)).map(|place| self.param(place)));
        let biases = biases.collect::<Vec<_>>();
        let loads = self.layout.step_counts.view(&self.arena, biases.len() * self.model.n_expert);
        self.operations.adamw.balance(stream, loads, &biases, self.model.n_expert, optimizer.bias_rate, outcome)
    }

    /// Waits for the step; what it came to batch by batch, and the norm of its gradients.
    ///
    /// # Errors
    /// The driver's: also what failed in anything queued before.
    pub fn reports(&mut self) -> Result<(Vec<Report>, f64)> {
        self.stream.synchronize()?;
        Ok((self.staging.reports(&self.model), self.step_outcome.get(0).square_norm.sqrt()))
    }

    /// Sum of a batch's cross-entropy, without gradients.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// As [`Learner::accumulate`].
    pub fn loss(&mut self, batch: &Batch) -> Result<f64> {
        self.staging.begin();
        let pass = self.upload(batch, Numbers::default(), false)?;
        self.stream.zero(self.layout.sums.all(&self.arena))?;
        let n_token = pass.n_token();
        self.hidden(&self.stream, pass)?;
        self.cross_entropy(&self.stream, n_token, None)?;
        self.staging.download(&self.stream, &self.arena, &self.layout)?;
        self.stream.synchronize()?;
        Ok(self.staging.reports(&self.model)[0].cross_entropy)
    }

    /// Logits of what follows `ids`, [n_vocab].
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If there are more ids than positions, or none.
    pub fn logits(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.staging.begin();
        let targets = vec![-1; ids.len()];
        let batch = Batch { n_row: 1, ids, targets: &targets, mask: None, first: None, normal: None, capacity: None };
        let pass = self.upload(&batch, Numbers::default(), false)?;
        self.hidden(&self.stream, pass)?;
        let last = ids.len() - 1;
        let normed = self.layout.normed.rows(&self.arena, ids.len()).rows(last..last + 1);
        let logits = self.layout.logits.rows(&self.arena, 1);
        let head = self.weight(&self.model.token, self.model.n_vocab, self.model.n_embd);
        self.multiply(&self.stream, normed.into(), Factor::transposed(head), Groups::One, Write::Replace(logits))?;
        self.stream.synchronize()?;
        let mut out = vec![0.0; self.model.n_vocab];
        self.layout.logits.floats(&self.arena, 1).part(0..out.len()).read(&self.gpu, &mut out)?;
        Ok(out)
    }
}

/// The passes.
impl Learner {
    fn param(&self, place: &Place) -> View<'_, f32> {
        self.params.view().part(place.clone())
    }

    fn grad(&self, place: &Place) -> View<'_, f32> {
        self.of_training().grads.view().part(place.clone())
    }

    /// A parameter as products read it.
    fn weight(&self, place: &Place, n_row: usize, n_col: usize) -> Rows<'_> {
        let bytes = match &self.bf16 {
            Some(bf16) => bf16.view().part(place.clone()).cast(),
            None => self.param(place).cast(),
        };
        Rows::new(bytes, self.plan.element(), n_row, n_col)
    }

    fn grad_rows(&self, place: &Place, n_row: usize, n_col: usize) -> Rows<'_> {
        Rows::floats(self.grad(place), n_row, n_col)
    }

    fn multiply(&self, stream: &Stream, a: Factor, b: Factor, groups: Groups, write: Write) -> Result<()> {
        let workspace = self.layout.workspace.all(&self.arena);
        self.operations.products.compute(stream, a, b, groups, write, Some(workspace))
    }

    fn rows(&self, span: MatrixSpan, n_row: usize) -> Rows<'_> {
        span.rows(&self.arena, n_row)
    }

    fn floats(&self, span: MatrixSpan, n_row: usize) -> View<'_, f32> {
        span.floats(&self.arena, n_row)
    }

    fn view<T: bytemuck::Pod>(&self, span: Span<T>, n: usize) -> View<'_, T> {
        span.view(&self.arena, n)
    }

    fn scratch(&self) -> View<'_, f32> {
        self.backward_memory().scratch.all(&self.arena)
    }

    fn backward_memory(&self) -> &Backward {
        self.layout.backward.as_ref().expect("planned for training")
    }

    /// Draws what is dropped at a site of `n` elements; nothing outside of training. Of two that are needed at once one is the `second`.
    fn draw(
        &self,
        stream: &Stream,
        pass: Pass,
        block: usize,
        site: Site,
        n: usize,
        second: bool,
    ) -> Result<Option<Dropped<'_>>> {
        let p = self.model.dropout;
        if !pass.trains || p == 0.0 {
            return Ok(None);
        }
        let bits = self.layout.bits[usize::from(second)].view(&self.arena, Dropped::n_word(n as u64));
        self.operations.dropout.draw(stream, self.numbers[0].view(), block, site as u32, p, bits, n as u64)?;
        Ok(Some(Dropped::new(bits, p)))
    }

    fn normalize(
        &self,
        stream: &Stream,
        x: View<f32>,
        n: usize,
        norm: &NormPlaces,
        at: Statistics,
        scores: Option<Scores>,
    ) -> Result<()> {
        let affine = (self.param(&norm.scale), self.param(&norm.shift));
        let statistics = (self.view(at.mean, n), self.view(at.rstd, n));
        let y = self.rows(self.layout.normed, n);
        self.operations.norm.forward(stream, x, affine, self.model.norm_eps, y, statistics, scores)
    }

    fn normalize_backward(
        &self,
        stream: &Stream,
        x: View<f32>,
        n: usize,
        norm: &NormPlaces,
        at: Statistics,
    ) -> Result<()> {
        let memory = self.backward_memory();
        let statistics = (self.view(at.mean, n), self.view(at.rstd, n));
        let gradients = (self.grad(&norm.scale), self.grad(&norm.shift));
        let (dy, dx) = (self.floats(memory.dnormed, n), self.floats(memory.dx, n));
        let scale = self.param(&norm.scale);
        self.operations.norm.backward(stream, dy, x, scale, statistics, dx, gradients, self.scratch())
    }

    fn forward_and_backward(&self, stream: &Stream, pass: Pass) -> Result<()> {
        self.hidden(stream, pass)?;
        self.cross_entropy(stream, pass.n_token(), Some(self.numbers[0].view()))?;
        self.backward(stream, pass)
    }

    /// Where the input of block `index` is.
    fn x(&self, index: usize) -> MatrixSpan {
        self.layout.xs[index % self.layout.xs.len()]
    }

    /// The normalised rows that the head reads.
    fn hidden(&self, stream: &Stream, pass: Pass) -> Result<()> {
        let (n, d) = (pass.n_token(), self.model.n_embd);
        let dropout = self.draw(stream, pass, 0, Site::Embedding, n * d, false)?;
        let ids = self.view(self.layout.input.ids, n);
        let (token, position) = (self.param(&self.model.token), self.param(&self.model.position));
        self.operations.embedding.forward(
            stream,
            ids,
            pass.n_col,
            token,
            position,
            dropout,
            self.floats(self.x(0), n),
        )?;
        for index in 0..self.model.blocks.len() {
            self.block(stream, pass, index, Some(self.x(index + 1)))?;
        }
        let last = self.x(self.model.blocks.len());
        self.normalize(stream, self.floats(last, n), n, &self.model.output_norm, self.layout.output_norm, None)
    }

    /// What a block's attention is given, with what it drops.
    fn attention_inputs<'a>(
        &'a self,
        stream: &Stream,
        pass: Pass,
        index: usize,
        qkv: Rows<'a>,
    ) -> Result<AttentionInputs<'a>> {
        let n = pass.n_token();
        let (input, p) = (&self.layout.input, self.model.dropout);
        let n_head = pass.n_row * self.model.n_head;
        let dropout = if pass.trains && p > 0.0 {
            let bits =
                self.view(self.layout.bits[0], Dropped::n_word((n_head * pass.n_col) as u64 * pass.n_col as u64));
            let (numbers, site) = (self.numbers[0].view(), Site::Attention as u32);
            self.operations.dropout.draw_causal(stream, numbers, index, site, p, bits, [n_head, pass.n_col])?;
            Some(Dropped::new(bits, p))
        } else {
            None
        };
        Ok(AttentionInputs {
            n_row: pass.n_row,
            n_col: pass.n_col,
            n_head: self.model.n_head,
            qkv,
            mask: input.mask.filter(|_| pass.has_mask).map(|mask| self.view(mask, n)),
            first: input.first.filter(|_| pass.has_first).map(|first| self.view(first, n)),
            dropout,
        })
    }

    /// A block: what is kept of it and, if anyone wants it, its output.
    fn block(&self, stream: &Stream, pass: Pass, index: usize, out: Option<MatrixSpan>) -> Result<()> {
        let Model { n_embd: d, .. } = self.model;
        let (n, block, kept) = (pass.n_token(), &self.model.blocks[index], &self.layout.kept[index]);
        let x = self.x(index);
        let normed = self.rows(self.layout.normed, n);

        self.normalize(stream, self.floats(x, n), n, &block.norm1, kept.norm1, None)?;
        let qkv = self.rows(kept.qkv, n);
        let weight = Factor::transposed(self.weight(&block.qkv, 3 * d, d));
        let bias = block.qkv_bias.as_ref().map(|place| self.param(place));
        self.multiply(stream, normed.into(), weight, Groups::One, Write::Biased { out: qkv, bias, dropout: None })?;
        let inputs = self.attention_inputs(stream, pass, index, qkv)?;
        let softmax = self.view(kept.softmax, inputs.softmax_len());
        let attended = self.rows(kept.attended, n);
        self.operations.attention.forward(stream, &inputs, attended, softmax)?;
        let dropout = self.draw(stream, pass, index, Site::AttentionOut, n * d, false)?;
        let middle = self.rows(kept.middle, n);
        let bias = block.out_bias.as_ref().map(|place| self.param(place));
        let weight = Factor::transposed(self.weight(&block.out, d, d));
        let write = Write::Residual { out: middle, residual: self.rows(x, n), bias, dropout };
        self.multiply(stream, attended.into(), weight, Groups::One, write)?;
        self.feed_forward(stream, pass, index, block, out)
    }

    fn feed_forward(
        &self,
        stream: &Stream,
        pass: Pass,
        index: usize,
        block: &BlockPlaces,
        out: Option<MatrixSpan>,
    ) -> Result<()> {
        let Model { n_embd: d, n_ff, n_expert, .. } = self.model;
        let (n, kept) = (pass.n_token(), &self.layout.kept[index]);
        let bias = |place: &Option<Place>| place.as_ref().map(|place| self.param(place));
        let middle = self.floats(kept.middle, n);
        let normed = self.rows(self.layout.normed, n);
        match (&block.ffn, &kept.ffn) {
            (FfnPlaces::Dense { up, up_bias, down, down_bias }, KeptFfn::Dense { pre }) => {
                self.normalize(stream, middle, n, &block.norm2, kept.norm2, None)?;
                let (pre, hidden) = (self.rows(*pre, n), self.rows(self.layout.hidden, n));
                let activation = self.model.dense_activation;
                let write = Write::Activated { pre, hidden, bias: bias(up_bias), activation };
                let weight = Factor::transposed(self.weight(up, n_ff, d));
                self.multiply(stream, normed.into(), weight, Groups::One, write)?;
                let Some(out) = out else { return Ok(()) };
                let dropout = self.draw(stream, pass, index, Site::FfnOut, n * d, false)?;
                let (out, residual) = (self.rows(out, n), self.rows(kept.middle, n));
                let write = Write::Residual { out, residual, bias: bias(down_bias), dropout };
                let weight = Factor::transposed(self.weight(down, d, n_ff));
                self.multiply(stream, hidden.into(), weight, Groups::One, write)
            }
            (
                FfnPlaces::Experts { router, noise, selection_bias, up, up_bias, down, down_bias },
                KeptFfn::Experts(memory),
            ) => {
                let shape = routing_shape(&self.model, n);
                let n_choice = shape.n_choice();
                let noise = noise.as_ref().filter(|_| pass.has_noise).map(|place| self.param(place));
                let n_score = n_expert * (1 + usize::from(noise.is_some()));
                let scores = self.view(memory.scores, n * n_score);
                let scored = Scores { router: self.param(router), noise, out: scores };
                self.normalize(stream, middle, n, &block.norm2, kept.norm2, Some(scored))?;
                let (routed, queues) = (self.routed(memory, index, shape), self.queues(memory, index, shape));
                let normal = noise.map(|_| self.normal(pass, index));
                let scratch = self.layout.routing_scratch.all(&self.arena);
                self.operations.router.forward(
                    stream,
                    shape,
                    scores,
                    normal,
                    bias(selection_bias),
                    &routed,
                    scratch,
                )?;
                let capacity = pass.capacity.map(|capacity| capacity as u32);
                self.operations.dispatch.forward(stream, shape, routed.chosen, routed.loads, capacity, &queues)?;
                let groups = Groups::Rows { starts: queues.starts, n: n_expert };
                let (pre, hidden) = (self.rows(memory.pre, n_choice), self.rows(self.layout.hidden, n_choice));
                let activation = self.model.expert_activation;
                let write = Write::Activated { pre, hidden, bias: bias(up_bias), activation };
                let gathered = Factor::new(normed).gathered(queues.token_of_kept);
                let weight = self.weight(up, n_expert * d, n_ff);
                self.multiply(stream, gathered, weight.into(), groups, write)?;
                let dropout = self.draw(stream, pass, index, Site::Expert, n_choice * d, false)?;
                let y = self.rows(memory.y, n_choice);
                let write = Write::Biased { out: y, bias: bias(down_bias), dropout };
                let weight = self.weight(down, n_expert * n_ff, d);
                self.multiply(stream, hidden.into(), weight.into(), groups, write)?;
                let Some(out) = out else { return Ok(()) };
                let dropout = self.draw(stream, pass, index, Site::FfnOut, n * d, false)?;
                let out = self.floats(out, n);
                self.operations.experts.combine(stream, shape, y, routed.weights, queues.position, middle, dropout, out)
            }
            _ => unreachable!("what is kept of a block is of its own kind"),
        }
    }

    /// Which of the MoE blocks block `index` is.
    fn moe_number(&self, index: usize) -> usize {
        self.model.blocks[..index].iter().filter(|block| block.is_moe()).count()
    }

    fn normal(&self, pass: Pass, index: usize) -> View<'_, f32> {
        let n = pass.n_token() * self.model.n_expert;
        let begin = self.moe_number(index) * n;
        self.view(self.layout.input.normal, begin + n).part(begin..begin + n)
    }

    fn routed<'a>(&'a self, memory: &layout::Experts, index: usize, shape: RoutingShape) -> Routed<'a> {
        let (moe, n_expert) = (self.moe_number(index), shape.n_expert);
        let statistics = 1 + moe * (2 + n_expert);
        Routed {
            logits: self.view(memory.logits, shape.n_token * n_expert),
            chosen: self.view(memory.chosen, shape.n_choice()),
            weights: self.view(memory.weights, shape.n_choice()),
            statistics: self.layout.sums.all(&self.arena).part(statistics..statistics + 2 + n_expert),
            loads: self.layout.counts.all(&self.arena).part(moe * n_expert..(moe + 1) * n_expert),
        }
    }

    fn queues<'a>(&'a self, memory: &layout::Experts, index: usize, shape: RoutingShape) -> Queues<'a> {
        let n_dropped = self.model.n_moe() * shape.n_expert + self.moe_number(index);
        Queues {
            kept: self.view(memory.kept, shape.n_choice()),
            starts: self.view(memory.starts, shape.n_expert + 1),
            token_of_kept: self.view(memory.token_of_kept, shape.n_choice()),
            position: self.view(memory.position, shape.n_choice()),
            n_dropped: self.layout.counts.all(&self.arena).part(n_dropped..n_dropped + 1),
        }
    }

    /// The head and the loss over chunks of rows, whose logits alone exist; with `numbers` the gradients of the normalised rows, and of the
    /// head's weight.
    fn cross_entropy(&self, stream: &Stream, n: usize, numbers: Option<View<Numbers>>) -> Result<()> {
        let Model { n_vocab, n_embd: d, token, .. } = &self.model;
        let head = self.weight(token, *n_vocab, *d);
        let (targets, losses) = (self.view(self.layout.input.targets, n), self.view(self.layout.losses, n));
        for begin in (0..n).step_by(self.layout.n_logit_row) {
            let range = begin..n.min(begin + self.layout.n_logit_row);
            let normed = self.rows(self.layout.normed, n).rows(range.clone());
            let logits = self.rows(self.layout.logits, range.len());
            self.multiply(stream, normed.into(), Factor::transposed(head), Groups::One, Write::Replace(logits))?;
            let (targets, losses) = (targets.part(range.clone()), losses.part(range.clone()));
            let gradients = numbers.map(|numbers| (self.rows(self.backward_memory().dlogits, range.len()), numbers));
            self.operations.cross_entropy.run(stream, logits, targets, losses, gradients)?;
            if let Some((dlogits, _)) = gradients {
                let dnormed = self.rows(self.backward_memory().dnormed, n).rows(range);
                self.multiply(stream, dlogits.into(), head.into(), Groups::One, Write::Replace(dnormed))?;
                let write = Write::Add(self.grad_rows(token, *n_vocab, *d));
                self.multiply(stream, Factor::transposed(dlogits), normed.into(), Groups::One, write)?;
            }
        }
        self.operations.cross_entropy.add_up(stream, losses, self.layout.sums.view(&self.arena, 1))
    }

    /// From the gradients of the normalised rows to those of all parameters.
    fn backward(&self, stream: &Stream, pass: Pass) -> Result<()> {
        let (n, d, n_block) = (pass.n_token(), self.model.n_embd, self.model.blocks.len());
        let memory = self.backward_memory();
        let dx = self.floats(memory.dx, n);
        stream.zero(dx)?;
        let last = self.floats(self.x(n_block), n);
        self.normalize_backward(stream, last, n, &self.model.output_norm, self.layout.output_norm)?;
        for index in (0..n_block).rev() {
            if self.plan.recompute {
                self.block(stream, pass, index, None)?;
            }
            self.feed_forward_backward(stream, pass, index)?;
            self.attention_backward(stream, pass, index)?;
        }
        let dropout = self.draw(stream, pass, 0, Site::Embedding, n * d, false)?;
        let (ids, order) = (self.view(self.layout.input.ids, n), self.view(self.layout.input.order, n));
        let (token, position) = (self.grad(&self.model.token), self.grad(&self.model.position));
        let n_col = pass.n_col;
        self.operations.embedding.backward(stream, dx, dropout, ids, order, n_col, token, position, self.scratch())?;
        let counts = self.layout.counts.all(&self.arena);
        self.operations.convert.add_counts(stream, self.layout.step_counts.all(&self.arena), counts)
    }

    /// Adds the sums of `dy`'s columns, over each group of rows if there are any, to the gradient of a bias.
    fn bias_backward(&self, stream: &Stream, dy: Rows, starts: Option<View<u32>>, bias: &Option<Place>) -> Result<()> {
        let Some(place) = bias else { return Ok(()) };
        self.operations.column_sums.add(stream, dy, starts, self.grad(place), self.scratch())
    }

    fn feed_forward_backward(&self, stream: &Stream, pass: Pass, index: usize) -> Result<()> {
        let Model { n_embd: d, n_ff, n_expert, .. } = self.model;
        let (n, block, kept) = (pass.n_token(), &self.model.blocks[index], &self.layout.kept[index]);
        let memory = self.backward_memory();
        let middle = self.floats(kept.middle, n);
        let normed = self.rows(self.layout.normed, n);
        let dx = self.floats(memory.dx, n);
        let dnormed = self.rows(memory.dnormed, n);
        // The normalised rows were not kept: one more pass over them costs less than their memory.
        self.normalize(stream, middle, n, &block.norm2, kept.norm2, None)?;
        match (&block.ffn, &kept.ffn) {
            (FfnPlaces::Dense { up, up_bias, down, down_bias }, KeptFfn::Dense { pre }) => {
                let dropout = self.draw(stream, pass, index, Site::FfnOut, n * d, false)?;
                let dy = self.rows(memory.dy, n);
                self.operations.convert.rows(stream, self.rows(memory.dx, n), dy, dropout)?;
                let (pre, dpre, hidden) =
                    (self.rows(*pre, n), self.rows(memory.dpre, n), self.rows(self.layout.hidden, n));
                let activation = self.model.dense_activation;
                let write = Write::ActivationBackward { pre, dpre, hidden, activation };
                self.multiply(stream, dy.into(), self.weight(down, d, n_ff).into(), Groups::One, write)?;
                let write = Write::Add(self.grad_rows(down, d, n_ff));
                self.multiply(stream, Factor::transposed(dy), hidden.into(), Groups::One, write)?;
                self.bias_backward(stream, dy, None, down_bias)?;
                let weight = self.weight(up, n_ff, d);
                self.multiply(stream, dpre.into(), weight.into(), Groups::One, Write::Replace(dnormed))?;
                let write = Write::Add(self.grad_rows(up, n_ff, d));
                self.multiply(stream, Factor::transposed(dpre), normed.into(), Groups::One, write)?;
                self.bias_backward(stream, dpre, None, up_bias)?;
            }
            (FfnPlaces::Experts { router, noise, up, up_bias, down, down_bias, .. }, KeptFfn::Experts(experts)) => {
                let shape = routing_shape(&self.model, n);
                let n_choice = shape.n_choice();
                let (routed, queues) = (self.routed(experts, index, shape), self.queues(experts, index, shape));
                let starts = queues.starts;
                let of_block = self.draw(stream, pass, index, Site::FfnOut, n * d, true)?;
                let of_experts = self.draw(stream, pass, index, Site::Expert, n_choice * d, false)?;
                // What was the output becomes its gradient.
                let dy = self.rows(experts.y, n_choice);
                let dweights = self.view(memory.dweights, n_choice);
                self.operations.experts.combine_backward(
                    stream,
                    shape,
                    dx,
                    of_block,
                    dy,
                    routed.weights,
                    queues.position,
                    of_experts,
                    dy,
                    dweights,
                )?;
                let rows = Groups::Rows { starts, n: n_expert };
                let sums = Groups::Sums { starts, n: n_expert };
                let pre = self.rows(experts.pre, n_choice);
                let (dpre, hidden) = (self.rows(memory.dpre, n_choice), self.rows(self.layout.hidden, n_choice));
                let activation = self.model.expert_activation;
                let write = Write::ActivationBackward { pre, dpre, hidden, activation };
                let weight = Factor::transposed(self.weight(down, n_expert * n_ff, d));
                self.multiply(stream, dy.into(), weight, rows, write)?;
                let write = Write::Add(self.grad_rows(down, n_expert * n_ff, d));
                self.multiply(stream, Factor::transposed(hidden), dy.into(), sums, write)?;
                self.bias_backward(stream, dy, Some(starts), down_bias)?;
                let gathered = Factor::transposed(normed).gathered(queues.token_of_kept);
                let write = Write::Add(self.grad_rows(up, n_expert * d, n_ff));
                self.multiply(stream, gathered, dpre.into(), sums, write)?;
                self.bias_backward(stream, dpre, Some(starts), up_bias)?;
                let dinput = self.rows(memory.dinput, n_choice);
                let weight = Factor::transposed(self.weight(up, n_expert * d, n_ff));
                self.multiply(stream, dpre.into(), weight, rows, Write::Replace(dinput))?;

                let noise = noise.as_ref().filter(|_| pass.has_noise);
                let n_score = n_expert * (1 + usize::from(noise.is_some()));
                let scores = self.view(experts.scores, n * n_score);
                let noise_of = noise.map(|_| Noise { scores, normal: self.normal(pass, index) });
                let (aux, z) = self.model.router_loss_weights;
                let losses = RouterLosses { aux, z };
                let dscores = self.view(memory.dscores, n * n_score);
                let numbers = self.numbers[0].view();
                let router_of = &self.operations.router;
                router_of.backward(stream, shape, dweights, &routed, noise_of, losses, numbers, dscores)?;
                let scorer = Scorer { weight: self.param(router), noise: noise.map(|place| self.param(place)) };
                let dscorer = Scorer { weight: self.grad(router), noise: noise.map(|place| self.grad(place)) };
                let handed_back = Some(Gathered { dinput, position: queues.position });
                let dnormed = self.floats(memory.dnormed, n);
                let scratch = self.scratch();
                router_of.scores_backward(
                    stream,
                    shape,
                    dscores,
                    scorer,
                    normed,
                    handed_back,
                    dnormed,
                    dscorer,
                    scratch,
                )?;
            }
            _ => unreachable!("what is kept of a block is of its own kind"),
        }
        self.normalize_backward(stream, middle, n, &block.norm2, kept.norm2)
    }

    fn attention_backward(&self, stream: &Stream, pass: Pass, index: usize) -> Result<()> {
        let d = self.model.n_embd;
        let (n, block, kept) = (pass.n_token(), &self.model.blocks[index], &self.layout.kept[index]);
        let memory = self.backward_memory();
        let dropout = self.draw(stream, pass, index, Site::AttentionOut, n * d, false)?;
        let (dy, attended) = (self.rows(memory.dy, n), self.rows(kept.attended, n));
        self.operations.convert.rows(stream, self.rows(memory.dx, n), dy, dropout)?;
        let dattended = self.rows(memory.dattended, n);
        let weight = self.weight(&block.out, d, d);
        self.multiply(stream, dy.into(), weight.into(), Groups::One, Write::Replace(dattended))?;
        let write = Write::Add(self.grad_rows(&block.out, d, d));
        self.multiply(stream, Factor::transposed(dy), attended.into(), Groups::One, write)?;
        self.bias_backward(stream, dy, None, &block.out_bias)?;
        let inputs = self.attention_inputs(stream, pass, index, self.rows(kept.qkv, n))?;
        let (softmax, delta) =
            (self.view(kept.softmax, inputs.softmax_len()), self.view(memory.delta, inputs.delta_len()));
        let dqkv = self.rows(memory.dqkv, n);
        self.operations.attention.backward(stream, &inputs, attended, dattended, softmax, delta, dqkv)?;
        let x = self.floats(self.x(index), n);
        self.normalize(stream, x, n, &block.norm1, kept.norm1, None)?;
        let (weight, dnormed) = (self.weight(&block.qkv, 3 * d, d), self.rows(memory.dnormed, n));
        self.multiply(stream, dqkv.into(), weight.into(), Groups::One, Write::Replace(dnormed))?;
        let write = Write::Add(self.grad_rows(&block.qkv, 3 * d, d));
        let normed = self.rows(self.layout.normed, n);
        self.multiply(stream, Factor::transposed(dqkv), normed.into(), Groups::One, write)?;
        self.bias_backward(stream, dqkv, None, &block.qkv_bias)?;
        self.normalize_backward(stream, x, n, &block.norm1, kept.norm1)
    }
}
