//! param-model
