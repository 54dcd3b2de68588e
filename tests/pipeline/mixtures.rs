//! Several data sets trained on together, and tokens made ahead of training.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::data_type::ByteArrayType;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::Value;

use super::resuming::{assert_same_end, cut_back, documents};
use crate::command::{failure_of, output_of, outputs_of, param_train};
use crate::fixture::{prose, records, resume, train, write};

/// Two data sets in a folder.
fn data(folder: &Path) -> [PathBuf; 2] {
    [documents(folder), write(folder, "prose.txt", prose(20_000, 99))]
}

/// What `--data` takes them as.
fn weighted(data: &[PathBuf; 2], weights: [&str; 2]) -> [PathBuf; 2] {
    [0, 1].map(|i| format!("{}:{}", data[i].display(), weights[i]).into())
}

#[test]
fn a_mixture_is_trained_on_and_resumed_in_its_middle() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(folder.path());
    for extra in [&[][..], &["--isolate-documents"]] {
        let name = format!("run{}", extra.len());
        let (whole, resumed) = (folder.path().join(&name), folder.path().join(name + "-resumed"));
        let [first, second] = weighted(&data, ["3", "1"]);
        let flags = ["--steps=12", "--save-every=5", "--eval-every=4", "--keep=9", "--lr=1e-2", "--sample-every=0"];
        let (_, log) = outputs_of(train(&first, &whole, &flags).args(extra).arg("--data").arg(&second));
        assert!(log.contains("75.0% of the rows from documents.jsonl") && log.contains("; prose.txt "), "{log}");
        let evaluated = records(&whole, "eval_loss");
        assert_eq!(evaluated.len(), 3);
        for record in evaluated {
            let loss = |i: usize| record["datasets"][i]["eval_loss"].as_f64().unwrap();
            let expected = 0.75 * loss(0) + 0.25 * loss(1);
            assert!((record["eval_loss"].as_f64().unwrap() - expected).abs() < 1e-9, "{record}");
            assert_eq!((&record["datasets"][0]["name"], loss(0) != loss(1)), (&"documents.jsonl".into(), true));
        }
        // 12 steps of 4 rows, a quarter of them from the second.
        let steps = records(&whole, "loss");
        let epoch = |i: usize| {
            assert_eq!(steps[i]["datasets"][1]["name"], "prose.txt");
            steps[i]["datasets"][1]["epoch"].as_f64().unwrap()
        };
        assert_eq!(steps.len(), 12);
        assert!((0..11).all(|i| epoch(i) < epoch(i + 1)), "one row of each batch");
        cut_back(&whole, &resumed, 5);
        output_of(&mut resume(&resumed, &[]));
        assert_same_end(&resumed, &whole);
    }
}

#[test]
fn other_shares_make_no_new_tokens_but_are_another_run() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(folder.path());
    let run = folder.path().join("run");
    let [first, second] = weighted(&data, ["0.75", "0.25"]);
    output_of(train(&first, &run, &["--steps=2"]).arg("--data").arg(&second));
    let folders = std::fs::read_dir(run.join("tokens")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut folders = folders.collect::<Vec<_>>();
    folders.sort();
    assert!(folders.len() == 2 && folders[0].starts_with("documents.jsonl-"), "{folders:?}");
    assert!(folders[1].starts_with("prose.txt-"), "{folders:?}");

    let with = |weights: [&str; 2]| {
        let [first, second] = weighted(&data, weights);
        let mut command = resume(&run, &["--steps=4", "--data"]);
        command.args([first, second]);
        command
    };
    let log = failure_of(&mut with(["0.5", "0.5"]), 1);
    assert!(log.contains("other shares") && log.matches("reused: ").count() == 2, "{log}");
    assert!(failure_of(resume(&run, &["--steps=4", "--data"]).args(&data), 1).contains("other shares"));
    // The same shares in other numbers.
    output_of(&mut with(["3", "1"]));
}

#[test]
fn tokens_made_ahead_are_those_of_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let [_, data] = data(folder.path());
    let run = folder.path().join("run");
    let tokenize = |flags: &[&str]| {
        let mut command = param_train();
        command.args(["--tokenize-only", "--threads=2", "--data"]).arg(&data).args(flags);
        output_of(&mut command)
    };
    let out = tokenize(&["--chars"]);
    assert!(out.contains("MB/s on 2 threads"), "{out}");
    tokenize(&["--vocab-size=300", "--out", run.to_str().unwrap()]);
    let tokenizer = run.join("tokens/tokenizer.json");
    let mut command = param_train();
    command.arg("--tokenizer").arg(&tokenizer).args(crate::fixture::tiny()).arg("--steps=1");
    let (_, log) = outputs_of(command.arg("--data").arg(&data).arg("--out").arg(&run));
    assert!(log.contains("reused: 1 files"), "{log}");
}

/// The texts of a file of JSON lines as a column of a Parquet file, in two row groups.
fn table(lines: &Path, column: &str) -> PathBuf {
    let text = std::fs::read_to_string(lines).unwrap();
    let texts =
        text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["text"].as_str().unwrap().to_owned());
    let texts = texts.collect::<Vec<_>>();
    let schema = Arc::new(parse_message_type(&format!("message rows {{ required binary {column} (UTF8); }}")).unwrap());
    let path = lines.with_extension("parquet");
    let mut writer = SerializedFileWriter::new(std::fs::File::create(&path).unwrap(), schema, Arc::default()).unwrap();
    for texts in texts.chunks(texts.len().div_ceil(2)) {
        let values = texts.iter().map(|text| text.as_str().into()).collect::<Vec<_>>();
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
    path
}

#[test]
fn a_table_trains_as_lines_of_the_same_documents_do() {
    let folder = tempfile::tempdir().unwrap();
    let lines = documents(folder.path());
    let table = table(&lines, "body");
    let losses = |data: &Path, run: &str, flags: &[&str]| {
        let out = folder.path().join(run);
        output_of(train(data, &out, &["--steps=3"]).args(flags));
        records(&out, "loss").iter().map(|record| record["loss"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    let (of_lines, of_table) = (losses(&lines, "lines", &[]), losses(&table, "table", &["--text-field", "body"]));
    assert_eq!((of_lines.len(), of_lines), (3, of_table));
    let said = failure_of(&mut train(&table, &folder.path().join("none"), &["--steps=3"]), 1);
    assert!(said.contains("documents.parquet") && said.contains("`text`"), "{said}");
}
