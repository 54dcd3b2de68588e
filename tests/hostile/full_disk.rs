//! Disks that fill up while something is saved: an error that names the file, nothing half-written, nothing finished lost.
//! A limit on the size of files, which only a process of its own can be given, stands in for the disk.
#![cfg(unix)]

use super::assert_names;
use crate::command::{failure_of, output_of, param_convert, param_run, param_train, with_file_limit};
use crate::fixture::{Trained, assert_unchanged, contents, prose, records, resume, tiny, train, write};

/// More than the tokens and metrics of a tiny run, less than its weights.
const LIMIT: u64 = 100 << 10;

#[test]
fn a_checkpoint_that_does_not_fit_leaves_none() {
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = (write(folder.path(), "text.txt", prose(6_000, 1)), folder.path().join("run"));
    let command = train(&data, &run, &["--steps=2"]);
    let error = failure_of(&mut with_file_limit(&command, LIMIT), 1);
    assert_names(&error, &["step-0000000", "model.safetensors", "File too large"]);
    assert_eq!(contents(&run.join("checkpoints")).len(), 0);
    assert!(!run.join("last").exists() && !run.join("best").exists());
    // With room, the same command begins anew.
    output_of(&mut train(&data, &run, &["--steps=2"]));
}

#[test]
fn a_checkpoint_that_no_longer_fits_leaves_the_one_before_whole() {
    let trained = Trained::new(2, &["--save-every=1"], None);
    let run = trained.run();
    let (checkpoints, last) = (contents(&run.join("checkpoints")), std::fs::read_link(run.join("last")).unwrap());
    let error = failure_of(&mut with_file_limit(&resume(&run, &["--steps=4"]), LIMIT), 1);
    assert_names(&error, &["step-00000003", "File too large"]);
    assert_unchanged(&run.join("checkpoints"), &checkpoints);
    assert_eq!(std::fs::read_link(run.join("last")).unwrap(), last);
    output_of(&mut resume(&run, &["--steps=4"]));
    let steps = records(&run, "loss").iter().map(|r| r["step"].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!(steps, [1, 2, 3, 4]);
}

#[test]
fn tokens_that_do_not_fit_leave_none() {
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = (write(folder.path(), "text.txt", prose(20_000, 1)), folder.path().join("run"));
    let error = failure_of(&mut with_file_limit(&train(&data, &run, &["--steps=2"]), 8 << 10), 1);
    assert_names(&error, &["tokens.bin", "File too large"]);
    let left = contents(&run);
    assert!(left.values().all(Vec::is_empty), "{:?}", left.keys());
}

#[test]
fn a_random_model_that_does_not_fit_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = param_train();
    command.arg("--init-only").args(tiny()).arg("--out").arg(folder.path().join("new"));
    let error = failure_of(&mut with_file_limit(&command, LIMIT), 1);
    assert_names(&error, &["new", "model.safetensors", "File too large"]);
    assert_eq!(contents(folder.path()).len(), 0);
}

#[test]
fn a_conversion_that_does_not_fit_leaves_the_older_file() {
    let trained = Trained::new(1, &[], None);
    let mut command = param_convert();
    command.arg(trained.run()).arg(trained.gguf()).args(["--quant", "f32"]);
    let before = contents(trained.path());
    let error = failure_of(&mut with_file_limit(&command, 40 << 10), 1);
    assert_names(&error, &["model.gguf", "File too large"]);
    assert_unchanged(trained.path(), &before);
}

#[test]
fn logits_that_do_not_fit_leave_nothing() {
    let trained = Trained::new(1, &[], None);
    let mut command = param_run();
    let logits = trained.path().join("logits.safetensors");
    command.arg("-m").arg(trained.gguf()).args(["-p", "the old bridge under the river", "--logits"]).arg(&logits);
    let before = contents(trained.path());
    let error = failure_of(&mut with_file_limit(&command, 4 << 10), 1);
    assert_names(&error, &["logits.safetensors", "File too large"]);
    assert_unchanged(trained.path(), &before);
}
