//! How far a conversion is: a bar on a terminal, a line per tenth in a log.

use std::io::{IsTerminal, stderr};

use indicatif::ProgressBar;
use param::cli;

/// Progress in elements.
pub struct Progress {
    bar: Option<ProgressBar>,
    total: u64,
    done: u64,
}

impl Progress {
    pub fn new(total: u64) -> Progress {
        let bar = stderr().is_terminal().then(|| cli::bar(total));
        Progress { bar, total, done: 0 }
    }

    /// `n` more elements, of tensor `name`.
    pub fn advance(&mut self, n: u64, name: &str) {
        let tenth = |done: u64| done * 10 / self.total.max(1);
        let before = tenth(self.done);
        self.done += n;
        match &self.bar {
            Some(bar) => {
                bar.set_message(name.to_owned());
                bar.set_position(self.done);
            }
            None if tenth(self.done) > before => eprintln!("{:>3}%  {name}", tenth(self.done) * 10),
            None => {}
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_counted_to_the_end() {
        let mut progress = Progress::new(30);
        for _ in 0..3 {
            progress.advance(10, "blk.0.attn_q.weight");
        }
        assert_eq!(progress.done, progress.total);
        progress.finish();
    }
}
