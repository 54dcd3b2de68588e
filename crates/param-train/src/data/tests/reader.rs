//! What the reader hands out is what the files hold, however small its blocks.

use proptest::prelude::*;

use super::Corpus;
use crate::data::DataError;
use crate::data::read::{Limits, Piece, Reader};
use crate::data::report::Reason;

/// All documents, and the bad lines with their numbers.
type Lines = (Vec<String>, Vec<(Reason, u64)>);

fn read_all(corpus: &Corpus, names: &[&str], limits: Limits) -> Result<Lines, DataError> {
    let sources = corpus.find(names)?;
    let (mut documents, mut open, mut bad) = (Vec::new(), String::new(), Vec::new());
    for block in Reader::with_limits(&sources, "text", limits) {
        for piece in block?.pieces("text") {
            match piece {
                Piece::Text { text, ends } => {
                    open += &text;
                    if ends {
                        documents.push(std::mem::take(&mut open));
                    }
                }
                Piece::Bad { reason, number } => bad.push((reason, number)),
            }
        }
    }
    assert_eq!(open, "", "a document was left open");
    Ok((documents, bad))
}

fn limits() -> impl Strategy<Value = Limits> {
    (1usize..40, 0usize..40).prop_map(|(block, more)| Limits { block, max_block: block + more, max_line: 1 << 20 })
}

proptest! {
    #[test]
    fn text_comes_back_whole(text in "[a-z ,\n\r日é😀]{0,200}", limits in limits(), pack in prop::sample::select(vec!["a.txt", "a.txt.gz", "a.txt.zst"])) {
        prop_assume!(!text.trim().is_empty());
        let corpus = Corpus::new(&[(pack, text.as_bytes())]);
        // Blocks that hold less than a character cannot be checked to be UTF-8.
        let limits = Limits { block: limits.block.max(4), max_block: limits.max_block.max(4), ..limits };
        prop_assert_eq!(read_all(&corpus, &[pack], limits).unwrap(), (vec![text], vec![]));
    }

    #[test]
    fn json_lines_come_back_whole(texts in prop::collection::vec("[a-z\n\"\\\\日 ]{1,30}x", 1..20), limits in limits(), crlf: bool, last_newline: bool) {
        let end = if crlf { "\r\n" } else { "\n" };
        let mut file: String = texts.iter().map(|t| format!("{}{end}", serde_json::json!({"text": t}))).collect();
        if !last_newline {
            file.truncate(file.len() - end.len());
        }
        let corpus = Corpus::new(&[("a.jsonl", file.as_bytes())]);
        prop_assert_eq!(read_all(&corpus, &["a.jsonl"], limits).unwrap(), (texts, vec![]));
    }

    #[test]
    fn bad_lines_are_numbered_whatever_the_blocks(good in prop::collection::vec(any::<bool>(), 1..30), limits in limits()) {
        let file: String = good.iter().map(|&g| if g { "{\"text\": \"yes\"}\n" } else { "{\"text\": no}\n" }).collect();
        let corpus = Corpus::new(&[("a.jsonl", file.as_bytes())]);
        let bad = (1..).zip(&good).filter(|(_, g)| !**g).map(|(line, _)| (Reason::BadJson, line)).collect::<Vec<_>>();
        let documents = vec!["yes".to_owned(); good.len() - bad.len()];
        prop_assert_eq!(read_all(&corpus, &["a.jsonl"], limits).unwrap(), (documents, bad));
    }
}

const SMALL: Limits = Limits { block: 16, max_block: 32, max_line: 64 };

#[test]
fn byte_order_mark_is_dropped() {
    let corpus = Corpus::new(&[("a.txt", b"\xEF\xBB\xBFtext"), ("b.jsonl", b"\xEF\xBB\xBF{\"text\": \"line\"}")]);
    assert_eq!(read_all(&corpus, &[""], SMALL).unwrap().0, ["text", "line"]);
}

#[test]
fn line_over_the_limit_is_passed_over_and_counted() {
    let long = format!("{{\"text\": \"{}\"}}", "x".repeat(1000));
    let file = format!("{{\"text\": \"a\"}}\n{long}\n{{\"text\": \"b\"}}\n{long}");
    let corpus = Corpus::new(&[("a.jsonl", file.as_bytes())]);
    let bad = vec![(Reason::LineTooLong, 2), (Reason::LineTooLong, 4)];
    assert_eq!(read_all(&corpus, &["a.jsonl"], SMALL).unwrap(), (vec!["a".into(), "b".into()], bad));
}

#[test]
fn text_without_a_place_to_cut_is_cut_between_characters() {
    let text = "日本語".repeat(100);
    let corpus = Corpus::new(&[("a.txt", text.as_bytes())]);
    let sources = corpus.find(&["a.txt"]).unwrap();
    let blocks: Vec<_> = Reader::with_limits(&sources, "text", SMALL).map(|b| b.unwrap().n_byte()).collect();
    assert!(blocks.iter().all(|&n| n <= SMALL.max_block) && blocks.len() > 20, "{blocks:?}");
    assert_eq!(read_all(&corpus, &["a.txt"], SMALL).unwrap().0, [text]);
}

#[test]
fn several_members_in_one_compressed_file_are_all_read() {
    let corpus = Corpus::new(&[("a.txt.gz", b"one "), ("b.txt.zst", b"two ")]);
    for name in ["a.txt.gz", "b.txt.zst"] {
        let twice = std::fs::read(corpus.path(name)).unwrap().repeat(2);
        std::fs::write(corpus.path(name), twice).unwrap();
    }
    assert_eq!(read_all(&corpus, &[""], SMALL).unwrap().0, ["one one ", "two two "]);
}
