//! Tokenizes text in pieces that recur (about a word each), looking each one up before asking the tokenizer.

use std::collections::HashMap;

use param_model::{Error, Tokenizer};

use super::cut::is_cut;

/// Longer pieces (runs of punctuation, base64) seldom recur.
const MAX_PIECE: usize = 48;
/// Entries at which a cache starts over; with the text of its pieces about 16 MiB.
const MAX_ENTRIES: usize = 1 << 17;

/// A tokenizer with the knowledge whether its text can be cut into pieces.
pub struct Encoder<'t> {
    tokenizer: &'t Tokenizer,
    in_pieces: bool,
}

/// Pieces already tokenized; each thread has its own.
#[derive(Default)]
pub struct Cache {
    /// Piece to its range in `ids`.
    pieces: HashMap<Box<str>, (u32, u32)>,
    ids: Vec<u32>,
}

impl<'t> Encoder<'t> {
    /// Reads off the tokenizer whether the cuts hold for it.
    pub fn new(tokenizer: &'t Tokenizer) -> Self {
        Self { tokenizer, in_pieces: can_be_cut(tokenizer) }
    }

    /// Appends the tokens of `text` to `ids`: the same as [`Tokenizer::encode`] of the whole text gives.
    pub fn encode(&self, cache: &mut Cache, text: &str, ids: &mut Vec<u32>) -> Result<(), Error> {
        if !self.in_pieces {
            ids.extend(self.tokenizer.encode(text)?);
            return Ok(());
        }
        let mut start = 0;
        for at in 1..text.len() {
            if is_cut(text, at) {
                self.encode_piece(cache, &text[start..at], ids)?;
                start = at;
            }
        }
        self.encode_piece(cache, &text[start..], ids)
    }

    fn encode_piece(&self, cache: &mut Cache, piece: &str, ids: &mut Vec<u32>) -> Result<(), Error> {
        if piece.len() > MAX_PIECE {
            ids.extend(self.tokenizer.encode(piece)?);
            return Ok(());
        }
        if let Some(&(start, end)) = cache.pieces.get(piece) {
            ids.extend_from_slice(&cache.ids[start as usize..end as usize]);
            return Ok(());
        }
        let fresh = self.tokenizer.encode(piece)?;
        ids.extend_from_slice(&fresh);
        if cache.pieces.len() >= MAX_ENTRIES {
            cache.pieces.clear();
            cache.ids.clear();
        }
        let start = cache.ids.len() as u32;
        cache.ids.extend(fresh);
        cache.pieces.insert(piece.into(), (start, cache.ids.len() as u32));
        Ok(())
    }
}

/// True if `tokenizer` takes each character by itself, or splits text by a pattern whose cuts are known and does nothing
/// before that could reach across one: no normalization, no added tokens matched in plain text (special ones are not).
fn can_be_cut(tokenizer: &Tokenizer) -> bool {
    let json: serde_json::Value = serde_json::from_str(tokenizer.json()).unwrap_or_default();
    let mut added = json["added_tokens"].as_array().into_iter().flatten();
    let cuts_are_known = tokenizer.pre() != "default" && !adds_space(&json["pre_tokenizer"]);
    let each_character = tokenizer.unknown().is_some();
    (cuts_are_known || each_character) && json["normalizer"].is_null() && added.all(|token| token["special"] == true)
}

/// True if the start of every text handed over would be treated as if a space stood before it.
fn adds_space(pre_tokenizer: &serde_json::Value) -> bool {
    let parts = pre_tokenizer["pretokenizers"].as_array().into_iter().flatten();
    pre_tokenizer["add_prefix_space"] == true || parts.into_iter().any(adds_space)
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
            Just(" "),
            Just("  "),
            Just("\n"),
            Just("\n\n"),
            Just("\r\n"),
            Just("\t"),
            Just("\u{a0}"),
            Just("\u{3000}"),
            Just("the"),
            Just("fox"),
            Just("'s"),
            Just("'LL"),
            Just("é"),
            Just("e\u{301}"),
            Just("日本。"),
            Just("😀"),
            Just("42"),
            Just("1234567"),
            Just("."),
            Just("...\n"),
            Just("//"),
            Just("<user>"),
            Just("<|endoftext|>"),
            Just("\u{b}"),
            Just("\u{200b}"),
            Just("_x"),
        ];
        prop::collection::vec(pieces, 0..24).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn pieces_give_the_tokens_of_the_whole(text in texts()) {
            for tokenizer in [bpe(), llama_3_like(), characters()] {
                let whole = tokenizer.encode(&text).unwrap();
                let (encoder, mut cache, mut ids) = (Encoder::new(tokenizer), Cache::default(), Vec::new());
                encoder.encode(&mut cache, &text, &mut ids).unwrap();
                prop_assert_eq!(&ids, &whole);
                encoder.encode(&mut cache, &text, &mut ids).unwrap();
                prop_assert_eq!(&ids[whole.len()..], &whole[..], "from a warm cache");
                if let Some(cut) = last_cut(&text) {
                    let mut parts = tokenizer.encode(&text[..cut]).unwrap();
                    parts.extend(tokenizer.encode(&text[cut..]).unwrap());
                    prop_assert_eq!(parts, whole, "cut at {}", cut);
                }
            }
        }
    }

    #[test]
    fn only_known_pre_tokenizers_without_extras_are_cut() {
        assert!(can_be_cut(bpe()));
        assert!(can_be_cut(llama_3_like()));
        assert!(can_be_cut(characters()));
        let changed = |change: &dyn Fn(&mut serde_json::Value)| {
            let mut json: serde_json::Value = serde_json::from_str(bpe().json()).unwrap();
            change(&mut json);
            Tokenizer::from_json(json.to_string(), "test").unwrap()
        };
        assert!(!can_be_cut(&changed(&|json| json["pre_tokenizer"]["add_prefix_space"] = true.into())));
        assert!(!can_be_cut(&changed(&|json| json["normalizer"] = serde_json::json!({"type": "Lowercase"}))));
        assert!(!can_be_cut(&changed(&|json| {
            json["added_tokens"].as_array_mut().unwrap().push(serde_json::json!({"id": bpe().n_vocab(),
                "content": "<user>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": false}));
        })));
    }

    #[test]
    fn full_cache_starts_over_and_stays_right() {
        let (encoder, mut cache, mut ids) = (Encoder::new(bpe()), Cache::default(), Vec::new());
        let text: String = (0..MAX_ENTRIES + 10).map(|i| format!(" {i}")).collect();
        encoder.encode(&mut cache, &text, &mut ids).unwrap();
        assert!(cache.pieces.len() < 100);
        assert_eq!(ids, bpe().encode(&text).unwrap());
    }
}
