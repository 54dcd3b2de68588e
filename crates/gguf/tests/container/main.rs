//! The container from outside: round trips, split models, and files made to break a reader.

mod attacks;
mod round_trip;
mod splits;

use gguf::{GgmlType, Metadata, TensorInfo, Writer};

/// A file with the given metadata and tensors, whose data are bytes that differ from tensor to tensor.
fn file(metadata: &Metadata, tensors: Vec<TensorInfo>) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new(), metadata, tensors.clone()).unwrap();
    for (i, tensor) in tensors.iter().enumerate() {
        writer.append(&tensor.name, &data_of(i, tensor)).unwrap();
    }
    writer.finish().unwrap()
}

fn data_of(i: usize, tensor: &TensorInfo) -> Vec<u8> {
    (0..tensor.n_bytes).map(|at| (at as usize * 7 + i * 31 + 1) as u8).collect()
}

fn tensor(name: &str, ne: &[u64], ty: GgmlType) -> TensorInfo {
    TensorInfo::new(name, ne.to_vec(), ty).unwrap()
}

/// One of most things a file can hold.
fn sample() -> Vec<u8> {
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", "sample").unwrap();
    metadata.insert("sample.count", 3u32).unwrap();
    metadata.insert("sample.eps", 1e-5f32).unwrap();
    metadata.insert("sample.flag", true).unwrap();
    metadata.insert("sample.tokens", vec!["a".to_owned(), "".to_owned(), "Ġthe".to_owned()]).unwrap();
    metadata.insert("sample.types", vec![1i32, 3, -1]).unwrap();
    let tensors = vec![
        tensor("first", &[5, 3], GgmlType::F32),
        tensor("second", &[256, 2], GgmlType::Q4_K),
        tensor("third", &[32], GgmlType::Q8_0),
    ];
    file(&metadata, tensors)
}
