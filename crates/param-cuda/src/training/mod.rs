//! Training on the GPU: the operations of a step forward and backward, each beside the kernel it launches, and the step made of them.

mod adamw;
mod attention;
mod column_sums;
mod convert;
mod cross_entropy;
mod cublaslt;
mod dispatch;
mod dropout;
mod embedding;
mod experts;
mod layout;
mod learner;
mod model;
mod muon;
mod norm;
mod numbers;
mod product;
mod profile;
mod router;
mod routing;
mod staging;
#[cfg(test)]
mod testing;
mod view;

pub use adamw::Stretch;
pub use cublaslt::cublaslt_version;
pub use layout::{Plan, Recompute};
pub use learner::{Batch, Learner, MemoryPlan, ModelSizes, MuonStack, Optimizer, check};
pub use model::{ALIGNMENT, BlockPlaces, FfnPlaces, Model, NormPlaces, Place};
pub use muon::MuonMatrix;
pub use numbers::{Numbers, Outcome};
pub use product::{Arithmetic, Matmul};
pub use profile::{Part, PartSpent};
pub use staging::{Report, RouterReport};
pub use view::{Element, Rows, View};

use dropout::Dropped;
use product::{Factor, Groups, Products, Write};

use crate::error::Result;
use crate::gpu::Gpu;

/// Operations a second that products in `arithmetic` could reach on `gpu` at its highest clock; 0 where its kind is not known.
///
/// # Errors
/// The driver's.
pub fn peak(gpu: &Gpu, arithmetic: Arithmetic) -> Result<f64> {
    // The tensor cores take half as many operands of twice the size, and those split in two three times.
    let share = match arithmetic {
        Arithmetic::Bf16 => 1.0,
        Arithmetic::Tf32 => 0.5,
        Arithmetic::F32 => 0.5 / 3.0,
    };
    Ok(share * gpu.peak_bf16()?)
}
