//! Axes: where numbers lie, which of them are marked, and how they are written.

/// How numbers become positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Equal differences, equal distances.
    Linear,
    /// Equal ratios, equal distances; positive numbers only.
    Log,
}

/// A range of numbers along a line.
#[derive(Clone, Copy, Debug)]
pub struct Axis {
    /// Scale.
    pub scale: Scale,
    /// Least number.
    pub low: f64,
    /// Greatest number, above `low`.
    pub high: f64,
}

impl Axis {
    /// An axis that shows all of these numbers; on a logarithmic one, those that are positive.
    pub fn around(scale: Scale, numbers: impl Iterator<Item = f64>) -> Self {
        let shown = numbers.filter(|x| x.is_finite() && (scale == Scale::Linear || *x > 0.0));
        let (low, high) = shown.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
        let (low, high) = if low > high { (0.1, 1.0) } else { (low, high) };
        match scale {
            Scale::Log => {
                let margin = (high / low).powf(0.05).max(1.1);
                Self { scale, low: low / margin, high: high * margin }
            }
            Scale::Linear => {
                let span = if high > low { high - low } else { high.abs().max(1e-9) };
                // Little of an axis is lost by beginning at zero where the numbers come near it.
                let begins_at_zero = low >= 0.0 && low < 0.35 * high;
                let low = if begins_at_zero || (low >= 0.0 && low == high) { 0.0 } else { low - 0.05 * span };
                Self { scale, low, high: if high == 0.0 { 1.0 } else { high + 0.05 * span } }
            }
        }
    }

    /// Where a number lies: 0 at `low`, 1 at `high`.
    pub fn position(&self, x: f64) -> f64 {
        match self.scale {
            Scale::Linear => (x - self.low) / (self.high - self.low),
            Scale::Log => (x.max(f64::MIN_POSITIVE) / self.low).ln() / (self.high / self.low).ln(),
        }
    }

    /// About `n` round numbers on the axis, with how each is written: all alike.
    pub fn ticks(&self, n: usize) -> Vec<(f64, String)> {
        let numbers = match self.scale {
            Scale::Linear => linear_ticks(self.low, self.high, n),
            Scale::Log => log_ticks(self.low, self.high),
        };
        match self.scale {
            Scale::Linear => labelled(&numbers),
            Scale::Log => numbers.into_iter().map(|x| (x, short(x))).collect(),
        }
    }
}

/// Multiples of 1, 2 or 5 times a power of ten, about `n` of them.
fn linear_ticks(low: f64, high: f64, n: usize) -> Vec<f64> {
    let raw = (high - low) / n.max(1) as f64;
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|step| *step >= 0.7 * raw).unwrap_or(raw);
    let (first, last) = ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
    (first..=last).map(|i| i as f64 * step).collect()
}

/// Powers of ten; where they are few, twice and five times these as well; where they are many, every second or third.
fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
    let within = |x: &f64| (low..=high).contains(x);
    let decades = (first..=last).map(|p| 10f64.powi(p)).filter(within).collect::<Vec<_>>();
    match decades.len() {
        0 | 1 if high / low < 3.0 => linear_ticks(low, high, 4),
        0..=2 => (first..=last).flat_map(|p| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(p))).filter(within).collect(),
        n => decades.into_iter().step_by(n.div_ceil(6)).collect(),
    }
}

/// Equally spaced numbers with their labels: one unit, and as many decimals as tell them apart.
fn labelled(numbers: &[f64]) -> Vec<(f64, String)> {
    let largest = numbers.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    let (unit, suffix) = unit(largest);
    let step = numbers.windows(2).map(|w| w[1] - w[0]).next().unwrap_or(largest.max(1e-300)) / unit;
    if largest > 0.0 && largest < 1e-3 {
        return numbers.iter().map(|&x| (x, short(x))).collect();
    }
    let decimals = (0..8).find(|d| (step * 10f64.powi(*d)).fract().min(1.0 - (step * 10f64.powi(*d)).fract()) < 1e-6);
    let decimals = decimals.unwrap_or(8) as usize;
    let label = |x: f64| if x == 0.0 { "0".to_owned() } else { format!("{:.decimals$}{suffix}", x / unit) };
    numbers.iter().map(|&x| (x, label(x))).collect()
}

/// What numbers of this size are counted in.
fn unit(size: f64) -> (f64, &'static str) {
    match size {
        _ if size >= 1e10 => (1e9, "G"),
        _ if size >= 1e7 => (1e6, "M"),
        _ if size >= 1e4 => (1e3, "k"),
        _ => (1.0, ""),
    }
}

/// A number in few characters: at most four digits that count.
pub fn short(x: f64) -> String {
    let size = x.abs();
    if size == 0.0 {
        return "0".to_owned();
    }
    if !(1e-3..1e15).contains(&size) {
        let text = format!("{x:.2e}");
        let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        return format!("{}e{exponent}", trimmed(mantissa));
    }
    let (unit, suffix) = unit(size);
    let decimals = (3 - (size / unit).log10().floor() as i32).max(0) as usize;
    format!("{}{suffix}", trimmed(&format!("{:.decimals$}", x / unit)))
}

/// A decimal number without zeros that say nothing.
fn trimmed(number: &str) -> &str {
    if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.') } else { number }
}

/// A count with its thousands apart.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let first = (digits.len() + 2) % 3 + 1;
    let (head, tail) = digits.split_at(first.min(digits.len()));
    tail.as_bytes().chunks(3).fold(head.to_owned(), |all, three| all + "," + &String::from_utf8_lossy(three))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(scale: Scale, low: f64, high: f64) -> Vec<String> {
        Axis { scale, low, high }.ticks(5).into_iter().map(|(_, label)| label).collect()
    }

    #[test]
    fn linear_ticks_are_round_and_written_alike() {
        assert_eq!(labels(Scale::Linear, 0.0, 5.0), ["0", "1", "2", "3", "4", "5"]);
        assert_eq!(labels(Scale::Linear, 1.42, 1.61), ["1.45", "1.50", "1.55", "1.60"]);
        assert_eq!(labels(Scale::Linear, 0.0, 200_000.0), ["0", "50k", "100k", "150k", "200k"]);
        assert_eq!(labels(Scale::Linear, 0.0, 4e-4), ["0", "1e-4", "2e-4", "3e-4", "4e-4"]);
        assert_eq!(labels(Scale::Linear, -1.0, 1.0), ["-1.0", "-0.5", "0", "0.5", "1.0"]);
    }

    #[test]
    fn log_ticks_are_decades_or_what_fits_between() {
        assert_eq!(labels(Scale::Log, 0.05, 2000.0), ["0.1", "1", "10", "100", "1000"]);
        assert_eq!(labels(Scale::Log, 0.3, 6.0), ["0.5", "1", "2", "5"]);
        assert_eq!(labels(Scale::Log, 1.1, 1.9), ["1.2", "1.4", "1.6", "1.8"]);
        assert_eq!(labels(Scale::Log, 1e-12, 1e12).len(), 5);
    }

    #[test]
    fn any_numbers_make_an_axis_with_ticks_on_it() {
        for numbers in [&[][..], &[0.0], &[3.0, 3.0], &[-2.0], &[1e-9, 1e9], &[f64::NAN, 1.0], &[1e-30]] {
            for scale in [Scale::Linear, Scale::Log] {
                let axis = Axis::around(scale, numbers.iter().copied());
                assert!(axis.low < axis.high, "{numbers:?}: {axis:?}");
                let ticks = axis.ticks(5);
                assert!((1..=30).contains(&ticks.len()), "{numbers:?}: {axis:?} {ticks:?}");
                assert!(ticks.iter().all(|(x, _)| (-1e-6..=1.0 + 1e-6).contains(&axis.position(*x))), "{ticks:?}");
            }
        }
    }

    #[test]
    fn numbers_are_short_and_counts_grouped() {
        let numbers = [0.0, 1.5, 0.012345, 1e-5, 12_345.0, 4_194_304.0, 2.5e7, 999.96, -3.25];
        let expected = ["0", "1.5", "0.01235", "1e-5", "12.35k", "4194k", "25M", "1000", "-3.25"];
        assert_eq!(numbers.map(short), expected);
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
    }
}
