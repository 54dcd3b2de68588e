//! The runtime as an application sees it, on tiny random models.

mod batching;
mod generation;
mod hostile;
mod reference;
mod tiny;
