//! What param-train refuses, and that it makes no folder for a run that cannot begin.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::assert_names;
use crate::command::{failure_of, output_of, param_train};
use crate::fixture::{Trained, assert_unchanged, contents, prose, resume, tiny, train, write};

/// A folder with text to train on.
struct Place {
    folder: tempfile::TempDir,
    data: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let data = write(folder.path(), "text.txt", prose(6_000, 1));
        Self { folder, data }
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        write(self.folder.path(), name, bytes)
    }

    fn run(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// What a command is refused with before it has made anything.
    #[track_caller]
    fn refusal(&self, command: &mut Command, code: i32) -> String {
        let before = contents(self.folder.path());
        let error = failure_of(command, code);
        assert_unchanged(self.folder.path(), &before);
        error
    }
}

#[test]
fn text_that_is_none_is_refused_by_file_and_offset() {
    let place = Place::new();
    for (name, bytes, parts) in [
        ("empty.txt", &b""[..], &["empty.txt", "holds no text"][..]),
        ("blank.md", b" \n\t\n", &["blank.md", "holds no text"]),
        ("binary.txt", b"text\0more", &["binary.txt", "NUL byte at offset 4"]),
        ("latin1.txt", b"caf\xe9 au lait", &["latin1.txt", "not UTF-8 at byte offset 3"]),
        ("wide.txt", b"\xff\xfea\0b\0", &["wide.txt"]),
        ("empty.jsonl", b"\n\n", &["empty.jsonl"]),
        ("bad.jsonl", b"{\"body\": 1}\nno\n", &["bad.jsonl", "1 bad JSON", "1 text field missing"]),
        ("none.txt.gz", b"not packed", &["none.txt.gz", "cannot read"]),
        ("none.txt.zst", b"not packed", &["none.txt.zst", "cannot read"]),
        ("none.parquet", b"no table, though long enough for one", &["none.parquet", "not a usable Parquet file"]),
    ] {
        let file = place.file(name, bytes);
        assert_names(&place.refusal(&mut train(&file, &place.run(), &["--steps=1"]), 1), parts);
    }
}

#[test]
fn data_that_is_not_there_is_refused_by_name() {
    let place = Place::new();
    std::fs::create_dir(place.folder.path().join("nothing")).unwrap();
    for (input, parts) in [
        ("absent.txt", &["absent.txt", "no such file"][..]),
        ("absent/*.txt", &["absent/*.txt"]),
        ("nothing", &["nothing", "no file matched"]),
        ("text.txt/below", &["text.txt/below"]),
    ] {
        let input = place.folder.path().join(input);
        assert_names(&place.refusal(&mut train(&input, &place.run(), &[]), 1), parts);
    }
    let folder = place.folder.path().to_owned();
    assert_names(&place.refusal(&mut train(&folder, &place.run(), &["--ext", "py"]), 1), &["extension py", "txt"]);
}

#[test]
fn mixtures_that_are_none_are_refused_by_data_set() {
    let place = Place::new();
    let empty = place.file("empty.txt", b" ");
    let short = place.file("short.txt", b"only a few words");
    let weighted = |path: &Path, weight: &str| PathBuf::from(format!("{}:{weight}", path.display()));
    for weight in ["0", "-1", "nan", "inf"] {
        let error = place.refusal(&mut train(&weighted(&place.data, weight), &place.run(), &[]), 2);
        assert_names(&error, &["text.txt:", weight, "positive number"]);
    }
    let nothing = Path::new(":1");
    assert_names(&place.refusal(&mut train(nothing, &place.run(), &[]), 2), &["--data :1", "expected a path"]);
    let mixed = |other: &Path, code: i32| {
        let (first, second) = (weighted(&place.data, "1"), weighted(other, "2"));
        failure_of(train(&first, &place.run(), &["--steps=1"]).arg("--data").arg(second), code)
    };
    assert_names(&mixed(place.folder.path(), 2), &["text.txt is in both text.txt and"]);
    assert_names(&mixed(&place.folder.path().join("absent"), 1), &["absent", "no such file"]);
    assert_names(&mixed(&empty, 1), &["empty.txt", "holds no text"]);
    assert_names(&mixed(&short, 1), &["of `short.txt` has", "less than one context"]);
}

#[test]
fn too_little_text_says_how_much_there_is() {
    let place = Place::new();
    let short = place.file("short.txt", b"only a few words");
    let error = failure_of(&mut train(&short, &place.run(), &["--steps=1"]), 1);
    assert_names(&error, &["tokens, less than one context of 32"]);
    assert!(!place.run().join("checkpoints").read_dir().is_ok_and(|mut all| all.next().is_some()));
}

#[test]
fn what_is_wrong_with_the_command_line_is_a_usage_error() {
    let place = Place::new();
    for (flags, parts) in [
        (&["--lr=0"][..], &["--lr", "positive"][..]),
        (&["--lr=fast"], &["--lr", "fast"]),
        (&["--optimizer=adamw", "--muon-lr=1e-2"], &["--muon-lr", "--optimizer muon"]),
        (&["--lr-scale=nothing=2"], &["--lr-scale", "no tensor's name matches `nothing`"]),
        (&["--min-lr=2"], &["--min-lr", "0 to 1"]),
        (&["--clip=-1"], &["--clip"]),
        (&["--beta1=1"], &["--beta1"]),
        (&["--weight-decay=nan"], &["--weight-decay"]),
        (&["--steps=0"], &["--steps", "at least 1"]),
        (&["--accumulate=0"], &["--accumulate", "at least 1"]),
        (&["--keep=0"], &["--keep", "at least 1"]),
        (&["--dropout=1"], &["dropout_rate", "1"]),
        (&["--set", "num_experts=0"], &["num_experts", "0"]),
        (&["--set", "top_k=9"], &["top_k", "num_experts"]),
        (&["--set", "layers=2"], &["--set layers", "no such key"]),
        (&["--set", "stride"], &["--set stride", "KEY=VALUE"]),
        (&["--schedule=square"], &["schedule", "cosine"]),
        (&["--layout=none"], &["layout", "packed"]),
        (&["--layout=document", "--isolate-documents"], &["--isolate-documents", "packed"]),
        (&["--data", "more.txt:0.5"], &["more.txt:0.5 has a weight", "text.txt has none"]),
        (&["--tokenizer=x.json"], &["--tokenizer", "--chars"]),
        (&["--steps=1", "--epochs=1"], &["--steps", "--epochs"]),
        (&["--init-only", "--resume"], &["--init-only", "--resume"]),
        (&["--checkpoint=x"], &["--eval"]),
        (&["--preset=param-7b"], &["--preset"]),
    ] {
        assert_names(&place.refusal(&mut train(&place.data, &place.run(), flags), 2), parts);
    }
    let mut command = param_train();
    let error = place.refusal(command.arg("--data").arg(&place.data).arg("--out").arg(place.run()), 2);
    assert_names(&error, &["--preset NAME or --config FILE"]);
    let mut command = param_train();
    assert_names(&place.refusal(command.args(tiny()).arg("--out").arg(place.run()), 2), &["--data"]);
    let mut command = param_train();
    assert_names(&place.refusal(command.args(tiny()).arg("--data").arg(&place.data), 2), &["--out"]);
    let mut command = param_train();
    assert_names(&place.refusal(command.arg("--data").arg(&place.data).arg("--eval"), 2), &["--checkpoint"]);
    // Found only once the text is read.
    assert_names(&failure_of(&mut train(&place.data, &place.run(), &["--holdout=2"]), 2), &["--holdout", "below 1"]);
    assert_names(&failure_of(&mut train(&place.data, &place.run(), &["--epochs=-1"]), 2), &["--epochs"]);
}

#[test]
fn configs_and_tokenizers_that_cannot_be_read_are_refused_by_file() {
    let place = Place::new();
    let with = |flag: &str, path: &Path, rest: &[&str]| {
        let mut command = param_train();
        command.arg(flag).arg(path).arg("--data").arg(&place.data).arg("--out").arg(place.run()).args(rest);
        place.refusal(&mut command, 1)
    };
    let absent = place.folder.path().join("absent");
    assert_names(&with("--config", &absent, &["--chars"]), &["absent", "No such file"]);
    assert_names(&with("--config", &place.file("a.json", b"{\"vocab_size\": 5}"), &[]), &["a.json", "missing field"]);
    assert_names(&with("--config", &place.file("b.toml", b"vocab_size = "), &[]), &["b.toml"]);
    let preset = ["--preset", "param-tiny"];
    assert_names(&with("--tokenizer", &absent, &preset), &["absent", "No such file"]);
    assert_names(&with("--tokenizer", &place.file("c.json", b"{}"), &preset), &["c.json", "byte-level BPE"]);
    let vocabulary = ["--preset", "param-tiny", "--vocab-size", "100"];
    assert_names(&with("--threads", Path::new("2"), &vocabulary), &["100", "at least 257"]);
}

#[test]
fn a_folder_that_cannot_be_written_is_refused_by_name() {
    let place = Place::new();
    // Tests may run as root, whom no permission keeps out; nobody makes folders below a file.
    let below = place.data.join("run");
    assert_names(&place.refusal(&mut train(&place.data, &below, &["--steps=1"]), 1), &["text.txt/run"]);
    let mut command = param_train();
    command.arg("--init-only").args(tiny()).arg("--out").arg(&below);
    assert_names(&place.refusal(&mut command, 1), &["text.txt/run"]);
}

#[test]
fn resuming_what_is_not_there_or_damaged_is_refused_and_changes_nothing() {
    let place = Place::new();
    assert_names(&place.refusal(&mut resume(&place.run(), &[]), 1), &["run", "no checkpoint to resume"]);
    output_of(&mut train(&place.data, &place.run(), &["--steps=2"]));
    let last = place.run().join("last");
    for (file, content, parts) in [
        ("state.json", Some(&b"{"[..]), &["state.json", "not a training state"][..]),
        ("state.json", Some(b"{\"version\": 99}"), &["state.json"]),
        ("optimizer.safetensors", Some(b"short"), &["optimizer.safetensors"]),
        ("optimizer.safetensors", None, &["optimizer.safetensors", "No such file"]),
        ("model.safetensors", None, &["model.safetensors"]),
        ("config.json", Some(b"{}"), &["config.json", "missing field"]),
        ("tokenizer.json", Some(b"{}"), &["tokenizer.json"]),
    ] {
        let path = last.join(file);
        let whole = std::fs::read(&path).unwrap();
        match content {
            Some(bytes) => std::fs::write(&path, bytes).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        assert_names(&place.refusal(&mut resume(&place.run(), &["--steps=4"]), 1), parts);
        std::fs::write(&path, whole).unwrap();
    }
    output_of(&mut resume(&place.run(), &["--steps=4"]));
}

#[test]
fn weights_that_are_no_numbers_end_training_and_evaluation_with_an_error() {
    let trained = Trained::new(2, &[], None);
    let path = trained.weights();
    let whole = std::fs::read(&path).unwrap();
    for value in [f32::NAN, f32::INFINITY] {
        let mut broken = whole.clone();
        // The last tensors of the file are mask buffers, which are not read.
        for at in (whole.len() / 4..whole.len() / 2).step_by(4) {
            let at = at - (at - 8 - header_len(&whole)) % 4;
            broken[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        std::fs::write(&path, &broken).unwrap();
        let mut evaluate = param_train();
        evaluate.args(["--eval", "--checkpoint"]).arg(trained.run()).arg("--data").arg(trained.data());
        assert_names(&failure_of(&mut evaluate, 1), &["NaN"]);
        let error = failure_of(&mut resume(&trained.run(), &["--steps=4"]), 1);
        assert_names(&error, &["step 3: the loss became"]);
        assert!(std::fs::read(&path).unwrap() == broken, "the checkpoint was touched");
    }
}

fn header_len(safetensors: &[u8]) -> usize {
    u64::from_le_bytes(safetensors[..8].try_into().unwrap()) as usize
}

#[test]
fn checkpoints_that_do_not_fit_are_not_evaluated() {
    let trained = Trained::new(1, &[], None);
    let evaluate = |checkpoint: &Path, flags: &[&str], code: i32| {
        let mut command = param_train();
        command.args(["--eval", "--checkpoint"]).arg(checkpoint).arg("--data").arg(trained.data()).args(flags);
        failure_of(&mut command, code)
    };
    assert_names(&evaluate(Path::new("absent"), &[], 1), &["absent", "No such file"]);
    assert_names(&evaluate(&trained.gguf(), &[], 1), &["model.gguf", "not that of a safetensors file"]);
    assert_names(&evaluate(&trained.run(), &["--context=33"], 2), &["--context", "33", "32 positions"]);
    assert_names(&evaluate(&trained.run(), &["--batch-size=0"], 2), &["--batch-size"]);
    let larger = param_model::Tokenizer::train_bpe(["other text ".repeat(30)].into_iter(), 260).unwrap();
    let file = write(trained.path(), "larger.json", larger.json());
    let flag = format!("--tokenizer={}", file.display());
    assert_names(&evaluate(&trained.run(), &[&flag], 1), &["260 tokens", "belongs to another model"]);
}

#[test]
fn a_random_model_replaces_nothing() {
    let trained = Trained::new(1, &[], None);
    let before = contents(trained.path());
    for out in [trained.run(), trained.run().join("last"), trained.data()] {
        let error = failure_of(param_train().arg("--init-only").args(tiny()).arg("--out").arg(&out), 1);
        assert_names(&error, &[out.to_str().unwrap(), "expected a new or an empty folder"]);
        assert_unchanged(trained.path(), &before);
    }
    let empty = trained.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    output_of(param_train().arg("--init-only").args(tiny()).arg("--out").arg(&empty));
    assert!(empty.join("model.safetensors").exists());
}

#[test]
fn a_log_that_nobody_reads_any_longer_does_not_end_the_training() {
    use std::io::{BufRead, BufReader};
    let place = Place::new();
    let mut child = train(&place.data, &place.run(), &["--steps=60", "--log-every=1"])
        .stderr(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("step ") {
        line.clear();
        assert!(log.read_line(&mut line).unwrap() > 0, "no line about a step");
    }
    drop(log);
    assert!(child.wait().unwrap().success());
    assert_eq!(crate::fixture::records(&place.run(), "loss").len(), 60);
}
