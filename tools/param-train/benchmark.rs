//! `--benchmark`: how fast a model trains on this machine.

use std::io::{Write, stderr, stdout};
use std::process::ExitCode;

use anyhow::Result;
use param_train::benchmark::{Benchmark, benchmark};
use param_train::cpu::Section;
use param_train::settings::Dtype;
use serde_json::json;

use crate::args::{Flags, Training};

/// Measures `steps` steps: one JSON object on standard output, with `--profile` a table on standard error.
pub fn run(flags: &Flags, steps: u64) -> Result<ExitCode> {
    let config = flags.model.config()?;
    let settings = flags.training.apply(Training::defaults(&config, steps));
    let n_thread = flags.n_thread();
    let result = benchmark(&config, &settings, n_thread, steps)?;
    let mut sorted = result.tokens_per_s.clone();
    sorted.sort_by(f64::total_cmp);
    let median = (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0;
    let rounded = |rate: f64| (rate * 10.0).round() / 10.0;
    let row = json!({
        "engine": "PARAM",
        "preset": flags.model.name(),
        "threads": n_thread,
        "dtype": match settings.dtype { Dtype::F32 => "f32", Dtype::Bf16 => "bf16" },
        "batch": settings.batch_size,
        "context": settings.context,
        "tok/s": rounded(median),
        "min": rounded(sorted[0]),
        "max": rounded(sorted[sorted.len() - 1]),
        "samples": result.tokens_per_s.iter().copied().map(rounded).collect::<Vec<_>>(),
        "operations_per_token": result.operations_per_token.round(),
        "peak": result.peak.round(),
        "mfu": median * result.operations_per_token / result.peak,
        "peak_bytes": param_train::memory::peak(),
        "loss": result.loss,
    });
    writeln!(stdout(), "{row}")?;
    if flags.profile {
        write_profile(&mut stderr(), &result, steps)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Time of each part of a step, and what of the machine's peak its products reached.
fn write_profile(out: &mut impl Write, result: &Benchmark, steps: u64) -> Result<()> {
    let total = result.spent.iter().map(|spent| spent.seconds).sum::<f64>();
    writeln!(out, "| part | ms a step | of the time | GFLOP/s | of the peak |\n|---|---|---|---|---|")?;
    for (section, spent) in Section::ALL.iter().zip(&result.spent) {
        let rate = spent.operations / spent.seconds.max(1e-9);
        let products = match spent.operations {
            0.0 => " | | ".to_owned(),
            _ => format!(" | {:.0} | {:.0}%", rate / 1e9, 100.0 * rate / result.peak),
        };
        let (name, ms) = (section.name(), spent.seconds * 1e3 / steps as f64);
        writeln!(out, "| {name} | {ms:.2} | {:.1}%{products} |", 100.0 * spent.seconds / total)?;
    }
    Ok(())
}
