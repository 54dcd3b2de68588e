//! The models that are measured, how they are made, and what a token reads of them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use gguf::Gguf;
use param_model::{Config, GGUF_HEAD, Role, tensors};

use crate::{Args, output};

/// One kind of weights of the model.
pub struct Weights {
    /// On the command line, and of the file.
    pub name: &'static str,
    /// In the table.
    pub label: &'static str,
    form: Form,
}

#[derive(PartialEq)]
enum Form {
    /// What param-convert makes with `--quant`, or by default.
    Gguf(Option<&'static str>),
    /// The checkpoint itself, for PyTorch to compute in this type.
    Checkpoint,
}

impl Weights {
    /// In the order of the table.
    pub const ALL: [Weights; 7] = [
        gguf("default", "default mix", None),
        gguf("q4_k", "all Q4_K", Some("q4_k")),
        gguf("q8_0", "all Q8_0", Some("q8_0")),
        gguf("q4_0", "all Q4_0", Some("q4_0")),
        gguf("f16", "F16", Some("f16")),
        Weights { name: "bf16", label: "bf16", form: Form::Checkpoint },
        Weights { name: "f32", label: "f32", form: Form::Checkpoint },
    ];

    pub fn is_gguf(&self) -> bool {
        self.form != Form::Checkpoint
    }

    /// The model's file (the folder of a checkpoint), made if it is missing.
    pub fn provide(&self, args: &Args) -> Result<PathBuf> {
        let Form::Gguf(quant) = self.form else { return checkpoint(args) };
        gguf_file(args, self.name, quant)
    }
}

const fn gguf(name: &'static str, label: &'static str, quant: Option<&'static str>) -> Weights {
    Weights { name, label, form: Form::Gguf(quant) }
}

/// `NAME.gguf` in the folder of models, converted from the checkpoint if it is missing.
pub fn gguf_file(args: &Args, name: &str, quant: Option<&str>) -> Result<PathBuf> {
    let path = args.models.join(format!("{name}.gguf"));
    if !path.exists() {
        let weights = checkpoint(args)?.join("model.safetensors");
        eprintln!("making {}", path.display());
        let mut command = args.program("param-convert");
        command.arg(weights).arg(&path);
        output(quant.iter().fold(&mut command, |command, quant| command.args(["--quant", quant])))?;
    }
    Ok(path)
}

/// The checkpoint of random weights, made if it is missing.
pub fn checkpoint(args: &Args) -> Result<PathBuf> {
    let folder = args.checkpoint();
    if !folder.join("model.safetensors").exists() {
        eprintln!("making {}", folder.display());
        let mut command = args.program("param-train");
        output(command.args(["--preset", "param-0.5b", "--init-only", "--out"]).arg(&folder))?;
    }
    Ok(folder)
}

/// Bytes of weights that a decoded token reads: every matrix once, of the experts those chosen. Rows of embeddings,
/// vectors and the cache are left out: a few megabytes at most.
pub fn bytes_per_token(path: &Path) -> Result<u64> {
    let gguf = Gguf::open(path)?;
    let config = Config::from_metadata(gguf.metadata())?;
    let n_bytes =
        |name: &str| gguf.tensor(name).map(|info| info.n_bytes).with_context(|| format!("tensor `{name}` is missing"));
    // A head of its own is read instead of the token embedding.
    let head = gguf.tensor(GGUF_HEAD).map(|info| info.n_bytes);
    let mut sum = head.unwrap_or(0);
    for spec in tensors(&config) {
        let Some(name) = &spec.gguf else { continue };
        sum += match spec.role {
            Role::TokenEmbedding if head.is_some() => 0,
            Role::Expert => n_bytes(name)? * config.n_expert_used as u64 / config.n_expert as u64,
            Role::TokenEmbedding | Role::Attention | Role::FeedForward | Role::Router => n_bytes(name)?,
            Role::PositionEmbedding | Role::Norm | Role::Bias => 0,
        };
    }
    Ok(sum)
}
