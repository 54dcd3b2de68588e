//! A run's folder: checkpoints that resume bit for bit, links to the newest and the best, and what is kept of them.

use std::fs;
use std::path::{Path, PathBuf};

use param_model::atomic::{replace_link, write_file, write_folder};
use param_model::checkpoint::{
    BEST_LINK, CONFIG_FILE, LAST_LINK, TOKENIZER_FILE, WEIGHTS_FILE, write_tensors, write_weights,
};
use param_model::{Checkpoint, Config, TensorSpec, Tokenizer};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::optimizer::{Group, Moments};
use crate::settings::Settings;
use crate::spikes::Watch;

/// Folder of the checkpoints within a run's folder.
const CHECKPOINTS: &str = "checkpoints";
const STATE_FILE: &str = "state.json";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
const STEP_PREFIX: &str = "step-";
/// Marks the checkpoint of an open step: closing the step writes another, and the name of neither is ever free in between.
const OPEN_SUFFIX: &str = "-open";
/// Raised when an older state could no longer be continued.
const VERSION: u32 = 1;

/// Where a run is, apart from parameters and moments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Version of this layout.
    pub version: u32,
    /// Steps done.
    pub step: u64,
    /// Whether what is due after the last step (evaluation, sample) has still to be done: it was interrupted.
    pub is_step_open: bool,
    /// Targets trained on so far.
    pub n_target: u64,
    /// Seconds of training so far.
    pub seconds: f64,
    /// Lowest validation loss so far, nats per token, and its step.
    pub best: Option<(f64, u64)>,
    /// How it trains.
    pub settings: Settings,
    /// What is known of the losses so far.
    #[serde(default)]
    pub watch: Watch,
    /// Tells the training and validation tokens from those of another corpus or another held-out part.
    pub data_digest: String,
}

impl State {
    /// The state before the first step.
    pub fn new(settings: Settings, data_digest: String) -> Self {
        Self {
            version: VERSION,
            step: 0,
            is_step_open: false,
            n_target: 0,
            seconds: 0.0,
            best: None,
            settings,
            watch: Watch::default(),
            data_digest,
        }
    }
}

/// What a checkpoint restores.
pub struct Restored {
    /// Model.
    pub config: Config,
    /// In the tensor table's order.
    pub params: Vec<Vec<f32>>,
    /// In the tensor table's order.
    pub moments: Moments,
    /// The rest.
    pub state: State,
}

/// A run's folder.
#[derive(Clone, Debug)]
pub struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// The run in `path`, which need not be there yet.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Makes the folder if it is not there.
    pub fn create(&self) -> Result<(), Error> {
        fs::create_dir_all(self.path.join(CHECKPOINTS)).map_err(io(&self.path))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The newest checkpoint's folder, if there is one.
    pub fn last(&self) -> Option<PathBuf> {
        let last = self.path.join(LAST_LINK);
        last.join(STATE_FILE).exists().then_some(last)
    }

    /// An error if the folder holds a run.
    pub fn check_unused(&self) -> Result<(), Error> {
        match self.last() {
            None => Ok(()),
            Some(last) => {
                Err(Error::RunExists { path: self.path.clone(), step: read_state(&last.join(STATE_FILE))?.step })
            }
        }
    }

    /// Saves a checkpoint of `state.step` whole or not at all, makes it the newest (and the best, where the state says so),
    /// and deletes what is no longer kept. Returns its folder.
    pub fn save(
        &self,
        config: &Config,
        tokenizer: &Tokenizer,
        table: &[TensorSpec],
        params: &[Vec<f32>],
        moments: &Moments,
        state: &State,
    ) -> Result<PathBuf, Error> {
        let name = step_name(state);
        let folder = self.path.join(CHECKPOINTS).join(&name);
        // A checkpoint of this step can be there already: of a run that was killed before it set the links. That run may have
        // had other settings, or been another one altogether.
        if folder.exists() {
            fs::remove_dir_all(&folder).map_err(io(&folder))?;
        }
        write_folder(&folder, |partial| {
            write_model(partial, config, Some(tokenizer), params).map_err(Failure::Run)?;
            let kinds = [("first", &moments.first), ("second", &moments.second)];
            let named = kinds.into_iter().flat_map(|(kind, tensors)| {
                // Muon's tensors have no second moments.
                let entries = table.iter().zip(tensors).filter(|(_, m)| !m.is_empty());
                entries.map(move |(spec, m)| (moment_name(kind, spec), spec.shape.clone(), &m[..]))
            });
            write_tensors(&partial.join(OPTIMIZER_FILE), named).map_err(|e| Failure::Run(e.into()))?;
            let json = serde_json::to_vec_pretty(state).expect("a state always serialises");
            fs::write(partial.join(STATE_FILE), json).map_err(Failure::Folder)
        })
        .map_err(|e| match e {
            Failure::Run(e) => e,
            Failure::Folder(error) => Error::Io { path: folder.clone(), error },
        })?;
        let target = Path::new(CHECKPOINTS).join(&name);
        self.link(LAST_LINK, &target)?;
        if state.best.is_some_and(|(_, step)| step == state.step) {
            self.link(BEST_LINK, &target)?;
        }
        self.prune(state)?;
        Ok(folder)
    }

    fn link(&self, name: &str, target: &Path) -> Result<(), Error> {
        let link = self.path.join(name);
        replace_link(&link, target).map_err(io(&link))
    }

    /// Deletes all but the newest `keep` checkpoints and the best.
    fn prune(&self, state: &State) -> Result<(), Error> {
        let folder = self.path.join(CHECKPOINTS);
        let mut steps = Vec::new();
        for entry in fs::read_dir(&folder).map_err(io(&folder))? {
            let name = entry.map_err(io(&folder))?.file_name();
            let Some(number) = name.to_str().and_then(|n| n.strip_prefix(STEP_PREFIX)) else { continue };
            match number.strip_suffix(OPEN_SUFFIX) {
                // Superseded as soon as anything newer is saved.
                Some(_) if name.to_str() != Some(&step_name(state)) => {
                    let old = folder.join(&name);
                    fs::remove_dir_all(&old).map_err(io(&old))?;
                }
                Some(_) => {}
                None => steps.extend(number.parse::<u64>().ok().map(|step| (step, name))),
            }
        }
        steps.sort_by(|a, b| b.cmp(a));
        let best = state.best.map(|(_, step)| step);
        for (_, name) in steps.into_iter().skip(state.settings.keep).filter(|(step, _)| Some(*step) != best) {
            let old = folder.join(name);
            fs::remove_dir_all(&old).map_err(io(&old))?;
        }
        Ok(())
    }

    /// The newest checkpoint, read back and checked.
    pub fn restore(&self) -> Result<Restored, Error> {
        let last = self.last().ok_or_else(|| Error::NothingToResume { path: self.path.clone() })?;
        let state = read_state(&last.join(STATE_FILE))?;
        let (config, params) = read_model(&last)?;
        let optimizer = Checkpoint::open(&last.join(OPTIMIZER_FILE))?;
        let table = param_model::tensors(&config);
        let groups = Group::all(&table, &state.settings)?;
        let read = |kind: &str, spec: &TensorSpec| {
            let name = moment_name(kind, spec);
            match optimizer.tensor(&name)? {
                Some(tensor) if tensor.shape == spec.shape => Ok(tensor.to_f32()),
                _ => {
                    let problem = format!("`{name}` is missing or not {:?}", spec.shape);
                    Err(Error::State { path: optimizer.path().to_owned(), problem })
                }
            }
        };
        let second = |(spec, group): (&TensorSpec, &Group)| match group.is_muons {
            true => Ok(Vec::new()),
            false => read("second", spec),
        };
        let moments = Moments {
            first: table.iter().map(|spec| read("first", spec)).collect::<Result<_, Error>>()?,
            second: table.iter().zip(&groups).map(second).collect::<Result<_, Error>>()?,
        };
        Ok(Restored { config, params, moments, state })
    }
}

/// What stops a checkpoint from being written: something of the run's own, or of the folder's.
enum Failure {
    Run(Error),
    Folder(std::io::Error),
}

impl From<std::io::Error> for Failure {
    fn from(source: std::io::Error) -> Self {
        Failure::Folder(source)
    }
}

/// Writes a model's weights, config and tokenizer into an existing folder.
pub fn write_model(
    folder: &Path,
    config: &Config,
    tokenizer: Option<&Tokenizer>,
    params: &[Vec<f32>],
) -> Result<(), Error> {
    let text = |name: &str, text: &str| {
        let path = folder.join(name);
        write_file(&path, |out| std::io::Write::write_all(out, text.as_bytes())).map_err(io(&path))
    };
    write_weights(&folder.join(WEIGHTS_FILE), config, &params.iter().map(Vec::as_slice).collect::<Vec<_>>())?;
    text(CONFIG_FILE, &config.to_json())?;
    tokenizer.map_or(Ok(()), |t| text(TOKENIZER_FILE, t.json()))
}

/// Reads a checkpoint's model: `path` as for [`Checkpoint::open`], with its `config.json` beside the weights.
pub fn read_model(path: &Path) -> Result<(Config, Vec<Vec<f32>>), Error> {
    let checkpoint = Checkpoint::open(path)?;
    let config = Config::from_file(&checkpoint.folder().join(CONFIG_FILE))?;
    checkpoint.check(&config)?;
    let params = param_model::tensors(&config).into_iter().map(|spec| Ok(checkpoint.get(&spec)?.to_f32()));
    let params = params.collect::<Result<_, param_model::Error>>()?;
    Ok((config, params))
}

fn moment_name(kind: &str, spec: &TensorSpec) -> String {
    format!("{kind}.{}", spec.checkpoint)
}

fn step_name(state: &State) -> String {
    let suffix = if state.is_step_open { OPEN_SUFFIX } else { "" };
    format!("{STEP_PREFIX}{:08}{suffix}", state.step)
}

fn read_state(path: &Path) -> Result<State, Error> {
    let text = fs::read_to_string(path).map_err(io(path))?;
    let fail = |problem: String| Error::State { path: path.to_owned(), problem };
    let state: State = serde_json::from_str(&text).map_err(|e| fail(e.to_string()))?;
    if state.version != VERSION {
        return Err(fail(format!("version {}, expected {VERSION}", state.version)));
    }
    Ok(state)
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |error| Error::Io { path, error }
}
