//! Gradients against numerical derivatives, for what the reference's golden numbers leave out: dropout, drawn noise, and
//! the config's other options.

use std::ops::Range;

use param_model::{Activation, Config, Part};
use rand::RngExt;

use super::{
    Capacity, Compute, GradientScale, Losses, Memory, Mode, Model, NoiseSource, Precision, Section, Sequences,
    operations_per_token,
};
use crate::data::IGNORED;
use crate::init::initialise;
use crate::optimizer::Group;
use crate::random::{Key, stream};
use crate::recipe::Recipe;
use crate::settings::Recompute;

fn config() -> Config {
    Config {
        n_vocab: 50,
        n_ctx: 80,
        n_embd: 24,
        n_head: 3,
        n_layer: 3,
        // All experts chosen: the loss has no jumps, as it does where the choice changes. Choosing is held by golden numbers.
        n_expert: 4,
        n_expert_used: 4,
        dropout: 0.0,
        aux_loss_weight: 0.1,
        router_z_loss_weight: 0.05,
        ..Config::preset("param-tiny").unwrap()
    }
}

/// Initial parameters with nothing left at zero, so that every path carries a gradient.
pub(crate) fn perturbed(config: &Config) -> Vec<Vec<f32>> {
    let mut params = initialise(config, 11);
    let mut rng = stream(12, 0);
    params.iter_mut().flatten().for_each(|p| *p += 0.1 * (rng.random::<f32>() - 0.5));
    params
}

/// What the positions of a row see.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Rows {
    Whole,
    /// Not the last five.
    Padded,
    /// Only their own document, of two.
    Isolated,
}

/// Where documents begin in rows that two of them share.
fn first_of_two(n_row: usize, n_col: usize, second: usize) -> Vec<u32> {
    (0..n_row * n_col).map(|i| if i % n_col < second { 0 } else { second as u32 }).collect()
}

/// Along each tensor's own gradient g the loss must change by |g| per unit of length.
///
/// Bound: 1% of the slope, what a central difference of an f32 loss of about 4 (rounded to 3e-7) leaves over a change of
/// 1e-3, plus the curvature.
fn check(config: &Config, mode: Mode, n_col: usize, rows: Rows) {
    let mut model = Model::new(config, Compute::default());
    let params = perturbed(config);
    let mut rng = stream(13, 0);
    let mut token = || rng.random_range(0..config.n_vocab as u32);
    let n_row = 3;
    let ids = (0..n_row * n_col).map(|_| token()).collect::<Vec<_>>();
    let real = |i: usize| rows != Rows::Padded || i % n_col < n_col - 5;
    let targets = (0..ids.len()).map(|i| if real(i) { token() as i32 } else { IGNORED }).collect::<Vec<_>>();
    let mask = (0..ids.len()).map(real).collect::<Vec<_>>();
    let first = first_of_two(n_row, n_col, n_col / 3);
    let sequences = Sequences {
        ids: &ids,
        n_col,
        mask: (rows == Rows::Padded).then_some(&mask[..]),
        first: (rows == Rows::Isolated).then_some(&first[..]),
    };

    let mut grads = model.zeros();
    let n_target = targets.iter().filter(|&&t| t != IGNORED).count();
    let scale = GradientScale { n_target, n_batch: 1 };
    let losses = model.loss_and_gradients(&params, &mut grads, sequences, &targets, mode, scale);
    let same = model.loss(&params, sequences, &targets, mode).total(config);
    assert!((losses.total(config) - same).abs() <= 1e-9, "the two passes disagree on the loss");
    for i in 0..params.len() {
        let name = model.table()[i].checkpoint.clone();
        let norm = grads[i].iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        // The key's bias shifts all scores of a query alike: no gradient but rounding.
        if name.ends_with("W_key.bias") {
            assert!(norm < 1e-6, "{name}: {norm}");
            continue;
        }
        assert!(norm > 1e-6, "{name} gets no gradient");
        let step = 1e-3 / norm;
        let mut at = |sign: f64| {
            let mut moved = params.clone();
            for (p, g) in moved[i].iter_mut().zip(&grads[i]) {
                *p += (sign * step * f64::from(*g) / norm) as f32;
            }
            model.loss(&moved, sequences, &targets, mode).total(config)
        };
        let slope = (at(1.0) - at(-1.0)) / (2.0 * step);
        assert!((slope - norm).abs() <= 0.01 * norm, "{name}: slope {slope}, gradient {norm}");
    }
}

const KEY: Key = Key { seed: 5, pass: 3 };

#[test]
fn gradients_hold_under_dropout_and_drawn_noise() {
    let config = Config { dropout: 0.2, ..config() };
    let mode = Mode { dropout: Some(KEY), capacity: Capacity::Unlimited, noise: NoiseSource::Drawn(KEY) };
    check(&config, mode, 21, Rows::Whole);
}

#[test]
fn gradients_hold_over_several_tiles_of_attention() {
    let config = Config { dropout: 0.1, use_noisy_top_k: false, ..config() };
    check(&config, Mode { dropout: Some(KEY), ..Mode::INFERENCE }, 80, Rows::Whole);
}

#[test]
fn gradients_hold_with_padding() {
    let config = Config { use_noisy_top_k: false, ..config() };
    check(&config, Mode::INFERENCE, 21, Rows::Padded);
}

#[test]
fn gradients_hold_within_documents() {
    let config = Config { use_noisy_top_k: false, ..config() };
    check(&config, Mode::INFERENCE, 21, Rows::Isolated);
    check(&config, Mode { dropout: Some(KEY), ..Mode::INFERENCE }, 80, Rows::Isolated);
}

/// Two documents of a row against each alone at its place: the first with whatever behind it, the second with all before it hidden
/// as padding is.
///
/// Bound: 1e-5 of the largest, for sums of f32 in another order.
#[test]
fn documents_of_a_row_are_as_each_alone() {
    let config = Config { use_noisy_top_k: false, use_aux_loss: false, ..config() };
    let params = perturbed(&config);
    for (n_col, second) in [(21, 8), (80, 70), (80, 10)] {
        let mut rng = stream(14, 0);
        let mut tokens = || (0..n_col).map(|_| rng.random_range(0..config.n_vocab as u32)).collect::<Vec<_>>();
        let (ids, other) = (tokens(), tokens());
        let targets = tokens().into_iter().map(|id| id as i32).collect::<Vec<_>>();
        let first = first_of_two(1, n_col, second);
        let mask = (0..n_col).map(|t| t >= second).collect::<Vec<_>>();
        let mut model = Model::new(&config, Compute::default());
        let names = model.table().iter().map(|tensor| tensor.checkpoint.clone()).collect::<Vec<_>>();
        let mut run = |ids: &[u32], mask: Option<&[bool]>, first: Option<&[u32]>, positions: Range<usize>| {
            let sequences = Sequences { ids, n_col, mask, first };
            let mut of_these = vec![IGNORED; n_col];
            of_these[positions.clone()].copy_from_slice(&targets[positions.clone()]);
            let mut grads = model.zeros();
            let scale = GradientScale { n_target: n_col, n_batch: 1 };
            model.loss_and_gradients(&params, &mut grads, sequences, &of_these, Mode::INFERENCE, scale);
            let positions = positions.collect::<Vec<_>>();
            (model.logits(&params, sequences, &positions, Mode::INFERENCE), grads)
        };
        let together = run(&ids, None, Some(&first[..]), 0..n_col);
        let followed = [&ids[..second], &other[second..]].concat();
        let alone = [run(&followed, None, None, 0..second), run(&ids, Some(&mask[..]), None, second..n_col)];
        let logits = alone.iter().flat_map(|(logits, _)| logits.iter().copied()).collect::<Vec<_>>();
        assert_near(&together.0, &logits, "logits");
        for (i, grads) in together.1.iter().enumerate() {
            let sum = alone[0].1[i].iter().zip(&alone[1].1[i]).map(|(a, b)| a + b).collect::<Vec<_>>();
            assert_near(grads, &sum, &names[i]);
        }
        let hidden = [&other[..second], &ids[second..]].concat();
        let others = run(&hidden, None, Some(&first[..]), second..n_col).0;
        assert!(others == together.0[second * config.n_vocab..], "the second document saw the first");
    }
}

fn assert_near(got: &[f32], want: &[f32], what: &str) {
    let largest = want.iter().fold(1e-3, |largest: f32, x| largest.max(x.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= 1e-5 * largest, "{what}[{i}]: {got}, expected {want}");
    }
}

#[test]
fn gradients_hold_for_every_other_shape_of_model() {
    let base = Config { use_noisy_top_k: false, ..config() };
    for config in [
        Config { qkv_bias: true, expert_bias: false, moe_stride: 1, ..base.clone() },
        Config { n_expert: 1, n_expert_used: 1, moe_stride: 1, use_noisy_top_k: true, ..base.clone() },
        Config { moe_phase: 1, expert_activation: Activation::GeluTanh, ..base.clone() },
        Config { dense_activation: Activation::GeluErf, use_aux_loss: true, use_router_z_loss: false, ..base.clone() },
    ] {
        check(&config, Mode::INFERENCE, 21, Rows::Whole);
    }
}

#[test]
fn gradients_do_not_depend_on_the_number_of_threads() {
    let config = Config { dropout: 0.1, ..config() };
    let params = perturbed(&config);
    let ids = (0..120).map(|i| i * 7 % 50).collect::<Vec<u32>>();
    let targets = ids.iter().map(|&id| (id as i32 + 1) % 50).collect::<Vec<_>>();
    let mode = Mode { dropout: Some(KEY), capacity: Capacity::Unlimited, noise: NoiseSource::Drawn(KEY) };
    let run = |n_thread: usize| {
        let mut model = Model::new(&config, Compute { n_thread, ..Compute::default() });
        let mut grads = model.zeros();
        let sequences = Sequences { ids: &ids, n_col: 60, mask: None, first: None };
        let scale = GradientScale { n_target: 120, n_batch: 1 };
        let losses = model.loss_and_gradients(&params, &mut grads, sequences, &targets, mode, scale);
        (losses.total(&config), grads)
    };
    let one = run(1);
    for n_thread in [2, 4] {
        assert!(one == run(n_thread), "{n_thread} threads change the gradients");
    }
}

/// One step's losses and gradients of the model of [`config`], 3 rows of 40 tokens.
fn step(config: &Config, compute: Compute) -> (Losses, Vec<Vec<f32>>, Model) {
    let params = perturbed(config);
    let ids = (0..120).map(|i| i * 7 % config.n_vocab as u32).collect::<Vec<u32>>();
    let targets = ids.iter().map(|&id| (id as i32 + 1) % config.n_vocab as i32).collect::<Vec<_>>();
    let mode = Mode { dropout: Some(KEY), capacity: Capacity::Unlimited, noise: NoiseSource::Drawn(KEY) };
    let mut model = Model::new(config, compute);
    let mut grads = model.zeros();
    let sequences = Sequences { ids: &ids, n_col: 40, mask: None, first: None };
    let scale = GradientScale { n_target: 120, n_batch: 1 };
    let losses = model.loss_and_gradients(&params, &mut grads, sequences, &targets, mode, scale);
    (losses, grads, model)
}

#[test]
fn what_is_computed_again_is_the_same() {
    let config = Config { dropout: 0.1, ..config() };
    for precision in [Precision::F32, Precision::Bf16] {
        let compute = Compute { precision, ..Compute::default() };
        let (kept, kept_grads, _) = step(&config, compute);
        for recompute in [Recompute::FeedForward, Recompute::Blocks] {
            let (again, again_grads, _) = step(&config, Compute { recompute, ..compute });
            assert!(kept.total(&config) == again.total(&config) && kept_grads == again_grads, "{recompute:?}");
        }
    }
}

/// Bound: 3e-2 of each gradient's norm, what rounding every factor to 8 bits leaves.
#[test]
fn gradients_in_bf16_are_near() {
    let config = Config { n_embd: 48, n_head: 3, ..config() };
    let (exact, exact_grads, model) = step(&config, Compute::default());
    let (near, near_grads, _) = step(&config, Compute { precision: Precision::Bf16, ..Compute::default() });
    assert!((near.ce() - exact.ce()).abs() <= 3e-3 * exact.ce(), "{} for {}", near.ce(), exact.ce());
    for (spec, (exact, near)) in model.table().iter().zip(exact_grads.iter().zip(&near_grads)) {
        let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        let size = norm(&mut exact.iter().copied());
        let off = norm(&mut exact.iter().zip(near).map(|(a, b)| a - b));
        // The key's bias has no gradient but rounding.
        assert!(spec.part == Part::AttnKBias || off <= 3e-2 * size, "{}: off by {}", spec.checkpoint, off / size);
    }
}

/// Bounds: a tenth of the memory of activations, as the plan says; 2% of the operations, of which the router's scores are not
/// counted.
#[test]
fn a_step_needs_what_was_planned() {
    for (precision, recompute, n_expert) in [
        (Precision::F32, Recompute::Nothing, 4),
        (Precision::Bf16, Recompute::Nothing, 4),
        (Precision::F32, Recompute::FeedForward, 4),
        (Precision::F32, Recompute::Blocks, 4),
        (Precision::F32, Recompute::Nothing, 1),
        (Precision::F32, Recompute::FeedForward, 1),
    ] {
        let config = Config {
            n_embd: 96,
            n_expert,
            n_expert_used: n_expert.min(2),
            n_vocab: 500,
            use_noisy_top_k: false,
            dropout: 0.0,
            n_layer: 6,
            ..config()
        };
        let compute = Compute { precision, recompute, ..Compute::default() };
        let (_, _, mut model) = step(&config, compute);
        let groups = Group::all(model.table(), &Recipe::AdamW.settings(&config, 1)).unwrap();
        let plan = Memory::plan(&config, &groups, compute, (3, 40));
        let (planned, used) = (plan.activations + plan.working, model.machine.buffers.n_byte());
        assert!(planned.abs_diff(used) <= used / 10, "{compute:?}: planned {planned}, used {used}");
        if recompute == Recompute::Nothing {
            let counted =
                Section::ALL.iter().map(|&section| model.profile().spent(section).operations).sum::<f64>() / 120.0;
            // Scores are computed once more in the backward pass, as flash attention does.
            let again = (config.n_layer * config.n_embd * 41) as f64;
            let planned = operations_per_token(&config, 40) + again;
            assert!((counted - planned).abs() <= 0.02 * planned, "{compute:?}: planned {planned}, counted {counted}");
        }
    }
}
