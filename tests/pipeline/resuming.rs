//! Runs that are stopped, killed and resumed: the same to the bit as runs that were not.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use crate::command::{failure_of, output_of, param_train};
use crate::fixture::{assert_unchanged, contents, prose, records, resume, train, write};

/// Everything random at once: dropout, router noise (always on), several batches a step; and nothing that follows from the number of steps.
const RANDOM: [&str; 5] = ["--dropout=0.2", "--accumulate=2", "--lr=1e-2", "--momentum=0.95", "--seed=7"];

/// Documents of a few rows each, so that either layout has something to order.
pub fn documents(folder: &Path) -> PathBuf {
    let lines = (1..60).map(|seed| serde_json::json!({"text": prose(200, seed)}).to_string() + "\n");
    write(folder, "documents.jsonl", lines.collect::<String>())
}

/// Names of a run's checkpoints, oldest first.
fn checkpoints(run: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(run.join("checkpoints")).unwrap();
    let mut names = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>();
    names.sort();
    names
}

fn link(run: &Path, name: &str) -> String {
    std::fs::read_link(run.join(name)).unwrap().to_string_lossy().into_owned()
}

/// All records but for how long things took.
fn timeless_records(run: &Path) -> Vec<Value> {
    let mut all = records(run, "step");
    for record in &mut all {
        for field in ["seconds", "tokens_per_s", "mfu", "memory"] {
            record.as_object_mut().unwrap().remove(field);
        }
    }
    all
}

pub fn assert_same_end(run: &Path, expected: &Path) {
    for file in ["model.safetensors", "optimizer.safetensors", "config.json", "tokenizer.json"] {
        let read = |run: &Path| std::fs::read(run.join("last").join(file)).unwrap();
        assert!(read(run) == read(expected), "{file} differs");
    }
    let (got, want) = (timeless_records(run), timeless_records(expected));
    assert_eq!(got.len(), want.len(), "records");
    got.iter().zip(&want).for_each(|(got, want)| assert_eq!(got, want));
}

/// Makes of a copy of a finished run what a kill right after the checkpoint of `step` would have left.
pub fn cut_back(finished: &Path, copy: &Path, step: u64) {
    let status = Command::new("cp").arg("-a").arg(finished).arg(copy).status().unwrap();
    assert!(status.success());
    let newest = format!("step-{step:08}");
    for name in checkpoints(copy).into_iter().filter(|name| *name > newest) {
        std::fs::remove_dir_all(copy.join("checkpoints").join(name)).unwrap();
    }
    for name in ["last", "best"] {
        std::fs::remove_file(copy.join(name)).unwrap();
        std::os::unix::fs::symlink(Path::new("checkpoints").join(&newest), copy.join(name)).unwrap();
    }
    let metrics = copy.join("metrics.jsonl");
    let mut text = std::fs::read_to_string(&metrics).unwrap();
    text += "{\"step\":13,\"lo";
    std::fs::write(&metrics, text).unwrap();
}

#[test]
fn a_resumed_run_ends_as_one_that_was_never_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let data = documents(folder.path());
    let more = ["--set=use_selection_bias=true", "--bias-rate=0.1", "--freeze=W_key"];
    for (layout, more) in [("packed", &[][..]), ("document", &more)] {
        let (whole, resumed) = (folder.path().join(layout), folder.path().join(format!("{layout}-resumed")));
        let flags =
            ["--steps=12", "--save-every=5", "--eval-every=4", "--sample-every=6", "--sample-tokens=9", "--keep=9"];
        output_of(train(&data, &whole, &RANDOM).args(flags).args(["--layout", layout]).args(more));
        cut_back(&whole, &resumed, 5);
        let out = output_of(&mut resume(&resumed, &[]));
        assert!(out.contains("12 steps"), "{out}");
        assert_same_end(&resumed, &whole);
    }
}

fn spawn(command: &mut Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

/// Waits until a run has done `n` steps; fails if it ends before.
fn wait_for_steps(child: &mut Child, run: &Path, n: usize) {
    let done = || std::fs::read_to_string(run.join("metrics.jsonl")).is_ok_and(|text| text.lines().count() >= n);
    while !done() {
        assert!(child.try_wait().unwrap().is_none(), "the run ended by itself");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A run that would go on for hours and whose steps do not depend on how many there are to be.
const ENDLESS: [&str; 6] = [
    "--schedule=constant",
    "--warmup=3",
    "--sample-every=0",
    "--save-every=1000000",
    "--eval-every=1000000",
    "--steps=1000000",
];

#[test]
fn an_interrupted_run_saves_says_how_to_go_on_and_ends_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let data = documents(folder.path());
    for name in ["-INT", "-TERM"] {
        let run = folder.path().join(name);
        let mut child = spawn(train(&data, &run, &RANDOM).args(ENDLESS));
        wait_for_steps(&mut child, &run, 4);
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        let out = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(130), "{out}");
        assert!(out.contains("stopped; go on with: param-train --out") && out.contains("--resume"), "{out}");
        let stopped_at = records(&run, "loss").len();
        assert_eq!(link(&run, "last"), format!("checkpoints/step-{stopped_at:08}"));

        let steps = format!("--steps={}", stopped_at + 5);
        output_of(&mut resume(&run, &[&steps]));
        let whole = folder.path().join(format!("{name}-whole"));
        output_of(train(&data, &whole, &RANDOM).args(&ENDLESS[..5]).arg(&steps));
        assert_same_end(&run, &whole);
    }
}

/// Kills a run thirty times, somewhere between its start and a few checkpoints later.
#[test]
fn a_kill_at_any_moment_leaves_a_checkpoint_from_which_the_run_ends_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let data = documents(folder.path());
    let run = folder.path().join("run");
    let flags =
        ["--schedule=constant", "--warmup=3", "--sample-every=0", "--save-every=1", "--eval-every=3", "--keep=2"];
    let mut command = train(&data, &run, &RANDOM);
    command.args(flags).arg("--steps=1000000");
    let mut least = 1;
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for _ in 0..30 {
        let mut child = spawn(&mut command);
        while !run.join("last").exists() {
            assert!(child.try_wait().unwrap().is_none(), "the run ended by itself");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(rng.random_range(0..120_000)));
        signal(&child, "-KILL");
        child.wait().unwrap();
        let newest = link(&run, "last");
        let step: u64 = newest.rsplit('-').next().unwrap().parse().unwrap();
        assert!(step >= least, "the run fell back from {least} to {step}");
        output_of(param_train().args(["--eval", "--checkpoint"]).arg(&run).arg("--data").arg(&data));
        least = step;
        command = resume(&run, &[]);
    }
    let steps = format!("--steps={}", least + 3);
    let out = output_of(&mut resume(&run, &[&steps]));
    assert!(out.contains(&format!("{} steps", least + 3)), "{out}");
    let recorded = records(&run, "loss").iter().map(|r| r["step"].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!(recorded, (1..=least + 3).collect::<Vec<_>>(), "each step is recorded once");
    assert!(checkpoints(&run).iter().all(|name| !name.contains("partial")), "{:?}", checkpoints(&run));
    let whole = folder.path().join("whole");
    output_of(train(&data, &whole, &RANDOM).args(flags).arg(&steps));
    assert_same_end(&run, &whole);
}

#[test]
fn the_newest_and_the_best_checkpoints_are_kept_and_linked() {
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = (documents(folder.path()), folder.path().join("run"));
    // A rate this high soon makes the model worse than it was at first.
    let flags =
        ["--steps=14", "--save-every=1", "--eval-every=2", "--keep=3", "--lr=0.5", "--schedule=linear", "--warmup=10"];
    output_of(train(&data, &run, &flags).args(["--clip=1000", "--weight-decay=0"]));
    let evaluated = records(&run, "eval_loss");
    let losses = evaluated.iter().map(|r| (r["eval_loss"].as_f64().unwrap(), r["step"].as_u64().unwrap()));
    let (_, best) = losses.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
    assert!(best < 11, "the best must be among those that would go: {best}");
    let name = |step: u64| format!("step-{step:08}");
    assert_eq!(checkpoints(&run), [best, 12, 13, 14].map(name));
    assert_eq!(link(&run, "last"), "checkpoints/step-00000014");
    assert_eq!(link(&run, "best"), format!("checkpoints/{}", name(best)));
}

#[test]
fn a_folder_with_a_run_takes_no_second_one() {
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = (documents(folder.path()), folder.path().join("run"));
    output_of(&mut train(&data, &run, &["--steps=3"]));
    let before = contents(&run);
    let error = failure_of(&mut train(&data, &run, &["--steps=5"]), 1);
    assert!(error.contains("holds a run already (step 3)") && error.contains("--resume"), "{error}");
    assert_unchanged(&run, &before);
}

#[test]
fn a_finished_run_resumes_to_nothing_and_goes_on_with_more_steps() {
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = (documents(folder.path()), folder.path().join("run"));
    output_of(&mut train(&data, &run, &["--steps=3"]));
    let before = contents(&run.join("checkpoints"));
    assert!(output_of(&mut resume(&run, &[])).contains("3 steps"));
    assert_unchanged(&run.join("checkpoints"), &before);
    assert!(output_of(&mut resume(&run, &["--steps=6"])).contains("6 steps"));
    assert_eq!(records(&run, "loss").len(), 6);
}

#[test]
fn resuming_with_other_data_or_another_held_out_part_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = (documents(folder.path()), folder.path().join("run"));
    output_of(&mut train(&data, &run, &["--steps=3", "--holdout=0.2"]));
    let data_flag = format!("--data={}", data.display());
    let other = write(folder.path(), "other.txt", prose(9000, 99));
    let other_flag = format!("--data={}", other.display());
    for flags in [&[other_flag.as_str()][..], &[&data_flag, "--holdout=0.5"]] {
        let error = failure_of(resume(&run, &["--steps=6"]).args(flags), 1);
        assert!(error.contains("it was trained on other data"), "{flags:?}: {error}");
    }
    output_of(resume(&run, &["--steps=4"]).args([&data_flag, "--holdout=0.2"]));

    let mut changed = std::fs::read(&data).unwrap();
    changed.extend_from_slice(b"{\"text\": \"one document more\"}\n");
    std::fs::write(&data, changed).unwrap();
    let error = failure_of(&mut resume(&run, &["--steps=6"]), 1);
    assert!(error.contains("it was trained on other data"), "{error}");
    assert_eq!(records(&run, "loss").len(), 4);
}

#[test]
fn the_model_of_a_run_cannot_be_changed_by_resuming() {
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = (documents(folder.path()), folder.path().join("run"));
    output_of(&mut train(&data, &run, &["--steps=2"]));
    for flag in ["--preset=param-mini", "--set=num_layers=3", "--context=16", "--dropout=0.5", "--chars"] {
        let error = failure_of(&mut resume(&run, &[flag]), 2);
        assert!(error.contains("own model and tokenizer"), "{flag}: {error}");
    }
}

#[test]
fn what_a_killed_run_left_unlinked_is_not_taken_for_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = (documents(folder.path()), folder.path().join("run"));
    let stale = run.join("checkpoints/step-00000002");
    write(&stale, "state.json", "of another run");
    write(&run.join("checkpoints/step-00000001.partial"), "model.safetensors", "half");
    output_of(&mut train(&data, &run, &["--steps=2", "--save-every=1"]));
    assert_eq!(link(&run, "last"), "checkpoints/step-00000002");
    output_of(param_train().args(["--eval", "--checkpoint"]).arg(&run).arg("--data").arg(&data));
    assert_eq!(checkpoints(&run), ["step-00000001", "step-00000002"]);
}
