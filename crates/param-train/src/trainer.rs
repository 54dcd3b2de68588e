//! The training loop: steps, evaluations, samples and checkpoints, reported as events and stopped by a flag.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use param_model::{Config, Tokenizer};

use crate::checkpoint::{Restored, RunFolder, State};
use crate::cpu::{GradientScale, Losses, Mode, Model, NoiseSource, Routing, Section, Sequences};
use crate::data::{Batch, Batches, DataError, Evaluation, Layout, Part, Vocabulary};
use crate::error::Error;
use crate::init::initialise;
use crate::metrics::{EvalRecord, Metrics, SampleRecord, StepRecord};
use crate::optimizer::{Moments, clip_factor, global_norm};
use crate::random::{Key, stream};
use crate::sample::sample;
use crate::settings::{Dropping, Settings};

/// Streams of the seed that draw samples; forward passes use those below, initialisation those above.
const FIRST_SAMPLE_STREAM: u64 = 1 << 62;

/// What a run trains on.
pub struct Corpus {
    /// Its tokens' meaning.
    pub tokenizer: Tokenizer,
    /// Trained on.
    pub train: Part,
    /// Held out.
    pub eval: Part,
}

impl Corpus {
    /// Tells two corpora apart: the tokens by their SHA-256, what of them is held out by its size.
    fn digest(&self) -> String {
        let part = |part: &Part| format!("{}:{}", part.shard().index().digest, part.n_token());
        format!("{}/{}", part(&self.train), part(&self.eval))
    }
}

/// What happens in a run.
pub enum Event<'a> {
    /// A step was done.
    Step(&'a StepRecord),
    /// The held-out part was evaluated.
    Evaluated(&'a EvalRecord),
    /// Text was generated.
    Sampled(&'a SampleRecord),
    /// A checkpoint was saved in this folder.
    Saved(&'a Path),
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps were done.
    Finished,
    /// The flag was set; a checkpoint was saved.
    Stopped,
}

/// A run in progress.
pub struct Trainer {
    model: Model,
    params: Vec<Vec<f32>>,
    grads: Vec<Vec<f32>>,
    moments: Moments,
    state: State,
    corpus: Corpus,
    vocabulary: Vocabulary,
    batches: Batches,
    folder: RunFolder,
    metrics: Metrics,
    /// Step of the newest checkpoint, and whether it was open.
    saved: Option<(u64, bool)>,
}

impl Trainer {
    /// A new run in a folder without one, from freshly initialised parameters, on `n_thread` threads.
    pub fn new(
        folder: RunFolder,
        config: &Config,
        settings: Settings,
        corpus: Corpus,
        n_thread: usize,
    ) -> Result<Self, Error> {
        folder.check_unused()?;
        folder.create()?;
        let model = Model::new(config, settings.compute(n_thread));
        let params = initialise(config, settings.seed);
        let moments = Moments { first: model.zeros(), second: model.zeros() };
        let state = State::new(settings, corpus.digest());
        Self::start(folder, model, params, moments, state, corpus, None)
    }

    /// Continues the run in `folder` from its newest checkpoint, with `settings` from here on.
    pub fn resume(
        folder: RunFolder,
        restored: Restored,
        settings: Settings,
        corpus: Corpus,
        n_thread: usize,
    ) -> Result<Self, Error> {
        let Restored { config, params, moments, mut state } = restored;
        if state.data_digest != corpus.digest() {
            let problem =
                "it was trained on other data, or another part was held out: give the same flags, or start a new run";
            return Err(Error::State { path: folder.path().to_owned(), problem: problem.to_owned() });
        }
        state.settings = settings;
        let saved = Some((state.step, state.is_step_open));
        let model = Model::new(&config, state.settings.compute(n_thread));
        Self::start(folder, model, params, moments, state, corpus, saved)
    }

    fn start(
        folder: RunFolder,
        model: Model,
        params: Vec<Vec<f32>>,
        moments: Moments,
        state: State,
        corpus: Corpus,
        saved: Option<(u64, bool)>,
    ) -> Result<Self, Error> {
        let settings = &state.settings;
        settings.check(model.config())?;
        corpus.tokenizer.check_fits(model.config().n_vocab)?;
        let vocabulary = Vocabulary::of(&corpus.tokenizer);
        let batches = Batches::new(
            corpus.train.clone(),
            &vocabulary,
            settings.layout,
            settings.context,
            settings.batch_size,
            settings.seed,
        )?;
        // A held-out part that is too short should be known before hours of training.
        Evaluation::new(corpus.eval.clone(), &vocabulary, settings.layout, settings.context, settings.batch_size)?;
        let metrics = Metrics::open(folder.path(), state.step)?;
        let grads = model.zeros();
        Ok(Self { model, params, grads, moments, state, corpus, vocabulary, batches, folder, metrics, saved })
    }

    /// Where the run is.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The model's hyperparameters.
    pub fn config(&self) -> &Config {
        self.model.config()
    }

    /// Trains until all steps are done or `stop` is set, saving either way.
    pub fn run(&mut self, stop: &AtomicBool, observe: &mut dyn FnMut(Event)) -> Result<Outcome, Error> {
        loop {
            if self.state.is_step_open && !self.close_step(stop, observe)? {
                self.save(observe)?;
                return Ok(Outcome::Stopped);
            }
            if self.state.step >= self.state.settings.schedule.total {
                return Ok(Outcome::Finished);
            }
            if stop.load(Ordering::Relaxed) {
                self.save(observe)?;
                return Ok(Outcome::Stopped);
            }
            let record = self.step()?;
            self.metrics.write(&record)?;
            observe(Event::Step(&record));
            self.state.is_step_open = true;
        }
    }

    /// What is due after a step: evaluation, sample, checkpoint. False if `stop` cut the evaluation short: the step then stays
    /// open, and a resumed run begins with it.
    fn close_step(&mut self, stop: &AtomicBool, observe: &mut dyn FnMut(Event)) -> Result<bool, Error> {
        let Settings { schedule, eval_every, save_every, sample_every, .. } = self.state.settings;
        let step = self.state.step;
        let due = |every: u64| step == schedule.total || (every > 0 && step.is_multiple_of(every));
        let mut improved = false;
        if due(eval_every) {
            let Some(record) = self.evaluate(stop)? else { return Ok(false) };
            improved = self.state.best.is_none_or(|(loss, _)| record.eval_loss < loss);
            if improved {
                self.state.best = Some((record.eval_loss, step));
            }
            self.metrics.write(&record)?;
            observe(Event::Evaluated(&record));
        }
        if sample_every > 0 && due(sample_every) {
            self.sample(observe)?;
        }
        self.state.is_step_open = false;
        if due(save_every) || improved {
            self.save(observe)?;
        }
        Ok(true)
    }

    /// One optimizer step.
    fn step(&mut self) -> Result<StepRecord, Error> {
        let start = Instant::now();
        let Self { model, params, grads, moments, state, batches, .. } = self;
        let settings = &state.settings;
        let n_batch = settings.accumulation as u64;
        let first = state.step * n_batch;
        model.profile().enter(Section::Data);
        let step_batches = (first..first + n_batch).map(|i| batches.batch_at(i)).collect::<Result<Vec<_>, _>>()?;
        let n_target = step_batches.iter().map(Batch::n_target).sum::<usize>();
        let scale = GradientScale { n_target, n_batch: step_batches.len() };
        let mut losses = Vec::with_capacity(step_batches.len());
        for (pass, batch) in (first..).zip(&step_batches) {
            let key = Key { seed: settings.seed, pass };
            let noisy = model.config().use_noisy_top_k;
            let mode = Mode {
                dropout: Some(key),
                capacity: settings.dropping.capacity(model.config(), true),
                noise: if noisy { NoiseSource::Drawn(key) } else { NoiseSource::Off },
            };
            let (sequences, targets) = (sequences(batch), &batch.target);
            losses.push(model.loss_and_gradients(params, grads, sequences, targets, mode, scale));
        }
        model.profile().enter(Section::Optimizer);
        let grad_norm = global_norm(model.table_and_team().1, grads);
        let total = total_loss(&losses, model.config());
        if !(total.loss.is_finite() && grad_norm.is_finite()) {
            return Err(Error::NotFinite { step: state.step + 1, loss: total.loss });
        }
        let lr = settings.schedule.at(state.step);
        let clip = clip_factor(grad_norm, settings.clip);
        let (table, team) = model.table_and_team();
        settings.adamw.step(team, table, params, grads, moments, lr, state.step + 1, clip);
        model.profile().enter(Section::Other);
        state.step += 1;
        state.n_target += n_target as u64;
        let seconds = start.elapsed().as_secs_f64();
        state.seconds += seconds;
        Ok(StepRecord {
            step: state.step,
            grad_norm,
            lr,
            tokens_per_s: n_target as f64 / seconds,
            seconds: state.seconds,
            n_target: state.n_target,
            epoch: batches.epochs_before(first + n_batch),
            ..total
        })
    }

    /// Evaluates the held-out part; `None` if `stop` was set.
    fn evaluate(&mut self, stop: &AtomicBool) -> Result<Option<EvalRecord>, Error> {
        let settings = &self.state.settings;
        let batches = evaluation(&self.corpus.eval, &self.vocabulary, settings)?;
        let limit = if settings.eval_batches == 0 { usize::MAX } else { settings.eval_batches };
        let (dropping, step) = (settings.dropping, self.state.step);
        evaluate(&mut self.model, &self.params, batches.take(limit), dropping, step, stop)
    }

    fn sample(&mut self, observe: &mut dyn FnMut(Event)) -> Result<(), Error> {
        let Self { state, corpus, .. } = self;
        let settings = &state.settings;
        let mut ids = corpus.tokenizer.encode_prompt(&settings.sample_prompt)?;
        if ids.is_empty() {
            ids.push(0); // a tokenizer without any mark to start from: some token has to
        }
        let mut rng = stream(settings.seed, FIRST_SAMPLE_STREAM + state.step);
        let ids = sample(&mut self.model, &self.params, ids, settings.sample_tokens, &mut rng);
        let record = SampleRecord { step: state.step, sample: corpus.tokenizer.decode(&ids) };
        self.metrics.write(&record)?;
        observe(Event::Sampled(&record));
        Ok(())
    }

    /// Saves a checkpoint unless this step's is there already.
    fn save(&mut self, observe: &mut dyn FnMut(Event)) -> Result<(), Error> {
        let now = Some((self.state.step, self.state.is_step_open));
        if self.saved == now {
            return Ok(());
        }
        let Self { model, params, moments, state, corpus, folder, .. } = self;
        let path: PathBuf = folder.save(model.config(), &corpus.tokenizer, model.table(), params, moments, state)?;
        self.saved = now;
        observe(Event::Saved(&path));
        Ok(())
    }
}

/// The batches of a held-out part in a run's own layout.
fn evaluation(part: &Part, vocabulary: &Vocabulary, settings: &Settings) -> Result<Evaluation, Error> {
    let Settings { layout, context, batch_size, .. } = *settings;
    Ok(Evaluation::new(part.clone(), vocabulary, layout, context, batch_size)?)
}

/// Loss of a model over all of `part`, in packed rows of `context` tokens; `None` if `stop` was set.
pub fn evaluate_part(
    model: &mut Model,
    params: &[Vec<f32>],
    tokenizer: &Tokenizer,
    part: Part,
    (context, batch_size): (usize, usize),
    dropping: Dropping,
    stop: &AtomicBool,
) -> Result<Option<EvalRecord>, Error> {
    let batches = Evaluation::new(part, &Vocabulary::of(tokenizer), Layout::Packed, context, batch_size)?;
    evaluate(model, params, batches, dropping, 0, stop)
}

fn evaluate(
    model: &mut Model,
    params: &[Vec<f32>],
    batches: impl Iterator<Item = Result<Batch, DataError>>,
    dropping: Dropping,
    step: u64,
    stop: &AtomicBool,
) -> Result<Option<EvalRecord>, Error> {
    let start = Instant::now();
    let mode = Mode { capacity: dropping.capacity(model.config(), false), ..Mode::INFERENCE };
    let (mut ce_sum, mut n_target, mut n_bytes) = (0.0, 0, 0);
    for batch in batches {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let batch = batch?;
        let losses = model.loss(params, sequences(&batch), &batch.target, mode);
        ce_sum += losses.cross_entropy.sum;
        n_target += losses.cross_entropy.n_target as u64;
        n_bytes += batch.n_bytes;
    }
    Ok(Some(EvalRecord {
        step,
        eval_loss: ce_sum / n_target as f64,
        bits_per_byte: ce_sum / (std::f64::consts::LN_2 * n_bytes as f64),
        n_target,
        seconds: start.elapsed().as_secs_f64(),
    }))
}

fn sequences(batch: &Batch) -> Sequences<'_> {
    Sequences { ids: &batch.input, n_col: batch.input.len() / batch.n_row, mask: batch.mask.as_deref() }
}

/// The loss fields of a step's record over its batches: cross-entropy by target, router losses by batch.
fn total_loss(losses: &[Losses], config: &Config) -> StepRecord {
    let mean = |of: fn(&Losses) -> f64| losses.iter().map(of).sum::<f64>() / losses.len() as f64;
    let n_target = losses.iter().map(|l| l.cross_entropy.n_target).sum::<usize>();
    let ce = losses.iter().map(|l| l.cross_entropy.sum).sum::<f64>() / n_target as f64;
    let router_part = losses.iter().map(|l| l.total(config) - l.ce()).sum::<f64>() / losses.len() as f64;
    let routings = || losses.iter().flat_map(|l| &l.routings);
    let load = |block: usize| {
        let of_block = losses.iter().map(|l| &l.routings[block]).collect::<Vec<_>>();
        let choices = of_block.iter().map(|r| r.chosen.len()).sum::<usize>() as f64;
        (0..config.n_expert).map(|e| of_block.iter().map(|r| r.load[e]).sum::<usize>() as f64 / choices).collect()
    };
    StepRecord {
        step: 0,
        loss: ce + router_part,
        ce,
        aux: mean(Losses::aux),
        z: mean(Losses::z),
        grad_norm: 0.0,
        lr: 0.0,
        tokens_per_s: 0.0,
        seconds: 0.0,
        n_target: 0,
        epoch: 0.0,
        n_dropped: routings().map(Routing::n_dropped).sum(),
        expert_load: (0..losses[0].routings.len()).map(load).collect(),
    }
}
