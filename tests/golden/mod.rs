//! Golden cases: numbers computed by the reference, one folder a case, from `tests/golden` or the folder in
//! `PARAM_GOLDEN`. Which cases and variants there are is found from the files.

mod inference;
mod training;

pub use inference::{Converted, comma_separated, greedy, greedy_runs, ids, sequences};

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use param_model::{Checkpoint, Config, tensors};

/// A folder of golden numbers.
pub struct Case {
    pub folder: PathBuf,
    pub config: Config,
}

/// One array of an `.npz`.
pub struct Array {
    pub shape: Vec<usize>,
    pub floats: Vec<f32>,
    pub ints: Vec<i32>,
}

impl Case {
    pub fn name(&self) -> String {
        self.folder.file_name().unwrap().to_string_lossy().into_owned()
    }

    /// The config with dropout off, as all golden numbers were computed.
    fn open(folder: PathBuf) -> Self {
        let config = Config::from_file(&folder.join("config.json")).unwrap();
        Self { folder, config: Config { dropout: 0.0, ..config } }
    }

    pub fn checkpoint(&self) -> PathBuf {
        self.folder.join("model.safetensors")
    }

    pub fn params(&self) -> Vec<Vec<f32>> {
        let checkpoint = Checkpoint::open(&self.checkpoint()).unwrap();
        checkpoint.check(&self.config).unwrap();
        tensors(&self.config).iter().map(|spec| checkpoint.get(spec).unwrap().to_f32()).collect()
    }

    pub fn json(&self, file: &str) -> serde_json::Value {
        serde_json::from_str(&std::fs::read_to_string(self.folder.join(file)).unwrap()).unwrap()
    }

    pub fn arrays(&self, file: &str) -> BTreeMap<String, Array> {
        let mut archive = zip::ZipArchive::new(std::fs::File::open(self.folder.join(file)).unwrap()).unwrap();
        let n_array = archive.len();
        let read = |i: usize| {
            let entry = archive.by_index(i).unwrap();
            let name = entry.name().trim_end_matches(".npy").to_owned();
            let array = npyz::NpyFile::new(entry).unwrap();
            let shape = array.shape().iter().map(|&n| n as usize).collect();
            let is_int = array.dtype().descr().contains("i4");
            let (floats, ints) = if is_int {
                (Vec::new(), array.into_vec::<i32>().unwrap())
            } else {
                (array.into_vec::<f32>().unwrap(), Vec::new())
            };
            (name, Array { shape, floats, ints })
        };
        (0..n_array).map(read).collect()
    }
}

/// Every case there is; at least one, or the tests would hold of nothing.
pub fn cases() -> Vec<Case> {
    let root = match std::env::var_os("PARAM_GOLDEN") {
        Some(root) => PathBuf::from(root),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"),
    };
    let mut folders = std::fs::read_dir(&root)
        .unwrap_or_else(|e| panic!("{}: {e}", root.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("config.json").exists())
        .collect::<Vec<_>>();
    folders.sort();
    assert!(!folders.is_empty(), "{}: no golden case in it", root.display());
    folders.into_iter().map(Case::open).collect()
}

/// Asserts that two arrays differ by at most `bound` anywhere.
pub fn assert_close(what: &str, got: &[f32], want: &[f32], bound: f32) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let worst =
        got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, |a: f32, b| if b > a || b.is_nan() { b } else { a });
    assert!(worst <= bound, "{what}: off by {worst}, allowed {bound}");
}
