//! Where a model is trained or evaluated.

use std::sync::Arc;

use param_cuda::Gpu;
use param_model::Config;

use crate::backend::Evaluate;
use crate::cpu::CpuModel;
use crate::cuda::CudaModel;
use crate::error::Error;
use crate::settings::{Dtype, Matmul, Settings};

/// What computes.
#[derive(Clone, Debug)]
pub enum Device {
    /// So many threads.
    Cpu {
        /// Threads.
        n_thread: usize,
    },
    /// An open GPU.
    Cuda {
        /// The GPU.
        gpu: Arc<Gpu>,
    },
}

impl Device {
    /// All the CPUs there are.
    pub fn cpu() -> Self {
        Device::Cpu { n_thread: param_kernels::available_threads() }
    }

    /// The first GPU.
    ///
    /// # Errors
    /// [`param_cuda::NoGpu`]: there is none that can be used.
    pub fn cuda() -> Result<Self, param_cuda::NoGpu> {
        Ok(Device::Cuda { gpu: param_cuda::open()? })
    }

    /// Bytes of memory that are free on a GPU.
    ///
    /// # Errors
    /// What the GPU fails with.
    pub fn free_memory(&self) -> Result<Option<u64>, Error> {
        match self {
            Device::Cpu { .. } => Ok(None),
            Device::Cuda { gpu } => Ok(Some(gpu.memory()?.0 as u64)),
        }
    }

    /// Refuses what only others compute.
    ///
    /// # Errors
    /// [`Error::Setting`], or the limit that a GPU has.
    pub fn check(&self, config: &Config, settings: &Settings) -> Result<(), Error> {
        match self {
            Device::Cpu { .. } if settings.dtype == Dtype::Tf32 => {
                let problem = "tf32 is a GPU's: take f32 or bf16, or --device cuda".to_owned();
                Err(Error::Setting { flag: "dtype", problem })
            }
            Device::Cpu { .. } if settings.matmul != Matmul::Mma => {
                let problem =
                    "how matrices are multiplied is chosen on a GPU: --device cuda, or --matmul mma".to_owned();
                Err(Error::Setting { flag: "matmul", problem })
            }
            Device::Cpu { .. } => Ok(()),
            Device::Cuda { gpu } => Ok(crate::cuda::check(gpu, config, settings)?),
        }
    }

    /// A model there, to be evaluated on batches as `settings` have them.
    ///
    /// # Errors
    /// What a GPU fails with.
    pub fn evaluator(
        &self,
        config: &Config,
        settings: &Settings,
        params: Vec<Vec<f32>>,
    ) -> Result<Box<dyn Evaluate>, Error> {
        self.check(config, settings)?;
        Ok(match self {
            Device::Cpu { n_thread } => Box::new(CpuModel::new(config, settings, *n_thread, params)),
            Device::Cuda { gpu } => Box::new(CudaModel::new(gpu, config, settings, &params)?),
        })
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Device::Cpu { n_thread } => write!(f, "{n_thread} threads"),
            Device::Cuda { gpu } => f.write_str(gpu.name()),
        }
    }
}
