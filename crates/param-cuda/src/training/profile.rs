//! Where the time of a step goes on the GPU: events between its parts, in steps that are then queued piece by piece and not as a graph.

use std::cell::RefCell;

use crate::error::Result;
use crate::stream::{Event, Stream};

/// A part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Token and position embedding.
    Embedding,
    /// LayerNorm, with the router's scores.
    Norm,
    /// Queries, keys, values and the attention's output.
    Projections,
    /// Scores, softmax and weighted sums, and what dropout draws for them.
    Attention,
    /// Dense feed-forward layers.
    Dense,
    /// Choosing experts, and sorting tokens by expert.
    Router,
    /// Expert feed-forward layers.
    Experts,
    /// Output head and cross-entropy.
    Head,
    /// Gradient norm and parameter update.
    Optimizer,
    /// Whatever lies between.
    Other,
}

/// What a part took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PartSpent {
    /// Which.
    pub part: Part,
    /// Time on the GPU.
    pub seconds: f64,
    /// Multiplications and additions of its matrix products.
    pub operations: f64,
}

/// Where parts begin, and the operations of each so far.
#[derive(Default)]
pub(super) struct Marks {
    marks: RefCell<Vec<(Part, Event, f64)>>,
}

impl Marks {
    /// What is queued from here on belongs to `part`.
    pub(super) fn begin(&self, stream: &Stream, part: Part) -> Result<()> {
        self.marks.borrow_mut().push((part, Event::record(stream)?, 0.0));
        Ok(())
    }

    /// Counts operations of the part at hand.
    pub(super) fn count(&self, n: f64) {
        if let Some((_, _, operations)) = self.marks.borrow_mut().last_mut() {
            *operations += n;
        }
    }

    /// What parts took, in order, up to the last mark; waits for the GPU. Begins anew.
    pub(super) fn spent(&self) -> Result<Vec<PartSpent>> {
        let marks = self.marks.take();
        let spent = |two: &[(Part, Event, f64)]| {
            let (part, event, operations) = &two[0];
            Ok(PartSpent { part: *part, seconds: two[1].1.seconds_since(event)?, operations: *operations })
        };
        marks.windows(2).map(spent).collect()
    }
}
