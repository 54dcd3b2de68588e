//! The runtime as an application sees it, on tiny random models.

mod batching;
mod generation;
mod hostile;
mod quality;
mod reference;
mod tiny;
