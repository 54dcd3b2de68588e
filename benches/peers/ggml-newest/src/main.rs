//! The model on the newest ggml that is published as a crate, with weights in the buffers that llama.cpp would choose.
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
