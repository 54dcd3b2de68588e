//! Shards hold what the files hold, and are reused or rebuilt as they should be.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::data::build::{Progress, Why};
use crate::data::read::BLOCK;
use crate::data::sample::{alphabet, sample};

/// Some megabytes of words, numbers and lines, in which every place is different.
fn long_text(n_byte: usize) -> String {
    let mut text = String::new();
    for i in 0.. {
        text += &format!("{} {} fox{}\n", TEXT.trim_end(), i, ["", "\n", "  "][i % 3]);
        if text.len() >= n_byte {
            return text;
        }
    }
    text
}

fn json_lines(texts: &[String]) -> String {
    texts.iter().map(|t| format!("{}\n", serde_json::json!({"text": t}))).collect()
}

#[test]
fn documents_tokens_and_bytes_are_those_of_the_files() {
    let lines = ["first".to_owned(), "zweite Zeile".to_owned(), TEXT.to_owned()];
    let corpus =
        Corpus::new(&[("a.txt", TEXT.as_bytes()), ("b.jsonl", json_lines(&lines).as_bytes()), ("c.md", b"# c")]);
    for tokenizer in [bpe(), llama_3_like()] {
        let (shard, _) = corpus.prepare(&[""], tokenizer).unwrap();
        let expected = [TEXT, "first", "zweite Zeile", TEXT, "# c"];
        assert_eq!(texts(&shard, tokenizer), expected);
        for (i, text) in expected.iter().enumerate() {
            let mut ids = Vec::new();
            shard.read(shard.document(i as u64), &mut ids).unwrap();
            assert_eq!(ids, tokenizer.encode(text).unwrap());
            assert_eq!(shard.document_bytes(i as u64), text.len() as u64);
        }
        assert_eq!(shard.index().n_byte, expected.concat().len() as u64);
    }
}

#[test]
fn long_text_cut_into_blocks_has_the_tokens_of_the_whole() {
    let text = long_text(5 * BLOCK / 2);
    let corpus = Corpus::new(&[("a.txt", text.as_bytes())]);
    for tokenizer in [bpe(), llama_3_like(), characters()] {
        let (shard, _) = corpus.prepare(&["a.txt"], tokenizer).unwrap();
        let mut ids = Vec::new();
        shard.read(shard.document(0), &mut ids).unwrap();
        assert_eq!((shard.index().n_document, shard.index().n_byte), (1, text.len() as u64));
        assert!(ids == tokenizer.encode(&text).unwrap(), "tokens differ");
    }
}

#[test]
fn compression_does_not_change_the_shard() {
    let (text, lines) = (long_text(2 * BLOCK), json_lines(&[long_text(1000), long_text(2 * BLOCK), "x".into()]));
    let digest = |suffix: &str| {
        let (a, b) = (format!("a.txt{suffix}"), format!("b.jsonl{suffix}"));
        let corpus = Corpus::new(&[(&a, text.as_bytes()), (&b, lines.as_bytes())]);
        corpus.prepare(&[""], bpe()).unwrap().0.index().digest.clone()
    };
    let plain = digest("");
    assert_eq!(digest(".gz"), plain);
    assert_eq!(digest(".zst"), plain);
}

#[test]
fn number_of_threads_does_not_change_the_shard() {
    let corpus = Corpus::new(&[("a.txt", long_text(6 * BLOCK).as_bytes())]);
    (0..300).for_each(|i| corpus.write(&format!("{i}.txt"), long_text(i).as_bytes()));
    let digest = |n_thread| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_thread).build().unwrap();
        let digest = pool.install(|| corpus.prepare(&[""], bpe()).unwrap().0.index().digest.clone());
        fs::remove_dir_all(corpus.shards()).unwrap();
        digest
    };
    assert_eq!([digest(2), digest(5)], [digest(1), digest(1)]);
}

#[test]
fn small_vocabularies_take_two_bytes_a_token() {
    let corpus = Corpus::new(&[("a.txt", TEXT.as_bytes())]);
    let (shard, _) = corpus.prepare(&["a.txt"], bpe()).unwrap();
    assert_eq!(fs::metadata(shard.folder().join(TOKENS)).unwrap().len(), 2 * shard.index().n_token);
}

#[test]
fn wide_tokens_are_read_as_they_were_written() {
    let documents = [vec![70_000, 3], vec![1 << 20]];
    let (_folder, shard) = shard_of(&documents, (1 << 20) + 1);
    let mut ids = Vec::new();
    shard.read(0..3, &mut ids).unwrap();
    assert_eq!(ids, documents.concat());
}

#[test]
fn shard_is_reused_until_something_changes() {
    let corpus = Corpus::new(&[("a.txt", TEXT.as_bytes()), ("b.txt", b"b")]);
    let built = |why| Reuse::Built(why);
    let reuse = |names: &[&str], tokenizer| corpus.prepare(names, tokenizer).unwrap().1;
    assert_eq!(reuse(&[""], bpe()), built(Why::First));
    assert_eq!(reuse(&[""], bpe()), Reuse::Reused);
    assert_eq!(reuse(&[""], llama_3_like()), built(Why::Tokenizer));
    corpus.write("b.txt", b"longer than before");
    assert_eq!(reuse(&[""], llama_3_like()), built(Why::Source(corpus.path("b.txt"))));
    corpus.write("c.txt", b"new");
    assert_eq!(reuse(&[""], llama_3_like()), built(Why::Source(corpus.path("c.txt"))));
    let sources = corpus.find(&[""]).unwrap();
    let cancel = AtomicBool::new(false);
    let (shard, reuse) = prepare(&corpus.shards(), &sources, "body", llama_3_like(), &mut |_| (), &cancel).unwrap();
    assert_eq!(reuse, built(Why::Options));
    let key = shard.folder().file_name().unwrap().to_str().unwrap();
    let files = [DOCUMENTS, INDEX, TOKENS].map(|name| format!("{key}/{name}"));
    assert_eq!(names_in(&corpus.shards()), [&[key.to_owned()][..], &files].concat(), "only the last one is kept");
}

#[test]
fn damaged_shard_is_rebuilt_and_the_damage_named() {
    let corpus = Corpus::new(&[("a.txt", TEXT.as_bytes())]);
    let folder = corpus.prepare(&["a.txt"], bpe()).unwrap().0.folder().to_owned();
    fs::write(folder.join(TOKENS), b"short").unwrap();
    let (shard, reuse) = corpus.prepare(&["a.txt"], bpe()).unwrap();
    assert!(matches!(&reuse, Reuse::Built(Why::Damaged(why)) if why.contains("tokens.bin: expected")), "{reuse:?}");
    assert_eq!(texts(&shard, bpe()), [TEXT]);
}

#[test]
fn bad_lines_are_counted_by_kind_with_the_first_of_each() {
    let file = "{\"text\": \"good\"}\n\n{bad\n{\"text\": 3}\n{\"body\": \"x\"}\n{worse\n{\"text\": \" \"}\n{\"text\": \"end\"}";
    let corpus = Corpus::new(&[("a.jsonl", file.as_bytes())]);
    let (shard, _) = corpus.prepare(&["a.jsonl"], bpe()).unwrap();
    assert_eq!(texts(&shard, bpe()), ["good", "end"]);
    let path = corpus.path("a.jsonl").display().to_string();
    let expected = format!(
        "2 bad JSON (first at {path}:3), 1 text field missing (first at {path}:5), \
         1 text field not a string (first at {path}:4), 1 empty text (first at {path}:7)"
    );
    assert_eq!(shard.index().skipped.to_string(), expected);
    let (again, reuse) = corpus.prepare(&["a.jsonl"], bpe()).unwrap();
    assert_eq!((again.index().skipped.to_string(), reuse), (expected, Reuse::Reused), "the report outlives the build");
}

#[test]
fn progress_ends_with_all_bytes_and_tokens() {
    let corpus = Corpus::new(&[("a.txt", long_text(3 * BLOCK).as_bytes()), ("b.txt.zst", TEXT.as_bytes())]);
    let (mut seen, cancel) = (Vec::<Progress>::new(), AtomicBool::new(false));
    let sources = corpus.find(&[""]).unwrap();
    let (shard, _) = prepare(&corpus.shards(), &sources, "text", bpe(), &mut |p| seen.push(p), &cancel).unwrap();
    let total_disk_bytes = sources.iter().map(|s| s.size).sum();
    let n_token = shard.index().n_token;
    assert_eq!(seen.last(), Some(&Progress { disk_bytes: total_disk_bytes, total_disk_bytes, n_token }));
    assert!(seen.is_sorted_by_key(|p| (p.disk_bytes, p.n_token)));
}

#[test]
fn cancelling_stops_and_leaves_nothing() {
    let corpus = Corpus::new(&[("a.txt", long_text(20 * BLOCK).as_bytes())]);
    let sources = corpus.find(&["a.txt"]).unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let cancel = AtomicBool::new(false);
    let mut n_call = 0;
    let result = pool.install(|| {
        let mut progress = |_| {
            n_call += 1;
            cancel.store(true, Ordering::Relaxed);
        };
        prepare(&corpus.shards(), &sources, "text", bpe(), &mut progress, &cancel)
    });
    assert!(matches!(result, Err(DataError::Cancelled)));
    assert!((1..3).contains(&n_call), "{n_call}");
    assert!(names_in(&corpus.shards()).is_empty());
}

#[test]
fn sample_of_everything_is_everything_and_a_smaller_one_comes_from_all_files() {
    let corpus = Corpus::new(&[]);
    (0..50).for_each(|i| corpus.write(&format!("{i:02}.txt"), format!("<{i}> {}", long_text(2000)).as_bytes()));
    let sources = corpus.find(&[""]).unwrap();
    let all = sample(&sources, "text", 1 << 20).unwrap();
    assert_eq!(all.len(), 50);
    assert_eq!(all.iter().map(|t| t.len() as u64).sum::<u64>(), sources.iter().map(|s| s.size).sum::<u64>());
    let some = sample(&sources, "text", 20_000).unwrap();
    assert_eq!(some, sample(&sources, "text", 20_000).unwrap(), "the same every time");
    let n_byte = some.iter().map(String::len).sum::<usize>();
    assert!((18_000..=20_000 + 4).contains(&n_byte), "{n_byte}");
    assert!(some.len() >= 40, "{} files", some.len());
}

#[test]
fn sample_reaches_into_a_large_file() {
    let corpus = Corpus::new(&[]);
    let mut text = "start of the file\n".repeat(1 << 20);
    text += &"end of the file\n".repeat(1 << 20);
    corpus.write("a.txt", text.as_bytes());
    let some = sample(&corpus.find(&["a.txt"]).unwrap(), "text", 100_000).unwrap();
    assert!(some.iter().any(|t| t.starts_with("start of the file\n")));
    assert!(some.iter().any(|t| t.starts_with("end of the file\n")));
    assert!(some.iter().all(|t| t.starts_with("start") || t.starts_with("end")), "samples begin at lines");
}

#[test]
fn compressed_sample_is_bounded_by_text_not_by_file() {
    let corpus = Corpus::new(&[("a.txt.gz", "aaaa ".repeat(100_000).as_bytes()), ("b.txt", TEXT.as_bytes())]);
    let some = sample(&corpus.find(&[""]).unwrap(), "text", 50_000).unwrap();
    let n_byte = some.iter().map(String::len).sum::<usize>();
    assert!((1..=50_000).contains(&n_byte), "{n_byte}");
}

#[test]
fn alphabet_has_every_character_once() {
    let corpus = Corpus::new(&[("a.txt", "ab\nb😀".as_bytes()), ("b.jsonl", "{\"text\": \"\\u00e9b\"}".as_bytes())]);
    let characters = alphabet(&corpus.find(&[""]).unwrap(), "text").unwrap();
    assert_eq!(characters.into_iter().collect::<String>(), "\nabé😀");
}
