//! A run in pictures, kept up to date while it goes: `report.html`, one page that needs nothing else, and event files for
//! TensorBoard. Both say what `metrics.jsonl` says; a field that is new there appears in both.

mod about;
mod axis;
mod chart;
mod events;
mod heat;
mod history;
mod markup;
mod page;
mod series;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use param_model::atomic::write_file;

use crate::error::Error;
use crate::metrics::{Kind, METRICS_FILE, read_line};

pub use about::{About, summary};
pub use events::EVENTS_FOLDER;
use events::EventFile;
use history::History;

/// The page's name within a run's folder.
pub const REPORT_FILE: &str = "report.html";

/// Between two pages if nothing but steps happens.
const INTERVAL: Duration = Duration::from_secs(20);
/// Least time between two pages, in times of what a page takes: drawing costs a run no more than a hundredth.
const RELAX: u32 = 100;

/// How a run is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// Going on.
    Running,
    /// Through.
    Finished,
    /// Interrupted, to be resumed.
    Stopped,
    /// Ended by this error.
    Failed(String),
}

/// The page and the event file of a run.
pub struct Report {
    path: PathBuf,
    about: About,
    history: History,
    events: EventFile,
    /// When the page was last written, and how long that took.
    written: Option<(Instant, Duration)>,
}

impl Report {
    /// The report of the run in `folder`, which has done `step` steps: what its metrics say of these is in it.
    pub fn open(folder: &Path, about: About, step: u64) -> Result<Self, Error> {
        let mut history = History::new(about.moe_blocks.len(), about.n_expert);
        let metrics = folder.join(METRICS_FILE);
        let file = File::open(&metrics).map_err(|error| Error::Io { path: metrics, error })?;
        // As when the metrics are cut back: what follows an unreadable line is no record either.
        for line in BufReader::new(file).lines().map_while(Result::ok) {
            if let Some((step, kind, fields)) = read_line(&line) {
                history.add(step, kind, fields);
            }
        }
        let events = EventFile::create(folder, step, about.moe_blocks.clone())?;
        Ok(Self { path: folder.join(REPORT_FILE), about, history, events, written: None })
    }

    /// Takes in a line of the metrics.
    pub fn record(&mut self, line: &str) -> Result<(), Error> {
        let Some((step, kind, fields)) = read_line(line) else { return Ok(()) };
        self.events.record(step, kind, &fields)?;
        self.history.add(step, kind, fields);
        self.refresh(if kind == Kind::Step { INTERVAL } else { Duration::ZERO })
    }

    /// Writes the page if the last one is this old, and so old that drawing takes no time to speak of.
    pub fn refresh(&mut self, age: Duration) -> Result<(), Error> {
        if self.written.is_some_and(|(at, took)| at.elapsed() < age.max(took * RELAX)) {
            return Ok(());
        }
        self.write(&Status::Running)
    }

    /// Writes the page.
    pub fn write(&mut self, status: &Status) -> Result<(), Error> {
        let start = Instant::now();
        let page = page::page(&self.about, &self.history, status);
        write_file(&self.path, |out| out.write_all(page.as_bytes()))
            .map_err(|error| Error::Io { path: self.path.clone(), error })?;
        let now = Instant::now();
        self.written = Some((now, now - start));
        Ok(())
    }
}
