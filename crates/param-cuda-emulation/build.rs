//! Compiles the kernels of param-cuda as C++, with an engine that runs them and a driver API in front, into a libcuda.so.

#[path = "src/source.rs"]
#[allow(dead_code)]
mod source;

use std::path::{Path, PathBuf};

fn main() {
    if let Err(text) = build() {
        eprintln!("{text}");
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    let variable = |name: &str| std::env::var(name).map_err(|_| format!("{name} is not set"));
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR")?);
    let cpp = root.join("cpp");
    let kernels = root.with_file_name("param-cuda").join("kernels");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/source.rs");
    println!("cargo:rerun-if-changed={}", cpp.display());
    println!("cargo:rerun-if-changed={}", kernels.display());
    println!("cargo:rerun-if-env-changed=CXX");
    println!("cargo:rustc-env=PARAM_EMULATION_OUT={}", out.display());
    if variable("CARGO_CFG_TARGET_OS")? != "linux" {
        println!("cargo:rustc-env=PARAM_EMULATION_CXX=");
        return Ok(());
    }
    let tool = cc::Build::new().cpp(true).cargo_metadata(false).get_compiler();
    let cxx = vec![tool.path().to_string_lossy().into_owned()];
    println!("cargo:rustc-env=PARAM_EMULATION_CXX={}", cxx.join("\t"));

    for folder in ["emulation", "kernels", "old"] {
        std::fs::create_dir_all(out.join(folder)).map_err(|e| format!("{}/{folder}: {e}", out.display()))?;
    }
    // Variants of what is built anew.
    for entry in std::fs::read_dir(&out).map_err(|e| e.to_string())?.flatten() {
        let name = entry.file_name();
        if ["variant-", "new-"].iter().any(|p| name.to_string_lossy().starts_with(p)) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
    let files = kernel_files(&kernels)?;
    let mut objects = Vec::new();
    let mut jobs: Vec<Box<dyn FnOnce() -> Result<String, String> + Send>> = Vec::new();
    for stem in source::ENGINE {
        let (file, object) =
            (cpp.join(stem).with_extension("cpp"), out.join("emulation").join(stem).with_extension("o"));
        objects.push(object.clone());
        let cxx = cxx.clone();
        jobs.push(Box::new(move || source::compile(&cxx, &file, &object, false)));
    }
    for file in files {
        println!("cargo:rerun-if-changed={}", file.display());
        let object = out.join("kernels").join(file.file_name().unwrap_or_default()).with_extension("o");
        objects.push(object.clone());
        let (cxx, cpp, kernels) = (cxx.clone(), cpp.clone(), kernels.clone());
        jobs.push(Box::new(move || {
            let text = std::fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
            source::compile_kernels(&cxx, &cpp, &kernels, &file, &text, &object, false)
        }));
    }
    let queue = std::sync::Mutex::new(jobs.into_iter());
    let next = || queue.lock().ok()?.next();
    let results: Vec<_> = std::thread::scope(|scope| {
        let n = std::thread::available_parallelism().map_or(1, |n| n.get());
        let workers: Vec<_> =
            (0..n).map(|_| scope.spawn(|| std::iter::from_fn(&next).map(|job| job()).collect::<Vec<_>>())).collect();
        workers
            .into_iter()
            .flat_map(|w| w.join().unwrap_or_else(|_| vec![Err("a compiler's thread panicked".into())]))
            .collect()
    });
    for result in results {
        for line in result?.lines() {
            println!("cargo:warning={line}");
        }
    }
    source::link(&cxx, &objects, &out.join("libcuda.so"), false)?;

    let object = out.join("emulation").join("cublaslt.o");
    source::compile(&cxx, &cpp.join("cublaslt.cpp"), &object, false)?;
    source::link(&cxx, &[object], &out.join("libcublasLt.so"), false)?;

    // A driver so old that it knows no call but these two.
    let old = out.join("old");
    let object = old.join("old.o");
    source::compile(&cxx, &cpp.join("old.cpp"), &object, false)?;
    source::link(&cxx, &[object], &old.join("libcuda.so"), false)
}

fn kernel_files(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))? {
        let path = entry.map_err(|e| format!("{}: {e}", folder.display()))?.path();
        if path.extension().is_some_and(|e| e == "cu" || e == "cuh") {
            files.push(path);
        }
    }
    files.sort();
    for header in files.extract_if(.., |f| f.extension().is_some_and(|e| e == "cuh")) {
        println!("cargo:rerun-if-changed={}", header.display());
    }
    Ok(files)
}
