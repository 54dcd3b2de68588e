//! param-train
