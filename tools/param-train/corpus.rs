//! From the data flags to tokens: finds the files, gets the tokenizer, tokenizes, holds a part out.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};
use indicatif::HumanCount;
use param::cli::{self, Usage};
use param_model::atomic::write_file;
use param_model::{Config, Tokenizer};
use param_train::data::{Part, Progress, Reuse, Shard, SourceFile, Why, alphabet, find, prepare, sample, split};
use param_train::trainer::Corpus;
use serde::{Deserialize, Serialize};

use crate::args;

/// Text from which a tokenizer is trained: more changes its merges hardly.
const TOKENIZER_SAMPLE: usize = 64 << 20;
/// File in a run's folder that remembers its data.
const DATA_FILE: &str = "data.json";

/// What a run trains on, as the flags said it; kept with the run so that resuming needs no flags.
#[derive(Serialize, Deserialize)]
pub struct DataChoice {
    inputs: Vec<PathBuf>,
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
        Ok(Self {
            inputs: absolute(&flags.data)?,
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

    fn files(&self, inputs: &[PathBuf]) -> Result<Vec<SourceFile>> {
        Ok(find(inputs, &self.extensions)?)
    }

    /// The tokenizer that the flags ask for: read, or made from the data.
    pub fn tokenizer(&self, flags: &args::Data, config: &Config) -> Result<Tokenizer> {
        if let Some(path) = &flags.tokenizer {
            return Ok(Tokenizer::from_file(path)?);
        }
        let files = self.files(&self.inputs)?;
        if flags.chars {
            return Ok(Tokenizer::characters(&alphabet(&files, &self.text_field)?)?);
        }
        let n_vocab = flags.vocab_size.unwrap_or(config.n_vocab);
        let texts = sample(&files, &self.text_field, TOKENIZER_SAMPLE)?;
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
        let train = Arc::new(self.shard(&self.inputs, &cache.join("train"), &tokenizer, cancel)?);
        let (train, eval) = if self.eval_inputs.is_empty() {
            split(train, self.holdout, self.seed)?
        } else {
            let eval = self.shard(&self.eval_inputs, &cache.join("eval"), &tokenizer, cancel)?;
            (Part::all(train), Part::all(Arc::new(eval)))
        };
        let counts = |part: &Part| format!("{} tokens", HumanCount(part.n_token()));
        eprintln!("training on {}, validating on {}", counts(&train), counts(&eval));
        Ok(Corpus { tokenizer, train, eval })
    }

    /// Tokens of `--data` alone.
    pub fn everything(&self, cache: &Path, tokenizer: &Tokenizer, cancel: &AtomicBool) -> Result<Part> {
        Ok(Part::all(Arc::new(self.shard(&self.inputs, cache, tokenizer, cancel)?)))
    }

    fn shard(&self, inputs: &[PathBuf], folder: &Path, tokenizer: &Tokenizer, cancel: &AtomicBool) -> Result<Shard> {
        let files = self.files(inputs)?;
        let bar = cli::bar(files.iter().map(|f| f.size).sum());
        let mut progress = |p: Progress| {
            bar.set_position(p.disk_bytes);
            bar.set_message(format!("tokenizing: {} tokens", HumanCount(p.n_token)));
        };
        let prepared = prepare(folder, &files, &self.text_field, tokenizer, &mut progress, cancel);
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

fn reason(why: &Why) -> String {
    match why {
        Why::First => "there was none".to_owned(),
        Why::Tokenizer => "the tokenizer changed".to_owned(),
        Why::Source(path) => format!("{} changed", path.display()),
        Why::Options => "the options changed".to_owned(),
        Why::Damaged(problem) => format!("the old tokens were damaged: {problem}"),
    }
}
