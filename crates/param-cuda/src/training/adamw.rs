//! The end of a step over flat memory: the gradients' norm and what clips them, AdamW, the selection biases' own rule.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::{Numbers, Outcome, View};
use crate::args;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::kernel::{Arg, Grid, Kernel, Module};
use crate::memory::Buffer;
use crate::stream::Stream;

const PTX: &str = include_str!("../../ptx/train_adamw.ptx");
const THREADS: u32 = 256;
/// Elements of a chunk at most, and of a part of the norm unless there are too many; tests make do with few.
const CHUNK: usize = if cfg!(test) { 1200 } else { 1 << 14 };
/// Parts of the norm at most.
const MAX_PART: usize = if cfg!(test) { 5 } else { 2048 };
/// Blocks whose biases one launch moves.
const MAX_BIASES: usize = 64;

/// Elements next to each other that AdamW treats alike: a tensor, as a rule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stretch {
    /// Where they begin among parameters and gradients: a multiple of 4.
    pub begin: usize,
    /// Where their moments begin: a multiple of 4.
    pub moment: usize,
    /// How many they are.
    pub len: usize,
    /// Factor of the learning rate.
    pub lr_scale: f32,
    /// Weight decay, per unit of learning rate.
    pub decay: f32,
}

/// `Chunk` in train_adamw.cu, field by field.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Chunk {
    begin: u64,
    moment: u64,
    len: u32,
    lr_scale: f32,
    decay: f32,
    unused: u32,
}

/// Stretches in device memory, in pieces for a block each.
#[derive(Debug)]
pub struct Chunks {
    /// None where there is nothing.
    chunks: Option<Buffer<Chunk>>,
    /// Beyond the last element of parameters and gradients.
    end: usize,
    /// Beyond the last moment.
    moment_end: usize,
}

impl Chunks {
    /// Of all `stretches`, which do not overlap.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::Call`].
    ///
    /// # Panics
    /// If one begins at no multiple of 4.
    pub fn new(gpu: &Arc<Gpu>, stretches: &[Stretch]) -> Result<Self> {
        let mut chunks = Vec::new();
        for s in stretches {
            assert!(s.begin.is_multiple_of(4) && s.moment.is_multiple_of(4), "{s:?}");
            chunks.extend((0..s.len).step_by(CHUNK).map(|at| Chunk {
                begin: (s.begin + at) as u64,
                moment: (s.moment + at) as u64,
                len: (s.len - at).min(CHUNK) as u32,
                lr_scale: s.lr_scale,
                decay: s.decay,
                unused: 0,
            }));
        }
        Ok(Self {
            chunks: (!chunks.is_empty()).then(|| gpu.upload("table of parameters", &chunks)).transpose()?,
            end: stretches.iter().map(|s| s.begin + s.len).max().unwrap_or(0),
            moment_end: stretches.iter().map(|s| s.moment + s.len).max().unwrap_or(0),
        })
    }

    /// The table, and a block for each of its entries; nothing where there is none.
    fn table(&self) -> Option<(View<'_, Chunk>, Grid)> {
        let chunks = self.chunks.as_ref()?;
        Some((chunks.view(), Grid { blocks: [chunks.len() as u32, 1, 1], threads: THREADS, shared: 0 }))
    }
}

/// What AdamW moves, and by what.
#[derive(Clone, Copy, Debug)]
pub struct Flat<'a> {
    /// All parameters.
    pub params: View<'a, f32>,
    /// As many; zero afterwards.
    pub grads: View<'a, f32>,
    /// Running mean of the gradients.
    pub first: View<'a, f32>,
    /// Running mean of their squares.
    pub second: View<'a, f32>,
    /// Copy of the parameters in bf16, written anew where they change: as many, if there is one.
    pub bf16: Option<View<'a, u16>>,
}

/// `AdamW` in train_adamw.cu, field by field.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Args {
    params: u64,
    grads: u64,
    first: u64,
    second: u64,
    bf16: u64,
    chunks: u64,
    numbers: u64,
    outcome: u64,
    gain1: f32,
    beta2: f32,
    gain2: f32,
    eps: f32,
}

/// `Balance` in train_adamw.cu, field by field.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Balance {
    loads: u64,
    outcome: u64,
    biases: [u64; MAX_BIASES],
    n_batch: u32,
    n_block: u32,
    first: u32,
    n_expert: u32,
    rate: f32,
    unused: u32,
}

/// The kernels.
#[derive(Debug)]
pub struct AdamW {
    step: Kernel,
    zero: Kernel,
    copy: Kernel,
    squares: Kernel,
    clip: Kernel,
    balance: Kernel,
}

impl AdamW {
    /// Loads the kernels.
    ///
    /// # Errors
    /// [`crate::Error::Call`], [`crate::Error::Kernel`].
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let module = Module::load(gpu, PTX)?;
        Ok(Self {
            step: module.kernel("adamw")?,
            zero: module.kernel("zero_chunks")?,
            copy: module.kernel("copy_bf16")?,
            squares: module.kernel("sum_of_squares")?,
            clip: module.kernel("clip")?,
            balance: module.kernel("balance")?,
        })
    }

    /// Moves the parameters of `chunks` by their gradients, which become zero, as the numbers and the outcome of the step have it:
    /// `m += (1 - beta1) (c g - m)`, `v = beta2 v + (1 - beta2) (c g)^2`,
    /// `p = (1 - lr decay) p - lr bias1 m / (sqrt(v) root2 + eps)`, with `c` the outcome's scale, and `lr` times the stretch's factor.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn step(
        &self,
        stream: &Stream,
        flat: Flat,
        chunks: &Chunks,
        (beta1, beta2, eps): (f32, f32, f32),
        numbers: View<Numbers>, // [1]
        outcome: View<Outcome>, // [1]
    ) -> Result<()> {
        let Flat { params, grads, first, second, bf16 } = flat;
        assert!(params.len() >= chunks.end && grads.len() >= chunks.end && bf16.is_none_or(|b| b.len() >= chunks.end));
        assert!(first.len() >= chunks.moment_end && second.len() >= chunks.moment_end);
        assert!(numbers.len() == 1 && outcome.len() == 1);
        let Some((table, grid)) = chunks.table() else { return Ok(()) };
        let args = Args {
            params: params.aligned().address(),
            grads: grads.aligned().address(),
            first: first.aligned().address(),
            second: second.aligned().address(),
            bf16: bf16.map_or(0, |b| b.aligned().address()),
            chunks: table.address(),
            numbers: numbers.address(),
            outcome: outcome.address(),
            gain1: 1.0 - beta1,
            beta2,
            gain2: 1.0 - beta2,
            eps,
        };
        // SAFETY: the kernel's argument; all chunks end within all of the memories, as was checked above.
        unsafe { self.step.launch(stream, grid, &[Arg::value(args)]) }
    }

    /// Zeroes the gradients of `chunks`: of what stays as it is, before the norm is taken.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// If there are fewer gradients.
    pub fn zero(&self, stream: &Stream, grads: View<f32>, chunks: &Chunks) -> Result<()> {
        assert!(grads.len() >= chunks.end);
        let Some((table, grid)) = chunks.table() else { return Ok(()) };
        // SAFETY: the kernel's arguments; all chunks end within the gradients, as was checked above.
        unsafe { self.zero.launch(stream, grid, &args![grads.aligned(), table]) }
    }

    /// Writes the copy in bf16 of parameters that have just been set.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// If they are not as many.
    pub fn copy(&self, stream: &Stream, params: View<f32>, bf16: View<u16>) -> Result<()> {
        let n = params.len();
        assert_eq!(bf16.len(), n);
        let blocks = n.div_ceil(CHUNK).clamp(1, MAX_PART) as u32;
        let grid = Grid { blocks: [blocks, 1, 1], threads: THREADS, shared: 0 };
        // SAFETY: the kernel's arguments: as many elements as both have.
        unsafe { self.copy.launch(stream, grid, &args![params.aligned(), bf16.aligned(), n as u64]) }
    }

    /// Parts that [`AdamW::sum_of_squares`] leaves of `n` gradients.
    pub fn n_part(n: usize) -> usize {
        n.div_ceil(CHUNK).clamp(1, MAX_PART)
    }

    /// Sums of the squares of all gradients, in parts that [`AdamW::clip`] adds up.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// If there is not room for exactly the parts.
    pub fn sum_of_squares(&self, stream: &Stream, grads: View<f32>, parts: View<f64>) -> Result<()> {
        assert_eq!(parts.len(), Self::n_part(grads.len()));
        let grid = Grid { blocks: [parts.len() as u32, 1, 1], threads: THREADS, shared: 0 };
        // SAFETY: the kernel's arguments: as many elements as there are, and a part for every block.
        unsafe { self.squares.launch(stream, grid, &args![grads.aligned(), grads.len() as u64, parts]) }
    }

    /// What the step comes to: the squared norm out of its parts, and the gradients' scale, `min(1, clip / (norm + 1e-6), most_scale)`,
    /// or 0 where the norm or the sum of the cross-entropies is not finite.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn clip(
        &self,
        stream: &Stream,
        numbers: View<Numbers>, // [1]
        outcome: View<Outcome>, // [1]
        ce_sum: View<f64>,      // [1]
        parts: View<f64>,       // [n_part]
    ) -> Result<()> {
        assert!(numbers.len() == 1 && outcome.len() == 1 && ce_sum.len() == 1);
        let grid = Grid { blocks: [1, 1, 1], threads: THREADS, shared: 0 };
        // SAFETY: the kernel's arguments, one of each, and as many parts as there are.
        unsafe { self.clip.launch(stream, grid, &args![numbers, outcome, ce_sum, parts, parts.len() as u32]) }
    }

    /// Moves selection biases by `rate`: up where an expert's load in all batches of the step is below the mean, down where it is above.
    /// Where the step is left out, so is this.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn balance(
        &self,
        stream: &Stream,
        loads: View<u32>,             // [n_batch, n_block, n_expert]: tokens that chose each expert
        biases: &[Option<View<f32>>], // [n_block]; [n_expert] each, none where they stay
        n_expert: usize,
        rate: f32,
        outcome: View<Outcome>, // [1]
    ) -> Result<()> {
        let n_block = biases.len();
        if n_block == 0 {
            return Ok(());
        }
        let n_batch = loads.len() / (n_block * n_expert);
        assert!(loads.len() == n_batch * n_block * n_expert && outcome.len() == 1);
        assert!(biases.iter().flatten().all(|b| b.len() == n_expert));
        for (first, biases) in (0..n_block).step_by(MAX_BIASES).zip(biases.chunks(MAX_BIASES)) {
            let mut args = Balance {
                loads: loads.address(),
                outcome: outcome.address(),
                biases: [0; MAX_BIASES],
                n_batch: n_batch as u32,
                n_block: n_block as u32,
                first: first as u32,
                n_expert: n_expert as u32,
                rate,
                unused: 0,
            };
            args.biases.iter_mut().zip(biases).for_each(|(to, bias)| *to = bias.map_or(0, View::address));
            let grid = Grid { blocks: [biases.len() as u32, 1, 1], threads: THREADS, shared: 0 };
            // SAFETY: the kernel's argument; loads and biases have the lengths that were checked above.
            unsafe { self.balance.launch(stream, grid, &[Arg::value(args)]) }?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Random, gpu};
    use super::*;
    use half::bf16;
    use param_cuda_emulation::Schedule;
    use proptest::prelude::*;

    const BETAS: (f32, f32, f32) = (0.9, 0.95, 1e-8);
    const NUMBERS: Numbers = Numbers {
        key: [0; 8],
        pass: [0; 2],
        target_share: 0.0,
        batch_share: 0.0,
        lr: 1e-2,
        muon_lr: 0.0,
        bias1: 2.0,
        root2: 1.5,
        clip: 1.0,
        most_scale: 1.0,
    };

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        /// Error bound: 1e-5 of what a parameter moves and of each moment, a few roundings. What no stretch has, and what is left out,
        /// stays to the bit.
        #[test]
        fn stretches_take_the_step_of_the_formula(
            lens in prop::collection::vec(1usize..1500, 1..4), skips: bool, has_copy: bool, seed: u64, schedule in 0usize..4,
        ) {
            let mut random = Random::new(seed);
            let (mut stretches, mut begin, mut moment) = (Vec::new(), 4, 0);
            for (i, &len) in lens.iter().enumerate() {
                let (lr_scale, decay) = ([1.0, 2.0, 0.5][i % 3], [0.1, 0.0][i % 2]);
                stretches.push(Stretch { begin, moment, len, lr_scale, decay });
                begin += len.next_multiple_of(4) + 8;
                moment += len.next_multiple_of(4);
            }
            let [p, g] = [1.0, 0.5].map(|scale| random.floats(begin, scale));
            let (m, v) = (random.floats(moment, 0.1), random.floats(moment, 0.1));
            let v = v.iter().map(|v| v.abs()).collect::<Vec<_>>();
            let scale = if skips { 0.0 } else { 0.75 };
            param_cuda_emulation::schedule(Some(Schedule::ALL[schedule]));
            let gpu = gpu();
            let stream = Stream::new(&gpu).unwrap();
            let adamw = AdamW::new(&gpu).unwrap();
            let [params, grads, first, second] = [&p, &g, &m, &v].map(|x| gpu.upload("", x).unwrap());
            let copy = gpu.upload("", &vec![7u16; begin]).unwrap();
            let numbers = gpu.upload("", &[NUMBERS]).unwrap();
            let outcome = gpu.upload("", &[Outcome { grad_scale: scale, ..Outcome::default() }]).unwrap();
            let chunks = Chunks::new(&gpu, &stretches).unwrap();
            let flat = Flat {
                params: params.view(),
                grads: grads.view(),
                first: first.view(),
                second: second.view(),
                bf16: has_copy.then(|| copy.view()),
            };
            adamw.step(&stream, flat, &chunks, BETAS, numbers.view(), outcome.view()).unwrap();
            stream.synchronize().unwrap();
            param_cuda_emulation::schedule(None);
            let [p1, g1, m1, v1] = [params, grads, first, second].map(|b| b.to_vec().unwrap());
            let b1 = copy.to_vec().unwrap();

            let near = |got: f32, want: f64, size: f64| (f64::from(got) - want).abs() <= 1e-5 * size + 1e-7;
            let mut stays = vec![true; begin];
            for s in &stretches {
                for (i, j) in (s.begin..s.begin + s.len).zip(s.moment..) {
                    stays[i] = skips;
                    prop_assert_eq!(g1[i], 0.0);
                    if skips {
                        prop_assert!(m1[j] == m[j] && v1[j] == v[j]);
                        continue;
                    }
                    let [p, g, m, v] = [p[i], g[i], m[j], v[j]].map(f64::from);
                    let [gain1, beta2, gain2] = [1.0 - BETAS.0, BETAS.1, 1.0 - BETAS.1].map(f64::from);
                    let (c, lr) = (g * f64::from(scale), 1e-2 * f64::from(s.lr_scale));
                    let want_m = m + gain1 * (c - m);
                    let want_v = beta2 * v + gain2 * c * c;
                    let root = want_v.sqrt() * 1.5 + 1e-8;
                    let want = p * (1.0 - lr * f64::from(s.decay)) - lr * 2.0 * want_m / root;
                    prop_assert!(near(m1[j], want_m, m.abs() + c.abs()) && near(v1[j], want_v, v + c * c), "moments {j}");
                    // The first moment may cancel: its rounding counts by its parts.
                    let slack = p.abs() + lr * 2.0 * (m.abs() + c.abs()) / root;
                    prop_assert!(near(p1[i], want, slack), "parameter {i}: {} for {want}", p1[i]);
                    if has_copy {
                        prop_assert_eq!(b1[i], bf16::from_f32(p1[i]).to_bits());
                    }
                }
            }
            for i in (0..begin).filter(|i| stays[*i]) {
                prop_assert!(p1[i] == p[i] && b1[i] == 7, "parameter {i} stays");
            }
            let none = (0..begin).filter(|i| stretches.iter().all(|s| !(s.begin..s.begin + s.len).contains(i)));
            none.for_each(|i| assert_eq!(g1[i], g[i]));
        }

        /// Error bound: 1e-12 of the norm, in f64; one rounding to f32 of the scale.
        #[test]
        fn the_norm_is_taken_and_clipped(
            n in 1usize..9000, clip in 0.1f32..100.0, most_scale in 0.0f32..2.0, fault in 0usize..6, seed: u64, schedule in 0usize..4,
        ) {
            let mut random = Random::new(seed);
            let mut g = random.floats(n, 0.5);
            let mut ce = 3.0f64;
            match fault {
                0 => g[n / 2] = f32::INFINITY,
                1 => g[n - 1] = f32::NAN,
                2 => ce = f64::NAN,
                _ => (),
            }
            let most_scale = (most_scale - 0.2).clamp(0.0, 1.0);
            param_cuda_emulation::schedule(Some(Schedule::ALL[schedule]));
            let gpu = gpu();
            let stream = Stream::new(&gpu).unwrap();
            let adamw = AdamW::new(&gpu).unwrap();
            let grads = gpu.upload("", &g).unwrap();
            let numbers = gpu.upload("", &[Numbers { clip, most_scale, ..NUMBERS }]).unwrap();
            let outcome = gpu.alloc::<Outcome>("", 1).unwrap();
            let (ce_sum, parts) = (gpu.upload("", &[ce]).unwrap(), gpu.alloc::<f64>("", AdamW::n_part(n)).unwrap());
            adamw.sum_of_squares(&stream, grads.view(), parts.view()).unwrap();
            adamw.clip(&stream, numbers.view(), outcome.view(), ce_sum.view(), parts.view()).unwrap();
            stream.synchronize().unwrap();
            param_cuda_emulation::schedule(None);
            let got = outcome.to_vec().unwrap()[0];
            let square = g.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>();
            let want = (f64::from(clip) / (square.sqrt() + 1e-6)).min(1.0) as f32;
            let want = if fault < 3 { 0.0 } else { want.min(most_scale) };
            prop_assert!((got.grad_scale - want).abs() <= 1e-7 * want, "{} for {want}", got.grad_scale);
            if square.is_finite() {
                prop_assert!((got.square_norm - square).abs() <= 1e-12 * square, "{} for {square}", got.square_norm);
            } else {
                prop_assert!(!got.square_norm.is_finite());
            }
        }
    }

    #[test]
    fn what_is_frozen_is_zeroed_and_copies_are_rounded() {
        let gpu = gpu();
        let stream = Stream::new(&gpu).unwrap();
        let adamw = AdamW::new(&gpu).unwrap();
        let x = Random::new(1).floats(5003, 1.0);
        let (params, copy) = (gpu.upload("", &x).unwrap(), gpu.alloc::<u16>("", x.len()).unwrap());
        adamw.copy(&stream, params.view(), copy.view()).unwrap();
        let stretch = |begin, len| Stretch { begin, moment: 0, len, lr_scale: 1.0, decay: 0.0 };
        let chunks = Chunks::new(&gpu, &[stretch(0, 1), stretch(8, 1301), stretch(5000, 3)]).unwrap();
        let grads = gpu.upload("", &x).unwrap();
        adamw.zero(&stream, grads.view(), &chunks).unwrap();
        adamw.zero(&stream, grads.view(), &Chunks::new(&gpu, &[]).unwrap()).unwrap();
        stream.synchronize().unwrap();
        let (copy, grads) = (copy.to_vec().unwrap(), grads.to_vec().unwrap());
        for (i, x) in x.into_iter().enumerate() {
            assert_eq!(copy[i], bf16::from_f32(x).to_bits());
            let is_zero = i == 0 || (8..1309).contains(&i) || i >= 5000;
            assert_eq!(grads[i], if is_zero { 0.0 } else { x }, "{i}");
        }
    }

    #[test]
    fn biases_move_against_the_load_and_rest_at_the_mean() {
        let gpu = gpu();
        let stream = Stream::new(&gpu).unwrap();
        let adamw = AdamW::new(&gpu).unwrap();
        // Two batches, 66 blocks: more than one launch has room for. The first and the last are not like the others.
        let (n_block, n_expert) = (MAX_BIASES + 2, 4);
        let mut loads = [1, 2, 1, 1].repeat(n_block);
        loads.extend([3, 1, 1, 2].repeat(n_block));
        loads[..4].copy_from_slice(&[0, 0, 0, 5]);
        let start = [0.5, 0.0, 0.0, -1.0];
        let biases = gpu.upload("", &start.repeat(n_block)).unwrap();
        let mut views =
            (0..n_block).map(|i| Some(biases.view().part(i * n_expert..(i + 1) * n_expert))).collect::<Vec<_>>();
        views[n_block - 1] = None;
        let loads = gpu.upload("", &loads).unwrap();
        for (grad_scale, moves) in [(0.0, 0.0), (0.5, 0.25)] {
            let outcome = gpu.upload("", &[Outcome { grad_scale, ..Outcome::default() }]).unwrap();
            adamw.balance(&stream, loads.view(), &views, n_expert, 0.25, outcome.view()).unwrap();
            stream.synchronize().unwrap();
            let got = biases.to_vec().unwrap();
            for (i, got) in got.chunks_exact(n_expert).enumerate() {
                // Loads 4, 3, 2, 3 of mean 3; 3, 1, 1, 7 in the first.
                let signs = match i {
                    0 => [0.0, 1.0, 1.0, -1.0],
                    _ if i == n_block - 1 => [0.0; 4],
                    _ => [-1.0, 0.0, 1.0, 0.0],
                };
                let want = std::array::from_fn::<f32, 4, _>(|e| start[e] + signs[e] * moves);
                assert_eq!(got, want, "block {i}");
            }
        }
    }
}
