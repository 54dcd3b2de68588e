//! What is compared, and how each is started.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::models::Weights;
use crate::{Args, others, output};

/// Tokens of the two tests.
const N_PROMPT: &str = "512";
const N_GEN: &str = "128";

/// One implementation in one configuration.
pub struct Engine {
    pub name: &'static str,
    program: PathBuf,
    args: &'static [&'static str],
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Ours,
    Ggml,
    /// Where its script lies is the program's first argument.
    Torch,
}

/// Ours first, then the peers there are.
pub fn all(args: &Args) -> Result<Vec<Engine>> {
    let ours = args.param_bin.join("param-bench");
    let mut engines = vec![Engine { name: "PARAM", program: ours, args: &["-o", "json"], kind: Kind::Ours }];
    engines.extend(peers(args)?);
    Ok(engines)
}

/// The ggml peers lie beside this program.
pub fn peers(args: &Args) -> Result<Vec<Engine>> {
    let this = std::env::current_exe().context("where this program lies")?;
    let ggml =
        |name, program: &str, args| Engine { name, program: this.with_file_name(program), args, kind: Kind::Ggml };
    let mut engines = vec![
        ggml("ggml b2757", "ggml-b2757", &[]),
        ggml("ggml 0.26 repacked", "ggml-newest", &[]),
        ggml("ggml 0.26 plain", "ggml-newest", &["--plain"]),
    ];
    if let Some(python) = &args.torch {
        let torch = |name, args| Engine { name, program: python.clone(), args, kind: Kind::Torch };
        engines.push(torch("PyTorch", &["-n", "64"]));
        // Without a cache a token costs as much as all before it: a few suffice.
        engines.push(torch("PyTorch, reference's way", &["--reference", "-n", "4", "-d", "124"]));
    }
    Ok(engines)
}

impl Engine {
    pub fn takes(&self, weights: &Weights) -> bool {
        weights.is_gguf() == (self.kind != Kind::Torch)
    }

    /// Rows of one timed run of each test.
    pub fn rows(&self, model: &Path, weights: &Weights, n_thread: u16) -> Result<Vec<Value>> {
        let mut command = Command::new(&self.program);
        match self.kind {
            Kind::Ours | Kind::Ggml => command.arg("-m").arg(model).args(["-p", N_PROMPT, "-n", N_GEN]).args(self.args),
            Kind::Torch => {
                command.arg(torch_script("bench_inference.py")).arg("--checkpoint").arg(model);
                command.args(["--dtype", weights.name, "-p", N_PROMPT]).args(self.args)
            }
        };
        let (text, others) = others::beside(|| output(command.args(["-r", "1", "-t", &n_thread.to_string()])));
        let mut rows: Vec<Value> = serde_json::from_str(&text?).with_context(|| format!("rows of {}", self.name))?;
        rows.iter_mut().for_each(|row| row["other_cores"] = json!(others));
        Ok(rows)
    }

    /// Whether it computes what ours does: the reference's way drops tokens, and tests/golden holds it.
    pub fn is_comparable(&self) -> bool {
        !self.args.contains(&"--reference")
    }

    /// A command that writes the logits of `tokens`, the last `n_decode` of them run one at a time, to `out`.
    pub fn check(&self, model: &Path, weights: &Weights, tokens: &str, n_decode: usize, out: &Path) -> Command {
        let mut command = Command::new(&self.program);
        match self.kind {
            Kind::Ours | Kind::Ggml => command.arg("-m").arg(model),
            Kind::Torch => command
                .arg(torch_script("bench_inference.py"))
                .arg("--checkpoint")
                .arg(model)
                .args(["--dtype", weights.name]),
        };
        // Two threads, so that what they share out is checked too.
        command
            .args(self.args)
            .args(["-t", "2", "--check", tokens, "--decode", &n_decode.to_string(), "--logits"])
            .arg(out);
        command
    }
}

/// In the folder beside this crate's; it was there when this was compiled.
pub fn torch_script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("torch").join(name)
}
