//! The runtime against the reference, through a GGUF in F32: logits, hidden states, routing, greedy text; the KV cache,
//! batch splits and thread counts against each other.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use param_model::Checkpoint;
use param_runtime::{GenerateOptions, Model, Overflow, Point, Rows, SamplerOptions, Session, SessionOptions, Trace};
use serde_json::Value;

use super::{Array, Case, assert_close, cases};
use crate::command::{output_of, param_convert, param_run};

/// A case's checkpoint as GGUF.
pub struct Converted {
    _folder: tempfile::TempDir,
    pub gguf: PathBuf,
    pub model: Arc<Model>,
}

impl Converted {
    pub fn new(case: &Case) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let gguf = folder.path().join("case.gguf");
        output_of(param_convert().arg(case.checkpoint()).arg(&gguf).args(["--quant", "f32"]));
        let model = Model::open(&gguf).unwrap();
        Self { _folder: folder, gguf, model }
    }

    fn session(&self, n_thread: usize, n_batch: usize) -> Session {
        let options = SessionOptions { n_thread: Some(n_thread), n_batch: Some(n_batch), ..SessionOptions::default() };
        Session::new(&self.model, &options).unwrap()
    }
}

pub fn ids(array: &Array) -> Vec<u32> {
    array.ints.iter().map(|&id| id as u32).collect()
}

fn numbers(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

pub fn comma_separated(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

/// Names of the sequences of which a case has logits.
pub fn sequences(case: &Case) -> Vec<String> {
    let arrays = case.arrays("eval.npz");
    let names = arrays.keys().filter_map(|n| n.strip_suffix(".input_ids")).map(str::to_owned).collect::<Vec<_>>();
    assert!(!names.is_empty(), "{}: no sequence in eval.npz", case.name());
    names
}

fn hidden_name(point: Point) -> String {
    match point {
        Point::Embed => "hidden.embed".to_owned(),
        Point::AfterAttention(i) => format!("hidden.block{i}.after_attn"),
        Point::Norm2(i) => format!("hidden.block{i}.norm2"),
        Point::Ffn(i) => format!("hidden.block{i}.ffn"),
        Point::Out(i) => format!("hidden.block{i}.out"),
        Point::FinalNorm => "hidden.final_norm".to_owned(),
    }
}

#[test]
fn logits_hidden_states_and_routing_equal_the_reference() {
    for case in cases() {
        let converted = Converted::new(&case);
        let arrays = case.arrays("eval.npz");
        let hidden_len = arrays["hidden.embed"].shape[0];
        for name in sequences(&case) {
            let at = format!("{}/{name}", case.name());
            let tokens = ids(&arrays[&format!("{name}.input_ids")]);
            let mut session = converted.session(2, 512);
            session.push(&tokens).unwrap();
            let (mut n_hidden, mut n_routing) = (0, 0);
            let mut observe = |trace: Trace| match trace {
                Trace::Hidden { point, values } if tokens.len() == hidden_len => {
                    n_hidden += 1;
                    let name = hidden_name(point);
                    assert_close(&format!("{at} {name}"), values, &arrays[&name].floats, 1e-4);
                }
                Trace::Hidden { .. } => {}
                Trace::Routing { block, logits, experts, weights } => {
                    n_routing += 1;
                    let array = |what: &str| &arrays[&format!("{name}.router{block}.{what}")];
                    assert_eq!(experts, ids(array("experts")), "{at} experts of block {block}");
                    assert_close(&format!("{at} router {block}"), logits, &array("logits").floats, 1e-4);
                    assert_close(&format!("{at} weights {block}"), weights, &array("weights").floats, 1e-4);
                }
            };
            let logits = session.forward_traced(Rows::All, &mut observe).unwrap();
            assert_close(&format!("{at} logits"), logits, &arrays[&format!("{name}.logits")].floats, 1e-4);
            assert_eq!(n_routing, case.config.n_moe(), "{at}: routings seen");
            if tokens.len() == hidden_len {
                assert_eq!(n_hidden, 2 + 4 * case.config.n_layer, "{at}: hidden states seen");
            }
        }
    }
}

#[test]
fn one_token_at_a_time_and_any_batch_split_give_the_logits_of_a_full_pass() {
    for case in cases() {
        let converted = Converted::new(&case);
        let arrays = case.arrays("eval.npz");
        for name in sequences(&case) {
            let tokens = ids(&arrays[&format!("{name}.input_ids")]);
            let want = &arrays[&format!("{name}.logits")].floats;
            for n_batch in [1, 3, 16, 61] {
                let mut session = converted.session(1 + n_batch % 3, n_batch);
                session.push(&tokens).unwrap();
                let got = session.forward(Rows::All).unwrap();
                assert_close(&format!("{}/{name} in batches of {n_batch}", case.name()), got, want, 1e-4);
            }
        }
    }
}

pub fn greedy(session: &mut Session, prompt: &[u32], n: usize) -> Vec<u32> {
    session.prompt(prompt, Overflow::Window).unwrap();
    let options = GenerateOptions {
        n_predict: Some(n),
        sampling: SamplerOptions::greedy(),
        overflow: Overflow::Window,
        ..GenerateOptions::default()
    };
    session.generate(&options).unwrap().filter_map(|piece| piece.unwrap().token).collect()
}

/// Prompt and continuation of every greedy run of a case.
pub fn greedy_runs(case: &Case) -> Vec<(String, Vec<u32>, Vec<u32>)> {
    let expected = case.json("eval.json");
    let runs = expected["greedy"].as_object().unwrap();
    assert!(!runs.is_empty(), "{}: no greedy run", case.name());
    runs.iter().map(|(name, run)| (name.clone(), numbers(&run["prompt"]), numbers(&run["new_tokens"]))).collect()
}

#[test]
pub fn greedy_text_equals_the_reference_past_the_contexts_end_on_any_number_of_threads() {
    for case in cases() {
        let converted = Converted::new(&case);
        let mut overflows = false;
        for (name, prompt, expected) in greedy_runs(&case) {
            overflows |= prompt.len() + expected.len() > case.config.n_ctx;
            for n_thread in [1, 2, 3] {
                let got = greedy(&mut converted.session(n_thread, 512), &prompt, expected.len());
                assert_eq!(got, expected, "{}/{name} on {n_thread} threads", case.name());
            }
        }
        assert!(overflows, "{}: no run passes the context's end", case.name());
    }
}

#[test]
fn param_run_prints_the_same_tokens_and_writes_the_same_logits() {
    for case in cases() {
        let converted = Converted::new(&case);
        for (name, prompt, expected) in greedy_runs(&case) {
            let output = output_of(
                run(&converted.gguf, &prompt, &["--overflow", "window", "--print-tokens"])
                    .args(["-n", &expected.len().to_string()]),
            );
            assert_eq!(output.trim(), comma_separated(&expected), "{}/{name}", case.name());
        }
        let arrays = case.arrays("eval.npz");
        for name in sequences(&case) {
            let file = converted.gguf.with_file_name("logits.safetensors");
            let tokens = ids(&arrays[&format!("{name}.input_ids")]);
            output_of(run(&converted.gguf, &tokens, &["-n", "0", "--logits"]).arg(&file));
            let written = Checkpoint::open(&file).unwrap();
            let logits = written.tensor("logits").unwrap().unwrap();
            assert_eq!(logits.shape, [tokens.len(), case.config.n_vocab]);
            let want = &arrays[&format!("{name}.logits")].floats;
            assert_close(&format!("{}/{name} --logits", case.name()), &logits.to_f32(), want, 1e-4);
        }
    }
}

fn run(gguf: &Path, tokens: &[u32], args: &[&str]) -> Command {
    let mut command = param_run();
    command.arg("-m").arg(gguf).args(["--temp", "0", "--tokens", &comma_separated(tokens)]).args(args);
    command
}
