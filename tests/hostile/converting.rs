//! What param-convert refuses, and that it leaves nothing behind when it does.

use std::path::{Path, PathBuf};

use param_model::Checkpoint;
use param_model::checkpoint::write_tensors;

use super::{assert_names, cuts, end_of, flips};
use crate::command::{failure_of, output_of, param_convert};
use crate::fixture::{Trained, assert_unchanged, contents, write};

/// A tiny model's weights, config and tokenizer in a folder of their own.
struct Source {
    _trained: Trained,
    folder: PathBuf,
    out: PathBuf,
}

impl Source {
    fn new() -> Self {
        let trained = Trained::new(1, &[], None);
        let folder = trained.path().join("source");
        for file in ["model.safetensors", "config.json", "tokenizer.json"] {
            write(&folder, file, std::fs::read(trained.run().join("last").join(file)).unwrap());
        }
        let out = folder.join("out.gguf");
        Self { folder, out, _trained: trained }
    }

    fn weights(&self) -> PathBuf {
        self.folder.join("model.safetensors")
    }

    /// What it is refused with, having left everything as it was, whether a finished file stood at the output or not.
    #[track_caller]
    fn refusal(&self, flags: &[&str], code: i32) -> String {
        let mut command = param_convert();
        command.arg(&self.folder).arg(&self.out).args(flags);
        let _ = std::fs::remove_file(&self.out);
        let before = contents(&self.folder);
        failure_of(&mut command, code);
        assert_unchanged(&self.folder, &before);
        std::fs::write(&self.out, b"GGUF of an earlier conversion").unwrap();
        let before = contents(&self.folder);
        let error = failure_of(&mut command, code);
        assert_unchanged(&self.folder, &before);
        error
    }

    /// Writes the weights anew, each tensor changed or left out.
    fn rewrite(&self, change: impl Fn(&str, Vec<usize>, Vec<f32>) -> Option<(String, Vec<usize>, Vec<f32>)>) {
        let checkpoint = Checkpoint::open(&self.weights()).unwrap();
        let tensors = checkpoint.names().filter_map(|name| {
            let tensor = checkpoint.tensor(name).unwrap().unwrap();
            change(name, tensor.shape.to_vec(), tensor.to_f32())
        });
        let tensors = tensors.collect::<Vec<_>>();
        let views = tensors.iter().map(|(name, shape, data)| (name.clone(), shape.clone(), &data[..]));
        write_tensors(&self.weights(), views).unwrap();
    }
}

const UP: &str = "transformer_blocks.0.moe.experts.c_fc";

#[test]
fn weights_cut_off_anywhere_are_refused_by_name() {
    let source = Source::new();
    let bytes = std::fs::read(source.weights()).unwrap();
    for len in cuts(bytes.len(), header_len(&bytes)) {
        std::fs::write(source.weights(), &bytes[..len]).unwrap();
        let error = failure_of(param_convert().arg(source.weights()).arg(&source.out), 1);
        assert_names(&error, &["model.safetensors"]);
        assert!(!source.out.exists(), "{len} bytes");
    }
}

fn header_len(safetensors: &[u8]) -> usize {
    8 + u64::from_le_bytes(safetensors[..8].try_into().unwrap()) as usize
}

#[test]
fn weights_with_flipped_bits_convert_or_are_refused_and_never_crash_it() {
    let source = Source::new();
    let bytes = std::fs::read(source.weights()).unwrap();
    let mut n_refused = 0;
    for (at, bit) in flips(bytes.len(), header_len(&bytes), 120) {
        let mut bytes = bytes.clone();
        bytes[at] ^= bit;
        std::fs::write(source.weights(), bytes).unwrap();
        let (code, error) = end_of(param_convert().arg(source.weights()).arg(&source.out));
        assert!(code == 0 || error.contains("model.safetensors") || error.contains("tensor `"), "byte {at}: {error}");
        assert_eq!(source.out.exists(), code == 0, "byte {at}");
        assert_eq!(contents(&source.folder).len(), if code == 0 { 4 } else { 3 }, "byte {at}");
        let _ = std::fs::remove_file(&source.out);
        n_refused += code;
    }
    assert!(n_refused > 20, "only {n_refused} were noticed");
}

#[test]
fn missing_superfluous_and_misshapen_tensors_are_named() {
    let source = Source::new();
    let whole = std::fs::read(source.weights()).unwrap();
    for name in [UP, "final_norm.shift", "transformer_blocks.1.moe.layers.2.bias", "position_emb.weight"] {
        source.rewrite(|n, shape, data| (n != name).then(|| (n.into(), shape, data)));
        assert_names(&source.refusal(&[], 1), &["model.safetensors", &format!("`{name}`"), "missing"]);
        std::fs::write(source.weights(), &whole).unwrap();
    }
    source.rewrite(|n, shape, data| {
        Some(if n == UP { (n.into(), vec![4, 128, 32], data) } else { (n.into(), shape, data) })
    });
    assert_names(&source.refusal(&[], 1), &[UP, "expected [4, 32, 128]", "got [4, 128, 32]"]);
    std::fs::write(source.weights(), &whole).unwrap();
    source.rewrite(|n, shape, data| Some((if n == UP { "lm_head.bias".into() } else { n.into() }, shape, data)));
    assert_names(&source.refusal(&[], 1), &[UP, "missing"]);
}

#[test]
fn a_config_that_disagrees_or_cannot_be_read_is_refused() {
    let source = Source::new();
    let config = std::fs::read_to_string(source.folder.join("config.json")).unwrap();
    let with = |from: &str, to: &str| {
        assert!(config.contains(from), "{config}");
        write(&source.folder, "config.json", config.replace(from, to));
        source.refusal(&[], 1)
    };
    assert_names(&with("\"num_experts\": 4", "\"num_experts\": 5"), &["router.w_g.weight", "expected [5, 32]"]);
    assert_names(&with("\"num_layers\": 2", "\"num_layers\": 3"), &["`transformer_blocks.2.", "missing"]);
    assert_names(&with("\"num_layers\": 2", "\"num_layers\": 1"), &["`transformer_blocks.1.", "not part of the model"]);
    assert_names(&with("\"num_heads\": 2", "\"num_heads\": 3"), &["config.json", "num_heads"]);
    assert_names(&with("\"num_heads\": 2", "\"num_heads\": -2"), &["config.json", "-2"]);
    assert_names(&with("\"top_k\": 2,", ""), &["config.json", "top_k"]);
    assert_names(&with("{", "["), &["config.json"]);

    std::fs::remove_file(source.folder.join("config.json")).unwrap();
    assert_names(&source.refusal(&[], 2), &["config.json", "--config", "--heads", "--top-k"]);
    assert_names(&source.refusal(&["--heads", "2"], 2), &["--top-k"]);
    assert_names(&source.refusal(&["--config", "absent.json"], 1), &["absent.json", "No such file"]);
    output_of(param_convert().arg(&source.folder).arg(&source.out).args(["--heads", "2", "--top-k", "2"]));
}

#[test]
fn a_tokenizer_that_does_not_fit_or_is_none_is_refused() {
    let source = Source::new();
    let file = source.folder.join("tokenizer.json");
    let larger = param_model::Tokenizer::train_bpe(["other text ".repeat(30)].into_iter(), 260).unwrap();
    std::fs::write(&file, larger.json()).unwrap();
    assert_names(&source.refusal(&[], 1), &["tokenizer.json", "260 tokens", "belongs to another model"]);
    for content in
        [&b""[..], b"{}", b"{\"model\": {\"type\": \"Unigram\"}}", b"\xff\xfe", &larger.json().as_bytes()[..999]]
    {
        std::fs::write(&file, content).unwrap();
        assert_names(&source.refusal(&[], 1), &["tokenizer.json"]);
    }
    assert_names(&source.refusal(&["--tokenizer", "absent.json"], 1), &["absent.json", "No such file"]);
}

#[test]
fn weights_that_are_no_numbers_are_named_with_their_place() {
    let source = Source::new();
    let whole = std::fs::read(source.weights()).unwrap();
    for (value, quant) in [(f32::NAN, "q4_0"), (f32::INFINITY, "q8_0"), (f32::NAN, "f32"), (1e9, "f16")] {
        source.rewrite(|n, shape, mut data| {
            if n == UP {
                data[32 * 128 + 5] = value;
            }
            Some((n.into(), shape, data))
        });
        assert_names(&source.refusal(&["--quant", quant], 1), &[UP, "element [1, 0, 5]"]);
        std::fs::write(source.weights(), &whole).unwrap();
    }
}

#[test]
fn what_is_wrong_with_the_command_line_is_a_usage_error() {
    let source = Source::new();
    for (flags, parts) in [
        (&["--quant", "q4_x"][..], &["q4_x", "f32, f16, bf16, q8_0, q6_k", "iq4_xs"][..]),
        (&["--tensor-type", "attn=q9"], &["q9", "expected one of f32, f16"]),
        (&["--tensor-type", "(=q8_0"], &["--tensor-type", "unclosed group"]),
        (&["--tensor-type", "attn"], &["--tensor-type", "REGEX=TYPE"]),
        (&["--tensor-type", "nothing=q8_0"], &["nothing", "matches no tensor"]),
        (&["--tensor-type", "attn_norm=q8_0"], &["attn_norm", "f32, f16 or bf16"]),
        (&["--threads", "0"], &["--threads"]),
    ] {
        assert_names(&source.refusal(flags, 2), parts);
    }
}

#[test]
fn outputs_that_are_something_else_are_not_replaced() {
    let source = Source::new();
    let before = contents(&source.folder);
    let convert = |out: &Path, code: i32| {
        let error = failure_of(param_convert().arg(&source.folder).arg(out), code);
        assert_unchanged(&source.folder, &before);
        error
    };
    assert_names(&convert(&source.weights(), 2), &["model.safetensors", "not a GGUF"]);
    assert_names(&convert(&source.folder.join("config.json"), 2), &["config.json", "not a GGUF"]);
    assert_names(&convert(&source.folder, 2), &["is a folder"]);
    // Tests may run as root, whom no permission keeps out; nobody makes files below a file.
    assert_names(&convert(&source.weights().join("out.gguf"), 1), &["model.safetensors/out.gguf"]);
    assert_names(&convert(&source.folder.join("absent/out.gguf"), 1), &["absent/out.gguf", "No such file"]);
}

#[test]
fn inputs_that_are_no_checkpoint_are_refused_by_name() {
    let source = Source::new();
    let index = |name: &str, text: &str| write(&source.folder, name, text);
    for (input, parts) in [
        (source.folder.join("absent"), &["absent", "No such file"][..]),
        (source.folder.join("tokenizer.json"), &["tokenizer.json"]),
        (write(&source.folder.join("empty"), "model.safetensors", ""), &["model.safetensors", "empty"]),
        (write(&source.folder.join("folder"), "other", "").with_file_name(""), &["neither model.safetensors nor"]),
        (index("a.json", "{\"weight_map\": {\"a\": \"../model.safetensors\"}}"), &["not a plain file name"]),
        (index("b.json", "{\"weight_map\": {\"a\": \"absent.safetensors\"}}"), &["absent.safetensors", "No such file"]),
        (index("c.json", "{}"), &["c.json", "not an index of shards"]),
    ] {
        let error = failure_of(param_convert().arg(&input).arg(&source.out), 1);
        assert_names(&error, parts);
        assert!(!source.out.exists());
    }
}
