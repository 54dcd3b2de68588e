//! The logits of a prompt as a file, for comparison with other implementations.

use std::path::Path;

use anyhow::Result;
use param_model::checkpoint::write_tensors;
use param_runtime::{Rows, Session};

/// Runs the whole context and writes the logits of every token to `path`: tensor `logits`, f32 [n_token, n_vocab].
pub fn write(path: &Path, session: &mut Session) -> Result<()> {
    let shape = vec![session.tokens().len(), session.model().config().n_vocab];
    let logits = session.forward(Rows::All)?;
    Ok(write_tensors(path, [("logits".to_owned(), shape, logits)])?)
}
