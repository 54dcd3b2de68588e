//! What each kernel needs of a multiprocessor, as ptxas states it. Fails where one does not assemble, where ptxas makes products by
//! warpgroups wait for each other, and where one spills more than a few bytes on sm_90, for which kernels are tuned; of sm_80 that is only shown.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Bytes that may be spilled: a few registers saved around what a kernel does once cost nothing.
const SPILLED: u32 = 64;

/// How the numbers of ptxas's notes begin that `wgmma` is serialised (C7510) or that a wait is injected (C7517).
const WAITS: &str = "(C75";

/// What ptxas says of a kernel.
#[derive(Debug, Default, PartialEq)]
struct Usage {
    kernel: String,
    registers: u32,
    /// Static shared memory, bytes.
    shared: u32,
    /// Local memory: arrays that are indexed at run time, bytes.
    stack: u32,
    spill_stores: u32,
    spill_loads: u32,
}

/// Assembles CRATE/ptx/*.ptx for each chip and prints a table.
pub fn report(folder: &Path, ptxas: &Path) -> Result<()> {
    let folder = folder.join("ptx");
    let mut paths: Vec<_> = match fs::read_dir(&folder) {
        Ok(entries) => entries.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?,
        Err(_) => Vec::new(),
    };
    paths.retain(|path| path.extension().is_some_and(|e| e == "ptx"));
    paths.sort();
    let mut spilled = Vec::new();
    println!("| file | kernel | chip | registers | shared bytes | stack | spill stores | spill loads |");
    println!("|---|---|---|---|---|---|---|---|");
    for path in paths {
        let text = fs::read_to_string(&path)?;
        let target = text.lines().find_map(|line| line.strip_prefix(".target ")).unwrap_or("sm_80");
        let chips: &[&str] = match target {
            "sm_90a" => &["sm_90a"],
            "sm_90" => &["sm_90"],
            _ => &["sm_80", "sm_90"],
        };
        for chip in chips {
            let file = path.file_stem().unwrap_or_default().to_string_lossy();
            let out = Command::new(ptxas)
                .args(["-v", &format!("-arch={chip}"), "-o", "/dev/null"])
                .arg(&path)
                .output()
                .with_context(|| ptxas.display().to_string())?;
            let log = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
            ensure!(out.status.success(), "{}, {chip}: {log}", path.display());
            let waits: Vec<&str> = log.lines().filter(|line| line.contains(WAITS)).collect();
            ensure!(waits.is_empty(), "{}, {chip}: {}", path.display(), waits.join("\n"));
            for usage in parse(&log) {
                let Usage { kernel, registers, shared, stack, spill_stores, spill_loads } = &usage;
                println!(
                    "| {file} | {kernel} | {chip} | {registers} | {shared} | {stack} | {spill_stores} | {spill_loads} |"
                );
                let is_tuned_for = chip.starts_with("sm_90");
                if is_tuned_for && *spill_stores > SPILLED {
                    spilled.push(format!("{kernel} on {chip}"));
                }
            }
        }
    }
    ensure!(spilled.is_empty(), "registers are spilled by {}", spilled.join(", "));
    Ok(())
}

/// ptxas names a kernel, then its stack and spills, then its registers and shared memory; functions that were not inlined have properties
/// of their own.
fn parse(log: &str) -> Vec<Usage> {
    let mut usages: Vec<Usage> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            usages.push(Usage { kernel, ..Usage::default() });
        }
        let Some(usage) = usages.last_mut() else { continue };
        let before = |what: &str| {
            let (left, _) = line.split_once(what)?;
            left.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse::<u32>().ok()
        };
        let mut raise = |to: fn(&mut Usage) -> &mut u32, what| {
            let place = to(usage);
            *place = before(what).map_or(*place, |n| n.max(*place));
        };
        raise(|u| &mut u.registers, " registers");
        raise(|u| &mut u.shared, " bytes smem");
        raise(|u| &mut u.stack, " bytes stack frame");
        raise(|u| &mut u.spill_stores, " bytes spill stores");
        raise(|u| &mut u.spill_loads, " bytes spill loads");
    }
    usages
}
