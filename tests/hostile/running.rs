//! What param-run and param-bench refuse, and how.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use gguf::{GgmlType, Gguf, TensorInfo, Value};
use param_model::Tokenizer;

use super::{assert_names, cuts, end_of, flips, rewrite, same};
use crate::command::{failure_of, output_of, param_bench, param_convert, param_run, param_train};
use crate::fixture::{Trained, assert_unchanged, contents, write};

fn run(model: &std::path::Path) -> Command {
    let mut command = param_run();
    command.arg("-m").arg(model).args(["-n", "1", "--temp", "0", "-t", "1"]);
    command
}

fn refusal(model: &std::path::Path) -> String {
    failure_of(run(model).args(["-p", "the"]), 1)
}

/// Where a GGUF's tensor data begins, about: most damage before it is to structure.
fn header_len(gguf: &std::path::Path) -> usize {
    let n_data: u64 = Gguf::open(gguf).unwrap().tensors().iter().map(|info| info.n_bytes).sum();
    std::fs::metadata(gguf).unwrap().len() as usize - n_data as usize
}

#[test]
fn a_model_cut_off_anywhere_is_refused_by_name() {
    let trained = Trained::new(1, &[], None);
    let bytes = std::fs::read(trained.gguf()).unwrap();
    let cut = trained.path().join("cut.gguf");
    for len in cuts(bytes.len(), header_len(&trained.gguf())) {
        std::fs::write(&cut, &bytes[..len]).unwrap();
        assert_names(&refusal(&cut), &["cut.gguf"]);
    }
}

#[test]
fn a_model_with_flipped_bits_is_refused_or_runs_but_never_crashes() {
    let trained = Trained::new(1, &[], None);
    let bytes = std::fs::read(trained.gguf()).unwrap();
    let flipped = trained.path().join("flipped.gguf");
    let mut n_refused = 0;
    for (at, bit) in flips(bytes.len(), header_len(&trained.gguf()), 160) {
        let mut bytes = bytes.clone();
        bytes[at] ^= bit;
        std::fs::write(&flipped, bytes).unwrap();
        let (code, error) = end_of(run(&flipped).args(["-p", "the"]));
        n_refused += code;
        assert!(code == 0 || error.contains("error: "), "byte {at}, bit {bit}: {code} {error}");
    }
    assert!(n_refused > 20, "only {n_refused} were noticed");
}

#[test]
fn files_that_are_no_model_are_refused_by_name() {
    let trained = Trained::new(1, &[], None);
    let absent = trained.path().join("absent.gguf");
    for (path, problem) in [
        (absent, "No such file"),
        (trained.data(), "not a GGUF file"),
        (write(trained.path(), "empty.gguf", ""), "empty.gguf"),
        (trained.weights(), "not a GGUF file"),
        (trained.path().to_owned(), "error: "),
    ] {
        for mut command in [run(&path), param_bench()] {
            let command = match command.get_args().next() {
                Some(_) => command.args(["-p", "the"]),
                None => command.arg("-m").arg(&path),
            };
            assert_names(&failure_of(command, 1), &[path.to_str().unwrap(), problem]);
        }
    }
}

#[test]
fn a_file_of_another_model_is_refused_by_key_or_tensor() {
    let trained = Trained::new(1, &[], None);
    let changed = trained.path().join("changed.gguf");
    let with = |key: &str, value: Value| {
        rewrite(&trained.gguf(), &changed, |k, v| Some(if k == key { value.clone() } else { v.clone() }), same);
        refusal(&changed)
    };
    let file = "changed.gguf";
    assert_names(&with("general.architecture", "llama".into()), &[file, "general.architecture", "llama", "\"param\""]);
    assert_names(&with("param.block_count", Value::U32(3)), &[file, "`blk.2.", "missing"]);
    assert_names(&with("param.block_count", Value::U32(1)), &[file, "`blk.1.", "no place"]);
    assert_names(
        &with("param.vocab_size", Value::U32(999)),
        &[file, "token_embd.weight", "expected [999, 32]", "got [4"],
    );
    assert_names(&with("param.embedding_length", Value::U32(u32::MAX)), &[file, "emb_dim"]);
    assert_names(&with("param.context_length", "many".into()), &[file, "param.context_length"]);
    assert_names(&with("param.attention.head_count", Value::U32(5)), &[file, "num_heads"]);
    assert_names(&with("tokenizer.huggingface.json", "{}".into()), &[file, "tokenizer.huggingface.json"]);

    rewrite(&trained.gguf(), &changed, |k, v| (k != "param.expert_count").then(|| v.clone()), same);
    assert_names(&refusal(&changed), &[file, "`param.expert_count` is missing"]);

    for name in ["blk.0.ffn_gate_inp.weight", "blk.1.ffn_up.bias", "output_norm.weight"] {
        let without = |info: &TensorInfo, data: &[u8]| same(info, data).filter(|_| info.name != name);
        rewrite(&trained.gguf(), &changed, |_, v| Some(v.clone()), without);
        assert_names(&refusal(&changed), &[file, name, "missing"]);
        let flat = |info: &TensorInfo, data: &[u8]| {
            let flat = TensorInfo::new(name, vec![info.n_elements()], info.ty).unwrap();
            Some((if info.name == name && info.ne.len() > 1 { flat } else { info.clone() }, data.to_vec()))
        };
        rewrite(&trained.gguf(), &changed, |_, v| Some(v.clone()), flat);
        if name.contains("inp") {
            assert_names(&refusal(&changed), &[file, name, "expected [4, 32], got [128]"]);
        } else {
            output_of(run(&changed).args(["-p", "the"]));
        }
    }
}

#[test]
fn a_tokenizer_that_does_not_fit_the_vocabulary_is_refused() {
    let trained = Trained::new(1, &[], None);
    let changed = trained.path().join("changed.gguf");
    let larger = Tokenizer::train_bpe(["other text ".repeat(30)].into_iter(), 260).unwrap();
    let entry = |key: &str, value: &Value| {
        Some(if key == "tokenizer.huggingface.json" { larger.json().into() } else { value.clone() })
    };
    rewrite(&trained.gguf(), &changed, entry, same);
    assert_names(&refusal(&changed), &["changed.gguf", "260 tokens", "belongs to another model"]);
}

#[test]
fn weights_that_are_no_numbers_are_an_error_and_no_text() {
    let trained = Trained::new(1, &[], Some("f32"));
    let changed = trained.path().join("changed.gguf");
    for name in ["token_embd.weight", "blk.0.ffn_gate_inp.weight", "blk.1.attn_q.weight", "output_norm.weight"] {
        for value in [f32::NAN, f32::INFINITY] {
            let tensor = |info: &TensorInfo, data: &[u8]| {
                assert_eq!(info.ty, GgmlType::F32);
                let broken = value.to_le_bytes().repeat(data.len() / 4);
                Some((info.clone(), if info.name == name { broken } else { data.to_vec() }))
            };
            rewrite(&trained.gguf(), &changed, |_, v| Some(v.clone()), tensor);
            let output = run(&changed).args(["-p", "the"]).output().unwrap();
            let error = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{name} {value}: {error}");
            assert_names(&error, &[]);
            assert!(output.stdout.trim_ascii().is_empty(), "{name} {value}");
        }
    }
}

#[test]
fn what_is_wrong_with_the_command_line_is_a_usage_error() {
    let trained = Trained::new(1, &[], None);
    for (flags, parts) in [
        (&["-p", "a", "-c", "33"][..], &["33", "1 to 32"][..]),
        (&["-p", "a", "-c", "0"], &["1 to 32"]),
        (&["-p", "a", "--top-p", "7"], &["top", "7"]),
        (&["-p", "a", "--overflow", "wrap"], &["overflow", "slide"]),
        (&["-p", "a", "--cache-type", "q4"], &["cache-type", "f16"]),
        (&["-p", "a", "-f", "b"], &["--prompt", "--file"]),
        (&["--tokens", "1,-1"], &["--tokens"]),
        (&["--tokens", "a"], &["--tokens"]),
        (&[], &["--prompt"]),
    ] {
        let mut command = param_run();
        let error = failure_of(command.arg("-m").arg(trained.gguf()).args(flags), 2);
        assert_names(&error, parts);
    }
    for (flags, part) in [(&["-o", "yaml"][..], "json"), (&["-p", "33"], "1 to 32"), (&["-t", "0"], "threads")] {
        assert_names(&failure_of(param_bench().arg("-m").arg(trained.gguf()).args(flags), 2), &[part]);
    }
}

#[test]
fn prompts_that_cannot_be_run_are_refused() {
    let trained = Trained::new(1, &[], None);
    let n_vocab = param_runtime::Model::open(trained.gguf()).unwrap().config().n_vocab;
    let binary = write(trained.path(), "binary", b"\xff\xfe\0a");
    let long = "a".repeat(40);
    for (flags, parts) in [
        (vec!["-p".into(), long], vec!["40", "context of 32", "shorten the prompt"]),
        (vec!["--tokens".into(), format!("1,{n_vocab}")], vec!["is outside the vocabulary"]),
        (vec!["-f".into(), binary.display().to_string()], vec!["binary", "UTF-8"]),
        (vec!["-f".into(), "absent.txt".into()], vec!["absent.txt", "No such file"]),
    ] {
        assert_names(&failure_of(run(&trained.gguf()).args(flags), 1), &parts);
    }
}

#[test]
fn logits_that_cannot_be_written_leave_nothing() {
    let trained = Trained::new(1, &[], None);
    let before = contents(trained.path());
    for place in [trained.data().join("logits.safetensors"), trained.path().join("absent/logits.safetensors")] {
        let error = failure_of(run(&trained.gguf()).args(["-p", "the", "--logits"]).arg(&place), 1);
        assert_names(&error, &[place.to_str().unwrap()]);
        assert_unchanged(trained.path(), &before);
    }
}

#[test]
fn a_reader_that_has_enough_ends_the_text_quietly() {
    let trained = Trained::new(1, &[], None);
    let mut child = param_run()
        .arg("-m")
        .arg(trained.gguf())
        .args(["-p", "the", "--overflow", "slide", "--ignore-eos", "--seed", "1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0; 16]).unwrap();
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !error.contains("error") && !error.contains("panicked"), "{error}");
}

#[cfg(target_os = "linux")]
#[test]
fn an_output_that_is_full_is_an_error() {
    let trained = Trained::new(1, &[], None);
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let gguf: PathBuf = trained.gguf();
    let mut bench = param_bench();
    bench.arg("-m").arg(&gguf).args(["-p", "4", "-n", "4", "-r", "1", "-t", "1"]);
    for command in [run(&gguf).args(["-p", "the"]), &mut bench] {
        assert_names(&failure_of_with(command.stdout(full())), &["No space left"]);
    }
    let mut evaluate = param_train();
    evaluate.args(["--eval", "--checkpoint"]).arg(trained.run()).arg("--data").arg(trained.data());
    let mut convert = param_convert();
    convert.arg(trained.run()).arg(&gguf);
    for command in [&mut evaluate, &mut convert] {
        assert_names(&failure_of_with(command.stdout(full())), &["No space left"]);
    }
}

/// Like [`failure_of`] for a command whose standard output goes elsewhere.
#[cfg(target_os = "linux")]
fn failure_of_with(command: &mut Command) -> String {
    let output = command.stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{command:?}: {error}");
    error
}
