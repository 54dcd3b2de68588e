//! Parquet files: the documents of the same rows as JSON lines, damage named and passed over or refused, nothing a panic.

use std::sync::Arc;

use bytes::Bytes;
use parquet::basic::{BrotliLevel, Compression, GzipLevel, ZstdLevel};
use parquet::data_type::{ByteArrayType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use proptest::prelude::*;

use super::{Corpus, TEXT, bpe, texts};
use crate::data::build::{Reuse, Why};
use crate::data::read::{Content, LIMITS, Limits, Reader};
use crate::data::sample;

const SCHEMA: &str =
    "message rows { required int64 id; optional binary text (UTF8); repeated binary tags (UTF8); optional int64 n; }";

/// A file of these texts, so many to a row group, with columns of other types around them.
fn file(groups: &[Vec<Option<String>>], compression: Compression, dictionary: bool) -> Vec<u8> {
    let properties = WriterProperties::builder().set_compression(compression).set_dictionary_enabled(dictionary);
    let properties = properties.set_data_page_row_count_limit(7).set_write_batch_size(1).build();
    let schema = Arc::new(parse_message_type(SCHEMA).unwrap());
    let mut bytes = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, Arc::new(properties)).unwrap();
    for texts in groups {
        let levels = |defined: bool| vec![i16::from(defined); texts.len()];
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let ids: Vec<i64> = (0..texts.len() as i64).collect();
        column.typed::<Int64Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let defined: Vec<i16> = texts.iter().map(|text| i16::from(text.is_some())).collect();
        let values: Vec<_> = texts.iter().flatten().map(|text| text.as_str().into()).collect();
        column.typed::<ByteArrayType>().write_batch(&values, Some(&defined), None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&[], Some(&levels(false)), Some(&levels(false))).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&[], Some(&levels(false)), None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
    bytes
}

fn some(texts: &[&str]) -> Vec<Option<String>> {
    texts.iter().map(|text| Some((*text).to_owned())).collect()
}

/// Where the column chunks of the texts lie.
fn chunks(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let reader = SerializedFileReader::new(Bytes::copy_from_slice(bytes)).unwrap();
    let ranges = reader.metadata().row_groups().iter().map(|group| group.column(1).byte_range());
    ranges.map(|(start, len)| start as usize..(start + len) as usize).collect()
}

#[test]
fn rows_are_the_documents_of_the_same_json_lines() {
    let rows: Vec<Option<String>> = (0..300)
        .map(|i| match i % 9 {
            0 => None,
            1 => Some(" \n".to_owned()),
            _ => Some(format!("{i} {}", TEXT.repeat(i % 5))),
        })
        .collect();
    let lines: String = rows.iter().map(|text| serde_json::json!({"text": text}).to_string() + "\n").collect();
    let corpus = Corpus::new(&[("a.jsonl", lines.as_bytes())]);
    let expected = corpus.prepare(&["a.jsonl"], bpe()).unwrap().0.index().clone();
    let groups: Vec<Vec<_>> = rows.chunks(70).map(<[_]>::to_vec).collect();
    for (compression, dictionary) in [
        (Compression::UNCOMPRESSED, false),
        (Compression::SNAPPY, true),
        (Compression::GZIP(GzipLevel::default()), true),
        (Compression::ZSTD(ZstdLevel::default()), false),
        (Compression::LZ4_RAW, false),
        (Compression::BROTLI(BrotliLevel::default()), true),
    ] {
        let bytes = file(&groups, compression, dictionary);
        let corpus = Corpus::new(&[("a.parquet", &bytes)]);
        let (shard, _) = corpus.prepare(&["a.parquet"], bpe()).unwrap();
        assert_eq!(shard.index().digest, expected.digest, "{compression:?}");
        let report = shard.index().skipped.to_string();
        assert!(report.starts_with("34 text field missing (first at ") && report.contains("a.parquet:1)"), "{report}");
        assert!(report.contains("34 empty text (first at ") && report.contains("a.parquet:2)"), "{report}");
        assert_eq!(corpus.prepare(&["a.parquet"], bpe()).unwrap().1, Reuse::Reused);
        fs_touch(&corpus, &bytes);
        let changed = Reuse::Built(Why::Source(corpus.path("a.parquet")));
        assert_eq!(corpus.prepare(&["a.parquet"], bpe()).unwrap().1, changed);
    }
}

/// Another version of the file: one row group less.
fn fs_touch(corpus: &Corpus, bytes: &[u8]) {
    let mut longer = file(&[some(&["another version"])], Compression::SNAPPY, false);
    longer.resize(longer.len().max(1), 0);
    assert_ne!(longer, bytes);
    corpus.write("a.parquet", &longer);
}

proptest! {
    #[test]
    fn blocks_hold_little_more_than_their_limit(lengths in prop::collection::vec(1usize..200, 1..60), block in 1usize..300) {
        let rows: Vec<_> = lengths.iter().map(|&n| Some("x".repeat(n))).collect();
        let groups: Vec<Vec<_>> = rows.chunks(13).map(<[_]>::to_vec).collect();
        let corpus = Corpus::new(&[("a.parquet", &file(&groups, Compression::SNAPPY, false))]);
        let sources = corpus.find(&["a.parquet"]).unwrap();
        let limits = Limits { block, ..LIMITS };
        let mut seen = Vec::new();
        for block in Reader::with_limits(&sources, "text", limits) {
            let block = block.unwrap();
            prop_assert!(block.n_byte() < limits.block + 300, "{}", block.n_byte());
            let Content::Rows { first_row, texts, .. } = block.content else { panic!("no rows") };
            prop_assert_eq!(first_row as usize, seen.len() + 1);
            seen.extend(texts.into_iter().map(|text| text.unwrap().len()));
        }
        prop_assert_eq!(seen, lengths);
    }

    #[test]
    fn a_changed_byte_is_no_panic(at: prop::sample::Index, value: u8, dictionary: bool) {
        let groups = [some(&["one", "two", "two"]), some(&["three"; 20])];
        let mut bytes = file(&groups, Compression::SNAPPY, dictionary);
        let at = at.index(bytes.len());
        bytes[at] = value;
        let corpus = Corpus::new(&[("a.parquet", &bytes)]);
        let sources = corpus.find(&["a.parquet"]).unwrap();
        for block in Reader::new(&sources, "text") {
            let Ok(block) = block else { break };
            block.pieces("text").for_each(drop);
        }
        let _ = sample(&sources, "text", 1000);
    }
}

#[test]
fn damaged_row_group_is_counted_and_the_others_are_read() {
    let groups = [some(&["one", "two"]), some(&["three", "four"]), some(&["five"])];
    let whole = file(&groups, Compression::SNAPPY, false);
    let mut bytes = whole.clone();
    bytes[chunks(&whole)[1].clone()].fill(0xFF);
    let corpus = Corpus::new(&[("a.parquet", &bytes)]);
    let (shard, _) = corpus.prepare(&["a.parquet"], bpe()).unwrap();
    assert_eq!(texts(&shard, bpe()), ["one", "two", "five"]);
    let place = format!("1 damaged row group (first at {}, row group 2)", corpus.path("a.parquet").display());
    assert_eq!(shard.index().skipped.to_string(), place);
    chunks(&whole).into_iter().for_each(|chunk| bytes[chunk].fill(0xFF));
    corpus.write("a.parquet", &bytes);
    let error = corpus.prepare(&["a.parquet"], bpe()).unwrap_err().to_string();
    assert!(error.contains("no document in field `text`: 3 damaged row group"), "{error}");
}

#[test]
fn damage_within_a_row_group_keeps_what_was_read_before_it() {
    let long: Vec<String> = (0..50).map(|i| format!("row number {i} of them all")).collect();
    let group = long.iter().cloned().map(Some).collect();
    let whole = file(&[group, some(&["after"])], Compression::UNCOMPRESSED, false);
    let mut bytes = whole.clone();
    let chunk = chunks(&whole)[0].clone();
    bytes[chunk.start + chunk.len() / 2..chunk.end].fill(0xFF);
    let corpus = Corpus::new(&[("a.parquet", &bytes)]);
    let (shard, _) = corpus.prepare(&["a.parquet"], bpe()).unwrap();
    let read = texts(&shard, bpe());
    assert_eq!(read.last().unwrap(), "after");
    assert!((10..40).contains(&read.len()), "{}", read.len());
    let start = &read[..read.len() - 1];
    assert!(start.iter().zip(&long).filter(|(a, b)| a == b).count() + 1 >= start.len(), "{start:?}");
    assert!(shard.index().skipped.to_string().contains("1 damaged row group"), "{}", shard.index().skipped);
}

#[test]
fn files_that_are_unreadable_as_a_whole_are_refused_by_name() {
    let whole = file(&[some(&[TEXT])], Compression::SNAPPY, false);
    for bytes in [&b""[..], b"PAR1", b"plain text, long enough for a footer", &whole[..whole.len() - 3]] {
        let corpus = Corpus::new(&[("a.parquet", bytes), ("b.txt", b"text")]);
        let error = corpus.prepare(&[""], bpe()).unwrap_err().to_string();
        assert!(error.contains("a.parquet`: not a usable Parquet file"), "{error}");
    }
    let corpus = Corpus::new(&[("a.parquet.gz", &whole)]);
    let error = corpus.prepare(&["a.parquet.gz"], bpe()).unwrap_err().to_string();
    assert!(error.contains("a.parquet.gz") && error.contains("unpack it first"), "{error}");
}

#[test]
fn column_that_is_missing_or_no_text_is_refused_with_what_there_is() {
    let corpus = Corpus::new(&[("a.parquet", &file(&[some(&[TEXT])], Compression::SNAPPY, false))]);
    let sources = corpus.find(&["a.parquet"]).unwrap();
    for (field, parts) in [
        ("body", &["no column `body`", "`id`, `text`, `tags`, `n`", "--text-field"][..]),
        ("id", &["column `id` holds no text but INT64"]),
        ("tags", &["column `tags` holds no text but a list of BYTE_ARRAY"]),
    ] {
        let error = Reader::new(&sources, field).next().unwrap().unwrap_err().to_string();
        assert!(error.contains("a.parquet") && parts.iter().all(|part| error.contains(part)), "{error}");
        assert_eq!(sample(&sources, field, 100).unwrap_err().to_string(), error);
    }
}

#[test]
fn a_file_without_rows_is_empty() {
    let corpus = Corpus::new(&[("a.parquet", &file(&[], Compression::SNAPPY, false)), ("b.txt", b"text")]);
    let (shard, _) = corpus.prepare(&[""], bpe()).unwrap();
    assert_eq!(texts(&shard, bpe()), ["text"]);
    assert!(shard.index().skipped.to_string().starts_with("1 empty file"), "{}", shard.index().skipped);
}

#[test]
fn a_sample_comes_from_all_row_groups() {
    let groups: Vec<_> = (0..8).map(|i| some(&vec![format!("group {i} ").repeat(100).as_str(); 20])).collect();
    let corpus = Corpus::new(&[("a.parquet", &file(&groups, Compression::UNCOMPRESSED, false))]);
    let texts = sample(&corpus.find(&["a.parquet"]).unwrap(), "text", 8_000).unwrap();
    for i in 0..8 {
        let start = format!("group {i} ");
        assert!(texts.iter().any(|text| text.starts_with(&start)), "none of {start}");
    }
    assert!((7_000..9_000).contains(&texts.iter().map(String::len).sum::<usize>()));
}
