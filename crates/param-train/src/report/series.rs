//! What a chart draws, kept in bounded memory however long the run is: neighbours are merged as it grows.

/// What can stand for itself and what followed it.
pub trait Merge {
    /// Takes in what came after.
    fn merge(&mut self, later: Self);
}

/// Values in the order of their steps. Each span of `stride` steps is one value; when there are too many, spans double. The
/// same values give the same spans, whether they came in one sitting or in several.
pub struct Buckets<T> {
    capacity: usize,
    stride: u64,
    /// First step, value.
    values: Vec<(u64, T)>,
}

impl<T: Merge> Buckets<T> {
    /// At most `capacity` values, at least half as many once there were more.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, stride: 1, values: Vec::new() }
    }

    /// Adds the value of a step, which is none before the last one.
    pub fn push(&mut self, step: u64, value: T) {
        self.append(step, value);
        if self.values.len() > self.capacity {
            self.stride *= 2;
            for (step, value) in std::mem::take(&mut self.values) {
                self.append(step, value);
            }
        }
    }

    fn append(&mut self, step: u64, value: T) {
        match self.values.last_mut() {
            Some((first, last)) if *first / self.stride == step / self.stride => last.merge(value),
            _ => self.values.push((step, value)),
        }
    }

    /// First step and value of each span.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (u64, &T)> + DoubleEndedIterator {
        self.values.iter().map(|(step, value)| (*step, value))
    }

    /// Steps that one value stands for.
    pub fn stride(&self) -> u64 {
        self.stride
    }
}

/// The numbers of a span of steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    n: u32,
    /// Mean step.
    pub step: f64,
    /// Mean.
    pub mean: f64,
    /// Least.
    pub min: f64,
    /// Greatest.
    pub max: f64,
}

impl Point {
    /// Of one step.
    pub fn new(step: u64, x: f64) -> Self {
        Self { n: 1, step: step as f64, mean: x, min: x, max: x }
    }
}

impl Merge for Point {
    fn merge(&mut self, later: Self) {
        let n = self.n + later.n;
        let share = f64::from(later.n) / f64::from(n);
        self.step += share * (later.step - self.step);
        self.mean += share * (later.mean - self.mean);
        (self.n, self.min, self.max) = (n, self.min.min(later.min), self.max.max(later.max));
    }
}

/// Something of which only the newest is worth keeping.
pub struct Latest<T>(pub T);

impl<T> Merge for Latest<T> {
    fn merge(&mut self, later: Self) {
        *self = later;
    }
}

/// The mean of tables of numbers over a span of steps.
pub struct Table {
    n: u32,
    /// Row by row.
    pub mean: Vec<f64>,
}

impl Table {
    /// Of one step.
    pub fn new(values: Vec<f64>) -> Self {
        Self { n: 1, mean: values }
    }
}

impl Merge for Table {
    fn merge(&mut self, later: Self) {
        self.n += later.n;
        let share = f64::from(later.n) / f64::from(self.n);
        self.mean.iter_mut().zip(&later.mean).for_each(|(mean, x)| *mean += share * (x - *mean));
    }
}

/// A curve through `points` without its noise: means weighted by a Gaussian that is `sigma` points wide. It neither lags behind
/// the values, as a moving average of the past does, nor is it pulled to zero at the ends.
pub fn smooth(points: &[Point], sigma: f64) -> Vec<(f64, f64)> {
    let reach = (3.0 * sigma).ceil() as usize;
    let weights = (0..=reach).map(|i| (-0.5 * (i as f64 / sigma).powi(2)).exp()).collect::<Vec<_>>();
    let at = |i: usize| {
        let near = i.saturating_sub(reach)..points.len().min(i + reach + 1);
        let (sum, weight) = near.fold((0.0, 0.0), |(sum, all), j| {
            let weight = weights[i.abs_diff(j)];
            (sum + weight * points[j].mean, all + weight)
        });
        (points[i].step, sum / weight)
    };
    (0..points.len()).map(at).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(n_step: u64, capacity: usize, x: impl Fn(u64) -> f64) -> Vec<Point> {
        let mut buckets = Buckets::new(capacity);
        (1..=n_step).for_each(|step| buckets.push(step, Point::new(step, x(step))));
        buckets.iter().map(|(_, point)| *point).collect()
    }

    #[test]
    fn a_short_series_is_kept_as_it_is() {
        let points = series(100, 100, |step| step as f64);
        assert_eq!(points, (1..=100).map(|step| Point::new(step, step as f64)).collect::<Vec<_>>());
    }

    #[test]
    fn a_long_series_stays_small_and_loses_neither_its_mean_nor_a_spike() {
        let spike = |step| if step == 123_457 { 1000.0 } else { (step % 7) as f64 };
        let points = series(200_000, 1024, spike);
        assert!((512..=1024).contains(&points.len()), "{}", points.len());
        assert!(points.is_sorted_by(|a, b| a.step < b.step));
        let sum = points.iter().map(|p| p.mean * f64::from(p.n)).sum::<f64>();
        let expected = (1..=200_000).map(spike).sum::<f64>();
        assert!((sum / expected - 1.0).abs() < 1e-9, "{sum} instead of {expected}");
        let at = points.iter().find(|p| p.max == 1000.0).unwrap();
        assert!((at.step - 123_457.0).abs() <= 256.0 && at.min == 0.0, "{at:?}");
    }

    #[test]
    fn the_newest_is_always_kept() {
        for n in 1..100 {
            let mut buckets = Buckets::new(8);
            (1..=n).for_each(|step| buckets.push(step, Latest(step)));
            assert_eq!(buckets.iter().last().unwrap().1.0, n);
            assert!(buckets.iter().len() <= 8);
        }
    }

    #[test]
    fn smoothing_keeps_a_constant_and_calms_noise() {
        let flat = smooth(&series(50, 64, |_| 3.0), 2.0);
        assert!(flat.iter().all(|(_, x)| (x - 3.0).abs() < 1e-12));
        let noise = smooth(&series(50, 64, |step| if step % 2 == 0 { 1.0 } else { -1.0 }), 2.0);
        assert!(noise[10..40].iter().all(|(_, x)| x.abs() < 0.01), "{noise:?}");
    }
}
