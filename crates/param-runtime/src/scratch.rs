//! What each thread of a forward pass needs for itself.

use param_kernels::{QUERY_TILE, attention_scratch_len};

use crate::candidates::Best;
use crate::matmul::{MAX_ROWS, Products};

pub(crate) struct Scratch {
    pub products: Products,
    /// Which rows of the activations the products are of.
    pub rows: Vec<usize>,
    pub queries: Vec<f32>,  // [QUERY_TILE, head_dim], gathered and scaled
    pub attended: Vec<f32>, // [QUERY_TILE, head_dim]
    pub keys_values: Vec<f32>,
    /// The largest logits this thread has computed, for each row of the head.
    pub best: Vec<Best>,
}

impl Scratch {
    pub fn new(head_dim: usize) -> Scratch {
        Scratch {
            products: Products::new(),
            rows: Vec::with_capacity(MAX_ROWS),
            queries: vec![0.0; QUERY_TILE * head_dim],
            attended: vec![0.0; QUERY_TILE * head_dim],
            keys_values: vec![0.0; attention_scratch_len(head_dim)],
            best: Vec::new(),
        }
    }
}
