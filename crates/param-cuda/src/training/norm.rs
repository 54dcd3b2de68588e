//! LayerNorm over rows of the residual stream, forward and backward, and the router's scores of the rows.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::{Rows, View};
use crate::args;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::kernel::{Arg, Grid, Kernel, Module};
use crate::stream::Stream;

const PTX: &str = include_str!("../../ptx/train_norm.ptx");
const THREADS: u32 = 256;
/// Columns that a warp of the kernels that add parts takes.
const WARP: u32 = 32;
/// The most columns of each variant of the kernels, and the rows that a block of it takes at a time.
const VARIANTS: [(usize, usize); 3] = [(768, 8), (1024, 8), (4096, 2)];
/// Blocks of the backward pass, each of which leaves a part of the sums, at most: two for every multiprocessor of an H100.
const MAX_PART: usize = 256;

/// `NormForward` in train_norm.cu, field by field.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct NormForward {
    x: u64,
    scale: u64,
    shift: u64,
    y: u64,
    mean: u64,
    rstd: u64,
    router: u64,
    noise: u64,
    scores: u64,
    n: u32,
    d: u32,
    y_stride: u32,
    y_stored: u32,
    n_expert: u32,
    n_score: u32,
    eps: f32,
    unused: u32,
}

/// `NormBackward` in train_norm.cu, field by field.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct NormBackward {
    dy: u64,
    x: u64,
    scale: u64,
    mean: u64,
    rstd: u64,
    dx: u64,
    parts: u64,
    n: u32,
    d: u32,
    length: u32,
    unused: u32,
}

/// Dot products of the normalised rows, before they are rounded, with the rows of one matrix or of two.
#[derive(Clone, Copy, Debug)]
pub struct Scores<'a> {
    /// The router's weight, [n_expert, n_embd].
    pub router: View<'a, f32>,
    /// That of its noise, as large.
    pub noise: Option<View<'a, f32>>,
    /// The router's scores of each row, then those of the noise: [n_row, n_expert] or [n_row, 2 n_expert].
    pub out: View<'a, f32>,
}

/// LayerNorm's kernels. Rows have up to 4096 columns, a multiple of 8.
#[derive(Debug)]
pub struct Norm {
    forward: [Kernel; 3],
    backward: [Kernel; 3],
    add_parts: Kernel,
}

/// The variant for rows of `d` columns, and the rows that a block takes at a time.
fn variant(d: usize) -> (usize, usize) {
    assert!(d > 0 && d.is_multiple_of(8), "rows of {d} columns");
    let at = VARIANTS.iter().position(|(most, _)| d <= *most);
    let at = at.unwrap_or_else(|| panic!("rows of {d} columns, beyond {}", VARIANTS[2].0));
    (at, VARIANTS[at].1)
}

/// Blocks of the backward pass, and the rows of each.
fn parts(n_row: usize, d: usize) -> (usize, usize) {
    let (_, at_once) = variant(d);
    let length = n_row.div_ceil(MAX_PART).max(1).next_multiple_of(at_once);
    (n_row.div_ceil(length), length)
}

impl Norm {
    /// Loads the kernels.
    ///
    /// # Errors
    /// [`crate::Error::Call`], [`crate::Error::Kernel`].
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let module = Module::load(gpu, PTX)?;
        let kernels = |names: [&'static str; 3]| -> Result<[Kernel; 3]> {
            let [a, b, c] = names;
            Ok([module.kernel(a)?, module.kernel(b)?, module.kernel(c)?])
        };
        Ok(Self {
            forward: kernels(["norm_forward_768", "norm_forward_1024", "norm_forward_4096"])?,
            backward: kernels(["norm_backward_768", "norm_backward_1024", "norm_backward_4096"])?,
            add_parts: module.kernel("norm_add_parts")?,
        })
    }

    /// `y = (x - mean) rstd scale + shift`, with `rstd = 1 / sqrt(variance + eps)` of the biased variance.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn forward(
        &self,
        stream: &Stream,
        x: View<f32>,                           // [n_row, n_embd]
        (scale, shift): (View<f32>, View<f32>), // [n_embd]
        eps: f32,
        y: Rows,                              // [n_row, n_embd]
        (mean, rstd): (View<f32>, View<f32>), // [n_row]
        scores: Option<Scores>,
    ) -> Result<()> {
        let (n, d) = (y.n_row(), y.n_col());
        let (at, at_once) = variant(d);
        assert!(x.len() == n * d && scale.len() == d && shift.len() == d && mean.len() == n && rstd.len() == n);
        let (mut n_expert, mut n_score) = (0, 0);
        if let Some(scores) = scores {
            n_expert = scores.router.len() / d;
            n_score = n_expert * if scores.noise.is_some() { 2 } else { 1 };
            assert!(scores.router.len() == n_expert * d && scores.noise.is_none_or(|w| w.len() == n_expert * d));
            assert!(scores.out.len() == n * n_score, "{} scores of {n} rows and {n_score} experts", scores.out.len());
        }
        if n == 0 {
            return Ok(());
        }
        let args = NormForward {
            x: x.aligned().address(),
            scale: scale.aligned().address(),
            shift: shift.aligned().address(),
            y: y.address(),
            mean: mean.address(),
            rstd: rstd.address(),
            router: scores.map_or(0, |s| s.router.aligned().address()),
            noise: scores.and_then(|s| s.noise).map_or(0, |w| w.aligned().address()),
            scores: scores.map_or(0, |s| s.out.address()),
            n: n as u32,
            d: d as u32,
            y_stride: y.stride() as u32,
            y_stored: y.element() as u32,
            n_expert: n_expert as u32,
            n_score: n_score as u32,
            eps,
            unused: 0,
        };
        let shared = if scores.is_some() { at_once * d * size_of::<f32>() } else { 0 };
        let grid = Grid { blocks: [n.div_ceil(at_once) as u32, 1, 1], threads: THREADS, shared: shared as u32 };
        // SAFETY: the kernel's argument; every length was checked above, and shared memory holds a block's rows.
        unsafe { self.forward[at].launch(stream, grid, &[Arg::value(args)]) }
    }

    /// Elements of scratch memory that [`Norm::backward`] needs.
    pub fn scratch_len(n_row: usize, n_embd: usize) -> usize {
        parts(n_row, n_embd).0 * 2 * n_embd
    }

    /// Adds to `dx`, `dscale` and `dshift` the gradients of [`Norm::forward`] given `dy`.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn backward(
        &self,
        stream: &Stream,
        dy: View<f32>,                            // [n_row, n_embd]
        x: View<f32>,                             // [n_row, n_embd]
        scale: View<f32>,                         // [n_embd]
        (mean, rstd): (View<f32>, View<f32>),     // [n_row]
        dx: View<f32>,                            // [n_row, n_embd]
        (dscale, dshift): (View<f32>, View<f32>), // [n_embd]
        scratch: View<f32>,                       // [scratch_len]
    ) -> Result<()> {
        let (n, d) = (mean.len(), scale.len());
        let (at, at_once) = variant(d);
        assert!(dy.len() == n * d && x.len() == n * d && dx.len() == n * d && rstd.len() == n);
        assert!(dscale.len() == d && dshift.len() == d && scratch.len() >= Self::scratch_len(n, d));
        if n == 0 {
            return Ok(());
        }
        let (n_part, length) = parts(n, d);
        let args = NormBackward {
            dy: dy.aligned().address(),
            x: x.aligned().address(),
            scale: scale.aligned().address(),
            mean: mean.address(),
            rstd: rstd.address(),
            dx: dx.aligned().address(),
            parts: scratch.address(),
            n: n as u32,
            d: d as u32,
            length: length as u32,
            unused: 0,
        };
        let shared = (at_once * d * size_of::<f32>()) as u32;
        let grid = Grid { blocks: [n_part as u32, 1, 1], threads: THREADS, shared };
        // SAFETY: the kernel's argument; every length was checked above, and there is a part of the scratch memory for every block.
        unsafe { self.backward[at].launch(stream, grid, &[Arg::value(args)]) }?;
        let grid = Grid { blocks: [(d as u32).div_ceil(WARP), 2, 1], threads: THREADS, shared: 0 };
        // SAFETY: the kernel's arguments: as many parts as the blocks above left, of gradients whose lengths were checked.
        unsafe { self.add_parts.launch(stream, grid, &args![scratch, n_part as u32, dscale, dshift, d as u32]) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Element;
    use super::super::testing::{Random, Stored, gpu};
    use super::*;
    use param_cuda_emulation::Schedule;
    use proptest::prelude::*;

    const EPS: f32 = 1e-5;

    struct Case {
        n: usize,
        d: usize,
        x: Vec<f32>,
        dy: Vec<f32>,
        scale: Vec<f32>,
        shift: Vec<f32>,
        router: Vec<f32>,
        noise: Option<Vec<f32>>,
        element: Element,
    }

    fn case(n: usize, d: usize, n_expert: usize, noisy: bool, element: Element, seed: u64) -> Case {
        let mut random = Random::new(seed);
        let mut x = random.floats(n * d, 2.0);
        x.iter_mut().for_each(|x| *x += 0.5);
        let [scale, shift] = [(); 2].map(|()| random.floats(d, 1.5));
        let router = random.floats(n_expert * d, 0.2);
        let noise = noisy.then(|| random.floats(n_expert * d, 0.2));
        Case { n, d, x, dy: random.floats(n * d, 1.0), scale, shift, router, noise, element }
    }

    fn wide(x: &[f32]) -> Vec<f64> {
        x.iter().map(|x| f64::from(*x)).collect()
    }

    /// Normalised before scale and shift, and `rstd`, by the formula.
    fn xhat(x: &[f32]) -> (Vec<f64>, f64) {
        let x = wide(x);
        let n = x.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        let rstd = 1.0 / (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n + f64::from(EPS)).sqrt();
        (x.iter().map(|x| (x - mean) * rstd).collect(), rstd)
    }

    /// Error bounds: 1e-5 of outputs of up to 5, and half an ulp of bf16 where that is what they are stored in; 1e-5 of the sum of the
    /// products' sizes for scores; 2e-5 of the largest for gradients, which add up to 20 rows.
    fn check(case: &Case, schedule: Schedule) -> std::result::Result<(), TestCaseError> {
        let Case { n, d, x, dy, scale, shift, router, noise, element } = case;
        let (n, d, n_expert) = (*n, *d, router.len() / d);
        let n_score = n_expert * if noise.is_some() { 2 } else { 1 };
        param_cuda_emulation::schedule(Some(schedule));
        let gpu = gpu();
        let stream = Stream::new(&gpu).unwrap();
        let norm = Norm::new(&gpu).unwrap();
        let upload = |x: &[f32]| gpu.upload("", x).unwrap();
        let zeros = |n: usize| gpu.alloc::<f32>("", n).unwrap();
        let (of_x, of_dy, of_scale, of_shift) = (upload(x), upload(dy), upload(scale), upload(shift));
        let of_router = (n_expert > 0).then(|| upload(router));
        let of_noise = noise.as_ref().map(|w| upload(w));
        let (mean, rstd, out) = (zeros(n), zeros(n), zeros(n * n_score.max(1)));
        let stored = Stored::new(&gpu, &vec![0.0; n * d], *element, d);
        let y = stored.rows();
        let scores = of_router.as_ref().map(|router| Scores {
            router: router.view(),
            noise: of_noise.as_ref().map(|w| w.view()),
            out: out.view(),
        });
        let statistics = (mean.view(), rstd.view());
        norm.forward(&stream, of_x.view(), (of_scale.view(), of_shift.view()), EPS, y, statistics, scores).unwrap();
        // Adding is part of the contract: start from ones.
        let [dx, dscale, dshift] = [n * d, d, d].map(|n| upload(&vec![1.0; n]));
        let scratch = upload(&vec![f32::NAN; Norm::scratch_len(n, d)]);
        let grads = (dscale.view(), dshift.view());
        norm.backward(
            &stream,
            of_dy.view(),
            of_x.view(),
            of_scale.view(),
            statistics,
            dx.view(),
            grads,
            scratch.view(),
        )
        .unwrap();
        stream.synchronize().unwrap();
        param_cuda_emulation::schedule(None);

        let (y, dx, out) = (stored.to_vec(), dx.to_vec().unwrap(), out.to_vec().unwrap());
        let (mut want_dscale, mut want_dshift) = (vec![1.0; d], vec![1.0; d]);
        let weights = router.chunks_exact(d).chain(noise.iter().flat_map(|w| w.chunks_exact(d))).collect::<Vec<_>>();
        for row in 0..n {
            let at = row * d..(row + 1) * d;
            let (xhat, rstd) = xhat(&x[at.clone()]);
            let want = (0..d).map(|i| xhat[i] * f64::from(scale[i]) + f64::from(shift[i])).collect::<Vec<_>>();
            for (got, want) in y[at.clone()].iter().zip(&want) {
                let slack =
                    1e-5 * want.abs().max(1.0) + if *element == Element::Bf16 { want.abs() / 256.0 } else { 0.0 };
                prop_assert!((f64::from(*got) - want).abs() <= slack, "{got} for {want}");
            }
            for (i, weight) in weights.iter().enumerate() {
                let products = || want.iter().zip(*weight).map(|(x, w)| x * f64::from(*w));
                let (sum, size) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
                let got = f64::from(out[row * n_score + i]);
                prop_assert!((got - sum).abs() <= 1e-5 * size.max(1.0), "score {got} for {sum}");
            }
            let dy = wide(&dy[at.clone()]);
            let g = (0..d).map(|i| dy[i] * f64::from(scale[i])).collect::<Vec<_>>();
            let g_mean = g.iter().sum::<f64>() / d as f64;
            let gx_mean = g.iter().zip(&xhat).map(|(g, x)| g * x).sum::<f64>() / d as f64;
            for i in 0..d {
                let want = 1.0 + rstd * (g[i] - g_mean - xhat[i] * gx_mean);
                let got = f64::from(dx[row * d + i]);
                prop_assert!((got - want).abs() <= 2e-5 * rstd.max(1.0), "dx {got} for {want}");
                want_dscale[i] += dy[i] * xhat[i];
                want_dshift[i] += dy[i];
            }
        }
        let got = dscale.to_vec().unwrap().into_iter().chain(dshift.to_vec().unwrap());
        let wants = want_dscale.into_iter().chain(want_dshift);
        for (got, want) in got.zip(wants) {
            prop_assert!((f64::from(got) - want).abs() <= 2e-5 * n.max(4) as f64, "{got} for {want}");
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn rows_are_normalised_scored_and_differentiated(
            n in 1usize..20, eighths in 1usize..30, n_expert in 0usize..9, noisy: bool, narrow: bool, schedule in 0usize..4, seed: u64,
        ) {
            let element = if narrow { Element::Bf16 } else { Element::F32 };
            check(&case(n, 8 * eighths, n_expert, noisy && n_expert > 0, element, seed), Schedule::ALL[schedule])?;
        }
    }

    #[test]
    fn rows_of_every_width_are() {
        let shapes = [(1, 768, 8), (9, 776, 2), (3, 1024, 17), (3, 1032, 3), (2, 4096, 1)];
        for ((n, d, n_expert), schedule) in shapes.into_iter().zip(Schedule::ALL.into_iter().cycle()) {
            check(&case(n, d, n_expert, true, Element::Bf16, d as u64), schedule).unwrap();
        }
    }

    /// Sums do not depend on what runs first: the same bits.
    #[test]
    fn schedules_change_nothing() {
        let (n, d) = (MAX_PART + 41, 16);
        let case = case(n, d, 0, false, Element::F32, 5);
        let gpu = gpu();
        let results = Schedule::ALL.map(|schedule| {
            param_cuda_emulation::schedule(Some(schedule));
            let stream = Stream::new(&gpu).unwrap();
            let norm = Norm::new(&gpu).unwrap();
            let upload = |x: &[f32]| gpu.upload("", x).unwrap();
            let [x, dy, scale] = [&case.x, &case.dy, &case.scale].map(|x| upload(x));
            let [mean, rstd] = [0.1, 0.9].map(|v| upload(&vec![v; n]));
            let [dx, dscale, dshift] = [n * d, d, d].map(|n| gpu.alloc::<f32>("", n).unwrap());
            let scratch = gpu.alloc::<f32>("", Norm::scratch_len(n, d)).unwrap();
            let (statistics, grads) = ((mean.view(), rstd.view()), (dscale.view(), dshift.view()));
            norm.backward(&stream, dy.view(), x.view(), scale.view(), statistics, dx.view(), grads, scratch.view())
                .unwrap();
            stream.synchronize().unwrap();
            [dx, dscale, dshift].map(|b| b.to_vec().unwrap().iter().map(|x| x.to_bits()).collect::<Vec<_>>())
        });
        param_cuda_emulation::schedule(None);
        assert!(results.iter().all(|r| *r == results[0]));
    }

    #[test]
    #[should_panic(expected = "rows of 12 columns")]
    fn columns_come_in_eights() {
        variant(12);
    }
}
