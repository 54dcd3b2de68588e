//! The model on ggml as of llama.cpp b2757, through the crate that the project itself builds on.
#[path = "../../ggml/attention.rs"]
mod attention;
#[path = "../../ggml/engine.rs"]
mod engine;
#[path = "../../ggml/graph.rs"]
mod graph;
#[path = "../../ggml/ops.rs"]
mod ops;
mod version;
#[path = "../../ggml/weights.rs"]
mod weights;

fn main() -> std::process::ExitCode {
    peer::main::<engine::Engine>()
}
