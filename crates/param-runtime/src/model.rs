//! A model opened from a GGUF file: every tensor checked against the table of `param-model` before anything runs.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use gguf::{GgmlType, Gguf};
use param_cuda::NoGpu;
use param_kernels::{Team, available_threads};
use param_model::{Config, GGUF_HEAD, Part, Role, Tokenizer, tensors};

use crate::cuda::GpuModel;
use crate::error::{Error, Result};
use crate::kv_cache::CacheType;
use crate::placement::{Device, ModelOptions};
use crate::weights::{Block, FeedForward, Linear, Matrix, Norm, Router, read_f32};

/// An opened model: read-only, shared by any number of sessions and threads. Matrices stay in the memory-mapped
/// file, or are repacked from it when the model is opened.
#[derive(Debug)]
pub struct Model {
    pub(crate) gguf: Gguf,
    pub(crate) token_embd: Matrix,
    pub(crate) position_embd: Matrix,
    pub(crate) blocks: Vec<Block>,
    pub(crate) output_norm: Norm,
    /// `None` where it is tied to the token embedding.
    pub(crate) head: Option<Matrix>,
    /// What a GPU holds of it.
    pub(crate) gpu: Option<GpuModel>,
    device_note: Option<String>,
    config: Config,
    tokenizer: Option<Tokenizer>,
}

impl Model {
    /// Opens a GGUF file (or the first of a split model's), whose metadata must describe a PARAM model that its tensors are.
    ///
    /// # Errors
    /// An unreadable or malformed file, another architecture, a tensor that is missing, superfluous, of the wrong shape or of a
    /// type that cannot be multiplied, a tokenizer that does not fit the vocabulary.
    pub fn open(path: impl AsRef<Path>) -> Result<Arc<Model>> {
        Self::open_with(path, &ModelOptions::default())
    }

    /// Like [`Model::open`], on the device that `options` name.
    ///
    /// # Errors
    /// As [`Model::open`]; with [`Device::Cuda`] also [`Error::NoGpu`] and [`Error::Gpu`].
    pub fn open_with(path: impl AsRef<Path>, options: &ModelOptions) -> Result<Arc<Model>> {
        let path = path.as_ref();
        // The container's own errors name the file already.
        let in_file = |cause| match cause {
            Error::NoGpu(_) | Error::Gpu(_) | Error::GpuMemory { .. } => cause,
            cause => Error::File { path: path.to_owned(), cause: Box::new(cause) },
        };
        Self::from_gguf_with(Gguf::open(path)?, options).map_err(in_file)
    }

    /// Like [`Model::open`], from a file already opened or read into memory.
    ///
    /// # Errors
    /// As [`Model::open`], without the file's path.
    pub fn from_gguf(gguf: Gguf) -> Result<Arc<Model>> {
        Self::from_gguf_with(gguf, &ModelOptions::default())
    }

    /// Like [`Model::open_with`], from a file already opened or read into memory.
    ///
    /// # Errors
    /// As [`Model::open_with`], without the file's path.
    pub fn from_gguf_with(gguf: Gguf, options: &ModelOptions) -> Result<Arc<Model>> {
        let config = Config::from_metadata(gguf.metadata())?;
        let names = check_tensors(&gguf, &config)?;
        let tokenizer = Tokenizer::from_metadata(gguf.metadata())?;
        if let Some(tokenizer) = &tokenizer {
            tokenizer.check_fits(config.n_vocab)?;
        }
        let bind = Bind { gguf: &gguf, names: &names };
        let n_embd = config.n_embd;
        let token_embd = bind.matrix(Part::TokenEmbd, None, config.n_vocab, n_embd)?;
        let position_embd = bind.matrix(Part::PositionEmbd, None, config.n_ctx, n_embd)?;
        let blocks = (0..config.n_layer).map(|i| bind.block(&config, i)).collect::<Result<_>>()?;
        let output_norm = bind.norm(Part::OutputNormScale, Part::OutputNormShift, None)?;
        let head = match gguf.tensor(GGUF_HEAD) {
            Some(_) => Some(Matrix::new(&gguf, GGUF_HEAD, config.n_vocab, n_embd)?),
            None => None,
        };
        let (gpu, device_note) = (None, None);
        let mut model =
            Model { token_embd, position_embd, blocks, output_norm, head, gpu, device_note, config, tokenizer, gguf };
        match options.device {
            Device::Cpu => {}
            Device::Cuda => model.gpu = Some(GpuModel::new(&model, options)?),
            Device::Auto => match GpuModel::new(&model, options) {
                Ok(gpu) => model.gpu = Some(gpu),
                // What nobody has is not missing.
                Err(Error::NoGpu(NoGpu::NoDriver | NoGpu::NoDevice)) => {}
                Err(error) => model.device_note = Some(error.to_string()),
            },
        }
        model.repack()?;
        Ok(Arc::new(model))
    }

    /// Repacks the matrices that the CPU multiplies by.
    fn repack(&mut self) -> Result<()> {
        let Model { gguf, config, blocks, token_embd, head, gpu, .. } = self;
        let team = &mut Team::new(available_threads());
        let placement = gpu.as_ref().map(|gpu| gpu.placement);
        for (i, block) in blocks.iter_mut().enumerate() {
            let Block { q, k, v, out, ffn, .. } = block;
            if !placement.is_some_and(|placement| placement.has_attention(i)) {
                [q, k, v, out].into_iter().try_for_each(|linear| linear.weight.repack(gguf, team))?;
            }
            if !placement.is_some_and(|placement| placement.has_ffn(config, i)) {
                [&mut ffn.up, &mut ffn.down].into_iter().try_for_each(|linear| linear.weight.repack(gguf, team))?;
            }
        }
        if placement.is_none() {
            head.as_mut().unwrap_or(token_embd).repack(gguf, team)?;
        }
        Ok(())
    }

    /// What the driver calls the GPU that holds it or a part of it; `None` on the CPU.
    pub fn gpu_name(&self) -> Option<&str> {
        self.gpu.as_ref().map(|gpu| gpu.gpu().name())
    }

    /// Where it runs, in words: the GPU's name and what of the model it holds; `None` on the CPU.
    pub fn gpu_description(&self) -> Option<String> {
        self.gpu.as_ref().map(|gpu| gpu.describe(self))
    }

    /// Why [`Device::Auto`] does not use the GPU that there is.
    pub fn device_note(&self) -> Option<&str> {
        self.device_note.as_deref()
    }

    /// The hyperparameters.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The tokenizer, where the file has one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// The container: metadata, and tensors as stored.
    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    /// Token ids of a prompt: begin-of-text where the tokenizer puts one, special tokens recognised by name.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer.as_ref().ok_or(Error::NoTokenizer)?.encode_prompt(text)?)
    }

    /// F32 where every matrix is stored in f32, so that an f16 cache would be what limits precision, else F16.
    pub(crate) fn default_cache_type(&self) -> CacheType {
        let is_f32 = self.gguf.tensors().iter().all(|info| info.ty == GgmlType::F32);
        if is_f32 { CacheType::F32 } else { CacheType::F16 }
    }

    /// Bytes of weights that decoding one token reads: of every matrix, bias and norm, of the experts only those it chooses. Of the
    /// embeddings it reads a row each, which is not counted.
    pub fn bytes_per_token(&self) -> u64 {
        let config = &self.config;
        let is_head = |part: Part| part == Part::TokenEmbd && self.head.is_none();
        let bytes = tensors(config).into_iter().filter_map(|spec| {
            let info = self.gguf.tensor(spec.gguf.as_deref()?)?;
            Some(match spec.role {
                Role::TokenEmbedding | Role::PositionEmbedding if !is_head(spec.part) => 0,
                Role::Expert => info.n_bytes / config.n_expert as u64 * config.n_expert_used as u64,
                _ => info.n_bytes,
            })
        });
        let head = self.gguf.tensor(GGUF_HEAD).map_or(0, |info| info.n_bytes);
        bytes.sum::<u64>() + head
    }

    /// The matrix from the last hidden state to the logits: [n_vocab, n_embd].
    pub(crate) fn head(&self) -> &Matrix {
        self.head.as_ref().unwrap_or(&self.token_embd)
    }
}

/// GGUF names by what the tensors are.
type Names = HashMap<(Part, Option<usize>), String>;

/// Checks that the file holds the tensors of `config` in their shapes, and no others.
fn check_tensors(gguf: &Gguf, config: &Config) -> Result<Names> {
    let mut names = Names::new();
    let check = |name: &str, shape: Vec<usize>| {
        let info = gguf.tensor(name).ok_or_else(|| Error::MissingTensor { name: name.to_owned() })?;
        let expected: Vec<u64> = shape.iter().map(|&n| n as u64).collect();
        let got = info.shape();
        if got != expected {
            return Err(Error::Shape { name: name.to_owned(), expected, got });
        }
        Ok(())
    };
    for spec in tensors(config) {
        // Tensors without a GGUF name serve training only.
        if let Some(name) = &spec.gguf {
            check(name, spec.gguf_shape())?;
            names.insert((spec.part, spec.block), name.clone());
        }
    }
    let mut n_known = names.len();
    if gguf.tensor(GGUF_HEAD).is_some() {
        check(GGUF_HEAD, vec![config.n_vocab, config.n_embd])?;
        n_known += 1;
    }
    if gguf.tensors().len() > n_known {
        let known = |name: &str| name == GGUF_HEAD || names.values().any(|n| n == name);
        if let Some(info) = gguf.tensors().iter().find(|info| !known(&info.name)) {
            return Err(Error::UnexpectedTensor { name: info.name.clone() });
        }
    }
    Ok(names)
}

/// Turns checked tensors into weights.
struct Bind<'a> {
    gguf: &'a Gguf,
    names: &'a Names,
}

impl Bind<'_> {
    /// The tensor's name; the table decided which optional ones exist.
    fn name(&self, part: Part, block: Option<usize>) -> Option<&str> {
        self.names.get(&(part, block)).map(String::as_str)
    }

    fn required(&self, part: Part, block: Option<usize>) -> Result<&str> {
        self.name(part, block).ok_or_else(|| Error::MissingTensor { name: format!("{part:?}") })
    }

    fn matrix(&self, part: Part, block: Option<usize>, n_row: usize, n_col: usize) -> Result<Matrix> {
        Matrix::new(self.gguf, self.required(part, block)?, n_row, n_col)
    }

    fn norm(&self, scale: Part, shift: Part, block: Option<usize>) -> Result<Norm> {
        let read = |part| read_f32(self.gguf, self.required(part, block)?);
        Ok(Norm { scale: read(scale)?, shift: read(shift)? })
    }

    fn linear(&self, role: Part, bias: Part, block: usize, n_row: usize, n_col: usize) -> Result<Linear> {
        let mut weight = self.matrix(role, Some(block), n_row, n_col)?;
        // Every later block sees what rounding to int8 costs here, against a residual stream that is still small: most of the
        // divergence comes from it, and quantizing these activations twice costs about 1% of a prefill.
        weight.fine = block == 0 && matches!(role, Part::AttnQ | Part::AttnK | Part::AttnV | Part::AttnOut);
        Ok(Linear { weight, bias: self.optional(bias, block)? })
    }

    /// A vector; empty where the model has none.
    fn optional(&self, part: Part, block: usize) -> Result<Vec<f32>> {
        self.name(part, Some(block)).map_or(Ok(Vec::new()), |name| read_f32(self.gguf, name))
    }

    fn block(&self, config: &Config, block: usize) -> Result<Block> {
        let (n_embd, n_ff) = (config.n_embd, config.n_ff());
        let at = Some(block);
        let square = |weight, bias| self.linear(weight, bias, block, n_embd, n_embd);
        let q = square(Part::AttnQ, Part::AttnQBias)?;
        let k = square(Part::AttnK, Part::AttnKBias)?;
        let v = square(Part::AttnV, Part::AttnVBias)?;
        let out = square(Part::AttnOut, Part::AttnOutBias)?;
        let moe = config.is_moe(block);
        let (up, up_bias, down, down_bias) = if moe {
            (Part::ExpertUp, Part::ExpertUpBias, Part::ExpertDown, Part::ExpertDownBias)
        } else {
            (Part::FfnUp, Part::FfnUpBias, Part::FfnDown, Part::FfnDownBias)
        };
        let router = match self.name(Part::Router, at) {
            Some(name) => Some(Router {
                weight: read_f32(self.gguf, name)?,
                selection_bias: self.optional(Part::SelectionBias, block)?,
            }),
            None => None,
        };
        Ok(Block {
            norm1: self.norm(Part::AttnNormScale, Part::AttnNormShift, at)?,
            q,
            k,
            v,
            out,
            norm2: self.norm(Part::FfnNormScale, Part::FfnNormShift, at)?,
            ffn: FeedForward {
                router,
                up: self.linear(up, up_bias, block, n_ff, n_embd)?,
                down: self.linear(down, down_bias, block, n_embd, n_ff)?,
            },
        })
    }
}
