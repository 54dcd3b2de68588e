//! Steps of tiny random models through the emulated GPU, against the same forward pass in f64.

mod reference;

use std::sync::Arc;

use param_cuda::decode::{Decoder, NO_LOGITS, NO_ROOM, NOT_FINITE, Pick};
use param_cuda::model::Format;
use param_cuda::sampling::Sampling;
use param_cuda::{Caches, Gpu, Stream};
use param_cuda_emulation::{Schedule, assert_noticed, is_real, schedule};
use proptest::prelude::*;
use reference::{Shape, TinyModel};

fn gpu() -> Arc<Gpu> {
    param_cuda_emulation::preload();
    param_cuda::open().unwrap()
}

/// Largest difference relative to the norm of what is wanted, times the root of its length.
fn error(got: &[f32], want: &[f64]) -> f64 {
    let norm = (want.iter().map(|w| w * w).sum::<f64>() / want.len() as f64).sqrt();
    got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).abs()).fold(0.0, f64::max) / norm
}

struct Run {
    decoder: Decoder,
    stream: Stream,
}

impl Run {
    fn new(gpu: &Arc<Gpu>, model: &TinyModel, n_slot: usize) -> Run {
        let device = Arc::new(model.upload(gpu));
        let caches = Arc::new(Caches::new(&device, n_slot, model.shape.n_ctx).unwrap());
        let decoder = Decoder::new(&device, &caches).unwrap();
        Run { decoder, stream: Stream::new(gpu).unwrap() }
    }

    fn logits(&self) -> Vec<f32> {
        self.decoder.logits().to_vec().unwrap()
    }

    /// Runs a token and gives the next.
    fn step(&mut self, pick: Pick) -> u32 {
        self.decoder.step(&self.stream, pick).unwrap();
        self.stream.synchronize().unwrap();
        self.decoder.chosen(self.decoder.n_chosen() - 1)
    }
}

/// Runs `n_step` tokens of a sequence and compares the logits of each.
fn compare(shape: &Shape, seed: u64, n_step: usize, bound: f64) {
    let gpu = gpu();
    let model = TinyModel::random(shape, seed);
    let mut run = Run::new(&gpu, &model, 2);
    let (mut sequence, mut token) = (model.sequence(), 3 % shape.n_vocab as u32);
    run.decoder.set(1, token, 0).unwrap();
    for step in 0..n_step {
        let chosen = run.step(Pick::Greedy);
        let (want, got) = (model.forward(&mut sequence, token), run.logits());
        let error = error(&got, &want);
        assert!(error < bound, "step {step}: {error} in {shape:?}");
        let best = (0..got.len()).rev().max_by(|&a, &b| got[a].total_cmp(&got[b])).unwrap();
        assert_eq!(chosen as usize, best);
        token = chosen;
    }
    assert_eq!(run.decoder.flags(), 0);
}

fn shape(format: Format) -> Shape {
    let mut shape = Shape {
        n_vocab: 75,
        n_ctx: 80,
        n_head: 3,
        head_dim: 32,
        n_layer: 2,
        n_ff: 160,
        n_expert: 5,
        n_used: 2,
        stride: 2,
        formats: [format; 8],
        cache_f32: true,
        biases: true,
        selection_bias: true,
    };
    if matches!(format, Format::Q4K | Format::Q6K) {
        (shape.n_head, shape.head_dim, shape.n_ff) = (4, 64, 512);
    }
    shape
}

const FORMATS: [Format; 6] = [Format::F32, Format::F16, Format::Bf16, Format::Q8_0, Format::Q4K, Format::Q6K];

/// Activations of 15 bits, relative to the largest of 32.
const BOUND: f64 = 5e-4;

#[test]
fn every_format_gives_the_logits_of_f64() {
    for format in FORMATS {
        let plain = matches!(format, Format::F32 | Format::F16 | Format::Bf16);
        compare(&shape(format), 1, 3, if plain { 1e-5 } else { BOUND });
    }
}

#[test]
fn no_schedule_changes_a_token() {
    for (i, order) in Schedule::ALL.into_iter().enumerate() {
        schedule(Some(order));
        let shape = Shape { biases: i % 2 == 0, selection_bias: i % 2 == 1, ..shape(Format::Q8_0) };
        compare(&shape, i as u64, 3, BOUND);
    }
    schedule(None);
}

#[test]
fn formats_mix_freely() {
    use Format::{Bf16, F16, F32, Q4K, Q6K, Q8_0};
    let shape = Shape { formats: [Q6K, Q4K, Q8_0, F16, Q6K, Q4K, Bf16, F32], ..shape(Format::Q4K) };
    compare(&shape, 3, 3, BOUND);
    let shape = Shape { formats: [F32, F16, Q6K, Q4K, Bf16, Q8_0, Q4K, Q6K], ..shape };
    compare(&shape, 4, 2, BOUND);
}

#[test]
fn keys_and_values_in_f16_cost_little() {
    let shape = Shape { cache_f32: false, ..shape(Format::F16) };
    compare(&shape, 5, 12, 2e-3);
}

#[test]
fn a_long_sequence_is_attended_to_in_parts() {
    let shape = Shape { n_head: 1, head_dim: 24, n_layer: 1, n_ctx: 300, ..shape(Format::F32) };
    compare(&shape, 6, 290, 1e-5);
}

#[test]
fn sequences_take_turns_without_reaching_each_other() {
    let gpu = gpu();
    let model = TinyModel::random(&shape(Format::F16), 7);
    let mut run = Run::new(&gpu, &model, 2);
    let mut sequences = [model.sequence(), model.sequence()];
    let mut tokens = [5, 6];
    for position in 0..4 {
        for (slot, token) in tokens.iter_mut().enumerate() {
            run.decoder.set(slot, *token, position).unwrap();
            let chosen = run.step(Pick::Greedy);
            assert!(error(&run.logits(), &model.forward(&mut sequences[slot], *token)) < 1e-5);
            *token = chosen;
        }
    }
}

#[test]
fn of_equals_the_lower_is_chosen() {
    let gpu = gpu();
    let mut model = TinyModel::random(&shape(Format::F16), 10);
    model.tie();
    let mut run = Run::new(&gpu, &model, 2);
    let three = Sampling {
        temperature: 1.0,
        top_k: 3,
        top_p: 1.0,
        min_p: 0.0,
        repeat_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        penalties: Vec::new(),
    };
    for (pick, want) in [(Pick::Greedy, 0), (Pick::Sample, 2)] {
        run.decoder.set(0, 5, 0).unwrap();
        run.decoder.set_sampling(&three).unwrap();
        run.decoder.set_uniform(0.9);
        assert_eq!(run.step(pick), want);
        assert!(error(&run.logits(), &model.forward(&mut model.sequence(), 5)) < 3e-5);
    }
}

#[test]
fn damage_is_flagged() {
    let gpu = gpu();
    let mut model = TinyModel::random(&shape(Format::F32), 8);
    model.position_embd[model.shape.n_embd()] = f32::NAN;
    let mut run = Run::new(&gpu, &model, 2);
    run.decoder.set(1, 1, 1).unwrap();
    run.step(Pick::Greedy);
    assert_eq!(run.decoder.flags(), NOT_FINITE | NO_LOGITS);
    run.decoder.set(0, 1, 0).unwrap();
    run.step(Pick::Greedy);
    assert_eq!(run.decoder.flags(), 0);
    assert!(error(&run.logits(), &model.forward(&mut model.sequence(), 1)) < 1e-5);
}

#[test]
fn a_sequence_without_room_is_flagged() {
    let shape = Shape { n_ctx: 2, n_layer: 1, ..shape(Format::F16) };
    let gpu = gpu();
    let mut run = Run::new(&gpu, &TinyModel::random(&shape, 9), 1);
    run.decoder.set(0, 1, 0).unwrap();
    for want in [0, 0, NO_ROOM] {
        run.step(Pick::Greedy);
        assert_eq!(run.decoder.flags(), want);
    }
}

/// A test of these tests: whatever barrier or wait is left out, they notice.
#[test]
fn a_kernel_that_does_not_wait_is_found_out() {
    if is_real() {
        return;
    }
    let edits = [
        ("round_activations(s, n_padded);\n            __syncthreads();", "round_activations(s, n_padded);"),
        ("        copy_async_wait<0>();\n        grid_wait", "        grid_wait"),
        ("grid_wait(d.barrier, round);\n    }", "__syncthreads();\n    }"),
    ];
    assert_noticed("decode.cu", &edits, "no_schedule_changes_a_token");
}

/// What param-runtime's sampler does, from the logits it is given.
fn sample(logits: &[f32], by: &Sampling, uniform: f64) -> u32 {
    let mut list: Vec<(f32, u32)> = logits.iter().copied().zip(0..).collect();
    for &(token, count) in &by.penalties {
        let logit = &mut list[token as usize].0;
        *logit = if *logit > 0.0 { *logit / by.repeat_penalty } else { *logit * by.repeat_penalty };
        *logit -= count as f32 * by.frequency_penalty + by.presence_penalty;
    }
    list.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let max = list[0].0;
    if by.temperature == 0.0 {
        return list[0].1;
    }
    list.truncate(by.top_k);
    let weights = |list: &[(f32, u32)], temperature: f32| -> Vec<f64> {
        let scale = 1.0 / f64::from(temperature);
        list.iter().map(|c| ((f64::from(c.0) - f64::from(max)) * scale).exp()).collect()
    };
    if by.top_p < 1.0 {
        let weights = weights(&list, 1.0);
        let enough = f64::from(by.top_p) * weights.iter().sum::<f64>();
        let mut sum = 0.0;
        let last = weights.iter().position(|w| {
            sum += w;
            sum >= enough
        });
        list.truncate(last.map_or(list.len(), |last| last + 1));
    }
    list.retain(|c| c.0 - max >= by.min_p.ln());
    let weights = weights(&list, by.temperature);
    let mut left = uniform * weights.iter().sum::<f64>();
    let drawn = weights.iter().position(|w| {
        left -= w;
        left < 0.0
    });
    list[drawn.unwrap_or(list.len() - 1)].1
}

#[test]
fn sampling_follows_the_rules_of_the_cpu() {
    let gpu = gpu();
    let model = TinyModel::random(&Shape { n_vocab: 1000, n_layer: 1, ..shape(Format::F16) }, 9);
    let plain = Sampling {
        temperature: 1.0,
        top_k: 256,
        top_p: 1.0,
        min_p: 0.0,
        repeat_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        penalties: Vec::new(),
    };
    let penalties: Vec<(u32, u32)> = (0..200).map(|i| (i * 5, i % 3 + 1)).collect();
    let penalized =
        Sampling { repeat_penalty: 1.3, presence_penalty: 0.2, frequency_penalty: 0.1, penalties, ..plain.clone() };
    let all = [
        Sampling { top_k: 40, top_p: 0.9, ..plain.clone() },
        Sampling { temperature: 0.7, min_p: 0.05, ..plain.clone() },
        Sampling { top_k: 1, ..penalized.clone() },
        Sampling { temperature: 0.0, ..penalized.clone() },
        Sampling { temperature: 1.5, top_k: 255, top_p: 0.5, ..penalized.clone() },
        Sampling { temperature: 3.0, ..plain.clone() },
        Sampling { top_k: 17, ..penalized },
    ];
    let mut run = Run::new(&gpu, &model, 1);
    for (turn, sampling) in all.iter().enumerate() {
        run.decoder.set(0, turn as u32, 0).unwrap();
        run.decoder.set_sampling(sampling).unwrap();
        for step in 0..8 {
            let uniform = (step * 3 + turn % 3) as f64 / 24.0 + 0.01;
            run.decoder.set_uniform(uniform);
            let chosen = run.step(Pick::Sample);
            assert_eq!(chosen, sample(&run.logits(), sampling, uniform), "{sampling:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn any_shape_gives_the_logits_of_f64(
        format in prop::sample::select(FORMATS.to_vec()), n_head in 1usize..6, head_dim in 1usize..10, n_ff in 1usize..200,
        n_vocab in 1usize..200, n_expert in 1usize..8, n_used in 1usize..4, seed: u64,
    ) {
        let (mut head_dim, mut n_head, mut n_ff) = (head_dim * 8, n_head, n_ff);
        match format {
            Format::Q8_0 => (head_dim, n_ff) = (32, n_ff.next_multiple_of(32)),
            Format::Q4K | Format::Q6K => (head_dim, n_head, n_ff) = (128, 2, if n_ff > 100 { 512 } else { 256 }),
            _ => {}
        }
        let shape = Shape {
            n_vocab, n_ctx: 16, n_head, head_dim, n_ff, n_expert, n_used: n_used.min(n_expert), formats: [format; 8],
            ..shape(Format::F32)
        };
        compare(&shape, seed, 2, if matches!(format, Format::F32 | Format::F16 | Format::Bf16) { 1e-4 } else { 1e-3 });
    }
}
