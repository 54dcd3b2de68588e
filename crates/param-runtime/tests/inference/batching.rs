//! A token's logits do not depend on how it came to be run: bit for bit, for float and quantized weights alike.

use std::sync::Arc;

use gguf::GgmlType;
use param_runtime::{Batch, CacheType, Model, Rows, Sampler, SamplerOptions, Session, SessionOptions};
use proptest::prelude::*;

use crate::tiny::{Tiny, config, model, tokens};

/// One of every kind of kernel, and one that is ggml's.
const TYPES: [GgmlType; 8] = [
    GgmlType::F32,
    GgmlType::F16,
    GgmlType::BF16,
    GgmlType::Q8_0,
    GgmlType::Q4_0,
    GgmlType::Q4_K,
    GgmlType::Q6_K,
    GgmlType::Q5_0,
];

fn session(model: &Arc<Model>, n_batch: usize, n_thread: usize) -> Session {
    let options = SessionOptions { n_batch: Some(n_batch), n_thread: Some(n_thread), ..SessionOptions::default() };
    Session::new(model, &options).unwrap()
}

/// Logits of all tokens, run in one batch by one thread.
fn whole(model: &Arc<Model>, tokens: &[u32]) -> Vec<f32> {
    let mut session = session(model, tokens.len(), 1);
    session.push(tokens).unwrap();
    session.forward(Rows::All).unwrap().to_vec()
}

#[test]
fn decoding_through_the_cache_equals_a_full_forward() {
    let tokens = tokens(90);
    for ty in TYPES {
        let model = model(ty);
        let want = whole(&model, &tokens);
        let mut session = session(&model, 512, 2);
        for (token, want) in tokens.iter().zip(want.chunks_exact(60)) {
            session.push(&[*token]).unwrap();
            assert_eq!(session.forward(Rows::Last).unwrap(), want, "{ty}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn batches_and_threads_never_change_a_result(
        ty in prop::sample::select(&TYPES[..]), n_batch in 1usize..100, n_thread in 1usize..6, cuts in prop::collection::vec(1usize..40, 0..4),
    ) {
        let tokens = tokens(90);
        let model = model(ty);
        let want = whole(&model, &tokens);
        let mut session = session(&model, n_batch, n_thread);
        let mut start = 0;
        for len in cuts.into_iter().chain([90]) {
            let end = tokens.len().min(start + len);
            session.push(&tokens[start..end]).unwrap();
            prop_assert_eq!(session.forward(Rows::All).unwrap(), &want[start * 60..end * 60]);
            start = end;
        }
    }
}

#[test]
fn a_rewound_session_continues_as_if_nothing_had_followed() {
    let model = model(GgmlType::Q8_0);
    let tokens = tokens(60);
    let mut session = session(&model, 16, 2);
    session.push(&tokens).unwrap();
    session.forward(Rows::None).unwrap();
    session.truncate(20);
    assert_eq!(session.forward(Rows::Last).unwrap(), &whole(&model, &tokens[..20])[19 * 60..]);
    session.push(&[5, 6]).unwrap();
    let branch = [&tokens[..20], &[5, 6]].concat();
    assert_eq!(session.forward(Rows::All).unwrap(), &whole(&model, &branch)[20 * 60..]);
    session.reset();
    assert!(session.tokens().is_empty());
    session.push(&branch).unwrap();
    assert_eq!(session.forward(Rows::All).unwrap(), whole(&model, &branch));
}

#[test]
fn the_cache_is_f32_for_f32_models_and_rounds_to_f16_where_asked() {
    let model = model(GgmlType::F32);
    let tokens = tokens(50);
    let run = |cache_type| {
        let mut session = Session::new(&model, &SessionOptions { cache_type, ..SessionOptions::default() }).unwrap();
        session.push(&tokens).unwrap();
        session.forward(Rows::All).unwrap().to_vec()
    };
    let (default, exact, rounded) = (run(None), run(Some(CacheType::F32)), run(Some(CacheType::F16)));
    assert_eq!(default, exact);
    let worst = exact.iter().zip(&rounded).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst > 0.0 && worst < 0.05, "{worst}");
}

#[test]
fn only_the_chosen_experts_weights_are_read() {
    let mut tiny = Tiny::new(config(), GgmlType::F32, None);
    let mut chosen = [const { Vec::new() }; 3];
    let model = tiny.open().unwrap();
    let mut session = session(&model, 1, 1);
    session.push(&[9]).unwrap();
    let mut note = |trace: param_runtime::Trace<'_>| {
        if let param_runtime::Trace::Routing { block, experts, .. } = trace {
            chosen[block] = experts.to_vec();
        }
    };
    let want = session.forward_traced(Rows::All, &mut note).unwrap().to_vec();
    let mut n_spoiled = 0;
    for block in [0, 2] {
        for tensor in ["ffn_up_exps", "ffn_down_exps"] {
            let values = tiny.values(&format!("blk.{block}.{tensor}.weight"));
            let len = values.len() / 5;
            for expert in (0..5).filter(|e| !chosen[block].contains(e)) {
                values[expert as usize * len..(expert as usize + 1) * len].fill(f32::NAN);
                n_spoiled += 1;
            }
        }
    }
    assert_eq!(n_spoiled, 2 * 2 * 3);
    assert_eq!(whole(&tiny.open().unwrap(), &[9]), want);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever the others in the batch are doing, a sequence is what it would be alone.
    #[test]
    fn sequences_in_a_batch_are_what_they_are_alone(
        ty in prop::sample::select(&TYPES[..]), cache in prop::sample::select(&[CacheType::F16, CacheType::F32, CacheType::Q8_0][..]),
        n_batch in 1usize..40, n_thread in 1usize..4, lens in prop::collection::vec(0usize..70, 1..6), n_step in 1usize..6,
    ) {
        let model = model(ty);
        let all = tokens(96);
        let options = SessionOptions { n_batch: Some(n_batch), n_thread: Some(n_thread), cache_type: Some(cache), ..SessionOptions::default() };
        let mut batch = Batch::new(&model, lens.len(), &options).unwrap();
        let mut alone: Vec<Session> = lens.iter().map(|_| Session::new(&model, &options).unwrap()).collect();
        for (i, &len) in lens.iter().enumerate() {
            batch.push(i, &all[i..i + len]).unwrap();
            alone[i].push(&all[i..i + len]).unwrap();
        }
        for step in 0..n_step {
            batch.forward(Rows::Last).unwrap();
            for (i, session) in alone.iter_mut().enumerate().filter(|(i, _)| !batch.tokens(*i).is_empty()) {
                prop_assert_eq!(batch.logits(i).unwrap(), session.forward(Rows::Last).unwrap(), "{} sequence {}", ty, i);
            }
            for (i, session) in alone.iter_mut().enumerate() {
                // Not all of them go on at every step, one goes back, and one begins anew.
                match (step + i) % 4 {
                    0 => {}
                    1 => {
                        batch.truncate(i, lens[i] / 2);
                        session.truncate(lens[i] / 2);
                    }
                    2 if step == 2 => {
                        batch.keep_newest(i, 3);
                        session.keep_newest(3);
                    }
                    _ => {}
                }
                if (step + i) % 4 != 0 {
                    batch.push(i, &all[step..step + 1 + i]).unwrap();
                    session.push(&all[step..step + 1 + i]).unwrap();
                }
            }
        }
    }

    /// The candidates picked while the head is computed decide as all logits would.
    #[test]
    fn sampling_from_the_picked_candidates_is_sampling_from_all_logits(
        top_k in 0usize..70, temperature in prop::sample::select(&[0.0f32, 0.7, 2.0][..]), seed: u64, penalty_window in 0usize..20,
        (repeat_penalty, presence_penalty, frequency_penalty) in (prop::sample::select(&[1.0f32, 1.5, 0.5][..]), -2.0f32..2.0, 0.0f32..1.0),
        has_penalties: bool,
    ) {
        let plain = SamplerOptions { temperature, top_k, seed, penalty_window, ..SamplerOptions::default() };
        let options = if has_penalties {
            SamplerOptions { repeat_penalty, presence_penalty, frequency_penalty, ..plain }
        } else {
            plain
        };
        let (mut picking, mut scanning) = (Sampler::new(&options).unwrap(), Sampler::new(&options).unwrap());
        let mut session = session(&model(GgmlType::Q8_0), 512, 2);
        session.push(&tokens(20)).unwrap();
        for _ in 0..10 {
            let token = session.sample(&mut picking).unwrap();
            let context = session.tokens().to_vec();
            prop_assert_eq!(token, scanning.sample(session.forward(Rows::Last).unwrap(), &context).unwrap());
            session.push(&[token]).unwrap();
        }
    }
}

#[test]
fn an_int8_cache_costs_little() {
    let model = model(GgmlType::F32);
    let run = |cache_type| {
        let mut session =
            Session::new(&model, &SessionOptions { cache_type: Some(cache_type), ..SessionOptions::default() })
                .unwrap();
        session.push(&tokens(90)).unwrap();
        session.forward(Rows::All).unwrap().to_vec()
    };
    let (exact, rounded) = (run(CacheType::F32), run(CacheType::Q8_0));
    let rms = |x: &mut dyn Iterator<Item = f32>| (x.map(|x| f64::from(x * x)).sum::<f64>() / exact.len() as f64).sqrt();
    let error = rms(&mut exact.iter().zip(&rounded).map(|(a, b)| a - b)) / rms(&mut exact.iter().copied());
    assert!(error > 0.0 && error < 0.02, "{error}");
}
