//! Token shards: a folder with the tokens of a data set and where its documents begin, read through memory maps.
//!
//! `tokens.bin` holds the ids of all documents one after the other, u16 if the vocabulary allows and else u32, without
//! any separator; `documents.bin` holds for each document, and once more for the end, its first token and the bytes of
//! source text before it, two u64 each; `index.json` is an [`Index`]. All numbers are little-endian.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::DataError;
use super::report::Skipped;
use super::source::SourceFile;

pub(super) const TOKENS: &str = "tokens.bin";
pub(super) const DOCUMENTS: &str = "documents.bin";
pub(super) const INDEX: &str = "index.json";
/// Raised whenever a shard written before would no longer be what is built now.
pub(super) const VERSION: u32 = 1;
/// Bytes of an entry of `documents.bin`.
const ENTRY: usize = 16;

/// Everything that decides what a shard contains; if all of it is unchanged, so is the shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recipe {
    /// Version of the layout and of how text is read and cut.
    pub version: u32,
    /// SHA-256 of the tokenizer's JSON, in hex.
    pub tokenizer: String,
    /// Field of JSON lines that holds the text.
    pub text_field: String,
    /// The files, in reading order.
    pub sources: Vec<SourceFile>,
}

impl Recipe {
    /// A name for the shard's folder: the start of the SHA-256 of the recipe, in hex.
    pub(super) fn key(&self) -> Result<String, serde_json::Error> {
        Ok(hex(&Sha256::digest(serde_json::to_vec(self)?))[..KEY_LEN].to_owned())
    }
}

pub(super) const KEY_LEN: usize = 16;

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A name for a folder for the shard of what `input` names: told by people from its start, and another for every input.
pub fn folder_name(input: &Path) -> String {
    let name = input.file_name().unwrap_or_default().to_string_lossy();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let plain: String = name.chars().take(40).map(|c| if is_plain(c) { c } else { '_' }).collect();
    format!("{plain}-{}", &hex(&Sha256::digest(input.as_os_str().as_encoded_bytes()))[..8])
}

/// What `index.json` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    /// What it was made from.
    pub recipe: Recipe,
    /// Token ids are below this.
    pub n_vocab: u64,
    /// Number of documents.
    pub n_document: u64,
    /// Number of tokens.
    pub n_token: u64,
    /// Bytes of source text (UTF-8, decoded from JSON, without byte order marks).
    pub n_byte: u64,
    /// SHA-256 over the SHA-256 of `tokens.bin` and that of `documents.bin`, in hex: equal for equal content.
    pub digest: String,
    /// What was left out.
    pub skipped: Skipped,
}

impl Index {
    /// Bytes of one id in `tokens.bin`.
    pub(super) fn id_len(&self) -> u64 {
        if self.n_vocab <= 1 << 16 { 2 } else { 4 }
    }
}

/// An open shard. It must not be changed while it is open; [`prepare`](super::prepare) never changes one.
#[derive(Debug)]
pub struct Shard {
    folder: PathBuf,
    index: Index,
    tokens: Mmap,    // [n_token] u16 or u32
    documents: Mmap, // [n_document + 1, 2] u64
}

impl Shard {
    /// Maps the shard in `folder`.
    ///
    /// # Errors
    /// [`DataError::Read`] if a file is missing, [`DataError::Damaged`] if the files do not fit each other. Token ids
    /// are checked as they are read, since that needs no pass over all of them.
    pub fn open(folder: &Path) -> Result<Self, DataError> {
        let damaged = |problem: String| DataError::damaged(folder, problem);
        let path = folder.join(INDEX);
        let json = std::fs::read(&path).map_err(|e| DataError::read(&path, e))?;
        let index: Index = serde_json::from_slice(&json).map_err(|e| damaged(format!("{INDEX}: {e}")))?;
        if index.n_vocab > 1 << 32 || index.n_token == 0 || index.n_document == 0 {
            return Err(damaged(format!("{INDEX}: impossible totals")));
        }
        let tokens = map(folder, TOKENS, index.n_token.checked_mul(index.id_len()))?;
        let entries = index.n_document.checked_add(1);
        let documents = map(folder, DOCUMENTS, entries.and_then(|n| n.checked_mul(ENTRY as u64)))?;
        let shard = Self { folder: folder.to_owned(), index, tokens, documents };
        let ends = (shard.entry(0), shard.entry(shard.index.n_document));
        let ordered = (0..shard.index.n_document).all(|i| {
            let (here, next) = (shard.entry(i), shard.entry(i + 1));
            here.0 < next.0 && here.1 <= next.1
        });
        if ends != ((0, 0), (shard.index.n_token, shard.index.n_byte)) || !ordered {
            return Err(damaged(format!("{DOCUMENTS}: documents out of order or not as many tokens as {INDEX} says")));
        }
        Ok(shard)
    }

    /// Where it lies.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What it holds and where that came from.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// The tokens of document `i` < `n_document`, as a range for [`read`](Self::read); never empty.
    pub fn document(&self, i: u64) -> Range<u64> {
        self.entry(i).0..self.entry(i + 1).0
    }

    /// Bytes of source text of document `i` < `n_document`.
    pub fn document_bytes(&self, i: u64) -> u64 {
        self.entry(i + 1).1 - self.entry(i).1
    }

    /// Appends the ids of `tokens`, a range within `0..n_token`, to `ids`.
    ///
    /// # Errors
    /// [`DataError::Damaged`] if an id is outside the vocabulary.
    pub fn read(&self, tokens: Range<u64>, ids: &mut Vec<u32>) -> Result<(), DataError> {
        let (from, id_len) = (ids.len(), self.index.id_len());
        let bytes = &self.tokens[(tokens.start * id_len) as usize..(tokens.end * id_len) as usize];
        match id_len {
            2 => ids.extend(bytes.as_chunks().0.iter().map(|&id| u32::from(u16::from_le_bytes(id)))),
            _ => ids.extend(bytes.as_chunks().0.iter().map(|&id| u32::from_le_bytes(id))),
        }
        match ids[from..].iter().position(|&id| u64::from(id) >= self.index.n_vocab) {
            None => Ok(()),
            Some(i) => {
                let (id, at, n_vocab) = (ids[from + i], tokens.start + i as u64, self.index.n_vocab);
                Err(DataError::damaged(&self.folder, format!("token {at} has id {id}, not below {n_vocab}")))
            }
        }
    }

    /// First token and bytes before it, of document `i` or, for `i == n_document`, of the end.
    fn entry(&self, i: u64) -> (u64, u64) {
        let (numbers, _) = self.documents[i as usize * ENTRY..][..ENTRY].as_chunks();
        (u64::from_le_bytes(numbers[0]), u64::from_le_bytes(numbers[1]))
    }
}

/// Maps a file that must have `len` bytes.
fn map(folder: &Path, name: &str, len: Option<u64>) -> Result<Mmap, DataError> {
    let path = folder.join(name);
    let error = |e: io::Error| DataError::read(&path, e);
    let file = File::open(&path).map_err(error)?;
    let actual = file.metadata().map_err(error)?.len();
    if len != Some(actual) || usize::try_from(actual).is_err() {
        let expected = len.map_or("an impossible number of".to_owned(), |n| n.to_string());
        return Err(DataError::damaged(folder, format!("{name}: expected {expected} bytes, got {actual}")));
    }
    // SAFETY: the file is opened for reading only, and nobody writes to a finished shard: it is built under another
    // name and replaced as a whole, so the mapped file keeps its length and content while it is mapped.
    #[allow(unsafe_code)]
    let map = unsafe { Mmap::map(&file) };
    map.map_err(error)
}
