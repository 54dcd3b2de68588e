//! param-ggml
