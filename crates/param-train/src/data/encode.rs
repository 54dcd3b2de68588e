//! Tokenizes text as the tokenizers crate does, several times as fast: words are divided by hand and merged here, and those
//! that recur are looked up. What is not known to be the same is left to the crate.

use param_model::{Error, Tokenizer};

use super::bpe::{Bpe, Symbol};
use super::pretokenize::{Pattern, split};

/// Longer words go to the crate, whose merging takes time with their length rather than its square.
const MAX_WORD: usize = 256;

/// A tokenizer, and how its tokens are found fastest.
pub struct Encoder<'t> {
    tokenizer: &'t Tokenizer,
    method: Method,
}

enum Method {
    /// Words of a pattern, merged.
    Words(Pattern, Box<Bpe>),
    /// The id of each character by itself, below the largest that has one, and that of all others.
    Characters { of_char: Vec<u32>, unknown: u32 },
    /// By the crate.
    Crate,
}

impl<'t> Encoder<'t> {
    /// Reads off the tokenizer what it does.
    pub fn new(tokenizer: &'t Tokenizer) -> Self {
        Self { tokenizer, method: Method::of(tokenizer) }
    }

    /// Appends the tokens of `text` to `ids`: the same as [`Tokenizer::encode`] gives.
    pub fn encode(&self, cache: &mut Cache, text: &str, ids: &mut Vec<u32>) -> Result<(), Error> {
        match &self.method {
            Method::Words(pattern, bpe) => split(*pattern, text, |word| {
                if word.len() > MAX_WORD {
                    ids.extend(self.tokenizer.encode(word)?);
                } else {
                    cache.encode(bpe, word.as_bytes(), ids);
                }
                Ok(())
            }),
            Method::Characters { of_char, unknown } => {
                ids.extend(text.chars().map(|c| of_char.get(c as usize).copied().unwrap_or(*unknown)));
                Ok(())
            }
            Method::Crate => {
                ids.extend(self.tokenizer.encode(text)?);
                Ok(())
            }
        }
    }
}

impl Method {
    /// The crate's, where the tokenizer changes text before it divides it, or looks for added tokens in plain text (special
    /// ones it does not look for).
    fn of(tokenizer: &Tokenizer) -> Self {
        let json: serde_json::Value = serde_json::from_str(tokenizer.json()).unwrap_or_default();
        let mut added = json["added_tokens"].as_array().into_iter().flatten();
        if !json["normalizer"].is_null() || added.any(|token| token["special"] != true) {
            return Self::Crate;
        }
        if let Some(unknown) = tokenizer.unknown() {
            return Self::characters(tokenizer, unknown);
        }
        let pattern = match tokenizer.pre() {
            _ if adds_space(&json["pre_tokenizer"]) => None,
            "gpt-2" => Some(Pattern::Gpt2),
            "llama-bpe" => Some(Pattern::Llama3),
            _ => None,
        };
        match (pattern, Bpe::of(tokenizer, &json)) {
            (Some(pattern), Some(bpe)) => Self::Words(pattern, Box::new(bpe)),
            _ => Self::Crate,
        }
    }

    fn characters(tokenizer: &Tokenizer, unknown: u32) -> Self {
        let mut of_char = Vec::new();
        for (id, (text, _)) in (0..).zip(tokenizer.entries()) {
            let mut chars = text.chars();
            if let (Some(c), None) = (chars.next(), chars.next()) {
                if c as usize >= of_char.len() {
                    of_char.resize(c as usize + 1, unknown);
                }
                of_char[c as usize] = id;
            }
        }
        Self::Characters { of_char, unknown }
    }
}

/// True if the start of every text handed over would be treated as if a space stood before it.
fn adds_space(pre_tokenizer: &serde_json::Value) -> bool {
    let parts = pre_tokenizer["pretokenizers"].as_array().into_iter().flatten();
    pre_tokenizer["add_prefix_space"] == true || parts.into_iter().any(adds_space)
}

/// Slots of a cache: 2 MiB, which stays near the core.
const LOG_2_SLOTS: u32 = 16;
/// Bytes of the longest word kept.
const KEY: usize = size_of::<u128>();
/// Most tokens of a word kept.
const IDS: usize = 3;

/// Words met lately with their tokens, one in each slot; each thread has its own.
#[derive(Default)]
pub struct Cache {
    slots: Vec<Slot>, // [2^LOG_2_SLOTS], or none yet
    symbols: Vec<Symbol>,
}

/// Half a cache line.
#[derive(Clone, Copy, Default)]
struct Slot {
    /// The word, and zeros behind it.
    key: u128,
    ids: [u32; IDS],
    /// Bytes of the word; 0 in a slot not used yet.
    n_byte: u8,
    n_id: u8,
}

impl Cache {
    fn encode(&mut self, bpe: &Bpe, word: &[u8], ids: &mut Vec<u32>) {
        if word.len() > KEY {
            return bpe.encode(word, &mut self.symbols, ids);
        }
        if self.slots.is_empty() {
            self.slots.resize(1 << LOG_2_SLOTS, Slot::default());
        }
        let mut key = [0; KEY];
        key[..word.len()].copy_from_slice(word);
        let (key, n_byte) = (u128::from_le_bytes(key), word.len() as u8);
        let slot = &mut self.slots[slot_of(key)];
        if slot.key == key && slot.n_byte == n_byte {
            ids.extend_from_slice(&slot.ids[..usize::from(slot.n_id)]);
            return;
        }
        let before = ids.len();
        bpe.encode(word, &mut self.symbols, ids);
        let fresh = &ids[before..];
        if fresh.len() <= IDS {
            *slot = Slot { key, n_byte, n_id: fresh.len() as u8, ..Slot::default() };
            slot.ids[..fresh.len()].copy_from_slice(fresh);
        }
    }
}

/// Multiplicative hashing (Knuth, volume 3, 6.4) of each half, by odd numbers without a pattern.
fn slot_of(key: u128) -> usize {
    let (low, high) = (key as u64, (key >> 64) as u64);
    let mixed = low.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ high.wrapping_mul(0xC2B2_AE3D_27D4_EB4F);
    ((mixed ^ mixed >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> (64 - LOG_2_SLOTS)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::cut::last_cut;
    use crate::data::tests::{bpe, characters, llama_3_like};
    use proptest::prelude::*;

    /// Text rich in what pre-tokenizers treat specially.
    fn texts() -> impl Strategy<Value = String> {
        let pieces = prop_oneof![
            Just(" ".to_owned()),
            Just("  ".to_owned()),
            Just("\n".to_owned()),
            Just("\n\n".to_owned()),
            Just("\r\n".to_owned()),
            prop::sample::select(
                &[
                    "\t",
                    "\u{a0}",
                    "\u{3000}",
                    "the",
                    "fox",
                    "'s",
                    "'LL",
                    "'ſ",
                    "'Re",
                    "'",
                    "é",
                    "e\u{301}",
                    "日本。",
                    "😀",
                    "42",
                    "1234567",
                    "٣",
                    "Ⅷ",
                    "½",
                    ".",
                    "...\n",
                    "//",
                    "<user>",
                    "<|endoftext|>",
                    "\u{b}",
                    "\u{85}",
                    "\u{200b}",
                    "_x",
                    "ﬀ",
                    "\u{345}",
                    "\0",
                ][..]
            )
            .prop_map(str::to_owned),
            any::<char>().prop_map(String::from),
            (1usize..400, any::<char>()).prop_map(|(n, c)| c.to_string().repeat(n)),
            (1usize..60).prop_map(|n| "the fox ".repeat(n).replace(' ', "")),
        ];
        prop::collection::vec(pieces, 0..24).prop_map(|pieces| pieces.concat())
    }

    fn assert_same(tokenizer: &Tokenizer, text: &str) {
        let whole = tokenizer.encode(text).unwrap();
        let (encoder, mut cache, mut ids) = (Encoder::new(tokenizer), Cache::default(), Vec::new());
        encoder.encode(&mut cache, text, &mut ids).unwrap();
        assert!(ids == whole, "{text:?}: {ids:?}, but the crate has {whole:?}");
        encoder.encode(&mut cache, text, &mut ids).unwrap();
        assert!(ids[whole.len()..] == whole, "{text:?} from a warm cache");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn tokens_are_those_of_the_crate(text in texts()) {
            for tokenizer in [bpe(), llama_3_like(), characters()] {
                assert_same(tokenizer, &text);
                if let Some(cut) = last_cut(&text) {
                    let mut parts = tokenizer.encode(&text[..cut]).unwrap();
                    parts.extend(tokenizer.encode(&text[cut..]).unwrap());
                    prop_assert_eq!(parts, tokenizer.encode(&text).unwrap(), "cut at {}", cut);
                }
            }
        }
    }

    #[test]
    fn every_character_is_classed_as_the_crate_does() {
        for tokenizer in [bpe(), llama_3_like()] {
            // Up to the last letters of Unicode 17; behind a letter, a digit, a sign and a space, one of which any mistake would
            // join or part.
            let all = ('\0'..'\u{33500}').map(|c| format!("a{c}1{c}.{c} {c}")).collect::<Vec<_>>();
            for some in all.chunks(1 << 16) {
                assert_same(tokenizer, &some.concat());
            }
        }
    }

    #[test]
    fn only_what_is_known_is_done_here() {
        let method = |tokenizer: &Tokenizer| match Encoder::new(tokenizer).method {
            Method::Words(pattern, _) => Some(pattern),
            Method::Characters { .. } => panic!("characters"),
            Method::Crate => None,
        };
        assert_eq!(method(bpe()), Some(Pattern::Gpt2));
        assert_eq!(method(llama_3_like()), Some(Pattern::Llama3));
        assert!(matches!(Encoder::new(characters()).method, Method::Characters { .. }));
        let changed = |change: &dyn Fn(&mut serde_json::Value)| {
            let mut json: serde_json::Value = serde_json::from_str(bpe().json()).unwrap();
            change(&mut json);
            let tokenizer = Tokenizer::from_json(json.to_string(), "test").unwrap();
            assert_same(&tokenizer, "The fox, <user>   and 42 DOGS");
            method(&tokenizer)
        };
        assert_eq!(changed(&|json| json["pre_tokenizer"]["add_prefix_space"] = true.into()), None);
        assert_eq!(changed(&|json| json["normalizer"] = serde_json::json!({"type": "Lowercase"})), None);
        assert_eq!(changed(&|json| json["model"]["unk_token"] = "a".into()), None);
        let user = serde_json::json!({"id": bpe().n_vocab(), "content": "<user>", "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false, "special": false});
        assert_eq!(changed(&|json| json["added_tokens"].as_array_mut().unwrap().push(user.clone())), None);
        // A vocabulary without every byte drops what it cannot spell, in ways of the crate's own.
        let missing = |json: &mut serde_json::Value| {
            json["model"]["vocab"].as_object_mut().unwrap().remove("Ā").unwrap();
        };
        assert_eq!(changed(&missing), None);
    }

    #[test]
    fn more_words_than_slots_stay_right() {
        let text: String = (0..3 << LOG_2_SLOTS).map(|i| format!(" {i}")).collect();
        assert_same(bpe(), &text);
    }
}
