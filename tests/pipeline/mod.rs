//! The whole way: raw text through training and conversion to running and measuring, each command as a user runs it.

mod beginning;
mod mixtures;
pub mod reporting;
mod resuming;
mod running;
mod training;

use std::path::{Path, PathBuf};

use param_model::Checkpoint;
use serde_json::Value;

use crate::command::{output_of, outputs_of, param_bench, param_convert, param_run, param_train};
use crate::fixture::{Trained, prose, series, write};

/// Every type that `--quant` takes.
pub const QUANTS: [&str; 15] = [
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "q5_0", "q5_1", "q4_0", "q4_1", "iq4_nl",
    "iq4_xs",
];

/// A randomly initialised model whose rows are whole blocks of every type.
pub fn wide_model(folder: &Path) -> PathBuf {
    let out = folder.join("wide");
    let sizes = ["vocab_size=300", "emb_dim=256", "num_heads=4", "num_layers=2", "num_experts=3", "context_length=32"];
    let sizes = sizes.iter().flat_map(|size| ["--set", size]);
    output_of(param_train().args(["--init-only", "--preset", "param-tiny", "--out"]).arg(&out).args(sizes));
    out
}

/// The lines of a conversion's closing table by their group.
fn groups(table: &str) -> Vec<(&str, &str)> {
    let rows = table.lines().skip(1).take_while(|line| !line.starts_with("total"));
    rows.map(|line| (line[..24].trim_end(), line[24..].split_whitespace().next().unwrap())).collect()
}

#[test]
fn raw_text_becomes_a_model_that_writes_with_either_tokenizer() {
    for tokenizer in [&["--chars"][..], &["--vocab-size", "320"]] {
        let folder = tempfile::tempdir().unwrap();
        let data = write(folder.path(), "text.txt", prose(20_000, 1));
        let (run, gguf) = (folder.path().join("run"), folder.path().join("model.gguf"));
        let (out, log) = outputs_of(
            param_train()
                .arg("--data")
                .arg(&data)
                .arg("--out")
                .arg(&run)
                .args(crate::fixture::tiny())
                .args(tokenizer)
                .args(["--steps=60", "--lr=1e-2"]),
        );
        assert!(out.contains("60 steps") && out.contains("next: param-convert"), "{out}");
        assert!(log.contains("tokenized: 1 files, 1 documents") && log.contains("validation loss"), "{log}");
        let losses = series(&run, "ce");
        assert_eq!(losses.len(), 60);
        assert!(losses[59] < losses[0] - 0.5, "{losses:?}");

        let (out, _) = outputs_of(param_convert().arg(run.join("best/model.safetensors")).arg(&gguf));
        assert!(out.contains("model.gguf: "), "{out}");
        let (text, log) = outputs_of(param_run().arg("-m").arg(&gguf).args(["-p", "the ", "-n", "20", "--temp", "0"]));
        assert!(text.trim_end().chars().count() > 4, "{text}");
        assert!(log.contains("decode 20 tokens"), "{log}");
    }
}

#[test]
fn every_type_converts_with_each_group_in_the_report_and_runs() {
    let folder = tempfile::tempdir().unwrap();
    let model = wide_model(folder.path());
    let gguf = folder.path().join("model.gguf");
    let mut sizes = Vec::new();
    for quant in QUANTS.map(Some).into_iter().chain([None]) {
        let table = output_of(param_convert().arg(&model).arg(&gguf).args(quant.map(|ty| format!("--quant={ty}"))));
        let ty = quant.map(str::to_uppercase);
        let (matrices, experts) = (ty.as_deref().unwrap_or("Q8_0"), ty.as_deref().unwrap_or("Q4_K"));
        let expected = [
            ("token embedding / head", matrices),
            ("positions", "F32"),
            ("attention", matrices),
            ("dense feed-forward", matrices),
            ("experts", experts),
            ("routers", "F32"),
            ("norms", "F32"),
            ("biases", "F32"),
        ];
        assert_eq!(groups(&table), expected, "{quant:?}\n{table}");
        let ids = output_of(param_run().arg("-m").arg(&gguf).args([
            "--tokens",
            "5,6,7",
            "-n",
            "4",
            "--temp",
            "0",
            "--print-tokens",
        ]));
        assert_eq!(ids.trim().split(',').filter(|id| id.parse::<u32>().is_ok_and(|id| id < 300)).count(), 4, "{ids}");
        sizes.push((quant, std::fs::metadata(&gguf).unwrap().len()));
    }
    let size_of = |ty| sizes.iter().find(|(of, _)| *of == ty).unwrap().1;
    let smaller_first = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "f16", "f32"].map(Some);
    assert!(smaller_first.is_sorted_by(|&a, &b| size_of(a) < size_of(b)), "{sizes:?}");
    assert!(size_of(Some("q4_k")) < size_of(None) && size_of(None) < size_of(Some("q8_0")), "{sizes:?}");
}

#[test]
fn tensor_types_are_chosen_by_name_and_fall_back_where_rows_do_not_fit() {
    let trained = Trained::new(1, &[], None);
    let convert = |flags: &[&str]| output_of(param_convert().arg(trained.run()).arg(trained.gguf()).args(flags));
    let table = convert(&["--tensor-type", "attn=f16", "--tensor-type", r"attn_q\.=q4_0"]);
    let attention = groups(&table).into_iter().filter(|(group, _)| *group == "attention").collect::<Vec<_>>();
    assert_eq!(attention, [("attention", "F16"), ("attention", "Q4_0")], "{table}");
    assert!(table.contains("Q5_0 instead of Q4_K: rows of 32 are not whole blocks of 256"), "{table}");
}

#[test]
fn sharded_and_half_precision_checkpoints_without_repeats_convert_to_the_same_model() {
    let trained = Trained::new(2, &[], None);
    let last = trained.run().join("last");
    let weights = parameters(&last);
    // What bfloat16 holds exactly: the upper half of an f32.
    let rounded = |data: &[f32]| data.iter().map(|x| f32::from_bits(x.to_bits() & 0xFFFF_0000)).collect::<Vec<_>>();
    let rounded = weights.iter().map(|(name, shape, data)| (name.clone(), shape.clone(), rounded(data)));
    let rounded = rounded.collect::<Vec<_>>();
    let converted = |name: &str, files: &[Vec<u8>]| {
        let (folder, gguf) = (trained.path().join(name), trained.path().join("out.gguf"));
        for file in ["config.json", "tokenizer.json"] {
            write(&folder, file, std::fs::read(last.join(file)).unwrap());
        }
        if let [file] = files {
            write(&folder, "model.safetensors", file);
        } else {
            let mut weight_map = serde_json::Map::new();
            for (i, file) in files.iter().enumerate() {
                let part = format!("part-{i}.safetensors");
                let path = write(&folder, &part, file);
                let checkpoint = Checkpoint::open(&path).unwrap();
                weight_map.extend(checkpoint.names().map(|name| (name.to_owned(), part.clone().into())));
            }
            let index = serde_json::json!({"metadata": {}, "weight_map": weight_map});
            write(&folder, "model.safetensors.index.json", index.to_string());
        }
        output_of(param_convert().arg(&folder).arg(&gguf).args(["--name=x", "--quant=f32"]));
        std::fs::read(&gguf).unwrap()
    };
    let f32s = |data: &[f32]| data.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let bf16s = |data: &[f32]| data.iter().flat_map(|x| x.to_le_bytes()[2..].to_vec()).collect::<Vec<u8>>();
    let whole = converted("whole", &[safetensors("F32", &rounded, f32s)]);
    assert!(converted("half", &[safetensors("BF16", &rounded, bf16s)]) == whole);
    let (first, second) = rounded.split_at(rounded.len() / 3);
    assert!(converted("shards", &[safetensors("F32", first, f32s), safetensors("BF16", second, bf16s)]) == whole);
}

type Tensor = (String, Vec<usize>, Vec<f32>);

/// A checkpoint's parameters, without mask buffers and the second copy of the tied head.
fn parameters(checkpoint: &Path) -> Vec<Tensor> {
    let checkpoint = Checkpoint::open(checkpoint).unwrap();
    let names = checkpoint.names().filter(|n| !n.ends_with("mask") && *n != "out_head.weight");
    let tensors = names.map(|name| {
        let tensor = checkpoint.tensor(name).unwrap().unwrap();
        (name.to_owned(), tensor.shape.to_vec(), tensor.to_f32())
    });
    tensors.collect()
}

/// A safetensors file, written by hand as its description says: the header's length, the header, the data.
fn safetensors(dtype: &str, tensors: &[Tensor], encode: impl Fn(&[f32]) -> Vec<u8>) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, shape, values) in tensors {
        let start = data.len();
        data.extend(encode(values));
        let info = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.clone(), info);
    }
    let header = Value::from(header).to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

#[test]
fn a_random_model_converts_and_runs_without_a_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let model = wide_model(folder.path());
    let gguf = folder.path().join("model.gguf");
    let (_, log) = outputs_of(param_convert().arg(&model).arg(&gguf));
    assert!(log.contains("no tokenizer.json"), "{log}");
    let (ids, _) =
        outputs_of(param_run().arg("-m").arg(&gguf).args(["--tokens=1,2", "-n3", "--temp=0", "--print-tokens"]));
    assert_eq!(ids.trim().split(',').count(), 3, "{ids}");
    let error = crate::command::failure_of(param_run().arg("-m").arg(&gguf).args(["-p", "text"]), 1);
    assert!(error.contains("no tokenizer"), "{error}");
}

#[test]
fn two_seeds_make_two_models_and_one_seed_makes_one() {
    let folder = tempfile::tempdir().unwrap();
    let weights = |name: &str, seed: &str| {
        let out = folder.path().join(name);
        output_of(
            param_train().arg("--init-only").args(crate::fixture::tiny()).args(["--seed", seed, "--out"]).arg(&out),
        );
        std::fs::read(out.join("model.safetensors")).unwrap()
    };
    assert!(weights("a", "1") == weights("b", "1"));
    assert!(weights("c", "2") != weights("d", "3"));
}

#[test]
fn measurements_come_as_json_csv_and_table() {
    let trained = Trained::new(1, &[], None);
    let bench = |form: &str| {
        let flags = ["-p", "8", "-n", "4", "-t", "1,2", "-r", "3", "-o", form];
        output_of(param_bench().arg("-m").arg(trained.gguf()).args(flags))
    };
    let rows: Vec<Value> = serde_json::from_str(&bench("json")).unwrap();
    let tests = rows.iter().map(|row| (row["test"].as_str().unwrap(), row["threads"].as_u64().unwrap()));
    assert_eq!(tests.collect::<Vec<_>>(), [("pp8", 1), ("tg4", 1), ("pp8", 2), ("tg4", 2)]);
    for row in &rows {
        let [middle, low, high] = ["tok/s", "min", "max"].map(|key| row[key].as_f64().unwrap());
        assert!(0.0 < low && low <= middle && middle <= high, "{row}");
        assert_eq!(row["samples"].as_array().unwrap().len(), 3);
        assert_eq!(row["model"], "model.gguf");
        assert!(row["bytes"].as_u64().unwrap() < std::fs::metadata(trained.gguf()).unwrap().len());
        assert_eq!(
            (&row["depth"], row["n_prompt"].as_u64().unwrap() + row["n_gen"].as_u64().unwrap() > 0),
            (&0.into(), true)
        );
    }
    let csv = bench("csv");
    let lines = csv.lines().collect::<Vec<_>>();
    assert_eq!(
        lines[0],
        "model,bytes,params,isa,threads,gpu,test,n_prompt,n_gen,depth,sequences,tok/s,min,max,samples"
    );
    assert_eq!(lines.len(), 5);
    assert!(lines.iter().all(|line| line.split(',').count() == 15), "{csv}");
    assert_eq!(bench("table").lines().filter(|line| line.starts_with("| model.gguf")).count(), 4);
}
