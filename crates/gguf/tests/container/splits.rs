//! Models split over several files.

use std::path::{Path, PathBuf};

use gguf::{Error, GgmlType, Gguf, Metadata};

use crate::{file, tensor};

fn part(no: u16, count: u16, n_tensors: i32, names: &[&str]) -> Vec<u8> {
    let mut metadata = Metadata::new();
    metadata.insert("split.no", no).unwrap();
    metadata.insert("split.count", count).unwrap();
    metadata.insert("split.tensors.count", n_tensors).unwrap();
    file(&metadata, names.iter().map(|name| tensor(name, &[8, 2], GgmlType::F32)).collect())
}

/// Writes parts under the names that splits have.
fn write(folder: &Path, parts: &[Vec<u8>]) -> Vec<PathBuf> {
    let path = |no| folder.join(format!("m-{:05}-of-{:05}.gguf", no + 1, parts.len()));
    let paths: Vec<_> = (0..parts.len()).map(path).collect();
    paths.iter().zip(parts).for_each(|(path, part)| std::fs::write(path, part).unwrap());
    paths
}

fn message(folder: &Path, parts: &[Vec<u8>]) -> String {
    Gguf::open(&write(folder, parts)[0]).unwrap_err().to_string()
}

#[test]
fn opening_the_first_part_opens_all() {
    let folder = tempfile::tempdir().unwrap();
    let parts = [part(0, 3, 4, &["a", "b"]), part(1, 3, 4, &["c"]), part(2, 3, 4, &["d"])];
    let model = Gguf::open(&write(folder.path(), &parts)[0]).unwrap();
    let names: Vec<_> = model.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "c", "d"]);
    // The first tensor of every part has the same data in these files, the second does not.
    assert_eq!(model.tensor_data("a").unwrap(), model.tensor_data("d").unwrap());
    assert_ne!(model.tensor_data("a").unwrap(), model.tensor_data("b").unwrap());
}

#[test]
fn other_parts_and_odd_names_say_what_to_open() {
    let folder = tempfile::tempdir().unwrap();
    let parts = [part(0, 2, 2, &["a"]), part(1, 2, 2, &["b"])];
    let paths = write(folder.path(), &parts);
    let message = Gguf::open(&paths[1]).unwrap_err().to_string();
    assert!(message.ends_with("open the first part, `m-00001-of-00002.gguf`"), "{message}");
    let renamed = folder.path().join("renamed.gguf");
    std::fs::write(&renamed, &parts[0]).unwrap();
    let message = Gguf::open(&renamed).unwrap_err().to_string();
    assert!(message.contains("should end in `-00001-of-00002.gguf`"), "{message}");
    assert!(matches!(Gguf::from_bytes(parts[0].clone()), Err(Error::Split { .. })));
}

#[test]
fn parts_that_disagree_are_errors_that_name_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let first = part(0, 2, 2, &["a"]);
    let problem = |parts: &[Vec<u8>]| message(folder.path(), parts);
    let found = problem(&[first.clone(), part(0, 2, 2, &["b"])]);
    assert!(found.contains("m-00002-of-00002.gguf: ") && found.ends_with("it says 1 of 2"), "{found}");
    assert!(problem(&[first.clone(), part(1, 3, 2, &["b"])]).ends_with("it says 2 of 3"));
    assert!(problem(&[first.clone(), part(1, 2, 2, &["a"])]).ends_with("tensor `a` is there twice"));
    assert!(
        problem(&[first.clone(), part(1, 2, 2, &["b", "c"])])
            .ends_with("expected 2 tensors in all parts together, found 3")
    );
    assert!(problem(&[first.clone(), crate::sample()]).ends_with("metadata key `split.no` is missing"));
    std::fs::remove_file(folder.path().join("m-00002-of-00002.gguf")).unwrap();
    let missing = Gguf::open(folder.path().join("m-00001-of-00002.gguf")).unwrap_err().to_string();
    assert!(missing.contains("m-00002-of-00002.gguf"), "{missing}");
}

#[test]
fn a_part_count_beyond_the_format_opens_no_files() {
    let folder = tempfile::tempdir().unwrap();
    let mut metadata = Metadata::new();
    metadata.insert("split.no", 0u16).unwrap();
    metadata.insert("split.count", u64::MAX).unwrap();
    metadata.insert("split.tensors.count", 1).unwrap();
    let path = folder.path().join("m-00001-of-00002.gguf");
    std::fs::write(&path, file(&metadata, vec![])).unwrap();
    assert!(Gguf::open(&path).unwrap_err().to_string().contains("split.count"));
}
