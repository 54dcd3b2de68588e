//! Line charts as SVG: axes, a grid, lines with what they leave out behind them, and the numbers that hovering shows.

use std::fmt::Write;

use super::axis::{Axis, Scale, short};
use super::markup::escape;

/// Space around the plot, in the units of a chart's size: at the left and right, above and below.
const LEFT: f64 = 54.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 24.0;

/// Colours that the style sheet has for lines.
const N_COLOR: usize = 8;

/// A line of a chart.
#[derive(Default)]
pub struct Line {
    /// In the legend.
    pub name: String,
    /// Which of the style sheet's colours it has.
    pub color: usize,
    /// Faint, behind others.
    pub is_faint: bool,
    /// With a mark at every point: where there are few, between which nothing was measured.
    pub is_marked: bool,
    /// Step, value.
    pub points: Vec<(f64, f64)>,
    /// Step, least, greatest: drawn as an area.
    pub band: Vec<(f64, f64, f64)>,
}

/// A chart of numbers by step.
pub struct Chart {
    /// What it shows.
    pub title: String,
    /// What its numbers count; may be empty.
    pub unit: String,
    /// Scale of the numbers.
    pub scale: Scale,
    /// Width and height.
    pub size: (f64, f64),
    /// Last step on the axis.
    pub last_step: f64,
    /// The later above the earlier.
    pub lines: Vec<Line>,
    /// Numbers to compare with, and what each is.
    pub references: Vec<(f64, String)>,
}

/// The rectangle in which lines lie, with its axes.
pub struct Plot {
    size: (f64, f64),
    x: Axis,
    y: Axis,
}

impl Plot {
    /// The plot of a drawing of this size.
    pub fn new(size: (f64, f64), x: Axis, y: Axis) -> Self {
        Self { size, x, y }
    }

    /// Left, top, width, height.
    pub fn area(&self) -> (f64, f64, f64, f64) {
        (LEFT, TOP, self.size.0 - LEFT - RIGHT, self.size.1 - TOP - BOTTOM)
    }

    fn at(&self, step: f64, value: f64) -> (f64, f64) {
        let (left, top, width, height) = self.area();
        (left + width * self.x.position(step), top + height * (1.0 - self.y.position(value)))
    }

    /// The start tag, which tells the script where what lies.
    pub fn open(&self, class: &str, label: &str) -> String {
        let (left, top, width, height) = self.area();
        let (w, h) = self.size;
        let log = u8::from(self.y.scale == Scale::Log);
        format!(
            "<svg class=\"{class}\" viewBox=\"0 0 {w} {h}\" role=\"img\" aria-label=\"{}\" \
             data-area=\"{left} {top} {width} {height}\" data-x=\"{} {}\" data-y=\"{} {} {log}\">\n",
            escape(label),
            self.x.low,
            self.x.high,
            self.y.low,
            self.y.high,
        )
    }

    /// The steps below the plot.
    pub fn steps(&self) -> String {
        let (left, top, width, height) = self.area();
        let mut out = String::new();
        let base = top + height;
        let _ = writeln!(out, "<text class=\"y\" x=\"{:.1}\" y=\"{:.1}\">step</text>", left - 7.0, base + 16.0);
        // There is nothing between two steps.
        let n = (width / 110.0).min(self.x.high - self.x.low) as usize;
        for (x, label) in self.x.ticks(n) {
            let at = left + width * self.x.position(x);
            let _ = write!(out, "<path class=\"tick\" d=\"M{at:.1} {base:.1}v4\"/>");
            let _ = writeln!(out, "<text class=\"x\" x=\"{at:.1}\" y=\"{:.1}\">{label}</text>", base + 16.0);
        }
        out
    }

    fn grid(&self) -> String {
        let (left, top, width, height) = self.area();
        let mut out = String::new();
        for (y, label) in self.y.ticks((height / 38.0) as usize) {
            let at = top + height * (1.0 - self.y.position(y));
            let _ = write!(out, "<path class=\"grid\" d=\"M{left} {at:.1}h{width}\"/>");
            let _ = writeln!(out, "<text class=\"y\" x=\"{:.1}\" y=\"{:.1}\">{label}</text>", left - 7.0, at + 4.0);
        }
        out
    }
}

impl Chart {
    /// The chart as a figure with title and legend; `id` is its own within the page.
    pub fn figure(&self, id: &str) -> String {
        let references = self.references.iter().map(|(x, _)| *x);
        let numbers = self.lines.iter().flat_map(|line| line.points.iter().map(|(_, y)| *y));
        let bands = self.lines.iter().flat_map(Line::usual_range);
        let y = Axis::around(self.scale, numbers.chain(bands).chain(references));
        let x = Axis { scale: Scale::Linear, low: 0.0, high: self.last_step.max(1.0) };
        let plot = Plot::new(self.size, x, y);
        let (left, top, width, height) = plot.area();
        let mut out = format!("<figure>\n{}", self.caption());
        out += &plot.open("chart", &self.title);
        let _ = writeln!(
            out,
            "<clipPath id=\"{id}\"><rect x=\"{left}\" y=\"{top}\" width=\"{}\" height=\"{height}\"/></clipPath>",
            width + 4.0 // the whole of the last mark
        );
        out += &plot.grid();
        out += &plot.steps();
        let _ = writeln!(out, "<g clip-path=\"url(#{id})\">");
        self.lines.iter().for_each(|line| line.draw(&plot, &mut out));
        out += "</g>\n";
        for (value, name) in &self.references {
            let (x, y) = plot.at(plot.x.high, *value);
            let _ = write!(out, "<path class=\"reference\" d=\"M{left} {y:.1}h{width}\"/>");
            // Above the line, but for a line at the top.
            let y = if y < top + 16.0 { y + 14.0 } else { y - 5.0 };
            let _ =
                writeln!(out, "<text class=\"reference\" x=\"{:.1}\" y=\"{y:.1}\">{}</text>", x - 4.0, escape(name));
        }
        out + "<g class=\"hover\"></g></svg>\n</figure>\n"
    }

    fn caption(&self) -> String {
        let mut out = format!("<figcaption><b>{}</b>", escape(&self.title));
        if !self.unit.is_empty() {
            let _ = write!(out, " <span class=\"unit\">{}</span>", escape(&self.unit));
        }
        if self.lines.len() > 1 {
            for line in &self.lines {
                let (color, faint) = (line.color % N_COLOR, if line.is_faint { " faint" } else { "" });
                let _ =
                    write!(out, "<span class=\"key\"><i class=\"c{color}{faint}\"></i>{}</span>", escape(&line.name));
            }
        }
        out + "</figcaption>\n"
    }
}

impl Line {
    /// What the band spans but for its greatest outliers, which would leave the rest of a chart flat.
    fn usual_range(&self) -> Vec<f64> {
        let mut ends = [self.band.iter().map(|b| b.1).collect::<Vec<_>>(), self.band.iter().map(|b| b.2).collect()];
        ends.iter_mut().for_each(|end| end.sort_by(f64::total_cmp));
        let [least, greatest] = ends;
        let n = self.band.len() / 50;
        least.get(n).into_iter().chain(greatest.iter().rev().nth(n)).copied().collect()
    }

    fn draw(&self, plot: &Plot, out: &mut String) {
        let color = self.color % N_COLOR;
        let path = |points: &mut dyn Iterator<Item = (f64, f64)>| {
            let mut d = String::new();
            for (i, (step, value)) in points.enumerate() {
                let (x, y) = plot.at(step, value);
                let _ = write!(d, "{}{x:.1} {y:.1}", if i == 0 { 'M' } else { 'L' });
            }
            d
        };
        if self.band.iter().any(|(_, min, max)| min < max) {
            let above = self.band.iter().map(|(step, _, max)| (*step, *max));
            let below = self.band.iter().rev().map(|(step, min, _)| (*step, *min));
            let _ = writeln!(out, "<path class=\"band c{color}\" d=\"{}Z\"/>", path(&mut above.chain(below)));
        }
        let faint = if self.is_faint { " faint" } else { "" };
        let list = |numbers: &mut dyn Iterator<Item = String>| numbers.collect::<Vec<_>>().join(" ");
        let _ = writeln!(
            out,
            "<path class=\"line c{color}{faint}\" d=\"{}\" data-name=\"{}\" data-steps=\"{}\" data-values=\"{}\"/>",
            path(&mut self.points.iter().copied()),
            escape(&self.name),
            list(&mut self.points.iter().map(|(step, _)| format!("{step:.0}"))),
            list(&mut self.points.iter().map(|(_, value)| significant(*value))),
        );
        // A line through one point is none.
        if self.is_marked || self.points.len() == 1 {
            for &(step, value) in &self.points {
                let (x, y) = plot.at(step, value);
                let _ = write!(out, "<circle class=\"c{color}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>");
            }
        }
    }
}

/// Five digits, which is more than a chart shows, in the shortest form.
fn significant(x: f64) -> String {
    format!("{x:.4e}").parse::<f64>().map_or_else(|_| short(x), |x| x.to_string())
}
