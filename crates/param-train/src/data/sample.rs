//! Text for making a tokenizer before there are tokens: a bounded sample for BPE, every character for character mode.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::DataError;
use super::cut::last_cut;
use super::parquet::ParquetFile;
use super::read::{Block, LIMITS, OpenFile, Piece, Reader};
use super::report::Skipped;
use super::source::{Compression, Format, SourceFile, join};

/// Large uncompressed files are sampled at a place in each stretch of this many bytes, not only at their start.
const STRETCH: u64 = 16 << 20;

/// About `max_bytes` of the text of `sources`, or all of it if there is less, spread evenly over them by size on disk
/// (within a compressed file only its start can be reached, within a Parquet file the start of each row group). The same
/// files give the same sample. Bad lines, and files found that are not text, are passed over here and reported by
/// [`prepare`](super::prepare).
///
/// # Errors
/// [`DataError::NoText`] if nothing was found; [`DataError::Read`]; [`DataError::Binary`] and [`DataError::NotUtf8`] for a
/// file named by itself.
pub fn sample(sources: &[SourceFile], text_field: &str, max_bytes: usize) -> Result<Vec<String>, DataError> {
    let total: u64 = sources.iter().map(|s| s.size).sum();
    let share = (max_bytes as f64 / total.max(1) as f64).min(1.0);
    let (mut texts, mut skipped, mut taken, mut passed) = (Vec::new(), Skipped::default(), 0, 0);
    let mut stretches = Vec::new();
    for source in sources {
        stretches.extend(self::stretches(source, text_field)?.map(|(offset, len)| (source, offset, len)));
    }
    for (source, offset, len) in stretches {
        passed += len;
        // What lies behind has earned this much; a file too small to earn anything by itself is taken now and then.
        // Compressed text is larger than its file: with room for all of it, no file is cut short.
        let earned = if share < 1.0 { (share * passed as f64) as usize } else { max_bytes };
        let is_packed = source.compression != Compression::None || source.format == Format::Parquet;
        let bound = if is_packed { usize::MAX } else { len as usize };
        if let Some(wanted) = earned.checked_sub(taken).filter(|&wanted| wanted > 0) {
            taken += take(source, text_field, offset, wanted.min(bound), &mut texts, &mut skipped)?;
        }
    }
    if texts.is_empty() {
        let paths: Vec<_> = sources.iter().map(|s| &s.path).collect();
        return Err(DataError::NoText { inputs: join(&paths), skipped });
    }
    Ok(texts)
}

/// Where a file can be sampled, and the bytes from there to the next such place.
fn stretches(source: &SourceFile, text_field: &str) -> Result<impl Iterator<Item = (u64, u64)>, DataError> {
    let mut starts = match (source.format, source.compression) {
        (Format::Parquet, _) => ParquetFile::open(source, text_field, 0, Arc::default())?.row_groups(),
        (_, Compression::None) => (0..source.size.div_ceil(STRETCH).max(1)).map(|i| i * STRETCH).collect(),
        _ => vec![0],
    };
    starts.sort_unstable();
    let ends: Vec<_> = starts.iter().skip(1).copied().chain([source.size]).collect();
    Ok(starts.into_iter().zip(ends).map(|(start, end)| (start, end.saturating_sub(start))))
}

/// Adds up to about `wanted` bytes from `offset` of a file and returns how many.
fn take(
    source: &SourceFile,
    text_field: &str,
    offset: u64,
    wanted: usize,
    texts: &mut Vec<String>,
    skipped: &mut Skipped,
) -> Result<usize, DataError> {
    let mut file = OpenFile::new(source, text_field, offset, Arc::default())?;
    let mut taken = 0;
    loop {
        let (content, ends_file) = match file.next_block(LIMITS) {
            Ok(block) => block,
            Err(DataError::Binary { .. } | DataError::NotUtf8 { .. }) if !source.named => return Ok(taken),
            Err(e) => return Err(e),
        };
        let block = Block { file: 0, content, ends_file };
        for piece in block.pieces(text_field) {
            match piece {
                Piece::Text { text, .. } if text.trim().is_empty() => {}
                Piece::Text { text, .. } => {
                    let start = within(&text, wanted - taken);
                    taken += start.len();
                    texts.push(start.to_owned());
                    if start.len() < text.len() {
                        return Ok(taken);
                    }
                }
                // Further on, lines have no known numbers; rows have.
                Piece::Bad { reason, number } if offset == 0 || source.format == Format::Parquet => {
                    skipped.add(reason, 1, || reason.place(&source.path, number));
                }
                Piece::Bad { .. } => {}
            }
            if taken >= wanted {
                return Ok(taken);
            }
        }
        if ends_file {
            return Ok(taken);
        }
    }
}

/// The start of `text`, of about `len` bytes and at least one character.
fn within(text: &str, len: usize) -> &str {
    if len >= text.len() {
        return text;
    }
    let end = (len..text.len()).find(|&end| text.is_char_boundary(end)).unwrap_or(text.len());
    let start = &text[..end];
    &start[..last_cut(start).unwrap_or(start.len())]
}

/// Every character of `sources`, for [`Tokenizer::characters`](param_model::Tokenizer::characters).
///
/// # Errors
/// As for [`sample`], but all of every file is looked at.
pub fn alphabet(sources: &[SourceFile], text_field: &str) -> Result<BTreeSet<char>, DataError> {
    let mut seen = vec![false; char::MAX as usize + 1]; // [0x110000]
    let (mut reader, mut skipped) = (Reader::new(sources, text_field), Skipped::default());
    for block in reader.by_ref() {
        let block = block?;
        for piece in block.pieces(text_field) {
            match piece {
                Piece::Text { text, .. } => text.chars().for_each(|c| seen[c as usize] = true),
                Piece::Bad { reason, number } => {
                    skipped.add(reason, 1, || reason.place(&sources[block.file].path, number));
                }
            }
        }
    }
    let alphabet: BTreeSet<char> = ('\0'..=char::MAX).filter(|&c| seen[c as usize]).collect();
    if alphabet.is_empty() {
        let paths: Vec<_> = sources.iter().map(|s| &s.path).collect();
        skipped.merge(reader.skipped);
        return Err(DataError::NoText { inputs: join(&paths), skipped });
    }
    Ok(alphabet)
}
