//! Heat maps of the experts' load: an expert a row, time to the right, colours by how far from balanced.

use std::fmt::Write;

use super::axis::{Axis, Scale};
use super::chart::Plot;
use super::markup::escape;

/// Steps of the colour scale on either side of balanced, and how many of them a factor of two is.
const LEVELS: i32 = 8;
const PER_OCTAVE: f64 = 4.0;
/// Share of its balanced load below which an expert counts as dead.
const DEAD: f64 = 0.01;

/// The loads of one block's experts.
pub struct HeatMap<'a> {
    /// What block it is.
    pub title: String,
    /// Experts.
    pub n_expert: usize,
    /// Width.
    pub width: f64,
    /// First step and steps of a column.
    pub steps: (u64, u64),
    /// Shares of the load, by column and expert.
    pub columns: Vec<&'a [f64]>,
}

/// The class of a load, given as a multiple of balanced: -8 to 8, 0 where balanced, or none where dead.
fn level(multiple: f64) -> Option<i32> {
    // `as` brings what is infinite or too large to the ends.
    (multiple >= DEAD).then(|| ((PER_OCTAVE * multiple.log2()).round() as i32).clamp(-LEVELS, LEVELS))
}

fn class(level: Option<i32>) -> String {
    level.map_or_else(|| "dead".to_owned(), |level| format!("h{}", level + LEVELS))
}

impl HeatMap<'_> {
    /// The map as a figure with its title.
    pub fn figure(&self) -> String {
        let row = (160.0 / self.n_expert as f64).clamp(3.0, 22.0);
        let (first, stride) = self.steps;
        let n_column = self.columns.len().max(1);
        let x = Axis { scale: Scale::Linear, low: first as f64, high: (first + stride * n_column as u64) as f64 };
        let y = Axis { scale: Scale::Linear, low: 0.0, high: self.n_expert as f64 };
        let mut size = (self.width, 0.0);
        let (_, top, _, rest) = Plot::new(size, x, y).area();
        size.1 = row * self.n_expert as f64 - rest;
        let plot = Plot::new(size, x, y);
        let (left, _, width, _) = plot.area();

        let mut out = format!("<figure>\n<figcaption><b>{}</b></figcaption>\n", escape(&self.title));
        let open = plot.open("heat", &format!("{}: load of each expert by step", self.title));
        out += open.trim_end().trim_end_matches('>');
        let _ = writeln!(out, " data-stride=\"{stride}\" data-values=\"{}\">", self.percentages());
        let _ = writeln!(
            out,
            "<g transform=\"translate({left} {:.2}) scale({:.5} {row:.3})\">",
            top + 0.5 * row,
            width / n_column as f64
        );
        for level in std::iter::once(None).chain((-LEVELS..=LEVELS).map(Some)) {
            let d = self.runs(level);
            if !d.is_empty() {
                let _ = writeln!(out, "<path class=\"{}\" d=\"{d}\"/>", class(level));
            }
        }
        out += "</g>\n";
        // As many experts are numbered as there is room for.
        let every = (12.0 / row).ceil() as usize;
        for expert in (0..self.n_expert).step_by(every) {
            let at = top + row * (expert as f64 + 0.5) + 4.0;
            let _ = writeln!(out, "<text class=\"y\" x=\"{:.1}\" y=\"{at:.1}\">{expert}</text>", left - 7.0);
        }
        out += &plot.steps();
        out + "<g class=\"hover\"></g></svg>\n</figure>\n"
    }

    /// All cells of one class as strokes, neighbours in one.
    fn runs(&self, of: Option<i32>) -> String {
        let mut d = String::new();
        for expert in 0..self.n_expert {
            let is_in = |column: &&[f64]| level(column[expert] * self.n_expert as f64) == of;
            let mut at = 0;
            for run in self.columns.chunk_by(|a, b| is_in(a) == is_in(b)) {
                if is_in(&run[0]) {
                    let _ = write!(d, "M{at} {expert}h{}", run.len());
                }
                at += run.len();
            }
        }
        d
    }

    /// Percent of balanced, expert by expert.
    fn percentages(&self) -> String {
        let percent = |x: f64| format!("{:.0}", 100.0 * x * self.n_expert as f64);
        let row = |expert: usize| self.columns.iter().map(|c| percent(c[expert])).collect::<Vec<_>>().join(" ");
        (0..self.n_expert).map(row).collect::<Vec<_>>().join(";")
    }
}

/// What the colours mean.
pub fn legend() -> String {
    let (cell, n) = (16.0, 2 * LEVELS + 1);
    let mut out = format!(
        "<svg class=\"legend\" viewBox=\"0 0 420 36\" role=\"img\" aria-label=\"colours of the heat maps\">\n\
         <path class=\"dead\" d=\"M20 0v14\" style=\"stroke-width:{cell}\"/><text x=\"20\" y=\"30\">dead</text>\n"
    );
    for i in 0..n {
        let x = 80.0 + cell * f64::from(i);
        let _ = write!(out, "<path class=\"h{i}\" d=\"M{x} 0v14\" style=\"stroke-width:{cell}\"/>");
        if (i - LEVELS) % PER_OCTAVE as i32 == 0 {
            let label = ["≤ ¼×", "½×", "1/E", "2×", "≥ 4×"][(i / PER_OCTAVE as i32) as usize];
            let _ = writeln!(out, "<text x=\"{x}\" y=\"30\">{label}</text>");
        }
    }
    out + "</svg>\n"
}

/// The classes' colours, mixed of those that the style sheet names: between themes, nothing else differs.
pub fn style() -> String {
    let rule = |level: i32| {
        let (end, share) = (if level < 0 { "cold" } else { "hot" }, 100 * level.abs() / LEVELS);
        format!(".h{}{{stroke:color-mix(in oklab,var(--{end}) {share}%,var(--even))}}\n", level + LEVELS)
    };
    (-LEVELS..=LEVELS).map(rule).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_even_in_the_ratio_to_balanced() {
        assert_eq!([0.25, 0.5, 1.0, 2.0, 4.0].map(level), [-8, -4, 0, 4, 8].map(Some));
        assert_eq!([0.02, 1.05, 100.0].map(level), [-8, 0, 8].map(Some));
        assert_eq!([0.0, 0.009, f64::NAN].map(level), [None; 3]);
    }

    #[test]
    fn neighbours_of_one_class_are_one_stroke() {
        let columns = [[0.5, 0.5], [0.51, 0.49], [0.0, 1.0], [0.5, 0.5]];
        let columns = columns.iter().map(|c| &c[..]).collect();
        let map = HeatMap { title: String::new(), n_expert: 2, width: 100.0, steps: (1, 1), columns };
        assert_eq!(map.runs(Some(0)), "M0 0h2M3 0h1M0 1h2M3 1h1");
        assert_eq!(map.runs(None), "M2 0h1");
        assert_eq!(map.runs(Some(4)), "M2 1h1");
        assert_eq!(map.percentages(), "100 102 0 100;100 98 200 100");
    }
}
