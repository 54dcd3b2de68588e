//! Results as a table, JSON or CSV, all from one definition of a row.

use std::io::{self, Write};
use std::path::Path;

use param_kernels::Kernels;
use param_model::tensors;
use param_runtime::Model;
use serde_json::{Map, Value, json};

use crate::Format;
use crate::machine::Probe;
use crate::measure::{Samples, Test};

/// One result: columns with their values, in order.
pub struct Row(Vec<(&'static str, Value)>);

impl Row {
    /// A test of a model, run at least once.
    pub fn new(path: &Path, model: &Model, n_thread: usize, test: Test, samples: &Samples) -> Row {
        let n_params: usize = tensors(model.config()).iter().filter(|t| t.gguf.is_some()).map(|t| t.n_elements()).sum();
        let n_bytes: u64 = model.gguf().tensors().iter().map(|t| t.n_bytes).sum();
        let rate = Summary::new(&samples.rates);
        let mut columns = vec![
            ("model", json!(path.file_name().unwrap_or(path.as_os_str()).to_string_lossy())),
            ("bytes", json!(n_bytes)),
            ("params", json!(n_params)),
            ("isa", json!(Kernels::get().isa())),
            ("threads", json!(n_thread)),
            ("gpu", json!(model.gpu_name().unwrap_or_default())),
            ("test", json!(test.name())),
            ("n_prompt", json!(if test.decode { 0 } else { test.n_token })),
            ("n_gen", json!(if test.decode { test.n_token } else { 0 })),
            ("depth", json!(test.depth)),
            ("sequences", json!(test.n_sequence)),
            ("tok/s", json!(round(rate.median))),
            ("min", json!(round(rate.min))),
            ("max", json!(round(rate.max))),
            ("samples", json!(samples.rates.iter().map(|&s| round(s)).collect::<Vec<_>>())),
        ];
        // With several sequences a step reads the experts of all of them, which only the model knows.
        let is_single = test.decode && test.n_sequence == 1;
        if is_single && !samples.bus.is_empty() {
            let bus = Summary::new(&samples.bus);
            let used = rate.median * model.bytes_per_token() as f64 / 1e9;
            columns.push(("GB/s", json!(round(used))));
            columns.push(("bus GB/s", json!(round(bus.median))));
            columns.push(("of bus", json!(format!("{:.0}%", 100.0 * used / bus.median))));
        }
        Row(columns)
    }

    /// A property of the machine.
    pub fn machine(probe: Probe, n_thread: usize, samples: &[f64]) -> Row {
        let (name, unit) = probe.name();
        let Summary { median, min, max } = Summary::new(samples);
        Row(vec![
            ("isa", json!(Kernels::get().isa())),
            ("threads", json!(n_thread)),
            ("test", json!(name)),
            (unit, json!(round(median))),
            ("min", json!(round(min))),
            ("max", json!(round(max))),
        ])
    }

    /// Columns and values as text; the table leaves out what the test's name says already.
    fn cells(&self, format: Format) -> impl Iterator<Item = (&'static str, String)> {
        let hidden: &[&str] =
            if format == Format::Table { &["n_prompt", "n_gen", "depth", "sequences", "samples"] } else { &[] };
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

/// Median and extremes of at least one number.
struct Summary {
    median: f64,
    min: f64,
    max: f64,
}

impl Summary {
    /// The median is of an odd number the middle, of an even the mean of the middle two.
    fn new(samples: &[f64]) -> Summary {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        Summary { median: (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0, min: sorted[0], max: sorted[n - 1] }
    }
}

fn round(x: f64) -> f64 {
    (x * 100.0).round() / 100.0
}

/// Writes each row as soon as it is known.
pub struct Report<W: Write> {
    out: W,
    format: Format,
    n_row: usize,
    /// Columns of the last row: others need a heading of their own.
    columns: Vec<&'static str>,
}

impl<W: Write> Report<W> {
    pub fn new(out: W, format: Format) -> Report<W> {
        Report { out, format, n_row: 0, columns: Vec::new() }
    }

    pub fn row(&mut self, row: &Row) -> io::Result<()> {
        let columns: Vec<&str> = row.cells(self.format).map(|(name, _)| name).collect();
        let is_first = self.n_row == 0;
        let is_headed = self.columns == columns;
        self.columns = columns;
        self.n_row += 1;
        match self.format {
            Format::Json => {
                let object: Map<String, Value> = row.0.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect();
                write!(self.out, "{}  {}", if is_first { "[\n" } else { ",\n" }, Value::Object(object))?;
            }
            Format::Csv => {
                if !is_headed {
                    self.csv(row.cells(self.format).map(|(name, _)| name.to_owned()))?;
                }
                self.csv(row.cells(self.format).map(|(_, text)| text))?;
            }
            Format::Table => {
                if !is_headed {
                    if !is_first {
                        writeln!(self.out)?;
                    }
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
        "isa" => 10,
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
        assert_eq!(Summary::new(&[9.0, 1.0, 2.0]).median, 2.0);
        assert_eq!(Summary::new(&[1.0, 9.0, 2.0, 4.0]).median, 3.0);
    }
}
