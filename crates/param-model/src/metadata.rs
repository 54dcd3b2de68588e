//! GGUF metadata: the keys under which a model's hyperparameters and tokenizer are written and read back.

use gguf::{Metadata, Value};

use crate::config::{Activation, Config};
use crate::error::Error;
use crate::tokenizer::{Kind, TokenType, Tokenizer};

/// Value of `general.architecture`.
pub const ARCHITECTURE: &str = "param";

const CONTEXT_LENGTH: &str = "param.context_length";
const EMBEDDING_LENGTH: &str = "param.embedding_length";
const BLOCK_COUNT: &str = "param.block_count";
const FEED_FORWARD_LENGTH: &str = "param.feed_forward_length";
const EXPERT_FEED_FORWARD_LENGTH: &str = "param.expert_feed_forward_length";
const EXPERT_COUNT: &str = "param.expert_count";
const EXPERT_USED_COUNT: &str = "param.expert_used_count";
const EXPERT_WEIGHTS_NORM: &str = "param.expert_weights_norm";
const MOE_EVERY_N_LAYERS: &str = "param.moe_every_n_layers";
const MOE_LAYER_PHASE: &str = "param.moe_layer_phase";
const VOCAB_SIZE: &str = "param.vocab_size";
const HEAD_COUNT: &str = "param.attention.head_count";
const QKV_BIAS: &str = "param.attention.qkv_bias";
const LAYER_NORM_EPSILON: &str = "param.attention.layer_norm_epsilon";
const EXPERT_BIAS: &str = "param.expert_bias";
const EXPERT_SELECTION_BIAS: &str = "param.expert_selection_bias";
const EXPERT_ACTIVATION: &str = "param.expert_activation";
const DENSE_ACTIVATION: &str = "param.feed_forward_activation";

const TOKENIZER_MODEL: &str = "tokenizer.ggml.model";
const TOKENIZER_PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS_TOKEN_ID: &str = "tokenizer.ggml.bos_token_id";
const EOS_TOKEN_ID: &str = "tokenizer.ggml.eos_token_id";
const PADDING_TOKEN_ID: &str = "tokenizer.ggml.padding_token_id";
const UNKNOWN_TOKEN_ID: &str = "tokenizer.ggml.unknown_token_id";
const ADD_BOS_TOKEN: &str = "tokenizer.ggml.add_bos_token";
const HUGGINGFACE_JSON: &str = "tokenizer.huggingface.json";

/// ggml's numbers for token types.
const TYPE_NORMAL: i32 = 1;
const TYPE_CONTROL: i32 = 3;
const TYPE_USER_DEFINED: i32 = 4;
const TYPE_UNUSED: i32 = 5;

/// Value of [`TOKENIZER_MODEL`] for byte-level BPE, as llama.cpp writes it, and for character mode, which is ours.
const MODEL_BPE: &str = "gpt2";
const MODEL_CHARACTERS: &str = "characters";

impl Config {
    /// Appends the hyperparameters that inference needs.
    pub fn write_metadata(&self, metadata: &mut Metadata) -> Result<(), Error> {
        let mut int = |key: &str, value: usize| metadata.insert(key, Value::U32(value as u32));
        int(CONTEXT_LENGTH, self.n_ctx)?;
        int(EMBEDDING_LENGTH, self.n_embd)?;
        int(BLOCK_COUNT, self.n_layer)?;
        int(FEED_FORWARD_LENGTH, self.n_ff())?;
        int(EXPERT_FEED_FORWARD_LENGTH, self.n_ff())?;
        int(EXPERT_COUNT, self.n_expert)?;
        int(EXPERT_USED_COUNT, self.n_expert_used)?;
        int(MOE_EVERY_N_LAYERS, self.moe_stride)?;
        int(MOE_LAYER_PHASE, self.moe_phase)?;
        int(VOCAB_SIZE, self.n_vocab)?;
        int(HEAD_COUNT, self.n_head)?;
        metadata.insert(EXPERT_WEIGHTS_NORM, true)?;
        metadata.insert(QKV_BIAS, self.qkv_bias)?;
        metadata.insert(EXPERT_BIAS, self.expert_bias)?;
        if self.use_selection_bias {
            metadata.insert(EXPERT_SELECTION_BIAS, true)?;
        }
        metadata.insert(LAYER_NORM_EPSILON, self.norm_eps)?;
        metadata.insert(EXPERT_ACTIVATION, self.expert_activation.name())?;
        metadata.insert(DENSE_ACTIVATION, self.dense_activation.name())?;
        Ok(())
    }

    /// The model that a GGUF's metadata describes. What only training uses has the reference's value.
    pub fn from_metadata(metadata: &Metadata) -> Result<Self, Error> {
        let architecture = metadata.str("general.architecture")?;
        let wrong = |key: &str, problem: String| Error::Metadata { key: key.to_owned(), problem };
        if architecture != ARCHITECTURE {
            let problem =
                format!("expected \"{ARCHITECTURE}\", got \"{architecture}\": this runtime runs PARAM models");
            return Err(wrong("general.architecture", problem));
        }
        let int = |key: &str| metadata.u32(key).map(|n| n as usize);
        let flag = |key: &str, default: bool| if metadata.contains(key) { metadata.bool(key) } else { Ok(default) };
        let activation = |key: &str, default: Activation| -> Result<Activation, Error> {
            if !metadata.contains(key) {
                return Ok(default);
            }
            let name = metadata.str(key)?;
            Activation::from_name(name)
                .ok_or_else(|| wrong(key, format!("unknown activation \"{name}\": expected gelu_erf or gelu_tanh")))
        };
        let reference = Config::preset("param-0.5b")?;
        let config = Config {
            n_vocab: int(VOCAB_SIZE)?,
            n_ctx: int(CONTEXT_LENGTH)?,
            n_embd: int(EMBEDDING_LENGTH)?,
            n_head: int(HEAD_COUNT)?,
            n_layer: int(BLOCK_COUNT)?,
            n_expert: int(EXPERT_COUNT)?,
            n_expert_used: int(EXPERT_USED_COUNT)?,
            moe_stride: int(MOE_EVERY_N_LAYERS)?,
            moe_phase: int(MOE_LAYER_PHASE)?,
            qkv_bias: flag(QKV_BIAS, reference.qkv_bias)?,
            expert_bias: flag(EXPERT_BIAS, reference.expert_bias)?,
            use_selection_bias: flag(EXPERT_SELECTION_BIAS, reference.use_selection_bias)?,
            norm_eps: metadata.f32(LAYER_NORM_EPSILON)?,
            expert_activation: activation(EXPERT_ACTIVATION, reference.expert_activation)?,
            dense_activation: activation(DENSE_ACTIVATION, reference.dense_activation)?,
            ..reference
        }
        .checked("GGUF metadata")?;
        for key in [FEED_FORWARD_LENGTH, EXPERT_FEED_FORWARD_LENGTH] {
            if metadata.contains(key) && int(key)? != config.n_ff() {
                let expected = config.n_ff();
                let problem = format!("expected {expected}, four times {EMBEDDING_LENGTH}, got {}", int(key)?);
                return Err(wrong(key, problem));
            }
        }
        if !flag(EXPERT_WEIGHTS_NORM, true)? {
            let problem = "expected true: PARAM weighs the chosen experts by a softmax over them alone".to_owned();
            return Err(wrong(EXPERT_WEIGHTS_NORM, problem));
        }
        Ok(config)
    }
}

impl Tokenizer {
    /// Appends the tokenizer: ggml's lists, padded with unused entries to the model's `n_vocab`, and the exact JSON.
    pub fn write_metadata(&self, n_vocab: usize, metadata: &mut Metadata) -> Result<(), Error> {
        self.check_fits(n_vocab)?;
        let characters = self.kind() == Kind::Characters;
        metadata.insert(TOKENIZER_MODEL, if characters { MODEL_CHARACTERS } else { MODEL_BPE })?;
        metadata.insert(TOKENIZER_PRE, self.pre())?;
        // Every reader wants spellings to differ, unused ones included.
        let spelling = |id: usize| match self.entries().get(id) {
            Some((text, kind)) if *kind != TokenType::Unused => text.clone(),
            _ => format!("[UNUSED{id}]"),
        };
        let number = |id: usize| match self.entries().get(id).map(|(_, kind)| *kind) {
            Some(TokenType::Normal) => TYPE_NORMAL,
            Some(TokenType::Control) => TYPE_CONTROL,
            Some(TokenType::UserDefined) => TYPE_USER_DEFINED,
            Some(TokenType::Unused) | None => TYPE_UNUSED,
        };
        metadata.insert(TOKENS, (0..n_vocab).map(spelling).collect::<Vec<_>>())?;
        metadata.insert(TOKEN_TYPE, (0..n_vocab).map(number).collect::<Vec<_>>())?;
        if !characters {
            metadata.insert(MERGES, self.merges().to_vec())?;
        }
        // Where a prompt has no begin-of-text, generation from nothing starts after the end of another document.
        let ids = [
            (BOS_TOKEN_ID, self.bos().or(self.end_of_text())),
            (EOS_TOKEN_ID, self.end_of_text()),
            (PADDING_TOKEN_ID, self.end_of_text()),
            (UNKNOWN_TOKEN_ID, self.unknown()),
        ];
        for (key, id) in ids {
            if let Some(id) = id {
                metadata.insert(key, Value::U32(id))?;
            }
        }
        metadata.insert(ADD_BOS_TOKEN, self.bos().is_some())?;
        metadata.insert(HUGGINGFACE_JSON, self.json())?;
        Ok(())
    }

    /// The tokenizer of a GGUF: the exact JSON where it is there, else rebuilt from the lists. `None` where the file
    /// has no tokenizer at all.
    pub fn from_metadata(metadata: &Metadata) -> Result<Option<Self>, Error> {
        if metadata.contains(HUGGINGFACE_JSON) {
            let json = metadata.str(HUGGINGFACE_JSON)?.to_owned();
            return Self::from_json(json, HUGGINGFACE_JSON).map(Some);
        }
        if !metadata.contains(TOKENIZER_MODEL) {
            return Ok(None);
        }
        let model = metadata.str(TOKENIZER_MODEL)?;
        if model != MODEL_BPE {
            let problem = format!("expected \"{MODEL_BPE}\" or a file with {HUGGINGFACE_JSON}, got \"{model}\"");
            return Err(Error::Metadata { key: TOKENIZER_MODEL.to_owned(), problem });
        }
        let types = metadata.i32s(TOKEN_TYPE)?;
        let tokens = metadata.strings(TOKENS)?;
        let used = (0..tokens.len()).rev().find(|&id| types.get(id) != Some(&TYPE_UNUSED)).map_or(0, |id| id + 1);
        let tokens = tokens[..used].iter().map(String::as_str).collect::<Vec<_>>();
        let merges = metadata.strings(MERGES)?.iter().map(String::as_str).collect::<Vec<_>>();
        let pre = if metadata.contains(TOKENIZER_PRE) { metadata.str(TOKENIZER_PRE)? } else { "default" };
        let bos = if metadata.contains(ADD_BOS_TOKEN) && metadata.bool(ADD_BOS_TOKEN)? {
            Some(metadata.u32(BOS_TOKEN_ID)?)
        } else {
            None
        };
        Self::from_lists(&tokens, |id| types.get(id) == Some(&TYPE_CONTROL), &merges, pre, bos).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_survives_gguf_metadata() {
        for name in Config::preset_names() {
            let config = Config { qkv_bias: true, dropout: 0.1, ..Config::preset(name).unwrap() };
            for config in [Config { use_selection_bias: true, ..config.clone() }, config] {
                let mut metadata = Metadata::new();
                metadata.insert("general.architecture", ARCHITECTURE).unwrap();
                config.write_metadata(&mut metadata).unwrap();
                assert_eq!(Config::from_metadata(&metadata).unwrap(), config, "{name}");
                assert_eq!(metadata.contains(EXPERT_SELECTION_BIAS), config.use_selection_bias);
            }
        }
    }

    #[test]
    fn foreign_and_contradictory_metadata_is_refused_by_key() {
        let config = Config::preset("param-tiny").unwrap();
        let error = |change: &dyn Fn(&str) -> Option<Value>| {
            let mut whole = Metadata::new();
            whole.insert("general.architecture", ARCHITECTURE).unwrap();
            config.write_metadata(&mut whole).unwrap();
            let mut changed = Metadata::new();
            for (key, value) in whole.iter() {
                changed.insert(key, change(key).unwrap_or_else(|| value.clone())).unwrap();
            }
            Config::from_metadata(&changed).unwrap_err().to_string()
        };
        let with = |at: &'static str, value: Value| error(&move |key| (key == at).then(|| value.clone()));
        assert!(with("general.architecture", Value::from("llama")).contains("got \"llama\""));
        assert!(with(FEED_FORWARD_LENGTH, Value::U32(5)).contains("param.feed_forward_length"));
        assert!(with(EXPERT_ACTIVATION, Value::from("swiglu")).contains("swiglu"));
        assert!(with(EXPERT_WEIGHTS_NORM, Value::from(false)).contains("param.expert_weights_norm"));
        assert!(with(HEAD_COUNT, Value::U32(0)).contains("num_heads"));
        assert!(with(BLOCK_COUNT, Value::from("x")).contains("param.block_count"));
    }

    #[test]
    fn tokenizers_round_trip_exactly_and_fill_the_models_vocabulary() {
        let text = "To be, or not to be, that is the question.\n";
        let bpe = Tokenizer::train_bpe(std::iter::repeat_n(text.to_owned(), 4), 300).unwrap();
        let characters = Tokenizer::characters(&text.chars().collect()).unwrap();
        for tokenizer in [bpe, characters] {
            let mut metadata = Metadata::new();
            tokenizer.write_metadata(320, &mut metadata).unwrap();
            assert_eq!(metadata.strings(TOKENS).unwrap().len(), 320);
            assert_eq!(metadata.i32s(TOKEN_TYPE).unwrap()[319], TYPE_UNUSED);
            let back = Tokenizer::from_metadata(&metadata).unwrap().unwrap();
            assert_eq!(back.json(), tokenizer.json());
            assert_eq!(back.encode(text).unwrap(), tokenizer.encode(text).unwrap());
        }
    }

    #[test]
    fn files_without_the_json_rebuild_from_lists_with_begin_of_text() {
        let text = "To be, or not to be, that is the question.\n";
        let bpe = Tokenizer::train_bpe(std::iter::repeat_n(text.to_owned(), 4), 300).unwrap();
        let mut whole = Metadata::new();
        bpe.write_metadata(320, &mut whole).unwrap();
        let mut lists = Metadata::new();
        for (key, value) in whole.iter().filter(|(key, _)| ![HUGGINGFACE_JSON, ADD_BOS_TOKEN].contains(key)) {
            lists.insert(key, value.clone()).unwrap();
        }
        lists.insert(ADD_BOS_TOKEN, true).unwrap();
        let back = Tokenizer::from_metadata(&lists).unwrap().unwrap();
        assert_eq!(back.n_vocab(), bpe.n_vocab());
        assert_eq!(back.encode(text).unwrap(), bpe.encode(text).unwrap());
        assert_eq!(back.bos(), bpe.end_of_text());
        assert_eq!(back.encode_prompt(text).unwrap()[0], bpe.end_of_text().unwrap());
        assert!(Tokenizer::from_metadata(&Metadata::new()).unwrap().is_none());
    }
}
