//! Gathers rows into batches to train on, each a pure function of its number.

use super::DataError;
use super::mixture::{Mixture, Shares};
use super::permute::{Permutation, hash};
use super::rows::{Layout, Order, Rows, Vocabulary};

/// A target that does not count, as in PyTorch's cross entropy.
pub const IGNORED: i32 = -100;

/// Some rows of inputs and targets, row-major.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Number of rows B.
    pub n_row: usize,
    /// Token ids.
    pub input: Vec<u32>, // [B, context]
    /// The token that follows each input, or [`IGNORED`].
    pub target: Vec<i32>, // [B, context]
    /// False where the input is padding; `None` if none is.
    pub mask: Option<Vec<bool>>, // [B, context]
    /// Where in its row the document of each input begins, for rows of documents that do not see each other; `None` where
    /// each position sees all before it.
    pub first: Option<Vec<u32>>, // [B, context]
    /// Bytes of text that the targets stand for: sum of loss in nats / (ln 2 × `n_bytes`) is bits per byte.
    pub n_bytes: u64,
}

impl Batch {
    /// Number of targets that count.
    pub fn n_target(&self) -> usize {
        self.target.iter().filter(|&&t| t != IGNORED).count()
    }
}

/// The batches to train on, without end: epoch after epoch, each a shuffle of its own.
///
/// Packed, an epoch shuffles the documents, joins them into a ring, cuts that into rows of `context` tokens from a
/// random place on and shuffles the rows. So a single long document is cut elsewhere in every epoch and its rows come
/// in random order, where nanoGPT draws windows with replacement. Every token of the ring is a target exactly once an
/// epoch, but for the last `stream_len % context` of it, which differ from epoch to epoch. Rows of one document come
/// in the order of the shuffled documents. A batch may span two epochs.
///
/// Of several data sets each has its share of the rows, and epochs of its own.
///
/// Batch `i` depends on nothing but the mixture, the options and `i`, so training resumes at any batch.
#[derive(Clone, Debug)]
pub struct Batches {
    datasets: Vec<Epochs>,
    shares: Shares,
    batch_size: usize,
}

/// The rows of one data set without end.
#[derive(Clone, Debug)]
struct Epochs {
    rows: Rows,
    seed: u64,
    /// Whether documents and rows come as they lie, not shuffled.
    in_order: bool,
    /// The epoch that the last row was in, kept because making one takes a pass over the document index.
    epoch: Epoch,
}

#[derive(Clone, Debug)]
struct Epoch {
    number: u64,
    order: Order,
    rows: Permutation,
    /// Where on the ring the first row starts.
    phase: u64,
}

impl Batches {
    /// Batches of `batch_size` rows of `context` tokens of `mixture`.
    ///
    /// # Errors
    /// [`DataError::TooShort`] if a data set has not one row, [`DataError::OtherTokenizer`], [`DataError::NoEndOfText`].
    pub fn new(
        mixture: impl Into<Mixture>,
        vocabulary: &Vocabulary,
        layout: Layout,
        context: usize,
        batch_size: usize,
        seed: u64,
    ) -> Result<Self, DataError> {
        let mixture = mixture.into();
        let n_dataset = mixture.datasets().len();
        let epochs = (0..).zip(mixture.datasets()).map(|(i, dataset)| {
            let rows = Rows::new(dataset.part.clone(), vocabulary, layout, context)?;
            rows.check_length("training data").map_err(|e| e.of_dataset(&dataset.name))?;
            // Data sets of equal length should not be shuffled alike.
            let seed = if n_dataset == 1 { seed } else { hash(&[seed, i]) };
            Ok(Epochs { epoch: Epoch::shuffled(&rows, seed, 0), rows, seed, in_order: false })
        });
        let datasets = epochs.collect::<Result<_, DataError>>()?;
        let shares = Shares::new(mixture.datasets().iter().map(|dataset| dataset.weight));
        Ok(Self { datasets, shares, batch_size })
    }

    /// Marks in each batch where documents begin, so that attention can keep to them.
    pub fn isolating_documents(mut self, isolate: bool) -> Self {
        self.datasets.iter_mut().for_each(|dataset| dataset.rows.isolate = isolate);
        self
    }

    /// Takes documents and rows as they lie in each data set, every epoch the same, instead of shuffling them.
    pub fn in_order(mut self) -> Self {
        for dataset in &mut self.datasets {
            dataset.in_order = true;
            dataset.epoch = Epoch::in_order(&dataset.rows, 0);
        }
        self
    }

    /// Rows in an epoch, of all data sets.
    pub fn rows_per_epoch(&self) -> u64 {
        self.datasets.iter().map(Epochs::n_row).sum()
    }

    /// Batches that cover `epochs` epochs, the last one perhaps reaching into the next. In a mixture these are as many rows as
    /// all its data sets have, whatever their shares make of each.
    pub fn batches_in(&self, epochs: f64) -> u64 {
        ((self.rows_per_epoch() as f64 * epochs / self.batch_size as f64).ceil() as u64).max(1)
    }

    /// Epochs completed before batch `index`.
    pub fn epochs_before(&self, index: u64) -> f64 {
        index as f64 * self.batch_size as f64 / self.rows_per_epoch() as f64
    }

    /// The same for each data set of a mixture; empty for one alone.
    pub fn dataset_epochs_before(&self, index: u64) -> Vec<f64> {
        if self.datasets.len() == 1 {
            return Vec::new();
        }
        let rows = self.shares.before(self.first_row(index));
        rows.iter().zip(&self.datasets).map(|(&row, dataset)| row as f64 / dataset.n_row() as f64).collect()
    }

    /// Batch number `index`, from 0.
    ///
    /// # Errors
    /// [`DataError::Damaged`] if the shard holds ids outside the vocabulary.
    pub fn batch_at(&mut self, index: u64) -> Result<Batch, DataError> {
        let mut batch = self.datasets[0].rows.batch(self.batch_size);
        let first = self.first_row(index);
        for row in first..first + self.batch_size as u64 {
            let (dataset, row) = self.shares.of(row);
            self.datasets[dataset].push(&mut batch, row)?;
        }
        Ok(batch)
    }

    fn first_row(&self, index: u64) -> u64 {
        index * self.batch_size as u64
    }
}

impl Epochs {
    fn n_row(&self) -> u64 {
        n_row_of_epoch(&self.rows)
    }

    /// Adds row number `row`, from 0.
    fn push(&mut self, batch: &mut Batch, row: u64) -> Result<(), DataError> {
        let (number, row) = (row / self.n_row(), row % self.n_row());
        if self.epoch.number != number {
            self.epoch = match self.in_order {
                true => Epoch::in_order(&self.rows, number),
                false => Epoch::shuffled(&self.rows, self.seed, number),
            };
        }
        let Epoch { order, rows, phase, .. } = &self.epoch;
        match self.rows.layout {
            Layout::Packed => {
                let at = phase + rows.at(row) * self.rows.context as u64;
                self.rows.push_packed(batch, order, at % self.rows.stream_len, self.rows.context)
            }
            Layout::OneDocumentPerRow => self.rows.push_document(batch, order.documents.at(row)),
        }
    }
}

fn n_row_of_epoch(rows: &Rows) -> u64 {
    match rows.layout {
        Layout::Packed => rows.stream_len / rows.context as u64,
        Layout::OneDocumentPerRow => rows.part.n_document(),
    }
}

impl Epoch {
    fn shuffled(rows: &Rows, seed: u64, number: u64) -> Self {
        // One stream of random numbers for each use.
        let random = |usage: u64| hash(&[seed, number, usage]);
        Self {
            number,
            order: rows.order(Permutation::shuffled(rows.part.n_document(), random(0))),
            rows: Permutation::shuffled(n_row_of_epoch(rows), random(1)),
            phase: random(2) % rows.stream_len,
        }
    }

    fn in_order(rows: &Rows, number: u64) -> Self {
        Self {
            number,
            order: rows.order(Permutation::identity(rows.part.n_document())),
            rows: Permutation::identity(n_row_of_epoch(rows)),
            phase: 0,
        }
    }
}
