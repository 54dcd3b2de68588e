//! Tiny random models, built in memory.

use std::sync::Arc;

use gguf::{GgmlType, Gguf, Metadata, TensorInfo, Writer};
use param_model::metadata::ARCHITECTURE;
use param_model::{Config, Role, Tokenizer, tensors};
use param_runtime::Model;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A model's parts before they are written, for tests to spoil.
pub struct Tiny {
    pub config: Config,
    pub metadata: Metadata,
    /// Name, shape (slowest first), values, type to store.
    pub tensors: Vec<(String, Vec<usize>, Vec<f32>, GgmlType)>,
}

/// Small, yet with everything: both kinds of blocks, several heads, more experts than are chosen.
pub fn config() -> Config {
    Config {
        n_vocab: 60,
        n_ctx: 96,
        n_embd: 64,
        n_head: 4,
        n_layer: 3,
        n_expert: 5,
        n_expert_used: 2,
        ..Config::preset("param-tiny").unwrap()
    }
}

impl Tiny {
    /// Random parameters, matrices stored as `ty`.
    pub fn new(config: Config, ty: GgmlType, tokenizer: Option<&Tokenizer>) -> Tiny {
        let mut metadata = Metadata::new();
        metadata.insert("general.architecture", ARCHITECTURE).unwrap();
        config.write_metadata(&mut metadata).unwrap();
        if let Some(tokenizer) = tokenizer {
            tokenizer.write_metadata(config.n_vocab.max(tokenizer.n_vocab()), &mut metadata).unwrap();
        }
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut stored = Vec::new();
        for spec in tensors(&config) {
            let Some(name) = spec.gguf.clone() else { continue };
            let (offset, range) = match spec.role {
                Role::Norm if name.ends_with("weight") => (1.0, 0.3),
                Role::Norm | Role::Bias => (0.0, 0.1),
                Role::Router => (0.0, 0.5),
                Role::TokenEmbedding | Role::PositionEmbedding => (0.0, 1.0),
                Role::Attention | Role::FeedForward | Role::Expert => (0.0, 0.2),
            };
            let values = (0..spec.n_elements()).map(|_| offset + range * rng.random_range(-1.0f32..1.0)).collect();
            let ty = if spec.is_matrix() { ty } else { GgmlType::F32 };
            stored.push((name, spec.gguf_shape(), values, ty));
        }
        Tiny { config, metadata, tensors: stored }
    }

    /// The parameters by name.
    pub fn values(&mut self, name: &str) -> &mut Vec<f32> {
        &mut self.tensors.iter_mut().find(|t| t.0 == name).unwrap().2
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let infos = self.tensors.iter().map(|(name, shape, _, ty)| {
            TensorInfo::new(name.as_str(), shape.iter().rev().map(|&n| n as u64).collect(), *ty).unwrap()
        });
        let mut writer = Writer::new(Vec::new(), &self.metadata, infos.collect()).unwrap();
        for (name, shape, values, ty) in &self.tensors {
            let n_col = shape[shape.len() - 1];
            let row_bytes = ty.row_size(n_col as u64).unwrap() as usize;
            let mut data = vec![0; values.len() / n_col * row_bytes];
            match ty {
                // Written as they are, so that tests can store what a converter would refuse.
                GgmlType::F32 => data.copy_from_slice(bytemuck::cast_slice(values)),
                GgmlType::I32 => {}
                _ => param_ggml::quantize(*ty, values, n_col, None, &mut data).unwrap(),
            }
            writer.append(name, &data).unwrap();
        }
        writer.finish().unwrap()
    }

    pub fn open(&self) -> param_runtime::Result<Arc<Model>> {
        Model::from_gguf(Gguf::from_bytes(self.bytes()).unwrap())
    }
}

/// The same, as wide as the blocks of every type of weights ask for.
pub fn wide() -> Config {
    Config { n_embd: 256, n_head: 8, ..config() }
}

/// A random model without a tokenizer.
pub fn model(ty: GgmlType) -> Arc<Model> {
    let config = if ty.block_size() > 64 { wide() } else { config() };
    Tiny::new(config, ty, None).open().unwrap()
}

/// Some tokens of the tiny vocabulary.
pub fn tokens(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * i * 7 + i * 3 + 11) % 60).collect()
}
