//! What is converted: the checkpoint with the config and tokenizer that belong to it.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use param_model::checkpoint::{CONFIG_FILE, TOKENIZER_FILE};
use param_model::{Checkpoint, Config, Tokenizer};

use crate::{Args, Usage};

/// A checkpoint that holds exactly the model of its config.
pub struct Source {
    /// The weights' file or the index of their shards, free of links: a run that goes on training moves its own.
    pub weights: PathBuf,
    pub config: Config,
    pub tokenizer: Option<Tokenizer>,
}

impl Source {
    pub fn open(args: &Args) -> Result<Source> {
        let checkpoint = Checkpoint::open(&args.checkpoint)?;
        let beside = |name: &str| Some(checkpoint.folder().join(name)).filter(|path| path.exists());
        let config = match args.config.clone().or_else(|| beside(CONFIG_FILE)) {
            Some(path) => {
                let config = Config::from_file(&path)?;
                let n_head = args.heads.unwrap_or(config.n_head);
                let n_expert_used = args.top_k.unwrap_or(config.n_expert_used);
                Config { n_head, n_expert_used, ..config }.checked(&path.display().to_string())?
            }
            None => infer(&checkpoint, args)?,
        };
        checkpoint.check(&config)?;
        let tokenizer = match args.tokenizer.clone().or_else(|| beside(TOKENIZER_FILE)) {
            Some(path) => {
                let tokenizer = Tokenizer::from_file(&path)?;
                tokenizer.check_fits(config.n_vocab).with_context(|| path.display().to_string())?;
                Some(tokenizer)
            }
            None => None,
        };
        let weights = std::fs::canonicalize(checkpoint.path())?;
        Ok(Source { weights, config, tokenizer })
    }

    /// The checkpoint, mapped anew. Every page read of a map counts as memory of this process until the map is
    /// dropped, so each tensor gets its own.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        Ok(Checkpoint::open(&self.weights)?)
    }
}

/// The config that shapes and flags tell together.
fn infer(checkpoint: &Checkpoint, args: &Args) -> Result<Config> {
    let folder = checkpoint.folder().display();
    let Some(n_head) = args.heads else {
        bail!(Usage(format!(
            "no {CONFIG_FILE} in {folder}: give --config FILE, or the attention heads with --heads N and the experts \
             chosen per token with --top-k N, which the weights' shapes cannot tell"
        )));
    };
    let config = checkpoint.infer_config(n_head, args.top_k.unwrap_or(1))?;
    if config.n_expert > 1 && args.top_k.is_none() {
        bail!(Usage(format!(
            "no {CONFIG_FILE} in {folder}: give the experts chosen per token, of {}, with --top-k N",
            config.n_expert
        )));
    }
    Ok(config)
}
