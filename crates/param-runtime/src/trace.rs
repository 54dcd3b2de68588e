//! What a forward pass shows to whoever asks: hidden states at named points, and the routing of every MoE block.

/// Where in the model a hidden state is taken. Blocks count from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Point {
    /// Token plus position embedding.
    Embed,
    /// The residual stream after the block's attention.
    AfterAttention(usize),
    /// The block's second normalisation: the input of its feed-forward layer and its router.
    Norm2(usize),
    /// Output of the block's feed-forward layer, before the residual.
    Ffn(usize),
    /// The residual stream after the block.
    Out(usize),
    /// The final normalisation: the input of the head.
    FinalNorm,
}

/// One observation of a batch of `n_token` tokens.
#[derive(Clone, Copy, Debug)]
pub enum Trace<'a> {
    /// A hidden state.
    Hidden {
        /// Where.
        point: Point,
        /// [n_token, n_embd].
        values: &'a [f32],
    },
    /// The decision of a MoE block's router.
    Routing {
        /// Which block.
        block: usize,
        /// [n_token, n_expert].
        logits: &'a [f32],
        /// [n_token, n_expert_used], best first.
        experts: &'a [u32],
        /// [n_token, n_expert_used]: softmax over the chosen logits.
        weights: &'a [f32],
    },
}

/// Absent, an observer costs one comparison per point.
pub(crate) type Observer<'a, 'b> = Option<&'a mut (dyn FnMut(Trace<'_>) + 'b)>;
