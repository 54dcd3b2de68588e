//! Initial parameters (the reference's initialisation, as the tensor table states it per tensor).

use param_model::{Config, Init, TensorSpec, tensors};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;

use crate::random::stream;

/// Streams of the seed that initialise tensors; forward passes use the streams below.
const FIRST_STREAM: u64 = 1 << 63;

/// Parameters of a new model, one vector per entry of the tensor table. Depends on the seed alone, not on threads.
pub fn initialise(config: &Config, seed: u64) -> Vec<Vec<f32>> {
    let table = tensors(config);
    table.par_iter().enumerate().map(|(index, spec)| initial(spec, seed, index)).collect()
}

/// Initial values of the tensor at `index` in the table.
pub fn initial(spec: &TensorSpec, seed: u64, index: usize) -> Vec<f32> {
    let n = spec.n_elements();
    let mut rng = tensor_stream(seed, index);
    let mut normal = || -> f32 { StandardNormal.sample(&mut rng) };
    match spec.init {
        Init::Zeros => vec![0.0; n],
        Init::Ones => vec![1.0; n],
        Init::Normal { std } => (0..n).map(|_| std * normal()).collect(),
        Init::TruncatedNormal { std } => {
            let mut within = || std::iter::repeat_with(&mut normal).find(|x| x.abs() <= 2.0).unwrap_or(0.0);
            (0..n).map(|_| std * within()).collect()
        }
    }
}

/// The random numbers that the tensor at `index` in the table begins with.
pub fn tensor_stream(seed: u64, index: usize) -> ChaCha8Rng {
    stream(seed, FIRST_STREAM + index as u64)
}

#[cfg(test)]
mod tests {
    use param_model::Part;

    use super::*;

    fn moments(x: &[f32]) -> (f64, f64) {
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / x.len() as f64;
        (mean, variance.sqrt())
    }

    #[test]
    fn every_tensor_has_the_references_moments() {
        let config = Config { n_embd: 96, n_layer: 4, ..Config::preset("param-tiny").unwrap() };
        let params = initialise(&config, 1);
        for (spec, x) in tensors(&config).iter().zip(&params) {
            let (mean, std) = moments(x);
            // A normal cut at two standard deviations keeps 0.8796 of its own.
            let expected = match spec.init {
                Init::Zeros | Init::Ones => 0.0,
                Init::Normal { std } => f64::from(std),
                Init::TruncatedNormal { std } => 0.8796 * f64::from(std),
            };
            // Five standard errors of each estimate.
            let n = x.len() as f64;
            assert!((std - expected).abs() <= 5.0 * expected / (2.0 * n).sqrt(), "{}: {std}", spec.checkpoint);
            let centre = if spec.init == Init::Ones { 1.0 } else { 0.0 };
            assert!((mean - centre).abs() <= 5.0 * expected / n.sqrt(), "{}: mean {mean}", spec.checkpoint);
        }
    }

    #[test]
    fn seeds_differ_and_threads_do_not() {
        let config = Config::preset("param-tiny").unwrap();
        let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
        let one = pool(1).install(|| initialise(&config, 7));
        assert!(one == pool(3).install(|| initialise(&config, 7)));
        let other = initialise(&config, 8);
        let at = tensors(&config).iter().position(|t| t.part == Part::AttnQ).unwrap();
        assert!(one[at] != other[at]);
    }
}
