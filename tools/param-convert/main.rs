//! param-convert: a checkpoint of PARAM weights becomes one quantized GGUF file.
#![forbid(unsafe_code)]

mod convert;
mod plan;
mod progress;
mod report;
mod source;

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use gguf::{GgmlType, KEY_ALIGNMENT, Metadata};
use param::cli::{self, Usage};
use param_model::metadata::ARCHITECTURE;

use crate::plan::{Override, Plan};
use crate::source::Source;

/// Version of the block formats, which ggml has kept since 2023.
const QUANTIZATION_VERSION: u32 = 2;

/// Convert a checkpoint (safetensors) into a GGUF file that param-run executes.
///
/// By default the experts, which are most of a model, become Q4_K, and the attention, dense feed-forward and embedding
/// matrices Q8_0. Norms, routers, biases and positions stay F32.
#[derive(Parser)]
#[command(version = cli::VERSION)]
struct Args {
    /// Weights: a .safetensors file, a .safetensors.index.json of shards, or a folder that holds either
    #[arg(value_name = "CKPT")]
    checkpoint: PathBuf,
    /// The file to write; an older GGUF there is replaced, once the new one is complete
    #[arg(value_name = "OUT.gguf")]
    out: PathBuf,
    /// Type of the experts and of all other matrices
    #[arg(long, value_name = "TYPE", value_parser = plan::parse_type, help = format!("Type of the experts and of all other matrices: {}", plan::known_types()))]
    quant: Option<GgmlType>,
    /// Type of the tensors whose GGUF name matches, such as 'blk\.0\.ffn_.*_exps=q6_k'; of several, the last that
    /// matches decides. Norms, routers, biases and positions take float types only and are passed over by others
    #[arg(long, value_name = "REGEX=TYPE")]
    tensor_type: Vec<Override>,
    /// Hyperparameters, if not in config.json beside the weights
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Attention heads, where no config tells (shapes cannot)
    #[arg(long, value_name = "N")]
    heads: Option<usize>,
    /// Experts chosen per token, where no config tells (shapes cannot)
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,
    /// Tokenizer, if not in tokenizer.json beside the weights
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Name to store in the file [default: that of the file]
    #[arg(long)]
    name: Option<String>,
    /// Licence of the weights to store in the file, such as MIT
    #[arg(long)]
    license: Option<String>,
    /// Threads [default: all cores]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
}

fn main() -> ExitCode {
    cli::exit_code(run(&Args::parse()))
}

fn run(args: &Args) -> Result<ExitCode> {
    check_output(&args.out)?;
    let source = Source::open(args)?;
    let plan = Plan::new(&source.config, args.quant, &args.tensor_type)?;
    let metadata = metadata(args, &source, &plan)?;
    if source.tokenizer.is_none() {
        eprintln!("no tokenizer.json beside the weights: the file will run on token ids only (give --tokenizer FILE)");
    }
    let threads = args.threads.map_or(0, usize::from); // 0 is rayon's word for all cores
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().context("starting threads")?;
    let stop = cli::interrupt_flag()?;
    let Some(converted) = pool.install(|| convert::convert(&source, &plan, &metadata, &args.out, &stop))? else {
        eprintln!("interrupted: {} is as it was", args.out.display());
        return Ok(ExitCode::from(cli::INTERRUPTED));
    };
    let n_bytes = std::fs::metadata(&args.out)?.len();
    let mut stdout = std::io::stdout();
    write!(stdout, "{}", report::table(&plan, &converted))?;
    writeln!(stdout, "{}: {}", args.out.display(), indicatif::BinaryBytes(n_bytes))?;
    Ok(ExitCode::SUCCESS)
}

/// That nothing but an older conversion would be replaced: swapped arguments must not cost anyone their weights.
fn check_output(out: &Path) -> Result<()> {
    if out.is_dir() {
        bail!(Usage(format!("{}: is a folder; name the GGUF file to write in it", out.display())));
    }
    let Ok(mut file) = File::open(out) else { return Ok(()) };
    let mut start = Vec::new();
    Read::by_ref(&mut file).take(gguf::MAGIC.len() as u64).read_to_end(&mut start)?;
    if !start.is_empty() && start != gguf::MAGIC {
        bail!(Usage(format!("{}: is there and is not a GGUF file; it is not replaced", out.display())));
    }
    Ok(())
}

fn metadata(args: &Args, source: &Source, plan: &Plan) -> Result<Metadata> {
    let mut metadata = Metadata::new();
    let stem = || args.out.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    metadata.insert("general.architecture", ARCHITECTURE)?;
    metadata.insert("general.name", args.name.clone().unwrap_or_else(stem))?;
    if let Some(license) = &args.license {
        metadata.insert("general.license", license.as_str())?;
    }
    metadata.insert("general.size_label", plan.size_label())?;
    metadata.insert("general.file_type", plan.file_type())?;
    metadata.insert("general.quantization_version", QUANTIZATION_VERSION)?;
    metadata.insert(KEY_ALIGNMENT, gguf::DEFAULT_ALIGNMENT as u32)?;
    source.config.write_metadata(&mut metadata)?;
    if let Some(tokenizer) = &source.tokenizer {
        tokenizer.write_metadata(source.config.n_vocab, &mut metadata)?;
    }
    Ok(metadata)
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
    fn unknown_types_list_the_known_ones() {
        let error = Args::try_parse_from(["param-convert", "in", "out", "--quant", "q4_x"]).err().unwrap();
        assert!(error.to_string().contains("expected one of f32, f16, bf16, q8_0, q6_k"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn only_a_gguf_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        assert!(check_output(folder.path()).unwrap_err().is::<Usage>());
        check_output(&path).unwrap();
        for (content, replaceable) in [(&b""[..], true), (b"GGUF\x03", true), (b"{\"a\": 1}", false), (b"GG", false)] {
            std::fs::write(&path, content).unwrap();
            assert_eq!(check_output(&path).is_ok(), replaceable, "{content:?}");
        }
    }
}
