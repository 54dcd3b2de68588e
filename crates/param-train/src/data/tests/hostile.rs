//! Bad input and bad places to write to: each a named error, with nothing left behind.

use std::fs;
use std::io;

use super::*;
use crate::data::sample;

fn error(corpus: &Corpus, names: &[&str]) -> String {
    let error = corpus.prepare(names, bpe()).unwrap_err().to_string();
    assert!(names_in(&corpus.shards()).is_empty(), "left behind: {:?}", names_in(&corpus.shards()));
    error
}

fn assert_names(error: &str, corpus: &Corpus, name: &str, what: &str) {
    let path = corpus.path(name).display().to_string();
    assert!(error.contains(&path) && error.contains(what), "{error}");
}

#[test]
fn empty_text_is_refused() {
    for bytes in [&b""[..], b" \n\t\n", b"\xEF\xBB\xBF"] {
        let corpus = Corpus::new(&[("a.txt", bytes)]);
        assert_names(&error(&corpus, &["a.txt"]), &corpus, "a.txt", "holds no text");
    }
    let corpus = Corpus::new(&[("a.jsonl", b"\n\n")]);
    assert_names(&error(&corpus, &["a.jsonl"]), &corpus, "a.jsonl", "1 empty file");
}

#[test]
fn empty_files_among_others_are_counted() {
    let corpus = Corpus::new(&[("a.txt", b""), ("b.jsonl", b""), ("c.txt", b"text")]);
    let (shard, _) = corpus.prepare(&["a.txt", "b.jsonl", "c.txt"], bpe()).unwrap();
    assert_eq!(texts(&shard, bpe()), ["text"]);
    let report = shard.index().skipped.to_string();
    assert!(report.starts_with("2 empty file (first at "), "{report}");
}

#[test]
fn named_binary_file_is_refused_with_its_offset() {
    let corpus = Corpus::new(&[("a.bin", b"text\0more")]);
    assert_names(&error(&corpus, &["a.bin"]), &corpus, "a.bin", "NUL byte at offset 4");
}

#[test]
fn named_file_that_is_not_utf_8_is_refused_with_its_offset() {
    let corpus = Corpus::new(&[("a.txt", b"caf\xE9 au lait"), ("b.txt", b"\xFF\xFEa\0"), ("c.txt", b"cut \xE2\x82")]);
    assert_names(&error(&corpus, &["a.txt"]), &corpus, "a.txt", "not UTF-8 at byte offset 3");
    fs::write(corpus.path("b.txt"), b"\xFF\xFEab").unwrap();
    assert_names(&error(&corpus, &["b.txt"]), &corpus, "b.txt", "UTF-16");
    assert_names(&error(&corpus, &["c.txt"]), &corpus, "c.txt", "not UTF-8 at byte offset 4");
}

#[test]
fn bad_byte_far_into_a_file_is_found_at_its_place() {
    let mut bytes = b"some words and\n".repeat(1 << 16);
    bytes[900_000] = 0x80;
    let corpus = Corpus::new(&[("a.txt", &bytes)]);
    assert_names(&error(&corpus, &["a.txt"]), &corpus, "a.txt", "not UTF-8 at byte offset 900000");
    assert_names(&error(&corpus, &[""]), &corpus, "a.txt", "not UTF-8 at byte offset 900000");
}

#[test]
fn binary_files_in_a_folder_are_passed_over_and_counted() {
    let corpus = Corpus::new(&[("a.txt", b"text"), ("b.bin", b"\0\0"), ("c.txt", b"caf\xE9")]);
    let (shard, _) = corpus.prepare(&[""], bpe()).unwrap();
    assert_eq!(texts(&shard, bpe()), ["text"]);
    let report = shard.index().skipped.to_string();
    assert!(report.starts_with("2 binary file (first at ") && report.contains("b.bin"), "{report}");
}

#[test]
fn file_without_one_good_line_is_refused_if_named_and_counted_if_found() {
    let corpus = Corpus::new(&[("a.jsonl", b"{\"body\": \"x\"}\n{\"body\": \"y\"}\n"), ("b.txt", b"text")]);
    let message = error(&corpus, &["a.jsonl", "b.txt"]);
    assert_names(&message, &corpus, "a.jsonl", "no document in field `text`: 2 text field missing");
    let (shard, _) = corpus.prepare(&[""], bpe()).unwrap();
    assert_eq!(texts(&shard, bpe()), ["text"]);
    fs::remove_file(corpus.path("b.txt")).unwrap();
    fs::remove_dir_all(corpus.shards()).unwrap();
    assert!(error(&corpus, &[""]).contains("2 text field missing"));
}

#[test]
fn compressed_file_that_is_none_or_is_cut_short_is_a_named_error() {
    for name in ["a.txt.gz", "a.txt.zst"] {
        let corpus = Corpus::new(&[(name, TEXT.repeat(1000).as_bytes())]);
        let packed = fs::read(corpus.path(name)).unwrap();
        fs::write(corpus.path(name), &packed[..packed.len() / 2]).unwrap();
        assert_names(&error(&corpus, &[name]), &corpus, name, "cannot read");
        fs::write(corpus.path(name), b"plain text after all").unwrap();
        assert_names(&error(&corpus, &[name]), &corpus, name, "cannot read");
    }
}

#[test]
fn file_deleted_after_it_was_found_is_a_named_error() {
    let corpus = Corpus::new(&[("a.txt", b"text")]);
    let sources = corpus.find(&["a.txt"]).unwrap();
    fs::remove_file(corpus.path("a.txt")).unwrap();
    let cancel = AtomicBool::new(false);
    let error = prepare(&corpus.shards(), &sources, "text", bpe(), &mut |_| (), &cancel).unwrap_err();
    assert_names(&error.to_string(), &corpus, "a.txt", "cannot read");
}

#[test]
fn failed_rebuild_keeps_the_shard_that_was_there() {
    let corpus = Corpus::new(&[("a.txt", b"text")]);
    let before = corpus.prepare(&["a.txt"], bpe()).unwrap().0;
    corpus.write("a.txt", b"now \0 binary");
    corpus.prepare(&["a.txt"], bpe()).unwrap_err();
    assert_eq!(texts(&Shard::open(before.folder()).unwrap(), bpe()), ["text"]);
    assert_eq!(fs::read_dir(corpus.shards()).unwrap().count(), 1);
}

#[test]
fn folder_that_cannot_be_written_is_named() {
    let corpus = Corpus::new(&[("a.txt", b"text")]);
    let below_a_file = corpus.path("a.txt").join("shards");
    let (sources, cancel) = (corpus.find(&["a.txt"]).unwrap(), AtomicBool::new(false));
    let error = prepare(&below_a_file, &sources, "text", bpe(), &mut |_| (), &cancel).unwrap_err();
    assert!(matches!(&error, DataError::Write { path, .. } if path.starts_with(&below_a_file)), "{error}");
}

#[test]
fn full_disk_has_an_error_of_its_own() {
    let error = DataError::write(Path::new("out/tokens.bin"), io::ErrorKind::StorageFull.into()).to_string();
    assert!(error.contains("`out/tokens.bin`: the disk is full"), "{error}");
}

/// A limit on the size of files, which only a process of its own can be given, stands in for a disk that fills up.
#[cfg(unix)]
#[test]
fn write_that_fails_halfway_leaves_nothing_behind() {
    const FOLDER: &str = "DATA_TEST_FOLDER";
    const NAME: &str = "data::tests::hostile::write_that_fails_halfway_leaves_nothing_behind";
    if let Some(folder) = std::env::var_os(FOLDER) {
        let (folder, cancel) = (PathBuf::from(folder), AtomicBool::new(false));
        let sources = find(&[folder.join("data")], &[]).unwrap();
        let error = prepare(&folder.join("shards"), &sources, "text", bpe(), &mut |_| (), &cancel).unwrap_err();
        assert!(matches!(&error, DataError::Write { path, .. } if path.ends_with(TOKENS)), "{error}");
        return;
    }
    let corpus = Corpus::new(&[("a.txt", TEXT.repeat(20_000).as_bytes())]);
    let limited = std::process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 64; exec \"$0\" --exact \"$1\""])
        .arg(std::env::current_exe().unwrap())
        .arg(NAME)
        .env(FOLDER, corpus.folder.path())
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&limited.stdout);
    assert!(limited.status.success() && output.contains("1 passed"), "{output}");
    assert!(names_in(&corpus.shards()).is_empty(), "{:?}", names_in(&corpus.shards()));
}

#[test]
fn shard_files_that_disagree_are_refused() {
    let (folder, shard) = shard_of(&[vec![1, 2, 3], vec![4]], 10);
    let (index, documents) = (shard.index().clone(), fs::read(folder.path().join(DOCUMENTS)).unwrap());
    drop(shard);
    let open = |index: &Index, documents: &[u8]| {
        fs::write(folder.path().join(INDEX), serde_json::to_vec(index).unwrap()).unwrap();
        fs::write(folder.path().join(DOCUMENTS), documents).unwrap();
        Shard::open(folder.path()).map(|_| ()).map_err(|e| e.to_string())
    };
    assert_eq!(open(&index, &documents), Ok(()));
    let changed = |change: &dyn Fn(&mut Index)| {
        let mut index = index.clone();
        change(&mut index);
        open(&index, &documents).unwrap_err()
    };
    assert!(changed(&|i| i.n_token = 5).contains("tokens.bin: expected 10 bytes, got 8"));
    assert!(changed(&|i| i.n_token = u64::MAX).contains("impossible number"));
    assert!(changed(&|i| i.n_token = 0).contains("impossible totals"));
    assert!(changed(&|i| i.n_document = 1).contains("documents.bin: expected 32 bytes, got 48"));
    assert!(changed(&|i| i.n_document = u64::MAX).contains("impossible number"));
    assert!(changed(&|i| i.n_byte = 3).contains("out of order"));
    assert!(changed(&|i| i.n_vocab = 1 << 40).contains("impossible totals"));
    let mut disordered = documents.clone();
    disordered[16] = 200;
    assert!(open(&index, &disordered).unwrap_err().contains("out of order"));
    fs::write(folder.path().join(INDEX), b"{").unwrap();
    assert!(Shard::open(folder.path()).unwrap_err().to_string().contains("index.json"));
}

#[test]
fn token_outside_the_vocabulary_is_refused_when_read() {
    let (_folder, shard) = shard_of(&[vec![1, 2], vec![9, 10]], 10);
    let mut ids = Vec::new();
    shard.read(0..3, &mut ids).unwrap();
    let error = shard.read(2..4, &mut ids).unwrap_err().to_string();
    assert!(error.contains("token 3 has id 10, not below 10"), "{error}");
}

#[test]
fn sample_of_bad_input_says_what_is_wrong_with_it() {
    let corpus = Corpus::new(&[("a.jsonl", b"{\"body\": \"x\"}\n"), ("b.txt", b"caf\xE9"), ("c.txt", b" ")]);
    let sampled = |names: &[&str]| sample(&corpus.find(names).unwrap(), "text", 1000).map_err(|e| e.to_string());
    assert_names(&sampled(&["a.jsonl"]).unwrap_err(), &corpus, "a.jsonl", "1 text field missing");
    assert_names(&sampled(&["b.txt"]).unwrap_err(), &corpus, "b.txt", "not UTF-8 at byte offset 3");
    assert!(sampled(&[""]).unwrap_err().contains("holds no text"), "what was found, not named, is passed over");
    corpus.write("d.txt", b"text");
    assert_eq!(sampled(&[""]).unwrap(), ["text"]);
}
