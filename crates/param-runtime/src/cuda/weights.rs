//! A model's tensors on their way to the GPU: as stored where kernels read their type, else in f16, whose eleven bits lose nothing that
//! formats of up to six do not lose themselves.

use std::borrow::Cow;
use std::sync::Arc;

use half::f16;
use half::slice::HalfFloatSliceExt;
use param_cuda::model::{Format, Model as Dims};
use param_cuda::{BlockWeights, DeviceModel, FeedForwardWeights, Gpu, NormWeights, OuterWeights, Weights};

use crate::error::{Error, Result, zeroed};
use crate::model::Model;
use crate::placement::{Placement, format};
use crate::weights::{Block, Linear, Matrix, Norm, read_f32};

/// Uploads what `placement` puts on the GPU.
pub(super) fn upload(gpu: &Arc<Gpu>, model: &Model, dims: &Dims, placement: Placement) -> Result<DeviceModel> {
    let config = model.config();
    let position_embd = read_f32(&model.gguf, &model.position_embd.name)?;
    let (token_embd, head) = (matrix(model, &model.token_embd, 1, &[])?, model.head.as_ref());
    let outer = OuterWeights {
        token_embd,
        position_embd: &position_embd,
        output_norm: norm(&model.output_norm),
        head: head.map(|head| matrix(model, head, 1, &[])).transpose()?,
    };
    let mut upload = DeviceModel::begin(gpu, dims, &outer)?;
    drop(outer);
    for (i, block) in model.blocks.iter().enumerate() {
        let placed =
            placement.has_attention(i).then(|| weights(model, block, placement.has_ffn(config, i))).transpose()?;
        upload.block(placed.as_ref())?;
    }
    Ok(upload.end()?)
}

fn norm(norm: &Norm) -> NormWeights<'_> {
    NormWeights { scale: &norm.scale, shift: &norm.shift }
}

fn weights<'a>(model: &'a Model, block: &'a Block, with_ffn: bool) -> Result<BlockWeights<'a>> {
    let linear = |linear: &'a Linear, n_matrix| matrix(model, &linear.weight, n_matrix, &linear.bias);
    let ffn = with_ffn.then(|| {
        let router = block.ffn.router.as_ref();
        let n_matrix = if router.is_some() { model.config().n_expert } else { 1 };
        Ok::<_, Error>(FeedForwardWeights {
            router: router.map_or(&[], |router| &router.weight),
            selection_bias: router.map_or(&[], |router| &router.selection_bias),
            up: linear(&block.ffn.up, n_matrix)?,
            down: linear(&block.ffn.down, n_matrix)?,
        })
    });
    Ok(BlockWeights {
        norm1: norm(&block.norm1),
        q: linear(&block.q, 1)?,
        k: linear(&block.k, 1)?,
        v: linear(&block.v, 1)?,
        out: linear(&block.out, 1)?,
        norm2: norm(&block.norm2),
        ffn: ffn.transpose()?,
    })
}

fn matrix<'a>(model: &'a Model, matrix: &Matrix, n_matrix: usize, bias: &'a [f32]) -> Result<Weights<'a>> {
    let (n_row, n_col, ty) = (matrix.n_row, matrix.n_col, matrix.kernel.weight_type());
    let stored = matrix.data(&model.gguf)?;
    let (format, stored) = match format(ty) {
        Some(format) => (format, Cow::Borrowed(stored)),
        None => {
            let mut values: Vec<f32> = zeroed("weights in f32", n_matrix * n_row * n_col)?;
            let failed = |cause| Error::TensorType { name: matrix.name.clone(), ty, cause };
            param_ggml::dequantize(ty, stored, &mut values).map_err(failed)?;
            let mut halves: Vec<f16> = zeroed("weights in f16", values.len())?;
            halves.convert_from_f32_slice(&values);
            (Format::F16, Cow::Owned(bytemuck::cast_slice(&halves).to_vec()))
        }
    };
    Ok(Weights { format, n_matrix, n_row, n_col, stored, bias })
}
