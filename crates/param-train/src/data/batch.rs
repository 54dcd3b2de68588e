//! Cuts a part of a shard into rows of tokens and gathers rows into batches, each a pure function of its number.

use std::sync::Arc;

use param_model::Tokenizer;

use super::DataError;
use super::permute::{Permutation, hash};
use super::split::{Part, length};

/// A target that does not count, as in PyTorch's cross entropy.
pub const IGNORED: i32 = -100;

/// How documents become rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Layout {
    /// Documents one after the other, each followed by end-of-text (nothing, if the tokenizer has none), cut every
    /// `context` tokens; the last target of a row is the first input of the next. No padding.
    #[default]
    Packed,
    /// The reference's layout: begin-of-text (if the tokenizer has one) and the tokens of one document, cut off at
    /// `context`, padded on the right with end-of-text. Nothing teaches the model to stop: an end-of-text is never
    /// a target.
    OneDocumentPerRow,
}

/// What rows need to know of a tokenizer.
#[derive(Clone, Debug)]
pub struct Vocabulary {
    /// The token that a text begins with.
    pub bos: Option<u32>,
    /// The token that ends a document.
    pub end_of_text: Option<u32>,
    /// Bytes of text each token stands for; 0 for special tokens.
    pub token_bytes: Arc<[u32]>, // [n_vocab]
}

impl Vocabulary {
    /// Reads it off.
    pub fn of(tokenizer: &Tokenizer) -> Self {
        let token_bytes = (0..tokenizer.n_vocab() as u32).map(|id| tokenizer.token_bytes(id).len() as u32).collect();
        Self { bos: tokenizer.bos(), end_of_text: tokenizer.end_of_text(), token_bytes }
    }
}

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
    /// Bytes of text that the targets stand for: sum of loss in nats / (ln 2 × `n_bytes`) is bits per byte.
    pub n_bytes: u64,
}

impl Batch {
    /// Number of targets that count.
    pub fn n_target(&self) -> usize {
        self.target.iter().filter(|&&t| t != IGNORED).count()
    }
}

/// What training and evaluation share: a part, and how its documents become rows.
#[derive(Clone, Debug)]
struct Rows {
    part: Part,
    layout: Layout,
    context: usize,
    bos: Option<u32>,
    /// Follows each document when packed, pads rows of one document.
    end_of_text: Option<u32>,
    token_bytes: Arc<[u32]>, // [n_vocab]
    /// Tokens of all documents with what follows them.
    stream_len: u64,
}

/// An order of documents. Packed, they form a ring of `stream_len` tokens.
#[derive(Clone, Debug)]
struct Order {
    documents: Permutation,
    /// Where in the stream every [`STRIDE`]-th document in this order begins; the rest is found by walking.
    starts: Vec<u64>, // [ceil(n_document / STRIDE)]
}

const STRIDE: usize = 64;

impl Rows {
    fn new(part: Part, vocabulary: &Vocabulary, layout: Layout, context: usize) -> Result<Self, DataError> {
        let (shard, n_vocab) = (part.shard().index().n_vocab, vocabulary.token_bytes.len() as u64);
        if shard != n_vocab {
            let path = part.shard().folder().to_owned();
            return Err(DataError::OtherTokenizer { path, shard, tokenizer: n_vocab });
        }
        if layout == Layout::OneDocumentPerRow && vocabulary.end_of_text.is_none() {
            return Err(DataError::NoEndOfText);
        }
        let n_separator = if vocabulary.end_of_text.is_some() { part.n_document() } else { 0 };
        Ok(Self {
            stream_len: part.n_token() + n_separator,
            part,
            layout,
            context,
            bos: vocabulary.bos,
            end_of_text: vocabulary.end_of_text,
            token_bytes: vocabulary.token_bytes.clone(),
        })
    }

    /// Packed rows need one whole row, with the target after its last token.
    fn check_length(&self, name: &'static str) -> Result<(), DataError> {
        let enough = match self.layout {
            Layout::Packed => self.stream_len > self.context as u64,
            Layout::OneDocumentPerRow => self.part.n_document() > 0,
        };
        if enough && self.context > 0 {
            return Ok(());
        }
        Err(DataError::TooShort { part: name, n_token: self.part.n_token(), context: self.context })
    }

    fn order(&self, documents: Permutation) -> Order {
        let mut starts = Vec::new();
        if self.layout == Layout::Packed {
            let mut at = 0;
            for rank in 0..self.part.n_document() {
                if rank.is_multiple_of(STRIDE as u64) {
                    starts.push(at);
                }
                at += self.len_in_stream(documents.at(rank));
            }
        }
        Order { documents, starts }
    }

    fn len_in_stream(&self, document: u64) -> u64 {
        length(&self.part.document(document)) + u64::from(self.end_of_text.is_some())
    }

    fn batch(&self, n_row: usize) -> Batch {
        let size = n_row * self.context;
        Batch { n_row: 0, input: Vec::with_capacity(size), target: Vec::with_capacity(size), mask: None, n_bytes: 0 }
    }

    /// Adds the row that starts at position `at` of the ring and has `n_target` <= `context` targets.
    fn push_packed(&self, batch: &mut Batch, order: &Order, at: u64, n_target: usize) -> Result<(), DataError> {
        let mut ids = Vec::with_capacity(self.context + 1); // [n_target + 1]
        self.read_ring(order, at, n_target + 1, &mut ids)?;
        let targets = ids.split_off(1);
        ids.extend(&targets[..n_target - 1]);
        self.push(batch, ids, targets.iter().map(|&id| id as i32).collect());
        Ok(())
    }

    /// Adds the row of one document.
    fn push_document(&self, batch: &mut Batch, document: u64) -> Result<(), DataError> {
        let mut ids: Vec<u32> = self.bos.into_iter().collect(); // [at most context]
        let tokens = self.part.document(document);
        let n_kept = length(&tokens).min((self.context - ids.len()) as u64);
        self.part.shard().read(tokens.start..tokens.start + n_kept, &mut ids)?;
        let is_target = |&id: &u32| if Some(id) == self.end_of_text { IGNORED } else { id as i32 };
        let targets = ids[1..].iter().map(is_target).collect();
        self.push(batch, ids, targets);
        Ok(())
    }

    /// Adds a row, padding it to `context`.
    fn push(&self, batch: &mut Batch, input: Vec<u32>, target: Vec<i32>) {
        let n_padding = self.context - input.len();
        if n_padding > 0 || batch.mask.is_some() {
            let before = batch.input.len();
            let mask = batch.mask.get_or_insert_with(|| vec![true; before]);
            mask.resize(before + input.len(), true);
            mask.resize(before + self.context, false);
        }
        batch.n_row += 1;
        batch.n_bytes +=
            target.iter().filter_map(|&t| self.token_bytes.get(t as usize)).map(|&n| u64::from(n)).sum::<u64>();
        batch.input.extend(input);
        batch.input.resize(batch.n_row * self.context, self.end_of_text.unwrap_or(0));
        batch.target.extend(target);
        batch.target.resize(batch.n_row * self.context, IGNORED);
    }

    /// Appends `n` tokens from position `at` of the ring.
    fn read_ring(&self, order: &Order, at: u64, n: usize, ids: &mut Vec<u32>) -> Result<(), DataError> {
        let block = order.starts.partition_point(|&start| start <= at) - 1;
        let (mut rank, mut skip) = ((block * STRIDE) as u64, at - order.starts[block]);
        let n_document = self.part.n_document();
        loop {
            let len = self.len_in_stream(order.documents.at(rank));
            if skip < len {
                break;
            }
            skip -= len;
            rank += 1;
        }
        let end = ids.len() + n;
        while ids.len() < end {
            let tokens = self.part.document(order.documents.at(rank));
            let from = (tokens.start + skip).min(tokens.end);
            let to = tokens.end.min(from + (end - ids.len()) as u64);
            self.part.shard().read(from..to, ids)?;
            if ids.len() < end {
                ids.extend(self.end_of_text);
            }
            (rank, skip) = ((rank + 1) % n_document, 0);
        }
        Ok(())
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
/// Batch `i` depends on nothing but the part, the options and `i`, so training resumes at any batch.
#[derive(Clone, Debug)]
pub struct Batches {
    rows: Rows,
    batch_size: usize,
    seed: u64,
    /// The epoch that the last batch was in, kept because making one takes a pass over the document index.
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
    /// Batches of `batch_size` rows of `context` tokens of `part`.
    ///
    /// # Errors
    /// [`DataError::TooShort`] if there is not one row, [`DataError::OtherTokenizer`], [`DataError::NoEndOfText`].
    pub fn new(
        part: Part,
        vocabulary: &Vocabulary,
        layout: Layout,
        context: usize,
        batch_size: usize,
        seed: u64,
    ) -> Result<Self, DataError> {
        let rows = Rows::new(part, vocabulary, layout, context)?;
        rows.check_length("training")?;
        let epoch = Epoch::new(&rows, seed, 0);
        Ok(Self { rows, batch_size, seed, epoch })
    }

    /// Rows in an epoch.
    pub fn rows_per_epoch(&self) -> u64 {
        n_row_of_epoch(&self.rows)
    }

    /// Batches that cover `epochs` epochs, the last one perhaps reaching into the next.
    pub fn batches_in(&self, epochs: f64) -> u64 {
        ((self.rows_per_epoch() as f64 * epochs / self.batch_size as f64).ceil() as u64).max(1)
    }

    /// Epochs completed before batch `index`.
    pub fn epochs_before(&self, index: u64) -> f64 {
        index as f64 * self.batch_size as f64 / self.rows_per_epoch() as f64
    }

    /// Batch number `index`, from 0.
    ///
    /// # Errors
    /// [`DataError::Damaged`] if the shard holds ids outside the vocabulary.
    pub fn batch_at(&mut self, index: u64) -> Result<Batch, DataError> {
        let mut batch = self.rows.batch(self.batch_size);
        let n_row = u128::from(self.rows_per_epoch());
        for i in 0..self.batch_size {
            let row = u128::from(index) * self.batch_size as u128 + i as u128;
            let (number, row) = ((row / n_row) as u64, (row % n_row) as u64);
            if self.epoch.number != number {
                self.epoch = Epoch::new(&self.rows, self.seed, number);
            }
            let Epoch { order, rows, phase, .. } = &self.epoch;
            match self.rows.layout {
                Layout::Packed => {
                    let at = phase + rows.at(row) * self.rows.context as u64;
                    self.rows.push_packed(&mut batch, order, at % self.rows.stream_len, self.rows.context)?;
                }
                Layout::OneDocumentPerRow => self.rows.push_document(&mut batch, order.documents.at(row))?,
            }
        }
        Ok(batch)
    }
}

fn n_row_of_epoch(rows: &Rows) -> u64 {
    match rows.layout {
        Layout::Packed => rows.stream_len / rows.context as u64,
        Layout::OneDocumentPerRow => rows.part.n_document(),
    }
}

impl Epoch {
    fn new(rows: &Rows, seed: u64, number: u64) -> Self {
        // One stream of random numbers for each use.
        let random = |usage: u64| hash(&[seed, number, usage]);
        Self {
            number,
            order: rows.order(Permutation::shuffled(rows.part.n_document(), random(0))),
            rows: Permutation::shuffled(n_row_of_epoch(rows), random(1)),
            phase: random(2) % rows.stream_len,
        }
    }
}

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
        rows.check_length("held-out")?;
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
