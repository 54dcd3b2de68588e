//! A model's weights brought to the GPU: checked, taken apart into planes, and described to kernels by addresses that stay valid as long
//! as the [`DeviceModel`] lives.

use std::borrow::Cow;
use std::sync::Arc;

use crate::error::Result;
use crate::gpu::Gpu;
use crate::memory::Buffer;
use crate::model::{Block, Format, Matrix, Model, Norm};
use crate::planes::Planes;

/// A stack of matrices as a file stores it.
#[derive(Clone, Debug)]
pub struct Weights<'a> {
    /// How it is stored.
    pub format: Format,
    /// Matrices in the stack.
    pub n_matrix: usize,
    /// Outputs.
    pub n_row: usize,
    /// Inputs.
    pub n_col: usize,
    /// [n_matrix, n_row] rows of whole blocks.
    pub stored: Cow<'a, [u8]>,
    /// [n_matrix, n_row]; empty where there is none.
    pub bias: &'a [f32],
}

/// LayerNorm parameters, both [n_embd].
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct NormWeights<'a> {
    pub scale: &'a [f32],
    pub shift: &'a [f32],
}

/// What a block's feed-forward layer consists of.
#[derive(Clone, Debug)]
pub struct FeedForwardWeights<'a> {
    /// [n_expert, n_embd]; empty in a dense block.
    pub router: &'a [f32],
    /// [n_expert]; may be empty.
    pub selection_bias: &'a [f32],
    /// Of every expert, or one matrix: [n_ff, n_embd].
    pub up: Weights<'a>,
    /// Of every expert, or one matrix: [n_embd, n_ff].
    pub down: Weights<'a>,
}

/// A block. Without its feed-forward layer, where that runs elsewhere.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct BlockWeights<'a> {
    pub norm1: NormWeights<'a>,
    pub q: Weights<'a>,
    pub k: Weights<'a>,
    pub v: Weights<'a>,
    pub out: Weights<'a>,
    pub norm2: NormWeights<'a>,
    pub ffn: Option<FeedForwardWeights<'a>>,
}

/// What does not belong to a block.
#[derive(Clone, Debug)]
pub struct OuterWeights<'a> {
    /// [n_vocab, n_embd].
    pub token_embd: Weights<'a>,
    /// [n_ctx, n_embd].
    pub position_embd: &'a [f32],
    /// Before the head.
    pub output_norm: NormWeights<'a>,
    /// [n_vocab, n_embd]; `None` where it is the token embedding.
    pub head: Option<Weights<'a>>,
}

/// A model, or the part of it that was placed here, in the GPU's memory.
#[derive(Debug)]
pub struct DeviceModel {
    gpu: Arc<Gpu>,
    model: Model,
    blocks: Vec<Block>,
    device: Buffer<Model>,
    // What the addresses in the structures point to.
    _device_blocks: Buffer<Block>,
    _tensors: Vec<Buffer<u8>>,
    _vectors: Vec<Buffer<f32>>,
}

const WHAT: &str = "the model's weights";

impl DeviceModel {
    /// Begins with everything but the blocks. `dims` are the model's sizes and choices: all of [`Model`] but its addresses.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::Call`].
    ///
    /// # Panics
    /// Here and in [`Upload::block`] if lengths are not what `dims` say.
    pub fn begin(gpu: &Arc<Gpu>, dims: &Model, outer: &OuterWeights<'_>) -> Result<Upload> {
        let mut upload = Upload {
            gpu: Arc::clone(gpu),
            model: *dims,
            blocks: Vec::new(),
            tensors: Vec::new(),
            vectors: Vec::new(),
            planes: Vec::new(),
        };
        let (n_vocab, n_embd) = (dims.n_vocab, dims.n_embd);
        assert_eq!(outer.position_embd.len(), dims.n_ctx as usize * n_embd as usize);
        upload.model.token_embd = upload.matrix(&outer.token_embd, 1, n_vocab, n_embd)?;
        upload.model.position_embd = upload.vector(outer.position_embd)?;
        upload.model.output_norm = upload.norm(outer.output_norm)?;
        upload.model.head = match &outer.head {
            Some(head) => upload.matrix(head, 1, n_vocab, n_embd)?,
            None => upload.model.token_embd,
        };
        Ok(upload)
    }

    /// The GPU it is on.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Its description with addresses on the GPU.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Descriptions of its blocks; one that was left out has no weights.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Where [`DeviceModel::model`] lies on the GPU.
    pub fn address(&self) -> u64 {
        self.device.address()
    }
}

/// A model on its way to the GPU, block by block.
#[derive(Debug)]
pub struct Upload {
    gpu: Arc<Gpu>,
    model: Model,
    blocks: Vec<Block>,
    tensors: Vec<Buffer<u8>>,
    vectors: Vec<Buffer<f32>>,
    planes: Vec<u8>,
}

impl Upload {
    /// Adds the next block; `None` for one that runs elsewhere.
    ///
    /// # Errors
    /// As [`DeviceModel::begin`].
    pub fn block(&mut self, block: Option<&BlockWeights<'_>>) -> Result<()> {
        let Some(block) = block else {
            self.blocks.push(Block::default());
            return Ok(());
        };
        let (n_embd, n_ff) = (self.model.n_embd, self.model.n_ff);
        let mut placed = Block {
            norm1: self.norm(block.norm1)?,
            q: self.matrix(&block.q, 1, n_embd, n_embd)?,
            k: self.matrix(&block.k, 1, n_embd, n_embd)?,
            v: self.matrix(&block.v, 1, n_embd, n_embd)?,
            out: self.matrix(&block.out, 1, n_embd, n_embd)?,
            norm2: self.norm(block.norm2)?,
            ..Block::default()
        };
        if let Some(ffn) = &block.ffn {
            let is_moe = !ffn.router.is_empty();
            let n_matrix = if is_moe { self.model.n_expert } else { 1 };
            if is_moe {
                assert_eq!(ffn.router.len(), (n_matrix * n_embd) as usize);
                assert!(ffn.selection_bias.is_empty() || ffn.selection_bias.len() == n_matrix as usize);
                placed.router = self.vector(ffn.router)?;
                placed.selection_bias = self.vector(ffn.selection_bias)?;
            }
            placed.up = self.matrix(&ffn.up, n_matrix, n_ff, n_embd)?;
            placed.down = self.matrix(&ffn.down, n_matrix, n_embd, n_ff)?;
        }
        self.blocks.push(placed);
        Ok(())
    }

    /// The whole, once every block was added.
    ///
    /// # Errors
    /// As [`DeviceModel::begin`].
    ///
    /// # Panics
    /// If there are more blocks or fewer than the model has.
    pub fn end(mut self) -> Result<DeviceModel> {
        assert_eq!(self.blocks.len(), self.model.n_layer as usize);
        let blocks = self.gpu.upload(WHAT, &self.blocks)?;
        self.model.blocks = blocks.address();
        Ok(DeviceModel {
            device: self.gpu.upload(WHAT, &[self.model])?,
            gpu: self.gpu,
            model: self.model,
            blocks: self.blocks,
            _device_blocks: blocks,
            _tensors: self.tensors,
            _vectors: self.vectors,
        })
    }

    /// The address of a copy of `vector`; null of nothing.
    fn vector(&mut self, vector: &[f32]) -> Result<u64> {
        if vector.is_empty() {
            return Ok(0);
        }
        let buffer = self.gpu.upload(WHAT, vector)?;
        let address = buffer.address();
        self.vectors.push(buffer);
        Ok(address)
    }

    fn norm(&mut self, norm: NormWeights<'_>) -> Result<Norm> {
        let n_embd = self.model.n_embd as usize;
        assert!(norm.scale.len() == n_embd && norm.shift.len() == n_embd);
        Ok(Norm { scale: self.vector(norm.scale)?, shift: self.vector(norm.shift)? })
    }

    fn matrix(&mut self, weights: &Weights<'_>, n_matrix: u32, n_row: u32, n_col: u32) -> Result<Matrix> {
        let planes = Planes { format: weights.format, n_row: weights.n_row, n_col: weights.n_col };
        assert_eq!(
            (weights.n_matrix, weights.n_row, weights.n_col),
            (n_matrix as usize, n_row as usize, n_col as usize)
        );
        assert_eq!(weights.stored.len(), weights.n_matrix * planes.stored_bytes());
        assert!(weights.bias.is_empty() || weights.bias.len() == weights.n_matrix * weights.n_row);
        let bytes = planes.bytes();
        let mut tensor = self.gpu.alloc(WHAT, weights.n_matrix * bytes)?;
        self.planes.resize(bytes, 0);
        for (i, stored) in weights.stored.chunks_exact(planes.stored_bytes()).enumerate() {
            planes.write(stored, &mut self.planes);
            tensor.write(i * bytes, &self.planes)?;
        }
        let matrix = Matrix {
            data: tensor.address(),
            bias: self.vector(weights.bias)?,
            matrix_bytes: bytes as u64,
            n_row,
            n_col: planes.padded() as u32,
            format: weights.format as u32,
            unused: 0,
        };
        self.tensors.push(tensor);
        Ok(matrix)
    }
}
