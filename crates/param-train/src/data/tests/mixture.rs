//! Mixtures of data sets: each one's rows as they would be alone, in its share, at any place.

use std::sync::Arc;

use proptest::prelude::*;

use super::{Corpus, bpe, characters, shard_of};
use crate::data::build::{Reuse, Why};
use crate::data::permute::hash;
use crate::data::{Batch, Batches, Dataset, Layout, Mixture, Part, Shard, Vocabulary};

const N_VOCAB: u64 = 1000;

fn vocabulary() -> Vocabulary {
    Vocabulary { bos: None, end_of_text: Some(0), token_bytes: Arc::from([2; N_VOCAB as usize]) }
}

/// A shard of documents of these lengths, whose tokens are all `token`, and count up from it where `count`.
fn shard(lengths: &[usize], token: u32) -> (tempfile::TempDir, Arc<Shard>) {
    shard_of(&lengths.iter().map(|&n| (0..n as u32).map(|i| token + i % 100).collect()).collect::<Vec<_>>(), N_VOCAB)
}

fn mixture(shards: &[Arc<Shard>], weights: &[f64]) -> Mixture {
    let datasets = (0..).zip(shards).zip(weights).map(|((i, shard), &weight)| {
        let name = format!("set {i}");
        Dataset { name, weight, part: Part::all(shard.clone()) }
    });
    Mixture::new(datasets.collect()).unwrap()
}

fn rows(batches: &[Batch], context: usize) -> Vec<(Vec<u32>, Vec<i32>)> {
    let rows = batches.iter().flat_map(|b| b.input.chunks(context).zip(b.target.chunks(context)));
    rows.map(|(input, target)| (input.to_vec(), target.to_vec())).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn each_data_set_has_the_rows_it_would_have_alone(
        lengths in prop::collection::vec(prop::collection::vec(5usize..40, 2..12), 1..4),
        weights in prop::collection::vec(0.05f64..3.0, 3),
        seed: u64,
        packed: bool,
    ) {
        let shards: Vec<_> = (0..).zip(&lengths).map(|(i, lengths)| shard(lengths, 100 + 200 * i)).collect();
        let shards: Vec<_> = shards.iter().map(|(_, shard)| shard.clone()).collect();
        let layout = if packed { Layout::Packed } else { Layout::OneDocumentPerRow };
        let mixture = mixture(&shards, &weights);
        let batches = || Batches::new(mixture.clone(), &vocabulary(), layout, 7, 3, seed).unwrap();
        let mut continued = batches();
        let all: Vec<Batch> = (0..40).map(|i| continued.batch_at(i).unwrap()).collect();
        prop_assert_eq!(&batches().batch_at(23).unwrap(), &all[23], "resumed in the middle");
        let all = rows(&all, 7);
        let epochs = continued.dataset_epochs_before(40);
        for (i, shard) in shards.iter().enumerate() {
            let of_set = |row: &&(Vec<u32>, Vec<i32>)| row.0.iter().any(|&id| id != 0 && (id as usize - 100) / 200 == i);
            let got: Vec<_> = all.iter().filter(of_set).cloned().collect();
            let alone_seed = if shards.len() == 1 { seed } else { hash(&[seed, i as u64]) };
            let mut alone = Batches::new(Part::all(shard.clone()), &vocabulary(), layout, 7, 1, alone_seed).unwrap();
            let want: Vec<_> = (0..got.len() as u64).map(|n| alone.batch_at(n).unwrap()).collect();
            prop_assert_eq!(&got, &rows(&want, 7), "data set {}", i);
            let share = mixture.datasets()[i].weight;
            prop_assert!((got.len() as f64 - 120.0 * share).abs() < shards.len() as f64, "{} of share {}", got.len(), share);
            if shards.len() > 1 {
                prop_assert_eq!(epochs[i], got.len() as f64 / alone.rows_per_epoch() as f64);
            }
        }
    }
}

#[test]
fn weights_decide_the_digest_and_their_scale_does_not() {
    let (_a, a) = shard(&[30, 30], 100);
    let (_b, b) = shard(&[30, 20], 300);
    let digest = |weights: &[f64]| mixture(&[a.clone(), b.clone()], weights).digest();
    assert_eq!(digest(&[0.75, 0.25]), digest(&[3.0, 1.0]));
    assert_eq!(digest(&[f64::MAX, f64::MAX]), digest(&[0.5, 0.5]));
    assert_ne!(digest(&[0.75, 0.25]), digest(&[0.7, 0.3]));
    let plain = format!("{}:60", a.index().digest);
    assert_eq!(Mixture::from(Part::all(a)).digest(), plain, "as runs of one data set have always had it");
}

#[test]
fn data_set_without_a_row_is_named() {
    let (_a, a) = shard(&[30, 30], 100);
    let (_b, b) = shard(&[3], 300);
    let error = Batches::new(mixture(&[a, b], &[1.0, 1.0]), &vocabulary(), Layout::Packed, 7, 1, 0).unwrap_err();
    assert!(error.to_string().contains("the training data of `set 1` has 3 tokens"), "{error}");
}

#[test]
fn rows_say_where_their_documents_begin() {
    let (_folder, shard) = shard(&[4, 9, 3, 1, 30, 2], 100);
    let batches = || Batches::new(Part::all(shard.clone()), &vocabulary(), Layout::Packed, 11, 4, 5).unwrap();
    assert_eq!(batches().batch_at(0).unwrap().first, None);
    let mut isolating = batches().isolating_documents(true);
    let mut n_start = 0;
    for i in 0..20 {
        let batch = isolating.batch_at(i).unwrap();
        assert_eq!(Batch { first: None, ..batch.clone() }, batches().batch_at(i).unwrap(), "all else is as it was");
        let first = batch.first.unwrap();
        for (input, first) in batch.input.chunks(11).zip(first.chunks(11)) {
            for t in 0..11 {
                // The end-of-text before a document is the first it sees.
                let last_end = input[..=t].iter().rposition(|&id| id == 0).unwrap_or(0);
                assert_eq!(first[t] as usize, last_end, "{input:?} at {t}");
                n_start += usize::from(last_end == t);
            }
        }
    }
    assert!(n_start > 80);
}

#[test]
fn in_order_documents_come_as_they_lie_in_every_epoch() {
    let (_folder, shard) = shard(&[4, 9, 3, 1, 30, 2], 100);
    let mut batches =
        Batches::new(Part::all(shard.clone()), &vocabulary(), Layout::OneDocumentPerRow, 7, 4, 5).unwrap().in_order();
    let mut first_tokens = Vec::new();
    for i in 0..3 {
        first_tokens.extend(batches.batch_at(i).unwrap().input.chunks(7).map(|row| row[..2].to_vec()));
    }
    let mut want = Vec::new();
    for document in (0..6).chain(0..6) {
        let tokens = Part::all(shard.clone()).document(document);
        let mut row = vocabulary().bos.into_iter().collect::<Vec<_>>();
        shard.read(tokens.start..tokens.end.min(tokens.start + 2), &mut row).unwrap();
        row.resize(row.len().max(2), 0);
        want.push(row[..2].to_vec());
    }
    assert_eq!(first_tokens, want);
}

#[test]
fn cache_of_another_tokenizer_is_noticed_in_each_data_sets_folder() {
    let corpus = Corpus::new(&[("a.txt", b"text of one"), ("b.txt", b"and of another")]);
    let prepare = |name: &str, tokenizer| {
        let cancel = std::sync::atomic::AtomicBool::new(false);
        let folder = corpus.shards().join(crate::data::folder_name(&corpus.path(name)));
        crate::data::prepare(&folder, &corpus.find(&[name]).unwrap(), "text", tokenizer, &mut |_| (), &cancel)
            .unwrap()
            .1
    };
    for name in ["a.txt", "b.txt"] {
        assert_eq!(prepare(name, bpe()), Reuse::Built(Why::First));
        assert_eq!(prepare(name, bpe()), Reuse::Reused);
    }
    assert_eq!(prepare("a.txt", characters()), Reuse::Built(Why::Tokenizer));
    assert_eq!(prepare("b.txt", bpe()), Reuse::Reused, "the other is left alone");
    let (x, y) = (crate::data::folder_name("x/*.txt".as_ref()), crate::data::folder_name("y/*.txt".as_ref()));
    assert!(x != y && x.starts_with("_.txt-"), "{x} {y}");
}
