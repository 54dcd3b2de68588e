//! Generation: text that streams whole, stops where it should, and what a full context does.

use std::sync::Arc;

use gguf::GgmlType;
use param_model::{Config, Tokenizer};
use param_runtime::{
    FinishReason, GenerateOptions, Model, Overflow, Rows, Sampler, SamplerOptions, Session, SessionOptions,
};
use proptest::prelude::*;

use crate::tiny::{Tiny, config, model, tokens};

fn session(model: &Arc<Model>) -> Session {
    Session::new(model, &SessionOptions { n_thread: Some(2), ..SessionOptions::default() }).unwrap()
}

/// Every id the generation chose, its text, and why it ended.
fn run(session: &mut Session, options: &GenerateOptions) -> (Vec<u32>, String, Option<FinishReason>) {
    let mut generation = session.generate(options).unwrap();
    let (mut tokens, mut text) = (Vec::new(), String::new());
    for piece in &mut generation {
        let piece = piece.unwrap();
        tokens.extend(piece.token);
        text += &piece.text;
    }
    (tokens, text, generation.finish_reason())
}

fn greedy(n_predict: usize, overflow: Overflow) -> GenerateOptions {
    GenerateOptions {
        n_predict: Some(n_predict),
        sampling: SamplerOptions::greedy(),
        overflow,
        ..GenerateOptions::default()
    }
}

/// A model over a byte-level vocabulary that spells most characters with several tokens.
fn text_model() -> Arc<Model> {
    let text = "Grüße, 漢字 und 🦀! Größe und Maß. ".repeat(20);
    let tokenizer = Tokenizer::train_bpe([text].into_iter(), 290).unwrap();
    let config = Config { n_vocab: 300, n_ctx: 256, ..config() };
    Tiny::new(config, GgmlType::F32, Some(&tokenizer)).open().unwrap()
}

fn argmax(logits: &[f32]) -> u32 {
    Sampler::new(&SamplerOptions::greedy()).unwrap().sample(logits, &[]).unwrap()
}

/// The most likely next token by a fresh session over `tokens`.
fn next(model: &Arc<Model>, tokens: &[u32]) -> u32 {
    let mut session = session(model);
    session.push(tokens).unwrap();
    argmax(session.forward(Rows::Last).unwrap())
}

#[test]
fn greedy_text_is_the_argmax_at_every_step_and_stays_in_the_session() {
    let model = model(GgmlType::Q8_0);
    let mut session = session(&model);
    session.push(&tokens(5)).unwrap();
    let (generated, text, finish) = run(&mut session, &greedy(20, Overflow::Stop));
    assert_eq!((generated.len(), text.as_str(), finish), (20, "", Some(FinishReason::Length)));
    for i in 0..20 {
        assert_eq!(generated[i], next(&model, &[&tokens(5), &generated[..i]].concat()));
    }
    assert_eq!(session.tokens(), [tokens(5), generated].concat());
}

#[test]
fn a_conversation_continues_where_the_last_turn_ended() {
    let model = model(GgmlType::F32);
    let mut session = session(&model);
    session.push(&tokens(4)).unwrap();
    let (first, ..) = run(&mut session, &greedy(6, Overflow::Stop));
    session.push(&[1, 2, 3]).unwrap();
    let (second, ..) = run(&mut session, &greedy(1, Overflow::Stop));
    assert_eq!(second[0], next(&model, &[&tokens(4)[..], &first, &[1, 2, 3]].concat()));
}

#[test]
fn sampling_with_one_seed_repeats_and_another_differs() {
    let model = model(GgmlType::Q4_0);
    let generate = |seed| {
        let mut session = session(&model);
        session.push(&tokens(5)).unwrap();
        let sampling = SamplerOptions { temperature: 1.5, seed, ..SamplerOptions::default() };
        run(&mut session, &GenerateOptions { n_predict: Some(30), sampling, ..GenerateOptions::default() }).0
    };
    assert_eq!(generate(1), generate(1));
    assert_ne!(generate(1), generate(2));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn streamed_text_is_the_decoded_tokens_and_stop_strings_cut_it(seed in any::<u64>()) {
        let model = text_model();
        let tokenizer = model.tokenizer().unwrap();
        let generate = |stop: Vec<String>| {
            let mut session = session(&model);
            session.push(&model.encode("Grüße").unwrap()).unwrap();
            let sampling = SamplerOptions { temperature: 3.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed, ..SamplerOptions::default() };
            run(&mut session, &GenerateOptions { n_predict: Some(120), sampling, stop, ignore_end_of_text: true, ..GenerateOptions::default() })
        };
        let (tokens, text, finish) = generate(Vec::new());
        prop_assert_eq!(finish, Some(FinishReason::Length));
        prop_assert_eq!(&text, &tokenizer.decode(&tokens));
        // A stop string of several characters, so of several tokens; broken characters only exist in the output.
        let characters: Vec<char> = text.chars().collect();
        let stop = characters.windows(3).rfind(|w| !w.contains(&char::REPLACEMENT_CHARACTER)).unwrap();
        let stop: String = stop.iter().collect();
        let cut = text.find(&stop).unwrap();
        let (fewer, shorter, finish) = generate(vec!["never this".into(), stop]);
        prop_assert_eq!(shorter, &text[..cut]);
        prop_assert_eq!(finish, Some(FinishReason::StopString));
        prop_assert!(tokens.starts_with(&fewer));
    }
}

#[test]
fn end_of_text_ends_unless_it_is_to_be_ignored() {
    let tokenizer = Tokenizer::train_bpe(["abc ".repeat(50)].into_iter(), 260).unwrap();
    let end = tokenizer.end_of_text().unwrap();
    let mut tiny = Tiny::new(Config { n_vocab: 300, ..config() }, GgmlType::F32, Some(&tokenizer));
    // The final norm sends every state to the direction of one embedding.
    tiny.values("output_norm.weight").fill(0.0);
    let direction = tiny.values("token_embd.weight")[end as usize * 64..][..64].to_vec();
    tiny.values("output_norm.bias").copy_from_slice(&direction);
    let model = tiny.open().unwrap();
    let mut session = session(&model);
    session.push(&model.encode("abc").unwrap()).unwrap();
    let n = session.tokens().len();
    let (tokens, text, finish) = run(&mut session, &greedy(10, Overflow::Stop));
    assert_eq!((tokens.len(), text.as_str(), finish), (0, "", Some(FinishReason::EndOfText)));
    assert_eq!(session.tokens().len(), n);
    let options = GenerateOptions { ignore_end_of_text: true, ..greedy(10, Overflow::Stop) };
    assert_eq!(run(&mut session, &options).0, vec![end; 10]);
}

#[test]
fn a_full_context_stops_by_default() {
    let model = model(GgmlType::F32);
    let mut session = session(&model);
    session.prompt(&tokens(90), Overflow::Stop).unwrap();
    let (tokens, _, finish) = run(&mut session, &greedy(50, Overflow::Stop));
    assert_eq!((tokens.len(), finish), (6, Some(FinishReason::ContextFull)));
}

#[test]
fn a_window_runs_the_newest_tokens_again_at_every_step() {
    let model = model(GgmlType::F32);
    let mut all = tokens(90);
    let mut session = session(&model);
    session.prompt(&all, Overflow::Window).unwrap();
    let (generated, _, finish) = run(&mut session, &greedy(15, Overflow::Window));
    assert_eq!(finish, Some(FinishReason::Length));
    for token in generated {
        assert_eq!(token, next(&model, &all[all.len().saturating_sub(96)..]));
        all.push(token);
    }
}

#[test]
fn sliding_keeps_the_newest_half() {
    let model = model(GgmlType::F32);
    let mut context = tokens(90);
    let mut session = session(&model);
    session.prompt(&context, Overflow::Slide).unwrap();
    let (generated, ..) = run(&mut session, &greedy(60, Overflow::Slide));
    assert_eq!(generated.len(), 60);
    for token in generated {
        assert_eq!(token, next(&model, &context));
        if context.len() == 96 {
            context.drain(..96 - 47);
        }
        context.push(token);
    }
    assert_eq!(session.tokens(), context);
}

#[test]
fn a_prompt_longer_than_the_context_keeps_its_end_where_it_may() {
    let model = model(GgmlType::F32);
    let prompt = tokens(200);
    let mut session = session(&model);
    assert!(session.prompt(&prompt, Overflow::Stop).unwrap_err().to_string().contains("context of 96"));
    assert!(session.tokens().is_empty());
    session.prompt(&prompt, Overflow::Window).unwrap();
    assert_eq!(session.tokens(), &prompt[200 - 96..]);
    session.prompt(&prompt, Overflow::Slide).unwrap();
    assert_eq!(session.tokens(), &prompt[200 - 48..]);
}
