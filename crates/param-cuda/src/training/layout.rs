//! Where everything that comes and goes in a step lies in one piece of memory, known before anything is allocated.

use std::marker::PhantomData;

use bytemuck::Pod;

use super::model::{BlockPlaces, Model};
use super::product::{Arithmetic, Matmul};
use super::view::{Element, Rows, View};
use crate::memory::Buffer;

/// Bytes at whose multiples spans begin.
const ALIGNMENT: usize = 256;
/// Elements of the logits that exist at a time, in f32.
const N_LOGIT: usize = 64 << 20;
/// Elements in which long sums of products are split: what weights of 768 by 768 take.
const WORKSPACE: usize = if cfg!(test) { 1 << 16 } else { 16 << 20 };
/// Rows of logits at a time are a multiple of it: what a product takes at once.
const LOGIT_ROWS: usize = 128;

/// How a model is trained, as far as memory is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Of matrix products.
    pub arithmetic: Arithmetic,
    /// Whether cuBLASLt takes plain dense products where its library is found; it changes no memory.
    pub cublaslt: bool,
    /// Whether two runs give the same bits, or sums may be added in any order.
    pub deterministic: bool,
    /// How they are multiplied; it changes no memory.
    pub matmul: Matmul,
    /// Sequences of a batch at most.
    pub n_row: usize,
    /// Tokens of a sequence at most.
    pub n_col: usize,
    /// Whether gradients are wanted.
    pub trains: bool,
    /// What is computed again in the backward pass.
    pub recompute: Recompute,
}

/// What is computed again in the backward pass, for less memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// Everything is kept.
    Nothing,
    /// The feed-forward half of every block.
    FeedForward,
    /// The blocks, but for their inputs.
    Blocks,
}

impl Plan {
    /// Tokens of a batch at most.
    pub fn n_token(&self) -> usize {
        self.n_row * self.n_col
    }

    /// Type of the activations that products read.
    pub fn element(&self) -> Element {
        match self.arithmetic {
            Arithmetic::Bf16 => Element::Bf16,
            Arithmetic::F32 | Arithmetic::Tf32 => Element::F32,
        }
    }
}

/// Elements of the arena.
#[derive(Debug)]
pub(super) struct Span<T> {
    at: usize, // in bytes
    len: usize,
    of: PhantomData<fn() -> T>,
}

impl<T> Clone for Span<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Span<T> {}

impl<T: Pod> Span<T> {
    /// Its first `n` elements.
    pub(super) fn view(self, arena: &Buffer<u8>, n: usize) -> View<'_, T> {
        assert!(n <= self.len, "{n} elements of {}", self.len);
        arena.view().part(self.at..self.at + n * size_of::<T>()).cast()
    }

    pub(super) fn all(self, arena: &Buffer<u8>) -> View<'_, T> {
        self.view(arena, self.len)
    }
}

/// A matrix of so many columns in the arena.
#[derive(Clone, Copy, Debug)]
pub(super) struct MatrixSpan {
    bytes: Span<u8>,
    element: Element,
    n_col: usize,
}

impl MatrixSpan {
    /// Its first `n_row` rows, of f32 without padding.
    pub(super) fn floats(self, arena: &Buffer<u8>, n_row: usize) -> View<'_, f32> {
        let rows = self.rows(arena, n_row);
        assert!(self.element == Element::F32, "a matrix in f32");
        self.bytes.all(arena).cast().part(0..n_row * rows.stride())
    }

    /// Its first `n_row` rows.
    pub(super) fn rows(self, arena: &Buffer<u8>, n_row: usize) -> Rows<'_> {
        Rows::new(self.bytes.all(arena), self.element, n_row, self.n_col)
    }
}

/// Hands out spans one after the other.
struct Bump {
    at: usize,
}

impl Bump {
    fn span<T>(&mut self, len: usize) -> Span<T> {
        let at = self.at;
        self.at += (len * size_of::<T>()).next_multiple_of(ALIGNMENT);
        Span { at, len, of: PhantomData }
    }

    fn matrix(&mut self, element: Element, n_row: usize, n_col: usize) -> MatrixSpan {
        MatrixSpan { bytes: self.span(Rows::bytes(element, n_row, n_col)), element, n_col }
    }
}

/// Means and inverse deviations of rows, [n_token] each.
#[derive(Clone, Copy, Debug)]
pub(super) struct Statistics {
    pub mean: Span<f32>,
    pub rstd: Span<f32>,
}

/// What a block keeps for the backward pass, besides its input.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kept {
    pub norm1: Statistics,
    pub qkv: MatrixSpan,      // [n_token, 3 n_embd]
    pub attended: MatrixSpan, // [n_token, n_embd]
    pub softmax: Span<f32>,   // [2, n_row, n_head, n_col]
    pub middle: MatrixSpan,   // [n_token, n_embd] in f32, after the attention's residual
    pub norm2: Statistics,
}

/// What its feed-forward half keeps.
#[derive(Clone, Copy, Debug)]
pub(super) enum KeptFfn {
    /// Before the nonlinearity, [n_token, n_ff].
    Dense {
        pre: MatrixSpan,
    },
    Experts(Experts),
}

/// Rows of `pre` and `y` are the kept choices.
#[derive(Clone, Copy, Debug)]
pub(super) struct Experts {
    pub pre: MatrixSpan,          // [n_token * n_used, n_ff], before the nonlinearity
    pub y: MatrixSpan,            // [n_token * n_used, n_embd]
    pub scores: Span<f32>,        // [n_token, n_score]
    pub logits: Span<f32>,        // [n_token, n_expert]
    pub chosen: Span<u32>,        // [n_token, n_used]
    pub weights: Span<f32>,       // [n_token, n_used]
    pub kept: Span<u32>,          // [n_token * n_used]
    pub token_of_kept: Span<u32>, // [n_token * n_used]
    pub position: Span<u32>,      // [n_token, n_used]
    pub starts: Span<u32>,        // [n_expert + 1]
}

/// A batch as it was uploaded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Input {
    pub ids: Span<u32>,     // [n_token]
    pub targets: Span<i32>, // [n_token]
    pub mask: Span<u8>,     // [n_token]
    pub first: Span<u32>,   // [n_token]
    pub normal: Span<f32>,  // [n_moe, n_token, n_expert]
    pub order: Span<u32>,   // [n_token], rows by id
}

/// What only a backward pass needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backward {
    pub dx: MatrixSpan,        // [n_token, n_embd] in f32
    pub dnormed: MatrixSpan,   // [n_token, n_embd] in f32
    pub dy: MatrixSpan,        // [n_token, n_embd]
    pub dpre: MatrixSpan,      // [n_token (* n_used), n_ff]
    pub dattended: MatrixSpan, // [n_token, n_embd]
    pub dqkv: MatrixSpan,      // [n_token, 3 n_embd]
    pub dinput: MatrixSpan,    // [n_token * n_used, n_embd]
    pub delta: Span<f32>,      // [n_row, n_head, n_col]
    pub dweights: Span<f32>,   // [n_token, n_used]
    pub dscores: Span<f32>,    // [n_token, n_score]
    pub dlogits: MatrixSpan,   // [n_logit_row, n_vocab]
    pub scratch: Span<f32>,    // of sums in two stages
}

/// All of it.
#[derive(Debug)]
pub(super) struct Layout {
    pub input: Input,
    /// The inputs of all blocks and the output of the last in f32 where gradients are wanted, else two that take turns.
    pub xs: Vec<MatrixSpan>,
    /// Of each block; several blocks' are the same where nothing is kept.
    pub kept: Vec<Kept>,
    /// The same.
    pub kept_ffn: Vec<KeptFfn>,
    pub normed: MatrixSpan, // [n_token, n_embd]
    pub hidden: MatrixSpan, // [n_token (* n_used), n_ff]
    pub logits: MatrixSpan, // [n_logit_row, n_vocab] in f32
    pub losses: Span<f32>,  // [n_token]
    /// Dropout's bits of the largest site, and of [n_token, n_embd].
    pub bits: [Span<u32>; 2],
    pub backward: Option<Backward>,
    /// Of the last norm.
    pub output_norm: Statistics,
    pub routing_scratch: Span<f64>,
    pub workspace: Span<f32>,
    /// Sum of the cross-entropy; of each MoE block those of its router: [1 + n_moe * (2 + n_expert)].
    pub sums: Span<f64>,
    /// Loads [n_moe, n_expert], then dropped choices [n_moe].
    pub counts: Span<u32>,
    /// Of all batches of a step, as `counts`.
    pub step_counts: Span<u32>,
    /// Rows of logits at a time.
    pub n_logit_row: usize,
    /// Bytes of what is kept for the backward pass, and of everything.
    pub n_kept_byte: usize,
    pub n_byte: usize,
}

impl Layout {
    /// Of batches of `model` under `plan`; `n_scratch` elements for sums in two stages, `n_routing_scratch` for those of routers.
    pub(super) fn new(model: &Model, plan: &Plan, n_scratch: usize, n_routing_scratch: usize) -> Layout {
        let (n_token, d, n_ff) = (plan.n_token(), model.n_embd, model.n_ff);
        let (element, n_moe, n_score) = (plan.element(), model.n_moe(), model.n_score());
        let n_choice = n_token * if n_moe > 0 { model.n_used } else { 1 };
        let n_wide = if n_moe > 0 { n_choice } else { n_token };
        let n_head_row = n_token * model.n_head;
        let bump = &mut Bump { at: 0 };

        let statistics = |bump: &mut Bump| Statistics { mean: bump.span(n_token), rstd: bump.span(n_token) };
        let keep = |bump: &mut Bump| Kept {
            norm1: statistics(bump),
            qkv: bump.matrix(element, n_token, 3 * d),
            attended: bump.matrix(element, n_token, d),
            softmax: bump.span(2 * n_head_row),
            middle: bump.matrix(Element::F32, n_token, d),
            norm2: statistics(bump),
        };
        let keep_ffn = |bump: &mut Bump, block: &BlockPlaces| {
            if block.is_moe() {
                KeptFfn::Experts(Experts {
                    pre: bump.matrix(element, n_choice, n_ff),
                    y: bump.matrix(element, n_choice, d),
                    scores: bump.span(n_token * n_score),
                    logits: bump.span(n_token * model.n_expert),
                    chosen: bump.span(n_choice),
                    weights: bump.span(n_choice),
                    kept: bump.span(n_choice),
                    token_of_kept: bump.span(n_choice),
                    position: bump.span(n_choice),
                    starts: bump.span(model.n_expert + 1),
                })
            } else {
                KeptFfn::Dense { pre: bump.matrix(element, n_token, n_ff) }
            }
        };
        let n_x = if plan.trains { model.blocks.len() + 1 } else { 2 };
        let xs = (0..n_x).map(|_| bump.matrix(Element::F32, n_token, d)).collect();
        let recompute = if plan.trains { plan.recompute } else { Recompute::Blocks };
        let kept = match recompute {
            Recompute::Nothing | Recompute::FeedForward => model.blocks.iter().map(|_| keep(bump)).collect(),
            Recompute::Blocks => vec![keep(bump); model.blocks.len()],
        };
        let blocks = model.blocks.iter();
        let kept_ffn = match recompute {
            Recompute::Nothing => blocks.map(|block| keep_ffn(bump, block)).collect(),
            Recompute::FeedForward | Recompute::Blocks => {
                // One of each kind.
                let mut of_kind = [None; 2];
                blocks
                    .map(|block| *of_kind[usize::from(block.is_moe())].get_or_insert_with(|| keep_ffn(bump, block)))
                    .collect()
            }
        };
        let n_kept_byte = bump.at;

        let n_logit_row =
            (N_LOGIT / model.n_vocab / LOGIT_ROWS * LOGIT_ROWS).clamp(LOGIT_ROWS, n_token.max(LOGIT_ROWS));
        let n_logit_row = n_logit_row.min(n_token);
        let drops = plan.trains && model.dropout > 0.0;
        let n_bit = if drops { (n_head_row * plan.n_col).max(n_choice * d) } else { 0 };
        let backward = plan.trains.then(|| Backward {
            dx: bump.matrix(Element::F32, n_token, d),
            dnormed: bump.matrix(Element::F32, n_token, d),
            dy: bump.matrix(element, n_token, d),
            dpre: bump.matrix(element, n_wide, n_ff),
            dattended: bump.matrix(element, n_token, d),
            dqkv: bump.matrix(element, n_token, 3 * d),
            dinput: bump.matrix(element, if n_moe > 0 { n_choice } else { 0 }, d),
            delta: bump.span(n_head_row),
            dweights: bump.span(n_choice),
            dscores: bump.span(n_token * n_score),
            dlogits: bump.matrix(element, n_logit_row, model.n_vocab),
            scratch: bump.span(n_scratch),
        });
        let input = Input {
            ids: bump.span(n_token),
            targets: bump.span(n_token),
            mask: bump.span(n_token),
            first: bump.span(n_token),
            normal: bump.span(if model.has_noise() && plan.trains { n_moe * n_token * model.n_expert } else { 0 }),
            order: bump.span(n_token),
        };
        Layout {
            input,
            xs,
            kept,
            kept_ffn,
            normed: bump.matrix(element, n_token, d),
            hidden: bump.matrix(element, n_wide, n_ff),
            logits: bump.matrix(Element::F32, n_logit_row, model.n_vocab),
            losses: bump.span(n_token),
            bits: [bump.span(n_bit.div_ceil(32)), bump.span(if drops { (n_token * d).div_ceil(32) } else { 0 })],
            backward,
            output_norm: statistics(bump),
            routing_scratch: bump.span(n_routing_scratch),
            workspace: bump.span(if plan.trains { WORKSPACE } else { 0 }),
            sums: bump.span(1 + n_moe * (2 + model.n_expert)),
            counts: bump.span(n_moe * (model.n_expert + 1)),
            step_counts: bump.span(n_moe * (model.n_expert + 1)),
            n_logit_row,
            n_kept_byte,
            n_byte: bump.at,
        }
    }
}
