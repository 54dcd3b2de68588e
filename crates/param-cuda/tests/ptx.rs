//! Every kernel's committed PTX is what its source, the headers and the options compile to, as far as hashes can tell.

#[allow(dead_code)]
#[path = "../../../tools/ptx/src/stamp.rs"]
mod stamp;

use std::fs;
use std::path::Path;

use stamp::{Source, Sources, options};

#[test]
fn committed_ptx_is_up_to_date() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = Sources::read(&folder.join("kernels")).unwrap();
    for kernel in &sources.kernels {
        let path = folder.join("ptx").join(kernel.ptx_file());
        let ptx = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}: run tools/ptx.sh", path.display()));
        let stamp = sources.stamp(kernel);
        assert_eq!(ptx.lines().next(), Some(&*stamp), "{} is out of date: run tools/ptx.sh", path.display());
    }
    let Ok(entries) = fs::read_dir(folder.join("ptx")) else { return };
    for entry in entries {
        let file = entry.unwrap().file_name().into_string().unwrap();
        let is_known = !file.ends_with(".ptx") || sources.kernels.iter().any(|k| k.ptx_file() == file);
        assert!(is_known, "ptx/{file} has no kernel: run tools/ptx.sh");
    }
}

#[test]
fn a_stamp_covers_the_kernel_and_its_headers() {
    let source = |file: &str, text: &str| Source { file: file.to_owned(), text: text.to_owned() };
    let of = |kernel: &str, b: &str, c: &str, other: &str| {
        let headers = vec![source("b.cuh", b), source("c.cuh", c), source("other.cuh", other)];
        Sources { kernels: Vec::new(), headers }.stamp(&source("a.cu", kernel))
    };
    let (kernel, b) = ("#include \"b.cuh\"\n", "#include \"c.cuh\"\n");
    let stamp = of(kernel, b, "", "");
    assert_eq!(stamp, of(kernel, b, "", "x"));
    assert_ne!(stamp, of(kernel, b, "x", ""));
    assert_ne!(stamp, of(kernel, &format!("{b}x"), "", ""));
    assert_ne!(stamp, of(&format!("{kernel}x"), b, "", ""));
    assert_ne!(stamp, of(&format!("// target: compute_90a\n{kernel}"), b, "", ""));
}

#[test]
fn a_first_line_may_name_the_target() {
    let target = |text: &str| Source { file: "a.cu".to_owned(), text: text.to_owned() }.target().to_owned();
    assert_eq!(target("// What it is.\n// target: compute_90a\n"), "compute_90a");
    assert_eq!(target("// What it is.\n"), "compute_80");
    assert_eq!(options("compute_80")[0], "--gpu-architecture=compute_80");
}
