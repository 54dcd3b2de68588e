//! The GPU's step against the CPU's, on the emulated GPU or, with `PARAM_GPU=1`, on a real one.

use std::sync::Mutex;

use param_model::{Activation, Part};
use rand::RngExt;

use super::*;
use crate::cpu::tests::{Rows, perturbed};
use crate::cpu::{Compute, GradientScale, Losses, Mode, Model, NoiseSource, Precision, Sequences};
use crate::data::{IGNORED, Layout};
use crate::device::Device;
use crate::init::initialise;
use crate::learner::Learner;
use crate::random::stream;
use crate::recipe::Recipe;
use crate::settings::{Dropping, Recompute};
use crate::spikes;

/// The emulation runs one test at a time: each keeps both cores busy.
static TURN: Mutex<()> = Mutex::new(());

fn gpu() -> Arc<Gpu> {
    param_cuda_emulation::preload();
    param_cuda::open().unwrap()
}

fn config() -> Config {
    Config {
        n_vocab: 50,
        n_ctx: 40,
        n_embd: 48,
        n_head: 3,
        n_layer: 2,
        n_expert: 4,
        n_expert_used: 2,
        dropout: 0.0,
        aux_loss_weight: 0.1,
        router_z_loss_weight: 0.05,
        ..Config::preset("param-tiny").unwrap()
    }
}

fn settings(config: &Config) -> Settings {
    Settings { batch_size: 2, context: 21, ..Recipe::Recommended.settings(config, 10) }
}

fn batch(config: &Config, settings: &Settings, rows: Rows, seed: u64) -> Batch {
    let (n_row, n_col) = (settings.batch_size, settings.context);
    let mut rng = stream(seed, 1);
    let n = n_row * n_col;
    let mut token = || rng.random_range(0..config.n_vocab as u32);
    let input = (0..n).map(|_| token()).collect::<Vec<_>>();
    let real = |i: usize| rows != Rows::Padded || i % n_col < n_col - 5;
    let target = (0..n).map(|i| if real(i) { token() as i32 } else { IGNORED }).collect();
    let second = n_col / 3;
    let first = |i: usize| if i % n_col < second { 0 } else { second as u32 };
    Batch {
        n_row,
        input,
        target,
        mask: (rows == Rows::Padded).then(|| (0..n).map(real).collect()),
        first: (rows == Rows::Isolated).then(|| (0..n).map(first).collect()),
        n_bytes: 0,
    }
}

/// The CPU's losses and gradients of a pass that trains.
fn on_the_cpu(
    config: &Config,
    settings: &Settings,
    params: &[Vec<f32>],
    batch: &Batch,
    pass: u64,
) -> (Losses, Vec<Vec<f32>>) {
    let mut model = Model::new(config, Compute { precision: Precision::F32, ..Compute::default() });
    let mut grads = model.zeros();
    let key = Key { seed: settings.seed, pass };
    let mode = Mode {
        dropout: Some(key),
        capacity: settings.dropping.capacity(config, true),
        noise: if config.use_noisy_top_k { NoiseSource::Drawn(key) } else { NoiseSource::Off },
    };
    let (mask, first) = (batch.mask.as_deref(), batch.first.as_deref());
    let sequences = Sequences { ids: &batch.input, n_col: settings.context, mask, first };
    let scale = GradientScale { n_target: batch.n_target(), n_batch: 1 };
    let losses = model.loss_and_gradients(params, &mut grads, sequences, &batch.target, mode, scale);
    (losses, grads)
}

fn learner(config: &Config, settings: &Settings, params: &[Vec<f32>]) -> CudaLearner {
    let table = tensors(config);
    let groups = Group::all(&table, settings).unwrap();
    let moments = Moments::zeros(&table, &groups);
    CudaLearner::new(&gpu(), config, settings, params, groups, &moments).unwrap()
}

fn norm(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|v| v * v).sum::<f64>().sqrt()
}

/// Losses and every gradient of one pass are the CPU's, each within `bound` of its norm. Routing must not hang on rounding: all experts
/// are chosen where products are rounded.
fn check(config: &Config, settings: &Settings, rows: Rows, bound: f64) {
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    settings.check(config).unwrap();
    let (params, batch) = (perturbed(config), batch(config, settings, rows, 13));
    let (losses, grads) = on_the_cpu(config, settings, &params, &batch, 3);
    let mut learner = learner(config, settings, &params);
    learner.accumulate(settings, 3, std::slice::from_ref(&batch)).unwrap();
    let (got, got_norm) = learner.outcome().unwrap();
    let want = BatchLosses::from(&losses);
    let near = |got: f64, want: f64, what: &str| {
        assert!((got - want).abs() <= 0.1 * bound * want.abs(), "{what}: {got}, expected {want}");
    };
    near(got[0].cross_entropy.sum, want.cross_entropy.sum, "cross-entropy");
    assert_eq!(got[0].cross_entropy.n_target, want.cross_entropy.n_target);
    for (got, want) in got[0].routers.iter().zip(&want.routers) {
        assert_eq!((&got.load, got.n_dropped), (&want.load, want.n_dropped));
        near(got.aux, want.aux, "aux");
        near(got.z, want.z, "z");
        near(got.entropy, want.entropy, "entropy");
    }
    let got = learner.gradients().unwrap();
    for ((spec, want), got) in learner.table.iter().zip(&grads).zip(&got) {
        let size = norm(want.iter().map(|&g| f64::from(g)));
        let off = norm(want.iter().zip(got).map(|(a, b)| f64::from(a - b)));
        // The key's bias has no gradient but rounding.
        let least = if spec.part == Part::AttnKBias { 1.0 } else { 1e-7 };
        assert!(off <= bound * size.max(least), "gradient of {}: off by {} of {size}", spec.checkpoint, off);
    }
    let all = norm(grads.iter().flatten().map(|&g| f64::from(g)));
    near(got_norm, all, "norm of the gradients");
    // What is evaluated has neither noise nor dropout.
    let capacity = settings.dropping.capacity(config, false);
    let mut cpu = crate::cpu::CpuModel::new(config, &Settings { dtype: Dtype::F32, ..settings.clone() }, 1, params);
    let (got, want) = (learner.loss(&batch, capacity).unwrap(), cpu.loss(&batch, capacity).unwrap());
    near(got.sum, want.sum, "loss in evaluation");
    let (got, want) = (learner.logits(&batch.input[..7]).unwrap(), cpu.logits(&batch.input[..7]).unwrap());
    let off = norm(got.iter().zip(&want).map(|(a, b)| f64::from(a - b)));
    assert!(off <= bound * norm(want.iter().map(|&x| f64::from(x))), "logits");
}

/// Bound: 1e-4 of each gradient's norm, for sums of f32 in another order and factors split into two of 11 bits.
const F32: f64 = 1e-4;

#[test]
fn gradients_are_the_cpus_under_dropout_and_drawn_noise() {
    let config = Config { dropout: 0.2, ..config() };
    for deterministic in [true, false] {
        check(&config, &Settings { deterministic, ..settings(&config) }, Rows::Whole, F32);
    }
}

#[test]
fn gradients_are_the_cpus_with_padding_and_dropped_choices() {
    let config = Config { use_noisy_top_k: false, train_capacity: 0.7, ..config() };
    let base = settings(&config);
    let settings = Settings { layout: Layout::OneDocumentPerRow, dropping: Dropping::ByCapacity, ..base };
    check(&config, &settings, Rows::Padded, F32);
}

#[test]
fn gradients_are_the_cpus_within_documents_and_computed_again() {
    let config = Config { dropout: 0.1, use_noisy_top_k: false, ..config() };
    for recompute in [Recompute::FeedForward, Recompute::Blocks] {
        let settings = Settings { isolate_documents: true, recompute, ..settings(&config) };
        check(&config, &settings, Rows::Isolated, F32);
    }
}

#[test]
fn gradients_are_the_cpus_for_every_other_shape_of_model() {
    let base = Config { use_noisy_top_k: false, ..config() };
    for config in [
        Config { qkv_bias: true, expert_bias: false, moe_stride: 1, n_layer: 1, ..base.clone() },
        Config { n_expert: 1, n_expert_used: 1, moe_stride: 1, use_noisy_top_k: true, n_layer: 1, ..base.clone() },
        Config { moe_phase: 1, expert_activation: Activation::GeluTanh, use_selection_bias: true, ..base.clone() },
    ] {
        check(&config, &settings(&config), Rows::Whole, F32);
    }
}

/// Bounds: 3e-2 for factors of 8 bits, 3e-3 for those of 11.
#[test]
fn gradients_in_bf16_and_tf32_are_near() {
    param_cuda_emulation::preload_cublaslt();
    let config = Config { n_expert_used: 4, ..config() };
    for (dtype, bound) in [(Dtype::Bf16, 3e-2), (Dtype::Tf32, 3e-3)] {
        for cublaslt in [true, false] {
            check(&config, &Settings { dtype, cublaslt, ..settings(&config) }, Rows::Whole, bound);
        }
    }
}

/// The same bound as in bf16 by mma.sync; beside that, gradients differ by what sums of f32 in another order round, of activations that are
/// rounded to 8 bits: 5e-3 of each.
#[test]
fn gradients_by_warpgroups_are_those_by_warps() {
    let wgmma = training::Matmul::Wgmma;
    if param_cuda_emulation::is_real() && wgmma.check(&gpu(), training::Arithmetic::Bf16).is_err() {
        return;
    }
    // Wide enough that tiles by warpgroups are the fastest for some products.
    let config = Config { n_expert_used: 4, n_embd: 128, n_head: 4, ..config() };
    let by = |matmul| Settings {
        dtype: Dtype::Bf16,
        matmul,
        cublaslt: false,
        batch_size: 4,
        context: 40,
        ..settings(&config)
    };
    check(&config, &by(Matmul::Wgmma), Rows::Whole, 3e-2);
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (params, batch) = (perturbed(&config), batch(&config, &by(Matmul::Mma), Rows::Whole, 13));
    let [want, got] = [Matmul::Mma, Matmul::Wgmma].map(|matmul| {
        let mut learner = learner(&config, &by(matmul), &params);
        learner.accumulate(&by(matmul), 3, std::slice::from_ref(&batch)).unwrap();
        learner.outcome().unwrap();
        learner.gradients().unwrap()
    });
    // Warpgroups add in another order.
    assert!(want != got, "the same kernels computed both");
    for (spec, (want, got)) in tensors(&config).iter().zip(want.iter().zip(&got)) {
        let off = norm(want.iter().zip(got).map(|(a, b)| f64::from(a - b)));
        let size = norm(want.iter().map(|&g| f64::from(g)));
        let least = if spec.part == Part::AttnKBias { 1.0 } else { 1e-7 };
        assert!(off <= 5e-3 * size.max(least), "gradient of {}: off by {off} of {size}", spec.checkpoint);
    }
}

/// Steps of the same run, of two batches each, on one device; losses, and the parameters at the end.
fn run(device: &Device, config: &Config, settings: &Settings, n_step: u64) -> (Vec<f64>, Vec<Vec<f32>>) {
    let mut learner = Learner::new(config, settings, device, initialise(config, 1)).unwrap();
    let losses = (0..n_step).map(|step| {
        let batches = [0, 1].map(|i| batch(config, settings, Rows::Whole, 100 + step % 3 * 2 + i));
        learner.step(settings, step, &batches).unwrap().loss
    });
    let losses = losses.collect();
    (losses, learner.model.params().unwrap().into_owned())
}

/// Bounds: 1e-3 of a loss; of how far parameters moved in the emulation's few steps 1e-2 by AdamW, and a tenth by Muon, which raises what
/// is far below the largest singular value of a gradient, rounding included, to the size of all else.
#[test]
fn steps_go_where_the_cpus_go() {
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let config = Config { use_selection_bias: true, ..config() };
    for (recipe, bound) in [(Recipe::Recommended, 0.1), (Recipe::AdamW, 1e-2)] {
        let base = Settings { batch_size: 2, context: 12, accumulation: 2, ..recipe.settings(&config, 10) };
        let freeze = vec!["position_emb".to_owned()];
        let settings = Settings { freeze, bias_rate: 1e-2, lr_scale: vec![("experts".to_owned(), 0.5)], ..base };
        let n_step = if param_cuda_emulation::is_real() { 50 } else { 4 };
        let [(want, there), (got, here)] =
            [Device::cpu(), Device::Cuda { gpu: gpu() }].map(|device| run(&device, &config, &settings, n_step));
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() <= 1e-3 * want, "losses {got}, expected {want}");
        }
        if param_cuda_emulation::is_real() {
            continue; // rounding has grown over the many steps
        }
        let start = initialise(&config, 1);
        for (spec, (start, (here, there))) in tensors(&config).iter().zip(start.iter().zip(here.iter().zip(&there))) {
            let moved = norm(start.iter().zip(there).map(|(a, b)| f64::from(a - b)));
            let off = norm(here.iter().zip(there).map(|(a, b)| f64::from(a - b)));
            assert!(off <= bound * moved, "{}: {off} from where the CPU went, {moved} from the start", spec.checkpoint);
        }
    }
}

#[test]
fn the_same_steps_give_the_same_bits_and_what_was_saved_goes_on() {
    // Its first pass of a shape is not recorded, those after it are.
    param_cuda_emulation::preload_cublaslt();
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let config = Config { dropout: 0.1, ..config() };
    let base = Settings { batch_size: 2, context: 12, accumulation: 2, ..Recipe::Recommended.settings(&config, 10) };
    let settings = Settings { dtype: Dtype::Bf16, ..base };
    let device = Device::Cuda { gpu: gpu() };
    let (whole, params) = run(&device, &config, &settings, 3);
    let (first, half) = run(&device, &config, &settings, 2);
    assert_eq!(first, whole[..2]);
    let mut learner = Learner::new(&config, &settings, &device, initialise(&config, 1)).unwrap();
    for step in 0..2 {
        let batches = [0, 1].map(|i| batch(&config, &settings, Rows::Whole, 100 + step % 3 * 2 + i));
        learner.step(&settings, step, &batches).unwrap();
    }
    let moments = learner.model.moments().unwrap().into_owned();
    assert!(learner.model.params().unwrap().as_ref() == half);
    let mut learner = Learner::restored(&config, &settings, &device, half, moments, learner.watch).unwrap();
    let batches = [0, 1].map(|i| batch(&config, &settings, Rows::Whole, 100 + 2 * 2 + i));
    assert_eq!(learner.step(&settings, 2, &batches).unwrap().loss, whole[2]);
    assert!(learner.model.params().unwrap().as_ref() == params, "a resumed run goes elsewhere");
}

#[test]
fn a_step_that_is_not_finite_or_a_spike_changes_nothing() {
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let config = Config { n_layer: 1, ..config() };
    let base = Settings { batch_size: 1, context: 8, ..Recipe::Recommended.settings(&config, 10) };
    let device = Device::Cuda { gpu: gpu() };
    let mut params = initialise(&config, 1);
    let batches = [batch(&config, &base, Rows::Whole, 5)];
    params[0][0] = f32::INFINITY;
    for spikes in [None, Some(spikes::Rule { z: 6.0, action: spikes::Action::Skip })] {
        let settings = Settings { spikes, ..base.clone() };
        let mut learner = Learner::new(&config, &settings, &device, params.clone()).unwrap();
        let error = learner.step(&settings, 0, &batches).unwrap_err();
        assert!(matches!(error, Error::NotFinite { step: 1, .. }), "{error}");
        assert!(learner.model.params().unwrap().as_ref() == params);
    }
    params[0][0] = 0.0;
    let mut learner = self::learner(&config, &base, &params);
    learner.accumulate(&base, 0, &batches).unwrap();
    learner.update(&base, 0, 0.0).unwrap();
    assert!(learner.params().unwrap().as_ref() == params);
    assert!(learner.gradients().unwrap().iter().flatten().all(|&g| g == 0.0));
}

/// What is planned is what is taken, to the byte but for what is uploaded from.
#[test]
fn memory_is_what_was_planned() {
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if param_cuda_emulation::is_real() {
        return; // others may use it
    }
    let config = config();
    let settings = Settings { dtype: Dtype::Bf16, ..settings(&config) };
    let gpu = gpu();
    let before = gpu.memory().unwrap().0;
    let learner = learner(&config, &settings, &initialise(&config, 1));
    let taken = (before - gpu.memory().unwrap().0) as u64;
    let planned = memory(&config, &settings).unwrap().total();
    assert!(planned.abs_diff(taken) <= planned / 20, "planned {planned}, taken {taken}");
    drop(learner);
    assert!(largest_batch(&config, &settings, planned).unwrap().is_some_and(|n| n == 2));
    assert!(largest_batch(&config, &settings, 1000).unwrap().is_none());
}
