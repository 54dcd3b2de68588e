//! `--dry-run`: what a run would need.

use std::io::{Write, stdout};
use std::process::ExitCode;

use anyhow::Result;
use indicatif::{HumanBytes, HumanCount, HumanDuration};
use param_kernels::{Team, arithmetic_peak};
use param_train::cpu::{Memory, operations_per_token};
use param_train::optimizer::Group;
use param_train::report::summary;

use crate::args::{Flags, Training};

/// What of the peak training reaches, by which a time is estimated; `--benchmark` measures it.
const UTILISATION: f64 = 0.5;

/// Prints parameters, memory by kind, and an estimate of the time.
pub fn run(flags: &Flags) -> Result<ExitCode> {
    let config = flags.model.config()?;
    let steps = flags.training.steps.unwrap_or(Training::STEPS);
    let settings = flags.settings(&config, steps)?;
    settings.check(&config)?;
    let n_thread = flags.n_thread();
    let groups = Group::all(&param_model::tensors(&config), &settings)?;
    let memory = Memory::plan(&config, &groups, settings.compute(n_thread), (settings.batch_size, settings.context));
    let mut out = stdout();
    writeln!(out, "{}", summary(&config))?;
    let kinds = [
        ("parameters", memory.parameters),
        ("gradients", memory.gradients),
        ("optimizer", memory.moments),
        ("activations", memory.activations),
        ("working memory", memory.working),
        ("all", memory.total()),
    ];
    for (kind, bytes) in kinds {
        writeln!(out, "{kind:<16} {:>12}", HumanBytes(bytes).to_string())?;
    }
    let peak = arithmetic_peak(&mut Team::new(n_thread), settings.dtype.arithmetic());
    let per_step = (settings.batch_size * settings.context * settings.accumulation) as f64;
    let rate = UTILISATION * peak / operations_per_token(&config, settings.context);
    let seconds = per_step * steps as f64 / rate;
    writeln!(
        out,
        "{} steps of {} tokens: about {} at {} tok/s, {:.0}% of this machine's {:.0} GFLOP/s (--benchmark measures)",
        HumanCount(steps),
        HumanCount(per_step as u64),
        HumanDuration(std::time::Duration::from_secs_f64(seconds)),
        HumanCount(rate as u64),
        100.0 * UTILISATION,
        peak / 1e9
    )?;
    Ok(ExitCode::SUCCESS)
}
