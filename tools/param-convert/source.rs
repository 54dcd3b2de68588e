//! What is converted: the checkpoint with the config and tokenizer that belong to it.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use param::cli::Usage;
use param_model::checkpoint::{CONFIG_FILE, TOKENIZER_FILE};
use param_model::{Checkpoint, Config, Tokenizer};

use crate::Args;

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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;
    use param_model::checkpoint::{WEIGHTS_FILE, write_weights};

    use super::*;

    fn args(folder: &Path, flags: &[&str]) -> Args {
        let paths = ["param-convert", folder.to_str().unwrap(), "out.gguf"];
        Args::parse_from(paths.iter().chain(flags))
    }

    fn write(folder: &Path, config: &Config) {
        let weights: Vec<Vec<f32>> = param_model::tensors(config).iter().map(|t| vec![0.0; t.n_elements()]).collect();
        let params: Vec<&[f32]> = weights.iter().map(Vec::as_slice).collect();
        write_weights(&folder.join(WEIGHTS_FILE), config, &params).unwrap();
    }

    fn small(n_expert: usize) -> Config {
        let tiny = Config::preset("param-tiny").unwrap();
        Config { n_vocab: 300, n_embd: 16, n_head: 4, n_layer: 2, n_expert, n_expert_used: n_expert.min(2), ..tiny }
    }

    fn usage(folder: &Path, flags: &[&str]) -> String {
        Source::open(&args(folder, flags)).err().unwrap().downcast::<Usage>().unwrap().0
    }

    #[test]
    fn flags_stand_in_for_a_missing_config_and_errors_name_them() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &small(4));
        let message = usage(folder.path(), &[]);
        assert!(["--config", "--heads", "--top-k"].iter().all(|flag| message.contains(flag)), "{message}");
        assert!(usage(folder.path(), &["--heads", "4"]).contains("of 4, with --top-k"));
        let source = Source::open(&args(folder.path(), &["--heads", "4", "--top-k", "2"])).unwrap();
        assert_eq!((source.config.n_head, source.config.n_expert_used, source.config.n_embd), (4, 2, 16));

        write(folder.path(), &small(1));
        assert_eq!(Source::open(&args(folder.path(), &["--heads", "2"])).unwrap().config.n_head, 2);
    }

    #[test]
    fn config_beside_the_weights_is_found_and_one_named_wins() {
        let folder = tempfile::tempdir().unwrap();
        let config = small(4);
        write(folder.path(), &config);
        std::fs::write(folder.path().join(CONFIG_FILE), config.to_json()).unwrap();
        assert_eq!(Source::open(&args(folder.path(), &[])).unwrap().config, config);
        let other = folder.path().join("other.json");
        std::fs::write(&other, Config { n_head: 2, ..config.clone() }.to_json()).unwrap();
        let named = args(folder.path(), &["--config", other.to_str().unwrap(), "--top-k", "3"]);
        let source = Source::open(&named).unwrap();
        assert_eq!((source.config.n_head, source.config.n_expert_used), (2, 3));
    }

    #[test]
    fn a_config_of_another_model_is_refused_by_tensor_and_shape() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &small(4));
        std::fs::write(folder.path().join(CONFIG_FILE), Config { n_vocab: 301, ..small(4) }.to_json()).unwrap();
        let message = Source::open(&args(folder.path(), &[])).err().unwrap().to_string();
        assert!(message.contains("[301, 16]") && message.contains("[300, 16]"), "{message}");
    }

    #[test]
    fn a_tokenizer_too_large_for_the_model_is_refused_by_file() {
        let folder = tempfile::tempdir().unwrap();
        let config = small(4);
        write(folder.path(), &config);
        std::fs::write(folder.path().join(CONFIG_FILE), config.to_json()).unwrap();
        let path = folder.path().join(TOKENIZER_FILE);
        let alphabet = |n: u32| (0..n).filter_map(|i| char::from_u32(0x4e00 + i)).collect();
        std::fs::write(&path, Tokenizer::characters(&alphabet(200)).unwrap().json()).unwrap();
        assert!(Source::open(&args(folder.path(), &[])).unwrap().tokenizer.is_some());
        std::fs::write(&path, Tokenizer::characters(&alphabet(400)).unwrap().json()).unwrap();
        let message = format!("{:#}", Source::open(&args(folder.path(), &[])).err().unwrap());
        assert!(message.contains(TOKENIZER_FILE) && message.contains("belongs to another model"), "{message}");
    }
}
