//! Where a run is computed, and how large its batches are there.

use anyhow::{Result, bail};
use indicatif::HumanBytes;
use param::cli::Usage;
use param::device::DeviceArg;
use param_kernels::{Arithmetic, Team, arithmetic_peak};
use param_model::Config;
use param_train::settings::{Dtype, Settings};
use param_train::{Device, cuda};

use crate::args::{BatchSize, Flags};

/// Part of the free memory that a run may plan for: the driver takes some for itself.
const PLANNED: f64 = 0.92;
/// Part of the speed in f32 below which bf16, which moves half the bytes, is still the slower.
const SLOWER: f64 = 0.8;

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
    if let (Device::Cpu { n_thread }, Dtype::Bf16) = (&device, settings.dtype) {
        let team = &mut Team::new(*n_thread);
        let [bf16, f32] = [Arithmetic::Bf16, Arithmetic::F32].map(|arithmetic| arithmetic_peak(team, arithmetic));
        if bf16 < SLOWER * f32 {
            let [bf16, f32] = [bf16, f32].map(|peak| peak / 1e9);
            eprintln!(
                "this processor multiplies f32 at {f32:.0} GFLOP/s and bf16 at {bf16:.0}: --dtype f32 is faster here"
            );
        }
    }
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
