//! Builds a shard: one reader, all threads tokenizing, one writer in reading order, with a bounded number of blocks
//! between them; or finds that the shard built before still holds.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use param_model::Tokenizer;
use param_model::atomic::{PARTIAL_SUFFIX, write_folder};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::DataError;
use super::encode::{Cache, Encoder};
use super::read::{BLOCK, Block, Piece, Reader};
use super::report::{Reason, Skipped};
use super::shard::{DOCUMENTS, INDEX, Index, KEY_LEN, Recipe, Shard, TOKENS, VERSION, hex};
use super::source::{SourceFile, join};

/// Blocks per thread between reader and writer: enough that all threads are busy until the last few blocks of a group.
const BLOCKS_PER_THREAD: usize = 8;

/// How far the building of a shard is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes read from disk.
    pub disk_bytes: u64,
    /// Bytes there are on disk.
    pub total_disk_bytes: u64,
    /// Tokens written.
    pub n_token: u64,
}

/// Whether a shard could be used again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reuse {
    /// It was there and is made from the same files, with the same tokenizer and options.
    Reused,
    /// It was built now.
    Built(Why),
}

/// Why a shard was built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// There was none.
    First,
    /// The one there was made with another tokenizer.
    Tokenizer,
    /// It was made from other files, or one of them has another size or time of change: the first that differs.
    Source(PathBuf),
    /// It was made from another text field or by another version of this program.
    Options,
    /// It was damaged.
    Damaged(String),
}

/// The shard of `sources` in `folder`, which holds one at a time: reused if it is still right, else built, after which
/// the one it replaces is deleted. A failed or cancelled build leaves what was there and nothing half-written.
///
/// Runs on the current rayon pool; `progress` is called a few times per second on the calling thread, and once
/// `cancel` is set the build stops with [`DataError::Cancelled`]. The result does not depend on the number of threads.
///
/// # Errors
/// [`DataError::Read`], [`DataError::Binary`] and [`DataError::NotUtf8`] (a file that is not text and was found rather than
/// named is passed over, if its first block shows it); [`DataError::NoGoodLine`] for a JSONL or Parquet file named by itself in
/// which no line or row is good; [`DataError::Parquet`], [`DataError::NoColumn`] and [`DataError::ColumnType`];
/// [`DataError::NoText`]; [`DataError::DiskFull`] and [`DataError::Write`].
pub fn prepare(
    folder: &Path,
    sources: &[SourceFile],
    text_field: &str,
    tokenizer: &Tokenizer,
    progress: &mut dyn FnMut(Progress),
    cancel: &AtomicBool,
) -> Result<(Shard, Reuse), DataError> {
    let recipe = Recipe {
        version: VERSION,
        tokenizer: hex(&Sha256::digest(tokenizer.json())),
        text_field: text_field.to_owned(),
        sources: sources.to_vec(),
    };
    let key = recipe.key().map_err(|e| DataError::write(folder, e.into()))?;
    let place = folder.join(&key);
    let earlier = others(folder, &key);
    let why = match Shard::open(&place) {
        Ok(shard) if shard.index().recipe == recipe => return Ok((shard, Reuse::Reused)),
        Ok(_) => Why::Damaged(format!("{INDEX} does not fit the folder's name")),
        Err(_) if !place.exists() => why_not(&earlier, &recipe),
        Err(e) => Why::Damaged(e.to_string()),
    };
    if place.exists() {
        fs::remove_dir_all(&place).map_err(|e| DataError::write(&place, e))?;
    }
    write_folder(&place, |partial| Ok(build(partial, recipe, tokenizer, progress, cancel)?)).map_err(|e| match e {
        Failure::Data(e) => e,
        Failure::Folder(e) => DataError::write(&place, e),
    })?;
    for old in earlier {
        fs::remove_dir_all(&old).map_err(|e| DataError::write(&old, e))?;
    }
    Ok((Shard::open(&place)?, Reuse::Built(why)))
}

/// Tells apart what went wrong inside the folder from what went wrong with it.
enum Failure {
    Data(DataError),
    Folder(io::Error),
}

impl From<DataError> for Failure {
    fn from(e: DataError) -> Self {
        Self::Data(e)
    }
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Self {
        Self::Folder(e)
    }
}

/// Folders of other shards, finished or abandoned, recognised by their names.
fn others(folder: &Path, key: &str) -> Vec<PathBuf> {
    let is_shard = |name: &str| {
        let stem = name.strip_suffix(PARTIAL_SUFFIX).unwrap_or(name);
        stem.len() == KEY_LEN && stem != key && stem.bytes().all(|b| b.is_ascii_hexdigit())
    };
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().filter(|e| e.path().is_dir());
    entries.filter(|e| e.file_name().to_str().is_some_and(is_shard)).map(|e| e.path()).collect()
}

fn why_not(earlier: &[PathBuf], recipe: &Recipe) -> Why {
    let Some(old) = earlier.iter().find_map(|folder| Shard::open(folder).ok()) else { return Why::First };
    let old = &old.index().recipe;
    if old.tokenizer != recipe.tokenizer {
        return Why::Tokenizer;
    }
    let longest = old.sources.len().max(recipe.sources.len());
    match (0..longest).find(|&i| old.sources.get(i) != recipe.sources.get(i)) {
        Some(i) => {
            let changed = recipe.sources.get(i).or(old.sources.get(i));
            Why::Source(changed.map(|s| s.path.clone()).unwrap_or_default())
        }
        None => Why::Options,
    }
}

fn build(
    folder: &Path,
    recipe: Recipe,
    tokenizer: &Tokenizer,
    progress: &mut dyn FnMut(Progress),
    cancel: &AtomicBool,
) -> Result<(), DataError> {
    let (sources, field) = (&recipe.sources, &recipe.text_field);
    let encoder = Encoder::new(tokenizer);
    let n_thread = rayon::current_num_threads();
    let caches: Vec<Mutex<Cache>> = (0..n_thread).map(|_| Mutex::default()).collect();
    let total_disk_bytes = sources.iter().map(|s| s.size).sum();
    let mut reader = Reader::new(sources, field);
    let mut writer = Writer::create(folder, sources, field, tokenizer.n_vocab() as u64)?;

    let mut read = next_group(&mut reader, n_thread)?;
    let mut encoded = Vec::new();
    while !read.is_empty() || !encoded.is_empty() {
        let (fresh, next) = rayon::join(
            || {
                let encode = |block: Block| {
                    if cancel.load(Ordering::Relaxed) {
                        return Err(DataError::Cancelled);
                    }
                    let cache = &caches[rayon::current_thread_index().unwrap_or(0)];
                    let mut cache = cache.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                    Encoded::new(&encoder, &mut cache, &block, field)
                        .map_err(|source| DataError::Tokenize { path: sources[block.file].path.clone(), source })
                };
                read.into_par_iter().map(encode).collect::<Vec<_>>()
            },
            || {
                encoded.into_iter().try_for_each(|block| writer.append(block?))?;
                next_group(&mut reader, n_thread)
            },
        );
        (encoded, read) = (fresh, next?);
        progress(Progress { disk_bytes: reader.disk_bytes(), total_disk_bytes, n_token: writer.n_token });
    }
    let skipped = reader.skipped;
    writer.finish(skipped, recipe.clone())
}

fn next_group(reader: &mut Reader, n_thread: usize) -> Result<Vec<Block>, DataError> {
    // Small files make small blocks; the limit on their number keeps a group of them from opening too many at once.
    let (mut group, mut bytes) = (Vec::new(), 0);
    while bytes < n_thread * BLOCKS_PER_THREAD * BLOCK && group.len() < n_thread * BLOCKS_PER_THREAD * 64 {
        let Some(block) = reader.next().transpose()? else { break };
        bytes += block.n_byte();
        group.push(block);
    }
    Ok(group)
}

/// The tokens of a block.
struct Encoded {
    file: usize,
    ends_file: bool,
    ids: Vec<u32>,
    /// Tokens and bytes of text up to the end of each document that ends in the block, and at last up to its own end.
    ends: Vec<(usize, u64)>,
    /// How many lines, rows or row groups were bad, and the number of the first.
    bad: BTreeMap<Reason, (u64, u64)>,
}

impl Encoded {
    fn new(encoder: &Encoder, cache: &mut Cache, block: &Block, field: &str) -> Result<Self, param_model::Error> {
        let (mut ids, mut n_byte, mut ends) = (Vec::with_capacity(block.n_byte() / 3), 0, Vec::new());
        let mut bad = BTreeMap::new();
        for piece in block.pieces(field) {
            match piece {
                Piece::Text { text, ends: document_ends } => {
                    encoder.encode(cache, &text, &mut ids)?;
                    n_byte += text.len() as u64;
                    if document_ends {
                        ends.push((ids.len(), n_byte));
                    }
                }
                Piece::Bad { reason, number } => bad.entry(reason).or_insert((0, number)).0 += 1,
            }
        }
        ends.push((ids.len(), n_byte));
        Ok(Self { file: block.file, ends_file: block.ends_file, ids, ends, bad })
    }
}

/// Writes the files of a shard and keeps its totals.
struct Writer<'a> {
    sources: &'a [SourceFile],
    field: &'a str,
    tokens: Output,
    documents: Output,
    index_path: PathBuf,
    n_vocab: u64,
    n_document: u64,
    n_token: u64,
    n_byte: u64,
    /// Tokens and bytes of the document that has begun and not ended.
    open: (u64, u64),
    /// `n_document` at the start of the current file.
    documents_before_file: u64,
    skipped_in_file: Skipped,
    skipped: Skipped,
}

impl<'a> Writer<'a> {
    fn create(folder: &Path, sources: &'a [SourceFile], field: &'a str, n_vocab: u64) -> Result<Self, DataError> {
        let mut documents = Output::create(folder.join(DOCUMENTS))?;
        documents.write(&[0; 16])?;
        Ok(Self {
            sources,
            field,
            tokens: Output::create(folder.join(TOKENS))?,
            documents,
            index_path: folder.join(INDEX),
            n_vocab,
            n_document: 0,
            n_token: 0,
            n_byte: 0,
            open: (0, 0),
            documents_before_file: 0,
            skipped_in_file: Skipped::default(),
            skipped: Skipped::default(),
        })
    }

    fn append(&mut self, block: Encoded) -> Result<(), DataError> {
        let path = &self.sources[block.file].path;
        for (reason, (count, first)) in block.bad {
            self.skipped_in_file.add(reason, count, || reason.place(path, first));
        }
        let bytes: Vec<u8> = if self.n_vocab <= 1 << 16 {
            block.ids.iter().flat_map(|&id| (id as u16).to_le_bytes()).collect()
        } else {
            block.ids.iter().flat_map(|id| id.to_le_bytes()).collect()
        };
        self.tokens.write(&bytes)?;
        let (mut done, last) = ((0, 0), block.ends.len() - 1);
        for (i, end) in block.ends.into_iter().enumerate() {
            self.open.0 += (end.0 - done.0) as u64;
            self.open.1 += end.1 - done.1;
            done = end;
            if i < last {
                self.end_document()?;
            }
        }
        if block.ends_file { self.end_file(block.file) } else { Ok(()) }
    }

    fn end_document(&mut self) -> Result<(), DataError> {
        let (n_token, n_byte) = std::mem::take(&mut self.open);
        if n_token == 0 {
            return Ok(()); // a normalizer may leave nothing of a text
        }
        self.n_document += 1;
        self.n_token += n_token;
        self.n_byte += n_byte;
        let entry = [self.n_token.to_le_bytes(), self.n_byte.to_le_bytes()];
        self.documents.write(entry.as_flattened())
    }

    fn end_file(&mut self, file: usize) -> Result<(), DataError> {
        let (source, skipped) = (&self.sources[file], std::mem::take(&mut self.skipped_in_file));
        if self.n_document == self.documents_before_file {
            if source.named && !skipped.is_empty() {
                let (path, field) = (source.path.clone(), self.field.to_owned());
                return Err(DataError::NoGoodLine { path, field, skipped });
            }
            if skipped.is_empty() {
                self.skipped.add(Reason::EmptyFile, 1, || source.path.display().to_string());
            }
        }
        self.documents_before_file = self.n_document;
        self.skipped.merge(skipped);
        Ok(())
    }

    /// `skipped` and what the writer itself saw go into the index.
    fn finish(mut self, skipped: Skipped, recipe: Recipe) -> Result<(), DataError> {
        self.skipped.merge(skipped);
        if self.n_document == 0 {
            let paths: Vec<_> = self.sources.iter().map(|s| &s.path).collect();
            return Err(DataError::NoText { inputs: join(&paths), skipped: self.skipped });
        }
        let mut digest = Sha256::new();
        digest.update(self.tokens.finish()?);
        digest.update(self.documents.finish()?);
        let index = Index {
            recipe,
            n_vocab: self.n_vocab,
            n_document: self.n_document,
            n_token: self.n_token,
            n_byte: self.n_byte,
            digest: hex(&digest.finalize()),
            skipped: self.skipped,
        };
        let json = serde_json::to_vec_pretty(&index).map_err(|e| DataError::write(&self.index_path, e.into()))?;
        fs::write(&self.index_path, json).map_err(|e| DataError::write(&self.index_path, e))
    }
}

/// A file being written, its digest, and its name for errors.
struct Output {
    path: PathBuf,
    file: BufWriter<File>,
    digest: Sha256,
}

impl Output {
    fn create(path: PathBuf) -> Result<Self, DataError> {
        let file = File::create(&path).map_err(|e| DataError::write(&path, e))?;
        Ok(Self { path, file: BufWriter::with_capacity(1 << 20, file), digest: Sha256::new() })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        self.digest.update(bytes);
        self.file.write_all(bytes).map_err(|e| DataError::write(&self.path, e))
    }

    fn finish(mut self) -> Result<impl AsRef<[u8]>, DataError> {
        self.file.flush().map_err(|e| DataError::write(&self.path, e))?;
        Ok(self.digest.finalize())
    }
}
