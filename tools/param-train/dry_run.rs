//! `--dry-run`: what a run would need.

use std::io::{Write, stdout};
use std::process::ExitCode;

use anyhow::Result;
use indicatif::{HumanBytes, HumanCount, HumanDuration};
use param::device::DeviceArg;
use param_kernels::{Team, arithmetic_peak};
use param_train::Device;
use param_train::cpu::{Memory, operations_per_token};
use param_train::cuda;
use param_train::optimizer::Group;
use param_train::report::summary;

use crate::args::{Flags, Training};
use crate::device;

/// What of the peak training reaches, by which a time is estimated; `--benchmark` measures it.
const UTILISATION: f64 = 0.5;

/// Prints parameters, memory by kind, and an estimate of the time.
pub fn run(flags: &Flags) -> Result<ExitCode> {
    let config = flags.model.config()?;
    let steps = flags.training.steps.unwrap_or(Training::STEPS);
    let mut settings = flags.settings(&config, steps)?;
    settings.check(&config)?;
    let device = match (flags.device, Device::cuda()) {
        (DeviceArg::Cpu, _) | (DeviceArg::Auto, Err(_)) => Some(Device::Cpu { n_thread: flags.n_thread() }),
        (_, Ok(gpu)) => Some(gpu),
        (DeviceArg::Cuda, Err(no_gpu)) => {
            eprintln!("for a GPU that is not here: {no_gpu}");
            None
        }
    };
    if let Some(device) = &device {
        settings.batch_size = device::batch_size(flags, device, &config, &settings)?;
        device.check(&config, &settings)?;
    }
    let memory = match &device {
        Some(Device::Cpu { n_thread }) => {
            let groups = Group::all(&param_model::tensors(&config), &settings)?;
            Memory::plan(&config, &groups, settings.compute(*n_thread), (settings.batch_size, settings.context))
        }
        Some(Device::Cuda { .. }) | None => cuda::memory(&config, &settings)?,
    };
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
    let Some(device) = device else { return Ok(ExitCode::SUCCESS) };
    let peak = match &device {
        Device::Cpu { n_thread } => arithmetic_peak(&mut Team::new(*n_thread), settings.dtype.arithmetic()),
        Device::Cuda { gpu } => {
            let free = device::planned(&device)?.unwrap_or_default();
            writeln!(out, "{:<16} {:>12}", "may be used", HumanBytes(free).to_string())?;
            cuda::peak(gpu, &settings)
        }
    };
    let per_step = (settings.batch_size * settings.context * settings.accumulation) as f64;
    let rate = UTILISATION * peak / operations_per_token(&config, settings.context);
    let seconds = per_step * steps as f64 / rate;
    writeln!(
        out,
        "{} steps of {} tokens: about {} at {} tok/s, {:.0}% of the {:.0} GFLOP/s of {device} (--benchmark measures)",
        HumanCount(steps),
        HumanCount(per_step as u64),
        HumanDuration(std::time::Duration::from_secs_f64(seconds)),
        HumanCount(rate as u64),
        100.0 * UTILISATION,
        peak / 1e9
    )?;
    Ok(ExitCode::SUCCESS)
}
