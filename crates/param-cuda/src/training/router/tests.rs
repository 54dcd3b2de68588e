//! The router's kernels, in the emulation, against its definition in f64.

use param_cuda_emulation::Schedule;
use proptest::prelude::*;

use super::*;
use crate::memory::Buffer;
use crate::training::testing::{Random, Stored, gpu, rounded};

/// A token of a batch: what one router's losses are computed from.
struct Token<'a> {
    scores: &'a [f64],
    normal: Option<&'a [f32]>,
    chosen: &'a [u32],
}

fn log_sum_exp(x: &[f64]) -> f64 {
    let most = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    most + x.iter().map(|x| (x - most).exp()).sum::<f64>().ln()
}

impl Token<'_> {
    fn logits(&self) -> Vec<f64> {
        let Some(normal) = self.normal else { return self.scores.to_vec() };
        let (scores, pre) = self.scores.split_at(normal.len());
        let noise = pre.iter().zip(normal).map(|(pre, &normal)| pre.exp().ln_1p() * f64::from(normal));
        scores.iter().zip(noise).map(|(score, noise)| score + noise).collect()
    }

    /// Of the chosen.
    fn weights(&self) -> Vec<f64> {
        let logits = self.logits();
        let chosen: Vec<f64> = self.chosen.iter().map(|&e| logits[e as usize]).collect();
        let log_sum = log_sum_exp(&chosen);
        chosen.iter().map(|logit| (logit - log_sum).exp()).collect()
    }

    fn entropy(&self) -> f64 {
        let logits = self.logits();
        let log_sum = log_sum_exp(&logits);
        -logits.iter().map(|logit| (logit - log_sum).exp() * (logit - log_sum)).sum::<f64>()
    }

    /// The part of a loss with gradients `dweights` of the weights that the token has in it, loads being constants.
    fn loss(&self, dweights: &[f32], loads: &[u32], n_token: usize, (aux, z): (f64, f64)) -> f64 {
        let (n, n_expert) = (n_token as f64, loads.len() as f64);
        let weights = self.weights();
        let of_weights: f64 = weights.iter().zip(dweights).map(|(w, &d)| w * f64::from(d)).sum();
        let balance: f64 =
            weights.iter().zip(self.chosen).map(|(w, &e)| w / n * f64::from(loads[e as usize]) / n).sum();
        of_weights + aux * n_expert * balance + z * log_sum_exp(&self.logits()).powi(2) / n
    }
}

/// A batch, on the GPU too.
struct Batch {
    gpu: Arc<Gpu>,
    stream: Stream,
    router: Router,
    shape: RoutingShape,
    n_score: usize,
    scores: Vec<f32>,
    normal: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
    logits: Buffer<f32>,
    chosen: Buffer<u32>,
    weights: Buffer<f32>,
    statistics: Buffer<f64>,
    loads: Buffer<u32>,
}

impl Batch {
    /// Scores are few different numbers, so that some are equal.
    fn new(shape: RoutingShape, noisy: bool, biased: bool, seed: u64) -> Batch {
        let gpu = gpu();
        let random = &mut Random::new(seed);
        let RoutingShape { n_token, n_expert, .. } = shape;
        let n_score = if noisy { 2 * n_expert } else { n_expert };
        let scores = random.floats(n_token * n_score, 4.0).iter().map(|x| (x * 8.0).round() / 8.0).collect();
        Batch {
            stream: Stream::new(&gpu).unwrap(),
            router: Router::new(&gpu).unwrap(),
            shape,
            n_score,
            scores,
            normal: noisy.then(|| random.floats(n_token * n_expert, 2.0)),
            bias: biased.then(|| random.floats(n_expert, 2.0)),
            logits: gpu.alloc("", n_token * n_expert).unwrap(),
            chosen: gpu.alloc("", shape.n_choice()).unwrap(),
            weights: gpu.alloc("", shape.n_choice()).unwrap(),
            statistics: gpu.alloc("", 2 + n_expert).unwrap(),
            loads: gpu.alloc("", n_expert).unwrap(),
            gpu,
        }
    }

    fn routed(&self) -> Routed<'_> {
        Routed {
            logits: self.logits.view(),
            chosen: self.chosen.view(),
            weights: self.weights.view(),
            statistics: self.statistics.view(),
            loads: self.loads.view(),
        }
    }

    fn upload(&self, x: Option<&Vec<f32>>) -> Option<Buffer<f32>> {
        x.map(|x| self.gpu.upload("", x).unwrap())
    }

    fn route(&self) {
        let scores = self.gpu.upload("", &self.scores).unwrap();
        let [normal, bias] = [&self.normal, &self.bias].map(|x| self.upload(x.as_ref()));
        let scratch = self.gpu.alloc::<f64>("", Router::forward_scratch_len(self.shape)).unwrap();
        let [normal, bias] = [&normal, &bias].map(|x| x.as_ref().map(Buffer::view));
        self.router
            .forward(&self.stream, self.shape, scores.view(), normal, bias, &self.routed(), scratch.view())
            .unwrap_or_else(|e| panic!("{e}: {}", param_cuda_emulation::last_fault()));
        self.stream.synchronize().unwrap();
    }
}

fn shapes() -> impl Strategy<Value = RoutingShape> {
    let n_expert = proptest::sample::select(vec![1usize, 2, 3, 4, 8, 11, 17, 32, 33, 64]);
    (1usize..140, n_expert, 1usize..9).prop_map(|(n_token, n_expert, k)| RoutingShape {
        n_token,
        n_expert,
        k: k.min(n_expert),
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    /// Choices are those of the logits in f32. Bounds: 1e-6 of 8, the largest noise, for logits; 1e-6 for weights, of at most 8 terms;
    /// 1e-5 of what each token adds to the sums, whose logarithm and mean are of f32.
    #[test]
    fn tokens_are_routed_by_their_logits(
        shape in shapes(),
        noisy in any::<bool>(),
        biased in any::<bool>(),
        seed in any::<u64>(),
        schedule in proptest::sample::select(Schedule::ALL.to_vec()),
    ) {
        let RoutingShape { n_token, n_expert, k } = shape;
        let batch = Batch::new(shape, noisy, biased, seed);
        param_cuda_emulation::schedule(Some(schedule));
        batch.route();
        param_cuda_emulation::schedule(None);
        let (logits, chosen) = (batch.logits.to_vec().unwrap(), batch.chosen.to_vec().unwrap());
        let (weights, statistics) = (batch.weights.to_vec().unwrap(), batch.statistics.to_vec().unwrap());
        let mut want = vec![0.0; 2 + n_expert];
        let mut loads = vec![0; n_expert];
        for token in 0..n_token {
            let logits = &logits[token * n_expert..][..n_expert];
            let scores: Vec<f64> =
                batch.scores[token * batch.n_score..][..batch.n_score].iter().map(|&x| f64::from(x)).collect();
            let normal = batch.normal.as_ref().map(|normal| &normal[token * n_expert..][..n_expert]);
            let exact = Token { scores: &scores, normal, chosen: &[] }.logits();
            for (logit, exact) in logits.iter().zip(exact) {
                prop_assert!((f64::from(*logit) - exact).abs() <= 1e-6 * 8.0, "{logit}, not {exact}");
            }
            let mut order: Vec<usize> = (0..n_expert).collect();
            let score = |e: usize| logits[e] + batch.bias.as_ref().map_or(0.0, |bias| bias[e]);
            order.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
            let chosen = &chosen[token * k..][..k];
            prop_assert!(chosen.iter().zip(&order).all(|(&e, &best)| e as usize == best), "{chosen:?}, not {order:?}");

            let scores: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
            let exact = Token { scores: &scores, normal: None, chosen };
            for (slot, exact) in exact.weights().into_iter().enumerate() {
                let (got, e) = (f64::from(weights[token * k + slot]), chosen[slot] as usize);
                prop_assert!((got - exact).abs() <= 1e-6, "{got}, not {exact}");
                want[2 + e] += got;
                loads[e] += 1;
            }
            want[0] += log_sum_exp(&scores).powi(2);
            want[1] += exact.entropy();
        }
        prop_assert_eq!(batch.loads.to_vec().unwrap(), loads);
        for (i, (got, want)) in statistics.iter().zip(&want).enumerate() {
            let most = [100.0, 5.0][i.min(1)];
            prop_assert!((got - want).abs() <= 1e-5 * most * n_token as f64, "statistic {i} is {got}, not {want}");
        }
    }

    /// The gradient is that of the losses, by differences. Bound: 2e-5, for logits up to 12 and sums of terms up to 8 in f32.
    #[test]
    fn gradients_of_scores_are_those_of_the_losses(
        shape in shapes(),
        noisy in any::<bool>(),
        seed in any::<u64>(),
        schedule in proptest::sample::select(Schedule::ALL.to_vec()),
    ) {
        let RoutingShape { n_token, n_expert, k } = shape;
        let batch = Batch::new(shape, noisy, true, seed);
        batch.route();
        let n_score = batch.n_score;
        let dweights = Random::new(seed + 1).floats(shape.n_choice(), 1.0);
        let losses = RouterLosses { aux: 0.5, z: 0.3 };
        let numbers = [Numbers { batch_share: 0.25, ..Numbers::default() }];
        let gpu = &batch.gpu;
        let (scores, normal) = (gpu.upload("", &batch.scores).unwrap(), batch.upload(batch.normal.as_ref()));
        let noise = normal.as_ref().map(|normal| Noise { scores: scores.view(), normal: normal.view() });
        let (given, numbers) = (gpu.upload("", &dweights).unwrap(), gpu.upload("", &numbers).unwrap());
        let dscores = gpu.alloc::<f32>("", n_token * n_score).unwrap();
        param_cuda_emulation::schedule(Some(schedule));
        batch
            .router
            .backward(&batch.stream, shape, given.view(), &batch.routed(), noise, losses, numbers.view(), dscores.view())
            .unwrap();
        param_cuda_emulation::schedule(None);
        let (dscores, loads) = (dscores.to_vec().unwrap(), batch.loads.to_vec().unwrap());
        let chosen = batch.chosen.to_vec().unwrap();
        for token in 0..n_token {
            let mut scores: Vec<f64> =
                batch.scores[token * n_score..][..n_score].iter().map(|&x| f64::from(x)).collect();
            let normal = batch.normal.as_ref().map(|normal| &normal[token * n_expert..][..n_expert]);
            let choices = token * k..(token + 1) * k;
            let loss = |scores: &[f64]| {
                let token = Token { scores, normal, chosen: &chosen[choices.clone()] };
                token.loss(&dweights[choices.clone()], &loads, n_token, (0.5 * 0.25, 0.3 * 0.25))
            };
            for i in 0..n_score {
                let (at, step) = (scores[i], 1e-4);
                scores[i] = at + step;
                let above = loss(&scores);
                scores[i] = at - step;
                let want = (above - loss(&scores)) / (2.0 * step);
                scores[i] = at;
                let got = dscores[token * n_score + i];
                prop_assert!((f64::from(got) - want).abs() <= 2e-5, "token {token}, score {i}: {got}, not {want}");
            }
        }
    }

    /// Bound: 1e-5 of the sum of the terms' magnitudes, for sums of up to 150 of them in f32.
    #[test]
    fn gradients_pass_the_scores(
        shape in shapes(),
        eighths in 1usize..40,
        noisy in any::<bool>(),
        element in proptest::sample::select(vec![Element::F32, Element::Bf16]),
        gathers in any::<bool>(),
        seed in any::<u64>(),
        schedule in proptest::sample::select(Schedule::ALL.to_vec()),
    ) {
        let RoutingShape { n_token, n_expert, k } = shape;
        let (n_embd, n_score) = (8 * eighths, if noisy { 2 * n_expert } else { n_expert });
        let gpu = gpu();
        let (stream, router) = (Stream::new(&gpu).unwrap(), Router::new(&gpu).unwrap());
        let random = &mut Random::new(seed);
        let dscores = random.floats(n_token * n_score, 1.0);
        let weight = random.floats(n_score * n_embd, 1.0);
        let normed = rounded(&random.floats(n_token * n_embd, 1.0), element);
        let dinput = rounded(&random.floats(shape.n_choice() * n_embd, 1.0), element);
        // In some order, and some dropped.
        let mut position: Vec<u32> = (0..shape.n_choice() as u32).collect();
        for i in 1..position.len() {
            position.swap(i, random.below(i + 1));
        }
        position.iter_mut().for_each(|at| *at = if random.below(4) == 0 { u32::MAX } else { *at });
        let before = random.floats(n_score * n_embd, 1.0);

        let of_scores = gpu.upload("", &dscores).unwrap();
        let n_router = n_expert * n_embd;
        let [weights, gradients] =
            [&weight, &before].map(|all| [&all[..n_router], &all[n_router..]].map(|part| gpu.upload("", part).unwrap()));
        let [scorer, dscorer] = [&weights, &gradients]
            .map(|[weight, noise]| Scorer { weight: weight.view(), noise: noisy.then(|| noise.view()) });
        let rows = Stored::new(&gpu, &normed, element, n_embd);
        let taken = Stored::new(&gpu, &dinput, element, n_embd);
        let places = gpu.upload("", &position).unwrap();
        let experts = gathers.then(|| Gathered { dinput: taken.rows(), position: places.view() });
        let dnormed = gpu.upload("", &vec![f32::NAN; n_token * n_embd]).unwrap();
        let scratch =
            gpu.alloc::<f32>("", Router::scores_backward_scratch_len(n_token, n_embd, n_score)).unwrap();
        param_cuda_emulation::schedule(Some(schedule));
        router
            .scores_backward(
                &stream,
                shape,
                of_scores.view(),
                scorer,
                rows.rows(),
                experts,
                dnormed.view(),
                dscorer,
                scratch.view(),
            )
            .unwrap_or_else(|e| panic!("{e}: {}", param_cuda_emulation::last_fault()));
        param_cuda_emulation::schedule(None);

        let is_near = |got: f32, terms: &mut dyn Iterator<Item = f64>| {
            let (mut sum, mut magnitude) = (0.0, 0.0);
            terms.for_each(|term| (sum, magnitude) = (sum + term, magnitude + term.abs()));
            (f64::from(got) - sum).abs() <= 1e-5 * magnitude
        };
        let product = |a: f32, b: f32| f64::from(a) * f64::from(b);
        for (i, got) in dnormed.to_vec().unwrap().into_iter().enumerate() {
            let (token, column) = (i / n_embd, i % n_embd);
            let scored = (0..n_score).map(|s| product(dscores[token * n_score + s], weight[s * n_embd + column]));
            let kept = position[token * k..][..k].iter().filter(|&&at| gathers && at != u32::MAX);
            let gathered = kept.map(|&at| f64::from(dinput[at as usize * n_embd + column]));
            prop_assert!(is_near(got, &mut scored.chain(gathered)), "token {token}, column {column}: {got}");
        }
        for (i, got) in gradients.iter().flat_map(|part| part.to_vec().unwrap()).enumerate() {
            let (s, column) = (i / n_embd, i % n_embd);
            let sum = (0..n_token).map(|t| product(dscores[t * n_score + s], normed[t * n_embd + column]));
            let mut terms = sum.chain([f64::from(before[i])]);
            prop_assert!(is_near(got, &mut terms), "score {s}, column {column}: {got}");
        }
    }
}

#[test]
fn nothing_depends_on_the_schedule() {
    let shape = RoutingShape { n_token: 150, n_expert: 6, k: 3 };
    let mut first = None;
    for schedule in Schedule::ALL {
        param_cuda_emulation::schedule(Some(schedule));
        let batch = Batch::new(shape, true, true, 5);
        batch.route();
        let all = (batch.chosen.to_vec().unwrap(), batch.weights.to_vec().unwrap(), batch.statistics.to_vec().unwrap());
        assert_eq!(*first.get_or_insert(all.clone()), all, "{schedule:?}");
    }
    param_cuda_emulation::schedule(None);
}

#[test]
fn what_is_not_finite_is_chosen_last() {
    let shape = RoutingShape { n_token: 2, n_expert: 4, k: 3 };
    let mut batch = Batch::new(shape, false, false, 1);
    batch.scores = [[f32::NAN, 1.0, f32::NEG_INFINITY, 2.0], [f32::NAN; 4]].concat();
    batch.route();
    assert_eq!(batch.chosen.to_vec().unwrap(), [3, 1, 0, 0, 1, 2]);
    let weights = batch.weights.to_vec().unwrap();
    assert!(weights.iter().all(|weight| weight.is_nan()), "{weights:?} hide what went wrong");
}
