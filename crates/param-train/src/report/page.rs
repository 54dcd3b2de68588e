//! The page: header, charts, heat maps, samples and tables in one file that is HTML and well-formed XML at once.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::about::About;
use super::axis::{Scale, grouped, short};
use super::chart::{Chart, Line};
use super::heat::{self, HeatMap};
use super::history::{Curves, History};
use super::markup::{escape, pairs};
use super::series::{Buckets, Point, smooth};
use super::{REPORT_FILE, Status};

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// Sizes of a chart across the page, and of one beside another.
const WIDE: (f64, f64) = (1240.0, 340.0);
const NARROW: (f64, f64) = (600.0, 220.0);

/// Width of the smoothing as a share of a curve's points, and what it is at least.
const SMOOTHING: f64 = 0.01;
const MIN_SMOOTHING: f64 = 2.0;

/// What a field's numbers count, and so how they are shown.
#[derive(Clone, Copy, PartialEq)]
enum Unit {
    Of(&'static str),
    Percent,
    Bytes,
}

/// How a field of the metrics is shown.
struct Known {
    field: &'static str,
    title: &'static str,
    unit: Unit,
    scale: Scale,
    /// Shown only where it is not zero throughout.
    is_optional: bool,
}

const fn known(field: &'static str, title: &'static str, unit: Unit) -> Known {
    Known { field, title, unit, scale: Scale::Linear, is_optional: false }
}

const fn optional(field: &'static str, title: &'static str, unit: Unit) -> Known {
    Known { is_optional: true, ..known(field, title, unit) }
}

/// Fields of a step with a chart of their own, in the page's order. A field that is not here is shown after them by its name.
const KNOWN: [Known; 10] = [
    known("lr", "Learning rate", Unit::Of("")),
    Known { scale: Scale::Log, ..known("grad_norm", "Gradient norm", Unit::Of("before clipping, log scale")) },
    known("tokens_per_s", "Throughput", Unit::Of("tokens/s")),
    known("mfu", "Model FLOPs utilisation", Unit::Percent),
    known("memory", "Memory", Unit::Bytes),
    known("loss", "Training loss with router terms", Unit::Of("nats/token")),
    optional("aux", "Load-balancing loss", Unit::Of("sum over blocks, unweighted")),
    optional("z", "Router z loss", Unit::Of("sum over blocks, unweighted")),
    known("router_entropy", "Router entropy", Unit::Of("nats, by MoE block")),
    optional("n_dropped", "Dropped choices", Unit::Of("a step")),
];
/// Shown elsewhere, or with nothing in them to see.
const NOT_CHARTED: [&str; 5] = ["step", "ce", "seconds", "n_target", "epoch"];

/// The page of a run.
pub fn page(about: &About, history: &History, status: &Status) -> String {
    let state = match status {
        Status::Running => "running",
        Status::Finished => "finished",
        Status::Stopped => "stopped",
        Status::Failed(_) => "failed",
    };
    let name = escape(&about.name);
    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n<title>{name}: step {}, {state}</title>\n\
         <style>\n{STYLE}{}</style>\n</head>\n<body data-status=\"{state}\">\n",
        grouped(history.now("step").unwrap_or(0.0) as u64),
        heat::style(),
    );
    out += &header(about, history, status, state);
    out += "<main>\n";
    out += &losses(history).figure("loss");
    out += "<div class=\"grid\">\n";
    let charts = bits_per_byte(history).into_iter().chain(step_charts(about, history));
    charts.enumerate().for_each(|(i, chart)| out += &chart.figure(&format!("chart{i}")));
    out += "</div>\n";
    out += &heat_maps(about, history);
    out += &samples(history);
    out += &evaluations(history);
    out += "<section>\n<h2>Configuration</h2>\n<div class=\"columns\">\n";
    for (title, rows) in [("Data", &about.data), ("Settings", &about.settings), ("Model", &about.model)] {
        let _ = write!(out, "<div><h3>{title}</h3>\n{}</div>\n", pairs(rows));
    }
    let _ = write!(
        out,
        "</div>\n</section>\n</main>\n<div id=\"tip\" hidden=\"hidden\"></div>\n\
         <script>/*<![CDATA[*/\n{SCRIPT}/*]]>*/</script>\n</body>\n</html>\n<!-- {REPORT_FILE} -->\n"
    );
    out
}

fn header(about: &About, history: &History, status: &Status, state: &str) -> String {
    let step = history.now("step").unwrap_or(0.0);
    let seconds = history.now("seconds").unwrap_or(0.0);
    let share = (step / about.total.max(1) as f64).min(1.0);
    let mut tiles = vec![("step", format!("{} / {}", grouped(step as u64), grouped(about.total)))];
    let mut tile = |name, field: &str, show: &dyn Fn(f64) -> String| {
        history.now(field).into_iter().for_each(|x| tiles.push((name, show(x))));
    };
    tile("tokens", "n_target", &|x| grouped(x as u64));
    tile("epochs", "epoch", &|x| format!("{x:.2}"));
    tile("training time", "seconds", &duration);
    let left = (about.total as f64 - step).max(0.0) * seconds / step.max(1.0);
    if *status == Status::Running && step > 0.0 {
        tiles.push(("left, about", duration(left)));
    }
    if let Some((step, loss)) = history.best {
        tiles.push(("best validation loss", format!("{loss:.4} at step {}", grouped(step))));
    }
    let mean = |field: &str| history.steps.get(field).and_then(|curves| recent(&curves[0]));
    mean("tokens_per_s").into_iter().for_each(|x| tiles.push(("tokens/s, recently", grouped(x as u64))));
    mean("mfu").into_iter().for_each(|x| tiles.push(("MFU, recently", format!("{:.0}%", 100.0 * x))));
    history.now("memory").into_iter().for_each(|x| {
        let (unit, size) = bytes(x);
        tiles.push(("peak memory", format!("{} {unit}", short(x / size))));
    });

    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let mut out = format!(
        "<header>\n<h1>{} <span class=\"status {state}\">{state}</span></h1>\n<p>{}</p>\n",
        escape(&about.name),
        escape(&about.summary)
    );
    if let Status::Failed(problem) = status {
        let _ = writeln!(out, "<p class=\"problem\">{}</p>", escape(problem));
    }
    let _ = writeln!(
        out,
        "<p class=\"updated\">drawn <time data-unix=\"{now}\"></time></p>\n\
         <div class=\"bar\"><div style=\"width:{:.2}%\"></div></div>\n<dl>",
        100.0 * share
    );
    for (name, value) in tiles {
        let _ = writeln!(out, "<div><dt>{name}</dt><dd>{}</dd></div>", escape(&value));
    }
    out + "</dl>\n</header>\n"
}

/// Training and validation loss on one pair of axes. The training loss is the cross-entropy alone: with the router's terms in
/// it, it would not be of the same thing.
fn losses(history: &History) -> Chart {
    let mut lines = Vec::new();
    if let Some(curve) = history.steps.get("ce") {
        lines.extend(smoothed("training", &curve[0]));
    }
    lines.extend(evaluated(&history.evaluations, "eval_loss", "validation"));
    Chart {
        title: "Loss".to_owned(),
        unit: "cross-entropy, nats/token".to_owned(),
        scale: Scale::Linear,
        size: WIDE,
        last_step: last_step(history),
        lines,
        references: Vec::new(),
    }
}

fn bits_per_byte(history: &History) -> Option<Chart> {
    Some(Chart {
        title: "Validation".to_owned(),
        unit: "bits/byte".to_owned(),
        scale: Scale::Linear,
        size: NARROW,
        last_step: last_step(history),
        lines: vec![evaluated(&history.evaluations, "bits_per_byte", "bits/byte")?],
        references: Vec::new(),
    })
}

/// A chart of each other field of the steps.
fn step_charts(about: &About, history: &History) -> Vec<Chart> {
    let named = KNOWN.iter().map(|known| known.field).collect::<Vec<_>>();
    let other = history.steps.keys().filter(|f| !named.contains(&f.as_str()) && !NOT_CHARTED.contains(&f.as_str()));
    let other = other.map(|field| (field.as_str(), None));
    let all = KNOWN.iter().map(|known| (known.field, Some(known))).chain(other);
    all.filter_map(|(field, known)| step_chart(about, history, field, known)).collect()
}

fn step_chart(about: &About, history: &History, field: &str, known: Option<&Known>) -> Option<Chart> {
    let curves = history.steps.get(field)?;
    let greatest = curves.iter().flat_map(Buckets::iter).map(|(_, p)| p.max).fold(f64::NEG_INFINITY, f64::max);
    if known.is_some_and(|known| known.is_optional) && greatest == 0.0 {
        return None;
    }
    let (unit, size) = match known.map_or(Unit::Of(""), |known| known.unit) {
        Unit::Of(unit) => (unit, 1.0),
        Unit::Percent => ("% of what the machine can do", 0.01),
        Unit::Bytes => bytes(greatest),
    };
    let mut lines = match &curves[..] {
        [one] if field == "lr" || field == "memory" => vec![plain(field, one, 0)],
        [one] => smoothed("", one),
        many => {
            let name = |i: usize| format!("block {}", about.moe_blocks.get(i).unwrap_or(&i));
            many.iter().enumerate().map(|(i, curve)| plain(&name(i), curve, i)).collect()
        }
    };
    for line in &mut lines {
        line.points.iter_mut().for_each(|(_, y)| *y /= size);
        line.band.iter_mut().for_each(|(_, min, max)| (*min, *max) = (*min / size, *max / size));
    }
    let clip = (field == "grad_norm").then(|| (about.clip, format!("clipped to {}", short(about.clip))));
    Some(Chart {
        title: known.map_or_else(|| field.replace('_', " "), |known| known.title.to_owned()),
        unit: unit.to_owned(),
        scale: known.map_or(Scale::Linear, |known| known.scale),
        size: NARROW,
        last_step: last_step(history),
        lines,
        references: clip.into_iter().collect(),
    })
}

fn plain(name: &str, curve: &Buckets<Point>, color: usize) -> Line {
    let points = curve.iter().map(|(_, p)| (p.step, p.mean)).collect();
    Line { name: name.to_owned(), color, points, ..Line::default() }
}

/// A noisy curve faintly, with the range that its points stand for, and a smooth one over it; of few points, only these.
fn smoothed(name: &str, curve: &Buckets<Point>) -> Vec<Line> {
    let points = curve.iter().map(|(_, p)| *p).collect::<Vec<_>>();
    let sigma = (SMOOTHING * points.len() as f64).max(MIN_SMOOTHING);
    let named = |what: &str| [name, what].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", ");
    let raw = match (curve.stride(), name) {
        (1, "") => "each step".to_owned(),
        (1, _) => name.to_owned(),
        (n, _) => named(&format!("mean and range of {n} steps")),
    };
    if (points.len() as f64) < 5.0 * sigma {
        return vec![Line { is_marked: true, ..plain(&raw, curve, 0) }];
    }
    let band = points.iter().map(|p| (p.step, p.min, p.max)).collect();
    let smooth = Line { name: named("smoothed"), points: smooth(&points, sigma), ..Line::default() };
    vec![Line { is_faint: true, band, ..plain(&raw, curve, 0) }, smooth]
}

fn evaluated(curves: &Curves, field: &str, name: &str) -> Option<Line> {
    let curve = &curves.get(field)?[0];
    Some(Line { is_marked: curve.iter().len() <= 64, ..plain(name, curve, 1) })
}

fn heat_maps(about: &About, history: &History) -> String {
    let Some((first, _)) = history.loads.iter().next() else { return String::new() };
    let stride = history.loads.stride();
    let n_expert = about.n_expert;
    let mut out = format!(
        "<section>\n<h2>Load of the experts</h2>\n<p>Share of the choices that each expert got, as a multiple of the \
         balanced share, which is 1/{n_expert}; an expert a row, steps to the right.</p>\n{}<div class=\"grid\">\n",
        heat::legend()
    );
    for (i, block) in about.moe_blocks.iter().enumerate() {
        let columns = history.loads.iter().map(|(_, table)| &table.mean[i * n_expert..][..n_expert]).collect();
        let steps = (first / stride * stride, stride);
        let title = format!("Block {block}");
        out += &HeatMap { title, n_expert, width: NARROW.0, steps, columns }.figure();
    }
    out + "</div>\n</section>\n"
}

fn samples(history: &History) -> String {
    if history.samples.iter().len() == 0 {
        return String::new();
    }
    let mut out = "<section>\n<h2>Samples</h2>\n".to_owned();
    for (i, (step, sample)) in history.samples.iter().rev().enumerate() {
        let open = if i < 3 { " open=\"open\"" } else { "" };
        let _ = writeln!(
            out,
            "<details{open}><summary>step {}</summary><pre>{}</pre></details>",
            grouped(step),
            escape(&sample.0)
        );
    }
    out + "</section>\n"
}

fn evaluations(history: &History) -> String {
    if history.rows.iter().len() == 0 {
        return String::new();
    }
    let mut out = "<section>\n<h2>Evaluations</h2>\n<div class=\"scroll\"><table><thead><tr><th>step</th>\
        <th>loss, nats/token</th><th>perplexity</th><th>bits/byte</th><th>tokens</th><th>seconds</th></tr></thead><tbody>\n"
        .to_owned();
    for (step, row) in history.rows.iter().rev() {
        let number = |field: &str| row.0.get(field).and_then(Value::as_f64);
        let show = |x: Option<f64>, decimals: usize| x.map_or_else(String::new, |x| format!("{x:.decimals$}"));
        let loss = number("eval_loss");
        let best = if history.best.is_some_and(|(best, _)| best == step) { " class=\"best\"" } else { "" };
        let _ = writeln!(
            out,
            "<tr{best}><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            grouped(step),
            show(loss, 4),
            loss.map_or_else(String::new, |loss| short(loss.exp())),
            show(number("bits_per_byte"), 4),
            number("n_target").map_or_else(String::new, |n| grouped(n as u64)),
            show(number("seconds"), 1),
        );
    }
    out + "</tbody></table></div>\n</section>\n"
}

fn last_step(history: &History) -> f64 {
    history.now("step").unwrap_or(0.0)
}

/// Mean over the last twentieth of a curve.
fn recent(curve: &Buckets<Point>) -> Option<f64> {
    let n = curve.iter().len().div_ceil(20);
    (n > 0).then(|| curve.iter().rev().take(n).map(|(_, p)| p.mean).sum::<f64>() / n as f64)
}

/// The unit in which a number of bytes is read easily, and its size.
fn bytes(most: f64) -> (&'static str, f64) {
    if most < (4u64 << 30) as f64 { ("MiB", (1 << 20) as f64) } else { ("GiB", (1 << 30) as f64) }
}

fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        3600..86_400 => format!("{} h {} min", whole / 3600, whole / 60 % 60),
        _ => format!("{} d {} h", whole / 86_400, whole / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{StepRecord, read_line};

    const RECORD: &str = r#"{"step":1,"loss":2.5,"ce":2.4,"aux":2.0,"z":1.0,"grad_norm":0.5,"lr":0.001,"tokens_per_s":100.0,
        "mfu":0.4,"memory":1000,"seconds":1.0,"n_target":64,"epoch":0.1,"n_dropped":3,"expert_load":[[0.5,0.5]]}"#;

    fn about(name: &str) -> About {
        About {
            name: name.to_owned(),
            summary: name.to_owned(),
            model: vec![(name.to_owned(), name.to_owned())],
            data: Vec::new(),
            settings: Vec::new(),
            moe_blocks: vec![1],
            n_expert: 2,
            total: 100_000,
            clip: 1.0,
        }
    }

    fn parsed(page: &str) -> roxmltree::Document<'_> {
        let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
        roxmltree::Document::parse_with_options(page, options).unwrap()
    }

    #[test]
    fn fields_with_a_chart_are_fields_of_a_step() {
        let record: StepRecord = serde_json::from_str(RECORD).unwrap();
        let record = serde_json::to_value(record).unwrap();
        let charted = KNOWN.iter().map(|known| known.field);
        for field in charted.chain(NOT_CHARTED) {
            assert!(record.get(field).is_some(), "{field}");
        }
    }

    #[test]
    fn a_page_without_records_and_one_with_hostile_names_are_well_formed() {
        let name = "</title></script><svg onload=\"alert('x')\">&\0]]>";
        let status = Status::Failed(name.to_owned());
        let empty = page(&about(name), &History::new(1, 2), &status);
        let document = parsed(&empty);
        let h1 = document.descendants().find(|node| node.has_tag_name("h1")).unwrap();
        assert_eq!(h1.text().unwrap().trim(), name.replace('\0', "␀"));
        assert!(!empty.contains("onload=\""));
    }

    #[test]
    fn a_page_stays_small_however_long_the_run_is() {
        let mut history = History::new(1, 2);
        for step in 1..=50_000 {
            let record = RECORD.replace("\"step\":1,", &format!("\"step\":{step},\"surprise\":[{step},1],"));
            let eval = format!("{{\"step\":{step},\"eval_loss\":2.0,\"bits_per_byte\":1.0}}");
            let sample = format!("{{\"step\":{step},\"sample\":\"text at {step}\"}}");
            for line in [record, eval, sample] {
                let (step, kind, fields) = read_line(&line).unwrap();
                history.add(step, kind, fields);
            }
        }
        let page = page(&about("run"), &history, &Status::Running);
        assert!(page.len() < 1 << 20, "{} bytes", page.len());
        let document = parsed(&page);
        let titles =
            document.descendants().filter(|n| n.has_tag_name("b")).filter_map(|n| n.text()).collect::<Vec<_>>();
        assert!(["Loss", "Dropped choices", "surprise", "Block 1"].iter().all(|t| titles.contains(t)), "{titles:?}");
        assert!(page.contains("text at 50000"));
    }
}
