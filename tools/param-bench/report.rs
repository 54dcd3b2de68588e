//! Results as a table, JSON or CSV, all from one definition of a row.

use std::io::{self, Write};
use std::path::Path;

use param_kernels::Kernels;
use param_model::tensors;
use param_runtime::Model;
use serde_json::{Map, Value, json};

use crate::Format;
use crate::measure::Test;

/// One result: columns with their values, in order.
pub struct Row(Vec<(&'static str, Value)>);

impl Row {
    /// `samples` are tokens per second, at least one.
    pub fn new(path: &Path, model: &Model, n_thread: usize, test: Test, samples: Vec<f64>) -> Row {
        let n_params: usize = tensors(model.config()).iter().filter(|t| t.gguf.is_some()).map(|t| t.n_elements()).sum();
        let n_bytes: u64 = model.gguf().tensors().iter().map(|t| t.n_bytes).sum();
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let round = |rate: f64| (rate * 100.0).round() / 100.0;
        Row(vec![
            ("model", json!(path.file_name().unwrap_or(path.as_os_str()).to_string_lossy())),
            ("bytes", json!(n_bytes)),
            ("params", json!(n_params)),
            ("isa", json!(Kernels::get().isa())),
            ("threads", json!(n_thread)),
            ("test", json!(test.name())),
            ("n_prompt", json!(if test.decode { 0 } else { test.n_token })),
            ("n_gen", json!(if test.decode { test.n_token } else { 0 })),
            ("depth", json!(test.depth)),
            ("tok/s", json!(round(median(&sorted)))),
            ("min", json!(round(sorted[0]))),
            ("max", json!(round(sorted[sorted.len() - 1]))),
            ("samples", json!(samples.iter().map(|&s| round(s)).collect::<Vec<_>>())),
        ])
    }

    /// Columns and values as text; the table leaves out what the test's name says already.
    fn cells(&self, format: Format) -> impl Iterator<Item = (&'static str, String)> {
        let hidden: &[&str] = if format == Format::Table { &["n_prompt", "n_gen", "depth", "samples"] } else { &[] };
        self.0.iter().filter(|(name, _)| !hidden.contains(name)).map(|(name, value)| {
            let text = match value {
                Value::String(text) => text.clone(),
                Value::Array(values) => values.iter().map(Value::to_string).collect::<Vec<_>>().join(" "),
                other => other.to_string(),
            };
            (*name, text)
        })
    }
}

/// Of an odd number the middle, of an even the mean of the middle two.
fn median(sorted: &[f64]) -> f64 {
    (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0
}

/// Writes each row as soon as it is known.
pub struct Report<W: Write> {
    out: W,
    format: Format,
    n_row: usize,
}

impl<W: Write> Report<W> {
    pub fn new(out: W, format: Format) -> Report<W> {
        Report { out, format, n_row: 0 }
    }

    pub fn row(&mut self, row: &Row) -> io::Result<()> {
        let is_first = self.n_row == 0;
        self.n_row += 1;
        match self.format {
            Format::Json => {
                let object: Map<String, Value> = row.0.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect();
                write!(self.out, "{}  {}", if is_first { "[\n" } else { ",\n" }, Value::Object(object))?;
            }
            Format::Csv => {
                if is_first {
                    self.csv(row.cells(self.format).map(|(name, _)| name.to_owned()))?;
                }
                self.csv(row.cells(self.format).map(|(_, text)| text))?;
            }
            Format::Table => {
                if is_first {
                    self.table(row.cells(self.format).map(|(name, _)| (name, name.to_owned())))?;
                    self.table(row.cells(self.format).map(|(name, _)| (name, "-".repeat(width(name)))))?;
                }
                self.table(row.cells(self.format))?;
            }
        }
        self.out.flush()
    }

    /// Closes the report and gives the output back.
    pub fn end(mut self) -> io::Result<W> {
        if self.format == Format::Json {
            writeln!(self.out, "{}", if self.n_row > 0 { "\n]" } else { "[]" })?;
        }
        Ok(self.out)
    }

    /// Fields are quoted where they must be (RFC 4180).
    fn csv(&mut self, fields: impl Iterator<Item = String>) -> io::Result<()> {
        let quote =
            |f: String| if f.contains([',', '"', '\n']) { format!("\"{}\"", f.replace('"', "\"\"")) } else { f };
        writeln!(self.out, "{}", fields.map(quote).collect::<Vec<_>>().join(","))
    }

    fn table(&mut self, cells: impl Iterator<Item = (&'static str, String)>) -> io::Result<()> {
        for (column, text) in cells {
            let width = width(column);
            write!(self.out, "| {text:<width$} ")?;
        }
        writeln!(self.out, "|")
    }
}

/// Width of a column of the table: rows are written before the later ones are known.
fn width(column: &str) -> usize {
    match column {
        "model" => 28,
        "bytes" | "params" => 11,
        "test" => 14,
        _ => 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(format: Format) -> String {
        let mut report = Report::new(Vec::new(), format);
        for rate in [50.5, 61.0] {
            let row = Row(vec![("model", json!("a,b.gguf")), ("depth", json!(0)), ("tok/s", json!(rate))]);
            report.row(&row).unwrap();
        }
        String::from_utf8(report.end().unwrap()).unwrap()
    }

    #[test]
    fn every_form_holds_every_row() {
        assert_eq!(report(Format::Csv), "model,depth,tok/s\n\"a,b.gguf\",0,50.5\n\"a,b.gguf\",0,61.0\n");
        let json: Value = serde_json::from_str(&report(Format::Json)).unwrap();
        assert_eq!(json[1], json!({"model": "a,b.gguf", "depth": 0, "tok/s": 61.0}));
        let table = report(Format::Table);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(lines.iter().all(|l| l.len() == lines[0].len() && l.matches('|').count() == 3), "{table}");
    }

    #[test]
    fn medians_are_of_the_middle() {
        assert_eq!(median(&[1.0, 2.0, 9.0]), 2.0);
        assert_eq!(median(&[1.0, 2.0, 4.0, 9.0]), 3.0);
    }
}
