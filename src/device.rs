//! The flags that say where a model runs, for every tool that runs one.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use clap::{Args, ValueEnum};
use param_runtime::{Device, GpuDecode, Model, ModelOptions};

use crate::cli::Usage;

/// Where the model runs.
#[derive(Args, Clone, Debug)]
pub struct DeviceArgs {
    /// Where the model runs
    #[arg(long, value_enum, default_value = "auto")]
    device: DeviceArg,
    /// Blocks that the GPU holds, counted from the last; all of them, and it holds everything [default: as many as fit]
    #[arg(long, value_name = "N", visible_alias = "n-gpu-layers")]
    gpu_layers: Option<usize>,
    /// Who holds the experts, which are most of the weights
    #[arg(long, value_enum, default_value = "gpu", value_name = "WHERE")]
    experts: ExpertsArg,
    /// How a GPU that holds the whole model runs single tokens
    #[arg(long, value_enum, default_value = "auto", value_name = "HOW", hide_short_help = true)]
    gpu_decode: DecodeArg,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum DecodeArg {
    /// One sequence by one kernel for the whole token, several by the graph
    Auto,
    /// The kernels that run prompts, launched together as a graph
    Graph,
}

/// The flag --device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceArg {
    /// A GPU if there is one, with as much of the model as fits
    Auto,
    /// All by the processor
    Cpu,
    /// A GPU, or an error
    Cuda,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum ExpertsArg {
    /// With their blocks
    Gpu,
    /// The CPU, so that a model larger than the GPU's memory runs
    Cpu,
}

impl DeviceArgs {
    /// Opens a model there, and says on standard error where that is if it is not the CPU that nobody asked to leave.
    ///
    /// # Errors
    /// [`Usage`] for flags that contradict each other; whatever opening fails with.
    pub fn open(&self, path: &Path) -> Result<Arc<Model>> {
        let device = match self.device {
            DeviceArg::Auto => Device::Auto,
            DeviceArg::Cpu => Device::Cpu,
            DeviceArg::Cuda => Device::Cuda,
        };
        let has_gpu_flags = self.gpu_layers.is_some() || self.experts == ExpertsArg::Cpu;
        if device == Device::Cpu && has_gpu_flags {
            return Err(Usage("--gpu-layers and --experts need --device auto or cuda".to_owned()).into());
        }
        let experts_on_cpu = self.experts == ExpertsArg::Cpu;
        let gpu_decode = match self.gpu_decode {
            DecodeArg::Auto => GpuDecode::Auto,
            DecodeArg::Graph => GpuDecode::Graph,
        };
        let options = ModelOptions { device, gpu_layers: self.gpu_layers, experts_on_cpu, gpu_decode };
        let model = Model::open_with(path, &options)?;
        match (model.gpu_description(), model.device_note()) {
            (Some(gpu), _) => eprintln!("on {gpu}"),
            (None, Some(note)) => eprintln!("on the CPU: {note}"),
            (None, None) if has_gpu_flags => eprintln!("on the CPU: no GPU was found"),
            (None, None) => {}
        }
        Ok(model)
    }
}
