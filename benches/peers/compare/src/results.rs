//! What the runs gave: every row as it came, and the table of their medians.

use serde_json::{Value, json};

use crate::machine;
use crate::models::Weights;
use crate::table::{Spread, cores, markdown, text};

#[derive(Default)]
pub struct Results {
    rows: Vec<Value>,
    machine: Vec<Value>,
    lines: Vec<[String; 13]>,
}

const HEADINGS: [&str; 13] = [
    "weights",
    "MB/token",
    "threads",
    "engine",
    "decode tok/s",
    "of read",
    "prefill tok/s",
    "isa",
    "others' cores",
    machine::TESTS[0].2,
    machine::TESTS[1].2,
    machine::TESTS[2].2,
    machine::TESTS[3].2,
];

impl Results {
    /// Adds the rows of one turn with what they belong to, and what the machine could do right after.
    pub fn add(&mut self, of: (&str, &str, u16, u16), mut rows: Vec<Value>, mut machine: Vec<Value>) {
        let (weights, engine, n_thread, turn) = of;
        let (test, unit, _) = machine::TESTS[0];
        let read = machine.iter().find(|row| row["test"] == test).map(|row| row[unit].clone());
        for row in rows.iter_mut().chain(&mut machine) {
            row["weights"] = json!(weights);
            row["engine"] = json!(engine);
            row["threads"] = json!(n_thread);
            row["turn"] = json!(turn);
        }
        rows.iter_mut().for_each(|row| row["read GB/s"] = json!(read));
        self.rows.extend(rows);
        self.machine.extend(machine);
    }

    pub fn rows(&self) -> &[Value] {
        &self.rows
    }

    pub fn machine_rows(&self) -> &[Value] {
        &self.machine
    }

    /// Adds a line for each engine; the machine's figures, medians over all of them, stand beside the first.
    pub fn tabulate(&mut self, weights: &Weights, bytes_per_token: Option<u64>, n_thread: u16, engines: &[&str]) {
        let is_here = |row: &&Value| row["weights"] == weights.name && row["threads"] == n_thread;
        let machine = machine::TESTS.map(|(test, unit, _)| {
            let rows = self.machine.iter().filter(is_here).filter(|row| row["test"] == test);
            Spread::of(rows.filter_map(|row| row[unit].as_f64()))
        });
        let mut lines = Vec::new();
        for (i, engine) in engines.iter().enumerate() {
            let rows = self.rows.iter().filter(is_here).filter(|row| row["engine"] == *engine).collect::<Vec<_>>();
            let of_test = |is_decode: bool| {
                let rows = rows.iter().filter(|row| (row["n_gen"] != 0) == is_decode);
                Spread::of(rows.filter_map(|row| row["tok/s"].as_f64()))
            };
            // Each run against the bandwidth right after it: on a shared machine that changes by a factor of two.
            let share = Spread::of(rows.iter().filter(|row| row["n_gen"] != 0).filter_map(|row| {
                let (rate, read) = (row["tok/s"].as_f64()?, row["read GB/s"].as_f64()?);
                Some(100.0 * rate * bytes_per_token? as f64 / (read * 1e9))
            }));
            let share = share.map_or(String::new(), |share| format!("{:.0}%", share.median));
            let beside_first = |text: String| if i == 0 { text } else { String::new() };
            let isa = rows.first().and_then(|row| row["isa"].as_str()).unwrap_or_default();
            let others = Spread::of(rows.iter().filter_map(|row| row["other_cores"].as_f64()));
            let [read, int8, bf16, f32] = machine.each_ref().map(|spread| beside_first(text(spread)));
            lines.push([
                beside_first(weights.label.to_owned()),
                beside_first(bytes_per_token.map_or(String::new(), |n| format!("{:.0}", n as f64 / 1e6))),
                beside_first(n_thread.to_string()),
                (*engine).to_owned(),
                text(&of_test(true)),
                share,
                text(&of_test(false)),
                isa.to_owned(),
                cores(&others),
                read,
                int8,
                bf16,
                f32,
            ]);
        }
        self.lines.extend(lines);
    }

    pub fn table(&self) -> String {
        markdown(&HEADINGS, &self.lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_medians_and_shares_and_no_empty_columns() {
        let mut results = Results::default();
        for (turn, rate) in [(1, 100.0), (2, 120.0), (3, 50.0)] {
            let row = |n_gen, rate| json!({"isa": "", "n_gen": n_gen, "tok/s": rate});
            let read = json!({"test": "read_bandwidth", "GB/s": 40.0});
            results.add(("q4_k", "PARAM", 2, turn), vec![row(0, 10.0 * rate), row(128, rate)], vec![read]);
        }
        results.tabulate(&Weights::ALL[1], Some(200_000_000), 2, &["PARAM"]);
        let table = results.table();
        for cell in ["| 100 (50–120) ", "| 1000 (500–1200) ", "| 50% ", "| 40 (40–40) "] {
            assert!(table.contains(cell), "`{cell}` in\n{table}");
        }
        assert!(!table.contains("isa") && !table.contains("int8"), "{table}");
        let lengths = table.lines().map(|line| line.chars().count()).collect::<Vec<_>>();
        assert!(lengths.len() == 3 && lengths.iter().all(|&n| n == lengths[0]), "{table}");
    }
}
