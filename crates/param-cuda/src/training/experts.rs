//! What experts made of the tokens they took, summed up for each token; and back.

use std::sync::Arc;

use super::dropout::Dropped;
use super::routing::{RoutingShape, check_width, has, has_bits, has_kept_rows, has_rows};
use super::view::{Rows, View};
use crate::args;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::kernel::{Grid, Kernel, Module};
use crate::stream::Stream;

const PTX: &str = include_str!("../../ptx/train_experts.ptx");
const THREADS: usize = 256;
const WARPS: usize = THREADS / 32;

/// Sums up what experts give each of their tokens.
#[derive(Debug)]
pub struct Experts {
    // By Element.
    combine: [Kernel; 2],
    combine_backward: [Kernel; 2],
}

impl Experts {
    /// # Errors
    /// [`crate::Error::Kernel`], [`crate::Error::Call`].
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let module = Module::load(gpu, PTX)?;
        let kernel = |name| module.kernel(name);
        Ok(Self {
            combine: [kernel("combine_f32")?, kernel("combine_bf16")?],
            combine_backward: [kernel("combine_backward_f32")?, kernel("combine_backward_bf16")?],
        })
    }

    /// `out` [n_token, n_embd] = `middle` [n_token, n_embd] and of each token the sum, of which `dropout` drops, over its kept choices of
    /// their weight, of `weights` [n_token, k], times the row of `y` [n_token * k, n_embd] that `position` [n_token, k] names. `out` may
    /// be `middle`.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// At a length that is not that of `shape`, a width that is no multiple of 8, or an address that is no multiple of 16.
    pub fn combine(
        &self,
        stream: &Stream,
        shape: RoutingShape,
        y: Rows,
        weights: View<f32>,
        position: View<u32>,
        middle: View<f32>,
        dropout: Option<Dropped>,
        out: View<f32>,
    ) -> Result<()> {
        let RoutingShape { n_token, k, .. } = shape;
        let n_embd = y.n_col();
        check(shape, y, weights, position);
        has_rows("rows before the experts", middle, n_token, n_embd);
        has_rows("rows behind the experts", out, n_token, n_embd);
        has_bits(dropout, n_token * n_embd);
        let blocks = (n_token * (n_embd / 8)).div_ceil(THREADS);
        assert!(blocks <= 1 << 24, "{n_token} rows of {n_embd}: more threads than can be numbered");
        let (bits, scale) = (dropout.map(|d| d.bits), dropout.map_or(1.0, |d| d.scale));
        let [stride, n_token, n_embd, k] = [y.stride(), n_token, n_embd, k].map(|n| n as u32);
        let args = args![y, stride, weights, position, middle, bits, scale, out, n_token, n_embd, k];
        let grid = Grid { blocks: [blocks as u32, 1, 1], threads: THREADS as u32, shared: 0 };
        // SAFETY: the kernel's arguments, of lengths that were checked; positions are rows of `y`, or none.
        unsafe { self.combine[y.element() as usize].launch(stream, grid, &args) }
    }

    /// Gradients of the weights, `dweights` [n_token, k] (0 where dropped), and of the experts' output before their own dropout, `dy`
    /// [n_token * k, n_embd], given that of [`Experts::combine`]'s output, `dx` [n_token, n_embd]. `y`, `weights`, `position` and
    /// `dropout` are those of the forward pass; element `row * n_embd + column` of `expert_dropout` belongs to that row of `y`. Rows of
    /// `dy` that no position names are left as they were. `dy` may be `y`.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// As [`Experts::combine`]; also if `dy` is not stored as `y` is.
    pub fn combine_backward(
        &self,
        stream: &Stream,
        shape: RoutingShape,
        dx: View<f32>,
        dropout: Option<Dropped>,
        y: Rows,
        weights: View<f32>,
        position: View<u32>,
        expert_dropout: Option<Dropped>,
        dy: Rows,
        dweights: View<f32>,
    ) -> Result<()> {
        let RoutingShape { n_token, k, .. } = shape;
        let n_embd = y.n_col();
        check(shape, y, weights, position);
        has_kept_rows("gradient of the experts' output", dy, shape, n_embd);
        assert_eq!(y.element(), dy.element(), "type of the experts' output and of its gradient");
        has("gradients of weights", dweights, shape.n_choice());
        has_rows("gradient of the rows behind the experts", dx, n_token, n_embd);
        has_bits(dropout, n_token * n_embd);
        has_bits(expert_dropout, shape.n_choice() * n_embd);
        let blocks = n_token.div_ceil(WARPS) as u32;
        let [(bits, scale), (expert_bits, expert_scale)] =
            [dropout, expert_dropout].map(|d| (d.map(|d| d.bits), d.map_or(1.0, |d| d.scale)));
        let [stride, dy_stride] = [y, dy].map(|rows| rows.stride() as u32);
        let [n_token, n_embd, k] = [n_token, n_embd, k].map(|n| n as u32);
        let args = args![
            dx,
            bits,
            scale,
            y,
            stride,
            weights,
            position,
            expert_bits,
            expert_scale,
            dy,
            dy_stride,
            dweights,
            n_token,
            n_embd,
            k
        ];
        let grid = Grid { blocks: [blocks, 1, 1], threads: THREADS as u32, shared: 0 };
        // SAFETY: as above.
        unsafe { self.combine_backward[y.element() as usize].launch(stream, grid, &args) }
    }
}

/// # Panics
/// If what the forward and the backward pass read has another length.
fn check(shape: RoutingShape, y: Rows, weights: View<f32>, position: View<u32>) {
    shape.check();
    check_width(y.n_col());
    has_kept_rows("experts' output", y, shape, y.n_col());
    has("weights", weights, shape.n_choice());
    has("positions", position, shape.n_choice());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::testing::{Random, Stored, gpu, rounded};
    use crate::training::view::Element;
    use param_cuda_emulation::Schedule;
    use proptest::prelude::*;

    const SCALE: f32 = 1.25;

    /// `x` after dropout, if there are bits: of the element number `i`.
    fn drop(bits: Option<&Vec<u32>>, i: usize, x: f32) -> f32 {
        match bits {
            None => x,
            Some(bits) if bits[i / 32] >> (i % 32) & 1 == 1 => x * SCALE,
            Some(_) => 0.0,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

        /// Bound: 1e-5 of the sum of the terms' magnitudes, for sums of f32: of at most 9 of them, and of n_embd for a weight's
        /// gradient. The output's gradient is a product of numbers: as exact as it is stored.
        #[test]
        fn tokens_get_what_their_experts_give_and_give_it_back(
            n_token in 1usize..40,
            k in 1usize..9,
            eighths in proptest::sample::select(vec![1usize, 2, 12, 31, 33, 40]),
            element in proptest::sample::select(vec![Element::F32, Element::Bf16]),
            drops in any::<[bool; 2]>(),
            in_place in any::<bool>(),
            seed in any::<u64>(),
            schedule in proptest::sample::select(Schedule::ALL.to_vec()),
        ) {
            let (n_embd, shape) = (8 * eighths, RoutingShape { n_token, n_expert: 9, k });
            let gpu = gpu();
            let stream = Stream::new(&gpu).unwrap();
            let random = &mut Random::new(seed);
            let n_choice = shape.n_choice();
            let y = rounded(&random.floats(n_choice * n_embd, 1.0), element);
            let weights = random.floats(n_choice, 1.0);
            // Kept choices in some order; what was dropped leaves rows that nobody reads.
            let mut position: Vec<u32> = (0..n_choice as u32).collect();
            for i in 1..position.len() {
                position.swap(i, random.below(i + 1));
            }
            position.iter_mut().for_each(|at| *at = if random.below(4) == 0 { u32::MAX } else { *at });
            let [middle, dx] = [(); 2].map(|()| random.floats(n_token * n_embd, 1.0));
            let bits = drops[0].then(|| random.words((n_token * n_embd).div_ceil(32)));
            let expert_bits = drops[1].then(|| random.words((n_choice * n_embd).div_ceil(32)));

            let matrix = Stored::new(&gpu, &y, element, n_embd);
            let separate = Stored::new(&gpu, &y, element, n_embd);
            let [given_weights, given_middle, given_dx] =
                [&weights, &middle, &dx].map(|x| gpu.upload("", x).unwrap());
            let places = gpu.upload("", &position).unwrap();
            let [given_bits, given_expert_bits] =
                [&bits, &expert_bits].map(|bits| bits.as_ref().map(|bits| gpu.upload("", bits).unwrap()));
            let [dropout, expert_dropout] = [&given_bits, &given_expert_bits]
                .map(|bits| bits.as_ref().map(|bits| Dropped { bits: bits.view(), scale: SCALE }));
            let other = gpu.alloc::<f32>("", n_token * n_embd).unwrap();
            let dweights = gpu.upload("", &vec![f32::NAN; n_choice]).unwrap();
            let out = if in_place { &given_middle } else { &other };
            let dy = if in_place { &matrix } else { &separate };
            let experts = Experts::new(&gpu).unwrap();
            param_cuda_emulation::schedule(Some(schedule));
            let (w, p) = (given_weights.view(), places.view());
            experts
                .combine(&stream, shape, matrix.rows(), w, p, given_middle.view(), dropout, out.view())
                .unwrap_or_else(|e| panic!("{e}: {}", param_cuda_emulation::last_fault()));
            experts
                .combine_backward(
                    &stream,
                    shape,
                    given_dx.view(),
                    dropout,
                    matrix.rows(),
                    w,
                    p,
                    expert_dropout,
                    dy.rows(),
                    dweights.view(),
                )
                .unwrap_or_else(|e| panic!("{e}: {}", param_cuda_emulation::last_fault()));
            param_cuda_emulation::schedule(None);
            let (out, got_dy, dweights) = (out.to_vec().unwrap(), dy.to_vec(), dweights.to_vec().unwrap());

            let mut want_dy = y.clone();
            for token in 0..n_token {
                let kept = || (token * k..(token + 1) * k).filter(|&choice| position[choice] != u32::MAX);
                for column in 0..n_embd {
                    let at = token * n_embd + column;
                    let (mut sum, mut magnitude) = (0.0, f64::from(middle[at].abs()));
                    for choice in kept() {
                        let y = y[position[choice] as usize * n_embd + column];
                        let term = f64::from(weights[choice]) * f64::from(y);
                        (sum, magnitude) = (sum + term, magnitude + term.abs());
                    }
                    let want = f64::from(middle[at]) + sum * f64::from(drop(bits.as_ref(), at, 1.0));
                    prop_assert!((f64::from(out[at]) - want).abs() <= 1e-5 * magnitude, "{}, not {want}", out[at]);
                }
                let dout: Vec<f32> =
                    (token * n_embd..(token + 1) * n_embd).map(|i| drop(bits.as_ref(), i, dx[i])).collect();
                for choice in token * k..(token + 1) * k {
                    let (mut sum, mut magnitude) = (0.0, 0.0);
                    if position[choice] != u32::MAX {
                        let first = position[choice] as usize * n_embd;
                        for (column, dout) in dout.iter().enumerate() {
                            let term = f64::from(*dout) * f64::from(y[first + column]);
                            (sum, magnitude) = (sum + term, magnitude + term.abs());
                            let d = drop(expert_bits.as_ref(), first + column, weights[choice] * dout);
                            want_dy[first + column] = d;
                        }
                    }
                    let got = f64::from(dweights[choice]);
                    prop_assert!((got - sum).abs() <= 1e-5 * magnitude, "choice {choice}: {got}, not {sum}");
                }
            }
            prop_assert_eq!(got_dy, rounded(&want_dy, element));
        }
    }
}
