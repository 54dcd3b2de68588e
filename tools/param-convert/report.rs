//! The closing table: what became of each group of tensors, and what was left out.

use std::collections::BTreeMap;
use std::fmt::Write;

use gguf::GgmlType;
use indicatif::BinaryBytes;
use param_model::Role;

use crate::convert::Converted;
use crate::plan::Plan;

/// One line of the table.
#[derive(Default)]
struct Group {
    n_tensor: usize,
    n_bytes_before: u64,
    n_bytes_after: u64,
    error: f64,
    square: f64,
}

impl Group {
    fn add(&mut self, n_tensor: usize, n_bytes_after: u64, converted: &Converted) {
        self.n_tensor += n_tensor;
        self.n_bytes_before += converted.n_bytes_read;
        self.n_bytes_after += n_bytes_after;
        self.error += converted.error;
        self.square += converted.square;
    }

    fn line(&self, name: &str, ty: &str) -> String {
        let bytes = |n| BinaryBytes(n).to_string();
        // The error relative to the weights; a group of zeros has none.
        let rms = if self.error == 0.0 { 0.0 } else { 100.0 * (self.error / self.square).sqrt() };
        let (before, after) = (bytes(self.n_bytes_before), bytes(self.n_bytes_after));
        format!("{name:<24}{ty:<8}{:>7}{before:>13}{after:>13}{rms:>10.3}%\n", self.n_tensor)
    }
}

/// The table as text: one line per role and type, a total, and a line per fallback.
pub fn table(plan: &Plan, converted: &[Converted]) -> String {
    let mut groups = BTreeMap::<(Role, GgmlType), Group>::new();
    let mut fallbacks = BTreeMap::<(GgmlType, GgmlType, u64), usize>::new();
    let mut total = Group::default();
    for (entry, converted) in plan.entries.iter().zip(converted) {
        let (ty, n_bytes) = (entry.info.ty, entry.info.n_bytes);
        groups.entry((entry.spec.role, ty)).or_default().add(1, n_bytes, converted);
        total.add(1, n_bytes, converted);
        if let Some(wanted) = entry.unfit {
            *fallbacks.entry((wanted, ty, entry.info.ne[0])).or_default() += 1;
        }
    }
    let mut text =
        format!("{:<24}{:<8}{:>7}{:>13}{:>13}{:>11}\n", "group", "type", "tensors", "before", "after", "RMS error");
    for ((role, ty), group) in &groups {
        text += &group.line(role.name(), ty.name());
    }
    text += &total.line("total", "");
    for ((wanted, ty, n_per_row), n) in fallbacks {
        let (tensors, block) = (if n == 1 { "tensor" } else { "tensors" }, wanted.block_size());
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{n} {tensors} in {ty} instead of {wanted}: rows of {n_per_row} are not whole blocks of {block}"
        );
    }
    text
}
