//! Splits and batches: nothing lost, nothing twice, and every batch the same however it was reached.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::data::split::{Part, split};
use crate::data::{Batch, Batches, Evaluation, IGNORED, Layout, Vocabulary};

const END: u32 = 0;
const BOS: u32 = 1;

/// Documents of these lengths in which no token occurs twice, so that each can be followed.
fn distinct(lengths: &[usize]) -> Vec<Vec<u32>> {
    let mut next = 2;
    let mut document = |&length: &usize| {
        next += length as u32;
        (next - length as u32..next).collect()
    };
    lengths.iter().map(&mut document).collect()
}

fn n_vocab(documents: &[Vec<u32>]) -> u64 {
    2 + documents.concat().len() as u64
}

/// Two bytes a token, none for the special ones.
fn vocabulary(n_vocab: u64, end_of_text: bool, bos: bool) -> Vocabulary {
    let token_bytes = (0..n_vocab).map(|id| if id < 2 { 0 } else { 2 }).collect();
    Vocabulary { bos: bos.then_some(BOS), end_of_text: end_of_text.then_some(END), token_bytes }
}

fn tokens_of(part: &Part) -> Vec<Vec<u32>> {
    let document = |i| {
        let mut ids = Vec::new();
        part.shard().read(part.document(i), &mut ids).unwrap();
        ids
    };
    (0..part.n_document()).map(document).collect()
}

fn counts<T: Ord>(items: impl IntoIterator<Item = T>) -> BTreeMap<T, usize> {
    items.into_iter().fold(BTreeMap::new(), |mut counts, item| {
        *counts.entry(item).or_default() += 1;
        counts
    })
}

/// (input, target) pairs of a batch.
fn pairs(batch: &Batch) -> impl Iterator<Item = (u32, i32)> {
    batch.input.iter().copied().zip(batch.target.iter().copied())
}

fn lengths() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![prop::collection::vec(1usize..12, 2..200), prop::collection::vec(1usize..300, 1..6),]
}

proptest! {
    #[test]
    fn packed_epoch_has_every_target_once_but_for_the_tail(
        lengths in lengths(), context in 1usize..20, batch_size in 1usize..5, seed: u64, end_of_text: bool, epoch in 0u64..3,
    ) {
        let documents = distinct(&lengths);
        let (_folder, shard) = shard_of(&documents, n_vocab(&documents));
        let stream_len = documents.concat().len() + if end_of_text { documents.len() } else { 0 };
        prop_assume!(stream_len > context);
        let vocabulary = vocabulary(n_vocab(&documents), end_of_text, false);
        let mut batches = Batches::new(Part::all(shard), &vocabulary, Layout::Packed, context, batch_size, seed).unwrap();
        let n_row = batches.rows_per_epoch();
        prop_assert_eq!(n_row, (stream_len / context) as u64);

        // The rows of one epoch, taken out of the batches that contain them.
        let (first, last) = (epoch * n_row, (epoch + 1) * n_row);
        let mut rows = Vec::new();
        for index in first / batch_size as u64..last.div_ceil(batch_size as u64) {
            let batch = batches.batch_at(index).unwrap();
            prop_assert_eq!(batch.n_row, batch_size);
            prop_assert!(batch.mask.is_none());
            prop_assert_eq!(batch.n_bytes, 2 * batch.target.iter().filter(|&&t| t >= 2).count() as u64);
            for (i, row) in pairs(&batch).collect::<Vec<_>>().chunks(context).enumerate() {
                if (first..last).contains(&(index * batch_size as u64 + i as u64)) {
                    rows.push(row.to_vec());
                }
            }
        }
        for row in &rows {
            for pair in row.windows(2) {
                prop_assert_eq!(pair[0].1, pair[1].0 as i32, "targets are inputs shifted by one");
            }
        }
        let flat = rows.concat();
        let text_inputs = counts(flat.iter().map(|p| p.0).filter(|&id| id != END));
        let text_targets = counts(flat.iter().map(|p| p.1).filter(|&id| id != END as i32));
        prop_assert!(text_inputs.values().chain(text_targets.values()).all(|&n| n == 1), "a token came twice");
        prop_assert_eq!(flat.len(), stream_len / context * context);

        // What follows what: the next token of the document, at its end an end-of-text (or another document's start).
        let ends: Vec<u32> = documents.iter().map(|d| *d.last().unwrap()).collect();
        let starts: Vec<i32> = documents.iter().map(|d| d[0] as i32).collect();
        for (input, target) in flat {
            if input == END {
                prop_assert!(starts.contains(&target));
            } else if !ends.contains(&input) {
                prop_assert_eq!(target, input as i32 + 1);
            } else if end_of_text {
                prop_assert_eq!(target, END as i32);
            } else {
                prop_assert!(starts.contains(&target));
            }
        }
    }

    #[test]
    fn batch_does_not_depend_on_those_before(lengths in lengths(), seed: u64, at in prop::collection::vec(0u64..60, 1..10), packed: bool) {
        let documents = distinct(&lengths);
        prop_assume!(documents.concat().len() > 7);
        let (_folder, shard) = shard_of(&documents, n_vocab(&documents));
        let layout = if packed { Layout::Packed } else { Layout::OneDocumentPerRow };
        let vocabulary = vocabulary(n_vocab(&documents), true, true);
        let batches = || Batches::new(Part::all(shard.clone()), &vocabulary, layout, 7, 3, seed).unwrap();
        let mut continued = batches();
        let in_order: Vec<Batch> = (0..60).map(|i| continued.batch_at(i).unwrap()).collect();
        let mut jumping = batches();
        for i in at {
            prop_assert_eq!(&jumping.batch_at(i).unwrap(), &in_order[i as usize]);
            prop_assert_eq!(&batches().batch_at(i).unwrap(), &in_order[i as usize], "resumed");
        }
    }

    #[test]
    fn evaluation_has_every_token_once_in_order(lengths in lengths(), context in 1usize..20, batch_size in 1usize..5, end_of_text: bool) {
        let documents = distinct(&lengths);
        prop_assume!(documents.concat().len() > context);
        let (_folder, shard) = shard_of(&documents, n_vocab(&documents));
        let vocabulary = vocabulary(n_vocab(&documents), end_of_text, false);
        let evaluation = Evaluation::new(Part::all(shard.clone()), &vocabulary, Layout::Packed, context, batch_size).unwrap();
        let batches: Vec<Batch> = evaluation.map(Result::unwrap).collect();
        let mut stream = Vec::from_iter(end_of_text.then_some(END));
        for document in &documents {
            stream.extend(document);
            stream.extend(end_of_text.then_some(END));
        }
        let seen: Vec<(u32, i32)> = batches.iter().flat_map(pairs).filter(|p| p.1 != IGNORED).collect();
        let expected: Vec<(u32, i32)> = stream.windows(2).map(|w| (w[0], w[1] as i32)).collect();
        prop_assert_eq!(seen, expected);
        let n_bytes: u64 = batches.iter().map(|b| b.n_bytes).sum();
        prop_assert_eq!(n_bytes, shard.index().n_byte - if end_of_text { 0 } else { 2 });
        let (last, full) = batches.split_last().unwrap();
        prop_assert!(full.iter().all(|b| b.mask.is_none() && b.n_row == batch_size));
        if let Some(mask) = &last.mask {
            let real: Vec<bool> = last.target.iter().map(|&t| t != IGNORED).collect();
            prop_assert_eq!(mask, &real);
        }
    }

    #[test]
    fn row_of_one_document_is_laid_out_as_in_the_reference(lengths in lengths(), context in 1usize..20, bos: bool) {
        let documents = distinct(&lengths);
        let (_folder, shard) = shard_of(&documents, n_vocab(&documents));
        let vocabulary = vocabulary(n_vocab(&documents), true, bos);
        let evaluation = Evaluation::new(Part::all(shard), &vocabulary, Layout::OneDocumentPerRow, context, 4).unwrap();
        let batches: Vec<Batch> = evaluation.map(Result::unwrap).collect();
        let mut rows = Vec::new();
        for batch in &batches {
            let all = vec![true; batch.input.len()];
            let mask = batch.mask.as_ref().unwrap_or(&all);
            rows.extend((0..batch.n_row).map(|r| r * context..(r + 1) * context).map(|r| {
                (batch.input[r.clone()].to_vec(), batch.target[r.clone()].to_vec(), mask[r].to_vec())
            }));
        }
        prop_assert_eq!(rows.len(), documents.len());
        for ((input, target, mask), document) in rows.iter().zip(&documents) {
            let mut ids = Vec::from_iter(bos.then_some(BOS));
            ids.extend(document);
            ids.truncate(context);
            let n_real = ids.len();
            ids.resize(context, END);
            prop_assert_eq!(input, &ids);
            prop_assert!((0..context).all(|t| mask[t] == (t < n_real)));
            let label = |t: usize| ids.get(t + 1).filter(|&&id| id != END).map_or(IGNORED, |&id| id as i32);
            prop_assert_eq!(target, &(0..context).map(label).collect::<Vec<_>>());
        }
    }

    #[test]
    fn split_is_disjoint_and_exhaustive(lengths in lengths(), fraction in 0.001f64..0.999, seed: u64) {
        let documents = distinct(&lengths);
        let (_folder, shard) = shard_of(&documents, n_vocab(&documents));
        let (train, held_out) = split(shard.clone(), fraction, seed).unwrap();
        let (kept, out) = (tokens_of(&train), tokens_of(&held_out));
        prop_assert_eq!(train.n_token() as usize, kept.concat().len());
        prop_assert_eq!(held_out.n_token() as usize, out.concat().len());
        let mut all = [kept.concat(), out.concat()].concat();
        all.sort();
        prop_assert_eq!(all, documents.concat());
        if documents.len() > 1 {
            prop_assert!(!out.is_empty());
            prop_assert!(kept.iter().chain(&out).all(|d| documents.contains(d)), "a document was cut");
            prop_assert!(out.iter().all(|d| d.len() <= documents.concat().len() / 2));
            let mut in_order = out.concat();
            in_order.sort();
            prop_assert_eq!(in_order, out.concat(), "documents stay in order");
        }
        let again = split(shard, fraction, seed).unwrap();
        prop_assert_eq!((tokens_of(&again.0), tokens_of(&again.1)), (kept, out));
    }
}

#[test]
fn split_holds_out_about_the_fraction_and_differs_by_seed() {
    let documents = distinct(&[3; 4000]);
    let (_folder, shard) = shard_of(&documents, n_vocab(&documents));
    let held_out = |seed| tokens_of(&split(shard.clone(), 0.1, seed).unwrap().1);
    // Binomial: 400 expected, standard deviation 19.
    assert!((320..480).contains(&held_out(1).len()), "{}", held_out(1).len());
    assert_ne!(held_out(1), held_out(2));
}

#[test]
fn split_of_one_document_holds_out_its_end() {
    let documents = distinct(&[1000]);
    let (_folder, shard) = shard_of(&documents, n_vocab(&documents));
    let (train, held_out) = split(shard, 0.1, 1).unwrap();
    assert_eq!(tokens_of(&train), [&documents[0][..900]]);
    assert_eq!(tokens_of(&held_out), [&documents[0][900..]]);
}

#[test]
fn documents_added_later_leave_the_split_of_the_earlier_ones() {
    let documents = distinct(&[2; 500]);
    let (_a, before) = shard_of(&documents[..300], n_vocab(&documents));
    let (_b, after) = shard_of(&documents, n_vocab(&documents));
    let held_out = |shard: &Arc<Shard>| tokens_of(&split(shard.clone(), 0.05, 9).unwrap().1);
    let later: Vec<_> = held_out(&after).into_iter().filter(|d| d[0] < documents[300][0]).collect();
    assert_eq!(held_out(&before), later);
}

#[test]
fn fraction_outside_its_range_is_refused() {
    let (_folder, shard) = shard_of(&distinct(&[5, 5]), 12);
    for fraction in [0.0, 1.0, -0.1, 1.5, f64::NAN] {
        assert!(matches!(split(shard.clone(), fraction, 0), Err(DataError::Fraction { .. })), "{fraction}");
    }
}

#[test]
fn part_shorter_than_a_context_is_refused_by_name() {
    let (_folder, shard) = shard_of(&distinct(&[4, 3]), 9);
    let vocabulary = vocabulary(9, false, false);
    let part = Part::all(shard);
    let message = Batches::new(part.clone(), &vocabulary, Layout::Packed, 7, 1, 0).unwrap_err().to_string();
    assert!(message.contains("the training data has 7 tokens, less than one context of 7"), "{message}");
    let message = Evaluation::new(part.clone(), &vocabulary, Layout::Packed, 8, 1).unwrap_err().to_string();
    assert!(message.contains("the held-out data has 7 tokens"), "{message}");
    Batches::new(part, &vocabulary, Layout::Packed, 6, 1, 0).unwrap();
}

#[test]
fn other_tokenizer_and_missing_padding_are_refused() {
    let (_folder, shard) = shard_of(&distinct(&[4, 3]), 9);
    let part = Part::all(shard);
    let error = Batches::new(part.clone(), &vocabulary(8, true, true), Layout::Packed, 2, 1, 0).unwrap_err();
    assert!(matches!(error, DataError::OtherTokenizer { shard: 9, tokenizer: 8, .. }), "{error}");
    let error = Evaluation::new(part, &vocabulary(9, false, true), Layout::OneDocumentPerRow, 2, 1).unwrap_err();
    assert!(matches!(error, DataError::NoEndOfText), "{error}");
}

#[test]
fn epochs_differ_in_order_and_in_where_rows_begin() {
    let documents = distinct(&[1000]);
    let (_folder, shard) = shard_of(&documents, n_vocab(&documents));
    let vocabulary = vocabulary(n_vocab(&documents), true, false);
    let mut batches = Batches::new(Part::all(shard), &vocabulary, Layout::Packed, 10, 100, 3).unwrap();
    assert_eq!((batches.rows_per_epoch(), batches.batches_in(2.0), batches.batches_in(0.001)), (100, 2, 1));
    assert_eq!(batches.epochs_before(3), 3.0);
    let starts = |batch: Batch| batch.input.chunks(10).map(|row| row[0]).collect::<Vec<_>>();
    let (first, second) = (starts(batches.batch_at(0).unwrap()), starts(batches.batch_at(1).unwrap()));
    assert_ne!(first, second);
    assert!(!first.is_sorted(), "rows of a long document are shuffled");
    let phases = |starts: &[u32]| counts(starts.iter().map(|s| s % 10)).into_iter().max_by_key(|p| p.1).unwrap().0;
    assert_ne!(phases(&first), phases(&second));
}

#[test]
fn vocabulary_counts_the_bytes_of_real_tokens() {
    let ids = bpe().encode(TEXT).unwrap();
    let vocabulary = Vocabulary::of(bpe());
    assert_eq!(ids.iter().map(|&id| vocabulary.token_bytes[id as usize] as usize).sum::<usize>(), TEXT.len());
    assert_eq!(vocabulary.token_bytes[vocabulary.end_of_text.unwrap() as usize], 0);
}
