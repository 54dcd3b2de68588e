//! From the data flags to tokens: finds the files, gets the tokenizer, tokenizes, holds a part out.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};
use indicatif::HumanCount;
use param::cli::{self, Usage};
use param_model::Tokenizer;
use param_model::atomic::write_file;
use param_train::data::{
    Dataset, Mixture, Part, Progress, Reuse, Shard, SourceFile, Why, alphabet, check_weight, find, folder_name,
    prepare, sample, split,
};
use param_train::trainer::Corpus;
use serde::{Deserialize, Serialize};

use crate::args;

/// Text from which a tokenizer is trained: more changes its merges hardly.
const TOKENIZER_SAMPLE: usize = 64 << 20;
/// File in a run's folder that remembers its data.
const DATA_FILE: &str = "data.json";
/// Folder in a run's folder that its tokens are kept in.
pub const TOKENS_FOLDER: &str = "tokens";
/// Folders of the tokens within it.
const TRAIN: &str = "train";
const EVAL: &str = "eval";

/// What a run trains on, as the flags said it; kept with the run so that resuming needs no flags.
#[derive(Serialize, Deserialize)]
pub struct DataChoice {
    inputs: Vec<PathBuf>,
    /// One for each input where each is a data set of its own; empty where they are one together.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    weights: Vec<f64>,
    eval_inputs: Vec<PathBuf>,
    holdout: f64,
    extensions: Vec<String>,
    text_field: String,
    /// Seed of the held-out part: another one would let the model see what it is validated on.
    seed: u64,
}

impl DataChoice {
    /// What the flags say.
    pub fn from_flags(flags: &args::Data, seed: u64) -> Result<Self> {
        if flags.data.is_empty() {
            bail!(Usage("--data PATH is needed: text files, folders or globs".into()));
        }
        // Absolute, so that the run resumes from any working folder.
        let absolute = |paths: &[PathBuf]| -> Result<Vec<PathBuf>> {
            paths.iter().map(|p| std::path::absolute(p).with_context(|| p.display().to_string())).collect()
        };
        let (inputs, weights) = weighted(&flags.data)?;
        Ok(Self {
            inputs: absolute(&inputs)?,
            weights,
            eval_inputs: absolute(&flags.eval_data)?,
            holdout: flags.holdout.unwrap_or(0.05),
            extensions: flags.ext.clone(),
            text_field: flags.text_field.clone().unwrap_or_else(|| "text".to_owned()),
            seed,
        })
    }

    /// What the run in `folder` was started with.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join(DATA_FILE);
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("{}: give --data, as it does not say what the run trains on", path.display()))?;
        serde_json::from_str(&text).with_context(|| path.display().to_string())
    }

    /// Remembers it with the run.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let path = folder.join(DATA_FILE);
        let json = serde_json::to_vec_pretty(self)?;
        write_file(&path, |out| std::io::Write::write_all(out, &json)).with_context(|| path.display().to_string())
    }

    /// The tokenizer that the flags ask for: read, or made from the data, with the model's `n_vocab` entries where no flag says
    /// how many.
    pub fn tokenizer(&self, flags: &args::Data, n_vocab: impl FnOnce() -> Result<usize>) -> Result<Tokenizer> {
        if let Some(path) = &flags.tokenizer {
            return Ok(Tokenizer::from_file(path)?);
        }
        let sets = self.sets()?;
        if flags.chars {
            let files = sets.into_iter().flat_map(|set| set.files).collect::<Vec<_>>();
            return Ok(Tokenizer::characters(&alphabet(&files, &self.text_field)?)?);
        }
        let n_vocab = flags.vocab_size.map_or_else(n_vocab, Ok)?;
        let sum: f64 = sets.iter().map(|set| set.weight).sum();
        let mut texts = Vec::new();
        for set in &sets {
            let n_byte = (TOKENIZER_SAMPLE as f64 * (set.weight / sum)) as usize;
            texts.extend(sample(&set.files, &self.text_field, n_byte.max(1))?);
        }
        let n_byte = texts.iter().map(String::len).sum::<usize>();
        eprintln!("training a tokenizer of {n_vocab} entries on {} of text", indicatif::HumanBytes(n_byte as u64));
        let tokenizer = Tokenizer::train_bpe(texts.into_iter(), n_vocab)?;
        if tokenizer.n_vocab() < n_vocab {
            eprintln!("the text gives only {} entries", tokenizer.n_vocab());
        }
        Ok(tokenizer)
    }

    /// Tokens of everything, with shards kept in `cache`.
    pub fn corpus(&self, cache: &Path, tokenizer: Tokenizer, cancel: &AtomicBool) -> Result<Corpus> {
        let (mut train, mut eval) = (Vec::new(), Vec::new());
        for (set, shard) in self.shards(cache, &tokenizer, cancel)? {
            let dataset = |part| Dataset { name: set.name.clone(), weight: set.weight, part };
            if self.eval_inputs.is_empty() {
                let (kept, held_out) = split(shard, self.holdout, self.seed)?;
                train.push(dataset(kept));
                eval.push(dataset(held_out));
            } else {
                train.push(dataset(Part::all(shard)));
            }
        }
        let train = Mixture::new(train)?;
        let eval = if self.eval_inputs.is_empty() {
            Mixture::new(eval)?
        } else {
            let files = find(&self.eval_inputs, &self.extensions)?;
            Part::all(Arc::new(self.shard(&files, &cache.join(EVAL), &tokenizer, cancel)?)).into()
        };
        if train.datasets().len() > 1 {
            for Dataset { name, weight, part } in train.datasets() {
                eprintln!("{:.1}% of the rows from {name}: {} tokens", 100.0 * weight, HumanCount(part.n_token()));
            }
        }
        let counts = |mixture: &Mixture| format!("{} tokens", HumanCount(mixture.n_token()));
        eprintln!("training on {}, validating on {}", counts(&train), counts(&eval));
        Ok(Corpus { tokenizer, train, eval })
    }

    /// Tokens of `--data` alone.
    pub fn everything(&self, cache: &Path, tokenizer: &Tokenizer, cancel: &AtomicBool) -> Result<Mixture> {
        let shards = self.shards(cache, tokenizer, cancel)?.into_iter();
        let datasets =
            shards.map(|(set, shard)| Dataset { name: set.name, weight: set.weight, part: Part::all(shard) });
        Ok(Mixture::new(datasets.collect())?)
    }

    /// The data sets and their files.
    fn sets(&self) -> Result<Vec<Set>> {
        let find = |inputs: &[PathBuf]| find(inputs, &self.extensions);
        if self.weights.is_empty() {
            let files = find(&self.inputs)?;
            return Ok(vec![Set { name: String::new(), folder: TRAIN.to_owned(), weight: 1.0, files }]);
        }
        let named = self.inputs.iter().zip(names(&self.inputs)).zip(&self.weights);
        let set = |((input, name), &weight): ((&PathBuf, String), &f64)| -> Result<Set> {
            check_weight(&name, weight)?;
            Ok(Set { name, folder: folder_name(input), weight, files: find(std::slice::from_ref(input))? })
        };
        let sets = named.map(set).collect::<Result<Vec<_>>>()?;
        let mut owners = BTreeMap::new();
        for set in &sets {
            for file in &set.files {
                // What one data set holds out, the other would train on.
                if let Some(other) = owners.insert(&file.path, &set.name) {
                    bail!(Usage(format!("--data: {} is in both {other} and {}", file.path.display(), set.name)));
                }
            }
        }
        Ok(sets)
    }

    fn shards(&self, cache: &Path, tokenizer: &Tokenizer, cancel: &AtomicBool) -> Result<Vec<(Set, Arc<Shard>)>> {
        let shard = |set: Set| {
            let shard = self.shard(&set.files, &cache.join(&set.folder), tokenizer, cancel)?;
            Ok((set, Arc::new(shard)))
        };
        self.sets()?.into_iter().map(shard).collect()
    }

    fn shard(&self, files: &[SourceFile], folder: &Path, tokenizer: &Tokenizer, cancel: &AtomicBool) -> Result<Shard> {
        let bar = cli::bar(files.iter().map(|f| f.size).sum());
        let mut progress = |p: Progress| {
            bar.set_position(p.disk_bytes);
            bar.set_message(format!("tokenizing: {} tokens", HumanCount(p.n_token)));
        };
        let prepared = prepare(folder, files, &self.text_field, tokenizer, &mut progress, cancel);
        bar.finish_and_clear();
        let (shard, reuse) = prepared?;
        let index = shard.index();
        let how = match reuse {
            Reuse::Reused => "reused".to_owned(),
            Reuse::Built(Why::First) => "tokenized".to_owned(),
            Reuse::Built(why) => format!("tokenized again ({})", reason(&why)),
        };
        let (bytes, documents) = (indicatif::HumanBytes(index.n_byte), HumanCount(index.n_document));
        eprintln!("{how}: {} files, {documents} documents, {bytes}, {} tokens", files.len(), HumanCount(index.n_token));
        if !index.skipped.is_empty() {
            eprintln!("left out: {}", index.skipped);
        }
        Ok(shard)
    }
}

/// One of the data sets that the flags name.
struct Set {
    /// Empty where it is the only one.
    name: String,
    /// Where its shard is kept, in the folder of all of them: the same whatever else is mixed in.
    folder: String,
    weight: f64,
    files: Vec<SourceFile>,
}

/// The paths, and the weights at their ends: all have one or none has. What exists by the whole name has none.
fn weighted(items: &[PathBuf]) -> Result<(Vec<PathBuf>, Vec<f64>)> {
    let parts = |item: &PathBuf| {
        let (path, weight) = item.to_str().filter(|_| !item.exists())?.rsplit_once(':')?;
        Some((PathBuf::from(path), weight.parse::<f64>().ok()?))
    };
    let split: Vec<_> = items.iter().map(parts).collect();
    let with = split.iter().position(Option::is_some);
    let without = split.iter().position(Option::is_none);
    if let (Some(with), Some(without)) = (with, without) {
        let (with, without) = (items[with].display(), items[without].display());
        bail!(Usage(format!("--data: {with} has a weight and {without} has none: give each data set one, or none")));
    }
    if with.is_none() {
        return Ok((items.to_vec(), Vec::new()));
    }
    for (item, (path, weight)) in items.iter().zip(split.iter().flatten()) {
        if path.as_os_str().is_empty() {
            bail!(Usage(format!("--data {}: expected a path before the weight", item.display())));
        }
        check_weight(&item.display().to_string(), *weight).map_err(|e| Usage(format!("--data: {e}")))?;
    }
    let (paths, weights): (Vec<_>, Vec<_>) = split.into_iter().flatten().unzip();
    // A mixture of one is no mixture.
    Ok(if paths.len() == 1 { (paths, Vec::new()) } else { (paths, weights) })
}

/// Of each path as much of its end as tells them all apart.
fn names(paths: &[PathBuf]) -> Vec<String> {
    let longest = paths.iter().map(|path| path.components().count()).max().unwrap_or(1);
    let tails = |n: usize| {
        let tail = |path: &PathBuf| {
            let skipped = path.components().count().saturating_sub(n);
            path.components().skip(skipped).collect::<PathBuf>().display().to_string()
        };
        paths.iter().map(tail).collect::<Vec<_>>()
    };
    let is_told_apart = |names: &Vec<String>| names.iter().collect::<BTreeSet<_>>().len() == names.len();
    (1..longest).map(tails).find(is_told_apart).unwrap_or_else(|| tails(longest))
}

fn reason(why: &Why) -> String {
    match why {
        Why::First => "there was none".to_owned(),
        Why::Tokenizer => "the tokenizer changed".to_owned(),
        Why::Source(path) => format!("{} changed", path.display()),
        Why::Options => "the options changed".to_owned(),
        Why::Damaged(problem) => format!("the old tokens were damaged: {problem}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(items: &[&str]) -> Result<(Vec<PathBuf>, Vec<f64>)> {
        weighted(&items.iter().map(PathBuf::from).collect::<Vec<_>>())
    }

    #[test]
    fn weights_are_told_from_paths() {
        let folder = tempfile::tempdir().unwrap();
        let literal = folder.path().join("a:2");
        std::fs::write(&literal, "x").unwrap();
        let literal = literal.to_str().unwrap();
        assert_eq!(
            parse(&["wiki/*.parquet:0.7", "se.jsonl:3e-1"]).unwrap(),
            (vec!["wiki/*.parquet".into(), "se.jsonl".into()], vec![0.7, 0.3])
        );
        assert_eq!(parse(&["a.txt", "b:c"]).unwrap(), (vec!["a.txt".into(), "b:c".into()], vec![]));
        assert_eq!(parse(&[literal, "b"]).unwrap(), (vec![literal.into(), "b".into()], vec![]));
        assert_eq!(parse(&["a.txt:5"]).unwrap(), (vec!["a.txt".into()], vec![]));
        for (items, word) in [
            (&["a:1", "b"][..], "b has none"),
            (&["a:0", "b:1"], "a:0"),
            (&["a:1", "b:-1"], "b:-1"),
            (&["a:nan", "b:1"], "a:nan"),
            (&["a:inf", "b:1"], "a:inf"),
            (&["a:1", ":1"], ":1"),
        ] {
            let error = parse(items).unwrap_err();
            assert!(error.is::<Usage>() && error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn names_are_as_short_as_tells_them_apart() {
        let named = |paths: &[&str]| names(&paths.iter().map(PathBuf::from).collect::<Vec<_>>());
        assert_eq!(named(&["/x/wiki", "/x/se.jsonl"]), ["wiki", "se.jsonl"]);
        assert_eq!(named(&["/x/wiki/*.parquet", "/x/se/*.parquet"]), ["wiki/*.parquet", "se/*.parquet"]);
        assert_eq!(named(&["/x", "/x"]), ["/x", "/x"]);
    }

    #[test]
    fn choices_of_before_there_were_mixtures_load() {
        let json = r#"{"inputs": ["/a"], "eval_inputs": [], "holdout": 0.05, "extensions": [], "text_field": "text", "seed": 1}"#;
        let choice: DataChoice = serde_json::from_str(json).unwrap();
        assert!(choice.weights.is_empty());
        assert!(!serde_json::to_string(&choice).unwrap().contains("weights"), "and are saved as they were");
    }
}
