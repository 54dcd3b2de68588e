//! `--benchmark`: how fast a model trains on this machine.

use std::io::{Write, stderr, stdout};
use std::process::ExitCode;

use anyhow::Result;
use param_train::benchmark::benchmark;
use serde_json::json;

use param_train::settings::Settings;
use param_train::{Device, cuda};

use crate::args::Flags;
use crate::{device, profile};

/// Measures `steps` steps: one JSON object on standard output, with `--profile` a table on standard error.
pub fn run(flags: &Flags, steps: u64) -> Result<ExitCode> {
    let config = flags.model.config()?;
    let settings = flags.settings(&config, steps)?;
    let device = device::choose(flags, &config, &settings)?;
    let settings = Settings { batch_size: device::batch_size(flags, &device, &config, &settings)?, ..settings };
    let result = benchmark(&config, &settings, &device, steps, flags.profile)?;
    let mut sorted = result.tokens_per_s.clone();
    sorted.sort_by(f64::total_cmp);
    let median = (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0;
    let rounded = |rate: f64| (rate * 10.0).round() / 10.0;
    let row = json!({
        "engine": "PARAM",
        "preset": flags.model.name(),
        "device": device.to_string(),
        "threads": flags.n_thread(),
        "dtype": settings.dtype,
        "matmul": matches!(device, Device::Cuda { .. }).then_some(settings.matmul),
        "cublaslt": matches!(device, Device::Cuda { .. }).then(|| cuda::cublaslt_version(&settings)).flatten(),
        "deterministic": settings.deterministic,
        "batch": settings.batch_size,
        "context": settings.context,
        "tok/s": rounded(median),
        "min": rounded(sorted[0]),
        "max": rounded(sorted[sorted.len() - 1]),
        "samples": result.tokens_per_s.iter().copied().map(rounded).collect::<Vec<_>>(),
        "operations_per_token": result.operations_per_token.round(),
        "peak": result.peak.round(),
        "mfu": (result.peak > 0.0).then(|| median * result.operations_per_token / result.peak),
        "peak_bytes": param_train::memory::peak(),
        "loss": result.loss,
    });
    writeln!(stdout(), "{row}")?;
    if flags.profile {
        profile::write(&mut stderr(), &result.spent, result.peak, steps)?;
    }
    Ok(ExitCode::SUCCESS)
}
