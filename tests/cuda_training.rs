//! param-train on a GPU, as a user runs it: the emulated one, or with `PARAM_GPU=1` a real one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use param_cuda_emulation::is_real;
use serde_json::Value;

use crate::command::{failure_of, outputs_of, param_train};
use crate::cuda::with_gpu;

/// A folder with a text in it, and runs of a small model on that.
struct Runs {
    folder: tempfile::TempDir,
}

impl Runs {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text = (0..300).map(|i| format!("{i} bottles of {} on the wall.\n", i * i % 97)).collect::<String>();
        fs::write(folder.path().join("text.txt"), text).unwrap();
        Self { folder }
    }

    fn out(&self, run: &str) -> PathBuf {
        self.folder.path().join(run)
    }

    /// A run of so many steps.
    fn train(&self, run: &str, n_step: u64, flags: &[&str]) -> Command {
        let mut command = param_train();
        command.arg("--data").arg(self.folder.path().join("text.txt")).arg("--out").arg(self.out(run));
        command.args(["--chars", "--preset", "param-tiny", "--set", "emb_dim=32", "--set", "num_heads=2"]);
        command.args(["--set", "num_layers=2", "--context", "16", "--eval-batches", "1"]);
        command.args(["--sample-tokens", "2", "--save-every", "2", "--eval-every", "0", "--sample-every", "0"]);
        if !flags.contains(&"--batch-size") {
            command.args(["--batch-size", "2"]);
        }
        command.args(["--steps", &n_step.to_string()]).args(flags);
        command
    }

    fn resume(&self, run: &str, n_step: u64, flags: &[&str]) -> Command {
        let mut command = param_train();
        command.arg("--resume").arg("--out").arg(self.out(run)).args(["--steps", &n_step.to_string()]).args(flags);
        command
    }

    fn losses(&self, run: &str) -> Vec<f64> {
        let lines = fs::read_to_string(self.out(run).join("metrics.jsonl")).unwrap();
        let records = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        records.filter_map(|record| record["loss"].as_f64()).collect()
    }
}

fn has_checkpoint(out: &Path, step: u64) -> bool {
    out.join(format!("checkpoints/step-{step:08}/state.json")).exists()
}

/// Bound: 1e-2 of a loss: of 32 tokens a step, one that rounding sends to another expert shows.
#[test]
fn a_run_on_a_gpu_is_the_cpus_and_goes_on_there() {
    let runs = Runs::new();
    let (_, said) = outputs_of(&mut with_gpu(runs.train("gpu", 4, &["--device", "cuda"]), ""));
    assert!(is_real() || said.contains("on Emulated GPU"), "{said}");
    let (_, said) = outputs_of(&mut runs.train("cpu", 4, &["--device", "cpu"]));
    assert!(!said.contains("GPU"), "{said}");
    outputs_of(&mut runs.resume("gpu", 6, &["--device", "cpu"]));
    outputs_of(&mut with_gpu(runs.resume("cpu", 6, &["--device", "auto"]), ""));
    let (gpu, cpu) = (runs.losses("gpu"), runs.losses("cpu"));
    assert_eq!(gpu.len(), 6);
    for (step, (gpu, cpu)) in gpu.iter().zip(&cpu).enumerate() {
        assert!((gpu - cpu).abs() <= 1e-2 * cpu, "step {}: {gpu} on the GPU, {cpu} on the CPU", step + 1);
    }
}

#[test]
fn the_parts_of_a_step_are_timed() {
    let runs = Runs::new();
    let profiled = runs.train("run", 3, &["--device", "cuda", "--profile"]);
    let (_, said) = outputs_of(&mut with_gpu(profiled, ""));
    for part in ["norm", "projections", "attention", "dense", "router", "experts", "head", "optimizer"] {
        let row = said.lines().find(|line| line.starts_with(&format!("| {part} "))).expect("a row of each part");
        let milliseconds = row.split('|').nth(2).unwrap().trim().parse::<f64>().unwrap();
        assert!(milliseconds > 0.0, "{row}");
    }
    outputs_of(&mut with_gpu(runs.train("plain", 3, &["--device", "cuda"]), ""));
    assert_eq!(runs.losses("run"), runs.losses("plain"));
}

#[test]
fn a_gpu_that_fails_is_named_and_the_last_checkpoint_is_whole() {
    if is_real() {
        return; // failures are played
    }
    let runs = Runs::new();
    // A pass and an update a step: the fifth step's pass.
    let mut failing = with_gpu(runs.train("run", 8, &["--device", "cuda"]), "fail=cuGraphLaunch:9");
    let said = failure_of(&mut failing, 1);
    assert!(said.contains("cuGraphLaunch failed"), "{said}");
    assert!(has_checkpoint(&runs.out("run"), 4) && !has_checkpoint(&runs.out("run"), 6));
    outputs_of(&mut with_gpu(runs.resume("run", 8, &["--device", "cuda"]), ""));
    assert!(has_checkpoint(&runs.out("run"), 8));
    assert_eq!(runs.losses("run").len(), 8);
}

#[test]
fn batches_are_sized_to_the_memory_there_is() {
    if is_real() {
        return; // its memory is what it is
    }
    let runs = Runs::new();
    let auto = |memory: &str| with_gpu(runs.train(memory, 1, &["--device", "cuda", "--batch-size", "auto"]), memory);
    let rows = |memory: &str| {
        let (_, said) = outputs_of(&mut auto(memory));
        let rows = said.lines().find_map(|line| line.split_once(" rows a batch")).expect("how many rows").0;
        rows.parse::<u64>().unwrap()
    };
    let (few, more) = (rows("memory=79000000"), rows("memory=90000000"));
    assert!(few.is_power_of_two() && more.is_power_of_two() && few < more, "{few} rows, then {more}");
    let said = failure_of(&mut auto("memory=1000000"), 1);
    assert!(said.contains("out of memory on the GPU") && said.contains("one row"), "{said}");
    let said = failure_of(&mut with_gpu(runs.train("run", 1, &["--device", "cuda"]), "memory=1000000"), 1);
    assert!(said.contains("out of memory on the GPU"), "{said}");
    let said = failure_of(&mut runs.train("run", 1, &["--device", "cpu", "--batch-size", "auto"]), 2);
    assert!(said.contains("--batch-size auto"), "{said}");
}

#[test]
fn what_a_gpu_does_not_take_is_left_to_the_cpu_or_refused() {
    let runs = Runs::new();
    let odd = ["--set", "emb_dim=36"];
    let (_, said) = outputs_of(&mut with_gpu(runs.train("auto", 1, &odd), ""));
    assert!(said.contains("not on the GPU: the GPU path takes an embedding width that is a multiple of 8"), "{said}");
    let insisting = runs.train("cuda", 1, &["--set", "emb_dim=36", "--device", "cuda"]);
    let said = failure_of(&mut with_gpu(insisting, ""), 1);
    assert!(said.contains("an embedding width that is a multiple of 8, this is 36"), "{said}");
    let said = failure_of(&mut runs.train("tf32", 1, &["--device", "cpu", "--dtype", "tf32"]), 2);
    assert!(said.contains("--dtype: tf32"), "{said}");
    let wgmma = |dtype, device| runs.train("wgmma", 1, &["--matmul", "wgmma", "--dtype", dtype, "--device", device]);
    let said = failure_of(&mut with_gpu(wgmma("tf32", "cuda"), ""), 2);
    assert!(said.contains("--matmul: wgmma multiplies bf16"), "{said}");
    let said = failure_of(&mut wgmma("bf16", "cpu"), 2);
    assert!(said.contains("--matmul: how matrices are multiplied"), "{said}");
    if !is_real() {
        for capability in ["80", "89", "100"] {
            let said = failure_of(&mut with_gpu(wgmma("bf16", "cuda"), &format!("capability={capability}")), 1);
            assert!(said.contains("products by wgmma need a GPU of compute capability 9.0"), "{said}");
        }
    }
    if !is_real() {
        let said = failure_of(&mut with_gpu(runs.train("none", 1, &["--device", "cuda"]), "no-device"), 1);
        assert!(said.contains("--device cuda: the NVIDIA driver finds no GPU"), "{said}");
        let (_, said) = outputs_of(&mut with_gpu(runs.train("none", 1, &[]), "no-device"));
        assert!(said.contains("threads"), "{said}");
    }
}

#[test]
fn a_dry_run_plans_for_a_gpu_that_need_not_be_there() {
    let plan = |simulate: &str| {
        let mut command = param_train();
        command.args([
            "--dry-run",
            "--preset",
            "param-0.5b",
            "--device",
            "cuda",
            "--dtype",
            "bf16",
            "--batch-size",
            "8",
        ]);
        outputs_of(&mut with_gpu(command, simulate))
    };
    let (with, _) = plan("");
    assert!(with.contains("may be used") && with.contains("GFLOP/s"), "{with}");
    if !is_real() {
        let (without, said) = plan("no-device");
        assert!(said.contains("for a GPU that is not here"), "{said}");
        let memory = |text: &str| {
            text.lines().take_while(|line| !line.starts_with("may be")).take(7).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(memory(&with), memory(&without));
    }
}
