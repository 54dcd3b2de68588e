//! The training loop: steps, evaluations, samples and checkpoints, reported as events and stopped by a flag.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use param_model::{Config, Tokenizer};
use serde::Serialize;

use crate::backend::Evaluate;
use crate::checkpoint::{Restored, RunFolder, State};
use crate::cpu::{Profile, Section, operations_per_token};
use crate::data::{Batches, Dataset, Evaluation, Layout, Mixture, Prefetch, Vocabulary};
use crate::device::Device;
use crate::error::Error;
use crate::learner::Learner;
use crate::load::LoadWatch;
use crate::memory;
use crate::metrics::{DatasetEpoch, DatasetLoss, EvalRecord, Metrics, SampleRecord, StarvedRecord, StepRecord};
use crate::random::stream;
use crate::report::{About, Report, Status};
use crate::sample::sample;
use crate::settings::{Dropping, Settings};

/// Streams of the seed that draw samples; forward passes use those below, initialisation those above.
const FIRST_SAMPLE_STREAM: u64 = 1 << 62;

/// What a run trains on.
pub struct Corpus {
    /// Its tokens' meaning.
    pub tokenizer: Tokenizer,
    /// Trained on.
    pub train: Mixture,
    /// Held out.
    pub eval: Mixture,
}

impl Corpus {
    /// Tells two corpora apart.
    fn digest(&self) -> String {
        format!("{}/{}", self.train.digest(), self.eval.digest())
    }
}

/// What happens in a run.
pub enum Event<'a> {
    /// A step was done.
    Step(&'a StepRecord),
    /// An expert has had hardly any token for some time.
    Starved(&'a StarvedRecord),
    /// The held-out part was evaluated.
    Evaluated(&'a EvalRecord),
    /// Text was generated.
    Sampled(&'a SampleRecord),
    /// A checkpoint was saved in this folder.
    Saved(&'a Path),
    /// The report could not be written; the run goes on without it.
    NotReported(&'a Error),
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
    learner: Learner,
    state: State,
    corpus: Corpus,
    vocabulary: Vocabulary,
    batches: Prefetch,
    /// Operations a second that the machine can do at best.
    peak: f64,
    folder: RunFolder,
    metrics: Metrics,
    load: LoadWatch,
    /// Step of the newest checkpoint, and whether it was open.
    saved: Option<(u64, bool)>,
    is_reported: bool,
    /// Open while the run goes on, if it is to be and can be written.
    report: Option<Report>,
}

impl Trainer {
    /// A new run in a folder without one, from these parameters.
    pub fn new(
        folder: RunFolder,
        config: &Config,
        params: Vec<Vec<f32>>,
        settings: Settings,
        corpus: Corpus,
        device: &Device,
    ) -> Result<Self, Error> {
        folder.check_unused()?;
        folder.create()?;
        let learner = Learner::new(config, &settings, device, params)?;
        let state = State::new(settings, corpus.digest());
        Self::start(folder, learner, state, corpus, None)
    }

    /// Continues the run in `folder` from its newest checkpoint, with `settings` from here on.
    pub fn resume(
        folder: RunFolder,
        restored: Restored,
        settings: Settings,
        corpus: Corpus,
        device: &Device,
    ) -> Result<Self, Error> {
        let Restored { config, params, moments, mut state } = restored;
        if state.data_digest != corpus.digest() {
            let problem = "it was trained on other data, in other shares, or another part was held out: give the same flags, or start a new run";
            return Err(Error::State { path: folder.path().to_owned(), problem: problem.to_owned() });
        }
        state.settings = settings;
        let saved = Some((state.step, state.is_step_open));
        let learner = Learner::restored(&config, &state.settings, device, params, moments, state.watch)?;
        Self::start(folder, learner, state, corpus, saved)
    }

    fn start(
        folder: RunFolder,
        mut learner: Learner,
        state: State,
        corpus: Corpus,
        saved: Option<(u64, bool)>,
    ) -> Result<Self, Error> {
        let settings = &state.settings;
        settings.check(learner.model.config())?;
        corpus.tokenizer.check_fits(learner.model.config().n_vocab)?;
        let vocabulary = Vocabulary::of(&corpus.tokenizer);
        let batches = Batches::new(
            corpus.train.clone(),
            &vocabulary,
            settings.layout,
            settings.context,
            settings.batch_size,
            settings.seed,
        )?;
        let batches = batches.isolating_documents(settings.isolate_documents);
        let batches = if settings.shuffle { batches } else { batches.in_order() };
        // A held-out part that is too short should be known before hours of training.
        for dataset in corpus.eval.datasets() {
            evaluation(dataset, &vocabulary, settings.layout, (settings.context, settings.batch_size))?;
        }
        let metrics = Metrics::open(folder.path(), state.step)?;
        let batches = Prefetch::new(batches);
        let peak = learner.model.peak(&state.settings);
        let load = LoadWatch::new(learner.model.config());
        let (is_reported, report) = (true, None);
        Ok(Self {
            learner,
            state,
            corpus,
            vocabulary,
            batches,
            peak,
            folder,
            metrics,
            load,
            saved,
            is_reported,
            report,
        })
    }

    /// The same run without the page and the event files of [`crate::report`].
    pub fn without_report(mut self) -> Self {
        self.is_reported = false;
        self
    }

    /// Where the run is.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The model's hyperparameters.
    pub fn config(&self) -> &Config {
        self.learner.model.config()
    }

    /// Times the parts of steps from now on, where that costs something.
    pub fn start_profile(&mut self) {
        self.learner.model.start_profile();
    }

    /// Time and operations of each part of the steps since the start, with what lies between them.
    pub fn profile(&mut self) -> &Profile {
        self.learner.model.profile()
    }

    /// Operations a second that matrix products could reach on this machine, as measured at the start.
    pub fn peak(&self) -> f64 {
        self.peak
    }

    /// Trains until all steps are done or `stop` is set, saving either way.
    pub fn run(&mut self, stop: &AtomicBool, observe: &mut dyn FnMut(Event)) -> Result<Outcome, Error> {
        if self.is_reported {
            let Self { state, corpus, folder, peak, .. } = self;
            let about = About::new(folder.path(), self.learner.model.config(), &state.settings, corpus, *peak);
            match Report::open(folder.path(), about, state.step) {
                Ok(report) => self.report = Some(report),
                Err(error) => observe(Event::NotReported(&error)),
            }
        }
        let outcome = self.run_steps(stop, observe);
        let status = match &outcome {
            Ok(Outcome::Finished) => Status::Finished,
            Ok(Outcome::Stopped) => Status::Stopped,
            Err(error) => Status::Failed(error.to_string()),
        };
        self.report(observe, |report| report.write(&status));
        outcome
    }

    /// Lets the report do something. No training is lost for want of its picture: a report that fails is given up.
    fn report(&mut self, observe: &mut dyn FnMut(Event), act: impl FnOnce(&mut Report) -> Result<(), Error>) {
        if let Some(Err(error)) = self.report.as_mut().map(act) {
            observe(Event::NotReported(&error));
            self.report = None;
        }
    }

    /// Keeps a record in the metrics and in the report.
    fn record(&mut self, record: &impl Serialize, observe: &mut dyn FnMut(Event)) -> Result<(), Error> {
        let line = self.metrics.write(record)?;
        self.report(observe, |report| report.record(&line));
        Ok(())
    }

    fn run_steps(&mut self, stop: &AtomicBool, observe: &mut dyn FnMut(Event)) -> Result<Outcome, Error> {
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
            self.record(&record, observe)?;
            observe(Event::Step(&record));
            for starved in self.load.see(&record) {
                self.record(&starved, observe)?;
                observe(Event::Starved(&starved));
            }
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
            self.record(&record, observe)?;
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
        let Self { learner, state, batches, corpus, .. } = self;
        let settings = &state.settings;
        let [first, end, next_end] = [0, 1, 2].map(|ahead| settings.first_batch(state.step + ahead));
        learner.model.profile().enter(Section::Data);
        let step_batches = batches.take(first..end, end..next_end)?;
        let record = learner.step(&state.settings, state.step, &step_batches)?;
        state.step += 1;
        state.n_target += record.n_target;
        let seconds = start.elapsed().as_secs_f64();
        state.seconds += seconds;
        let n_token = step_batches.iter().map(|batch| batch.input.len()).sum::<usize>() as f64;
        let epochs = batches.batches().dataset_epochs_before(end);
        let names = corpus.train.datasets().iter().map(|dataset| dataset.name.clone());
        Ok(StepRecord {
            tokens_per_s: record.n_target as f64 / seconds,
            mfu: share(
                n_token / seconds * operations_per_token(learner.model.config(), state.settings.context),
                self.peak,
            ),
            memory: memory::peak(),
            seconds: state.seconds,
            n_target: state.n_target,
            epoch: batches.batches().epochs_before(end),
            datasets: names.zip(epochs).map(|(name, epoch)| DatasetEpoch { name, epoch }).collect(),
            ..record
        })
    }

    /// Evaluates the held-out part; `None` if `stop` was set.
    fn evaluate(&mut self, stop: &AtomicBool) -> Result<Option<EvalRecord>, Error> {
        let &Settings { layout, context, batch_size, eval_batches, dropping, .. } = &self.state.settings;
        let rows = |dataset: &Dataset| evaluation(dataset, &self.vocabulary, layout, (context, batch_size));
        let limit = if eval_batches == 0 { usize::MAX } else { eval_batches };
        evaluate(&mut *self.learner.model, &self.corpus.eval, rows, limit, dropping, self.state.step, stop)
    }

    fn sample(&mut self, observe: &mut dyn FnMut(Event)) -> Result<(), Error> {
        let Self { learner: Learner { model, .. }, state, corpus, .. } = self;
        let settings = &state.settings;
        let mut ids = corpus.tokenizer.encode_prompt(&settings.sample_prompt)?;
        if ids.is_empty() {
            ids.push(0); // a tokenizer without any mark to start from: some token has to
        }
        let mut rng = stream(settings.seed, FIRST_SAMPLE_STREAM + state.step);
        let ids = sample(&mut **model, ids, settings.sample_tokens, &mut rng)?;
        let record = SampleRecord { step: state.step, sample: corpus.tokenizer.decode(&ids) };
        self.record(&record, observe)?;
        observe(Event::Sampled(&record));
        Ok(())
    }

    /// Saves a checkpoint unless this step's is there already.
    fn save(&mut self, observe: &mut dyn FnMut(Event)) -> Result<(), Error> {
        let now = Some((self.state.step, self.state.is_step_open));
        if self.saved == now {
            return Ok(());
        }
        let Self { learner: Learner { model, watch }, state, corpus, folder, .. } = self;
        state.watch = *watch;
        let (params, moments) = (model.params()?, model.moments()?);
        let path: PathBuf = folder.save(model.config(), &corpus.tokenizer, model.table(), &params, &moments, state)?;
        self.saved = now;
        observe(Event::Saved(&path));
        self.report(observe, |report| report.refresh(Duration::ZERO));
        Ok(())
    }
}

/// Part of `peak` that `rate` is; 0 where the peak is not known.
pub(crate) fn share(rate: f64, peak: f64) -> f64 {
    if peak > 0.0 { rate / peak } else { 0.0 }
}

/// The batches of a held-out data set.
fn evaluation(
    dataset: &Dataset,
    vocabulary: &Vocabulary,
    layout: Layout,
    (context, batch_size): (usize, usize),
) -> Result<Evaluation, Error> {
    let rows = Evaluation::new(dataset.part.clone(), vocabulary, layout, context, batch_size);
    Ok(rows.map_err(|e| e.of_dataset(&dataset.name))?)
}

/// Loss of a model over all of `mixture`, in packed rows of `context` tokens; `None` if `stop` was set.
pub fn evaluate_mixture(
    model: &mut dyn Evaluate,
    tokenizer: &Tokenizer,
    mixture: &Mixture,
    (context, batch_size): (usize, usize),
    dropping: Dropping,
    stop: &AtomicBool,
) -> Result<Option<EvalRecord>, Error> {
    let vocabulary = Vocabulary::of(tokenizer);
    let rows = |dataset: &Dataset| evaluation(dataset, &vocabulary, Layout::Packed, (context, batch_size));
    evaluate(model, mixture, rows, usize::MAX, dropping, 0, stop)
}

/// Evaluates `rows` of each data set; of at most `limit` batches each data set has its share, and one at least.
fn evaluate(
    model: &mut (impl Evaluate + ?Sized),
    mixture: &Mixture,
    rows: impl Fn(&Dataset) -> Result<Evaluation, Error>,
    limit: usize,
    dropping: Dropping,
    step: u64,
    stop: &AtomicBool,
) -> Result<Option<EvalRecord>, Error> {
    let start = Instant::now();
    let capacity = dropping.capacity(model.config(), false);
    let mut datasets = Vec::with_capacity(mixture.datasets().len());
    // Bytes of a target, by the shares of the data sets.
    let mut bytes_per_target = 0.0;
    for dataset in mixture.datasets() {
        let (mut ce_sum, mut n_target, mut n_bytes) = (0.0, 0, 0);
        let limit = ((limit as f64 * dataset.weight).round() as usize).max(1);
        for batch in rows(dataset)?.take(limit) {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let batch = batch?;
            let loss = model.loss(&batch, capacity)?;
            ce_sum += loss.sum;
            n_target += loss.n_target as u64;
            n_bytes += batch.n_bytes;
        }
        bytes_per_target += dataset.weight * n_bytes as f64 / n_target as f64;
        datasets.push(DatasetLoss {
            name: dataset.name.clone(),
            eval_loss: ce_sum / n_target as f64,
            bits_per_byte: ce_sum / (std::f64::consts::LN_2 * n_bytes as f64),
            n_target,
        });
    }
    let shares = || mixture.datasets().iter().map(|dataset| dataset.weight);
    let (eval_loss, bits_per_byte) = match &datasets[..] {
        [only] => (only.eval_loss, only.bits_per_byte),
        several => {
            let loss = shares().zip(several).map(|(share, dataset)| share * dataset.eval_loss).sum::<f64>();
            (loss, loss / (std::f64::consts::LN_2 * bytes_per_target))
        }
    };
    let n_target = datasets.iter().map(|dataset| dataset.n_target).sum();
    if datasets.len() == 1 {
        datasets.clear();
    }
    Ok(Some(EvalRecord { step, eval_loss, bits_per_byte, n_target, seconds: start.elapsed().as_secs_f64(), datasets }))
}
