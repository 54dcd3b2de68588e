//! The emulation against plain loops, and against kernels with a mistake in them, which it must notice.

mod driver;
mod failures;
mod mistakes;
mod primitives;
