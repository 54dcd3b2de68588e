//! The input rows of a matmul in the type that the weights' kernel reads: converted once, shared by every matrix they meet.

use std::sync::Mutex;

use gguf::GgmlType;
use param_ggml::DotKernel;
use param_kernels::Team;

use crate::error::{Error, Result, resize};

/// Rows start at multiples of this many bytes: more than any block's alignment, and two rows never share a cache line.
const ROW_ALIGN: usize = 64;

/// Converted rows.
#[derive(Default)]
pub(crate) struct Activations {
    /// Backing store of whole words, so that every block in it is aligned: [n_row, stride / 4].
    words: Vec<u32>,
    /// What the rows are converted to; `None` before the first conversion.
    ty: Option<GgmlType>,
    row_bytes: usize,
    stride: usize,
}

impl Activations {
    /// Converts `x` [n_row, n_col] for weights of `kernel`'s type. `what` names the rows in an error.
    ///
    /// # Errors
    /// Values that are not finite: only a damaged model computes such.
    pub fn convert(&mut self, team: &mut Team, kernel: &DotKernel, x: &[f32], n_col: usize, what: &str) -> Result<()> {
        let failed = |cause| Error::Compute { what: what.to_owned(), cause };
        self.row_bytes = kernel.activation_bytes(n_col).map_err(failed)?;
        self.stride = self.row_bytes.next_multiple_of(ROW_ALIGN);
        self.ty = Some(kernel.activation_type());
        let n_word = x.len() / n_col * (self.stride / 4);
        if self.words.len() < n_word {
            resize("activations", &mut self.words, n_word)?;
        }
        let failure = Mutex::new(None);
        let row_bytes = self.row_bytes;
        team.for_each_chunk(&mut self.words[..n_word], self.stride / 4, |row, words| {
            let bytes = &mut bytemuck::cast_slice_mut(words)[..row_bytes];
            if let Err(error) = kernel.quantize_row(&x[row * n_col..(row + 1) * n_col], bytes) {
                keep_first(&failure, error);
            }
        });
        into_result(failure).map_err(failed)
    }

    /// Whether the rows can be multiplied by weights of `kernel`'s type as they are.
    pub fn fit(&self, kernel: &DotKernel) -> bool {
        self.ty == Some(kernel.activation_type())
    }

    /// Row `row`, converted.
    pub fn row(&self, row: usize) -> &[u8] {
        let start = row * self.stride;
        &bytemuck::cast_slice(&self.words)[start..start + self.row_bytes]
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
