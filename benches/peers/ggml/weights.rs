//! The tensors of a GGUF file in ggml's buffers, found by what they are in the model.

use std::collections::HashMap;

use anyhow::{Context as _, Result, ensure};
use gguf::Gguf;
use param_model::{Config, GGUF_HEAD, Part, Role, TensorSpec, tensors};

use crate::ops::{Buffer, Context, Tensor};
use crate::version::{self, sys};

/// The operation that reads a weight: what decides which buffers can hold it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reader {
    MulMat,
    MulMatId,
    Other,
}

/// All weights of a model.
pub struct Weights {
    tensors: HashMap<(Part, Option<usize>), Tensor>,
    /// The matrix from the last hidden state to the logits: [n_embd, n_vocab].
    pub head: Tensor,
    _buffers: Vec<Buffer>,
    _contexts: Vec<Context>,
}

/// Tensors that share a type of buffer: with each the name of its data in the file.
struct Group<'a> {
    buffer_type: sys::ggml_backend_buffer_type_t,
    context: Context,
    tensors: Vec<(Tensor, &'a str)>,
}

impl Weights {
    /// Copies every tensor of the model into a buffer of the type that `backend` chooses for it.
    pub fn load(gguf: &Gguf, config: &Config, backend: &version::Backend) -> Result<Weights> {
        let table = tensors(config);
        let mut groups: Vec<Group> = Vec::new();
        let mut place = |name, reader| -> Result<Tensor> {
            let info = gguf.tensor(name).with_context(|| format!("tensor `{name}` is missing"))?;
            let ne: Vec<i64> = info.ne.iter().map(|&n| n as i64).collect();
            let buffer_type = backend.buffer_type(info.ty, &ne, reader);
            let at = groups.iter().position(|group| group.buffer_type == buffer_type).unwrap_or_else(|| {
                // One more than the table has: the head may be held twice.
                let context = Context::new(table.len() + 1);
                groups.push(Group { buffer_type, context, tensors: Vec::new() });
                groups.len() - 1
            });
            let group = &mut groups[at];
            let tensor = group.context.tensor(info.ty, &ne);
            group.tensors.push((tensor, name));
            Ok(tensor)
        };
        let mut by_part = HashMap::new();
        for spec in &table {
            let Some(name) = &spec.gguf else { continue };
            let found = gguf.tensor(name).map(|info| info.shape());
            let expected: Vec<u64> = spec.gguf_shape().iter().map(|&n| n as u64).collect();
            ensure!(
                found.as_ref().is_none_or(|found| *found == expected),
                "tensor `{name}`: expected {expected:?}, got {found:?}"
            );
            by_part.insert((spec.part, spec.block), place(name, reader(spec))?);
        }
        let embedding = table.iter().find(|spec| spec.part == Part::TokenEmbd).and_then(|spec| spec.gguf.as_deref());
        let tied = embedding.context("the model has no token embedding")?;
        let name = gguf.tensor(GGUF_HEAD).map_or(tied, |_| GGUF_HEAD);
        let info = gguf.tensor(name).with_context(|| format!("tensor `{name}` is missing"))?;
        let ne: Vec<i64> = info.ne.iter().map(|&n| n as i64).collect();
        let is_shared = name == tied
            && backend.buffer_type(info.ty, &ne, Reader::MulMat) == backend.buffer_type(info.ty, &ne, Reader::Other);
        // As llama.cpp does, a tied head is held a second time where its product wants another buffer than its rows.
        let head = if is_shared { by_part[&(Part::TokenEmbd, None)] } else { place(name, Reader::MulMat)? };
        let mut buffers = Vec::new();
        for group in &groups {
            buffers.push(Buffer::for_tensors(&group.context, group.buffer_type).context("no memory for the weights")?);
            for (tensor, name) in &group.tensors {
                tensor.set(gguf.tensor_data(name)?);
            }
        }
        let contexts = groups.into_iter().map(|group| group.context).collect();
        Ok(Weights { tensors: by_part, head, _buffers: buffers, _contexts: contexts })
    }

    /// A tensor that every model has, or the block at hand: the table decided.
    pub fn get(&self, part: Part, block: impl Into<Option<usize>>) -> Tensor {
        self.tensors[&(part, block.into())]
    }

    /// A tensor that only some models have.
    pub fn find(&self, part: Part, block: usize) -> Option<Tensor> {
        self.tensors.get(&(part, Some(block))).copied()
    }
}

fn reader(spec: &TensorSpec) -> Reader {
    match spec.role {
        Role::Attention | Role::FeedForward | Role::Router => Reader::MulMat,
        Role::Expert => Reader::MulMatId,
        _ => Reader::Other,
    }
}
