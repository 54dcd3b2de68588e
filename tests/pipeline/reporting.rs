//! What a run shows of itself while it goes: `report.html` and TensorBoard's event files.

use std::path::{Path, PathBuf};

use crate::command::{output_of, outputs_of};
use crate::fixture::{prose, records, resume, train, write};

fn page(run: &Path) -> String {
    std::fs::read_to_string(run.join("report.html")).unwrap()
}

/// Files in a run's folder of events, oldest first.
pub fn event_files(run: &Path) -> Vec<PathBuf> {
    let mut files = run.join("tensorboard").read_dir().unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    files.sort();
    files
}

/// Asserts that a page is well-formed and shows what the run's metrics say, and that the run has come to be in this state.
#[track_caller]
fn assert_shows(run: &Path, state: &str) {
    let page = page(run);
    let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
    let document = roxmltree::Document::parse_with_options(&page, options).unwrap();
    let of_class = |tag: &str, class: &str| {
        let tagged = document.descendants().filter(move |node| node.has_tag_name(tag)).collect::<Vec<_>>();
        tagged.into_iter().filter(|node| node.attribute("class").is_some_and(|c| c.contains(class))).collect::<Vec<_>>()
    };
    assert_eq!(of_class("span", "status")[0].text(), Some(state));
    // The lines of a chart by their names, with as many points as there are records.
    let n_points = |name: &str| {
        let lines = of_class("path", "line");
        let line = lines.iter().find(|line| line.attribute("data-name") == Some(name));
        line.unwrap_or_else(|| panic!("no line `{name}`")).attribute("data-values").unwrap().split(' ').count()
    };
    let (steps, evaluations, samples) = (records(run, "loss"), records(run, "eval_loss"), records(run, "sample"));
    assert_eq!((n_points("training"), n_points("validation")), (steps.len(), evaluations.len()));
    assert_eq!(n_points("bits/byte"), evaluations.len());
    for record in &evaluations {
        let loss = format!("{:.4}", record["eval_loss"].as_f64().unwrap());
        assert!(document.descendants().any(|n| n.has_tag_name("td") && n.text() == Some(&loss)), "{loss}");
    }
    let titles = document.descendants().filter(|n| n.has_tag_name("b")).filter_map(|n| n.text()).collect::<Vec<_>>();
    for title in ["Loss", "Learning rate", "Gradient norm", "Throughput", "Memory", "Block 0"] {
        assert!(titles.contains(&title), "{title} is not among {titles:?}");
    }
    let shown = document.descendants().filter(|n| n.has_tag_name("pre")).count();
    assert_eq!(shown, samples.len());
    let linked = document.descendants().flat_map(|n| n.attributes()).find(|a| ["src", "href"].contains(&a.name()));
    assert!(linked.is_none() && !page.contains("//cdn"), "the page needs something else: {linked:?}");
}

#[test]
fn a_run_leaves_a_page_that_shows_it_and_resuming_goes_on_with_it() {
    let folder = tempfile::tempdir().unwrap();
    // Whatever the model writes is made of what it read.
    let text = prose(4_000, 1).replace("river", "</script><svg onload='x'>").replace("stone", "&amp;\u{1}]]>");
    let (data, run) = (write(folder.path(), "text.txt", text), folder.path().join("run"));
    let flags = ["--steps=6", "--eval-every=2", "--sample-every=3", "--sample-prompt=</pre></script><svg>&\u{1}"];
    output_of(&mut train(&data, &run, &flags));
    assert_shows(&run, "finished");
    assert!(page(&run).contains("&lt;/pre&gt;&lt;/script&gt;&lt;svg&gt;&amp;␁"));
    assert_eq!(event_files(&run).len(), 1);
    output_of(&mut resume(&run, &["--steps=9"]));
    assert_shows(&run, "finished");
    assert_eq!(records(&run, "loss").len(), 9);
    assert_eq!(event_files(&run).len(), 2);
}

#[test]
fn a_run_without_report_has_neither_page_nor_events() {
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = (write(folder.path(), "text.txt", prose(4_000, 1)), folder.path().join("run"));
    output_of(&mut train(&data, &run, &["--steps=2", "--no-report"]));
    assert!(!run.join("report.html").exists() && !run.join("tensorboard").exists());
    // What it leaves out it can show later.
    output_of(&mut resume(&run, &["--steps=4"]));
    assert_shows(&run, "finished");
}

#[test]
fn a_report_that_cannot_be_written_does_not_end_the_training() {
    let folder = tempfile::tempdir().unwrap();
    let data = write(folder.path(), "text.txt", prose(4_000, 1));
    for (name, hurdle) in [("page", "report.html/taken"), ("events", "tensorboard")] {
        let run = folder.path().join(name);
        write(&run, hurdle, "");
        let (_, log) = outputs_of(&mut train(&data, &run, &["--steps=2"]));
        assert_eq!(log.matches("without report").count(), 1, "{log}");
        assert!(log.contains(hurdle.split('/').next().unwrap()), "{log}");
        assert_eq!(records(&run, "loss").len(), 2);
    }
}
