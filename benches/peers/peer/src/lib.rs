//! What the ggml peers share besides the graph: the command line, the protocol of `param-bench` and its rows, and logits
//! written as `param-run --logits` writes them.
#![forbid(unsafe_code)]

mod bench;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use gguf::Gguf;
use param_model::Config;
use param_model::checkpoint::write_tensors;

pub use bench::{Row, Test};

/// A forward pass with a cache, on one version of ggml.
pub trait Engine: Sized {
    /// As it stands in rows and tables.
    const NAME: &str;
    /// What only this engine has on its command line.
    type Options: clap::Args;

    /// Loads the weights, for contexts of up to `n_ctx` tokens.
    fn open(gguf: &Gguf, config: &Config, n_ctx: usize, n_thread: usize, options: &Self::Options) -> Result<Self>;

    /// Runs `tokens` after the `n_past` that are in the cache; the logits of the last one: [n_vocab].
    fn forward(&mut self, tokens: &[u32], n_past: usize) -> Result<&[f32]>;

    /// The instruction sets that its C code was compiled for.
    fn isa() -> String;
}

/// Measure this engine by param-bench's protocol, or write the logits it computes.
#[derive(Parser)]
struct Args<O: clap::Args> {
    /// The model: a GGUF file
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// Length of the prompt to prefill; 0 for none
    #[arg(short = 'p', long, value_name = "N", default_value_t = 512)]
    n_prompt: usize,
    /// Number of tokens to decode; 0 for none
    #[arg(short, long, value_name = "N", default_value_t = 128)]
    n_gen: usize,
    /// Number of threads
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    threads: u16,
    /// Timed runs of each test
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    repetitions: u16,
    /// Instead of measuring: the tokens of a prompt, such as 5,6,7
    #[arg(long, value_name = "IDS", value_delimiter = ',', requires = "logits")]
    check: Vec<u32>,
    /// Where to write the logits of the last of them: tensor `logits`, f32 [1, n_vocab]
    #[arg(long, value_name = "OUT.safetensors", requires = "check")]
    logits: Option<PathBuf>,
    /// Of the prompt's tokens, run the last N one at a time
    #[arg(long, value_name = "N", default_value_t = 0, requires = "check")]
    decode: usize,
    #[command(flatten)]
    engine: O,
}

/// The whole program.
pub fn main<E: Engine>() -> ExitCode {
    match run::<E>(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run<E: Engine>(args: &Args<E::Options>) -> Result<()> {
    let gguf = Gguf::open(&args.model)?;
    let config = Config::from_metadata(gguf.metadata())?;
    let n_thread = usize::from(args.threads);
    let n_ctx = args.n_prompt.max(args.n_gen).max(args.check.len());
    ensure!(n_ctx <= config.n_ctx, "{n_ctx} tokens in a model of {} positions", config.n_ctx);
    if let Some(&id) = args.check.iter().find(|&&id| id as usize >= config.n_vocab) {
        anyhow::bail!("token {id} in a vocabulary of {}", config.n_vocab);
    }
    let mut engine = E::open(&gguf, &config, n_ctx, n_thread, &args.engine)
        .with_context(|| format!("opening {} with {}", args.model.display(), E::NAME))?;
    if let Some(path) = &args.logits {
        let (prompt, rest) = args.check.split_at(args.check.len().saturating_sub(args.decode));
        let logits = last_logits(&mut engine, prompt, rest)?;
        return Ok(write_tensors(path, [("logits".to_owned(), vec![1, logits.len()], &logits[..])])?);
    }
    let tests = [Test { decode: false, n_token: args.n_prompt }, Test { decode: true, n_token: args.n_gen }];
    let mut rows = Vec::new();
    for test in tests.into_iter().filter(|test| test.n_token > 0) {
        let samples = bench::measure(&mut engine, config.n_vocab, test, args.repetitions.into())?;
        rows.push(Row::new(E::NAME, &args.model, &E::isa(), n_thread, test, &samples));
    }
    println!("{}", serde_json::to_string_pretty(&rows)?);
    Ok(())
}

/// Logits after the last token: `prompt` in one batch, then `rest` one at a time.
fn last_logits(engine: &mut impl Engine, prompt: &[u32], rest: &[u32]) -> Result<Vec<f32>> {
    let mut logits = Vec::new(); // [n_vocab]
    let mut n_past = 0;
    let batches = [prompt].into_iter().filter(|prompt| !prompt.is_empty()).chain(rest.chunks(1));
    for tokens in batches {
        logits = engine.forward(tokens, n_past)?.to_vec();
        n_past += tokens.len();
    }
    Ok(logits)
}
