//! A token's logits do not depend on how it came to be run: bit for bit, for float and quantized weights alike.

use std::sync::Arc;

use gguf::GgmlType;
use param_runtime::{CacheType, Model, Rows, Session, SessionOptions};
use proptest::prelude::*;

use crate::tiny::{Tiny, config, model, tokens};

const TYPES: [GgmlType; 5] = [GgmlType::F32, GgmlType::F16, GgmlType::Q8_0, GgmlType::Q4_0, GgmlType::Q4_K];

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
