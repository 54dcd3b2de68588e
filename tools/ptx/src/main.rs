//! The compiler of the kernels, which tools/ptx.sh runs: `ptx write|check CRATE` makes CRATE/ptx/*.ptx from CRATE/kernels/*.cu with the
//! NVRTC that the loader finds, or compares them; `ptx report CRATE PTXAS` prints what each kernel needs of a multiprocessor.

mod nvrtc;
mod report;
mod stamp;

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};

use crate::stamp::{Source, Sources, options};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ptx: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match &args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["write", folder] => write(Path::new(folder)),
        ["check", folder] => check(Path::new(folder)),
        ["report", folder, ptxas] => report::report(Path::new(folder), Path::new(ptxas)),
        _ => bail!("usage: ptx write|check CRATE, ptx report CRATE PTXAS"),
    }
}

fn write(folder: &Path) -> Result<()> {
    let sources = read(folder)?;
    fs::create_dir_all(folder.join("ptx"))?;
    for kernel in &sources.kernels {
        let path = folder.join("ptx").join(kernel.ptx_file());
        fs::write(&path, ptx(&sources, kernel)?).with_context(|| path.display().to_string())?;
    }
    for file in orphans(&sources, folder)? {
        fs::remove_file(folder.join("ptx").join(file))?;
    }
    println!("{} kernel files compiled to PTX", sources.kernels.len());
    Ok(())
}

/// Compares the PTX files with what the sources give now, and compiles to machine code, where errors show that PTX alone hides.
fn check(folder: &Path) -> Result<()> {
    let sources = read(folder)?;
    let mut wrong = orphans(&sources, folder)?;
    let mut n_program = 0;
    for kernel in &sources.kernels {
        let made = ptx(&sources, kernel)?;
        if fs::read_to_string(folder.join("ptx").join(kernel.ptx_file())).ok() != Some(made) {
            wrong.push(kernel.ptx_file());
        }
        for architecture in architectures(kernel.target()) {
            nvrtc::compile(&sources, kernel, &options(architecture))?.cubin()?;
            n_program += 1;
        }
    }
    ensure!(wrong.is_empty(), "not what the kernels compile to: {}: run tools/ptx.sh", wrong.join(", "));
    println!("{} PTX files are up to date; {n_program} programs of machine code", sources.kernels.len());
    Ok(())
}

/// The chips that code for a virtual architecture is tried on.
fn architectures(target: &str) -> &'static [&'static str] {
    match target {
        "compute_90a" => &["sm_90a"],
        "compute_90" => &["sm_90", "sm_90a"],
        _ => &["sm_80", "sm_90", "sm_90a"],
    }
}

fn read(folder: &Path) -> Result<Sources> {
    let folder = folder.join("kernels");
    Sources::read(&folder).with_context(|| folder.display().to_string())
}

/// The whole text of a PTX file.
fn ptx(sources: &Sources, kernel: &Source) -> Result<String> {
    let made = nvrtc::compile(sources, kernel, &options(kernel.target()))?.ptx()?;
    // NVRTC's own headers declare a variable for each architecture there is, which nothing reads.
    let is_kept = |line: &&str| !(line.starts_with(".global ") && line.contains("2nv6target"));
    let lines: Vec<&str> = made.lines().filter(is_kept).collect();
    Ok(format!("{}\n{}\n", sources.stamp(kernel), lines.join("\n").trim()))
}

/// PTX files whose kernel is gone.
fn orphans(sources: &Sources, folder: &Path) -> Result<Vec<String>> {
    let known: HashSet<String> = sources.kernels.iter().map(Source::ptx_file).collect();
    let Ok(entries) = fs::read_dir(folder.join("ptx")) else { return Ok(Vec::new()) };
    let mut files = Vec::new();
    for entry in entries {
        let file = entry?.file_name().to_string_lossy().into_owned();
        if file.ends_with(".ptx") && !known.contains(&file) {
            files.push(file);
        }
    }
    Ok(files)
}
