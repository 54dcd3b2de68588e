//! Tensor after tensor through the quantizer into the file, in pieces of rows that all cores share.

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, anyhow, bail};
use gguf::{GgmlType, Metadata, Writer};
use param_model::{CheckpointTensor, TensorSpec, atomic};
use rayon::prelude::*;

use crate::plan::{Entry, Plan};
use crate::progress::Progress;
use crate::source::Source;

/// Elements of a piece, about: 1 MiB as f32, so that a core works within its cache.
const PIECE: usize = 1 << 18;
/// Pieces in flight per thread: enough that a slow one keeps nobody waiting for long.
const PIECES_PER_THREAD: usize = 4;

/// What converting a tensor cost: bytes read, and sums over its elements.
#[derive(Clone, Copy, Debug, Default)]
pub struct Converted {
    pub n_bytes_read: u64,
    /// Σ (stored - original)².
    pub error: f64,
    /// Σ original².
    pub square: f64,
}

/// Writes the whole file, which appears at `out` when it is complete; one result per entry of the plan. Nothing is
/// left where it fails or once `interrupted` is set.
pub fn convert(
    source: &Source,
    plan: &Plan,
    metadata: &Metadata,
    out: &Path,
    interrupted: &AtomicBool,
) -> Result<Vec<Converted>> {
    let mut progress = Progress::new(plan.n_elements());
    let written = atomic::write_file(out, |file| {
        let infos = plan.entries.iter().map(|entry| entry.info.clone()).collect();
        let mut writer = Writer::new(file, metadata, infos)?;
        let mut converted = Vec::with_capacity(plan.entries.len());
        for entry in &plan.entries {
            let checkpoint = source.checkpoint()?;
            let tensor = checkpoint.get(&entry.spec)?;
            let mut sums = Converted { n_bytes_read: tensor.n_bytes() as u64, ..Converted::default() };
            for window in pieces(entry).chunks(PIECES_PER_THREAD * rayon::current_num_threads()) {
                if interrupted.load(Ordering::Relaxed) {
                    bail!("interrupted");
                }
                let quantized: Vec<_> = window.par_iter().map(|rows| quantize_rows(&tensor, entry, rows)).collect();
                for piece in quantized {
                    let (bytes, piece_sums) = piece?;
                    writer.append(&entry.info.name, &bytes)?;
                    sums.error += piece_sums.error;
                    sums.square += piece_sums.square;
                }
                let n_row: usize = window.iter().map(Range::len).sum();
                progress.advance(n_row as u64 * entry.info.ne[0], &entry.info.name);
            }
            converted.push(sums);
        }
        writer.finish()?;
        anyhow::Ok(converted)
    });
    progress.finish();
    written.with_context(|| format!("writing {}", out.display()))
}

/// The rows of a tensor cut into pieces that do not cross from one expert's matrix into the next.
fn pieces(entry: &Entry) -> Vec<Range<usize>> {
    let ne = &entry.info.ne;
    let n_row = (entry.info.n_elements() / ne[0]) as usize;
    let n_row_matrix = if entry.spec.is_input_major() { ne[1] as usize } else { n_row };
    let n_row_piece = (PIECE / ne[0] as usize).max(1);
    let matrices = (0..n_row).step_by(n_row_matrix);
    let cut = |first: usize| {
        let end = first + n_row_matrix;
        (first..end).step_by(n_row_piece).map(move |start| start..end.min(start + n_row_piece))
    };
    matrices.flat_map(cut).collect()
}

/// Rows of the GGUF tensor as they are stored, and what that loses.
fn quantize_rows(tensor: &CheckpointTensor, entry: &Entry, rows: &Range<usize>) -> Result<(Vec<u8>, Converted)> {
    let n_per_row = entry.info.ne[0] as usize;
    let weights = if entry.spec.is_input_major() {
        transposed_rows(tensor, &entry.spec, rows)
    } else {
        let mut weights = vec![0.0; rows.len() * n_per_row]; // [n_row, n_per_row]
        tensor.read_f32(rows.start * n_per_row..rows.end * n_per_row, &mut weights);
        weights
    };
    let ty = entry.info.ty;
    let row_bytes = ty.row_size(entry.info.ne[0]).context("the plan has whole blocks only")? as usize;
    let mut bytes = vec![0; rows.len() * row_bytes];
    param_ggml::quantize(ty, &weights, n_per_row, None, &mut bytes)
        .map_err(|error| name_element(error, entry, rows))?;

    let square = |x: f32| f64::from(x) * f64::from(x);
    let mut sums = Converted { square: weights.iter().map(|&x| square(x)).sum(), ..Converted::default() };
    if ty != GgmlType::F32 {
        let mut stored = vec![0.0; weights.len()]; // [n_row, n_per_row]
        param_ggml::dequantize(ty, &bytes, &mut stored)?;
        sums.error = stored.iter().zip(&weights).map(|(&a, &b)| square(a - b)).sum();
    }
    Ok((bytes, sums))
}

/// Rows of one expert's output-major matrix, [n_row, n_in], from the checkpoint's [n_expert, n_in, n_out].
fn transposed_rows(tensor: &CheckpointTensor, spec: &TensorSpec, rows: &Range<usize>) -> Vec<f32> {
    let (n_in, n_out) = (spec.shape[1], spec.shape[2]);
    let (expert, first) = (rows.start / n_out, rows.start % n_out);
    let mut weights = vec![0.0; rows.len() * n_in]; // [n_row, n_in]
    let mut column = vec![0.0; rows.len()]; // [n_row]
    for i in 0..n_in {
        let start = (expert * n_in + i) * n_out + first;
        tensor.read_f32(start..start + rows.len(), &mut column);
        for (row, &weight) in weights.chunks_exact_mut(n_in).zip(&column) {
            row[i] = weight;
        }
    }
    weights
}

/// The quantizer's error about an element of a piece, told in the checkpoint's name and indices.
fn name_element(error: param_ggml::Error, entry: &Entry, rows: &Range<usize>) -> anyhow::Error {
    use param_ggml::Error::{NotFinite, TooLarge};
    let n_per_row = entry.info.ne[0] as usize;
    let place = |index: usize| {
        let (row, column) = (rows.start + index / n_per_row, index % n_per_row);
        let indices = match entry.spec.shape[..] {
            [_, _, n_out] if entry.spec.is_input_major() => vec![row / n_out, column, row % n_out],
            ref shape => {
                let mut left = row * n_per_row + column;
                let mut indices: Vec<usize> = shape.iter().rev().map(|dim| (left % dim, left /= dim).0).collect();
                indices.reverse();
                indices
            }
        };
        format!("tensor `{}`: element {indices:?}", entry.spec.checkpoint)
    };
    match error {
        NotFinite { index, value, .. } => anyhow!("{} is {value}: the checkpoint is damaged", place(index)),
        TooLarge { index, value, ty } => {
            anyhow!("{} is {value}, too large for {ty}: give the tensor a wider type with --tensor-type", place(index))
        }
        other => anyhow::Error::new(other).context(format!("tensor `{}`", entry.spec.checkpoint)),
    }
}
