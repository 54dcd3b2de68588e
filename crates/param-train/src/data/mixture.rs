//! Data sets trained on together, each with its share of the rows.

use super::DataError;
use super::split::Part;

/// One of the data sets of a mixture.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// What people know it by; empty where there is no other.
    pub name: String,
    /// Its share of the rows; of all data sets of a mixture they add up to 1.
    pub weight: f64,
    /// Its documents.
    pub part: Part,
}

/// One data set or several.
#[derive(Clone, Debug)]
pub struct Mixture {
    datasets: Vec<Dataset>,
}

impl Mixture {
    /// Of data sets with weights of any scale.
    ///
    /// # Errors
    /// [`DataError::EmptyMixture`], [`DataError::Weight`].
    pub fn new(mut datasets: Vec<Dataset>) -> Result<Self, DataError> {
        if datasets.is_empty() {
            return Err(DataError::EmptyMixture);
        }
        datasets.iter().try_for_each(|dataset| check_weight(&dataset.name, dataset.weight))?;
        // By the largest first: the sum of finite numbers need not be finite.
        let largest = datasets.iter().map(|dataset| dataset.weight).fold(0.0, f64::max);
        let sum: f64 = datasets.iter().map(|dataset| dataset.weight / largest).sum();
        datasets.iter_mut().for_each(|dataset| dataset.weight = dataset.weight / largest / sum);
        Ok(Self { datasets })
    }

    /// All of them, in the order given.
    pub fn datasets(&self) -> &[Dataset] {
        &self.datasets
    }

    /// Number of tokens of all of them.
    pub fn n_token(&self) -> u64 {
        self.datasets.iter().map(|dataset| dataset.part.n_token()).sum()
    }

    /// Tells two mixtures apart: by their tokens' SHA-256, by how much of them is taken, and by their shares.
    pub fn digest(&self) -> String {
        let part = |part: &Part| format!("{}:{}", part.shard().index().digest, part.n_token());
        match &self.datasets[..] {
            [only] => part(&only.part),
            several => {
                let parts = several.iter().map(|dataset| format!("{}*{}", dataset.weight, part(&dataset.part)));
                parts.collect::<Vec<_>>().join("+")
            }
        }
    }
}

impl From<Part> for Mixture {
    fn from(part: Part) -> Self {
        Self { datasets: vec![Dataset { name: String::new(), weight: 1.0, part }] }
    }
}

/// An error unless `weight` can be one.
///
/// # Errors
/// [`DataError::Weight`].
pub fn check_weight(name: &str, weight: f64) -> Result<(), DataError> {
    if weight > 0.0 && weight.is_finite() {
        return Ok(());
    }
    Err(DataError::Weight { name: name.to_owned(), weight })
}

/// Which data set each row of a mixture comes from: as evenly spread as their shares allow, so that any stretch of rows has
/// of each data set its share to within a row or so (for two of them, a Sturmian word: Lothaire 2002, chapter 2).
#[derive(Clone, Debug)]
pub struct Shares {
    /// Of every data set but the last: its share, in units of 2^-64, of the rows that those before it leave.
    shares: Vec<u128>, // [n_dataset - 1]
}

impl Shares {
    /// By weights that add up to 1.
    pub fn new(weights: impl Iterator<Item = f64>) -> Self {
        let weights: Vec<f64> = weights.collect();
        let share = |i: usize| {
            let left: f64 = weights[i..].iter().sum();
            ((weights[i] / left * 2f64.powi(64)) as u128).min(1 << 64)
        };
        Self { shares: (0..weights.len().saturating_sub(1)).map(share).collect() }
    }

    /// The data set of row `row` < 2^63, and the number of that row among those of its data set.
    pub fn of(&self, row: u64) -> (usize, u64) {
        let mut left = row;
        for (dataset, &share) in self.shares.iter().enumerate() {
            let taken = part(left, share);
            if part(left + 1, share) > taken {
                return (dataset, taken);
            }
            left -= taken;
        }
        (self.shares.len(), left)
    }

    /// Of the first `row` < 2^63 rows, those of each data set.
    pub fn before(&self, row: u64) -> Vec<u64> {
        let mut left = row;
        let mut counts = Vec::with_capacity(self.shares.len() + 1);
        for &share in &self.shares {
            counts.push(part(left, share));
            left -= counts[counts.len() - 1];
        }
        counts.push(left);
        counts
    }
}

/// `share` (in units of 2^-64) of `n` rows, rounded down.
fn part(n: u64, share: u128) -> u64 {
    ((u128::from(n) * share) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rows_are_numbered_in_order_and_in_proportion(weights in prop::collection::vec(0.001f64..10.0, 1..6), start in 0u64..1 << 50) {
            let sum: f64 = weights.iter().sum();
            let weights: Vec<f64> = weights.iter().map(|w| w / sum).collect();
            let shares = Shares::new(weights.iter().copied());
            let first = shares.before(start);
            let mut counts = first.clone();
            for row in start..start + 500 {
                let (dataset, number) = shares.of(row);
                prop_assert_eq!(number, counts[dataset], "row {} of data set {}", row, dataset);
                counts[dataset] += 1;
                prop_assert_eq!(&counts, &shares.before(row + 1));
            }
            for ((count, first), weight) in counts.iter().zip(&first).zip(&weights) {
                let expected = 500.0 * weight;
                prop_assert!(((count - first) as f64 - expected).abs() < weights.len() as f64, "{:?}", counts);
            }
        }
    }

    #[test]
    fn a_single_data_set_has_every_row() {
        let shares = Shares::new([1.0].into_iter());
        assert_eq!((shares.of(17), shares.before(17)), ((0, 17), vec![17]));
    }

    #[test]
    fn only_positive_numbers_are_weights() {
        for weight in [0.0, -0.0, -1.0, f64::NAN, f64::INFINITY] {
            let error = check_weight("se.jsonl", weight).unwrap_err().to_string();
            assert!(error.contains("se.jsonl") && error.contains("positive"), "{error}");
        }
        assert!(matches!(Mixture::new(vec![]), Err(DataError::EmptyMixture)));
    }
}
