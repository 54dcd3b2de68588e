//! How much of the processors others took during a run: what tells a disturbed measurement from a slow engine. Linux only.

use std::thread::sleep;
use std::time::{Duration, Instant};

/// Ticks of the clock that /proc counts in, a second: USER_HZ, fixed in Linux's interface.
const TICKS: f64 = 100.0;

/// Below this many cores others are taken to be idle.
const QUIET: f64 = 0.1;

/// Returns once others leave the cores alone for a second, or after `patience`.
pub fn wait(patience: Duration) {
    let start = Instant::now();
    while start.elapsed() < patience {
        let Some(before) = Snapshot::now() else { return };
        sleep(Duration::from_secs(1));
        if before.cores_until_now().is_none_or(|cores| cores < QUIET) {
            return;
        }
    }
}

/// What `f` returns, and the cores that others kept busy meanwhile.
pub fn beside<T>(f: impl FnOnce() -> T) -> (T, Option<f64>) {
    let before = Snapshot::now();
    let result = f();
    (result, before.and_then(|before| before.cores_until_now()))
}

/// Processor time so far.
struct Snapshot {
    /// Of all processes and of the hypervisor, in ticks.
    busy: f64,
    /// Of this process's children that have ended, in ticks.
    children: f64,
    at: Instant,
}

impl Snapshot {
    fn now() -> Option<Snapshot> {
        let busy = busy(&std::fs::read_to_string("/proc/stat").ok()?)?;
        let children = children(&std::fs::read_to_string("/proc/self/stat").ok()?)?;
        Some(Snapshot { busy, children, at: Instant::now() })
    }

    /// Cores that others kept busy since, on average.
    fn cores_until_now(&self) -> Option<f64> {
        let now = Snapshot::now()?;
        let ticks = (now.busy - self.busy) - (now.children - self.children);
        let cores = ticks / TICKS / now.at.duration_since(self.at).as_secs_f64();
        Some((cores.max(0.0) * 100.0).round() / 100.0)
    }
}

/// From /proc/stat: user, nice, system, irq, softirq and steal of the line of all processors.
fn busy(stat: &str) -> Option<f64> {
    let fields = numbers(stat.lines().find_map(|line| line.strip_prefix("cpu "))?);
    [0, 1, 2, 5, 6, 7].iter().map(|&i| fields.get(i)).sum()
}

/// From /proc/PID/stat: fields 16 and 17, where the name in field 2 may contain anything but a `)` after its own.
fn children(stat: &str) -> Option<f64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    // The first of `rest` is field 3, a letter.
    let fields = numbers(rest.get(1..)?);
    Some(fields.get(12)? + fields.get(13)?)
}

fn numbers(text: &str) -> Vec<f64> {
    text.split_whitespace().map_while(|word| word.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_those_of_the_manual() {
        assert_eq!(busy("cpu  10 20 30 4000 500 1 2 3 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n"), Some(66.0));
        let stat = "42 (a (b) c) S 1 2 3 4 5 6 7 8 9 10 11 12 130 140 15 16";
        assert_eq!(children(stat), Some(270.0));
        assert!(children("42 (name) S 1").is_none() && busy("").is_none());
    }

    #[test]
    fn nobody_takes_less_than_nothing() {
        let cores = Snapshot::now().and_then(|before| before.cores_until_now());
        assert!(cores.is_none_or(|cores| cores >= 0.0));
    }
}
