//! Holds the logits of every peer against those of `param-run`, for a prompt in one batch and with its end one at a time.

use std::path::Path;

use anyhow::{Context, Result, bail};
use safetensors::SafeTensors;

use crate::models::{Weights, gguf_file};
use crate::{Args, engines, output};

const N_TOKEN: u32 = 40;
const N_DECODE: [usize; 2] = [0, 10];

/// How far the last token's logits may be from ours, |a - b| / |b|, and whether ours are computed from the same weights in
/// f32: then nothing of ours is rounded, and the check is sharp. In f32 only the order of sums differs; in F16 ggml rounds
/// weights, activations and GELU to 11 bits, in bf16 PyTorch everything to 8. With quantized weights each engine quantizes
/// activations in its own way, and with random weights that changes the choice of an expert now and then.
fn bound(weights: &str) -> (f64, bool) {
    match weights {
        "f32" => (1e-4, true),
        "f16" => (3e-3, true),
        "bf16" => (0.1, true),
        _ => (0.1, false),
    }
}

pub fn run(args: &Args) -> Result<()> {
    let tokens = (0..N_TOKEN).map(|i| (1 + i * 3181 % 127_997).to_string()).collect::<Vec<_>>().join(",");
    let folder = std::env::temp_dir().join(format!("peers-check-{}", std::process::id()));
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let result = compare(args, &tokens, &folder);
    std::fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
    result
}

fn compare(args: &Args, tokens: &str, folder: &Path) -> Result<()> {
    let peers = engines::peers(args)?;
    let mut n_off = 0;
    println!("| weights | engine | one at a time | off by | largest | bound |");
    println!("| ------- | ------ | ------------- | ------ | ------- | ----- |");
    for weights in Weights::ALL.iter().filter(|weights| args.wants(weights.name)) {
        let users = peers.iter().filter(|peer| peer.takes(weights) && peer.is_comparable()).collect::<Vec<_>>();
        if users.is_empty() {
            continue;
        }
        let model = weights.provide(args)?;
        let (bound, in_f32) = bound(weights.name);
        let file = folder.join("logits.safetensors");
        let ours = |model: &Path| -> Result<Vec<f32>> {
            output(args.program("param-run").arg("-m").arg(model).args(["--tokens", tokens, "--logits"]).arg(&file))?;
            last_logits(&file)
        };
        let same_model = if in_f32 { gguf_file(args, "f32", Some("f32"))? } else { model.clone() };
        let expected = ours(&same_model)?;
        let line = |engine: &str, n_decode: usize, (off, largest): (f64, f64), bound: &str| {
            let label = weights.label;
            println!("| {label} | {engine} | {n_decode} of {N_TOKEN} | {off:.1e} | {largest:.1e} | {bound} |");
        };
        if in_f32 && weights.is_gguf() {
            // For comparison: what rounding costs ours.
            line("PARAM", 0, distance(&ours(&model)?, &expected)?, "");
        }
        for peer in users {
            for n_decode in N_DECODE {
                output(&mut peer.check(&model, weights, tokens, n_decode, &file))?;
                let distance = distance(&last_logits(&file)?, &expected)?;
                line(peer.name, n_decode, distance, &format!("{bound:.0e}"));
                n_off += usize::from(distance.0.is_nan() || distance.0 > bound);
            }
        }
    }
    if n_off > 0 {
        bail!("{n_off} of the above are beyond their bound");
    }
    Ok(())
}

/// The last row of tensor `logits`: [n_vocab].
fn last_logits(file: &Path) -> Result<Vec<f32>> {
    let bytes = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    let tensors = SafeTensors::deserialize(&bytes).with_context(|| format!("reading {}", file.display()))?;
    let logits = tensors.tensor("logits")?;
    let n_vocab = logits.shape().last().copied().unwrap_or(0);
    let (floats, _) = logits.data().as_chunks::<4>();
    let last = floats.len().checked_sub(n_vocab).context("an empty tensor `logits`")?;
    Ok(floats[last..].iter().map(|&bytes| f32::from_le_bytes(bytes)).collect())
}

/// Norm of the difference relative to that of `b`, and the largest difference.
fn distance(a: &[f32], b: &[f32]) -> Result<(f64, f64)> {
    if a.len() != b.len() {
        bail!("{} logits against {}", a.len(), b.len());
    }
    let pairs = || a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - f64::from(b), f64::from(b)));
    let square = pairs().map(|(d, _)| d * d).sum::<f64>() / pairs().map(|(_, b)| b * b).sum::<f64>();
    Ok((square.sqrt(), pairs().map(|(d, _)| d.abs()).fold(0.0, f64::max)))
}
