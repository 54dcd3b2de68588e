//! Streams source files as blocks of whole lines (JSONL), rows (Parquet) or cut text, so that no file is ever held whole.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::DataError;
use super::cut::last_cut;
use super::jsonl;
use super::parquet::{ParquetFile, Row};
use super::report::{Reason, Skipped};
use super::source::{Compression, Format, SourceFile};

/// Bytes of text in a block: small enough that a few per thread balance the work, large enough to hide their cost.
pub const BLOCK: usize = 256 << 10;
/// A text without any good place to cut grows its block up to here and is then cut between two characters.
pub const MAX_BLOCK: usize = 16 << 20;
/// Longest JSONL line read; a longer one is passed over without being held.
pub const MAX_LINE: usize = 256 << 20;

/// A stretch of one file's decoded bytes.
#[derive(Debug)]
pub struct Block {
    /// Index of the file in the list given to [`Reader::new`].
    pub file: usize,
    /// The stretch itself.
    pub content: Content,
    /// The file ends here (and with it, for [`Content::Text`], the document).
    pub ends_file: bool,
}

/// What a block holds.
#[derive(Debug)]
pub enum Content {
    /// A part of one document.
    Text(String),
    /// Whole lines, the last one perhaps without its newline.
    Lines {
        /// Number of the first line in its file, from 1.
        first_line: u64,
        /// Not yet checked to be UTF-8.
        bytes: Vec<u8>,
    },
    /// Rows of a table.
    Rows {
        /// Number of the first row in its file, from 1.
        first_row: u64,
        /// What each has in the text column.
        texts: Vec<Row>,
        /// Bytes of all texts and of the list.
        n_byte: usize,
    },
    /// A line over [`MAX_LINE`] or the damaged rest of a row group, by its number in the file.
    Bad(Reason, u64),
}

/// What a block gives.
pub enum Piece<'a> {
    /// Text of a document that goes on in the next block unless it `ends` here.
    Text {
        /// May be empty where a document ends exactly with its last block but one.
        text: Cow<'a, str>,
        /// The document ends with this piece.
        ends: bool,
    },
    /// A line, row or row group without a document.
    Bad {
        /// Why.
        reason: Reason,
        /// Its number in the file, from 1.
        number: u64,
    },
}

impl Block {
    /// The pieces of text in the block, in order; `field` is where JSON lines have theirs.
    pub fn pieces<'a>(&'a self, field: &'a str) -> Box<dyn Iterator<Item = Piece<'a>> + 'a> {
        match &self.content {
            Content::Text(text) => {
                Box::new(std::iter::once(Piece::Text { text: Cow::Borrowed(text), ends: self.ends_file }))
            }
            Content::Bad(reason, number) => Box::new(std::iter::once(Piece::Bad { reason: *reason, number: *number })),
            Content::Rows { first_row, texts, .. } => {
                let rows = (*first_row..).zip(texts);
                Box::new(rows.map(|(number, text)| match row_text(text) {
                    Ok(text) => Piece::Text { text: Cow::Borrowed(text), ends: true },
                    Err(reason) => Piece::Bad { reason, number },
                }))
            }
            Content::Lines { first_line, bytes } => {
                let lines = (*first_line..).zip(bytes.split(|&b| b == b'\n'));
                Box::new(lines.filter_map(move |(line, bytes)| match jsonl::document(bytes, field) {
                    Ok(None) => None,
                    Ok(Some(text)) => Some(Piece::Text { text, ends: true }),
                    Err(reason) => Some(Piece::Bad { reason, number: line }),
                }))
            }
        }
    }

    /// Bytes held.
    pub fn n_byte(&self) -> usize {
        match &self.content {
            Content::Text(text) => text.len(),
            Content::Lines { bytes, .. } => bytes.len(),
            Content::Rows { n_byte, .. } => *n_byte,
            Content::Bad(..) => 0,
        }
    }
}

/// The document of a row.
fn row_text(text: &Row) -> Result<&str, Reason> {
    let bytes = text.as_ref().ok_or(Reason::MissingField)?.data();
    let text = std::str::from_utf8(bytes).map_err(|_| Reason::NotUtf8Line)?;
    if text.trim().is_empty() { Err(Reason::EmptyText) } else { Ok(text) }
}

/// Reads all source files in order, block by block. A byte order mark is dropped; line ends of text stay as they are.
///
/// A file that turns out binary or not UTF-8 is an error if it was named, or found out only after its first block;
/// one that came from a folder or glob is passed over and counted.
pub struct Reader<'a> {
    sources: &'a [SourceFile],
    field: &'a str,
    next: usize,
    open: Option<OpenFile>,
    disk_bytes: Arc<AtomicU64>,
    limits: Limits,
    /// Files passed over so far.
    pub skipped: Skipped,
}

/// [`BLOCK`] and its kin, smaller in tests.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub block: usize,
    pub max_block: usize,
    pub max_line: usize,
}

/// Those of every reader outside tests.
pub(super) const LIMITS: Limits = Limits { block: BLOCK, max_block: MAX_BLOCK, max_line: MAX_LINE };

impl<'a> Reader<'a> {
    /// A reader at the start of the first file; `field` names the column of tables.
    pub fn new(sources: &'a [SourceFile], field: &'a str) -> Self {
        Self::with_limits(sources, field, LIMITS)
    }

    pub(super) fn with_limits(sources: &'a [SourceFile], field: &'a str, limits: Limits) -> Self {
        Self { sources, field, next: 0, open: None, disk_bytes: Arc::default(), limits, skipped: Skipped::default() }
    }

    /// Bytes read from disk so far (compressed ones where a file is compressed).
    pub fn disk_bytes(&self) -> u64 {
        self.disk_bytes.load(Ordering::Relaxed)
    }

    fn next_block(&mut self) -> Result<Option<Block>, DataError> {
        loop {
            let (file, open) = match &mut self.open {
                Some(open) => (self.next - 1, open),
                None => {
                    let Some(source) = self.sources.get(self.next) else { return Ok(None) };
                    self.next += 1;
                    (self.next - 1, self.open.insert(OpenFile::new(source, self.field, 0, self.disk_bytes.clone())?))
                }
            };
            let first = open.is_at_start();
            let block = match open.next_block(self.limits) {
                Ok((content, ends_file)) => Block { file, content, ends_file },
                Err(DataError::Binary { path, .. } | DataError::NotUtf8 { path, .. })
                    if first && !self.sources[file].named =>
                {
                    self.pass_over(Reason::BinaryFile, path);
                    continue;
                }
                Err(e) => return Err(e),
            };
            if block.ends_file {
                if first && matches!(&block.content, Content::Text(text) if text.trim().is_empty()) {
                    self.pass_over(Reason::EmptyFile, self.sources[file].path.clone());
                    continue;
                }
                self.open = None;
            }
            return Ok(Some(block));
        }
    }

    fn pass_over(&mut self, reason: Reason, path: PathBuf) {
        self.skipped.add(reason, 1, || path.display().to_string());
        self.open = None;
    }
}

impl Iterator for Reader<'_> {
    type Item = Result<Block, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_block().transpose()
    }
}

/// One file being read.
pub enum OpenFile {
    /// From front to back.
    Stream(Stream),
    /// By its own index.
    Parquet(Box<ParquetFile>),
}

impl OpenFile {
    /// Opens a file at its start; an uncompressed one also at the first line (of a text without lines: character; of a table:
    /// row group) that starts after byte `offset`.
    pub fn new(source: &SourceFile, field: &str, offset: u64, disk_bytes: Arc<AtomicU64>) -> Result<Self, DataError> {
        Ok(match source.format {
            Format::Parquet => Self::Parquet(Box::new(ParquetFile::open(source, field, offset, disk_bytes)?)),
            Format::Text | Format::JsonLines => Self::Stream(Stream::new(source, offset, disk_bytes)?),
        })
    }

    /// The next block's content, and whether the file ends with it.
    pub(super) fn next_block(&mut self, limits: Limits) -> Result<(Content, bool), DataError> {
        match self {
            Self::Stream(stream) => stream.next_block(limits),
            Self::Parquet(file) => file.next_block(limits.block),
        }
    }

    /// Nothing of a text has been handed out yet.
    fn is_at_start(&self) -> bool {
        matches!(self, Self::Stream(stream) if stream.at_start)
    }
}

/// A file read from front to back.
pub struct Stream {
    path: PathBuf,
    format: Format,
    input: Box<dyn Read + Send>,
    /// Decoded bytes read but not yet handed out.
    buffer: Vec<u8>,
    /// Offset of `buffer` in the decoded bytes.
    offset: u64,
    /// Number of the line at the start of `buffer`.
    line: u64,
    at_start: bool,
    eof: bool,
}

impl Stream {
    fn new(source: &SourceFile, offset: u64, disk_bytes: Arc<AtomicU64>) -> Result<Self, DataError> {
        let error = |e| DataError::read(&source.path, e);
        let mut file = File::open(&source.path).map_err(error)?;
        file.seek(SeekFrom::Start(offset)).map_err(error)?;
        let counted = Counted { file, disk_bytes };
        let input: Box<dyn Read + Send> = match source.compression {
            Compression::None => Box::new(counted),
            Compression::Gzip => {
                Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::with_capacity(BLOCK, counted)))
            }
            Compression::Zstd => Box::new(zstd::Decoder::new(counted).map_err(error)?),
        };
        let mut open = Self {
            path: source.path.clone(),
            format: source.format,
            input,
            buffer: Vec::new(),
            offset,
            line: 1,
            at_start: offset == 0,
            eof: false,
        };
        if offset > 0 {
            open.fill(BLOCK)?;
            let into_line = memchr::memchr(b'\n', &open.buffer).map(|newline| newline + 1);
            let into_char = || open.buffer.iter().take_while(|&&b| b & 0xC0 == 0x80).count();
            let skip = into_line.unwrap_or_else(into_char);
            open.buffer.drain(..skip);
            open.offset += skip as u64;
        }
        Ok(open)
    }

    fn next_block(&mut self, limits: Limits) -> Result<(Content, bool), DataError> {
        if self.at_start {
            self.fill(limits.block)?;
            if self.buffer.starts_with(b"\xEF\xBB\xBF") {
                self.buffer.drain(..3);
                self.offset = 3;
            }
            self.at_start = false;
        }
        match self.format {
            Format::JsonLines => self.next_lines(limits),
            _ => self.next_text(limits),
        }
    }

    fn next_text(&mut self, limits: Limits) -> Result<(Content, bool), DataError> {
        let mut target = limits.block;
        loop {
            self.fill(target)?;
            if let Some(at) = memchr::memchr(0, &self.buffer) {
                return Err(DataError::Binary { path: self.path.clone(), offset: self.offset + at as u64 });
            }
            let text = match std::str::from_utf8(&self.buffer) {
                Ok(text) => text,
                // The block ends inside a character.
                Err(e) if e.error_len().is_none() && !self.eof => {
                    std::str::from_utf8(&self.buffer[..e.valid_up_to()]).unwrap_or_default()
                }
                Err(e) => {
                    let utf16 = self.offset == 0
                        && (self.buffer.starts_with(b"\xFF\xFE") || self.buffer.starts_with(b"\xFE\xFF"));
                    let hint = if utf16 { " (it looks like UTF-16: convert it with iconv)" } else { "" };
                    let offset = self.offset + e.valid_up_to() as u64;
                    return Err(DataError::NotUtf8 { path: self.path.clone(), offset, hint });
                }
            };
            let end = match last_cut(text) {
                _ if self.eof => text.len(),
                Some(cut) => cut,
                None if target < limits.max_block => {
                    target = (target * 2).min(limits.max_block);
                    continue;
                }
                None => text.len(),
            };
            let text = text[..end].to_owned();
            self.buffer.drain(..end);
            self.offset += end as u64;
            return Ok((Content::Text(text), self.eof));
        }
    }

    fn next_lines(&mut self, limits: Limits) -> Result<(Content, bool), DataError> {
        let mut target = limits.block.min(limits.max_line);
        loop {
            self.fill(target)?;
            let end = match memchr::memrchr(b'\n', &self.buffer) {
                _ if self.eof => self.buffer.len(),
                Some(newline) => newline + 1,
                None if target < limits.max_line => {
                    target = target.saturating_mul(2).min(limits.max_line);
                    continue;
                }
                None => return self.pass_over_line(limits),
            };
            let rest = self.buffer.split_off(end);
            let bytes = std::mem::replace(&mut self.buffer, rest);
            let first_line = self.line;
            self.line += memchr::memchr_iter(b'\n', &bytes).count() as u64;
            self.offset += end as u64;
            return Ok((Content::Lines { first_line, bytes }, self.eof));
        }
    }

    fn pass_over_line(&mut self, limits: Limits) -> Result<(Content, bool), DataError> {
        let line = self.line;
        loop {
            match memchr::memchr(b'\n', &self.buffer) {
                Some(newline) => {
                    self.buffer.drain(..=newline);
                    self.line += 1;
                    return Ok((Content::Bad(Reason::LineTooLong, line), false));
                }
                None if self.eof => {
                    self.buffer.clear();
                    return Ok((Content::Bad(Reason::LineTooLong, line), true));
                }
                None => {
                    self.buffer.clear();
                    self.fill(limits.block)?;
                }
            }
        }
    }

    /// Reads until the buffer holds `target` bytes or the file ends.
    fn fill(&mut self, target: usize) -> Result<(), DataError> {
        if let Some(missing) = target.checked_sub(self.buffer.len()).filter(|&m| m > 0 && !self.eof) {
            let read = (&mut self.input).take(missing as u64).read_to_end(&mut self.buffer);
            self.eof = read.map_err(|e| DataError::read(&self.path, e))? < missing;
        }
        Ok(())
    }
}

/// Counts what is read from disk, for progress.
struct Counted {
    file: File,
    disk_bytes: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(buffer)?;
        self.disk_bytes.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}
