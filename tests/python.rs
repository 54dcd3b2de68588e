//! Our files in Python's hands: gguf-py reads and dequantizes the GGUF, the reference's names and forward pass fit the
//! checkpoint, TensorBoard reads the event files. Where Python or a package is missing, a test says so on standard error and holds
//! of nothing.

use std::path::Path;
use std::process::Command;

use gguf::{GgmlType, Gguf};
use param_model::Config;
use param_model::checkpoint::{WEIGHTS_FILE, write_tensors, write_weights};

use crate::command::{output_of, param_convert, param_run, param_train};
use crate::fixture::{Trained, prose, records, resume, tiny, train, write};
use crate::pipeline::reporting::event_files;
use crate::pipeline::{QUANTS, wide_model};

/// A script of `tests/python` to be run, or `None` where its packages are missing.
fn script(name: &str, packages: &[&str]) -> Option<Command> {
    let imports = packages.iter().map(|package| format!("import {package}")).collect::<Vec<_>>().join("; ");
    let problem = match Command::new("python3").args(["-c", &imports]).output() {
        Ok(output) if output.status.success() => {
            let mut command = Command::new("python3");
            command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python").join(name));
            return Some(command);
        }
        Ok(output) => String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or("it fails").to_owned(),
        Err(error) => format!("python3: {error}"),
    };
    // Past the capture of test output: a check that did not take place should be seen.
    let skipped = format!("skipped: {name} needs python3 with {}: {problem}\n", packages.join(", "));
    std::io::Write::write_all(&mut std::io::stderr(), skipped.as_bytes()).unwrap();
    None
}

const READ_GGUF: (&str, &[&str]) = ("read_gguf.py", &["gguf", "numpy", "safetensors"]);

/// Converts a checkpoint to `model.gguf` in a folder, with every tensor in f32 by its name beside it.
fn convert_and_dequantize(checkpoint: &Path, folder: &Path, quant: Option<&str>) {
    std::fs::create_dir(folder).unwrap();
    let path = folder.join("model.gguf");
    output_of(param_convert().arg(checkpoint).arg(&path).args(quant.map(|ty| format!("--quant={ty}"))));
    let gguf = Gguf::open(&path).unwrap();
    let tensors = gguf.tensors().iter().map(|info| {
        let mut values = vec![0.0; info.n_elements() as usize];
        param_ggml::dequantize(info.ty, gguf.tensor_data(&info.name).unwrap(), &mut values).unwrap();
        (info.name.clone(), info.shape().iter().map(|&n| n as usize).collect::<Vec<_>>(), values)
    });
    let tensors = tensors.collect::<Vec<_>>();
    let views = tensors.iter().map(|(name, shape, values)| (name.clone(), shape.clone(), &values[..]));
    write_tensors(&folder.join("expected.safetensors"), views).unwrap();
}

#[test]
fn gguf_py_reads_every_type_and_dequantizes_it_to_what_we_do() {
    let Some(mut read) = script(READ_GGUF.0, READ_GGUF.1) else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = wide_model(folder.path());
    let config = Config::from_file(&model.join("config.json")).unwrap();
    let metadata = serde_json::json!({
        "general.architecture": "param",
        "general.name": "model",
        "general.quantization_version": 2,
        "param.block_count": config.n_layer,
        "param.context_length": config.n_ctx,
        "param.embedding_length": config.n_embd,
        "param.attention.head_count": config.n_head,
        "param.attention.layer_norm_epsilon": f64::from(config.norm_eps),
        "param.expert_count": config.n_expert,
        "param.expert_used_count": config.n_expert_used,
        "param.expert_activation": "gelu_erf",
        "param.vocab_size": config.n_vocab,
    });
    let metadata = write(folder.path(), "metadata.json", metadata.to_string());
    read.arg(metadata);
    for quant in QUANTS.map(Some).into_iter().chain([None]) {
        let converted = folder.path().join(quant.unwrap_or("default"));
        convert_and_dequantize(&model, &converted, quant);
        read.arg(converted);
    }
    let report = output_of(&mut read);
    for quant in QUANTS {
        let ty: GgmlType = quant.parse().unwrap();
        assert!(report.lines().any(|line| line.starts_with(quant) && line.contains(ty.name())), "{quant}: {report}");
    }
    // What gguf-py cannot dequantize is named here.
    eprint!("{}", report.lines().filter(|line| line.starts_with("skipped")).collect::<String>());
}

#[test]
fn gguf_py_reads_the_tokenizer() {
    let Some(mut read) = script(READ_GGUF.0, READ_GGUF.1) else { return };
    let trained = Trained::new(1, &[], None);
    let run = trained.path().join("bpe");
    let mut train = param_train();
    train.arg("--data").arg(trained.data()).arg("--out").arg(&run).args(tiny());
    output_of(train.args(["--vocab-size=300", "--steps=1"]));
    let converted = trained.path().join("converted");
    convert_and_dequantize(&run, &converted, None);
    let tokenizer = param_model::Tokenizer::from_file(&run.join("last/tokenizer.json")).unwrap();
    let metadata = serde_json::json!({
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokenizer.entries().iter().map(|(text, _)| text).collect::<Vec<_>>(),
        "tokenizer.ggml.merges": tokenizer.merges(),
        "tokenizer.ggml.eos_token_id": tokenizer.end_of_text().unwrap(),
        "tokenizer.ggml.add_bos_token": false,
        "tokenizer.huggingface.json": tokenizer.json(),
    });
    let metadata = write(trained.path(), "metadata.json", metadata.to_string());
    output_of(read.arg(metadata).arg(converted));
}

#[test]
fn the_reference_loads_a_checkpoint_by_name_and_shape_and_computes_the_same_logits() {
    let reference = || script("reference.py", &["numpy", "safetensors"]);
    if reference().is_none() {
        return;
    }
    let check = |checkpoint: &Path, n_vocab: usize| {
        let folder = tempfile::tempdir().unwrap();
        let (gguf, logits) = (folder.path().join("model.gguf"), folder.path().join("logits.safetensors"));
        output_of(param_convert().arg(checkpoint).arg(&gguf).args(["--quant", "f32"]));
        let ids = (0..20).map(|i| (i * 7 % n_vocab).to_string()).collect::<Vec<_>>().join(",");
        output_of(param_run().arg("-m").arg(&gguf).args(["--tokens", &ids, "--logits"]).arg(&logits));
        print!("{}", output_of(reference().unwrap().arg(checkpoint).arg(&logits).arg(&ids)));
    };
    let trained = Trained::new(40, &[], None);
    check(&trained.run().join("last"), 40);
    // Biases, which a trained model may or may not have, and weights far from their initial ones.
    let base = Config::from_file(&trained.run().join("last/config.json")).unwrap();
    for config in [
        Config { qkv_bias: true, n_layer: 3, ..base.clone() },
        Config { expert_bias: false, use_noisy_top_k: false, moe_stride: 1, n_expert_used: 1, ..base.clone() },
        Config { n_expert: 1, n_expert_used: 1, ..base.clone() },
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut state = 1u32;
        let mut draw = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        let table = param_model::tensors(&config);
        let params = table.iter().map(|spec| (0..spec.n_elements()).map(|_| 0.3 * draw()).collect::<Vec<_>>());
        let params = params.collect::<Vec<_>>();
        let views = params.iter().map(Vec::as_slice).collect::<Vec<_>>();
        write_weights(&folder.path().join(WEIGHTS_FILE), &config, &views).unwrap();
        write(folder.path(), "config.json", config.to_json());
        check(folder.path(), config.n_vocab);
    }
}

/// A run that is killed somewhere past a checkpoint, in the middle of writing, and goes on from there.
#[test]
fn tensorboard_reads_of_a_killed_and_resumed_run_what_its_metrics_say() {
    let Some(mut read) = script("read_events.py", &["numpy", "tensorboard"]) else { return };
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = (write(folder.path(), "text.txt", prose(6_000, 1)), folder.path().join("run"));
    let flags = ["--save-every=5", "--eval-every=4", "--sample-every=3", "--sample-tokens=9", "--schedule=constant"];
    let mut child = train(&data, &run, &flags)
        .args(["--warmup=3", "--steps=1000000"])
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let n_record = || std::fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count());
    while n_record() < 20 {
        assert!(child.try_wait().unwrap().is_none(), "the run ended by itself");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let killed = event_files(&run).pop().unwrap();
    let mut bytes = std::fs::read(&killed).unwrap();
    bytes.extend_from_within(..20);
    std::fs::write(&killed, bytes).unwrap();

    let done = records(&run, "loss").len();
    output_of(&mut resume(&run, &[&format!("--steps={}", done + 3)]));
    assert_eq!(event_files(&run).len(), 2);
    let report = output_of(read.arg(&run));
    assert!(report.contains("scalars in") && !report.contains(" 0 texts"), "{report}");
}
