//! Safetensors checkpoints: reading single files, shards with an index and folders; writing what the reference loads.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, View};
use safetensors::{SafeTensorError, SafeTensors};

use crate::config::Config;
use crate::error::Error;
use crate::tensors::{self, Part, TensorSpec};

/// File name of a checkpoint's weights.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// File name of the map from tensors to shards, where the weights are split.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// File name of the hyperparameters beside the weights.
pub const CONFIG_FILE: &str = "config.json";
/// File name of the tokenizer beside the weights.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// Name of the link to a run's newest checkpoint.
pub const LAST_LINK: &str = "last";
/// Name of the link to the checkpoint of a run with the lowest validation loss.
pub const BEST_LINK: &str = "best";

/// An opened checkpoint: memory-mapped, nothing converted yet.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    shards: Vec<Shard>,
    /// Tensor name to the shard that holds it.
    shard_of: BTreeMap<String, usize>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    /// Where the tensors' bytes begin.
    data_start: usize,
}

/// One tensor's bytes within an opened checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct CheckpointTensor<'a> {
    /// Shape, slowest dimension first.
    pub shape: &'a [usize],
    dtype: FloatType,
    bytes: &'a [u8],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FloatType {
    F32,
    F16,
    Bf16,
}

impl FloatType {
    fn size(self) -> usize {
        match self {
            FloatType::F32 => 4,
            FloatType::F16 | FloatType::Bf16 => 2,
        }
    }
}

impl CheckpointTensor<'_> {
    /// Number of elements.
    pub fn n_elements(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// Size as stored, in bytes.
    pub fn n_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Converts the elements `range` (row-major) to f32 into `out` of the same length.
    ///
    /// # Panics
    /// If the range lies outside the tensor or `out` has another length.
    pub fn read_f32(&self, range: Range<usize>, out: &mut [f32]) {
        let size = self.dtype.size();
        let bytes = &self.bytes[range.start * size..range.end * size];
        assert_eq!(out.len(), range.len());
        match self.dtype {
            FloatType::F32 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *o = f32::from_le_bytes(*b);
                }
            }
            FloatType::F16 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *o = half::f16::from_le_bytes(*b).to_f32();
                }
            }
            FloatType::Bf16 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *o = half::bf16::from_le_bytes(*b).to_f32();
                }
            }
        }
    }

    /// All elements as f32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.n_elements()];
        self.read_f32(0..out.len(), &mut out);
        out
    }
}

impl Checkpoint {
    /// Opens a `.safetensors` file, an index of shards, a folder that holds either, or a run's folder (its newest
    /// checkpoint).
    pub fn open(path: &Path) -> Result<Self, Error> {
        let weights = locate(path)?;
        let files = if weights.extension().is_some_and(|e| e == "json") {
            shard_files(&weights)?
        } else {
            vec![weights.clone()]
        };
        let mut shards = Vec::with_capacity(files.len());
        let mut shard_of = BTreeMap::new();
        for file in files {
            let shard = Shard::open(file)?;
            for name in shard.metadata.offset_keys() {
                if let Some(other) = shard_of.insert(name.clone(), shards.len()) {
                    let other: &Shard = &shards[other];
                    let problem = format!("stands in {} too: each tensor belongs to one shard", other.path.display());
                    return Err(Error::Tensor { path: shard.path, tensor: name, problem });
                }
            }
            shards.push(shard);
        }
        Ok(Self { path: weights, shards, shard_of })
    }

    /// The file that was opened: the weights, or the index of their shards.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder in which a checkpoint's other files are looked for.
    pub fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("."))
    }

    /// Names of the stored tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.shard_of.keys().map(String::as_str)
    }

    /// The stored tensor of that name, if there is one; an error if its type is none that weights come in.
    pub fn tensor(&self, name: &str) -> Result<Option<CheckpointTensor<'_>>, Error> {
        let Some(&shard) = self.shard_of.get(name) else { return Ok(None) };
        let shard = &self.shards[shard];
        let info = shard.metadata.info(name).expect("names come from the shard's own metadata");
        let dtype = match info.dtype {
            Dtype::F32 => FloatType::F32,
            Dtype::F16 => FloatType::F16,
            Dtype::BF16 => FloatType::Bf16,
            other => {
                let problem = format!("is {other:?}: expected F32, F16 or BF16");
                return Err(Error::Tensor { path: shard.path.clone(), tensor: name.to_owned(), problem });
            }
        };
        let (start, end) = info.data_offsets;
        let bytes = &shard.map[shard.data_start + start..shard.data_start + end];
        Ok(Some(CheckpointTensor { shape: &info.shape, dtype, bytes }))
    }

    /// The stored tensor for an entry of the table, its shape checked. The tied head wins over the embedding, as it
    /// does in the reference, which reads it last.
    pub fn get(&self, spec: &TensorSpec) -> Result<CheckpointTensor<'_>, Error> {
        let names = if spec.part == Part::TokenEmbd {
            [Some(tensors::TIED_HEAD), Some(spec.checkpoint.as_str())]
        } else {
            [None, Some(spec.checkpoint.as_str())]
        };
        for name in names.into_iter().flatten() {
            let Some(tensor) = self.tensor(name)? else { continue };
            if tensor.shape != spec.shape {
                let problem = format!("expected {:?} by the config, got {:?}", spec.shape, tensor.shape);
                return Err(Error::Tensor { path: self.path.clone(), tensor: name.to_owned(), problem });
            }
            return Ok(tensor);
        }
        let problem = format!("missing: the config asks for it, with shape {:?}", spec.shape);
        Err(Error::Tensor { path: self.path.clone(), tensor: spec.checkpoint.clone(), problem })
    }

    /// Checks that the checkpoint holds exactly the model of `config`: every tensor with its shape, and none besides.
    pub fn check(&self, config: &Config) -> Result<(), Error> {
        let table = tensors::tensors(config);
        for spec in &table {
            self.get(spec)?;
        }
        let masks = (0..config.n_layer).map(tensors::mask_name).collect::<Vec<_>>();
        let known = table.iter().map(|t| t.checkpoint.as_str()).chain([tensors::TIED_HEAD]);
        let known = known.chain(masks.iter().map(String::as_str)).collect::<std::collections::HashSet<_>>();
        if let Some(name) = self.names().find(|n| !known.contains(n)) {
            let problem = "is not part of the model that the config describes: is it the config of this checkpoint?";
            let (path, tensor) = (self.path.clone(), name.to_owned());
            return Err(Error::Tensor { path, tensor, problem: problem.to_owned() });
        }
        Ok(())
    }

    /// The config that the tensors' shapes imply, for checkpoints without a `config.json`. Shapes cannot tell the
    /// number of heads nor the experts chosen per token.
    pub fn infer_config(&self, n_head: usize, n_expert_used: usize) -> Result<Config, Error> {
        let fail = |problem: &str| Error::Checkpoint { path: self.path.clone(), problem: problem.to_owned() };
        let shape = |name: &str| self.tensor(name).map(|t| t.map(|t| t.shape.to_vec()));
        // Probed under the names that a one-block model of the table has: what exists does not depend on the sizes.
        let probe = Config {
            n_layer: 1,
            n_expert: 2,
            n_expert_used: 1,
            moe_stride: 1,
            qkv_bias: true,
            use_selection_bias: true,
            ..Config::preset("param-tiny")?
        };
        let names = tensors::tensors(&probe);
        let name_in = |part: Part, block: usize| {
            let spec = names.iter().find(|t| t.part == part).expect("the probe has every part of an MoE block");
            spec.checkpoint.replacen(".0.", &format!(".{block}."), 1)
        };
        let embedding = match shape(tensors::TIED_HEAD)? {
            Some(shape) => Some(shape),
            None => shape(&name_in(Part::TokenEmbd, 0))?,
        };
        let (Some(&[n_vocab, n_embd]), Some(&[n_ctx, _])) =
            (embedding.as_deref(), shape(&name_in(Part::PositionEmbd, 0))?.as_deref())
        else {
            return Err(fail("it has no token or position embedding of a PARAM model"));
        };
        let n_layer = (0..).take_while(|&i| self.shard_of.contains_key(&name_in(Part::AttnQ, i))).count();
        let moe = (0..n_layer).filter(|&i| self.shard_of.contains_key(&name_in(Part::Router, i))).collect::<Vec<_>>();
        let n_expert = match moe.first() {
            Some(&block) => shape(&name_in(Part::Router, block))?.map_or(1, |s| s[0]),
            None => 1,
        };
        let moe_stride = match moe[..] {
            [] => 1,
            [_] => n_layer.max(1),
            [first, second, ..] => second - first,
        };
        let first = moe.first().copied().unwrap_or(0);
        let config = Config {
            n_vocab,
            n_ctx,
            n_embd,
            n_head,
            n_layer,
            n_expert,
            n_expert_used: if n_expert == 1 { 1 } else { n_expert_used },
            moe_stride,
            moe_phase: first,
            qkv_bias: self.shard_of.contains_key(&name_in(Part::AttnQBias, 0)),
            expert_bias: moe.is_empty() || self.shard_of.contains_key(&name_in(Part::ExpertUpBias, first)),
            use_noisy_top_k: moe.is_empty() || self.shard_of.contains_key(&name_in(Part::RouterNoise, first)),
            use_selection_bias: self.shard_of.contains_key(&name_in(Part::SelectionBias, first)),
            ..Config::preset("param-0.5b")?
        };
        config.checked(&self.path.display().to_string())
    }
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self, Error> {
        let file = File::open(&path).map_err(|error| Error::Io { path: path.clone(), error })?;
        let io = |error| Error::Io { path: path.clone(), error };
        if file.metadata().map_err(io)?.len() == 0 {
            return Err(Error::Checkpoint { path, problem: "the file is empty".to_owned() });
        }
        // SAFETY: the mapping is read-only; a file cut short by someone else while it is mapped is a fault that no
        // reader of a mapped file can catch, and one we accept for not copying the weights.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let (n_header, metadata) = SafeTensors::read_metadata(&map).map_err(|e| {
            let problem = match e {
                SafeTensorError::MetadataIncompleteBuffer => {
                    "its tensors do not fill the file exactly: it is truncated or corrupted".to_owned()
                }
                SafeTensorError::HeaderTooSmall
                | SafeTensorError::HeaderTooLarge
                | SafeTensorError::InvalidHeaderLength => {
                    format!("its header is not that of a safetensors file, or the file is truncated ({e})")
                }
                other => format!("its header is corrupted ({other})"),
            };
            Error::Checkpoint { path: path.clone(), problem }
        })?;
        Ok(Self { path, map, metadata, data_start: n_header + 8 })
    }
}

/// The weights or index file that `path` means.
fn locate(path: &Path) -> Result<PathBuf, Error> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let candidates = [path.to_owned(), path.join(LAST_LINK)];
    candidates
        .iter()
        .flat_map(|folder| [folder.join(WEIGHTS_FILE), folder.join(INDEX_FILE)])
        .find(|file| file.exists())
        .ok_or_else(|| {
            let problem = format!("the folder holds neither {WEIGHTS_FILE} nor {INDEX_FILE}");
            Error::Checkpoint { path: path.to_owned(), problem }
        })
}

/// The shards that an index names, each once, as files beside it.
fn shard_files(index: &Path) -> Result<Vec<PathBuf>, Error> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let fail = |problem: String| Error::Checkpoint { path: index.to_owned(), problem };
    let text = std::fs::read_to_string(index).map_err(|error| Error::Io { path: index.to_owned(), error })?;
    let parsed: Index = serde_json::from_str(&text).map_err(|e| fail(format!("not an index of shards: {e}")))?;
    let mut names = parsed.weight_map.into_values().collect::<Vec<_>>();
    names.sort();
    names.dedup();
    names
        .into_iter()
        .map(|name| match Path::new(&name).components().collect::<Vec<_>>()[..] {
            [std::path::Component::Normal(file)] => Ok(index.with_file_name(file)),
            _ => Err(fail(format!("shard `{name}` is not a plain file name"))),
        })
        .collect()
}

/// A tensor about to be written: borrowed parameters, or a mask made when its turn comes.
enum Stored<'a> {
    Floats { shape: Vec<usize>, data: &'a [f32] },
    Mask { shape: [usize; 2] },
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        match self {
            Stored::Floats { shape, .. } => shape,
            Stored::Mask { shape } => shape,
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Stored::Floats { data, .. } => le_bytes(data),
            Stored::Mask { shape: [n, _] } => {
                let mask = (0..n * n).map(|i| if i % n > i / n { 1.0f32 } else { 0.0 });
                mask.flat_map(f32::to_le_bytes).collect::<Vec<u8>>().into()
            }
        }
    }

    fn data_len(&self) -> usize {
        4 * self.shape().iter().product::<usize>()
    }
}

fn le_bytes(data: &[f32]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        bytemuck::cast_slice(data).into()
    } else {
        data.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>().into()
    }
}

/// Writes named f32 tensors as one safetensors file at `path`.
pub fn write_tensors<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, Vec<usize>, &'a [f32])>,
) -> Result<(), Error> {
    write_stored(path, tensors.into_iter().map(|(name, shape, data)| (name, Stored::Floats { shape, data })))
}

/// Writes a model's parameters (`params[i]` belongs to entry `i` of the table) as the reference's saver does: all
/// f32, the tied head a second time, a mask buffer per block, no metadata.
pub fn write_weights(path: &Path, config: &Config, params: &[&[f32]]) -> Result<(), Error> {
    let table = tensors::tensors(config);
    assert_eq!(table.len(), params.len(), "one slice per entry of the tensor table");
    let masks =
        (0..config.n_layer).map(|i| (tensors::mask_name(i), Stored::Mask { shape: [config.n_ctx, config.n_ctx] }));
    let params = table.into_iter().zip(params).flat_map(|(spec, data)| {
        let tied = (spec.part == Part::TokenEmbd)
            .then(|| (tensors::TIED_HEAD.to_owned(), Stored::Floats { shape: spec.shape.clone(), data }));
        tied.into_iter().chain([(spec.checkpoint, Stored::Floats { shape: spec.shape, data })])
    });
    write_stored(path, params.chain(masks))
}

fn write_stored<'a>(path: &Path, tensors: impl Iterator<Item = (String, Stored<'a>)>) -> Result<(), Error> {
    let io = |error| Error::Io { path: path.to_owned(), error };
    safetensors::serialize_to_file(tensors, None::<HashMap<String, String>>, path).map_err(|e| match e {
        SafeTensorError::IoError(error) => io(error),
        other => Error::Checkpoint { path: path.to_owned(), problem: other.to_string() },
    })?;
    // The library's own temporary file is private to the user; checkpoints are shared like any other file.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).map_err(io)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> Config {
        Config { n_vocab: 11, n_ctx: 5, n_embd: 8, n_head: 2, n_layer: 3, ..Config::preset("param-tiny").unwrap() }
    }

    fn parameters(config: &Config) -> Vec<Vec<f32>> {
        let table = tensors::tensors(config);
        table.iter().enumerate().map(|(i, t)| (0..t.n_elements()).map(|j| (i * 1000 + j) as f32).collect()).collect()
    }

    fn write(path: &Path, config: &Config) {
        let params = parameters(config);
        write_weights(path, config, &params.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
    }

    #[test]
    fn what_is_written_reads_back_with_masks_and_the_head_twice() {
        let folder = tempfile::tempdir().unwrap();
        let config = tiny();
        write(&folder.path().join(WEIGHTS_FILE), &config);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        checkpoint.check(&config).unwrap();
        for (spec, data) in tensors::tensors(&config).iter().zip(parameters(&config)) {
            assert_eq!(checkpoint.get(spec).unwrap().to_f32(), data, "{}", spec.checkpoint);
        }
        let mask = checkpoint.tensor(&tensors::mask_name(2)).unwrap().unwrap();
        assert_eq!(mask.shape, [5, 5]);
        assert_eq!(mask.to_f32()[..10], [0., 1., 1., 1., 1., 0., 0., 1., 1., 1.]);
        assert_eq!(checkpoint.names().filter(|n| *n == tensors::TIED_HEAD || n.ends_with("mask")).count(), 4);
    }

    #[test]
    fn shapes_tell_all_but_heads_and_top_k() {
        let folder = tempfile::tempdir().unwrap();
        for config in [
            tiny(),
            Config { n_layer: 4, moe_stride: 1, qkv_bias: true, expert_bias: false, ..tiny() },
            Config { n_layer: 5, moe_stride: 3, moe_phase: 1, use_noisy_top_k: false, ..tiny() },
            Config { n_expert: 1, n_expert_used: 1, moe_stride: 1, ..tiny() },
            Config { use_selection_bias: true, ..tiny() },
        ] {
            let path = folder.path().join("m.safetensors");
            write(&path, &config);
            let inferred = Checkpoint::open(&path).unwrap().infer_config(config.n_head, config.n_expert_used).unwrap();
            assert_eq!(tensors::tensors(&inferred), tensors::tensors(&config));
            assert_eq!((inferred.n_head, inferred.n_expert_used), (config.n_head, config.n_expert_used));
        }
    }

    #[test]
    fn half_precision_converts_exactly_and_other_types_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("h.safetensors");
        let values = [0.5f32, -3.0, 65504.0, 1e-3];
        let f16 = values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect::<Vec<_>>();
        let bf16 = values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect::<Vec<_>>();
        let view = |dtype, bytes| safetensors::tensor::TensorView::new(dtype, vec![4], bytes).unwrap();
        let stored =
            [("f16", view(Dtype::F16, &f16)), ("bf16", view(Dtype::BF16, &bf16)), ("i", view(Dtype::I16, &f16))];
        safetensors::serialize_to_file(stored, None, &path).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let read = |name| checkpoint.tensor(name).unwrap().unwrap().to_f32();
        assert_eq!(read("f16"), values.map(|x| half::f16::from_f32(x).to_f32()));
        assert_eq!(read("bf16"), values.map(|x| half::bf16::from_f32(x).to_f32()));
        assert!(checkpoint.tensor("i").unwrap_err().to_string().contains("`i`: is I16: expected F32"));
    }

    #[test]
    fn index_gathers_shards_and_refuses_paths_and_repeats() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        let one = |name: &str| [(name.to_owned(), vec![1], &[1.0f32][..])];
        write_tensors(&file("a.safetensors"), one("x")).unwrap();
        write_tensors(&file("b.safetensors"), one("y")).unwrap();
        let open = |index: &str| {
            std::fs::write(file(INDEX_FILE), index).unwrap();
            Checkpoint::open(folder.path()).map(|c| c.names().map(str::to_owned).collect::<Vec<_>>())
        };
        let names = open(r#"{"metadata": {}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}"#).unwrap();
        assert_eq!(names, ["x", "y"]);
        let error = open(r#"{"weight_map": {"x": "../a.safetensors"}}"#).unwrap_err().to_string();
        assert!(error.contains("not a plain file name"), "{error}");
        write_tensors(&file("b.safetensors"), one("x")).unwrap();
        let error = open(r#"{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}"#).unwrap_err().to_string();
        assert!(error.contains("tensor `x`: stands in"), "{error}");
    }

    #[test]
    fn truncated_corrupted_and_foreign_files_are_named_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        write(&path, &tiny());
        let whole = std::fs::read(&path).unwrap();
        for n in [0, 1, 7, 8, 9, 100, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..n]).unwrap();
            let error = Checkpoint::open(&path).unwrap_err().to_string();
            assert!(error.contains("m.safetensors"), "{n} bytes: {error}");
        }
        for byte in [0, 8, 9, 20, 50] {
            let mut bytes = whole.clone();
            bytes[byte] ^= 0x55;
            std::fs::write(&path, &bytes).unwrap();
            // A flip inside a name leaves a valid file of another model.
            let error = Checkpoint::open(&path).and_then(|c| c.check(&tiny())).unwrap_err().to_string();
            assert!(error.contains("m.safetensors"), "byte {byte}: {error}");
        }
    }

    #[test]
    fn a_config_of_another_model_is_refused_by_tensor() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        write(&path, &tiny());
        let checkpoint = Checkpoint::open(&path).unwrap();
        let error = |config: Config| checkpoint.check(&config).unwrap_err().to_string();
        let wide = error(Config { n_embd: 16, ..tiny() });
        assert!(wide.contains("`out_head.weight`: expected [11, 16] by the config, got [11, 8]"), "{wide}");
        let deep = error(Config { n_layer: 4, ..tiny() });
        assert!(deep.contains("`transformer_blocks.3.norm1.scale`: missing"), "{deep}");
        let shallow = error(Config { n_layer: 2, ..tiny() });
        assert!(shallow.contains("transformer_blocks.2.") && shallow.contains("not part of the model"), "{shallow}");
    }
}
