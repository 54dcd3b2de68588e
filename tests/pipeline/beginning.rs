//! Runs that begin from a checkpoint: fine-tuned, partly frozen, given more positions, made a mixture of experts; and those that
//! balance by selection bias, as the trainer and the runtime see them.

use std::path::{Path, PathBuf};
use std::process::Command;

use param_model::{Activation, Config, Part, tensors};
use param_runtime::{Rows, Session, SessionOptions};
use param_train::checkpoint::read_model;
use param_train::cpu::{Compute, Mode, Model, Sequences};

use crate::command::{failure_of, output_of, outputs_of, param_convert, param_train};
use crate::fixture::{Trained, prose, records, resume, series, tiny, train, write};
use crate::golden::assert_close;

/// A run on other text that begins from `source`.
fn begin(source: &Path, run: &Path, flags: &[&str]) -> Command {
    let data = write(source.parent().unwrap(), "other.txt", prose(8_000, 1) + &prose(8_000, 5));
    let mut command = param_train();
    command.arg("--init-from").arg(source).arg("--data").arg(data).arg("--out").arg(run);
    command.args(["--batch-size=4", "--threads=2"]).args(flags);
    command
}

fn model(path: &Path) -> (Config, Vec<Vec<f32>>) {
    read_model(path).unwrap()
}

/// Loss that `--eval` reports.
fn loss(checkpoint: &Path, data: &Path) -> f64 {
    let mut command = param_train();
    command.args(["--eval", "--batch-size=4", "--checkpoint"]).arg(checkpoint).arg("--data").arg(data);
    output_of(&mut command).split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_run_begins_from_anothers_weights_config_and_tokenizer() {
    let first = Trained::new(60, &[], None);
    let run = first.path().join("second");
    let (_, log) = outputs_of(&mut begin(&first.run(), &run, &["--steps=5", "--lr=1e-3"]));
    assert!(log.contains("starting from") && log.contains("tensors copied\n"), "{log}");
    for file in ["config.json", "tokenizer.json"] {
        let read = |run: &Path| std::fs::read(run.join("last").join(file)).unwrap();
        assert!(read(&run) == read(&first.run()), "{file}");
    }
    // It goes on from what was learned; dropout and noise make the first losses worse than the last evaluation.
    let (learned, scratch) = (*series(&first.run(), "eval_loss").last().unwrap(), series(&first.run(), "ce")[0]);
    let begun = series(&run, "ce")[0];
    assert!(begun < learned + 0.3 * (scratch - learned), "{begun} after {learned}, {scratch} from scratch");
    assert!(series(&run, "lr")[0] < 1.01e-3);
    assert_eq!(records(&run, "loss")[0]["step"], 1);
    output_of(&mut resume(&run, &["--steps=6"]));
}

#[test]
fn rows_may_be_shorter_than_the_positions_and_longer_ones_add_some() {
    let first = Trained::new(5, &[], None);
    let (config, params) = model(&first.run());
    let begun = |context: &str| {
        let run = first.path().join(context);
        let (_, log) = outputs_of(&mut begin(&first.run(), &run, &["--steps=1", "--lr=1e-9", "--context", context]));
        let tokens = records(&run, "loss")[0]["n_target"].as_u64().unwrap();
        (log, model(&run).0.n_ctx, tokens, model(&run).1)
    };
    let (_, n_ctx, n_token, _) = begun("16");
    assert_eq!((n_ctx, n_token), (32, 4 * 16));
    let (log, n_ctx, n_token, longer) = begun("48");
    assert!(log.contains("positions 32 to 47 new"), "{log}");
    assert_eq!((n_ctx, n_token), (48, 4 * 48));
    let at = tensors(&config).iter().position(|t| t.part == Part::PositionEmbd).unwrap();
    assert_close("old positions", &longer[at][..params[at].len()], &params[at], 1e-6);
    assert!(longer[at][params[at].len()..].iter().any(|&p| p != 0.0));
}

#[test]
fn what_is_frozen_stays_also_when_resumed_and_the_rest_learns() {
    let first = Trained::new(5, &[], None);
    let run = first.path().join("frozen");
    let flags = ["--steps=3", "--decay-all", "--freeze=_emb", "--freeze=experts|norm1"];
    let (_, log) = outputs_of(&mut begin(&first.run(), &run, &flags));
    assert!(log.contains("frozen: 10 tensors, "), "{log}");
    let (_, log) = outputs_of(&mut resume(&run, &["--steps=5"]));
    assert!(log.contains("frozen: 10 tensors, "), "{log}");
    let ((config, before), (_, after)) = (model(&first.run()), model(&run));
    for (spec, (before, after)) in tensors(&config).iter().zip(before.iter().zip(&after)) {
        let frozen = ["_emb", "experts", "norm1"].iter().any(|part| spec.checkpoint.contains(part));
        assert_eq!(before == after, frozen, "{}", spec.checkpoint);
    }
    // The norm is that of what learns: of one small tensor it is small.
    let other = first.path().join("all but one");
    output_of(&mut begin(&first.run(), &other, &["--steps=1", r"--freeze=^[^f]"]));
    assert!(series(&other, "grad_norm")[0] < 0.5 * series(&run, "grad_norm")[0]);
}

fn dense(folder: &Path) -> (PathBuf, PathBuf) {
    let data = write(folder, "text.txt", prose(20_000, 1));
    let run = folder.join("dense");
    output_of(&mut train(&data, &run, &["--steps=60", "--lr=1e-2", "--set=num_experts=1", "--set=top_k=1"]));
    (run, data)
}

const EXPERTS: [&str; 3] = ["--upcycle", "--set=num_experts=4", "--set=top_k=2"];

#[test]
fn a_dense_model_becomes_a_mixture_that_computes_the_same_and_learns() {
    let folder = tempfile::tempdir().unwrap();
    let (source, data) = dense(folder.path());
    let upcycled = folder.path().join("upcycled");
    let mut command = param_train();
    command.arg("--init-only").arg("--init-from").arg(&source).args(EXPERTS).arg("--out").arg(&upcycled);
    let (_, log) = outputs_of(&mut command);
    assert!(log.contains("4 made experts of dense layers, 2 new"), "{log}");
    let config = model(&upcycled).0;
    assert_eq!((config.n_expert, config.n_moe(), config.expert_activation), (4, 1, Activation::GeluTanh));
    let (before, after) = (loss(&source, &data), loss(&upcycled, &data));
    assert!((after - before).abs() <= 1e-5 * before, "{before} became {after}");

    let run = folder.path().join("run");
    output_of(begin(&source, &run, &["--steps=40", "--lr=1e-2", "--upcycle-noise=0.01"]).args(EXPERTS));
    let losses = series(&run, "ce");
    let sum = |losses: &[f64]| losses.iter().sum::<f64>();
    assert!(sum(&losses[30..]) < 0.95 * sum(&losses[..10]), "{losses:?}");
    output_of(param_convert().arg(&run).arg(folder.path().join("m.gguf")));
}

#[test]
fn what_a_checkpoint_cannot_become_is_refused_by_tensor_or_flag() {
    let trained = Trained::new(1, &[], None);
    let run = trained.path().join("second");
    for (flags, code, parts) in [
        (&["--upcycle"][..], 2, &["--upcycle", "mixture of experts already"][..]),
        (
            &["--set=num_experts=8"],
            1,
            &["model.safetensors", "`transformer_blocks.0.moe.router.w_g.weight`: is [4, 32]"],
        ),
        (&["--set=emb_dim=64"], 1, &["`token_emb.weight`"]),
        (&["--set=num_heads=4"], 2, &["num_heads", "2 in the checkpoint, 4 here"]),
        (&["--preset=param-tiny"], 2, &["--init-from", "--preset"]),
        (&["--tokenizer=x"], 2, &["--init-from", "--tokenizer"]),
        (&["--resume"], 2, &["--init-from", "--resume"]),
        (&["--freeze=attn_q"], 2, &["--freeze", "no tensor's name matches `attn_q`", "`token_emb.weight`"]),
        (&["--freeze=("], 2, &["--freeze", "unclosed group"]),
        (&["--freeze="], 2, &["--freeze", "nothing is left to train"]),
        (&["--bias-rate=0.1"], 2, &["--bias-rate", "use_selection_bias"]),
        (&["--aux-weight=-1"], 2, &["aux_loss_weight", "zero or more"]),
    ] {
        let error = failure_of(&mut begin(&trained.run(), &run, flags), code);
        assert!(parts.iter().all(|part| error.contains(part)), "{flags:?}: {error}");
        assert!(!run.exists(), "{flags:?} made a folder");
    }
    let error = failure_of(&mut begin(&trained.path().join("absent"), &run, &[]), 1);
    assert!(error.contains("absent"), "{error}");
}

/// Bound: 1e-4, that of the golden cases.
#[test]
fn the_runtime_chooses_by_the_selection_bias_as_the_trainer_does() {
    let flags = ["--set=use_selection_bias=true", "--set=stride=1", "--bias-rate=0.2"];
    let trained = Trained::new(20, &flags, Some("f32"));
    let (config, mut params) = model(&trained.run());
    let biases = (0..params.len()).filter(|&i| tensors(&config)[i].part == Part::SelectionBias).collect::<Vec<_>>();
    assert_eq!(biases.len(), 2);
    assert!(
        biases.iter().all(|&i| params[i].iter().any(|b| b.abs() > 0.3)),
        "{:?}",
        biases.iter().map(|&i| &params[i])
    );
    let ids = (0..30).map(|i| i * 7 % 40).collect::<Vec<u32>>();
    let positions = (0..30).collect::<Vec<_>>();
    let sequences = Sequences { ids: &ids, n_col: 30, mask: None, first: None };
    let mut trainer = Model::new(&config, Compute::default());
    let expected = trainer.logits(&params, sequences, &positions, Mode::INFERENCE);
    let runtime = param_runtime::Model::open(trained.gguf()).unwrap();
    for n_batch in [1, 7, 512] {
        let options = SessionOptions { n_batch: Some(n_batch), ..SessionOptions::default() };
        let mut session = Session::new(&runtime, &options).unwrap();
        session.push(&ids).unwrap();
        assert_close("logits", session.forward(Rows::All).unwrap(), &expected, 1e-4);
    }
    biases.iter().for_each(|&i| params[i].fill(0.0));
    let unbiased = trainer.logits(&params, sequences, &positions, Mode::INFERENCE);
    let changed = unbiased.iter().zip(&expected).filter(|(a, b)| (*a - *b).abs() > 1e-2).count();
    assert!(changed > 100, "the bias changes only {changed} logits");
}

#[test]
fn selection_bias_balances_without_a_loss() {
    let folder = tempfile::tempdir().unwrap();
    let data = write(folder.path(), "text.txt", prose(20_000, 1));
    let most = |name: &str, flags: &[&str]| {
        let run = folder.path().join(name);
        output_of(train(&data, &run, &["--steps=120", "--lr=1e-2", "--aux-weight=0", "--z-weight=0"]).args(flags));
        let loads = records(&run, "expert_load");
        // Largest share of an expert, of which four share the choices, over the last steps.
        let shares = (0..4).map(|expert| {
            let of_step = |record: &serde_json::Value| record["expert_load"][0][expert].as_f64().unwrap();
            loads[80..].iter().map(of_step).sum::<f64>() / 40.0
        });
        shares.fold(0.0, f64::max)
    };
    let free = most("free", &[]);
    let balanced = most("balanced", &["--set=use_selection_bias=true", "--bias-rate=0.02"]);
    assert!(balanced < 0.28 && balanced < free, "largest share {balanced}, {free} without");
}

#[test]
fn a_weight_of_a_loss_may_change_when_resuming() {
    let trained = Trained::new(2, &[], None);
    output_of(&mut resume(&trained.run(), &["--steps=3", "--aux-weight=0.5"]));
    assert_eq!(model(&trained.run()).0.aux_loss_weight, 0.5);
    let record = records(&trained.run(), "loss").pop().unwrap();
    let number = |key: &str| record[key].as_f64().unwrap();
    assert!((number("loss") - number("ce") - 0.5 * number("aux") - 0.001 * number("z")).abs() < 1e-6, "{record}");
}

/// A bias that no other expert can overcome starves the rest.
#[test]
fn an_expert_that_dies_is_warned_of_and_recorded() {
    let folder = tempfile::tempdir().unwrap();
    let data = write(folder.path(), "text.txt", prose(20_000, 1));
    let first = folder.path().join("first");
    let mut command = param_train();
    command.arg("--init-only").args(tiny()).args(["--set=use_selection_bias=true", "--set=vocab_size=300"]);
    output_of(command.arg("--out").arg(&first));
    let (config, mut params) = model(&first);
    let at = tensors(&config).iter().position(|t| t.part == Part::SelectionBias).unwrap();
    params[at] = vec![0.0, 0.0, -1000.0, 0.0];
    let tokenizer = param_model::Tokenizer::characters(&prose(20_000, 1).chars().collect()).unwrap();
    param_train::checkpoint::write_model(&first, &config, Some(&tokenizer), &params).unwrap();
    let run = folder.path().join("run");
    let mut command = param_train();
    command.arg("--init-from").arg(&first).arg("--data").arg(&data).arg("--out").arg(&run);
    let (_, log) = outputs_of(command.args(["--batch-size=4", "--threads=2", "--steps=70", "--sample-every=0"]));
    let warnings = log.lines().filter(|line| line.starts_with("warning: ")).collect::<Vec<_>>();
    assert_eq!(warnings.len(), 1, "{log}");
    for part in ["block 0: expert 2 got 0.00% of the choices over the last 50 steps (25.0%", "--aux-weight"] {
        assert!(warnings[0].contains(part), "{warnings:?}");
    }
    let recorded = records(&run, "starved_expert");
    assert_eq!((recorded.len(), &recorded[0]["step"], &recorded[0]["block"]), (1, &50.into(), &0.into()));
}
