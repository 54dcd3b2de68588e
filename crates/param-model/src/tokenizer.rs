//! Text to token ids and back: byte-level BPE in Hugging Face's `tokenizer.json` form, trained here or loaded, and a
//! character mode for tiny experiments.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::OnceLock;

use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use crate::error::Error;

/// The token that ends a document, in tokenizers trained here.
const END_OF_TEXT: &str = "<|endoftext|>";
/// Stands for a character outside the vocabulary, in character mode.
const UNKNOWN: &str = "<unk>";
/// Special tokens by which the families of byte-level BPE mark the end of a document; the first present counts.
const END_OF_TEXT_NAMES: [&str; 5] = [END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>"];
/// No real vocabulary comes near; beyond it a file is corrupt or hostile.
const MAX_VOCAB: usize = 1 << 22;

/// How a vocabulary entry spells its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Each character of an entry stands for one byte, by GPT-2's table.
    ByteLevel,
    /// An entry is the text itself.
    Characters,
}

/// What an entry is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenType {
    /// Made from text.
    Normal,
    /// A marker that never comes from plain text, such as end-of-text.
    Control,
    /// An added entry matched as a whole in plain text.
    UserDefined,
    /// An id without an entry.
    Unused,
}

/// A tokenizer and the exact `tokenizer.json` it came from.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    /// Takes special tokens in the text for plain text, as documents need.
    plain: tokenizers::Tokenizer,
    /// Recognises them, as prompts need; made when first asked for.
    marked: OnceLock<tokenizers::Tokenizer>,
    json: String,
    kind: Kind,
    /// Spelling and type by id.
    entries: Vec<(String, TokenType)>,
    merges: Vec<String>,
    bos: Option<u32>,
    end_of_text: Option<u32>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let json = std::fs::read_to_string(path).map_err(|error| Error::Io { path: path.to_owned(), error })?;
        Self::from_json(json, &path.display().to_string())
    }

    /// Takes the text of a `tokenizer.json`; `origin` names it in errors.
    pub fn from_json(json: String, origin: &str) -> Result<Self, Error> {
        let fail = |problem: String| Error::Tokenizer { origin: origin.to_owned(), problem };
        let value: serde_json::Value =
            serde_json::from_str(&json).map_err(|e| fail(format!("not a tokenizer.json: {e}")))?;
        let kind = kind_of(&value).ok_or_else(|| {
            fail(
                "unsupported kind of tokenizer: expected byte-level BPE (as GPT-2's or Llama-3's) or characters".into(),
            )
        })?;
        let mut plain: tokenizers::Tokenizer =
            json.parse().map_err(|e| fail(format!("not a usable tokenizer.json: {e}")))?;
        plain.with_padding(None);
        plain.with_truncation(None).map_err(|e| fail(e.to_string()))?;

        let vocab = plain.get_vocab(true);
        let n_vocab = vocab.values().max().map_or(0, |&id| id as usize + 1);
        if n_vocab == 0 || n_vocab > MAX_VOCAB {
            return Err(fail(format!("its largest token id implies {n_vocab} entries: expected 1 to {MAX_VOCAB}")));
        }
        let mut entries = vec![(String::new(), TokenType::Unused); n_vocab];
        for (text, id) in vocab {
            entries[id as usize] = (text, TokenType::Normal);
        }
        for (id, added) in plain.get_added_tokens_decoder() {
            let token_type = if added.special { TokenType::Control } else { TokenType::UserDefined };
            entries[id as usize] = (added.content, token_type);
        }
        let merges =
            match value["model"]["merges"].as_array() {
                None => Vec::new(),
                Some(merges) => merges.iter().map(merge_text).collect::<Option<_>>().ok_or_else(|| {
                    fail("its merges are neither strings of two parts nor pairs of strings".to_owned())
                })?,
            };
        let control = |name: &str| plain.token_to_id(name).filter(|&id| entries[id as usize].1 == TokenType::Control);
        let end_of_text = END_OF_TEXT_NAMES.iter().find_map(|name| control(name));
        let encode = |special| plain.encode_fast("a", special).map(|e| e.get_ids().to_vec());
        let (bare, templated) =
            (encode(false).map_err(|e| fail(e.to_string()))?, encode(true).map_err(|e| fail(e.to_string()))?);
        let bos = (templated.len() > bare.len() && templated.first() != bare.first()).then(|| templated[0]);
        plain.set_encode_special_tokens(true);
        Ok(Self { plain, marked: OnceLock::new(), json, kind, entries, merges, bos, end_of_text })
    }

    /// Learns a byte-level BPE of `vocab_size` entries (GPT-2's pre-tokenization, all 256 bytes, end-of-text) from
    /// `texts`. A small corpus may give fewer entries than asked for.
    pub fn train_bpe(texts: impl Iterator<Item = String> + Send, vocab_size: usize) -> Result<Self, Error> {
        const ORIGIN: &str = "tokenizer training";
        let fail = |e: tokenizers::Error| Error::Tokenizer { origin: ORIGIN.to_owned(), problem: e.to_string() };
        if !(257..=MAX_VOCAB).contains(&vocab_size) {
            let problem = format!("vocabulary of {vocab_size}: expected at least 257 (every byte and end-of-text)");
            return Err(Error::Tokenizer { origin: ORIGIN.to_owned(), problem });
        }
        let trainer = BpeTrainerBuilder::new()
            .vocab_size(vocab_size)
            .min_frequency(2)
            .show_progress(false)
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let mut tokenizer = tokenizers::Tokenizer::new(BPE::default());
        tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        tokenizer.with_decoder(Some(ByteLevel::default()));
        tokenizer.train(&mut TrainerWrapper::BpeTrainer(trainer), texts).map_err(fail)?;
        Self::from_json(tokenizer.to_string(false).map_err(fail)?, ORIGIN)
    }

    /// One token per character of `alphabet`, sorted, after end-of-text and a token for characters it lacks.
    pub fn characters(alphabet: &BTreeSet<char>) -> Result<Self, Error> {
        const ORIGIN: &str = "character tokenizer";
        let fail = |e: tokenizers::Error| Error::Tokenizer { origin: ORIGIN.to_owned(), problem: e.to_string() };
        let texts = [END_OF_TEXT, UNKNOWN].map(str::to_owned).into_iter().chain(alphabet.iter().map(char::to_string));
        let vocab = texts.zip(0..).collect();
        let model = WordLevel::builder().vocab(vocab).unk_token(UNKNOWN.to_owned()).build().map_err(fail)?;
        let each = Split::new(SplitPattern::Regex("(?s).".to_owned()), SplitDelimiterBehavior::Isolated, false);
        let mut tokenizer = tokenizers::Tokenizer::new(model);
        tokenizer.with_pre_tokenizer(Some(each.map_err(fail)?));
        tokenizer.with_decoder(Some(tokenizers::decoders::fuse::Fuse::new()));
        let specials = [END_OF_TEXT, UNKNOWN].map(|text| AddedToken::from(text, true));
        tokenizer.add_special_tokens(specials).map_err(fail)?;
        Self::from_json(tokenizer.to_string(false).map_err(fail)?, ORIGIN)
    }

    /// Token ids of plain text: no begin-of-text, and special tokens' names are text like any other.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        encode(&self.plain, text)
    }

    /// Token ids of a prompt: begin-of-text where the tokenizer puts one, special tokens recognised by name. An empty prompt
    /// becomes the end of another text, where a model has learned to begin a new one.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, Error> {
        let marked = self.marked.get_or_init(|| {
            let mut marked = self.plain.clone();
            marked.set_encode_special_tokens(false);
            marked
        });
        let mut ids = Vec::from_iter(self.bos);
        ids.extend(encode(marked, text)?);
        if ids.is_empty() {
            ids.extend(self.end_of_text);
        }
        Ok(ids)
    }

    /// The bytes a token stands for; empty for control tokens and for ids without an entry. Characters may be split
    /// between tokens.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        match (self.entries.get(id as usize), self.kind) {
            (Some((text, TokenType::Normal)), Kind::ByteLevel) => text.chars().filter_map(byte_of_char).collect(),
            (Some((text, TokenType::Normal)), Kind::Characters) | (Some((text, TokenType::UserDefined)), _) => {
                text.clone().into_bytes()
            }
            _ => Vec::new(),
        }
    }

    /// The text of a sequence of tokens, bytes that are no UTF-8 replaced by U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes = ids.iter().flat_map(|&id| self.token_bytes(id)).collect::<Vec<_>>();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Largest token id plus one.
    pub fn n_vocab(&self) -> usize {
        self.entries.len()
    }

    /// Checks that every token id has a row in a model of `n_vocab` rows.
    pub fn check_fits(&self, n_vocab: usize) -> Result<(), Error> {
        if self.n_vocab() <= n_vocab {
            return Ok(());
        }
        let problem = format!(
            "has {} tokens, but the model's vocabulary has only {n_vocab}: it belongs to another model",
            self.n_vocab()
        );
        Err(Error::Tokenizer { origin: "tokenizer".to_owned(), problem })
    }

    /// Spelling (in the tokenizer's own alphabet) and type of every id.
    pub fn entries(&self) -> &[(String, TokenType)] {
        &self.entries
    }

    /// The merges of a BPE, best first, each as its two parts with a space between.
    pub fn merges(&self) -> &[String] {
        &self.merges
    }

    /// How entries spell their bytes.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The token that a prompt begins with, where the tokenizer has such a rule.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a document, if there is one.
    pub fn end_of_text(&self) -> Option<u32> {
        self.end_of_text
    }

    /// The id of the entry for what the vocabulary lacks, in character mode.
    pub fn unknown(&self) -> Option<u32> {
        (self.kind == Kind::Characters).then(|| self.plain.token_to_id(UNKNOWN)).flatten()
    }

    /// The exact `tokenizer.json`.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// Builds a byte-level BPE from the lists that a GGUF file carries, for files without the exact `tokenizer.json`.
    /// `pre` names the pre-tokenization as llama.cpp does; prompts begin with `bos`.
    pub fn from_lists(
        tokens: &[&str],
        is_control: impl Fn(usize) -> bool,
        merges: &[&str],
        pre: &str,
        bos: Option<u32>,
    ) -> Result<Self, Error> {
        const ORIGIN: &str = "GGUF tokenizer";
        let splitting = pre_tokenizer_json(pre).ok_or_else(|| Error::Tokenizer {
            origin: ORIGIN.to_owned(),
            problem: format!("unknown pre-tokenization `{pre}`: expected gpt-2, default or llama-bpe"),
        })?;
        let added = (0..tokens.len()).filter(|&id| is_control(id)).map(|id| {
            serde_json::json!({"id": id, "content": tokens[id], "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        });
        let vocab = tokens.iter().enumerate().map(|(id, text)| (*text, id)).collect::<HashMap<_, _>>();
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
            "added_tokens": added.collect::<Vec<_>>(),
            "pre_tokenizer": splitting,
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": pre == LLAMA_3,
                "vocab": vocab, "merges": merges},
        });
        let mut tokenizer = Self::from_json(json.to_string(), ORIGIN)?;
        tokenizer.bos = bos.filter(|&id| (id as usize) < tokenizer.n_vocab());
        Ok(tokenizer)
    }

    /// llama.cpp's name for the pre-tokenization, where it has one for it.
    pub fn pre(&self) -> &'static str {
        let value: serde_json::Value = serde_json::from_str(&self.json).expect("it was parsed when taken");
        [GPT_2, LLAMA_3]
            .into_iter()
            .find(|pre| pre_tokenizer_json(pre).is_some_and(|p| patterns(&p) == patterns(&value["pre_tokenizer"])))
            .unwrap_or("default")
    }
}

const GPT_2: &str = "gpt-2";
const LLAMA_3: &str = "llama-bpe";
/// The pattern by which Llama-3 splits text before merging.
const LLAMA_3_PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

fn pre_tokenizer_json(pre: &str) -> Option<serde_json::Value> {
    let byte_level = |use_regex: bool| serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    match pre {
        GPT_2 | "default" => Some(byte_level(true)),
        LLAMA_3 => Some(serde_json::json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": LLAMA_3_PATTERN}, "behavior": "Isolated", "invert": false},
            byte_level(false),
        ]})),
        _ => None,
    }
}

/// The splitting patterns of a pre-tokenizer, ignoring settings that leave the split as it is.
fn patterns(pre_tokenizer: &serde_json::Value) -> Vec<String> {
    match pre_tokenizer["type"].as_str() {
        Some("Sequence") => {
            pre_tokenizer["pretokenizers"].as_array().into_iter().flatten().flat_map(patterns).collect()
        }
        Some("Split") => vec![pre_tokenizer["pattern"].to_string()],
        // Absent in files older than the setting, which meant yes.
        Some("ByteLevel") if pre_tokenizer["use_regex"].as_bool() != Some(false) => vec![GPT_2.to_owned()],
        _ => Vec::new(),
    }
}

fn encode(tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<Vec<u32>, Error> {
    let encoding = tokenizer
        .encode_fast(text, false)
        .map_err(|e| Error::Tokenizer { origin: "tokenizer".to_owned(), problem: e.to_string() })?;
    Ok(encoding.get_ids().to_vec())
}

fn kind_of(json: &serde_json::Value) -> Option<Kind> {
    let has_byte_level = |part: &serde_json::Value| {
        let parts = part["decoders"].as_array().or(part["pretokenizers"].as_array());
        part["type"] == "ByteLevel" || parts.is_some_and(|p| p.iter().any(|p| p["type"] == "ByteLevel"))
    };
    match json["model"]["type"].as_str() {
        // Files older than the field: a model with merges is a BPE.
        Some("BPE") | None if json["model"]["merges"].is_array() && has_byte_level(&json["decoder"]) => {
            Some(Kind::ByteLevel)
        }
        Some("WordLevel") if json["decoder"]["type"] == "Fuse" => Some(Kind::Characters),
        _ => None,
    }
}

fn merge_text(merge: &serde_json::Value) -> Option<String> {
    match merge {
        serde_json::Value::String(text) => Some(text.clone()),
        serde_json::Value::Array(pair) => match &pair[..] {
            [a, b] => Some(format!("{} {}", a.as_str()?, b.as_str()?)),
            _ => None,
        },
        _ => None,
    }
}

/// GPT-2's spelling of bytes: printable Latin-1 stands for itself, the other bytes, in order, for U+0100 onwards.
fn byte_of_char(c: char) -> Option<u8> {
    static TABLE: OnceLock<HashMap<char, u8>> = OnceLock::new();
    let table = TABLE.get_or_init(|| {
        let prints = |b: &u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let (own, moved): (Vec<u8>, Vec<u8>) = (0..=255).partition(prints);
        let own = own.into_iter().map(|b| (b as char, b));
        let moved = ('\u{100}'..).zip(moved);
        own.chain(moved).collect()
    });
    table.get(&c).copied()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn small_bpe() -> Tokenizer {
        let text = "The quick brown fox jumps over the lazy dog. Don't panic; it's 42, naïve façade 😀!\n";
        Tokenizer::train_bpe(std::iter::repeat_n(text.to_owned(), 8), 320).unwrap()
    }

    #[test]
    fn every_byte_has_one_spelling() {
        let spellings = ByteLevel::alphabet();
        let mut bytes = spellings.iter().map(|&c| byte_of_char(c).unwrap()).collect::<Vec<_>>();
        bytes.sort();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    }

    proptest! {
        #[test]
        fn any_text_survives_encoding_and_decoding(text in any::<String>()) {
            static BPE: OnceLock<Tokenizer> = OnceLock::new();
            let tokenizer = BPE.get_or_init(small_bpe);
            prop_assert_eq!(tokenizer.decode(&tokenizer.encode(&text).unwrap()), text);
        }
    }

    #[test]
    fn documents_take_special_names_for_text_and_prompts_do_not() {
        let tokenizer = small_bpe();
        let end = tokenizer.end_of_text().unwrap();
        assert!(!tokenizer.encode("a<|endoftext|>b").unwrap().contains(&end));
        assert_eq!(tokenizer.encode_prompt("a<|endoftext|>").unwrap().last(), Some(&end));
        assert_eq!(tokenizer.decode(&[end]), "");
        assert_eq!(tokenizer.encode_prompt("").unwrap(), [end]);
    }

    #[test]
    fn begin_of_text_is_found_in_the_template() {
        let mut json: serde_json::Value = serde_json::from_str(small_bpe().json()).unwrap();
        json["post_processor"] = serde_json::json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}});
        let tokenizer = Tokenizer::from_json(json.to_string(), "test").unwrap();
        assert_eq!(tokenizer.bos(), Some(0));
        assert_eq!(tokenizer.encode_prompt("fox").unwrap()[0], 0);
        assert_ne!(tokenizer.encode("fox").unwrap()[0], 0);
    }

    #[test]
    fn characters_are_tokens_and_strangers_are_unknown() {
        let tokenizer = Tokenizer::characters(&"ab\né".chars().collect()).unwrap();
        assert_eq!(tokenizer.n_vocab(), 6);
        let ids = tokenizer.encode("bé\na?").unwrap();
        assert_eq!(ids.len(), 5);
        assert_eq!(tokenizer.decode(&ids[..4]), "bé\na");
        assert_eq!(ids[4], tokenizer.unknown().unwrap());
    }

    #[test]
    fn lists_rebuild_the_same_tokenizer() {
        let tokenizer = small_bpe();
        let tokens = tokenizer.entries().iter().map(|(t, _)| t.as_str()).collect::<Vec<_>>();
        let merges = tokenizer.merges().iter().map(String::as_str).collect::<Vec<_>>();
        let is_control = |id: usize| tokenizer.entries()[id].1 == TokenType::Control;
        let rebuilt = Tokenizer::from_lists(&tokens, is_control, &merges, tokenizer.pre(), None).unwrap();
        let text = "The lazy fox doesn't panic  \n 😀 naïve 4242";
        assert_eq!(rebuilt.encode(text).unwrap(), tokenizer.encode(text).unwrap());
        assert_eq!(rebuilt.end_of_text(), tokenizer.end_of_text());
        assert_eq!((tokenizer.pre(), rebuilt.pre()), (GPT_2, GPT_2));
    }

    #[test]
    fn llama_3s_splitting_is_told_apart_from_gpt_2s() {
        let bpe = small_bpe();
        let tokens = bpe.entries().iter().map(|(t, _)| t.as_str()).collect::<Vec<_>>();
        let merges = bpe.merges().iter().map(String::as_str).collect::<Vec<_>>();
        let llama = Tokenizer::from_lists(&tokens, |id| id == 0, &merges, LLAMA_3, Some(0)).unwrap();
        assert_eq!((llama.pre(), llama.bos()), (LLAMA_3, Some(0)));
        let text = "I'M 1234567 naïve\n\n  😀";
        assert_eq!(llama.decode(&llama.encode(text).unwrap()), text);
        let error = Tokenizer::from_lists(&tokens, |_| false, &merges, "qwen2", None).unwrap_err().to_string();
        assert!(error.contains("qwen2") && error.contains("llama-bpe"), "{error}");
    }

    #[test]
    fn other_kinds_and_broken_files_are_refused_by_name() {
        for json in ["", "{}", "[1]", r#"{"model": {"type": "Unigram", "vocab": []}}"#] {
            let error = Tokenizer::from_json(json.to_owned(), "some/tokenizer.json").unwrap_err().to_string();
            assert!(error.contains("some/tokenizer.json"), "{error}");
        }
        let tokenizer = small_bpe();
        let error = tokenizer.check_fits(tokenizer.n_vocab() - 1).unwrap_err().to_string();
        assert!(error.contains(&format!("{} tokens", tokenizer.n_vocab())), "{error}");
        tokenizer.check_fits(tokenizer.n_vocab()).unwrap();
    }
}
