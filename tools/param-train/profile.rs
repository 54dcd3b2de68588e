//! `--profile`: where the time of a step goes.

use std::io::{self, Write};

use param_train::cpu::{Section, Spent};

/// A table of each part's time in a step and of what its matrix products reached; `spent` [`Section::ALL`] is of `steps` steps.
pub fn write(out: &mut impl Write, spent: &[Spent], peak: f64, steps: u64) -> io::Result<()> {
    let total = spent.iter().map(|spent| spent.seconds).sum::<f64>();
    writeln!(out, "| part | ms a step | of the time | GFLOP/s | of the peak |\n|---|---|---|---|---|")?;
    for (section, spent) in Section::ALL.iter().zip(spent) {
        let rate = spent.operations / spent.seconds.max(1e-9);
        let products = match spent.operations {
            0.0 => " | | ".to_owned(),
            _ => format!(" | {:.0} | {:.0}%", rate / 1e9, 100.0 * rate / peak),
        };
        let (name, ms) = (section.name(), spent.seconds * 1e3 / steps.max(1) as f64);
        writeln!(out, "| {name} | {ms:.2} | {:.1}%{products} |", 100.0 * spent.seconds / total)?;
    }
    let operations = spent.iter().map(|spent| spent.operations).sum::<f64>();
    let (ms, rate) = (total * 1e3 / steps.max(1) as f64, operations / total.max(1e-9));
    writeln!(out, "| all | {ms:.2} | | {:.0} | {:.0}% of {:.0} |", rate / 1e9, 100.0 * rate / peak, peak / 1e9)
}
