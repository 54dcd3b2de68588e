//! Where a run is computed, and how large its batches are there.

use anyhow::{Result, bail};
use indicatif::HumanBytes;
use param::cli::Usage;
use param::device::DeviceArg;
use param_model::Config;
use param_train::settings::Settings;
use param_train::{Device, cuda};

use crate::args::{BatchSize, Flags};

/// Part of the free memory that a run may plan for: the driver takes some for itself.
const PLANNED: f64 = 0.92;

/// What the flags say, which can train `config` under `settings`.
///
/// # Errors
/// No GPU where one is asked for, or what it does not take.
pub fn choose(flags: &Flags, config: &Config, settings: &Settings) -> Result<Device> {
    let cpu = Device::Cpu { n_thread: flags.n_thread() };
    let device = match (flags.device, Device::cuda()) {
        (DeviceArg::Cpu, _) | (DeviceArg::Auto, Err(_)) => cpu,
        (DeviceArg::Cuda, Err(no_gpu)) => bail!("--device cuda: {no_gpu}"),
        (DeviceArg::Cuda, Ok(gpu)) => gpu,
        (DeviceArg::Auto, Ok(gpu)) => match gpu.check(config, settings) {
            Ok(()) => gpu,
            Err(why) => {
                eprintln!("not on the GPU: {why}");
                cpu
            }
        },
    };
    device.check(config, settings)?;
    Ok(device)
}

/// Rows of a batch, where the flags leave them to the GPU's memory.
///
/// # Errors
/// A CPU, which has no such limit, or no room for a single row.
pub fn batch_size(flags: &Flags, device: &Device, config: &Config, settings: &Settings) -> Result<usize> {
    let Some(BatchSize::Auto) = flags.training.batch_size else { return Ok(settings.batch_size) };
    let Some(free) = planned(device)? else {
        bail!(Usage("--batch-size auto is for a GPU: on the CPU give a number of rows".into()));
    };
    match cuda::largest_batch(config, settings, free)? {
        Some(batch_size) => {
            eprintln!("{batch_size} rows a batch, of {} that may be used", HumanBytes(free));
            Ok(batch_size)
        }
        None => {
            let needed = cuda::memory(config, &Settings { batch_size: 1, ..settings.clone() })?.total();
            bail!(
                "out of memory on the GPU: batches of one row need {}, {} may be used: shorten --context, or --recompute",
                HumanBytes(needed),
                HumanBytes(free)
            )
        }
    }
}

/// Bytes that a run on a GPU may plan for.
///
/// # Errors
/// The driver's.
pub fn planned(device: &Device) -> Result<Option<u64>> {
    Ok(device.free_memory()?.map(|free| (PLANNED * free as f64) as u64))
}
