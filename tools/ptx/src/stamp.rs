//! What a PTX file is made from, and the hash of it that the file's first line carries: so that a test without a compiler sees when the
//! two have parted.

use std::fs;
use std::io;
use std::path::Path;

use sha2::{Digest, Sha256};

/// The compiler: its PTX is 8.0, which drivers since 525 load.
pub const NVRTC: (i32, i32) = (12, 0);

/// A file of kernels, or a header of ours.
pub struct Source {
    /// Without folders: `decode.cu`.
    pub file: String,
    pub text: String,
}

/// Everything in a folder of kernels, in the order of the names.
pub struct Sources {
    pub kernels: Vec<Source>,
    pub headers: Vec<Source>,
}

impl Sources {
    /// Reads `*.cu` and `*.cuh`.
    pub fn read(folder: &Path) -> io::Result<Sources> {
        let mut sources = Sources { kernels: Vec::new(), headers: Vec::new() };
        let mut paths = fs::read_dir(folder)?.map(|e| e.map(|e| e.path())).collect::<io::Result<Vec<_>>>()?;
        paths.sort();
        for path in paths {
            let of = match path.extension().and_then(|e| e.to_str()) {
                Some("cu") => &mut sources.kernels,
                Some("cuh") => &mut sources.headers,
                _ => continue,
            };
            let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            of.push(Source { file, text: fs::read_to_string(&path)? });
        }
        Ok(sources)
    }

    /// The headers that a kernel includes, and those that they include, in the order of their names.
    pub fn headers_of(&self, kernel: &Source) -> Vec<&Source> {
        let mut found = vec![false; self.headers.len()];
        let mut open = vec![kernel];
        while let Some(source) = open.pop() {
            for (i, header) in self.headers.iter().enumerate() {
                if !found[i] && source.text.contains(&format!("#include \"{}\"", header.file)) {
                    found[i] = true;
                    open.push(header);
                }
            }
        }
        self.headers.iter().zip(found).filter_map(|(header, found)| found.then_some(header)).collect()
    }

    /// The first line of the PTX made from `kernel`.
    pub fn stamp(&self, kernel: &Source) -> String {
        let mut hash = Sha256::new();
        let mut add = |text: &str| {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        };
        for source in std::iter::once(kernel).chain(self.headers_of(kernel)) {
            add(&source.file);
            add(&source.text);
        }
        add(&format!("{NVRTC:?}"));
        options(kernel.target()).iter().for_each(|option| add(option));
        let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        format!("// Made by tools/ptx.sh from {}, its headers and options: sha256 {hex}", kernel.file)
    }
}

impl Source {
    /// The PTX file's name: `decode.ptx`.
    pub fn ptx_file(&self) -> String {
        format!("{}.ptx", self.file.trim_end_matches(".cu"))
    }

    /// The virtual architecture: what a line `// target: compute_90a` among the first ten says, otherwise the oldest with bf16 and
    /// asynchronous copies.
    pub fn target(&self) -> &str {
        self.text.lines().take(10).find_map(|line| line.strip_prefix("// target: ")).map_or("compute_80", str::trim)
    }
}

/// How kernels are compiled for an architecture, virtual (`compute_80`) or real (`sm_90`).
pub fn options(architecture: &str) -> Vec<String> {
    vec![format!("--gpu-architecture={architecture}"), "--std=c++17".to_owned(), "--fmad=true".to_owned()]
}
