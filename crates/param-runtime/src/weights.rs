//! A model's tensors as inference uses them: vectors in f32, matrices as they are in the file or in tiles.

use gguf::{GgmlType, Gguf};
use param_ggml::DotKernel;
use param_kernels::{Operand, Team};

use crate::activations::Form;
use crate::error::{Error, Result, zeroed};
use crate::tiles::Tiles;

/// A stack of matrices (of one, outside the experts), used in place or repacked.
#[derive(Debug)]
pub(crate) struct Matrix {
    pub name: String,
    pub kernel: DotKernel,
    /// Outputs.
    pub n_row: usize,
    pub n_col: usize,
    pub row_bytes: usize,
    /// Whether its activations are quantized to 15 bits, where int8 alone would cost quality.
    pub fine: bool,
    /// The matrices repacked, where that is done: what products then read.
    pub tiles: Option<Tiles>,
}

impl Matrix {
    /// Checks that the runtime can multiply by the tensor's type.
    pub fn new(gguf: &Gguf, name: &str, n_row: usize, n_col: usize) -> Result<Matrix> {
        let ty = tensor_type(gguf, name)?;
        let unusable = |cause| Error::TensorType { name: name.to_owned(), ty, cause };
        let kernel = DotKernel::new(ty).map_err(unusable)?;
        kernel.activation_bytes(n_col).map_err(unusable)?;
        let row_bytes = n_col / ty.block_size() as usize * ty.type_size() as usize;
        Ok(Matrix { name: name.to_owned(), kernel, n_row, n_col, row_bytes, fine: false, tiles: None })
    }

    /// Repacks the weights where this CPU multiplies faster by tiles of their type.
    pub fn repack(&mut self, gguf: &Gguf, team: &mut Team) -> Result<()> {
        if let Some(format) = Tiles::format(self.kernel.weight_type()) {
            self.tiles = Some(Tiles::pack(team, format, self.data(gguf)?, self.n_row, self.n_col, self.row_bytes)?);
        }
        Ok(())
    }

    /// What its products read.
    pub fn form(&self) -> Form {
        match &self.tiles {
            Some(tiles) if self.fine && tiles.format.operand() == Operand::Int8 => Form::Fine,
            Some(tiles) => Form::Tile(tiles.format.operand()),
            None => Form::Ggml(self.kernel.activation_type()),
        }
    }

    /// The stored bytes: [n_matrix, n_row, row_bytes].
    pub fn data<'a>(&self, gguf: &'a Gguf) -> Result<&'a [u8]> {
        Ok(gguf.tensor_data(&self.name)?)
    }

    /// Row `row` as f32 in `out` [n_col].
    pub fn read_row(&self, gguf: &Gguf, row: usize, out: &mut [f32]) -> Result<()> {
        let bytes = &self.data(gguf)?[row * self.row_bytes..(row + 1) * self.row_bytes];
        let ty = self.kernel.weight_type();
        param_ggml::dequantize(ty, bytes, out).map_err(|cause| Error::TensorType { name: self.name.clone(), ty, cause })
    }
}

/// A tensor small enough to hold in f32: a norm, a bias, a router.
pub(crate) fn read_f32(gguf: &Gguf, name: &str) -> Result<Vec<f32>> {
    let ty = tensor_type(gguf, name)?;
    let n = gguf.tensor(name).map_or(0, |info| info.n_elements());
    let mut out = zeroed("a tensor in f32", usize::try_from(n).unwrap_or(usize::MAX))?;
    param_ggml::dequantize(ty, gguf.tensor_data(name)?, &mut out).map_err(|cause| Error::TensorType {
        name: name.to_owned(),
        ty,
        cause,
    })?;
    Ok(out)
}

fn tensor_type(gguf: &Gguf, name: &str) -> Result<GgmlType> {
    gguf.tensor(name).map(|info| info.ty).ok_or_else(|| Error::MissingTensor { name: name.to_owned() })
}

/// LayerNorm parameters.
#[derive(Debug)]
pub(crate) struct Norm {
    pub scale: Vec<f32>, // [n_embd]
    pub shift: Vec<f32>, // [n_embd]
}

/// A matrix stack with its bias.
#[derive(Debug)]
pub(crate) struct Linear {
    pub weight: Matrix,
    /// [n_matrix, n_row]; empty where there is none.
    pub bias: Vec<f32>,
}

impl Linear {
    /// The bias of matrix `matrix`, empty where there is none.
    pub fn bias_of(&self, matrix: usize) -> &[f32] {
        if self.bias.is_empty() {
            &[]
        } else {
            &self.bias[matrix * self.weight.n_row..(matrix + 1) * self.weight.n_row]
        }
    }
}

/// What chooses experts.
#[derive(Debug)]
pub(crate) struct Router {
    /// [n_expert, n_embd].
    pub weight: Vec<f32>,
    /// [n_expert]; empty where there is none.
    pub selection_bias: Vec<f32>,
}

/// A feed-forward layer. A dense one is a single expert that every token takes.
#[derive(Debug)]
pub(crate) struct FeedForward {
    /// `None` in dense blocks.
    pub router: Option<Router>,
    pub up: Linear,
    pub down: Linear,
}

/// One transformer block.
#[derive(Debug)]
pub(crate) struct Block {
    pub norm1: Norm,
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub out: Linear,
    pub norm2: Norm,
    pub ffn: FeedForward,
}
