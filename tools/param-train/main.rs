//! param-train: text becomes a trained PARAM checkpoint.
#![forbid(unsafe_code)]

mod args;
mod benchmark;
mod corpus;
mod device;
mod dry_run;
mod profile;
mod report;
mod tokenize;

use std::io::{Write, stderr, stdout};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};
use clap::Parser;
use indicatif::{HumanBytes, HumanCount};
use param::cli::{self, Usage};
use param_model::atomic::write_folder;
use param_model::checkpoint::{BEST_LINK, LAST_LINK, TOKENIZER_FILE, WEIGHTS_FILE};
use param_model::{Checkpoint, Config, Tokenizer};
use param_train::Error;
use param_train::checkpoint::{RunFolder, read_model, write_model};
use param_train::cpu::Section;
use param_train::data::{Batches, DataError, Vocabulary};
use param_train::inherit::{Plan, Source};
use param_train::init::initialise;
use param_train::memory;
use param_train::optimizer::Group;
use param_train::report::summary;
use param_train::settings::Settings;
use param_train::trainer::{Corpus, Outcome, Trainer, evaluate_mixture};

use args::{Flags, Training};
use corpus::{DataChoice, TOKENS_FOLDER};
use report::Report;

fn main() -> ExitCode {
    let flags = Flags::parse();
    cli::exit_code(run(&flags).or_else(on_the_command_line))
}

/// What some errors of the library mean here: an interruption, or a flag to be put right.
fn on_the_command_line(error: anyhow::Error) -> Result<ExitCode> {
    match (error.downcast_ref(), error.downcast_ref()) {
        (Some(DataError::Cancelled), _) => {
            eprintln!("interrupted while reading the data");
            Ok(ExitCode::from(cli::INTERRUPTED))
        }
        (Some(DataError::Fraction { .. }), _) => bail!(Usage(format!("--holdout: {error}"))),
        (_, Some(Error::Setting { .. })) => bail!(Usage(error.to_string())),
        _ => Err(error),
    }
}

fn run(flags: &Flags) -> Result<ExitCode> {
    rayon::ThreadPoolBuilder::new().num_threads(flags.n_thread()).build_global().context("starting threads")?;
    let stop = cli::interrupt_flag()?;
    let out = flags.out.as_deref();
    if let Some(steps) = flags.task.benchmark {
        return benchmark::run(flags, steps);
    }
    if flags.task.dry_run {
        return dry_run::run(flags);
    }
    if flags.task.tokenize_only {
        return tokenize::run(flags, &stop);
    }
    match (flags.task.checkpoint.as_deref(), out) {
        (Some(checkpoint), _) => evaluate(flags, checkpoint, &stop),
        (None, Some(out)) if flags.task.init_only => initialise_only(flags, out),
        (None, Some(out)) => train(flags, out, &stop),
        (None, None) => bail!(Usage("--out DIR is needed".into())),
    }
}

fn initialise_only(flags: &Flags, out: &Path) -> Result<ExitCode> {
    let mut config = flags.model.config()?;
    let beginning = beginning(flags, &config)?;
    let tokenizer = match &beginning {
        Some((source, _)) => Some(source.tokenizer()?),
        None => flags.data.tokenizer.as_deref().map(Tokenizer::from_file).transpose()?,
    };
    if let (Some(tokenizer), None) = (&tokenizer, &beginning) {
        config.n_vocab = tokenizer.n_vocab();
    }
    let seed = flags.settings(&config, 1)?.seed;
    let named = || out.display().to_string();
    if out.exists() {
        // Only an empty folder can be removed: nobody's weights are replaced by random ones.
        std::fs::remove_dir(out).with_context(|| format!("{}: expected a new or an empty folder", named()))?;
    }
    let params = first_params(flags, beginning, &config, seed)?;
    write_folder(out, |partial| anyhow::Ok(write_model(partial, &config, tokenizer.as_ref(), &params)?))
        .with_context(named)?;
    writeln!(stdout(), "{}: {}", out.join(WEIGHTS_FILE).display(), summary(&config))?;
    Ok(ExitCode::SUCCESS)
}

fn evaluate(flags: &Flags, checkpoint: &Path, stop: &AtomicBool) -> Result<ExitCode> {
    let (config, params) = read_model(checkpoint)?;
    let tokenizer = match &flags.data.tokenizer {
        Some(path) => Tokenizer::from_file(path)?,
        None => Tokenizer::from_file(&Checkpoint::open(checkpoint)?.folder().join(TOKENIZER_FILE))?,
    };
    tokenizer.check_fits(config.n_vocab)?;
    let context = flags.model.context.unwrap_or(config.n_ctx);
    let settings = Settings { context, ..flags.training.settings(&config, 1) };
    settings.check(&config)?;
    let choice = DataChoice::from_flags(&flags.data, 0)?;
    let cache = tempfile::tempdir().context("a temporary folder for tokens")?;
    let mixture = choice.everything(cache.path(), &tokenizer, stop)?;
    let rows = (context, settings.batch_size);
    let device = device::choose(flags, &config, &settings)?;
    let mut model = device.evaluator(&config, &settings, params)?;
    let Some(record) = evaluate_mixture(&mut *model, &tokenizer, &mixture, rows, settings.dropping, stop)? else {
        return Ok(ExitCode::from(cli::INTERRUPTED));
    };
    if !record.eval_loss.is_finite() {
        bail!("{}: the loss is {}: the weights are damaged", checkpoint.display(), record.eval_loss);
    }
    writeln!(
        stdout(),
        "loss {:.6} nats/token, {:.6} bits/byte over {} tokens",
        record.eval_loss,
        record.bits_per_byte,
        HumanCount(record.n_target)
    )?;
    for dataset in &record.datasets {
        let (name, n_target) = (&dataset.name, HumanCount(dataset.n_target));
        let (loss, bits) = (dataset.eval_loss, dataset.bits_per_byte);
        writeln!(stdout(), "  {name}: {loss:.6} nats/token, {bits:.6} bits/byte over {n_target} tokens")?;
    }
    Ok(ExitCode::SUCCESS)
}

fn train(flags: &Flags, out: &Path, stop: &AtomicBool) -> Result<ExitCode> {
    let folder = RunFolder::new(out);
    let mut trainer = if flags.task.resume { resume(flags, folder, stop)? } else { start(flags, folder, stop)? };
    if flags.no_report {
        trainer = trainer.without_report();
    }
    if flags.profile {
        trainer.start_profile();
    }
    let first_step = trainer.state().step;
    let mut report = Report::new(trainer.state(), flags.log_every);
    let outcome = trainer.run(stop, &mut |event| report.show(event));
    report.finish();
    let outcome = outcome?;
    if flags.profile {
        let spent = Section::ALL.map(|section| trainer.profile().spent(section));
        profile::write(&mut stderr(), &spent, trainer.peak(), trainer.state().step - first_step)?;
    }

    let state = trainer.state();
    let seconds = state.seconds.max(1e-9);
    let rate = HumanCount((state.n_target as f64 / seconds) as u64);
    let mut out_stream = stdout();
    let n_target = HumanCount(state.n_target);
    let mut closing = format!("{} steps, {n_target} tokens, {seconds:.1} s of training, {rate} tok/s", state.step);
    if let Some(mfu) = report.mfu() {
        closing += &format!(", {:.0}% MFU", 100.0 * mfu);
    }
    if let Some(bytes) = memory::peak() {
        closing += &format!(", {}", HumanBytes(bytes));
    }
    writeln!(out_stream, "{closing}")?;
    if let Some((loss, step)) = state.best {
        writeln!(out_stream, "best validation loss {loss:.4} at step {step}: {}", out.join(BEST_LINK).display())?;
    }
    if outcome == Outcome::Stopped {
        writeln!(out_stream, "stopped; go on with: param-train --out {} --resume", out.display())?;
        return Ok(ExitCode::from(cli::INTERRUPTED));
    }
    let best = if state.best.is_some() { BEST_LINK } else { LAST_LINK };
    writeln!(out_stream, "next: param-convert {} param.gguf", out.join(best).join(WEIGHTS_FILE).display())?;
    Ok(ExitCode::SUCCESS)
}

fn start(flags: &Flags, folder: RunFolder, stop: &AtomicBool) -> Result<Trainer> {
    folder.check_unused()?;
    let mut config = flags.model.config()?;
    // How many steps epochs are is known once the data is read; nothing else that can be wrong in the settings depends on it.
    let early = flags.settings(&config, flags.training.steps.unwrap_or(1))?;
    early.check(&config)?;
    let device = device::choose(flags, &config, &early)?;
    let beginning = beginning(flags, &config)?;
    let choice = DataChoice::from_flags(&flags.data, early.seed)?;
    let tokenizer = match &beginning {
        Some((source, _)) => source.tokenizer()?,
        None => choice.tokenizer(&flags.data, || Ok(config.n_vocab))?,
    };
    if beginning.is_none() {
        config.n_vocab = tokenizer.n_vocab();
    }
    // Before tokenizing, so that a folder that cannot be written costs no time.
    folder.create()?;
    let corpus = choice.corpus(&tokens_folder(&folder), tokenizer, stop)?;
    // The vocabulary is known now, on which memory depends.
    let batch_size = device::batch_size(flags, &device, &config, &early)?;
    let steps = steps(&flags.training, &corpus, &Settings { batch_size, ..early })?.unwrap_or(Training::STEPS);
    let settings = Settings { batch_size, ..flags.settings(&config, steps)? };
    choice.save(folder.path())?;
    eprintln!("{}, on {device}", summary(&config));
    report_frozen(&config, &settings)?;
    let params = first_params(flags, beginning, &config, settings.seed)?;
    Ok(Trainer::new(folder, &config, params, settings, corpus, &device)?)
}

/// The checkpoint that a new run starts from, if the flags name one, and what becomes of its tensors in `config`.
fn beginning(flags: &Flags, config: &Config) -> Result<Option<(Source, Plan)>> {
    let Some(path) = &flags.model.init_from else { return Ok(None) };
    if let Some(noise) = flags.model.upcycle_noise.filter(|noise| !(*noise >= 0.0 && noise.is_finite())) {
        bail!(Usage(format!("--upcycle-noise {noise}: expected zero or more")));
    }
    let source = Source::open(path)?;
    let plan = source.plan(config, flags.model.upcycle)?;
    Ok(Some((source, plan)))
}

/// Parameters of a new run: a checkpoint's, or random ones.
fn first_params(flags: &Flags, beginning: Option<(Source, Plan)>, config: &Config, seed: u64) -> Result<Vec<Vec<f32>>> {
    let (Some((source, plan)), Some(path)) = (beginning, &flags.model.init_from) else {
        return Ok(initialise(config, seed));
    };
    eprintln!("starting from {}: {plan}", path.display());
    Ok(source.params(&plan, seed, flags.model.upcycle_noise.unwrap_or(0.0))?)
}

/// Says what training will leave alone.
fn report_frozen(config: &Config, settings: &Settings) -> Result<()> {
    let table = param_model::tensors(config);
    let groups = Group::all(&table, settings)?;
    let frozen = table.iter().zip(groups).filter(|(_, group)| group.is_frozen).map(|(spec, _)| spec.n_elements());
    let frozen = frozen.collect::<Vec<_>>();
    if !frozen.is_empty() {
        eprintln!("frozen: {} tensors, {} parameters", frozen.len(), HumanCount(frozen.iter().sum::<usize>() as u64));
    }
    Ok(())
}

fn resume(flags: &Flags, folder: RunFolder, stop: &AtomicBool) -> Result<Trainer> {
    if flags.model.is_given() || flags.data.tokenizer.is_some() || flags.data.chars {
        bail!(Usage(
            "--resume continues the run's own model and tokenizer: leave out the flags that describe them".into()
        ));
    }
    if flags.training.recipe.is_some() {
        bail!(Usage(
            "--recipe begins a run: --resume continues with the run's own settings, and flags change single ones"
                .into()
        ));
    }
    let mut restored = folder.restore()?;
    restored.config = flags.model.weigh_losses(restored.config)?;
    let last = folder.last().context("restored from it")?;
    let tokenizer = Tokenizer::from_file(&last.join(TOKENIZER_FILE))?;
    let settings = flags.training.apply(restored.state.settings.clone());
    flags.training.check(&restored.config, &settings)?;
    settings.check(&restored.config)?;
    let choice = if flags.data.data.is_empty() {
        DataChoice::load(folder.path())?
    } else {
        DataChoice::from_flags(&flags.data, settings.seed)?
    };
    let corpus = choice.corpus(&tokens_folder(&folder), tokenizer, stop)?;
    let total = steps(&flags.training, &corpus, &settings)?.unwrap_or(settings.schedule.total);
    let schedule = param_train::schedule::Schedule { total, ..settings.schedule };
    eprintln!("{}, resumed at step {} of {total}", summary(&restored.config), restored.state.step);
    report_frozen(&restored.config, &settings)?;
    let device = device::choose(flags, &restored.config, &settings)?;
    eprintln!("on {device}");
    Ok(Trainer::resume(folder, restored, Settings { schedule, ..settings }, corpus, &device)?)
}

/// Steps that the flags ask for, if they do.
fn steps(flags: &Training, corpus: &Corpus, settings: &Settings) -> Result<Option<u64>> {
    let vocabulary = Vocabulary::of(&corpus.tokenizer);
    let Settings { layout, context, batch_size, seed, .. } = *settings;
    let batches = Batches::new(corpus.train.clone(), &vocabulary, layout, context, batch_size.max(1), seed)?;
    flags.steps(|epochs| settings.steps_of(batches.batches_in(epochs)))
}

fn tokens_folder(folder: &RunFolder) -> std::path::PathBuf {
    folder.path().join(TOKENS_FOLDER)
}
