//! The router: from scores to the choice of experts, their weights and what the router's losses are made of; and back.

use std::sync::Arc;

use super::numbers::Numbers;
use super::routing::{Routed, RoutingShape, check_width, has, has_kept_rows, has_rows};
use super::view::{Element, Rows, View};
use crate::args;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::kernel::{Grid, Kernel, Module};
use crate::stream::Stream;

const PTX: &str = include_str!("../../ptx/train_router.ptx");
// As in train_router.cu.
const THREADS: usize = 256;
const BLOCK_TOKENS: usize = 64;
const INPUT_TOKENS: usize = 32;
const COLUMNS: usize = 256;
const TILE_SCORES: usize = 8;
const CHUNK_TOKENS: usize = 64;
/// Blocks that the sums over tokens are shared among, about: two for each multiprocessor of an H100. The same on every GPU, so that
/// sums are. Tests have few, so that blocks add up many tokens.
const SUM_BLOCKS: usize = if cfg!(test) { 8 } else { 264 };

/// Chooses experts, and takes gradients back to what was scored.
#[derive(Debug)]
pub struct Router {
    forward: Kernel,
    statistics: Kernel,
    backward: Kernel,
    // By Element.
    input_gradient: [Kernel; 2],
    weight_gradient: [Kernel; 2],
    add_parts: Kernel,
}

/// What scored experts, or its gradient.
#[derive(Clone, Copy, Debug)]
pub struct Scorer<'a> {
    /// [n_expert, n_embd].
    pub weight: View<'a, f32>,
    /// The same of the noise.
    pub noise: Option<View<'a, f32>>,
}

impl Scorer<'_> {
    /// Scores of a token.
    fn n_score(&self, n_expert: usize) -> usize {
        n_expert * (1 + usize::from(self.noise.is_some()))
    }
}

/// What the logits' noise was made of.
#[derive(Clone, Copy, Debug)]
pub struct Noise<'a> {
    /// Logits without noise, then what scales it, [n_token, 2 n_expert].
    pub scores: View<'a, f32>,
    /// Draws of N(0, 1), [n_token, n_expert].
    pub normal: View<'a, f32>,
}

/// Factors of the router's losses in the total.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RouterLosses {
    /// Of `n_expert * sum_e P_e f_e`, with `P_e` the mean weight and `f_e` the mean load of expert `e`.
    pub aux: f32,
    /// Of the mean squared log-sum-exp of the logits.
    pub z: f32,
}

/// The gradient of what experts took.
#[derive(Clone, Copy, Debug)]
pub struct Gathered<'a> {
    /// [n_token * k, n_embd], rows as `position` says.
    pub dinput: Rows<'a>,
    /// [n_token, k], as in [`super::Queues`].
    pub position: View<'a, u32>,
}

/// Lanes that share a token.
fn width(n_expert: usize) -> usize {
    n_expert.next_power_of_two().clamp(4, 32)
}

/// Tokens in each part of a sum over all, and how many parts there are.
fn parts(n_token: usize, n_embd: usize, n_score: usize) -> (usize, usize) {
    let n_tile = n_embd.div_ceil(COLUMNS) * n_score.div_ceil(TILE_SCORES);
    let part = n_token.div_ceil((SUM_BLOCKS / n_tile).max(1)).next_multiple_of(CHUNK_TOKENS);
    (part, n_token.div_ceil(part))
}

impl Router {
    /// # Errors
    /// [`crate::Error::Kernel`], [`crate::Error::Call`].
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let module = Module::load(gpu, PTX)?;
        let kernel = |name| module.kernel(name);
        Ok(Self {
            forward: kernel("router_forward")?,
            statistics: kernel("router_statistics")?,
            backward: kernel("router_backward")?,
            input_gradient: [kernel("router_input_gradient_f32")?, kernel("router_input_gradient_bf16")?],
            weight_gradient: [kernel("router_weight_gradient_f32")?, kernel("router_weight_gradient_bf16")?],
            add_parts: kernel("router_add_parts")?,
        })
    }

    /// Elements of scratch memory that [`Router::forward`] takes.
    pub fn forward_scratch_len(shape: RoutingShape) -> usize {
        shape.n_token.div_ceil(BLOCK_TOKENS) * (2 + 2 * shape.n_expert)
    }

    /// Routes tokens by their `scores` [n_token, n_expert], or [n_token, 2 n_expert]: logits, then what scales their noise, which is
    /// `softplus(..) * normal` where draws of N(0, 1) are given, [n_token, n_expert]. `selection_bias` [n_expert] is added for the choice
    /// alone.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// At a length that is not that of `shape`.
    pub fn forward(
        &self,
        stream: &Stream,
        shape: RoutingShape,
        scores: View<f32>,
        normal: Option<View<f32>>,
        selection_bias: Option<View<f32>>,
        routed: &Routed,
        scratch: View<f64>,
    ) -> Result<()> {
        routed.check(shape);
        let RoutingShape { n_token, n_expert, k } = shape;
        let n_score = scores.len() / n_token;
        assert!(n_score == 2 * n_expert || n_score == n_expert && normal.is_none(), "{n_score} scores a token");
        has("scores", scores, n_token * n_score);
        if let Some(normal) = normal {
            has("draws of noise", normal, n_token * n_expert);
        }
        if let Some(bias) = selection_bias {
            has("selection biases", bias, n_expert);
        }
        assert!(scratch.len() >= Self::forward_scratch_len(shape), "{} elements of scratch memory", scratch.len());

        let n_part = n_token.div_ceil(BLOCK_TOKENS) as u32;
        let Routed { logits, chosen, weights, statistics, loads } = *routed;
        let [n_token, n_score, k, width] = [n_token, n_score, k, width(n_expert)].map(|n| n as u32);
        let n_expert = n_expert as u32;
        let args = args![
            scores,
            normal,
            selection_bias,
            logits,
            chosen,
            weights,
            scratch,
            n_token,
            n_expert,
            n_score,
            k,
            width
        ];
        let grid = Grid { blocks: [n_part, 1, 1], threads: THREADS as u32, shared: 0 };
        // SAFETY: the kernel's arguments, of lengths that were checked, with a row of scratch memory for each block.
        unsafe { self.forward.launch(stream, grid, &args) }?;
        let grid = Grid { blocks: [2 + 2 * n_expert, 1, 1], threads: 32, shared: 0 };
        // SAFETY: as above; a block for each column.
        unsafe { self.statistics.launch(stream, grid, &args![scratch, n_part, n_expert, statistics, loads]) }
    }

    /// Gradients of the scores, `dscores` [n_token, n_expert] or with noise [n_token, 2 n_expert], given those of the weights, `dweights`
    /// [n_token, k] (zero where dropped), and the losses' factors, which `batch_share` of `numbers` [1] multiplies. The load counts as a
    /// constant.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// At a length that is not that of `shape`.
    pub fn backward(
        &self,
        stream: &Stream,
        shape: RoutingShape,
        dweights: View<f32>,
        routed: &Routed,
        noise: Option<Noise>,
        losses: RouterLosses,
        numbers: View<Numbers>,
        dscores: View<f32>,
    ) -> Result<()> {
        routed.check(shape);
        let RoutingShape { n_token, n_expert, k } = shape;
        let n_score = if noise.is_some() { 2 * n_expert } else { n_expert };
        has("gradients of weights", dweights, shape.n_choice());
        has("numbers", numbers, 1);
        has("gradients of scores", dscores, n_token * n_score);
        if let Some(Noise { scores, normal }) = noise {
            has("scores", scores, n_token * n_score);
            has("draws of noise", normal, n_token * n_expert);
        }
        let Routed { logits, chosen, weights, loads, .. } = *routed;
        let (scores, normal) = (noise.map(|noise| noise.scores), noise.map(|noise| noise.normal));
        let width = width(n_expert);
        let blocks = n_token.div_ceil(THREADS / width) as u32;
        let [n_token, n_expert, k, width] = [n_token, n_expert, k, width].map(|n| n as u32);
        let args = args![
            dweights, logits, chosen, weights, loads, scores, normal, numbers, dscores, n_token, n_expert, k, width,
            losses.aux, losses.z
        ];
        let grid = Grid { blocks: [blocks, 1, 1], threads: THREADS as u32, shared: 0 };
        // SAFETY: the kernel's arguments, of lengths that were checked; choices are experts.
        unsafe { self.backward.launch(stream, grid, &args) }
    }

    /// Elements of scratch memory that [`Router::scores_backward`] takes, with `n_score` scores a token.
    pub fn scores_backward_scratch_len(n_token: usize, n_embd: usize, n_score: usize) -> usize {
        parts(n_token, n_embd, n_score).1 * n_score * n_embd
    }

    /// From the gradients of scores, `dscores` [n_token, n_expert or, with noise, 2 n_expert], to those of what was scored and of what
    /// scored it: `dnormed` [n_token, n_embd] becomes dscores times `scorer`, and of each token the sum of what experts hand back, if
    /// that is given; the transpose of dscores times `normed` [n_token, n_embd] is added to `dscorer`.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// At a length that is not that of `shape`, a width that is no multiple of 8, or an address that is no multiple of 16.
    pub fn scores_backward(
        &self,
        stream: &Stream,
        shape: RoutingShape,
        dscores: View<f32>,
        scorer: Scorer,
        normed: Rows,
        experts: Option<Gathered>,
        dnormed: View<f32>,
        dscorer: Scorer,
        scratch: View<f32>,
    ) -> Result<()> {
        shape.check();
        let RoutingShape { n_token, n_expert, k } = shape;
        let (n_embd, n_score) = (normed.n_col(), scorer.n_score(n_expert));
        check_width(n_embd);
        assert_eq!(normed.n_row(), n_token, "rows that were scored");
        assert_eq!(dscorer.n_score(n_expert), n_score, "scores of a token");
        has("gradients of scores", dscores, n_token * n_score);
        has_rows("gradients of what was scored", dnormed, n_token, n_embd);
        let weights = [Some(scorer.weight), scorer.noise];
        let gradients = [Some(dscorer.weight), dscorer.noise];
        for (weight, dweight) in weights.into_iter().flatten().zip(gradients.into_iter().flatten()) {
            has_rows("weights of the router", weight, n_expert, n_embd);
            has("gradients of the router", dweight, n_expert * n_embd);
        }
        if let Some(Gathered { dinput, position }) = experts {
            has_kept_rows("gradient of what experts took", dinput, shape, n_embd);
            has("positions", position, shape.n_choice());
        }
        let needed = Self::scores_backward_scratch_len(n_token, n_embd, n_score);
        assert!(scratch.len() >= needed, "{} elements of scratch memory, not {needed}", scratch.len());
        let scratch = scratch.part(0..needed);
        has_rows("scratch memory", scratch, needed / n_embd, n_embd);

        let (part_tokens, n_part) = parts(n_token, n_embd, n_score);
        let columns = n_embd.div_ceil(COLUMNS) as u32;
        let tiles = n_score.div_ceil(TILE_SCORES) as u32;
        let input_blocks = n_token.div_ceil(INPUT_TOKENS) as u32;
        let n_sum = n_score * n_embd;
        let sum_blocks = n_sum.div_ceil(THREADS) as u32;
        let n_router = (n_expert * n_embd) as u32;
        let threads = THREADS as u32;
        let [n_token, n_embd, n_expert, n_score] = [n_token, n_embd, n_expert, n_score].map(|n| n as u32);
        let [k, part_tokens, n_part, n_sum] = [k, part_tokens, n_part, n_sum].map(|n| n as u32);

        let (dinput, position) = (experts.map(|e| e.dinput), experts.map(|e| e.position));
        let (element, stride) = dinput.map_or((Element::F32, 0), |rows| (rows.element(), rows.stride() as u32));
        let dinput = dinput.map_or(0u64, Rows::address);
        let (weight, noise) = (scorer.weight, scorer.noise);
        let args =
            args![dscores, weight, noise, dinput, stride, position, dnormed, n_token, n_embd, n_expert, n_score, k];
        let grid = Grid { blocks: [input_blocks, columns, 1], threads, shared: 0 };
        // SAFETY: the kernel's arguments, of lengths that were checked; positions are rows of what experts took, or none.
        unsafe { self.input_gradient[element as usize].launch(stream, grid, &args) }?;

        let stride = normed.stride() as u32;
        let args = args![dscores, normed, stride, scratch, part_tokens, n_token, n_embd, n_score];
        let grid = Grid { blocks: [n_part, columns, tiles], threads, shared: 0 };
        // SAFETY: as above; there is scratch memory for every part.
        unsafe { self.weight_gradient[normed.element() as usize].launch(stream, grid, &args) }?;
        let args = args![scratch, n_part, n_sum, n_router, dscorer.weight, dscorer.noise];
        let grid = Grid { blocks: [sum_blocks, 1, 1], threads, shared: 0 };
        // SAFETY: as above.
        unsafe { self.add_parts.launch(stream, grid, &args) }
    }
}

#[cfg(test)]
mod tests;
