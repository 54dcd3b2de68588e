//! A run whose evaluation is interrupted: the evaluation is made up for when the run goes on, and nothing differs in the end.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use param_model::{Config, Tokenizer};
use param_train::Device;
use param_train::checkpoint::RunFolder;
use param_train::data::{find, prepare, split};
use param_train::init::initialise;
use param_train::metrics::{EvalRecord, METRICS_FILE};
use param_train::recipe::Recipe;
use param_train::schedule::Schedule;
use param_train::settings::Settings;
use param_train::spikes::{Action, Rule};
use param_train::trainer::{Corpus, Event, Outcome, Trainer};

const DEVICE: Device = Device::Cpu { n_thread: 2 };

fn corpus(folder: &Path) -> Corpus {
    let file = folder.join("text.txt");
    if !file.exists() {
        let text = (0..400).map(|i| format!("{i} bottles of {} on the wall.\n", i * i % 97)).collect::<String>();
        std::fs::write(&file, text).unwrap();
    }
    let tokenizer = Tokenizer::characters(&std::fs::read_to_string(&file).unwrap().chars().collect()).unwrap();
    let files = find(&[file], &[]).unwrap();
    let (shard, _) =
        prepare(&folder.join("tokens"), &files, "text", &tokenizer, &mut |_| (), &AtomicBool::new(false)).unwrap();
    let (train, eval) = split(Arc::new(shard), 0.1, 1).unwrap();
    Corpus { tokenizer, train: train.into(), eval: eval.into() }
}

fn settings() -> Settings {
    let base = Recipe::Recommended.settings(&Config::preset("param-tiny").unwrap(), 6);
    let schedule = Schedule { peak: 1e-2, warmup: 2, ..base.schedule };
    let spikes = Some(Rule { z: 6.0, action: Action::Clip });
    // Steps of one, one and two batches.
    let (accumulation, accumulation_warmup) = (2, 2);
    let (eval_every, save_every, keep, sample_every, sample_tokens) = (3, 0, 1, 3, 4);
    Settings {
        seed: 1,
        batch_size: 4,
        accumulation,
        accumulation_warmup,
        context: 16,
        schedule,
        spikes,
        bias_rate: 0.01,
        freeze: vec!["norm1".to_owned()],
        eval_every,
        save_every,
        keep,
        sample_every,
        sample_tokens,
        ..base
    }
}

fn start(folder: &Path, run: &str) -> Trainer {
    let corpus = corpus(folder);
    let config = Config {
        n_vocab: corpus.tokenizer.n_vocab(),
        n_ctx: 16,
        n_embd: 12,
        n_head: 3,
        n_layer: 2,
        dropout: 0.1,
        use_selection_bias: true,
        ..Config::preset("param-tiny").unwrap()
    };
    Trainer::new(RunFolder::new(&folder.join(run)), &config, initialise(&config, 1), settings(), corpus, &DEVICE)
        .unwrap()
}

/// Step and loss of every evaluation in a run's metrics.
fn evaluations(folder: &Path, run: &str) -> Vec<(u64, f64)> {
    let metrics = std::fs::read_to_string(folder.join(run).join(METRICS_FILE)).unwrap();
    let records = metrics.lines().filter_map(|line| serde_json::from_str::<EvalRecord>(line).ok());
    records.map(|r| (r.step, r.eval_loss)).collect()
}

#[test]
fn an_interrupted_evaluation_is_made_up_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let never = AtomicBool::new(false);
    assert_eq!(start(path, "whole").run(&never, &mut |_| ()).unwrap(), Outcome::Finished);
    let whole = evaluations(path, "whole");
    assert_eq!(whole.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [3, 6]);

    for interrupted_at in [3, 6] {
        let run = format!("interrupted at {interrupted_at}");
        let stop = AtomicBool::new(false);
        let outcome = start(path, &run).run(&stop, &mut |event| {
            if let Event::Step(record) = event {
                stop.store(record.step == interrupted_at, Ordering::Relaxed);
            }
        });
        assert_eq!(outcome.unwrap(), Outcome::Stopped);
        // Interrupted again before anything happens: still to be made up for.
        for stop in [AtomicBool::new(true), AtomicBool::new(false)] {
            let run_folder = RunFolder::new(&path.join(&run));
            let restored = run_folder.restore().unwrap();
            assert!(restored.state.is_step_open && restored.state.step == interrupted_at);
            let settings = restored.state.settings.clone();
            let mut trainer = Trainer::resume(run_folder, restored, settings, corpus(path), &DEVICE).unwrap();
            let outcome = trainer.run(&stop, &mut |_| ()).unwrap();
            assert_eq!(outcome == Outcome::Stopped, stop.into_inner());
        }
        assert_eq!(evaluations(path, &run), whole);
        let ends = ["whole", &run].map(|run| RunFolder::new(&path.join(run)).restore().unwrap());
        assert!(ends[0].params == ends[1].params && ends[0].state.best == ends[1].state.best);
        let left = std::fs::read_dir(path.join(&run).join("checkpoints")).unwrap().count();
        assert!(left <= 2, "{left} checkpoints left of the newest and the best");
    }
}
