//! Bad input and bad places to write to, through each command: the right exit code, an error that names the culprit, nothing
//! half-written, nothing finished lost.

mod converting;
mod full_disk;
mod running;
mod training;

use std::path::Path;
use std::process::{Command, Output};

use gguf::{Gguf, Metadata, TensorInfo, Value, Writer};

/// The exit code and standard error of a command that may succeed or fail, but in good order: no panic, no signal.
fn end_of(command: &mut Command) -> (i32, String) {
    let Output { status, stderr, .. } = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&stderr).into_owned();
    let code = status.code().unwrap_or_else(|| panic!("{command:?}: {status}\n{stderr}"));
    assert!(code <= 2 && !stderr.contains("panicked"), "{command:?}: {status}\n{stderr}");
    (code, stderr)
}

/// Asserts that an error has these parts.
#[track_caller]
fn assert_names(error: &str, parts: &[&str]) {
    assert!(error.lines().any(|line| line.starts_with("error: ")), "{error}");
    for part in parts {
        assert!(error.contains(part), "no `{part}` in: {error}");
    }
}

/// Lengths to cut a file of `len` bytes to: every so many of the header's `dense`, then fewer.
fn cuts(len: usize, dense: usize) -> impl Iterator<Item = usize> {
    let (near, far) = (dense / 40 + 1, len / 20 + 1);
    (0..dense).step_by(near).chain((dense..len).step_by(far)).chain([len - 1])
}

/// `n` places of a file with a bit to flip at each, half of them in its first `dense` bytes. The same for the same file.
fn flips(len: usize, dense: usize, n: usize) -> impl Iterator<Item = (usize, u8)> {
    let mut state = 0x2545_F491_4F6C_DD1D_u64;
    (0..n).map(move |i| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let bound = if i % 2 == 0 { dense } else { len };
        ((state >> 33) as usize % bound, 1 << (state >> 29 & 7))
    })
}

/// Copies a GGUF with its metadata entries and tensors changed, or left out where the change is `None`.
fn rewrite(
    from: &Path,
    to: &Path,
    entry: impl Fn(&str, &Value) -> Option<Value>,
    tensor: impl Fn(&TensorInfo, &[u8]) -> Option<(TensorInfo, Vec<u8>)>,
) {
    let whole = Gguf::open(from).unwrap();
    let mut metadata = Metadata::new();
    for (key, value) in whole.metadata().iter() {
        if let Some(value) = entry(key, value) {
            metadata.insert(key, value).unwrap();
        }
    }
    let tensors = whole.tensors().iter().filter_map(|info| tensor(info, whole.tensor_data(&info.name).unwrap()));
    let tensors = tensors.collect::<Vec<_>>();
    let mut writer =
        Writer::new(Vec::new(), &metadata, tensors.iter().map(|(info, _)| info.clone()).collect()).unwrap();
    for (info, data) in &tensors {
        writer.append(&info.name, data).unwrap();
    }
    std::fs::write(to, writer.finish().unwrap()).unwrap();
}

/// A tensor as it was, for [`rewrite`].
fn same(info: &TensorInfo, data: &[u8]) -> Option<(TensorInfo, Vec<u8>)> {
    Some((info.clone(), data.to_vec()))
}
