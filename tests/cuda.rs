//! The runtime on a GPU against the reference and against itself on the CPU: whole models, partly placed ones, several sequences, the
//! command line. Without `PARAM_GPU=1`, which a machine with a GPU sets, the GPU is the emulated one, and so is its driver.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use param_cuda_emulation::is_real;
use param_model::Config;
use param_runtime::{
    Batch, Device, GenerateOptions, Model, ModelOptions, Overflow, Rows, Sampler, SamplerOptions, Session,
    SessionOptions,
};

use crate::command::{failure_of, output_of, outputs_of, param_convert, param_run};
use crate::fixture::Trained;
use crate::golden::{Converted, assert_close, cases, comma_separated, greedy, greedy_runs, ids, sequences};

/// A model on the GPU.
fn on_gpu(gguf: &Path, options: ModelOptions) -> Arc<Model> {
    param_cuda_emulation::preload();
    Model::open_with(gguf, &ModelOptions { device: Device::Cuda, ..options }).unwrap()
}

/// A command for which there is a GPU, which `simulate` says more of where it is emulated.
pub fn with_gpu(mut command: Command, simulate: &str) -> Command {
    if !is_real() {
        command.env("LD_LIBRARY_PATH", param_cuda_emulation::folder()).env("PARAM_EMULATED_CUDA", simulate);
    }
    command
}

fn session(model: &Arc<Model>, n_batch: usize) -> Session {
    Session::new(model, &SessionOptions { n_batch: Some(n_batch), ..SessionOptions::default() }).unwrap()
}

/// Ways to place a model of `config`, the whole one first.
fn placements(config: &Config) -> Vec<ModelOptions> {
    let whole = ModelOptions::default();
    let last = ModelOptions { gpu_layers: Some(1), ..whole.clone() };
    let head = ModelOptions { gpu_layers: Some(0), ..whole.clone() };
    let without_experts = ModelOptions { experts_on_cpu: true, ..whole.clone() };
    let both = ModelOptions { gpu_layers: Some(config.n_layer - 1), ..without_experts.clone() };
    vec![whole, last, head, without_experts, both]
}

/// Logits of f32 models, computed in another order than the reference's.
const BOUND: f32 = 1e-3;

#[test]
fn logits_equal_the_reference_however_the_model_is_placed() {
    for case in cases() {
        let converted = Converted::new(&case);
        let arrays = case.arrays("eval.npz");
        for options in placements(&case.config) {
            let model = on_gpu(&converted.gguf, options.clone());
            for name in sequences(&case) {
                let tokens = ids(&arrays[&format!("{name}.input_ids")]);
                let mut session = session(&model, 512);
                session.push(&tokens).unwrap();
                let got = session.forward(Rows::All).unwrap();
                let at = format!("{}/{name} with {options:?}", case.name());
                assert_close(&at, got, &arrays[&format!("{name}.logits")].floats, BOUND);
            }
        }
    }
}

#[test]
fn one_token_at_a_time_and_any_batch_split_give_the_logits_of_a_full_pass() {
    let case = &cases()[0];
    let converted = Converted::new(case);
    let arrays = case.arrays("eval.npz");
    let model = on_gpu(&converted.gguf, ModelOptions::default());
    for name in sequences(case) {
        let tokens = ids(&arrays[&format!("{name}.input_ids")]);
        let tokens = &tokens[..tokens.len().min(40)];
        let want = &arrays[&format!("{name}.logits")].floats[..tokens.len() * case.config.n_vocab];
        for n_batch in [1, 7] {
            let mut session = session(&model, n_batch);
            session.push(tokens).unwrap();
            let got = session.forward(Rows::All).unwrap();
            assert_close(&format!("{name} in batches of {n_batch}"), got, want, BOUND);
        }
    }
}

#[test]
fn greedy_text_equals_the_reference() {
    for case in cases() {
        let converted = Converted::new(&case);
        let model = on_gpu(&converted.gguf, ModelOptions::default());
        for (name, prompt, expected) in greedy_runs(&case) {
            // Past the context's end every token is a prefill of a full window, which the emulation has no time for.
            let n =
                if is_real() { expected.len() } else { (case.config.n_ctx - prompt.len()).min(24).min(expected.len()) };
            let got = greedy(&mut session(&model, 512), &prompt, n);
            assert_eq!(got, expected[..n], "{}/{name}", case.name());
        }
    }
}

#[test]
fn a_seed_gives_the_text_that_it_gives_on_the_cpu() {
    let case = &cases()[0];
    let converted = Converted::new(case);
    let gpu = on_gpu(&converted.gguf, ModelOptions::default());
    let plain = SamplerOptions { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..SamplerOptions::default() };
    let penalties = SamplerOptions { repeat_penalty: 1.3, presence_penalty: 0.2, ..SamplerOptions::default() };
    for sampling in [SamplerOptions { seed: 7, ..SamplerOptions::default() }, plain, penalties] {
        let text = |model: &Arc<Model>| -> Vec<u32> {
            let mut session = session(model, 512);
            session.prompt(&[1, 2, 3], Overflow::Stop).unwrap();
            let options =
                GenerateOptions { n_predict: Some(16), sampling: sampling.clone(), ..GenerateOptions::default() };
            session.generate(&options).unwrap().filter_map(|piece| piece.unwrap().token).collect()
        };
        assert_eq!(text(&gpu), text(&converted.model), "{sampling:?}");
    }
}

/// A context that the caller changes behind the sampler's back gives what it would have given had nothing been computed ahead.
#[test]
fn what_is_computed_ahead_is_dropped_where_the_context_goes_elsewhere() {
    let case = &cases()[0];
    let converted = Converted::new(case);
    let gpu = on_gpu(&converted.gguf, ModelOptions::default());
    let run = |model: &Arc<Model>| -> Vec<u32> {
        let (mut session, mut tokens) = (session(model, 512), Vec::new());
        let mut sampler = Sampler::new(&SamplerOptions { seed: 3, ..SamplerOptions::default() }).unwrap();
        let mut other = Sampler::new(&SamplerOptions::greedy()).unwrap();
        session.push(&[4, 2]).unwrap();
        for step in 0..10 {
            let token = match step % 4 {
                1 => session.sample(&mut other).unwrap(),
                _ => session.sample(&mut sampler).unwrap(),
            };
            tokens.push(token);
            match step {
                3 => session.truncate(3),
                5 => session.push(&[token, 5, 6]).unwrap(),
                7 => session.push(&[9]).unwrap(),
                _ => session.push(&[token]).unwrap(),
            }
        }
        tokens
    };
    assert_eq!(run(&gpu), run(&converted.model));
}

#[test]
fn sequences_decoded_together_go_on_as_they_would_alone() {
    let case = &cases()[0];
    let converted = Converted::new(case);
    let gpu = on_gpu(&converted.gguf, ModelOptions::default());
    for n_sequence in [3, 9] {
        let prompt =
            |sequence: usize| -> Vec<u32> { (0..=sequence as u32 % 5).map(|i| 3 * i + sequence as u32).collect() };
        let alone: Vec<Vec<u32>> =
            (0..n_sequence).map(|i| greedy(&mut session(&converted.model, 512), &prompt(i), 6)).collect();
        let mut batch = Batch::new(&gpu, n_sequence, &SessionOptions::default()).unwrap();
        (0..n_sequence).for_each(|i| batch.push(i, &prompt(i)).unwrap());
        let greedy = SamplerOptions::greedy();
        let mut samplers: Vec<Sampler> = (0..n_sequence).map(|_| Sampler::new(&greedy).unwrap()).collect();
        let mut together = vec![Vec::new(); n_sequence];
        for _ in 0..6 {
            let tokens = batch.sample_all(&mut samplers).unwrap();
            for (i, token) in tokens.into_iter().enumerate() {
                together[i].push(token);
                batch.push(i, &[token]).unwrap();
            }
        }
        assert_eq!(together, alone);
    }
}

/// Quantized models meet f16 activations on the GPU and int8 ones on the CPU: each is held to the logits of the CPU by the difference
/// that the formats themselves make.
#[test]
fn quantized_models_agree_with_the_cpu() {
    let wide = ["--set=emb_dim=256", "--set=num_heads=4"];
    let trained = Trained::new(2, &wide, Some("f32"));
    let logits = |model: &Arc<Model>| {
        let mut session = session(model, 512);
        session.push(&[1, 5, 9, 2, 7, 7, 3, 11]).unwrap();
        session.forward(Rows::All).unwrap().to_vec()
    };
    for quant in ["q8_0", "q4_k", "q6_k", "f16", "bf16", "q5_1"] {
        let gguf = trained.path().join(format!("{quant}.gguf"));
        output_of(param_convert().arg(trained.run()).arg(&gguf).arg(format!("--quant={quant}")));
        let (cpu, gpu) = (Model::open(&gguf).unwrap(), on_gpu(&gguf, ModelOptions::default()));
        let (cpu, gpu) = (logits(&cpu), logits(&gpu));
        let size = cpu.iter().map(|x| x * x).sum::<f32>().sqrt();
        let distance = cpu.iter().zip(&gpu).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
        assert!(distance <= 0.02 * size, "{quant}: {distance} of {size}");
    }
}

fn run(gguf: &Path, args: &[&str]) -> Command {
    let mut command = param_run();
    command.arg("-m").arg(gguf).args(["--temp", "0", "--print-tokens", "-n", "8"]).args(args);
    command
}

#[test]
fn param_run_takes_the_gpu_there_is_and_says_so() {
    let case = &cases()[0];
    let converted = Converted::new(case);
    let (_, prompt, expected) = greedy_runs(case).remove(0);
    let prompt = comma_separated(&prompt);
    for flags in [&["--device=cuda"][..], &[], &["--experts=cpu"], &["--gpu-layers=1"]] {
        let command = run(&converted.gguf, &[&["--tokens", &prompt], flags].concat());
        let (out, err) = outputs_of(&mut with_gpu(command, ""));
        assert_eq!(out.trim(), comma_separated(&expected[..8]), "{flags:?}");
        assert!(err.starts_with("on ") && err.contains("MiB of weights"), "{err}");
        assert_eq!(err.contains("the rest on the CPU"), flags.first().is_some_and(|f| !f.contains("cuda")), "{err}");
    }
}

#[test]
fn without_a_usable_gpu_auto_runs_on_the_cpu_and_cuda_says_what_is_missing() {
    if is_real() {
        return;
    }
    let case = &cases()[0];
    let converted = Converted::new(case);
    let (_, prompt, expected) = greedy_runs(case).remove(0);
    let prompt = ["--tokens", &comma_separated(&prompt)];
    let simulations = [
        ("no-device", "", "finds no GPU"),
        ("version=11040", "on the CPU: ", "supports CUDA 11.4, at least 12.0"),
        ("capability=70", "on the CPU: ", "compute capability is 7.0, at least 8.0"),
        ("memory=1000", "on the CPU: ", "too few"),
        ("fail=cuDevicePrimaryCtxRetain", "on the CPU: ", "cuDevicePrimaryCtxRetain failed"),
    ];
    for (simulate, note, sentence) in simulations {
        let (out, err) = outputs_of(&mut with_gpu(run(&converted.gguf, &prompt), simulate));
        assert_eq!(out.trim(), comma_separated(&expected[..8]), "{simulate}");
        assert!(err.starts_with(if note.is_empty() { "load" } else { note }), "{simulate}: {err}");
        let cuda = run(&converted.gguf, &[&prompt[..], &["--device=cuda"]].concat());
        let err = failure_of(&mut with_gpu(cuda, simulate), 1);
        assert!(err.contains(sentence), "{simulate}: {err}");
    }
    // No driver at all: this machine, unless it has one.
    if matches!(param_cuda::open(), Err(param_cuda::NoGpu::NoDriver)) {
        let err = failure_of(&mut run(&converted.gguf, &[&prompt[..], &["--device=cuda"]].concat()), 1);
        assert!(err.contains("no NVIDIA driver was found"), "{err}");
    }
}

#[test]
fn a_gpu_that_fails_midway_ends_the_run_with_the_call_that_failed() {
    if is_real() {
        return;
    }
    let converted = Converted::new(&cases()[0]);
    let command = run(&converted.gguf, &["--tokens", "1,2,3", "--device=cuda"]);
    let err = failure_of(&mut with_gpu(command, "fail=cuLaunchCooperativeKernel"), 1);
    assert!(err.contains("kernel `decode_token`: cuLaunchCooperativeKernel failed: CUDA_ERROR_UNKNOWN"), "{err}");
}

#[test]
fn flags_of_a_gpu_are_refused_where_the_cpu_was_asked_for() {
    let converted = Converted::new(&cases()[0]);
    for flag in ["--gpu-layers=1", "--experts=cpu"] {
        let err = failure_of(&mut run(&converted.gguf, &["--tokens", "1", "--device=cpu", flag]), 2);
        assert!(err.contains("need --device"), "{err}");
    }
}
