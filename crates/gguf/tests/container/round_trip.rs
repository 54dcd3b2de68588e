//! What is written is read back, byte for byte, and any damage to it is an error or harmless.

use gguf::{Array, Error, GgmlType, Gguf, Metadata, TensorInfo, Value, Writer};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::{data_of, file, sample, tensor};

fn leaf_array() -> impl Strategy<Value = Array> {
    prop_oneof![
        vec(any::<u8>(), 0..9).prop_map(Array::U8),
        vec(any::<i8>(), 0..9).prop_map(Array::I8),
        vec(any::<u16>(), 0..9).prop_map(Array::U16),
        vec(any::<i16>(), 0..9).prop_map(Array::I16),
        vec(any::<u32>(), 0..9).prop_map(Array::U32),
        vec(any::<i32>(), 0..9).prop_map(Array::I32),
        vec(any::<f32>(), 0..9).prop_map(Array::F32),
        vec(any::<bool>(), 0..9).prop_map(Array::Bool),
        vec(any::<String>(), 0..9).prop_map(Array::String),
        vec(any::<u64>(), 0..9).prop_map(Array::U64),
        vec(any::<i64>(), 0..9).prop_map(Array::I64),
        vec(any::<f64>(), 0..9).prop_map(Array::F64),
    ]
}

fn value() -> impl Strategy<Value = Value> {
    let array = leaf_array().prop_recursive(3, 16, 3, |inner| vec(inner, 0..3).prop_map(Array::Array));
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<f32>().prop_map(Value::F32),
        any::<bool>().prop_map(Value::Bool),
        any::<String>().prop_map(Value::String),
        array.prop_map(Value::Array),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        any::<f64>().prop_map(Value::F64),
    ]
}

fn metadata() -> impl Strategy<Value = Metadata> {
    (prop::collection::btree_map("[a-z_.]{1,20}", value(), 0..8), prop::option::of(3u32..9)).prop_map(
        |(entries, alignment)| {
            let mut metadata = Metadata::new();
            for (key, value) in entries {
                metadata.insert(key, value).unwrap();
            }
            if let Some(log2) = alignment {
                metadata.insert(gguf::KEY_ALIGNMENT, 1u32 << log2).unwrap();
            }
            metadata
        },
    )
}

fn tensors() -> impl Strategy<Value = Vec<TensorInfo>> {
    let types: Vec<GgmlType> = GgmlType::all().collect();
    let shape = (prop::sample::select(types), vec(1u64..4, 1..=4));
    prop::collection::btree_map("[a-z0-9_.]{1,63}", shape, 0..6).prop_map(|tensors| {
        let sized = |(name, (ty, mut ne)): (String, (GgmlType, Vec<u64>))| {
            ne[0] *= ty.block_size();
            TensorInfo::new(name, ne, ty).unwrap()
        };
        tensors.into_iter().map(sized).collect()
    })
}

/// Reads everything an open file offers.
fn touch(model: &Gguf) {
    for info in model.tensors() {
        assert_eq!(model.tensor_data(&info.name).unwrap().len() as u64, info.n_bytes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn what_is_written_is_read_back(metadata in metadata(), tensors in tensors()) {
        let bytes = file(&metadata, tensors.clone());
        let model = Gguf::from_bytes(bytes.clone()).unwrap();
        // NaN differs from itself: compared as text.
        let text = |metadata: &Metadata| format!("{:?}", metadata.iter().collect::<Vec<_>>());
        prop_assert_eq!(text(model.metadata()), text(&metadata));
        prop_assert_eq!(model.tensors().len(), tensors.len());
        for (i, (found, written)) in model.tensors().iter().zip(&tensors).enumerate() {
            prop_assert_eq!((&found.name, &found.ne, found.ty), (&written.name, &written.ne, written.ty));
            prop_assert_eq!(model.tensor_data(&found.name).unwrap(), data_of(i, found));
        }
        prop_assert_eq!(file(model.metadata(), model.tensors().to_vec()), bytes);
    }

    #[test]
    fn arbitrary_bytes_never_panic(mut bytes in vec(any::<u8>(), 0..400), keep_magic: bool) {
        if keep_magic && bytes.len() >= 8 {
            bytes[..8].copy_from_slice(b"GGUF\x03\0\0\0");
        }
        if let Ok(model) = Gguf::from_bytes(bytes) {
            touch(&model);
        }
    }

    #[test]
    fn damaged_files_never_panic(
        flips in vec((any::<prop::sample::Index>(), any::<u8>()), 0..6), cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = sample();
        for (at, byte) in flips {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len() + 1));
        }
        if let Ok(model) = Gguf::from_bytes(bytes) {
            touch(&model);
        }
    }
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = sample();
    // The end of the last tensor's data is followed by padding, which nothing needs.
    let needed = bytes.len() - (34u64.wrapping_neg() % 32) as usize;
    for n in 0..needed {
        assert!(Gguf::from_bytes(bytes[..n].to_vec()).is_err(), "cut to {n} bytes");
    }
    touch(&Gguf::from_bytes(bytes[..needed].to_vec()).unwrap());
}

#[test]
fn every_flip_of_a_header_bit_is_an_error_or_harmless() {
    let bytes = sample();
    for bit in 0..8 * bytes.len() {
        let mut bytes = bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        if let Ok(model) = Gguf::from_bytes(bytes) {
            touch(&model);
        }
    }
}

#[test]
fn a_mapped_file_reads_like_its_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, sample()).unwrap();
    let (mapped, owned) = (Gguf::open(&path).unwrap(), Gguf::from_bytes(sample()).unwrap());
    assert_eq!(mapped.metadata(), owned.metadata());
    assert_eq!(mapped.tensors(), owned.tensors());
    for info in mapped.tensors() {
        let data = mapped.tensor_data(&info.name).unwrap();
        assert_eq!(data, owned.tensor_data(&info.name).unwrap());
        assert_eq!(data.as_ptr().addr() as u64 % gguf::DEFAULT_ALIGNMENT, 0);
    }
    assert_eq!(mapped.tensor("second").unwrap().ty, GgmlType::Q4_K);
    assert_eq!(mapped.tensor("fourth"), None);
    assert!(matches!(mapped.tensor_data("fourth"), Err(Error::MissingTensor { .. })));
}

#[test]
fn errors_of_a_file_name_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("empty.gguf");
    assert!(Gguf::open(&path).unwrap_err().to_string().contains("empty.gguf"));
    std::fs::write(&path, []).unwrap();
    let message = Gguf::open(&path).unwrap_err().to_string();
    assert!(message.ends_with("empty.gguf: not a GGUF file: it starts with [] instead of `GGUF`"), "{message}");
    std::fs::write(&path, b"PK\x03\x04").unwrap();
    assert!(matches!(Gguf::open(&path), Err(Error::File { error, .. }) if matches!(*error, Error::Magic { .. })));
}

#[test]
fn tensor_data_may_come_in_pieces() {
    let infos = vec![tensor("a", &[32, 4], GgmlType::F32), tensor("b", &[3], GgmlType::F32)];
    let whole = file(&Metadata::new(), infos.clone());
    let mut writer = Writer::new(Vec::new(), &Metadata::new(), infos.clone()).unwrap();
    for (i, info) in infos.iter().enumerate() {
        data_of(i, info).chunks(100).for_each(|piece| writer.append(&info.name, piece).unwrap());
    }
    assert_eq!(writer.finish().unwrap(), whole);
}

#[test]
fn the_writer_refuses_what_would_not_be_a_model() {
    let new = |infos| Writer::new(Vec::new(), &Metadata::new(), infos);
    let a = tensor("a", &[4], GgmlType::F32);
    assert!(matches!(new(vec![a.clone(), a.clone()]), Err(Error::DuplicateTensor { .. })));
    assert!(matches!(new(vec![tensor(&"n".repeat(64), &[4], GgmlType::F32)]), Err(Error::Tensor { .. })));
    assert!(matches!(new(vec![TensorInfo { ne: vec![0], ..a.clone() }]), Err(Error::Tensor { .. })));

    let mut writer = new(vec![a.clone(), tensor("b", &[4], GgmlType::F32)]).unwrap();
    assert_eq!(writer.append("b", &[0; 16]).unwrap_err().to_string(), "tensor `b`: the turn is that of `a`");
    assert_eq!(writer.append("a", &[0; 17]).unwrap_err().to_string(), "tensor `a`: 1 bytes too many for its 16");
    writer.append("a", &[0; 12]).unwrap();
    assert_eq!(writer.append("a", &[0; 5]).unwrap_err().to_string(), "tensor `a`: 1 bytes too many for its 16");
    writer.append("a", &[0; 4]).unwrap();
    writer.append("b", &[0; 15]).unwrap();
    assert_eq!(writer.finish().unwrap_err().to_string(), "tensor `b`: 15 of its 16 bytes were written");
}

#[test]
fn alignment_is_respected_and_must_be_a_power_of_two() {
    for alignment in [8u32, 64, 4096] {
        let mut metadata = Metadata::new();
        metadata.insert(gguf::KEY_ALIGNMENT, alignment).unwrap();
        let infos = vec![tensor("a", &[3], GgmlType::F32), tensor("b", &[3], GgmlType::F32)];
        let model = Gguf::from_bytes(file(&metadata, infos)).unwrap();
        assert_eq!(model.tensor("b").unwrap().offset, u64::from(alignment).max(16));
    }
    for alignment in [0u32, 1, 4, 24, 33, u32::MAX] {
        let mut metadata = Metadata::new();
        metadata.insert(gguf::KEY_ALIGNMENT, alignment).unwrap();
        assert!(matches!(Writer::new(Vec::new(), &metadata, vec![]), Err(Error::Key { .. })), "{alignment}");
    }
}
