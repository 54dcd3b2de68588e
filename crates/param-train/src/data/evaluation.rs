//! The rows of a held-out part, in order.

use super::DataError;
use super::batch::Batch;
use super::permute::Permutation;
use super::rows::{Layout, Order, Rows, Vocabulary};
use super::split::Part;

/// The batches of a held-out part: all of it once, in order, in rows that do not overlap.
///
/// Packed, the text begins with an end-of-text, so that every token of every document is a target once and `n_bytes`
/// adds up to the bytes of all documents; only the very last row is padded. Without an end-of-text token the first
/// token of all is no target.
#[derive(Clone, Debug)]
pub struct Evaluation {
    rows: Rows,
    order: Order,
    batch_size: usize,
    next: u64,
    n_row: u64,
}

impl Evaluation {
    /// Batches of up to `batch_size` rows of `context` tokens of `part`.
    ///
    /// # Errors
    /// As for [`Batches::new`].
    pub fn new(
        part: Part,
        vocabulary: &Vocabulary,
        layout: Layout,
        context: usize,
        batch_size: usize,
    ) -> Result<Self, DataError> {
        let rows = Rows::new(part, vocabulary, layout, context)?;
        rows.check_length("held-out data")?;
        let n_row = match layout {
            Layout::Packed => n_target(&rows).div_ceil(context as u64),
            Layout::OneDocumentPerRow => rows.part.n_document(),
        };
        let order = rows.order(Permutation::identity(rows.part.n_document()));
        Ok(Self { rows, order, batch_size, next: 0, n_row })
    }

    /// Rows there are in all.
    pub fn n_row(&self) -> u64 {
        self.n_row
    }

    fn batch(&self, numbers: std::ops::Range<u64>) -> Result<Batch, DataError> {
        let rows = &self.rows;
        let mut batch = rows.batch(self.batch_size);
        for row in numbers {
            if rows.layout == Layout::OneDocumentPerRow {
                rows.push_document(&mut batch, row)?;
                continue;
            }
            let from = row * rows.context as u64;
            // On the ring, the end-of-text before the first document is the one after the last.
            let at = if rows.end_of_text.is_some() { (from + rows.stream_len - 1) % rows.stream_len } else { from };
            let n_left = n_target(rows) - from;
            rows.push_packed(&mut batch, &self.order, at, n_left.min(rows.context as u64) as usize)?;
        }
        Ok(batch)
    }
}

/// Targets of a packed evaluation.
fn n_target(rows: &Rows) -> u64 {
    if rows.end_of_text.is_some() { rows.stream_len } else { rows.stream_len - 1 }
}

impl Iterator for Evaluation {
    type Item = Result<Batch, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        let numbers = self.next..self.n_row.min(self.next + self.batch_size as u64);
        self.next = numbers.end;
        (!numbers.is_empty()).then(|| self.batch(numbers))
    }
}
