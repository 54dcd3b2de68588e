//! What both tables are made of: medians with their extremes, and Markdown.

use std::fmt::Write;

/// Median, least and greatest.
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    pub fn of(values: impl Iterator<Item = f64>) -> Option<Spread> {
        let mut sorted = values.collect::<Vec<_>>();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        Some(Spread { median: (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0, min, max })
    }
}

/// `median (min–max)`, in three figures or so.
pub fn text(spread: &Option<Spread>) -> String {
    let Some(Spread { median, min, max }) = spread else { return String::new() };
    let digits = if *median < 20.0 { 1 } else { 0 };
    format!("{median:.digits$} ({min:.digits$}–{max:.digits$})")
}

/// The same of cores that others kept busy, which are few.
pub fn cores(spread: &Option<Spread>) -> String {
    spread.as_ref().map_or(String::new(), |s| format!("{:.1} ({:.1}–{:.1})", s.median, s.min, s.max))
}

/// Columns aligned; those with nothing in them are left out.
pub fn markdown<const N: usize>(headings: &[&str; N], lines: &[[String; N]]) -> String {
    let columns = (0..N).filter(|&c| lines.iter().any(|line| !line[c].is_empty()));
    let columns = columns.map(|c| {
        let longest = lines.iter().map(|line| line[c].chars().count()).max().unwrap_or(0);
        (c, longest.max(headings[c].chars().count()))
    });
    let columns = columns.collect::<Vec<_>>();
    let mut table = String::new();
    let mut line = |cell: &dyn Fn(usize, usize) -> String| {
        for &(c, width) in &columns {
            write!(table, "| {:<width$} ", cell(c, width)).expect("strings take any text");
        }
        table.push_str("|\n");
    };
    line(&|c, _| headings[c].to_owned());
    line(&|_, width| "-".repeat(width));
    for cells in lines {
        line(&|c, _| cells[c].clone());
    }
    table
}
