//! `metrics.jsonl`: one line a record, flushed as written; on resuming, what lies beyond the checkpoint is cut off.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use param_model::atomic::write_file;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::spikes::Spike;

/// File name within a run's folder.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// One optimizer step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Steps done, this one included.
    pub step: u64,
    /// Training loss: cross-entropy plus the weighted router losses.
    pub loss: f64,
    /// Cross-entropy, nats per target.
    pub ce: f64,
    /// Load-balancing loss, summed over blocks, unweighted.
    pub aux: f64,
    /// Router z loss, summed over blocks, unweighted.
    pub z: f64,
    /// Norm of the gradients before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f32,
    /// Targets per second, over this step.
    pub tokens_per_s: f64,
    /// Model FLOPs utilisation: share of what the machine's multiply-adds could do at best that the step's matrix products took.
    #[serde(default)]
    pub mfu: f64,
    /// Most bytes of memory in use so far, where the system says.
    #[serde(default)]
    pub memory: Option<u64>,
    /// Seconds of training so far: steps only, without evaluation, samples and saving.
    pub seconds: f64,
    /// Targets trained on so far.
    pub n_target: u64,
    /// Passes over the training data so far.
    pub epoch: f64,
    /// The same for each data set of a mixture.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub datasets: Vec<DatasetEpoch>,
    /// That it was a spike, and what was done about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spike: Option<Spike>,
    /// Choices that found their expert full.
    pub n_dropped: usize,
    /// Share of the choices that each expert got, per MoE block.
    pub expert_load: Vec<Vec<f64>>,
    /// Mean over tokens of the entropy of the router's softmax over all experts, nats, per MoE block: 0 where it is certain, `ln
    /// n_expert` where it does not care.
    #[serde(default)]
    pub router_entropy: Vec<f64>,
}

/// An expert that dies: hardly any token has chosen it for some time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StarvedRecord {
    /// Steps done.
    pub step: u64,
    /// Block of the model.
    pub block: usize,
    /// Which of its experts.
    pub starved_expert: usize,
    /// Its share of the choices over the last steps.
    pub share: f64,
    /// What each expert gets where the load is balanced.
    pub balanced: f64,
    /// How many steps that were.
    pub n_step: u64,
}

/// One evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Steps done.
    pub step: u64,
    /// Mean cross-entropy, nats per target.
    pub eval_loss: f64,
    /// The same per byte of text, in bits.
    pub bits_per_byte: f64,
    /// Targets evaluated.
    pub n_target: u64,
    /// Seconds it took.
    pub seconds: f64,
    /// The loss on each data set of a mixture, whose mean by their shares `eval_loss` then is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub datasets: Vec<DatasetLoss>,
}

/// Passes over one data set of a mixture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DatasetEpoch {
    /// The data set.
    pub name: String,
    /// Passes so far.
    pub epoch: f64,
}

/// The loss on one data set of a mixture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DatasetLoss {
    /// The data set.
    pub name: String,
    /// Mean cross-entropy, nats per target.
    pub eval_loss: f64,
    /// The same per byte of text, in bits.
    pub bits_per_byte: f64,
    /// Targets evaluated.
    pub n_target: u64,
}

/// One sample of generated text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleRecord {
    /// Steps done.
    pub step: u64,
    /// Prompt and continuation.
    pub sample: String,
}

/// A record's fields by name.
pub type Fields = serde_json::Map<String, serde_json::Value>;

/// What a record is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// As [`StepRecord`].
    Step,
    /// As [`EvalRecord`].
    Evaluation,
    /// As [`SampleRecord`].
    Sample,
    /// As [`StarvedRecord`].
    Starved,
}

/// Step, kind and fields of a line, whichever fields there are: those of other versions as well. `None` if it is no record.
pub fn read_line(line: &str) -> Option<(u64, Kind, Fields)> {
    let fields: Fields = serde_json::from_str(line).ok()?;
    let step = fields.get("step")?.as_u64()?;
    let kind = match () {
        () if fields.contains_key("eval_loss") => Kind::Evaluation,
        () if fields.contains_key("sample") => Kind::Sample,
        () if fields.contains_key("starved_expert") => Kind::Starved,
        () => Kind::Step,
    };
    Some((step, kind, fields))
}

/// The file, open for appending.
pub struct Metrics {
    path: PathBuf,
    file: File,
}

impl Metrics {
    /// Opens the metrics of the run in `folder`, which has done `step` steps: later records are of a future that a resumed
    /// run goes through again.
    pub fn open(folder: &Path, step: u64) -> Result<Self, Error> {
        let path = folder.join(METRICS_FILE);
        let io = |error| Error::Io { path: path.clone(), error };
        if path.exists() {
            #[derive(Deserialize)]
            struct Step {
                step: u64,
            }
            let lines = BufReader::new(File::open(&path).map_err(io)?).lines();
            // A line cut short by a kill is no record; nothing can follow it.
            let past = lines
                .map_while(Result::ok)
                .filter(|line| serde_json::from_str::<Step>(line).is_ok_and(|record| record.step <= step));
            write_file(&path, |out| past.into_iter().try_for_each(|line| writeln!(out, "{line}"))).map_err(io)?;
        } else {
            fs::write(&path, "").map_err(io)?;
        }
        let file = OpenOptions::new().append(true).open(&path).map_err(io)?;
        Ok(Self { path, file })
    }

    /// Appends one record; returns its line.
    pub fn write(&mut self, record: &impl Serialize) -> Result<String, Error> {
        let mut line = serde_json::to_string(record).expect("records always serialise");
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(|error| Error::Io { path: self.path.clone(), error })?;
        Ok(line)
    }
}
