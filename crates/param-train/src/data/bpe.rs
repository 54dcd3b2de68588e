//! Byte-level BPE: the merges of one word, as the tokenizers crate does them, without what training has no use for (offsets,
//! spellings, several allocations a word).

use std::collections::HashMap;

use param_model::{Kind, TokenType, Tokenizer};

/// A pair of ids that becomes one.
#[derive(Clone, Copy)]
struct Merge {
    /// Pairs of the lowest rank are merged first.
    rank: u32,
    id: u32,
}

/// A vocabulary and its merges.
pub struct Bpe {
    of_byte: [u32; 256],
    merges: HashMap<(u32, u32), Merge, foldhash::fast::RandomState>,
    /// Words that are taken whole, whatever the merges would make of them.
    whole: HashMap<Vec<u8>, u32, foldhash::fast::RandomState>,
}

/// A token of a word being merged, and what it can become with the one after it.
#[derive(Clone, Copy)]
pub struct Symbol {
    id: u32,
    merge: Option<Merge>,
}

impl Bpe {
    /// Reads it off a tokenizer; `None` if its model does more or less than merge bytes.
    pub fn of(tokenizer: &Tokenizer, json: &serde_json::Value) -> Option<Self> {
        let model = &json["model"];
        let absent = |key: &str| model[key].is_null() || model[key] == "" || model[key] == 0.0;
        let is_plain =
            ["dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"].into_iter().all(absent)
                && model["byte_fallback"] != true;
        if tokenizer.kind() != Kind::ByteLevel || !is_plain {
            return None;
        }
        let vocab = model["vocab"].as_object()?;
        let id_of = |text: &str| vocab.get(text).and_then(serde_json::Value::as_u64).map(|id| id as u32);
        let spelled = |id: usize, (text, kind): &(String, TokenType)| match kind {
            TokenType::Normal => tokenizer.token_bytes(id as u32),
            _ => text.clone().into_bytes(),
        };
        let (mut of_byte, mut whole) = ([None; 256], HashMap::default());
        for (id, entry) in tokenizer.entries().iter().enumerate().filter(|(_, (text, _))| vocab.contains_key(text)) {
            let bytes = spelled(id, entry);
            if let ([byte], TokenType::Normal) = (&bytes[..], entry.1) {
                of_byte[usize::from(*byte)] = Some(id as u32);
            }
            if model["ignore_merges"] == true {
                whole.insert(bytes, id as u32);
            }
        }
        let mut merges = HashMap::default();
        for (rank, merge) in (0..).zip(tokenizer.merges()) {
            let (left, right) = merge.split_once(' ')?;
            let id = id_of(&format!("{left}{right}"))?;
            merges.insert((id_of(left)?, id_of(right)?), Merge { rank, id });
        }
        let complete: Option<Vec<u32>> = of_byte.into_iter().collect();
        Some(Self { of_byte: complete?.try_into().ok()?, merges, whole })
    }

    /// Appends the tokens of one word to `ids`. Takes time with the square of its length.
    pub fn encode(&self, word: &[u8], symbols: &mut Vec<Symbol>, ids: &mut Vec<u32>) {
        if !self.whole.is_empty()
            && let Some(&id) = self.whole.get(word)
        {
            ids.push(id);
            return;
        }
        symbols.clear();
        symbols.extend(word.iter().map(|&byte| Symbol { id: self.of_byte[usize::from(byte)], merge: None }));
        for i in 1..symbols.len() {
            symbols[i - 1].merge = self.merge(symbols[i - 1].id, symbols[i].id);
        }
        // Of equal ranks the leftmost, which `min_by_key` gives.
        let best = |symbols: &[Symbol]| {
            let able = symbols.iter().enumerate().filter_map(|(i, symbol)| Some((i, symbol.merge?)));
            able.min_by_key(|(_, merge)| merge.rank)
        };
        while let Some((i, Merge { id, .. })) = best(symbols) {
            symbols.remove(i + 1);
            symbols[i] = Symbol { id, merge: symbols.get(i + 1).and_then(|next| self.merge(id, next.id)) };
            if i > 0 {
                symbols[i - 1].merge = self.merge(symbols[i - 1].id, id);
            }
        }
        ids.extend(symbols.iter().map(|symbol| symbol.id));
    }

    fn merge(&self, left: u32, right: u32) -> Option<Merge> {
        self.merges.get(&(left, right)).copied()
    }
}
