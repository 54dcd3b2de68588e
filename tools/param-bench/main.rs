//! param-bench: how fast a model runs here, by llama-bench's protocol.
#![forbid(unsafe_code)]

mod machine;
mod measure;
mod report;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use param::cli::{self, Usage};
use param::device::DeviceArgs;
use param_kernels::available_threads;
use param_runtime::Error;

use crate::machine::{Machine, Probe};
use crate::measure::{Test, measure};
use crate::report::{Report, Row};

/// Measure prefill and decode speed of a PARAM model, apart from each other.
///
/// Every test is run once to warm up and then as often as asked. Prefill runs random tokens in batches up to the logits of
/// the last; decode runs random tokens one at a time, each with its logits, of one sequence or of several together. Loading,
/// tokenizing and sampling are not part of it, but on a GPU, which leaves no logits with the CPU, decode takes the most likely
/// token and goes on with it. Lists are separated by commas, and every combination is measured.
#[derive(Parser)]
#[command(version = cli::VERSION)]
struct Args {
    /// The model: a GGUF file, or the first of a split one
    #[arg(short, long, value_name = "FILE", required_unless_present = "machine", value_delimiter = ',')]
    model: Vec<PathBuf>,
    /// Lengths of prompts to prefill; 0 for none
    #[arg(short = 'p', long, value_name = "N", value_delimiter = ',', default_value = "512")]
    n_prompt: Vec<usize>,
    /// Numbers of tokens to decode; 0 for none
    #[arg(short, long, value_name = "N", value_delimiter = ',', default_value = "128")]
    n_gen: Vec<usize>,
    /// Numbers of sequences to decode together
    #[arg(short, long, value_name = "N", value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u16).range(1..))]
    batch: Vec<u16>,
    /// Numbers of prompts to prefill together
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u16).range(1..))]
    prompts: Vec<u16>,
    /// Tokens in the context before the test begins
    #[arg(short, long, value_name = "N", value_delimiter = ',', default_value = "0")]
    depth: Vec<usize>,
    /// Numbers of threads [default: one for each CPU]
    #[arg(short, long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..))]
    threads: Vec<u16>,
    /// Timed runs of each test
    #[arg(short, long, value_name = "N", default_value = "5", value_parser = clap::value_parser!(u16).range(1..))]
    repetitions: u16,
    /// Measure the memory bus before each decode as well, and state how much of it the weights that were read amount to
    #[arg(long)]
    bus: bool,
    /// Measure what the machine can do: reading memory, and arithmetic in int8, bf16 and f32
    #[arg(long)]
    machine: bool,
    #[command(flatten)]
    device: DeviceArgs,
    /// Form of the report
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Format {
    /// Markdown
    Table,
    Json,
    Csv,
}

fn main() -> ExitCode {
    cli::exit_code(run(&Args::parse()).map_err(|error| match error.downcast_ref() {
        Some(Error::ContextLength { .. }) => Usage(error.to_string()).into(),
        _ => error,
    }))
}

fn run(args: &Args) -> Result<ExitCode> {
    let mut report = Report::new(io::stdout().lock(), args.output);
    if args.machine {
        for n_thread in threads(args) {
            let mut machine = Machine::new(n_thread)?;
            for probe in Probe::ALL {
                let samples: Vec<f64> = (0..=args.repetitions).map(|_| machine.measure(probe)).collect();
                // The first one warmed up.
                report.row(&Row::machine(probe, n_thread, &samples[1..]))?;
            }
        }
    }
    for path in &args.model {
        let model = args.device.open(path)?;
        for n_thread in threads(args) {
            let mut machine = args.bus.then(|| Machine::new(n_thread)).transpose()?;
            for test in tests(args) {
                let samples = measure(&model, n_thread, test, args.repetitions.into(), machine.as_mut())?;
                report.row(&Row::new(path, &model, n_thread, test, &samples))?;
            }
        }
    }
    report.end()?.flush()?;
    Ok(ExitCode::SUCCESS)
}

fn threads(args: &Args) -> Vec<usize> {
    match &args.threads[..] {
        [] => vec![available_threads()],
        threads => threads.iter().map(|&n| n.into()).collect(),
    }
}

/// Every combination asked for, prefill before decode.
fn tests(args: &Args) -> Vec<Test> {
    let mut tests = Vec::new();
    for &depth in &args.depth {
        let prefill = args.n_prompt.iter().flat_map(|&n_token| {
            args.prompts.iter().map(move |&n| Test { decode: false, n_token, depth, n_sequence: n.into() })
        });
        let decode = args.n_gen.iter().flat_map(|&n_token| {
            args.batch.iter().map(move |&n| Test { decode: true, n_token, depth, n_sequence: n.into() })
        });
        tests.extend(prefill.chain(decode).filter(|test| test.n_token > 0));
    }
    tests
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
    fn lists_combine_and_zero_leaves_a_test_out() {
        let args = Args::try_parse_from([
            "param-bench",
            "-m",
            "x",
            "-p",
            "0,64",
            "-n",
            "8",
            "-b",
            "1,4",
            "-d",
            "0,100",
            "-t",
            "1,2",
        ])
        .unwrap();
        let names: Vec<String> = tests(&args).iter().map(Test::name).collect();
        assert_eq!(names, ["pp64", "tg8", "tg8 x 4", "pp64 @ d100", "tg8 @ d100", "tg8 x 4 @ d100"]);
        assert_eq!(threads(&args), [1, 2]);
    }
}
