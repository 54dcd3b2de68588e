//! The input rows of a matmul in the form that the weights' kernel reads: converted once, shared by every matrix they meet.

use std::sync::Mutex;

use gguf::GgmlType;
use param_ggml::Error::NotFinite;
use param_kernels::{ActivationBlock, Kernels, Team};

use crate::error::{Error, Result, resize};
use crate::weights::Matrix;

/// Rows start at multiples of this many bytes: more than any block's alignment, and two rows never share a cache line.
const ROW_ALIGN: usize = 64;

/// What rows of activations can be converted to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// What ggml's kernel for some type of weights reads.
    Ggml(GgmlType),
    /// Blocks of int8, for weights in tiles.
    Blocks,
}

/// Converted rows.
#[derive(Default)]
pub(crate) struct Activations {
    /// Rows for ggml, in whole words, so that every block is aligned: [n_row, stride / 4].
    words: Vec<u32>,
    row_bytes: usize,
    stride: usize,
    /// Rows for tiles: [n_row, n_block].
    blocks: Vec<ActivationBlock>,
    n_block: usize,
    /// Which of the two are the rows last converted; `None` before the first.
    form: Option<Form>,
}

impl Activations {
    /// Converts `x` [n_row, n_col] for `weights`. `what` names the rows in an error.
    ///
    /// # Errors
    /// Values that are not finite: only a damaged model computes such.
    pub fn convert(&mut self, team: &mut Team, weights: &Matrix, x: &[f32], n_col: usize, what: &str) -> Result<()> {
        let failed = |cause| Error::Compute { what: what.to_owned(), cause };
        let form = weights.activation_form();
        self.form = Some(form);
        let failure = Mutex::new(None);
        let row_of = |row: usize| &x[row * n_col..(row + 1) * n_col];
        if form == Form::Blocks {
            self.n_block = n_col / ActivationBlock::N_ELEMENT;
            let n = x.len() / ActivationBlock::N_ELEMENT;
            if self.blocks.len() < n {
                resize("activations", &mut self.blocks, n)?;
            }
            let kernels = Kernels::get();
            team.for_each_chunk(&mut self.blocks[..n], self.n_block, |row, blocks| {
                let x = row_of(row);
                if !kernels.quantize_row(x, blocks)
                    && let Some((index, &value)) = x.iter().enumerate().find(|(_, x)| !x.is_finite())
                {
                    // Of ggml's types, the one that also keeps a scale and a sum for 32 int8.
                    keep_first(&failure, NotFinite { index, value, ty: GgmlType::Q8_1 });
                }
            });
        } else {
            let kernel = &weights.kernel;
            self.row_bytes = kernel.activation_bytes(n_col).map_err(failed)?;
            self.stride = self.row_bytes.next_multiple_of(ROW_ALIGN);
            let n_word = x.len() / n_col * (self.stride / 4);
            if self.words.len() < n_word {
                resize("activations", &mut self.words, n_word)?;
            }
            let row_bytes = self.row_bytes;
            team.for_each_chunk(&mut self.words[..n_word], self.stride / 4, |row, words| {
                let bytes = &mut bytemuck::cast_slice_mut(words)[..row_bytes];
                if let Err(error) = kernel.quantize_row(row_of(row), bytes) {
                    keep_first(&failure, error);
                }
            });
        }
        into_result(failure).map_err(failed)
    }

    /// Whether the rows can be multiplied by `weights` as they are.
    pub fn fit(&self, weights: &Matrix) -> bool {
        self.form == Some(weights.activation_form())
    }

    /// Row `row` as converted for ggml.
    pub fn row(&self, row: usize) -> &[u8] {
        let start = row * self.stride;
        &bytemuck::cast_slice(&self.words)[start..start + self.row_bytes]
    }

    /// Row `row` as converted for tiles: [n_col / 32].
    pub fn blocks(&self, row: usize) -> &[ActivationBlock] {
        &self.blocks[row * self.n_block..(row + 1) * self.n_block]
    }
}

/// Takes note of a failure inside a parallel step.
pub(crate) fn keep_first<E>(slot: &Mutex<Option<E>>, error: E) {
    if let Ok(mut slot) = slot.lock() {
        slot.get_or_insert(error);
    }
}

/// The failure noted during a parallel step, if any.
pub(crate) fn into_result<E>(slot: Mutex<Option<E>>) -> std::result::Result<(), E> {
    slot.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).map_or(Ok(()), Err)
}
