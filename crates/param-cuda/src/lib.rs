//! A GPU opened safely, and the kernels that run on it. Nothing of CUDA is needed to build: the driver is looked for at run time, and
//! where there is none, [`open`] says why. Every failure is an [`Error`] that names the call.

mod caches;
mod choose;
pub mod decode;
mod device_model;
mod error;
mod forward;
mod gpu;
mod kernel;
mod memory;
pub mod model;
mod planes;
pub mod sampling;
mod stream;
pub mod training;

pub use caches::{CacheTable, Caches};
pub use choose::Chooser;
pub use device_model::{BlockWeights, DeviceModel, FeedForwardWeights, NormWeights, OuterWeights, Upload, Weights};
pub use error::{Error, NoGpu, Result};
pub use forward::{Forward, Row};
pub use gpu::{Gpu, open};
pub use kernel::{Arg, Grid, IntoArg, Kernel, Module};
pub use memory::{Buffer, Pinned};
pub use planes::Planes;
pub use stream::{Event, Graph, Stream};
