//! param-runtime
