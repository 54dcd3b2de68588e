//! param-kernels
