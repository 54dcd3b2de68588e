//! What the tests train on and look at: text, tiny models, folders compared before and after.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::command::{output_of, param_convert, param_train};

/// Words of several lengths, scripts and ways to spell, the frequent ones first.
const WORDS: &str = "the of and river a to in stone old was it bridge under people that with water is there winter don't market \
    trade café they'll naïve letters 1842 garden weather Zürich fisherman smörgåsbord Ω 日本 42 3.14 «so» 😀 crossroads";

/// About `n_byte` bytes of prose: sentences of words drawn by a Zipf-like law, in paragraphs. The same for the same seed.
pub fn prose(n_byte: usize, seed: u64) -> String {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut draw = |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    let words = WORDS.split_whitespace().collect::<Vec<_>>();
    let mut text = String::new();
    while text.len() < n_byte {
        for i in 0..4 + draw(9) {
            let bound = 1 + draw(words.len());
            text += if i == 0 { "" } else { " " };
            text += words[draw(bound)];
        }
        text += [". ", ".\n", "? ", "; ", ".\n\n"][draw(5)];
    }
    text
}

/// Writes text into a folder and returns its path.
pub fn write(folder: &Path, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, text).unwrap();
    path
}

/// Flags of a model of some fifty thousand parameters with both kinds of block, whose steps take milliseconds.
const TINY: &str =
    "--preset param-tiny --set num_layers=2 --set emb_dim=32 --set num_heads=2 --context 32 --batch-size 4 --threads 2";

/// See [`TINY`].
pub fn tiny() -> impl Iterator<Item = &'static str> {
    TINY.split(' ')
}

/// A training command with a tiny model, character tokens and two threads.
pub fn train(data: &Path, out: &Path, flags: &[&str]) -> Command {
    let mut command = param_train();
    command.arg("--data").arg(data).arg("--out").arg(out).args(tiny()).arg("--chars").args(flags);
    command
}

/// Goes on with a run.
pub fn resume(out: &Path, flags: &[&str]) -> Command {
    let mut command = param_train();
    command.arg("--resume").arg("--out").arg(out).args(["--threads", "2"]).args(flags);
    command
}

/// A folder with text in `text.txt`, a tiny model trained on it for some steps in `run`, and its `model.gguf`.
pub struct Trained {
    folder: tempfile::TempDir,
}

impl Trained {
    /// Trained for `steps` with more flags, converted with `quant` where it names a type.
    pub fn new(steps: usize, flags: &[&str], quant: Option<&str>) -> Self {
        let trained = Self { folder: tempfile::tempdir().unwrap() };
        let data = write(trained.path(), "text.txt", prose(20_000, 1));
        let steps = format!("--steps={steps}");
        output_of(train(&data, &trained.run(), &["--lr=1e-2", &steps]).args(flags));
        let quant = quant.map(|ty| format!("--quant={ty}"));
        output_of(param_convert().arg(trained.run()).arg(trained.gguf()).args(quant));
        trained
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn data(&self) -> PathBuf {
        self.path().join("text.txt")
    }

    pub fn run(&self) -> PathBuf {
        self.path().join("run")
    }

    pub fn weights(&self) -> PathBuf {
        self.run().join("last/model.safetensors")
    }

    pub fn gguf(&self) -> PathBuf {
        self.path().join("model.gguf")
    }
}

/// The records of a run's `metrics.jsonl` that have this field.
pub fn records(run: &Path, field: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let records = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    records.filter(|record| record.get(field).is_some()).collect()
}

/// One number of each record of a run that has it.
pub fn series(run: &Path, field: &str) -> Vec<f64> {
    records(run, field).iter().map(|record| record[field].as_f64().unwrap()).collect()
}

/// Every path below a folder with what a file holds or a link points to.
pub fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(current) = folders.pop() {
        for entry in std::fs::read_dir(&current).unwrap() {
            let path = entry.unwrap().path();
            let metadata = path.symlink_metadata().unwrap();
            let content = if metadata.is_symlink() {
                std::fs::read_link(&path).unwrap().to_string_lossy().into_owned().into_bytes()
            } else if metadata.is_dir() {
                folders.push(path.clone());
                Vec::new()
            } else {
                std::fs::read(&path).unwrap()
            };
            all.insert(path, content);
        }
    }
    all
}

/// Asserts that a folder holds what it held, to the byte.
pub fn assert_unchanged(folder: &Path, before: &BTreeMap<PathBuf, Vec<u8>>) {
    let after = contents(folder);
    let names = |all: &BTreeMap<PathBuf, Vec<u8>>| all.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&after), names(before), "names");
    for (path, content) in before {
        assert!(after[path] == *content, "{} changed", path.display());
    }
}
