//! Training on this project's trainer and on PyTorch: what is trained, how each is started, and the table.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use clap::builder::PossibleValuesParser;
use serde_json::{Value, json};

use crate::engines::torch_script;
use crate::machine::Machine;
use crate::table::{Spread, cores, markdown, text};
use crate::{Args, others, output, save};

#[derive(clap::Args)]
#[command(next_help_heading = "Training")]
pub struct Options {
    /// Measure training beside PyTorch instead
    #[arg(long, requires = "torch", conflicts_with_all = ["check", "weights"])]
    pub train: bool,
    /// Only these models: param-mid in batches of 8x256, nanoGPT's small one of characters in 12x64, param-0.5b in 4x512
    #[arg(long, value_name = "NAMES", value_delimiter = ',', requires = "train",
          value_parser = PossibleValuesParser::new(CASES.iter().map(|case| case.name)))]
    pub cases: Vec<String>,
    /// Only these types of the matrix products [default: both; char has only f32]
    #[arg(long, value_name = "TYPES", value_delimiter = ',', requires = "train")]
    pub dtypes: Vec<Dtype>,
}

/// What the matrix products are computed in; weights and optimizer are f32 in both.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Dtype {
    F32,
    Bf16,
}

impl Dtype {
    fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
        }
    }

    /// The test of `param-bench --machine` that measures what it can reach at best.
    fn peak(self) -> &'static str {
        match self {
            Dtype::F32 => "f32_peak",
            Dtype::Bf16 => "bf16_peak",
        }
    }
}

/// A model and the shape of its batches.
struct Case {
    name: &'static str,
    /// Its hyperparameters, from the project's root.
    config: &'static str,
    batch: u16,
    context: u16,
    dtypes: &'static [Dtype],
    /// Timed in a turn.
    n_step: u16,
    is_quick: bool,
}

const CASES: [Case; 3] = [
    Case {
        name: "mid",
        config: "models/param-mid.toml",
        batch: 8,
        context: 256,
        dtypes: &[Dtype::F32, Dtype::Bf16],
        n_step: 5,
        is_quick: true,
    },
    Case {
        name: "char",
        config: "benches/peers/torch/char.toml",
        batch: 12,
        context: 64,
        dtypes: &[Dtype::F32],
        n_step: 100,
        is_quick: true,
    },
    Case {
        name: "0.5b",
        config: "models/param-0.5b.toml",
        batch: 4,
        context: 512,
        dtypes: &[Dtype::F32, Dtype::Bf16],
        n_step: 2,
        is_quick: false,
    },
];

impl Case {
    fn config(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .ancestors()
            .nth(3)
            .expect("three folders below the root")
            .join(self.config)
    }
}

/// In the table's order: name, and flags of the PyTorch script; ours has none.
const ENGINES: [(&str, Option<&[&str]>); 5] = [
    (OURS, None),
    ("PyTorch", Some(&["--dispatch", "capacity"])),
    ("PyTorch compiled", Some(&["--dispatch", "capacity", "--compile"])),
    ("PyTorch dropless", Some(&["--dispatch", "gather"])),
    ("PyTorch dropless, compiled", Some(&["--dispatch", "gather", "--compile"])),
];
const OURS: &str = "PARAM";

/// One line of the table but for its engine.
#[derive(Clone, Copy)]
struct Group<'a> {
    case: &'a Case,
    dtype: Dtype,
    n_thread: u16,
}

impl Group<'_> {
    fn label(&self) -> String {
        let Case { name, batch, context, .. } = self.case;
        format!("{name} {batch}x{context} {} {} thread(s)", self.dtype.name(), self.n_thread)
    }

    /// Runs one turn of an engine; flags of the PyTorch script say which, none ours.
    fn row(&self, args: &Args, flags: Option<&[&str]>) -> Result<Value> {
        let (mut command, [config, batch, steps]) = match (flags, &args.torch) {
            (None, _) => {
                let mut command = args.program("param-train");
                // The optimizer that PyTorch has.
                command.args(["--optimizer", "adamw"]);
                (command, ["--config", "--batch-size", "--benchmark"])
            }
            (Some(flags), Some(python)) => {
                let mut command = Command::new(python);
                command.arg(torch_script("bench_training.py")).args(flags);
                // By default glibc gives the memory of each large tensor back to the system, and each step pays for its
                // pages again. Logits of a large vocabulary are still given back: kept, they would not fit beside the rest.
                command.env("MALLOC_MMAP_THRESHOLD_", (256 << 20).to_string());
                command.env("MALLOC_TRIM_THRESHOLD_", (1u64 << 40).to_string());
                (command, ["--preset", "--batch", "--steps"])
            }
            (Some(_), None) => bail!("--torch PYTHON is needed to train with PyTorch"),
        };
        let case = self.case;
        command.arg(config).arg(case.config());
        command.args([batch, &case.batch.to_string(), steps, &case.n_step.to_string()]);
        command.args(["--context", &case.context.to_string(), "--dtype", self.dtype.name()]);
        command.args(["--threads", &self.n_thread.to_string()]);
        let (text, others) = others::beside(|| output(&mut command));
        let mut row = serde_json::from_str(&text?).context("its row")?;
        self.check(&row)?;
        // Where the project lies is nobody's concern.
        row["preset"] = json!(case.config);
        row["other_cores"] = json!(others);
        Ok(row)
    }

    /// Whether a row is of this group, has what the table needs, and its training did not diverge.
    fn check(&self, row: &Value) -> Result<()> {
        let Group { case, dtype, n_thread } = *self;
        let asked = [
            ("batch", json!(case.batch)),
            ("context", json!(case.context)),
            ("dtype", json!(dtype.name())),
            ("threads", json!(n_thread)),
        ];
        for (key, value) in asked {
            if row[key] != value {
                bail!("its row: `{key}` is {}: expected {value}", row[key]);
            }
        }
        // JSON has no number that is not finite.
        for key in ["tok/s", "peak_bytes", "loss"] {
            if !row[key].is_number() {
                bail!("its row: `{key}` is {}: expected a number", row[key]);
            }
        }
        Ok(())
    }
}

pub fn run(args: &Args) -> Result<()> {
    let mut groups = Vec::new();
    for case in &CASES {
        let is_named = args.training.cases.iter().any(|name| name == case.name);
        if is_named || args.training.cases.is_empty() && (case.is_quick || !args.quick) {
            let asked = &args.training.dtypes;
            for &dtype in case.dtypes.iter().filter(|dtype| asked.is_empty() || asked.contains(dtype)) {
                groups.extend(args.threads(&[2]).into_iter().map(|n_thread| Group { case, dtype, n_thread }));
            }
        }
    }
    if groups.is_empty() {
        bail!("--cases and --dtypes leave nothing to train: char is trained in f32 only");
    }
    let machine = Machine::new(args);
    let turns = args.turns(3);
    let mut results = Results::default();
    for turn in 1..=turns {
        for group in &groups {
            for (engine, flags) in ENGINES {
                eprintln!("turn {turn} of {turns}: {}, {engine}", group.label());
                others::wait(std::time::Duration::from_secs(args.patience));
                let row = group.row(args, flags).with_context(|| format!("{engine}, {}", group.label()))?;
                results.add(group, engine, turn, row, machine.measure(group.n_thread)?);
            }
        }
    }
    let lines = groups.iter().flat_map(|group| results.lines(group)).collect::<Vec<_>>();
    print!("{}", markdown(&HEADINGS, &lines));
    save(args, json!({ "rows": results.rows, "machine": results.machine }))
}

#[derive(Default)]
struct Results {
    rows: Vec<Value>,
    machine: Vec<Value>,
}

const HEADINGS: [&str; 11] = [
    "model",
    "batch",
    "dtype",
    "threads",
    "engine",
    "tok/s",
    "of best peer",
    "peak MiB",
    "of peak",
    "others' cores",
    "peak GFLOP/s",
];

impl Results {
    /// Adds the row of one turn with what it belongs to, and what the machine could do right after.
    fn add(&mut self, group: &Group, engine: &str, turn: u16, mut row: Value, mut machine: Vec<Value>) {
        let peak = machine.iter().find(|row| row["test"] == group.dtype.peak()).map(|row| row["GOP/s"].clone());
        row["peak GFLOP/s"] = json!(peak);
        for row in std::iter::once(&mut row).chain(&mut machine) {
            row["case"] = json!(group.case.name);
            row["dtype"] = json!(group.dtype.name());
            row["engine"] = json!(engine);
            row["threads"] = json!(group.n_thread);
            row["turn"] = json!(turn);
        }
        self.rows.push(row);
        self.machine.extend(machine);
    }

    /// A line for each engine; the machine's peak, the median over all of them, stands beside the first.
    fn lines(&self, group: &Group) -> Vec<[String; HEADINGS.len()]> {
        let Group { case, dtype, n_thread } = *group;
        let is_here =
            |row: &&Value| row["case"] == case.name && row["dtype"] == dtype.name() && row["threads"] == n_thread;
        let rows = self.rows.iter().filter(is_here).collect::<Vec<_>>();
        let peak = Spread::of(rows.iter().filter_map(|row| row["peak GFLOP/s"].as_f64()));
        // Ours counts what each of them has to multiply.
        let operations = rows.iter().find_map(|row| row["operations_per_token"].as_f64());
        // Of a turn the median of its steps, as its process gives it.
        let rate = |engine: &str| {
            Spread::of(rows.iter().filter(|row| row["engine"] == engine).filter_map(|row| row["tok/s"].as_f64()))
        };
        let peers = ENGINES.iter().filter(|(name, _)| *name != OURS);
        let best = peers.filter_map(|(name, _)| rate(name)).map(|spread| spread.median).reduce(f64::max);
        let line = |(i, &(engine, _)): (usize, &(&str, _))| {
            let rows = rows.iter().filter(|row| row["engine"] == engine);
            let spread = |key| Spread::of(rows.clone().filter_map(|row| row[key].as_f64()));
            let rate = rate(engine);
            let ratio = rate.as_ref().filter(|_| engine == OURS).zip(best).map(|(ours, best)| ours.median / best);
            // Each turn against the peak right after it.
            let share = Spread::of(rows.clone().filter_map(|row| {
                let (rate, peak) = (row["tok/s"].as_f64()?, row["peak GFLOP/s"].as_f64()?);
                Some(100.0 * operations? * rate / (peak * 1e9))
            }));
            let memory = spread("peak_bytes");
            let beside_first = |text: String| if i == 0 { text } else { String::new() };
            [
                beside_first(case.name.to_owned()),
                beside_first(format!("{}x{}", case.batch, case.context)),
                beside_first(dtype.name().to_owned()),
                beside_first(n_thread.to_string()),
                engine.to_owned(),
                text(&rate),
                ratio.map_or(String::new(), |ratio| format!("{ratio:.2} ×")),
                memory.map_or(String::new(), |memory| format!("{:.0}", memory.max / f64::from(1 << 20))),
                share.map_or(String::new(), |share| format!("{:.0}%", share.median)),
                cores(&spread("other_cores")),
                beside_first(text(&peak)),
            ]
        };
        ENGINES.iter().enumerate().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUP: Group = Group { case: &CASES[0], dtype: Dtype::Bf16, n_thread: 2 };

    fn row(rate: f64, peak_bytes: u32) -> Value {
        json!({
            "batch": 8, "context": 256, "dtype": "bf16", "threads": 2, "operations_per_token": 6e6,
            "tok/s": rate, "peak_bytes": peak_bytes, "loss": 9.0,
        })
    }

    #[test]
    fn configs_lie_where_the_cases_say() {
        for case in &CASES {
            assert!(case.config().is_file(), "{}", case.config);
        }
    }

    #[test]
    fn the_table_has_ratios_and_shares() {
        let mut results = Results::default();
        for (turn, factor) in [(1, 1.0), (2, 2.0)] {
            for ((engine, _), rate) in ENGINES.iter().zip([800.0, 200.0, 400.0, 100.0, 50.0]) {
                let peak = |test, peak: f64| json!({"test": test, "GOP/s": peak});
                let machine = vec![peak("f32_peak", 1.0), peak("bf16_peak", 48.0 * factor)];
                results.add(&GROUP, engine, turn, row(factor * rate, u32::from(turn) << 21), machine);
            }
        }
        let lines = results.lines(&GROUP);
        let ours = ["mid", "8x256", "bf16", "2", "PARAM", "1200 (800–1600)", "2.00 ×", "4", "10%", "", "72 (48–96)"];
        assert_eq!(lines[0], ours);
        assert_eq!(lines[2], ["", "", "", "", "PyTorch compiled", "600 (400–800)", "", "4", "5%", "", ""]);
        let other = Group { n_thread: 1, ..GROUP };
        assert!(results.lines(&other).iter().all(|line| line[5..].iter().all(String::is_empty)));
    }

    #[test]
    fn a_row_of_something_else_is_refused_by_key() {
        GROUP.check(&row(1.0, 1)).unwrap();
        for (key, bad) in [("loss", json!(null)), ("tok/s", json!("fast")), ("dtype", json!("f32"))] {
            let mut row = row(1.0, 1);
            row[key] = bad;
            assert!(GROUP.check(&row).unwrap_err().to_string().contains(key), "{row}");
        }
    }
}
