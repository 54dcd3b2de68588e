//! param-run: text from a PARAM model in a GGUF file, once or in conversation.
#![forbid(unsafe_code)]

mod interactive;
mod logits;
mod output;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{ArgGroup, Parser, ValueEnum};
use param::cli::{self, Usage};
use param::device::DeviceArgs;
use param_runtime::{
    CacheType, Error, GenerateOptions, Model, Overflow, Rows, SamplerOptions, Session, SessionOptions,
};

use crate::interactive::Interrupt;
use crate::output::{Output, Timings};

/// Generate text with a PARAM model.
///
/// Standard output gets what the model generates and nothing else; messages and timings go to standard error.
#[derive(Parser)]
#[command(version = cli::VERSION)]
#[command(group(ArgGroup::new("input").args(["prompt", "file", "tokens"])))]
#[command(group(ArgGroup::new("start").args(["prompt", "file", "tokens", "interactive"]).required(true).multiple(true)))]
struct Args {
    /// The model: a GGUF file, or the first of a split one
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// Text to continue
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    /// File with the text to continue
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Token ids to continue, such as 5,6,7
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    tokens: Option<Vec<u32>>,
    /// Read lines from standard input and answer each, remembering what came before. Ctrl-C ends an answer, then the program
    #[arg(short, long, conflicts_with_all = ["print_tokens", "logits"])]
    interactive: bool,
    /// Tokens to generate at most [default: until the text ends or the context is full; 256 an answer with -i; none with --logits]
    #[arg(short, long, value_name = "N")]
    n_predict: Option<usize>,
    /// Threads [default: one for each CPU]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Tokens the context holds [default: as many as the model has positions]
    #[arg(short, long, value_name = "N")]
    ctx_size: Option<usize>,
    /// Type of cached keys and values [default: f32 for models in F32 throughout, else f16]
    #[arg(long, value_enum, value_name = "TYPE")]
    cache_type: Option<CacheArg>,
    /// What to do when the context is full
    #[arg(long, value_enum, default_value = "stop")]
    overflow: OverflowArg,
    /// Text that ends the generation and is not printed; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on past the end-of-text token
    #[arg(long)]
    ignore_eos: bool,
    /// Print the generated token ids, separated by commas on one line, instead of text
    #[arg(long)]
    print_tokens: bool,
    /// Write the logits of every prompt token as tensor `logits`, f32 [n_token, n_vocab]
    #[arg(long, value_name = "OUT.safetensors")]
    logits: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten, next_help_heading = "Sampling")]
    sampling: SamplingArgs,
}

#[derive(clap::Args)]
struct SamplingArgs {
    /// Below 1 sharpens, above 1 flattens, 0 always takes the most likely token
    #[arg(long = "temp", value_name = "T", default_value_t = SamplerOptions::default().temperature, allow_negative_numbers = true)]
    temperature: f32,
    /// Choose among the K most likely tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = SamplerOptions::default().top_k)]
    top_k: usize,
    /// Choose among the fewest tokens whose probabilities reach P; 1 for all
    #[arg(long, value_name = "P", default_value_t = SamplerOptions::default().top_p)]
    top_p: f32,
    /// Choose among tokens at least P times as likely as the most likely; 0 for all
    #[arg(long, value_name = "P", default_value_t = SamplerOptions::default().min_p)]
    min_p: f32,
    /// Divides the logits of tokens that occurred lately; 1 for no penalty
    #[arg(long, value_name = "X", default_value_t = SamplerOptions::default().repeat_penalty)]
    repeat_penalty: f32,
    /// How many tokens back the penalties look
    #[arg(long, value_name = "N", default_value_t = SamplerOptions::default().penalty_window)]
    repeat_last_n: usize,
    /// Subtracted from the logits of tokens that occurred lately
    #[arg(long, value_name = "X", default_value_t = SamplerOptions::default().presence_penalty, allow_negative_numbers = true)]
    presence_penalty: f32,
    /// Subtracted once for each time a token occurred lately
    #[arg(long, value_name = "X", default_value_t = SamplerOptions::default().frequency_penalty, allow_negative_numbers = true)]
    frequency_penalty: f32,
    /// Makes sampling repeatable [default: another one each time, told in the closing line]
    #[arg(short, long, value_name = "N")]
    seed: Option<u64>,
}

#[derive(Clone, Copy, ValueEnum)]
enum CacheArg {
    F16,
    F32,
    /// int8 with a scale for every 32: half the memory of f16
    #[value(name = "q8_0")]
    Q8_0,
}

#[derive(Clone, Copy, ValueEnum)]
enum OverflowArg {
    /// End with a message
    Stop,
    /// Keep the newest half, run it again, and go on
    Slide,
    /// Run the newest full context again for every token, as the reference implementation does (slow)
    Window,
}

/// Tokens of one answer in conversation, where the user would otherwise wait for a full context.
const N_PREDICT_INTERACTIVE: usize = 256;

fn main() -> ExitCode {
    cli::exit_code(run(&Args::parse()).map_err(|error| match error.downcast_ref() {
        Some(Error::Sampling { .. } | Error::ContextLength { .. }) => Usage(error.to_string()).into(),
        _ => error,
    }))
}

fn run(args: &Args) -> Result<ExitCode> {
    let interrupt = Interrupt::install()?;
    let start = Instant::now();
    let model = args.device.open(&args.model)?;
    let mut session = Session::new(&model, &session_options(args))?;
    let mut timings = Timings::new(start.elapsed());
    let options = generate_options(args);

    if let Some(prompt) = prompt(args, &model)? {
        session.prompt(&prompt, options.overflow)?;
        let start = Instant::now();
        if let Some(path) = &args.logits {
            logits::write(path, &mut session)?;
        } else if !prompt.is_empty() {
            session.forward(Rows::Last)?;
        }
        timings.prefilled(session.tokens().len(), start.elapsed());
    }
    let mut output = Output::new(args.print_tokens);
    if args.interactive {
        interactive::converse(&mut session, &options, &interrupt, &mut output, &mut timings)?;
    } else {
        let _generating = interrupt.generating();
        output::generate(&mut session, &options, &interrupt, &mut output, &mut timings)?;
    }
    let seed = (options.sampling.temperature > 0.0 && timings.has_generated()).then_some(options.sampling.seed);
    eprintln!("{}", timings.line(seed));
    Ok(if interrupt.happened() { ExitCode::from(cli::INTERRUPTED) } else { ExitCode::SUCCESS })
}

/// The tokens to start from.
fn prompt(args: &Args, model: &Model) -> Result<Option<Vec<u32>>> {
    Ok(match (&args.prompt, &args.file, &args.tokens) {
        (Some(text), _, _) => Some(model.encode(text)?),
        (_, Some(path), _) => {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            Some(model.encode(&text)?)
        }
        (_, _, Some(tokens)) => Some(tokens.clone()),
        _ => None,
    })
}

fn session_options(args: &Args) -> SessionOptions {
    SessionOptions {
        n_ctx: args.ctx_size,
        n_thread: args.threads.map(usize::from),
        cache_type: args.cache_type.map(|ty| match ty {
            CacheArg::F16 => CacheType::F16,
            CacheArg::F32 => CacheType::F32,
            CacheArg::Q8_0 => CacheType::Q8_0,
        }),
        ..SessionOptions::default()
    }
}

fn generate_options(args: &Args) -> GenerateOptions {
    let default = if args.logits.is_some() { Some(0) } else { args.interactive.then_some(N_PREDICT_INTERACTIVE) };
    let sampling = &args.sampling;
    GenerateOptions {
        n_predict: args.n_predict.or(default),
        sampling: SamplerOptions {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            penalty_window: sampling.repeat_last_n,
            repeat_penalty: sampling.repeat_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            seed: sampling.seed.unwrap_or_else(rand::random),
        },
        stop: args.stop.clone(),
        overflow: match args.overflow {
            OverflowArg::Stop => Overflow::Stop,
            OverflowArg::Slide => Overflow::Slide,
            OverflowArg::Window => Overflow::Window,
        },
        ignore_end_of_text: args.ignore_eos,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn contradictory_or_missing_input_is_a_usage_error() {
        let code = |args: &[&str]| {
            Args::try_parse_from([&["param-run", "-m", "x"], args].concat()).err().map(|e| e.exit_code())
        };
        assert_eq!(code(&[]), Some(2));
        assert_eq!(code(&["-p", "a", "--tokens", "1"]), Some(2));
        assert_eq!(code(&["-p", "a", "-t", "0"]), Some(2));
        assert_eq!(code(&["-i", "--print-tokens"]), Some(2));
        assert_eq!(code(&["-i", "-p", "a"]), None);
        assert_eq!(code(&["--tokens", "1,2,3", "--presence-penalty", "-0.5"]), None);
    }

    #[test]
    fn logits_alone_generate_nothing_and_conversations_answer_briefly() {
        let n_predict = |args: &[&str]| {
            generate_options(&Args::try_parse_from([&["param-run", "-m", "x"], args].concat()).unwrap()).n_predict
        };
        assert_eq!(n_predict(&["-p", "a"]), None);
        assert_eq!(n_predict(&["-p", "a", "--logits", "out"]), Some(0));
        assert_eq!(n_predict(&["-p", "a", "--logits", "out", "-n", "5"]), Some(5));
        assert_eq!(n_predict(&["-i"]), Some(N_PREDICT_INTERACTIVE));
    }
}
