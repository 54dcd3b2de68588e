//! What was left out of a data set and why: counted, with the first place of each kind, never fatal by itself.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Why a line of a JSONL file, a row or row group of a Parquet file, or a whole file gave no document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The line is not JSON.
    BadJson,
    /// The line, or the text of the row, is not UTF-8.
    NotUtf8Line,
    /// The line is not an object, or lacks the text field; the row has null there.
    MissingField,
    /// The text field is there but is not a string.
    NotAString,
    /// The text is empty or only whitespace.
    EmptyText,
    /// The line is longer than 256 MiB.
    LineTooLong,
    /// The row group is damaged: none of its rows from there on are taken.
    BadRowGroup,
    /// A file found in a folder or by a glob is binary or not UTF-8.
    BinaryFile,
    /// A file is empty or only whitespace.
    EmptyFile,
}

impl Reason {
    /// Where that was, by the number in its file of a line, row or row group, from 1.
    pub(super) fn place(self, path: &Path, number: u64) -> String {
        match self {
            Self::BadRowGroup => format!("{}, row group {number}", path.display()),
            _ => format!("{}:{number}", path.display()),
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::BadJson => "bad JSON",
            Self::NotUtf8Line => "not UTF-8",
            Self::MissingField => "text field missing",
            Self::NotAString => "text field not a string",
            Self::EmptyText => "empty text",
            Self::LineTooLong => "line too long",
            Self::BadRowGroup => "damaged row group",
            Self::BinaryFile => "binary file",
            Self::EmptyFile => "empty file",
        }
    }
}

/// How often one [`Reason`] occurred, and where first (`path`, `path:line` or `path, row group number`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Number of lines, rows, row groups or files.
    pub count: u64,
    /// The first of them in reading order.
    pub first: String,
}

/// Everything that was left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Skipped(pub BTreeMap<Reason, Tally>);

impl Skipped {
    /// True if nothing was left out.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn add(&mut self, reason: Reason, count: u64, first: impl FnOnce() -> String) {
        self.0.entry(reason).or_insert_with(|| Tally { count: 0, first: first() }).count += count;
    }

    /// Adds what `later`, further on in reading order, left out.
    pub(super) fn merge(&mut self, later: Self) {
        for (reason, Tally { count, first }) in later.0 {
            self.add(reason, count, || first);
        }
    }
}

/// One line for a person: ``2 bad JSON (first at a.jsonl:3), 1 empty text (first at a.jsonl:9)``.
impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (reason, Tally { count, first })) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{count} {} (first at {first})", reason.words())?;
        }
        Ok(())
    }
}
