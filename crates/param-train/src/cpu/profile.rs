//! Where the time of a step goes, and how many operations its matrix products are.

use std::time::Instant;

/// A part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    /// Reading batches.
    Data,
    /// Token and position embedding.
    Embedding,
    /// LayerNorm, with the router's logits.
    Norm,
    /// Queries, keys, values and the attention's output.
    Projections,
    /// Scores, softmax and weighted sums.
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

impl Section {
    /// All of them, in the order of a table.
    pub const ALL: [Section; 11] = [
        Section::Data,
        Section::Embedding,
        Section::Norm,
        Section::Projections,
        Section::Attention,
        Section::Dense,
        Section::Router,
        Section::Experts,
        Section::Head,
        Section::Optimizer,
        Section::Other,
    ];

    /// As it stands in a table.
    pub fn name(self) -> &'static str {
        match self {
            Section::Data => "data",
            Section::Embedding => "embedding",
            Section::Norm => "norm",
            Section::Projections => "projections",
            Section::Attention => "attention",
            Section::Dense => "dense",
            Section::Router => "router",
            Section::Experts => "experts",
            Section::Head => "head",
            Section::Optimizer => "optimizer",
            Section::Other => "other",
        }
    }
}

/// What a section took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spent {
    /// Wall time.
    pub seconds: f64,
    /// Multiplications and additions of matrix products.
    pub operations: f64,
}

/// Sums since the beginning.
pub struct Profile {
    spent: [Spent; Section::ALL.len()],
    now: Section,
    since: Instant,
}

impl Default for Profile {
    fn default() -> Self {
        Self { spent: Default::default(), now: Section::Other, since: Instant::now() }
    }
}

impl Profile {
    /// What follows belongs to `section`.
    pub fn enter(&mut self, section: Section) {
        let now = Instant::now();
        self.spent[self.now as usize].seconds += (now - self.since).as_secs_f64();
        self.since = now;
        self.now = section;
    }

    /// What `section` took elsewhere.
    pub(crate) fn add(&mut self, section: Section, spent: Spent) {
        let sum = &mut self.spent[section as usize];
        sum.seconds += spent.seconds;
        sum.operations += spent.operations;
    }

    /// The time since the last change of section belongs to none: it was spent waiting for what is counted elsewhere.
    pub(crate) fn skip(&mut self) {
        self.since = Instant::now();
    }

    pub(super) fn add_operations(&mut self, n: f64) {
        self.spent[self.now as usize].operations += n;
    }

    /// What `section` took, up to the last change of section.
    pub fn spent(&self, section: Section) -> Spent {
        self.spent[section as usize]
    }

    /// Forgets what was spent.
    pub fn reset(&mut self) {
        *self = Self { now: self.now, ..Self::default() };
    }
}
