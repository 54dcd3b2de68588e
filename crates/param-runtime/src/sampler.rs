//! Choosing the next token from logits. The rules apply in llama.cpp's order: penalties, top-k, top-p, min-p, temperature.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::candidates::{Best, Candidate, by_logit};
use crate::error::{Error, Result};

/// How tokens are chosen. [`Default`] is llama.cpp's default; [`SamplerOptions::greedy`] always takes the most likely.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Divides the logits: below 1 sharpens, above 1 flattens, 0 takes the most likely token.
    pub temperature: f32,
    /// Keep the `top_k` most likely; 0 keeps all.
    pub top_k: usize,
    /// Keep the most likely until their probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Keep what is at least this share as likely as the most likely; 0 keeps all.
    pub min_p: f32,
    /// How many of the newest tokens the penalties look at.
    pub penalty_window: usize,
    /// Divides positive logits of tokens in the window and multiplies negative ones; 1 does nothing.
    pub repeat_penalty: f32,
    /// Subtracted once from the logit of a token in the window.
    pub presence_penalty: f32,
    /// Subtracted for each time a token occurs in the window.
    pub frequency_penalty: f32,
    /// Determines every random choice.
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        SamplerOptions {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            penalty_window: 64,
            repeat_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
        }
    }
}

impl SamplerOptions {
    /// The most likely token, always.
    pub fn greedy() -> Self {
        SamplerOptions { temperature: 0.0, ..Self::default() }
    }

    fn check(&self) -> Result<()> {
        let at_least_0 = |x: f32| x.is_finite() && x >= 0.0;
        let rules = [
            ("temperature", self.temperature, at_least_0(self.temperature), "0 or more"),
            ("top-p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "more than 0, at most 1"),
            ("min-p", self.min_p, (0.0..=1.0).contains(&self.min_p), "0 to 1"),
            (
                "repeat penalty",
                self.repeat_penalty,
                at_least_0(self.repeat_penalty) && self.repeat_penalty > 0.0,
                "more than 0",
            ),
            ("presence penalty", self.presence_penalty, self.presence_penalty.is_finite(), "a number"),
            ("frequency penalty", self.frequency_penalty, self.frequency_penalty.is_finite(), "a number"),
        ];
        match rules.into_iter().find(|(_, _, holds, _)| !holds) {
            Some((option, value, _, expected)) => Err(Error::Sampling { option, value, expected }),
            None => Ok(()),
        }
    }
}

/// Chooses tokens. The same options and logits give the same tokens on every machine.
#[derive(Debug)]
pub struct Sampler {
    options: SamplerOptions,
    rng: ChaCha8Rng,
    candidates: Vec<Candidate>,
    weights: Vec<f64>,
}

impl Sampler {
    /// A sampler at the start of its random sequence.
    ///
    /// # Errors
    /// [`Error::Sampling`] for an option outside its range.
    pub fn new(options: &SamplerOptions) -> Result<Sampler> {
        options.check()?;
        let rng = ChaCha8Rng::seed_from_u64(options.seed);
        Ok(Sampler { options: options.clone(), rng, candidates: Vec::new(), weights: Vec::new() })
    }

    /// How many of the largest logits decide, however far the penalties may lower some; 0 if all do.
    pub(crate) fn n_best(&self) -> usize {
        let n = if self.options.temperature == 0.0 { 1 } else { self.options.top_k };
        if n > 0 && self.has_penalties() { n + self.options.penalty_window } else { n }
    }

    /// Chooses from `logits` (`[n_vocab]`); `context` is what came before, newest last, for the penalties. NaN counts as `-inf`.
    ///
    /// # Errors
    /// [`Error::NoLogits`] where no token has a chance.
    pub fn sample(&mut self, logits: &[f32], context: &[u32]) -> Result<u32> {
        self.candidates.clear();
        self.candidates.extend(logits.iter().zip(0..).map(|(&logit, token)| Candidate::new(logit, token)));
        self.penalize(context);
        self.choose()
    }

    /// The same, where the largest of `logits` are known already: if they are enough, nothing else is looked at but the tokens that
    /// penalties may have raised.
    pub(crate) fn sample_best(&mut self, logits: &[f32], best: &Best, context: &[u32]) -> Result<u32> {
        let n_best = self.n_best();
        if n_best == 0 || best.n() < n_best.min(logits.len()) {
            return self.sample(logits, context);
        }
        self.candidates.clear();
        self.candidates.extend_from_slice(best.list());
        if self.has_penalties() {
            let tokens = context[context.len().saturating_sub(self.options.penalty_window)..].iter();
            self.candidates.extend(tokens.map(|&token| Candidate::new(logits[token as usize], token)));
            self.candidates.sort_unstable_by_key(|candidate| candidate.token);
            self.candidates.dedup_by_key(|candidate| candidate.token);
            self.penalize(context);
        }
        self.choose()
    }

    /// Chooses among the candidates.
    fn choose(&mut self) -> Result<u32> {
        if self.options.temperature == 0.0 {
            let best = self.candidates.iter().min_by(|a, b| by_logit(a, b));
            return best.filter(|c| c.logit > f32::NEG_INFINITY).map(|c| c.token).ok_or(Error::NoLogits);
        }
        self.candidates.retain(|c| c.logit > f32::NEG_INFINITY);
        let max = self.candidates.iter().map(|c| c.logit).max_by(f32::total_cmp).ok_or(Error::NoLogits)?;
        self.keep_top_k();
        self.keep_top_p(max);
        let min_p = self.options.min_p.ln();
        self.candidates.retain(|c| c.logit - max >= min_p);
        Ok(self.draw(max))
    }

    /// How tokens are chosen.
    pub(crate) fn options(&self) -> &SamplerOptions {
        &self.options
    }

    /// The random numbers to come, of which a choice by chance takes one f64.
    pub(crate) fn rng(&self) -> &ChaCha8Rng {
        &self.rng
    }

    /// Goes on as if the numbers up to `rng` had been taken.
    pub(crate) fn set_rng(&mut self, rng: ChaCha8Rng) {
        self.rng = rng;
    }

    /// Tokens in the window of `context` and how often each occurs there, in their order.
    pub(crate) fn window_counts(&self, context: &[u32]) -> Vec<(u32, u32)> {
        let mut window = context[context.len().saturating_sub(self.options.penalty_window)..].to_vec();
        window.sort_unstable();
        window.chunk_by(|a, b| a == b).map(|run| (run[0], run.len() as u32)).collect()
    }

    pub(crate) fn has_penalties(&self) -> bool {
        let SamplerOptions { repeat_penalty, presence_penalty, frequency_penalty, .. } = self.options;
        repeat_penalty != 1.0 || presence_penalty != 0.0 || frequency_penalty != 0.0
    }

    /// Lowers, or raises, the candidates that occur in the window of `context`. They are in order of their tokens.
    fn penalize(&mut self, context: &[u32]) {
        if !self.has_penalties() {
            return;
        }
        let SamplerOptions { repeat_penalty, presence_penalty, frequency_penalty, .. } = self.options;
        for (token, count) in self.window_counts(context) {
            let Ok(at) = self.candidates.binary_search_by_key(&token, |candidate| candidate.token) else { continue };
            let logit = &mut self.candidates[at].logit;
            *logit = if *logit > 0.0 { *logit / repeat_penalty } else { *logit * repeat_penalty };
            *logit -= count as f32 * frequency_penalty + presence_penalty;
            *logit = logit.min(f32::MAX);
        }
    }

    fn keep_top_k(&mut self) {
        let k = self.options.top_k;
        if k > 0 && k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, by_logit);
            self.candidates.truncate(k);
        }
        // Whatever order selection left, the draw must not depend on it.
        if k > 0 || self.options.top_p < 1.0 {
            self.candidates.sort_unstable_by(by_logit);
        }
    }

    fn keep_top_p(&mut self, max: f32) {
        if self.options.top_p >= 1.0 {
            return;
        }
        let total = self.weigh(max, 1.0);
        let enough = f64::from(self.options.top_p) * total;
        let mut sum = 0.0;
        let reached = self.weights.iter().position(|weight| {
            sum += weight;
            sum >= enough
        });
        self.candidates.truncate(reached.map_or(self.candidates.len(), |last| last + 1));
    }

    /// Draws by probability after temperature.
    fn draw(&mut self, max: f32) -> u32 {
        let total = self.weigh(max, self.options.temperature);
        let mut left = self.rng.random::<f64>() * total;
        let drawn = self.weights.iter().position(|weight| {
            left -= weight;
            left < 0.0
        });
        // Rounding may leave a little of the total: it belongs to the last.
        self.candidates[drawn.unwrap_or(self.candidates.len() - 1)].token
    }

    /// Fills `weights` with unnormalised probabilities of the candidates, the largest 1; returns their sum.
    fn weigh(&mut self, max: f32, temperature: f32) -> f64 {
        let scale = 1.0 / f64::from(temperature);
        self.weights.clear();
        self.weights.extend(self.candidates.iter().map(|c| ((f64::from(c.logit) - f64::from(max)) * scale).exp()));
        self.weights.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Options under which every rule is off.
    fn plain() -> SamplerOptions {
        SamplerOptions { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..SamplerOptions::default() }
    }

    fn frequencies(options: SamplerOptions, logits: &[f32], context: &[u32]) -> Vec<f64> {
        let mut sampler = Sampler::new(&options).unwrap();
        let mut counts = vec![0.0; logits.len()];
        let n = 20_000;
        for _ in 0..n {
            counts[sampler.sample(logits, context).unwrap() as usize] += 1.0 / f64::from(n);
        }
        counts
    }

    /// Logits of given probabilities.
    fn logits(p: &[f64]) -> Vec<f32> {
        p.iter().map(|p| p.ln() as f32).collect()
    }

    fn assert_close(got: &[f64], want: &[f64]) {
        // Four standard deviations of 20,000 draws are at most 0.0142.
        assert!(
            got.iter().zip(want).all(|(g, w)| (g - w).abs() < 0.015 && (*w > 0.0 || *g == 0.0)),
            "{got:?} for {want:?}"
        );
    }

    #[test]
    fn draws_follow_the_probabilities() {
        assert_close(&frequencies(plain(), &logits(&[0.1, 0.6, 0.3]), &[]), &[0.1, 0.6, 0.3]);
    }

    #[test]
    fn temperature_raises_probabilities_to_its_inverse() {
        let options = SamplerOptions { temperature: 0.5, ..plain() };
        let squares = 0.01 + 0.36 + 0.09;
        assert_close(
            &frequencies(options, &logits(&[0.1, 0.6, 0.3]), &[]),
            &[0.01 / squares, 0.36 / squares, 0.09 / squares],
        );
    }

    #[test]
    fn top_k_keeps_the_k_most_likely_and_of_equals_the_lower_id() {
        let options = SamplerOptions { top_k: 2, ..plain() };
        assert_close(&frequencies(options, &logits(&[0.2, 0.4, 0.2, 0.2]), &[]), &[1.0 / 3.0, 2.0 / 3.0, 0.0, 0.0]);
    }

    #[test]
    fn top_p_keeps_the_fewest_that_reach_the_sum() {
        let options = SamplerOptions { top_p: 0.75, ..plain() };
        assert_close(&frequencies(options, &logits(&[0.1, 0.5, 0.1, 0.3]), &[]), &[0.0, 0.625, 0.0, 0.375]);
    }

    #[test]
    fn top_p_counts_only_what_top_k_kept() {
        let options = SamplerOptions { top_k: 2, top_p: 0.6, ..plain() };
        // 0.5 of the kept 0.8 is 0.625 of the sum.
        assert_close(&frequencies(options, &logits(&[0.1, 0.5, 0.1, 0.3]), &[]), &[0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn min_p_keeps_what_is_likely_enough_against_the_best() {
        let options = SamplerOptions { min_p: 0.4, ..plain() };
        assert_close(&frequencies(options, &logits(&[0.15, 0.5, 0.05, 0.3]), &[]), &[0.0, 0.625, 0.0, 0.375]);
    }

    #[test]
    fn repeat_penalty_divides_positive_and_multiplies_negative_logits() {
        let greedy = SamplerOptions { repeat_penalty: 2.0, ..SamplerOptions::greedy() };
        let mut sampler = Sampler::new(&greedy).unwrap();
        assert_eq!(sampler.sample(&[3.0, 2.0], &[0]).unwrap(), 1);
        assert_eq!(sampler.sample(&[3.0, 1.0], &[0]).unwrap(), 0);
        assert_eq!(sampler.sample(&[-1.0, -1.5], &[0]).unwrap(), 1);
    }

    #[test]
    fn presence_counts_once_and_frequency_every_time() {
        let presence = SamplerOptions { presence_penalty: 1.0, ..SamplerOptions::greedy() };
        assert_eq!(Sampler::new(&presence).unwrap().sample(&[3.0, 1.5], &[0, 0, 0]).unwrap(), 0);
        let frequency = SamplerOptions { frequency_penalty: 1.0, ..SamplerOptions::greedy() };
        assert_eq!(Sampler::new(&frequency).unwrap().sample(&[3.0, 1.5], &[0, 0, 0]).unwrap(), 1);
        assert_eq!(Sampler::new(&frequency).unwrap().sample(&[3.0, 1.5], &[0]).unwrap(), 0);
    }

    #[test]
    fn penalties_forget_what_left_the_window() {
        let options = SamplerOptions { presence_penalty: 9.0, penalty_window: 2, ..SamplerOptions::greedy() };
        let mut sampler = Sampler::new(&options).unwrap();
        assert_eq!(sampler.sample(&[3.0, 1.0, 0.0], &[1, 0, 2]).unwrap(), 1);
        assert_eq!(sampler.sample(&[3.0, 1.0, 0.0], &[0, 1, 2]).unwrap(), 0);
    }

    #[test]
    fn damaged_logits_never_win_and_nothing_left_is_an_error() {
        for options in [SamplerOptions::greedy(), SamplerOptions::default()] {
            let mut sampler = Sampler::new(&options).unwrap();
            assert_eq!(sampler.sample(&[f32::NAN, -1.0, f32::NEG_INFINITY], &[]).unwrap(), 1);
            assert_eq!(sampler.sample(&[0.0, f32::INFINITY, f32::NAN], &[]).unwrap(), 1);
            assert!(matches!(sampler.sample(&[f32::NAN, f32::NEG_INFINITY], &[]), Err(Error::NoLogits)));
            assert!(matches!(sampler.sample(&[], &[]), Err(Error::NoLogits)));
        }
    }

    #[test]
    fn options_outside_their_range_are_refused_by_name() {
        let cases = [
            ("temperature", SamplerOptions { temperature: -1.0, ..plain() }),
            ("temperature", SamplerOptions { temperature: f32::NAN, ..plain() }),
            ("top-p", SamplerOptions { top_p: 0.0, ..plain() }),
            ("min-p", SamplerOptions { min_p: 1.5, ..plain() }),
            ("repeat penalty", SamplerOptions { repeat_penalty: 0.0, ..plain() }),
            ("presence penalty", SamplerOptions { presence_penalty: f32::INFINITY, ..plain() }),
            ("frequency penalty", SamplerOptions { frequency_penalty: f32::NAN, ..plain() }),
        ];
        for (name, options) in cases {
            assert!(Sampler::new(&options).unwrap_err().to_string().contains(name), "{name}");
        }
    }

    proptest! {
        #[test]
        fn one_seed_gives_one_sequence_and_greedy_is_the_argmax(logits in prop::collection::vec(-5.0f32..5.0, 1..200), seed in any::<u64>()) {
            let options = SamplerOptions { seed, ..SamplerOptions::default() };
            let draw = || {
                let mut sampler = Sampler::new(&options).unwrap();
                (0..10).map(|_| sampler.sample(&logits, &[]).unwrap()).collect::<Vec<_>>()
            };
            prop_assert_eq!(draw(), draw());
            let greedy = Sampler::new(&SamplerOptions::greedy()).unwrap().sample(&logits, &[]).unwrap() as usize;
            prop_assert!(logits.iter().enumerate().all(|(i, l)| *l < logits[greedy] || (*l == logits[greedy] && i >= greedy)));
        }
    }
}
