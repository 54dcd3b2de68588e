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
/// left where it fails or, with `None`, once `stop` is set.
pub fn convert(
    source: &Source,
    plan: &Plan,
    metadata: &Metadata,
    out: &Path,
    stop: &AtomicBool,
) -> Result<Option<Vec<Converted>>> {
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
                if stop.load(Ordering::Relaxed) {
                    bail!(Stopped);
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
    match written {
        Err(error) if error.is::<Stopped>() => Ok(None),
        written => written.with_context(|| format!("writing {}", out.display())).map(Some),
    }
}

/// Why a file was given up although nothing failed: an error, so that the writer cleans up as after any other.
#[derive(Debug, thiserror::Error)]
#[error("stopped")]
struct Stopped;

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

#[cfg(test)]
mod tests {
    use gguf::Gguf;
    use param_model::checkpoint::{WEIGHTS_FILE, write_weights};
    use param_model::{Config, Part};

    use super::*;
    use crate::plan::known_types;

    /// Rows of 256 and more, so that every type fits; two blocks, of which the first is a mixture.
    fn config() -> Config {
        let tiny = Config::preset("param-tiny").unwrap();
        Config { n_vocab: 40, n_ctx: 8, n_embd: 256, n_head: 4, n_layer: 2, n_expert: 3, n_expert_used: 2, ..tiny }
    }

    /// Numbers that differ from place to place, about uniform within ±0.1.
    fn weights(config: &Config) -> Vec<Vec<f32>> {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 * 0.2 - 0.1
        };
        let table = param_model::tensors(config);
        table.iter().map(|spec| (0..spec.n_elements()).map(|_| next()).collect()).collect()
    }

    fn source(folder: &Path, config: &Config, weights: &[Vec<f32>]) -> Source {
        let path = folder.join(WEIGHTS_FILE);
        let params: Vec<&[f32]> = weights.iter().map(Vec::as_slice).collect();
        write_weights(&path, config, &params).unwrap();
        Source { weights: path, config: config.clone(), tokenizer: None }
    }

    fn convert_to(source: &Source, quant: Option<GgmlType>, out: &Path) -> Result<Vec<Converted>> {
        let plan = Plan::new(&source.config, quant, &[])?;
        convert(source, &plan, &Metadata::new(), out, &AtomicBool::new(false)).map(|c| c.expect("not stopped"))
    }

    fn index_of(config: &Config, part: Part) -> usize {
        param_model::tensors(config).iter().position(|spec| spec.part == part).unwrap()
    }

    #[test]
    fn f32_keeps_every_weight_and_turns_experts_output_major() {
        let folder = tempfile::tempdir().unwrap();
        let (config, out) = (config(), folder.path().join("m.gguf"));
        let weights = weights(&config);
        let converted = convert_to(&source(folder.path(), &config, &weights), Some(GgmlType::F32), &out).unwrap();
        assert!(converted.iter().all(|sums| sums.error == 0.0 && sums.square > 0.0));
        let model = Gguf::open(&out).unwrap();
        for (spec, original) in param_model::tensors(&config).iter().zip(&weights) {
            let Some(name) = &spec.gguf else { continue };
            let mut stored = vec![0.0; spec.n_elements()];
            param_ggml::dequantize(GgmlType::F32, model.tensor_data(name).unwrap(), &mut stored).unwrap();
            let expected = match (spec.is_input_major(), &spec.shape[..]) {
                (true, &[n_expert, n_in, n_out]) => {
                    let at = |i: usize| original[(i / (n_in * n_out) * n_in + i % n_in) * n_out + i / n_in % n_out];
                    (0..n_expert * n_in * n_out).map(at).collect()
                }
                _ => original.clone(),
            };
            assert!(stored == expected, "{name}");
        }
    }

    #[test]
    fn every_type_reports_the_error_that_the_file_has() {
        let folder = tempfile::tempdir().unwrap();
        let (config, out) = (config(), folder.path().join("m.gguf"));
        let source = source(folder.path(), &config, &weights(&config));
        let mut errors = Vec::new();
        for name in known_types().split(", ") {
            let ty: GgmlType = name.parse().unwrap();
            let plan = Plan::new(&config, Some(ty), &[]).unwrap();
            let converted = convert_to(&source, Some(ty), &out).unwrap();
            let (model, checkpoint) = (Gguf::open(&out).unwrap(), source.checkpoint().unwrap());
            for (entry, sums) in plan.entries.iter().zip(converted) {
                let mut stored = vec![0.0; entry.spec.n_elements()];
                param_ggml::dequantize(entry.info.ty, model.tensor_data(&entry.info.name).unwrap(), &mut stored)
                    .unwrap();
                let tensor = checkpoint.get(&entry.spec).unwrap();
                let n_row = stored.len() / entry.info.ne[0] as usize;
                let original = if entry.spec.is_input_major() {
                    let n_out = entry.info.ne[1] as usize;
                    let expert = |first| transposed_rows(&tensor, &entry.spec, &(first..first + n_out));
                    (0..n_row).step_by(n_out).flat_map(expert).collect()
                } else {
                    tensor.to_f32()
                };
                let error: f64 = stored.iter().zip(original).map(|(a, b)| f64::from(a - b).powi(2)).sum();
                assert!((error - sums.error).abs() <= 1e-4 * error, "{} {ty}: {error} {}", entry.info.name, sums.error);
                if entry.spec.part == Part::ExpertUp {
                    errors.push((ty, sums.error));
                }
            }
        }
        let error_of = |ty| errors.iter().find(|(of, _)| *of == ty).unwrap().1;
        use GgmlType::*;
        let better_first = [F32, F16, BF16, Q8_0, Q6_K, Q5_K, Q4_K, Q3_K, Q2_K];
        assert!(better_first.is_sorted_by(|&a, &b| error_of(a) < error_of(b)), "{errors:?}");
    }

    #[test]
    fn any_number_of_threads_writes_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let config = config();
        let source = source(folder.path(), &config, &weights(&config));
        let bytes = |n_thread: usize| {
            let out = folder.path().join(format!("{n_thread}.gguf"));
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_thread).build().unwrap();
            pool.install(|| convert_to(&source, None, &out)).unwrap();
            std::fs::read(out).unwrap()
        };
        assert!(bytes(1) == bytes(5));
    }

    #[test]
    fn pieces_cover_every_row_once_and_stay_within_an_expert() {
        for preset in Config::preset_names() {
            for entry in Plan::new(&Config::preset(preset).unwrap(), None, &[]).unwrap().entries {
                let mut next = 0;
                for rows in pieces(&entry) {
                    assert_eq!(rows.start, next);
                    if entry.spec.is_input_major() {
                        let n_out = entry.info.ne[1] as usize;
                        assert_eq!(rows.start / n_out, (rows.end - 1) / n_out, "{}", entry.info.name);
                    }
                    next = rows.end;
                }
                assert_eq!(next as u64 * entry.info.ne[0], entry.info.n_elements(), "{}", entry.info.name);
            }
        }
    }

    #[test]
    fn unusable_weights_are_named_with_their_place_in_the_checkpoint() {
        let config = config();
        let message = |part: Part, index: usize, value: f32| {
            let folder = tempfile::tempdir().unwrap();
            let mut weights = weights(&config);
            weights[index_of(&config, part)][index] = value;
            let source = source(folder.path(), &config, &weights);
            let error = convert_to(&source, None, &folder.path().join("m.gguf")).unwrap_err();
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "something was left behind");
            format!("{error:#}")
        };
        let up = message(Part::ExpertUp, (2 * 256 + 17) * 1024 + 5, f32::NAN);
        let tensor = "tensor `transformer_blocks.0.moe.experts.c_fc`";
        assert!(up.ends_with(&format!("{tensor}: element [2, 17, 5] is NaN: the checkpoint is damaged")), "{up}");
        let bias = message(Part::ExpertUpBias, 1024 + 3, f32::INFINITY);
        assert!(bias.contains("moe.experts.fc_bias`: element [1, 0, 3] is inf"), "{bias}");
        let embedding = message(Part::TokenEmbd, 39 * 256 + 255, 1e9);
        assert!(embedding.contains("`token_emb.weight`: element [39, 255] is 1000000000, too large for Q8_0"));
        assert!(embedding.contains("--tensor-type"), "{embedding}");
    }

    #[test]
    fn a_failed_or_interrupted_conversion_leaves_the_older_file_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (config, out) = (config(), folder.path().join("m.gguf"));
        let mut weights = weights(&config);
        weights.last_mut().unwrap()[0] = f32::NAN;
        let source = source(folder.path(), &config, &weights);
        std::fs::write(&out, b"GGUF, finished").unwrap();
        convert_to(&source, None, &out).unwrap_err();
        let plan = Plan::new(&config, None, &[]).unwrap();
        let stopped = convert(&source, &plan, &Metadata::new(), &out, &AtomicBool::new(true)).unwrap();
        assert!(stopped.is_none());
        assert_eq!(std::fs::read(&out).unwrap(), b"GGUF, finished");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn an_unwritable_folder_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let config = config();
        let source = source(folder.path(), &config, &weights(&config));
        let error = convert_to(&source, None, &folder.path().join("absent/m.gguf")).unwrap_err();
        assert!(format!("{error:#}").contains("absent/m.gguf: "), "{error:#}");
    }
}
