//! Reading a model: one memory-mapped file, or all the parts of a split one, checked in full when opened.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::{Error, Metadata, Result, TensorInfo, parse};

const KEY_SPLIT_NO: &str = "split.no";
const KEY_SPLIT_COUNT: &str = "split.count";
const KEY_SPLIT_TENSORS: &str = "split.tensors.count";

/// An open model. Tensor data is a view into the file: opening reads the header only.
#[derive(Debug)]
pub struct Gguf {
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    /// Per tensor, the part that holds it.
    part_of: Vec<usize>,
    index: HashMap<String, usize>,
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    bytes: Bytes,
    /// Where tensor data starts, in bytes from the start of the file.
    data_start: u64,
}

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

impl Gguf {
    /// Opens a file, and with the first part of a split model all the others beside it. The file must not be
    /// truncated while it is open: the map would then fault.
    ///
    /// # Errors
    /// Whatever keeps the file from being read, or is wrong with it, with the file's path.
    pub fn open(path: impl AsRef<Path>) -> Result<Gguf> {
        let path = path.as_ref();
        let mut model = in_file(path, map(path).and_then(Gguf::from_part))?;
        let count = in_file(path, split_count(&model.metadata))?;
        if count > 1 {
            for (no, part) in in_file(path, part_paths(path, &model.metadata, count))?.iter().enumerate().skip(1) {
                in_file(part, map(part).and_then(Gguf::from_part).and_then(|other| model.append(other, no, count)))?;
            }
            in_file(path, model.check_split_total())?;
        }
        Ok(model)
    }

    /// Reads a whole model from memory; a part of a split one is an error. Tensor data then has the alignment of the
    /// buffer, which may be one byte.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Gguf> {
        let model = Gguf::from_part(Bytes::Owned(bytes))?;
        match split_count(&model.metadata)? {
            0 | 1 => Ok(model),
            n => Err(Error::Split { problem: format!("it has {n} parts, open the first from its file") }),
        }
    }

    fn from_part(bytes: Bytes) -> Result<Gguf> {
        let parse::Header { metadata, tensors, data_start } = parse::header(&bytes)?;
        let index = tensors.iter().enumerate().map(|(i, tensor)| (tensor.name.clone(), i)).collect();
        let part_of = vec![0; tensors.len()];
        Ok(Gguf { metadata, tensors, part_of, index, parts: vec![Part { bytes, data_start }] })
    }

    /// Takes over the tensors of part `no` (from 0) of `count`.
    fn append(&mut self, other: Gguf, no: usize, count: u64) -> Result<()> {
        let found = (other.metadata.u64(KEY_SPLIT_NO)?, other.metadata.u64(KEY_SPLIT_COUNT)?);
        if found != (no as u64, count) {
            let (found_no, found_count) = (found.0.saturating_add(1), found.1);
            let problem = format!("expected part {} of {count}, it says {found_no} of {found_count}", no + 1);
            return Err(Error::Split { problem });
        }
        for tensor in other.tensors {
            if self.index.insert(tensor.name.clone(), self.tensors.len()).is_some() {
                return Err(Error::DuplicateTensor { name: tensor.name });
            }
            self.tensors.push(tensor);
            self.part_of.push(no);
        }
        self.parts.extend(other.parts);
        Ok(())
    }

    fn check_split_total(&self) -> Result<()> {
        let (expected, found) = (self.metadata.u64(KEY_SPLIT_TENSORS)?, self.tensors.len() as u64);
        if expected != found {
            let problem = format!("expected {expected} tensors in all parts together, found {found}");
            return Err(Error::Split { problem });
        }
        Ok(())
    }

    /// The metadata; of a split model, that of its first part.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|&i| &self.tensors[i])
    }

    /// The data of a tensor: `n_bytes` bytes, rows of whole blocks, fastest dimension first.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] where there is no such tensor.
    pub fn tensor_data(&self, name: &str) -> Result<&[u8]> {
        let &i = self.index.get(name).ok_or_else(|| Error::MissingTensor { name: name.to_owned() })?;
        let (tensor, part) = (&self.tensors[i], &self.parts[self.part_of[i]]);
        // Within the file: the header was checked against the file's length.
        let start = (part.data_start + tensor.offset) as usize;
        Ok(&part.bytes[start..start + tensor.n_bytes as usize])
    }
}

fn in_file<T>(path: &Path, result: Result<T>) -> Result<T> {
    result.map_err(|error| Error::File { path: path.to_owned(), error: Box::new(error) })
}

fn map(path: &Path) -> Result<Bytes> {
    let file = File::open(path)?;
    if file.metadata()?.is_dir() {
        return Err(
            std::io::Error::new(std::io::ErrorKind::IsADirectory, "is a folder: name the GGUF file in it").into()
        );
    }
    // An empty file cannot be mapped on every system; it is then reported as having no magic.
    if file.metadata()?.len() == 0 {
        return Ok(Bytes::Owned(Vec::new()));
    }
    // SAFETY: the map is read-only and only ever seen as bytes, for which every content is valid. That nobody
    // truncates or rewrites the file meanwhile is the caller's to keep, as `open` says; no program can check it.
    #[allow(unsafe_code)]
    let map = unsafe { Mmap::map(&file)? };
    Ok(Bytes::Mapped(map))
}

fn split_count(metadata: &Metadata) -> Result<u64> {
    if metadata.contains(KEY_SPLIT_COUNT) { metadata.u64(KEY_SPLIT_COUNT) } else { Ok(0) }
}

/// The files of a split model, from that of its first part: `NAME-00001-of-0000N.gguf`.
fn part_paths(first: &Path, metadata: &Metadata, count: u64) -> Result<Vec<PathBuf>> {
    let name_of = |prefix: &str, no: u64| format!("{prefix}-{:05}-of-{count:05}.gguf", no + 1);
    let file_name = first.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let no = metadata.u64(KEY_SPLIT_NO)?;
    // The format stores both as u16, and names have five digits.
    if count > u64::from(u16::MAX) || no >= count {
        return Err(Error::Split { problem: format!("{KEY_SPLIT_NO} {no} with {KEY_SPLIT_COUNT} {count}") });
    }
    let Some(prefix) = file_name.strip_suffix(&name_of("", no)) else {
        let problem = format!("its name should end in `{}`, as it is part {} of {count}", name_of("", no), no + 1);
        return Err(Error::Split { problem });
    };
    if no != 0 {
        return Err(Error::Split { problem: format!("open the first part, `{}`", name_of(prefix, 0)) });
    }
    Ok((0..count).map(|no| first.with_file_name(name_of(prefix, no))).collect())
}
