//! Training on the GPU: the operations of a step forward and backward, each beside the kernel it launches, and the step made of them.

mod numbers;
mod view;

pub use numbers::{Numbers, Outcome};
pub use view::{Element, Rows, View};
