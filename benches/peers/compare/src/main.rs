//! Runs ours and the peers in turn, and puts what they reach in one table: decode and prefill, or training. Or holds the
//! peers' logits against ours.
#![forbid(unsafe_code)]

mod check;
mod engines;
mod machine;
mod models;
mod others;
mod results;
mod table;
mod training;

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde_json::{Value, json};

use crate::machine::Machine;
use crate::models::{Weights, bytes_per_token};
use crate::results::Results;

/// Measure decode and prefill of one model on this project's runtime and on what a user would pick instead; with --train,
/// training on this project's trainer and on PyTorch.
///
/// All engines take turns, and what the machine can do is measured after each, so that what else happens on the machine
/// meets all of them alike. Each turn is a process of its own: a warm-up and one timed run of each test (of --train: some
/// timed steps).
#[derive(Parser)]
pub struct Args {
    /// Folder of the models; missing ones are made in it (random weights, the flagship's shape)
    #[arg(long, value_name = "DIR")]
    models: PathBuf,
    /// Folder of param-bench, param-run, param-train and param-convert
    #[arg(long, value_name = "DIR")]
    param_bin: PathBuf,
    /// Python with torch, safetensors and numpy: measures the PyTorch peer too; needed by --train
    #[arg(long, value_name = "PYTHON")]
    torch: Option<PathBuf>,
    /// Numbers of threads [default: 1,2; 2 with --train]
    #[arg(short, long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..))]
    threads: Vec<u16>,
    /// Turns of every engine [default: 5, of --train 3; 2 with --quick]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    repetitions: Option<u16>,
    /// Two turns of two kinds of weights; of --train, without the largest model
    #[arg(long)]
    quick: bool,
    /// Only these kinds of weights: default, q4_k, q8_0, q4_0, f16 (for PyTorch: f32, bf16)
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    weights: Vec<String>,
    /// Before each run, wait up to this many seconds for others to leave the processors alone
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    patience: u64,
    /// Write every run, as it came, to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure nothing: compare the logits of every peer with ours
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    training: training::Options,
}

impl Args {
    /// A program of the toolkit.
    fn program(&self, name: &str) -> Command {
        Command::new(self.param_bin.join(name))
    }

    /// The checkpoint that all models are converted from.
    fn checkpoint(&self) -> PathBuf {
        self.models.join("half")
    }

    /// Numbers of threads: those given, or `default`.
    fn threads(&self, default: &[u16]) -> Vec<u16> {
        if self.threads.is_empty() { default.to_vec() } else { self.threads.clone() }
    }

    /// Turns of every engine; `default` of a full run.
    fn turns(&self, default: u16) -> u16 {
        self.repetitions.unwrap_or(if self.quick { 2 } else { default })
    }

    fn wants(&self, weights: &str) -> bool {
        match (&self.weights[..], self.quick) {
            ([], false) => true,
            ([], true) => ["default", "q4_k", "bf16"].contains(&weights),
            (names, _) => names.iter().any(|name| name == weights),
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match (args.check, args.training.train) {
        (true, _) => check::run(&args),
        (_, true) => training::run(&args),
        _ => run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Standard output of a command, which must succeed.
pub fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("starting {program}"))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{program} failed ({}): {}", output.status, stderr.trim());
    }
    Ok(String::from_utf8(output.stdout)?)
}

fn run(args: &Args) -> Result<()> {
    let engines = engines::all(args)?;
    let mut cases = Vec::new(); // what is run on what, but for threads
    for weights in Weights::ALL.iter().filter(|weights| args.wants(weights.name)) {
        let users = engines.iter().filter(|engine| engine.takes(weights)).collect::<Vec<_>>();
        if !users.is_empty() {
            let path = weights.provide(args)?;
            let bytes = if weights.is_gguf() { Some(bytes_per_token(&path)?) } else { None };
            cases.push((weights, path, bytes, users));
        }
    }
    let machine = Machine::new(args);
    let (turns, threads) = (args.turns(5), args.threads(&[1, 2]));
    let mut results = Results::default();
    for turn in 1..=turns {
        for (weights, path, _, users) in &cases {
            for &n_thread in &threads {
                for engine in users {
                    eprintln!("turn {turn} of {turns}: {}, {n_thread} thread(s), {}", weights.label, engine.name);
                    others::wait(Duration::from_secs(args.patience));
                    let rows = engine.rows(path, weights, n_thread)?;
                    results.add((weights.name, engine.name, n_thread, turn), rows, machine.measure(n_thread)?);
                }
            }
        }
    }
    for (weights, _, bytes, users) in &cases {
        for &n_thread in &threads {
            results.tabulate(weights, *bytes, n_thread, &users.iter().map(|engine| engine.name).collect::<Vec<_>>());
        }
    }
    print!("{}", results.table());
    save(
        args,
        json!({
            "threads": threads,
            "bytes_per_token": cases.iter().map(|c| (c.0.name.to_owned(), json!(c.2))).collect::<serde_json::Map<_, _>>(),
            "rows": results.rows(),
            "machine": results.machine_rows(),
        }),
    )
}

/// Writes `document`, with when and on what it was measured, to the file of --json, if there is one.
fn save(args: &Args, mut document: Value) -> Result<()> {
    let Some(file) = &args.json else { return Ok(()) };
    document["date"] = json!(output(Command::new("date").args(["-u", "+%FT%TZ"]))?.trim());
    document["param"] = json!(output(args.program("param-bench").arg("--version"))?.trim());
    document["cpu"] = cpu_name();
    let text = serde_json::to_string_pretty(&document)? + "\n";
    std::fs::write(file, text).with_context(|| format!("writing {}", file.display()))
}

/// The processor as Linux names it.
fn cpu_name() -> Value {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1));
    json!(name)
}
