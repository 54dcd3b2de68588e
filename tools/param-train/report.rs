//! A run as people see it: a bar on a terminal, lines in a log.

use std::io::{IsTerminal, Write, stderr};
use std::time::Duration;

use indicatif::{HumanCount, HumanDuration, ProgressBar};
use param::cli;
use param_train::checkpoint::State;
use param_train::metrics::StepRecord;
use param_train::spikes::{Action, Spike};
use param_train::trainer::Event;

/// Prints events as they come.
pub struct Report {
    bar: ProgressBar,
    is_terminal: bool,
    total: u64,
    log_every: u64,
    /// Seconds, steps and targets trained when the last line was written: the next averages over what came since.
    since: (f64, u64, u64),
    /// Of all steps shown.
    utilised: Utilised,
}

/// Seconds, and seconds times model FLOPs utilisation.
#[derive(Clone, Copy, Default)]
struct Utilised {
    seconds: f64,
    product: f64,
    last: f64,
}

impl Utilised {
    fn mean(self) -> Option<f64> {
        (self.seconds > 0.0).then(|| self.product / self.seconds)
    }
}

impl Report {
    /// For a run in this state.
    pub fn new(state: &State, log_every: u64) -> Self {
        let total = state.settings.schedule.total;
        let bar = cli::bar(total).with_position(state.step);
        bar.reset_eta();
        let since = (state.seconds, state.step, state.n_target);
        let utilised = Utilised { last: state.seconds, ..Utilised::default() };
        Self { bar, is_terminal: stderr().is_terminal(), total, log_every, since, utilised }
    }

    /// Shows one event.
    pub fn show(&mut self, event: Event) {
        match event {
            Event::Step(record) => self.step(record),
            Event::Starved(record) => self.line(&format!(
                "warning: block {}: expert {} got {:.2}% of the choices over the last {} steps ({:.1}% is balanced): go on with \
                 --resume and a higher --aux-weight or, if the model has a selection bias (--set use_selection_bias=true when it is \
                 begun), a higher --bias-rate",
                record.block,
                record.starved_expert,
                100.0 * record.share,
                record.n_step,
                100.0 * record.balanced
            )),
            Event::Evaluated(record) => {
                let datasets = record.datasets.iter();
                let each = datasets.map(|dataset| format!("; {} {:.4}", dataset.name, dataset.eval_loss));
                self.line(&format!(
                    "step {:>6}  validation loss {:.4} nats/token, {:.4} bits/byte ({} tokens in {:.1} s){}",
                    record.step,
                    record.eval_loss,
                    record.bits_per_byte,
                    HumanCount(record.n_target),
                    record.seconds,
                    each.collect::<String>()
                ));
            }
            Event::Sampled(record) => {
                let indented = record.sample.trim_end().replace('\n', "\n    | ");
                self.line(&format!("step {:>6}  sample:\n    | {indented}", record.step));
            }
            Event::Saved(path) => self.line(&format!("saved {}", path.display())),
            Event::NotReported(error) => self.line(&format!("from here on without report: {error}")),
        }
    }

    /// Mean model FLOPs utilisation of the steps shown.
    pub fn mfu(&self) -> Option<f64> {
        self.utilised.mean()
    }

    fn step(&mut self, record: &StepRecord) {
        if let Some(Spike { loss_z, norm_z, action }) = record.spike {
            let what = match action {
                Action::Skip => "step left out",
                Action::Clip => "gradients scaled down",
            };
            let StepRecord { step, loss, grad_norm, .. } = record;
            self.line(&format!(
                "step {step:>6}  a spike: loss {loss:.4} ({loss_z:+.1} deviations), grad {grad_norm:.2} ({norm_z:+.1}): {what}"
            ));
        }
        let step_seconds = record.seconds - self.utilised.last;
        self.utilised.seconds += step_seconds;
        self.utilised.product += step_seconds * record.mfu;
        self.utilised.last = record.seconds;
        let (first_second, first_step, first_target) = self.since;
        let due = record.step.is_multiple_of(self.log_every) || record.step == self.total;
        if !due && !self.is_terminal {
            return;
        }
        let seconds = record.seconds - first_second;
        let rate = (record.n_target - first_target) as f64 / seconds;
        let what = format!(
            "loss {:.4}  grad {:.2}  lr {:.2e}  {} tok/s  {:.0}% MFU",
            record.loss,
            record.grad_norm,
            record.lr,
            HumanCount(rate as u64),
            100.0 * record.mfu
        );
        if self.is_terminal {
            self.bar.set_position(record.step);
            self.bar.set_message(format!("step {}/{}  {what}", record.step, self.total));
        } else {
            let per_step = seconds / (record.step - first_step) as f64;
            let left = Duration::from_secs_f64(per_step * (self.total - record.step) as f64);
            self.line(&format!("step {:>6}/{}  {what}  {} left", record.step, self.total, HumanDuration(left)));
        }
        if due {
            self.since = (record.seconds, record.step, record.n_target);
        }
    }

    fn line(&mut self, text: &str) {
        // A log that nobody reads any longer (`2>&1 | head`) is no reason to end the training.
        let _ = self.bar.suspend(|| writeln!(stderr(), "{text}"));
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
