//! What the router, dispatch and the experts' sum agree on: how many of what there are, and where choices lie.

use super::dropout::Dropped;
use super::view::{Rows, View};

/// How many tokens choose among how many experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoutingShape {
    /// Tokens of the batch.
    pub n_token: usize,
    /// Experts, at most 64.
    pub n_expert: usize,
    /// Experts that a token chooses, at most 8.
    pub k: usize,
}

impl RoutingShape {
    /// Choices of all tokens.
    pub fn n_choice(self) -> usize {
        self.n_token * self.k
    }

    /// # Panics
    /// If kernels cannot do it.
    pub(super) fn check(self) {
        let Self { n_token, n_expert, k } = self;
        assert!((1..=64).contains(&n_expert) && (1..=n_expert.min(8)).contains(&k), "{k} of {n_expert} experts");
        assert!(n_token > 0 && n_token <= 1 << 24, "{n_token} tokens");
    }
}

/// What the router makes of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Routed<'a> {
    /// Noise included, [n_token, n_expert].
    pub logits: View<'a, f32>,
    /// Experts, best first, [n_token, k].
    pub chosen: View<'a, u32>,
    /// Softmax over the logits of the chosen, [n_token, k].
    pub weights: View<'a, f32>,
    /// Sums over tokens: of the squared log-sum-exp of the logits, of the entropy in nats of the softmax over all experts, and of the
    /// weights of each expert; [2 + n_expert].
    pub statistics: View<'a, f64>,
    /// Tokens that chose each expert, before any is dropped, [n_expert].
    pub loads: View<'a, u32>,
}

impl Routed<'_> {
    /// # Panics
    /// If a length is not that of `shape`.
    pub(super) fn check(&self, shape: RoutingShape) {
        shape.check();
        has("logits", self.logits, shape.n_token * shape.n_expert);
        has("choices", self.chosen, shape.n_choice());
        has("weights", self.weights, shape.n_choice());
        has("statistics", self.statistics, 2 + shape.n_expert);
        has("loads", self.loads, shape.n_expert);
    }
}

/// What each expert takes.
#[derive(Clone, Copy, Debug)]
pub struct Queues<'a> {
    /// Choices (`token * k + slot`) sorted by expert, then token; of [n_token * k] only the first `starts[n_expert]` are written.
    pub kept: View<'a, u32>,
    /// Where each expert's begin in `kept`, and the end, [n_expert + 1].
    pub starts: View<'a, u32>,
    /// The token of each of `kept`, as long.
    pub token_of_kept: View<'a, u32>,
    /// Where each choice lies in `kept`, or `u32::MAX` where it was dropped, [n_token, k].
    pub position: View<'a, u32>,
    /// Choices that were dropped, [1].
    pub n_dropped: View<'a, u32>,
}

impl Queues<'_> {
    /// # Panics
    /// If a length is not that of `shape`.
    pub(super) fn check(&self, shape: RoutingShape) {
        shape.check();
        has("kept choices", self.kept, shape.n_choice());
        has("starts", self.starts, shape.n_expert + 1);
        has("tokens of kept choices", self.token_of_kept, shape.n_choice());
        has("positions", self.position, shape.n_choice());
        has("number of dropped choices", self.n_dropped, 1);
    }
}

/// Holds a view to its length.
pub(super) fn has<T>(what: &str, view: View<T>, n: usize) {
    assert_eq!(view.len(), n, "elements of the {what}");
}

/// Holds a matrix of f32 [n, n_embd] to its length, and to an address at which kernels copy 16 bytes.
pub(super) fn has_rows(what: &str, view: View<f32>, n: usize, n_embd: usize) {
    has(what, view, n * n_embd);
    assert!(view.address().is_multiple_of(16), "the {what} begin between copies");
}

/// Holds rows of kept choices to there being room for all.
pub(super) fn has_kept_rows(what: &str, rows: Rows, shape: RoutingShape, n_embd: usize) {
    assert_eq!([rows.n_row(), rows.n_col()], [shape.n_choice(), n_embd], "rows and columns of the {what}");
}

/// Holds dropout to as many bits as there are elements.
pub(super) fn has_bits(dropout: Option<Dropped>, n: usize) {
    if let Some(Dropped { bits, .. }) = dropout {
        assert!(bits.len() >= n.div_ceil(32), "dropout of {n} elements by {} words", bits.len());
    }
}

/// Columns are read eight at a time.
pub(super) fn check_width(n_embd: usize) {
    assert!(n_embd > 0 && n_embd.is_multiple_of(8) && n_embd <= 1 << 16, "{n_embd} columns");
}
