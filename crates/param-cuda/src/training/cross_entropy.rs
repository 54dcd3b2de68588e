//! Cross-entropy of logits against targets, with the gradient of the logits.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::{Element, Numbers, Rows, View};
use crate::args;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::kernel::{Arg, Grid, Kernel, Module};
use crate::stream::Stream;

const PTX: &str = include_str!("../../ptx/train_cross_entropy.ptx");
const THREADS: u32 = 512;
/// Bytes of shared memory that are left to the kernel's own variables.
const OWN_SHARED: usize = 1024;
/// Logits of a row that shared memory keeps, at most: tests go beyond with few.
const MAX_CACHED: usize = if cfg!(test) { 2400 } else { 1 << 16 };

/// `CrossEntropy` in train_cross_entropy.cu, field by field.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Args {
    logits: u64,
    targets: u64,
    loss: u64,
    dlogits: u64,
    numbers: u64,
    n_vocab: u32,
    stride: u32,
    d_stride: u32,
    d_stored: u32,
    n_cached: u32,
    unused: u32,
}

/// The kernels.
#[derive(Debug)]
pub struct CrossEntropy {
    rows: Kernel,
    total: Kernel,
    n_cached: usize,
}

impl CrossEntropy {
    /// Loads the kernels.
    ///
    /// # Errors
    /// [`crate::Error::Call`], [`crate::Error::Kernel`].
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let module = Module::load(gpu, PTX)?;
        let rows = module.kernel("cross_entropy")?;
        let n_cached = ((gpu.max_shared() - OWN_SHARED) / size_of::<f32>()).min(MAX_CACHED) / 4 * 4;
        rows.allow_shared((n_cached * size_of::<f32>()) as u32)?;
        Ok(Self { rows, total: module.kernel("cross_entropy_total")?, n_cached })
    }

    /// `loss = -log softmax(logits)[target]` in nats, and where gradients are wanted their rows, `(softmax - onehot) target_share` by the
    /// numbers in device memory. A row whose target is no column (negative, as a rule) does not count: its loss and gradient are zero.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// If shapes do not fit, or `logits` are not in f32.
    pub fn run(
        &self,
        stream: &Stream,
        logits: Rows,                             // f32, [n_row, n_vocab]
        targets: View<i32>,                       // [n_row]
        loss: View<f32>,                          // [n_row]
        gradients: Option<(Rows, View<Numbers>)>, // [n_row, n_vocab]
    ) -> Result<()> {
        let (n, n_vocab) = (logits.n_row(), logits.n_col());
        assert!(logits.element() == Element::F32 && targets.len() == n && loss.len() == n && n_vocab > 0);
        if let Some((dlogits, numbers)) = gradients {
            assert!(dlogits.n_row() == n && dlogits.n_col() == n_vocab && numbers.len() == 1);
        }
        if n == 0 {
            return Ok(());
        }
        let n_cached = gradients.map_or(0, |_| self.n_cached.min(n_vocab.next_multiple_of(4)));
        let args = Args {
            logits: logits.address(),
            targets: targets.address(),
            loss: loss.address(),
            dlogits: gradients.map_or(0, |(dlogits, _)| dlogits.address()),
            numbers: gradients.map_or(0, |(_, numbers)| numbers.address()),
            n_vocab: n_vocab as u32,
            stride: logits.stride() as u32,
            d_stride: gradients.map_or(0, |(dlogits, _)| dlogits.stride() as u32),
            d_stored: gradients.map_or(Element::F32, |(dlogits, _)| dlogits.element()) as u32,
            n_cached: n_cached as u32,
            unused: 0,
        };
        let grid = Grid { blocks: [n as u32, 1, 1], threads: THREADS, shared: (n_cached * size_of::<f32>()) as u32 };
        // SAFETY: the kernel's argument; a block keeps to its row, whose columns were checked, and to shared memory of `n_cached` logits.
        unsafe { self.rows.launch(stream, grid, &[Arg::value(args)]) }
    }

    /// Adds the losses to `sum`.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// If `sum` is not one number.
    pub fn add_up(&self, stream: &Stream, loss: View<f32>, sum: View<f64>) -> Result<()> {
        assert_eq!(sum.len(), 1);
        let grid = Grid { blocks: [1, 1, 1], threads: THREADS, shared: 0 };
        // SAFETY: the kernel's arguments, with the length of the one and room for the other.
        unsafe { self.total.launch(stream, grid, &args![loss, loss.len() as u32, sum]) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Random, Stored, gpu};
    use super::*;
    use param_cuda_emulation::Schedule;
    use proptest::prelude::*;

    /// Losses, gradients and the sum of the losses, starting from 0.5.
    fn run(
        x: &[f32],
        targets: &[i32],
        share: f32,
        element: Option<Element>,
        schedule: Schedule,
    ) -> (Vec<f32>, Vec<f32>, f64) {
        param_cuda_emulation::schedule(Some(schedule));
        let gpu = gpu();
        let stream = Stream::new(&gpu).unwrap();
        let ce = CrossEntropy::new(&gpu).unwrap();
        let (n, n_vocab) = (targets.len(), x.len() / targets.len());
        let logits = Stored::new(&gpu, x, Element::F32, n_vocab);
        let numbers = gpu.upload("", &[Numbers { target_share: share, ..Numbers::default() }]).unwrap();
        let (targets, sum) = (gpu.upload("", targets).unwrap(), gpu.upload("", &[0.5f64]).unwrap());
        let loss = gpu.upload("", &vec![f32::NAN; n]).unwrap();
        let kind = element.unwrap_or(Element::F32);
        let dlogits = Stored::new(&gpu, &vec![f32::NAN; x.len()], kind, n_vocab);
        let gradients = element.map(|_| (dlogits.rows(), numbers.view()));
        ce.run(&stream, logits.rows(), targets.view(), loss.view(), gradients).unwrap();
        ce.add_up(&stream, loss.view(), sum.view()).unwrap();
        stream.synchronize().unwrap();
        param_cuda_emulation::schedule(None);
        (loss.to_vec().unwrap(), dlogits.to_vec(), sum.to_vec().unwrap()[0])
    }

    /// Error bounds: 1e-5 for the loss of logits up to 60 (their rounding); 2e-6 of the share for gradients, and half an ulp of bf16 where
    /// that is what they are stored in.
    fn check(
        x: &[f32],
        targets: &[i32],
        share: f32,
        element: Option<Element>,
        schedule: Schedule,
    ) -> std::result::Result<(), TestCaseError> {
        let (losses, gradients, sum) = run(x, targets, share, element, schedule);
        let n_vocab = x.len() / targets.len();
        let mut total = 0.5;
        for (row, (x, &target)) in x.chunks_exact(n_vocab).zip(targets).enumerate() {
            let most = x.iter().fold(f64::NEG_INFINITY, |m, &v| m.max(f64::from(v)));
            let lse = most + x.iter().map(|&v| (f64::from(v) - most).exp()).sum::<f64>().ln();
            let got = f64::from(losses[row]);
            total += got;
            let want = usize::try_from(target).map_or(0.0, |target| lse - f64::from(x[target]));
            prop_assert!((got - want).abs() <= 1e-5, "loss {got} for {want}");
            let Some(element) = element else { continue };
            for (i, (&x, &got)) in x.iter().zip(&gradients[row * n_vocab..]).enumerate() {
                let onehot = f64::from(u8::from(i as i32 == target));
                let want = if target < 0 { 0.0 } else { f64::from(share) * ((f64::from(x) - lse).exp() - onehot) };
                let rounding = if element == Element::Bf16 { want.abs() / 256.0 } else { 0.0 };
                let slack = 2e-6 * f64::from(share) + rounding;
                prop_assert!((f64::from(got) - want).abs() <= slack, "row {row}, logit {i}: {got} for {want}");
            }
        }
        prop_assert!((sum - total).abs() <= 1e-12 * total.abs(), "sum {sum} for {total}");
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn losses_and_gradients_are_those_of_the_formula(
            n in 1usize..5, n_vocab in 1usize..300, share in 0.01f32..1.0, scale in 0.1f32..60.0, which in 0usize..3,
            schedule in 0usize..4, seed: u64,
        ) {
            let mut random = Random::new(seed);
            let x = random.floats(n * n_vocab, scale);
            let targets = (0..n).map(|_| random.below(n_vocab + n_vocab / 4 + 1) as i32).collect::<Vec<_>>();
            let targets = targets.iter().map(|t| if *t < n_vocab as i32 { *t } else { -100 }).collect::<Vec<_>>();
            let element = [None, Some(Element::F32), Some(Element::Bf16)][which];
            check(&x, &targets, share, element, Schedule::ALL[schedule])?;
        }
    }

    /// Through every turn of the loops, with the cache's end in the middle, and the target in each of its places.
    #[test]
    fn long_rows_are_differentiated() {
        for (n_vocab, schedule) in [2400, 2402, 4 * 512 * 5 + 3, 4 * 512 * 4 + 1].into_iter().zip(Schedule::ALL) {
            let x = Random::new(n_vocab as u64).floats(3 * n_vocab, 20.0);
            check(&x, &[2399, -1, n_vocab as i32 - 1], 0.5, Some(Element::Bf16), schedule).unwrap();
        }
    }

    #[test]
    fn nothing_is_hidden_and_what_has_no_chance_is_nothing() {
        let out = f32::NEG_INFINITY;
        let x = [1.0, out, 1.0, out, f32::NAN, 1.0, f32::INFINITY, 0.0];
        let (losses, gradients, sum) = run(&x, &[2, 1], 1.0, Some(Element::F32), Schedule::Ascending);
        assert!((losses[0] - 2.0f32.ln()).abs() < 1e-6);
        assert_eq!(gradients[..4], [0.5, 0.0, -0.5, 0.0]);
        assert!(losses[1].is_nan() && sum.is_nan());
    }
}
