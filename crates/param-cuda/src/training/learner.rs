//! A model on the GPU, with its gradients and moments: what is queued for a step, forward and backward. Nothing waits for the GPU but
//! [`Learner::reports`] and what reads.

mod pass;

use std::collections::HashMap;
use std::sync::Arc;

use super::adamw::{AdamW, Chunks, Flat, Stretch};
use super::attention::Attention;
use super::column_sums::ColumnSums;
use super::convert::Convert;
use super::cross_entropy::CrossEntropy;
use super::dispatch::Dispatch;
use super::dropout::Dropout;
use super::embedding::Embedding;
use super::experts::Experts;
use super::layout::{Layout, Plan};
use super::model::{FfnPlaces, Model, Place};
use super::muon::{Muon, MuonMatrix, MuonState};
use super::norm::Norm;
use super::numbers::{Numbers, Outcome};
use super::product::{Factor, Groups, Products, Write};
use super::profile::{Marks, Part, PartSpent};
use super::router::Router;
use super::routing::RoutingShape;
use super::staging::{Report, Staging};
use super::view::Element;
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
    /// `None` of those that have run once, unrecorded.
    passes: HashMap<Pass, Option<Graph>>,
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
    /// Of the forward pass, of the step, and those with which gradients are measured and not clipped.
    numbers: [Buffer<Numbers>; 3],
    outcome: Buffer<Outcome>,
    staging: Staging,
    step_numbers: Pinned<Numbers>,
    step_outcome: Pinned<Outcome>,
    /// Until when `step_numbers` is read.
    step_numbers_read: Option<Event>,
    /// While the parts of steps are timed.
    marks: Option<Marks>,
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
            Element::F32 => "up to 128 that is a multiple of 4",
            Element::Bf16 => "up to 128 that is a multiple of 8",
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
    pub element: Element,
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
        let is_narrow = plan.element() == Element::Bf16;
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
        let products = Products::new(gpu, plan.arithmetic, plan.matmul)?;
        let products = if plan.cublaslt { products.with_cublaslt(gpu)? } else { products };
        let operations = Operations {
            products: if plan.deterministic { products } else { products.non_deterministic() },
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
                Element::Bf16 => Some(gpu.alloc("parameters in bf16", n)?),
                Element::F32 => None,
            },
            training,
            numbers: [
                gpu.alloc("numbers of a pass", 1)?,
                gpu.alloc("numbers of a step", 1)?,
                gpu.upload(
                    "numbers without clipping",
                    &[Numbers { clip: f32::INFINITY, most_scale: 1.0, ..Numbers::default() }],
                )?,
            ],
            outcome: gpu.alloc("outcome of a step", 1)?,
            staging: Staging::new(gpu, &model, &plan)?,
            step_numbers: gpu.pinned("numbers of a step", 1)?,
            step_outcome: gpu.pinned("outcome of a step", 1)?,
            step_numbers_read: None,
            marks: None,
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
        if self.marks.is_some() {
            return self.forward_and_backward(&self.stream, pass);
        }
        match self.passes.get(&pass) {
            // A library loads its kernels when they are first used, which a recording does not allow.
            None if self.operations.products.uses_cublaslt() => {
                self.passes.insert(pass, None);
                return self.forward_and_backward(&self.stream, pass);
            }
            None | Some(None) => {
                let graph = self.stream.capture(|stream| self.forward_and_backward(stream, pass))?;
                self.passes.insert(pass, Some(graph));
            }
            Some(Some(_)) => {}
        }
        let graph = self.passes[&pass].as_ref().expect("recorded above");
        // SAFETY: all that was recorded are this learner's buffers, which live as long as its graphs.
        unsafe { graph.launch(&self.stream) }
    }

    /// Queues the norm of the gradients, which [`Learner::reports`] returns: after a step's last batch.
    ///
    /// # Errors
    /// The driver's.
    pub fn measure(&mut self) -> Result<()> {
        self.mark(&self.stream, Part::Optimizer)?;
        let training = self.of_training();
        let adamw = &self.operations.adamw;
        adamw.zero(&self.stream, training.grads.view(), &training.frozen)?;
        adamw.sum_of_squares(&self.stream, training.grads.view(), training.parts.view())?;
        self.clip(&self.stream, &self.numbers[2])?;
        // SAFETY: both are this learner's, and the outcome is read after the stream was waited for.
        unsafe { self.stream.read_later(self.outcome.view(), &mut self.step_outcome) }
    }

    fn clip(&self, stream: &Stream, numbers: &Buffer<Numbers>) -> Result<()> {
        let ce_sum = self.layout.sums.view(&self.arena, 1);
        let (numbers, outcome) = (numbers.view(), self.outcome.view());
        self.operations.adamw.clip(stream, numbers, outcome, ce_sum, self.of_training().parts.view())
    }

    /// Queues the optimizers' step. Of `numbers` those of a step count. Where losses or gradients are not finite, or `most_scale` is 0,
    /// only the gradients become zero.
    ///
    /// # Errors
    /// The driver's.
    pub fn update(&mut self, numbers: Numbers) -> Result<()> {
        // Those of the step before, whose reports have been waited for as a rule.
        if let Some(read) = self.step_numbers_read.take() {
            read.synchronize()?;
        }
        self.step_numbers.set(0, numbers);
        // SAFETY: both are this learner's, and the numbers are left alone until the event after it has passed.
        unsafe { self.stream.write_later(&self.step_numbers, self.numbers[1].view())? };
        self.step_numbers_read = Some(Event::record(&self.stream)?);
        if self.marks.is_some() {
            self.mark(&self.stream, Part::Optimizer)?;
            self.optimize(&self.stream)?;
            return self.mark(&self.stream, Part::Other);
        }
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
        self.clip(stream, &self.numbers[1])?;
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

    /// Times the parts of steps from now on: without graphs, and so a little slower.
    pub fn start_profile(&mut self) {
        self.marks = Some(Marks::default());
    }

    /// What the parts of steps took since the last call, in order; nothing where they are not timed.
    ///
    /// # Errors
    /// The driver's.
    pub fn spent(&self) -> Result<Vec<PartSpent>> {
        self.marks.as_ref().map_or(Ok(Vec::new()), Marks::spent)
    }

    fn mark(&self, stream: &Stream, part: Part) -> Result<()> {
        self.marks.as_ref().map_or(Ok(()), |marks| marks.begin(stream, part))
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
