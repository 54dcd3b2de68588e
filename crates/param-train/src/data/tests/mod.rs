//! Tests of this module as a whole, and the tokenizers and data sets they share.

mod batch;
mod hostile;
mod mixture;
mod parquet;
mod pipeline;
mod reader;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use param_model::Tokenizer;

use super::DataError;
use super::build::{Reuse, prepare};
use super::report::Skipped;
use super::shard::{DOCUMENTS, INDEX, Index, Recipe, Shard, TOKENS, VERSION};
use super::source::{SourceFile, find};

pub const TEXT: &str = "The quick brown fox jumps over the lazy dog.\nDon't panic; it's 42,  naïve façade 😀 日本。\n";

/// A small byte-level BPE with GPT-2's pre-tokenization.
pub fn bpe() -> &'static Tokenizer {
    static BPE: OnceLock<Tokenizer> = OnceLock::new();
    BPE.get_or_init(|| Tokenizer::train_bpe(std::iter::repeat_n(TEXT.to_owned(), 8), 320).unwrap())
}

/// The same vocabulary behind Llama-3's pre-tokenization.
pub fn llama_3_like() -> &'static Tokenizer {
    static BPE: OnceLock<Tokenizer> = OnceLock::new();
    BPE.get_or_init(|| {
        let tokens: Vec<_> = bpe().entries().iter().map(|(text, _)| text.as_str()).collect();
        let merges: Vec<_> = bpe().merges().iter().map(String::as_str).collect();
        let end = bpe().end_of_text().unwrap() as usize;
        Tokenizer::from_lists(&tokens, |id| id == end, &merges, "llama-bpe", Some(end as u32)).unwrap()
    })
}

/// One token per character of the text above.
pub fn characters() -> &'static Tokenizer {
    static CHARACTERS: OnceLock<Tokenizer> = OnceLock::new();
    CHARACTERS.get_or_init(|| Tokenizer::characters(&TEXT.chars().collect()).unwrap())
}

/// A folder to put files in.
pub struct Corpus {
    pub folder: tempfile::TempDir,
}

impl Corpus {
    pub fn new(files: &[(&str, &[u8])]) -> Self {
        let corpus = Self { folder: tempfile::tempdir().unwrap() };
        files.iter().for_each(|(name, bytes)| corpus.write(name, bytes));
        corpus
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("data").join(name)
    }

    /// Packs the bytes as the name's extension says.
    pub fn write(&self, name: &str, bytes: &[u8]) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let packed = match path.extension().and_then(|e| e.to_str()) {
            Some("gz") => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(bytes).unwrap();
                encoder.finish().unwrap()
            }
            Some("zst") => zstd::encode_all(bytes, 1).unwrap(),
            _ => bytes.to_vec(),
        };
        fs::write(path, packed).unwrap();
    }

    pub fn find(&self, names: &[&str]) -> Result<Vec<SourceFile>, DataError> {
        find(&names.iter().map(|name| self.path(name)).collect::<Vec<_>>(), &[])
    }

    pub fn shards(&self) -> PathBuf {
        self.folder.path().join("shards")
    }

    pub fn prepare(&self, names: &[&str], tokenizer: &Tokenizer) -> Result<(Shard, Reuse), DataError> {
        let cancel = AtomicBool::new(false);
        prepare(&self.shards(), &self.find(names)?, "text", tokenizer, &mut |_| (), &cancel)
    }
}

/// All names below a folder.
pub fn names_in(folder: &Path) -> Vec<String> {
    let entries = walkdir::WalkDir::new(folder).min_depth(1).sort_by_file_name().into_iter();
    entries.filter_map(Result::ok).map(|e| e.path().strip_prefix(folder).unwrap().display().to_string()).collect()
}

/// The documents of a shard as text.
pub fn texts(shard: &Shard, tokenizer: &Tokenizer) -> Vec<String> {
    let document = |i| {
        let mut ids = Vec::new();
        shard.read(shard.document(i), &mut ids).unwrap();
        tokenizer.decode(&ids)
    };
    (0..shard.index().n_document).map(document).collect()
}

/// A shard with just these tokens, two bytes of text for each, written by hand as the format's description says.
pub fn shard_of(documents: &[Vec<u32>], n_vocab: u64) -> (tempfile::TempDir, Arc<Shard>) {
    let folder = tempfile::tempdir().unwrap();
    let (mut tokens, mut entries, mut n_token) = (Vec::new(), vec![0; 16], 0u64);
    for document in documents {
        for &id in document {
            if n_vocab <= 65536 {
                tokens.extend((id as u16).to_le_bytes());
            } else {
                tokens.extend(id.to_le_bytes());
            }
        }
        n_token += document.len() as u64;
        entries.extend(n_token.to_le_bytes());
        entries.extend((2 * n_token).to_le_bytes());
    }
    let index = Index {
        recipe: Recipe { version: VERSION, tokenizer: "".into(), text_field: "text".into(), sources: vec![] },
        n_vocab,
        n_document: documents.len() as u64,
        n_token,
        n_byte: 2 * n_token,
        digest: "".into(),
        skipped: Skipped::default(),
    };
    fs::write(folder.path().join(TOKENS), tokens).unwrap();
    fs::write(folder.path().join(DOCUMENTS), entries).unwrap();
    fs::write(folder.path().join(INDEX), serde_json::to_vec(&index).unwrap()).unwrap();
    let shard = Arc::new(Shard::open(folder.path()).unwrap());
    (folder, shard)
}
