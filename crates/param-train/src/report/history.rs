//! What a run's records said so far, as much of it as its report draws.

use std::collections::BTreeMap;

use serde_json::Value;

use super::series::{Buckets, Latest, Point, Table};
use crate::metrics::{Fields, Kind};

/// Most points of a curve.
const MAX_POINTS: usize = 1024;
/// Most points of each of several curves in one chart.
const MAX_POINTS_OF_MANY: usize = 256;
/// Most cells of all heat maps together, and most and fewest columns of one.
const MAX_CELLS: usize = 60_000;
const MAX_COLUMNS: usize = 240;
const MIN_COLUMNS: usize = 40;
/// Most rows of the table of evaluations.
const MAX_ROWS: usize = 256;
/// Most samples of text.
const MAX_SAMPLES: usize = 24;

/// Curves by the name of their field: one, or one of each MoE block.
pub type Curves = BTreeMap<String, Vec<Buckets<Point>>>;

/// Everything that a report shows of the records.
pub struct History {
    n_moe: usize,
    n_expert: usize,
    /// Of steps.
    pub steps: Curves,
    /// Of evaluations.
    pub evaluations: Curves,
    /// Evaluations whole.
    pub rows: Buckets<Latest<Fields>>,
    /// Text that the model wrote.
    pub samples: Buckets<Latest<String>>,
    /// Share of the choices that each expert got: block by block.
    pub loads: Buckets<Table>,
    /// The newest step's record.
    pub latest: Fields,
    /// Step and loss of the best evaluation.
    pub best: Option<(u64, f64)>,
}

impl History {
    /// Of a run that has just begun.
    pub fn new(n_moe: usize, n_expert: usize) -> Self {
        let n_column = (MAX_CELLS / (n_moe * n_expert).max(1)).clamp(MIN_COLUMNS, MAX_COLUMNS);
        Self {
            n_moe,
            n_expert,
            steps: Curves::new(),
            evaluations: Curves::new(),
            rows: Buckets::new(MAX_ROWS),
            samples: Buckets::new(MAX_SAMPLES),
            loads: Buckets::new(n_column),
            latest: Fields::new(),
            best: None,
        }
    }

    /// Adds a record. What has no form that can be drawn is passed over.
    pub fn add(&mut self, step: u64, kind: Kind, fields: Fields) {
        match kind {
            Kind::Step => {
                fields.iter().for_each(|(field, content)| add_numbers(&mut self.steps, step, field, content));
                self.loads_of(&fields).into_iter().for_each(|loads| self.loads.push(step, Table::new(loads)));
                self.latest = fields;
            }
            Kind::Evaluation => {
                fields.iter().for_each(|(field, content)| add_numbers(&mut self.evaluations, step, field, content));
                let loss = fields.get("eval_loss").and_then(Value::as_f64);
                if let Some(loss) = loss.filter(|loss| self.best.is_none_or(|(_, best)| *loss < best)) {
                    self.best = Some((step, loss));
                }
                self.rows.push(step, Latest(fields));
            }
            Kind::Sample => {
                if let Some(text) = fields.get("sample").and_then(Value::as_str) {
                    self.samples.push(step, Latest(text.to_owned()));
                }
            }
            // The loads show it.
            Kind::Starved => {}
        }
    }

    /// A field of the newest step.
    pub fn now(&self, field: &str) -> Option<f64> {
        self.latest.get(field)?.as_f64()
    }

    /// The record's loads if they are of all blocks and experts.
    fn loads_of(&self, fields: &Fields) -> Option<Vec<f64>> {
        let blocks = fields.get("expert_load")?.as_array()?;
        let rows = blocks.iter().map(|row| row.as_array().filter(|row| row.len() == self.n_expert));
        let rows = rows.collect::<Option<Vec<_>>>()?;
        let loads = rows.into_iter().flatten().map(Value::as_f64).collect::<Option<Vec<_>>>()?;
        (self.n_moe > 0 && loads.len() == self.n_moe * self.n_expert).then_some(loads)
    }
}

/// Adds a number, or each number of a list, to the curves of its field.
fn add_numbers(curves: &mut Curves, step: u64, field: &str, content: &Value) {
    let one = std::slice::from_ref(content);
    let (numbers, capacity) = match content.as_array() {
        Some(list) if list.len() > 1 => (&list[..], MAX_POINTS_OF_MANY),
        Some(list) => (&list[..], MAX_POINTS),
        None => (one, MAX_POINTS),
    };
    if numbers.is_empty() || !numbers.iter().all(Value::is_number) {
        return;
    }
    let of_field = match curves.get_mut(field) {
        Some(curves) => curves,
        None => curves.entry(field.to_owned()).or_default(),
    };
    while of_field.len() < numbers.len() {
        of_field.push(Buckets::new(capacity));
    }
    for (curve, number) in of_field.iter_mut().zip(numbers) {
        number.as_f64().into_iter().for_each(|x| curve.push(step, Point::new(step, x)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::read_line;

    fn add(history: &mut History, line: &str) {
        let (step, kind, fields) = read_line(line).unwrap();
        history.add(step, kind, fields);
    }

    #[test]
    fn fields_of_any_version_are_taken_in_and_odd_ones_passed_over() {
        let mut history = History::new(2, 2);
        add(&mut history, r#"{"step":1,"loss":2.5,"expert_load":[[0.5,0.5],[0.1,0.9]]}"#);
        add(&mut history, r#"{"step":2,"loss":null,"router_entropy":[0.6,0.2],"expert_load":[[1.0]],"note":"?"}"#);
        add(&mut history, r#"{"step":2,"eval_loss":3.0,"bits_per_byte":1.5}"#);
        add(&mut history, r#"{"step":2,"sample":"text"}"#);
        add(&mut history, r#"{"step":2,"block":0,"starved_expert":1,"share":0.0,"balanced":0.5,"n_step":50}"#);
        assert_eq!(history.steps["loss"][0].iter().len(), 1);
        assert_eq!(history.steps["router_entropy"].len(), 2);
        assert_eq!(history.loads.iter().len(), 1, "of a model with as many experts");
        assert_eq!(history.best, Some((2, 3.0)));
        assert_eq!(history.samples.iter().next().unwrap().1.0, "text");
        assert!(!history.steps.contains_key("share") && history.latest.contains_key("loss"));
        assert!(!history.steps.contains_key("note") && read_line("{\"step\":13,\"lo").is_none());
    }
}
