//! Cuts the documents of a part into rows of tokens.

use std::sync::Arc;

use param_model::Tokenizer;

use super::DataError;
use super::batch::{Batch, IGNORED};
use super::permute::Permutation;
use super::split::{Part, length};

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

/// What training and evaluation share: a part, and how its documents become rows.
#[derive(Clone, Debug)]
pub struct Rows {
    pub part: Part,
    pub layout: Layout,
    pub context: usize,
    bos: Option<u32>,
    /// Follows each document when packed, pads rows of one document.
    pub end_of_text: Option<u32>,
    token_bytes: Arc<[u32]>, // [n_vocab]
    /// Marks where in a packed row documents begin.
    pub isolate: bool,
    /// Tokens of all documents with what follows them.
    pub stream_len: u64,
}

/// An order of documents. Packed, they form a ring of `stream_len` tokens.
#[derive(Clone, Debug)]
pub struct Order {
    pub documents: Permutation,
    /// Where in the stream every [`STRIDE`]-th document in this order begins; the rest is found by walking.
    starts: Vec<u64>, // [ceil(n_document / STRIDE)]
}

const STRIDE: usize = 64;

impl Rows {
    pub fn new(part: Part, vocabulary: &Vocabulary, layout: Layout, context: usize) -> Result<Self, DataError> {
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
            isolate: false,
            bos: vocabulary.bos,
            end_of_text: vocabulary.end_of_text,
            token_bytes: vocabulary.token_bytes.clone(),
        })
    }

    /// Packed rows need one whole row, with the target after its last token.
    pub fn check_length(&self, name: &str) -> Result<(), DataError> {
        let enough = match self.layout {
            Layout::Packed => self.stream_len > self.context as u64,
            Layout::OneDocumentPerRow => self.part.n_document() > 0,
        };
        if enough && self.context > 0 {
            return Ok(());
        }
        Err(DataError::TooShort { part: name.to_owned(), n_token: self.part.n_token(), context: self.context })
    }

    pub fn order(&self, documents: Permutation) -> Order {
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

    pub fn batch(&self, n_row: usize) -> Batch {
        let size = n_row * self.context;
        Batch {
            n_row: 0,
            input: Vec::with_capacity(size),
            target: Vec::with_capacity(size),
            mask: None,
            first: None,
            n_bytes: 0,
        }
    }

    /// Adds the row that starts at position `at` of the ring and has `n_target` <= `context` targets.
    pub fn push_packed(&self, batch: &mut Batch, order: &Order, at: u64, n_target: usize) -> Result<(), DataError> {
        let mut ids = Vec::with_capacity(self.context + 1); // [n_target + 1]
        let mut starts = Vec::new();
        self.read_ring(order, at, n_target + 1, &mut ids, &mut starts)?;
        if self.isolate {
            let first = batch.first.get_or_insert_default();
            let from = first.len();
            first.resize(from + self.context, 0);
            for start in starts.into_iter().filter(|&start| start < self.context) {
                first[from + start..].fill(start as u32);
            }
        }
        let targets = ids.split_off(1);
        ids.extend(&targets[..n_target - 1]);
        self.push(batch, ids, targets.iter().map(|&id| id as i32).collect());
        Ok(())
    }

    /// Adds the row of one document.
    pub fn push_document(&self, batch: &mut Batch, document: u64) -> Result<(), DataError> {
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

    /// Appends `n` tokens from position `at` of the ring; `starts` gets the places where documents begin after one that was
    /// before them. They begin with the end-of-text before them, as they do when a model is run.
    fn read_ring(
        &self,
        order: &Order,
        at: u64,
        n: usize,
        ids: &mut Vec<u32>,
        starts: &mut Vec<usize>,
    ) -> Result<(), DataError> {
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
                starts.push(ids.len());
                ids.extend(self.end_of_text);
            }
            (rank, skip) = ((rank + 1) % n_document, 0);
        }
        Ok(())
    }
}
