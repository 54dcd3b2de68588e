//! Attention in the emulation against plain sums in f64.

use param_cuda_emulation::Schedule;
use proptest::prelude::*;

use super::*;
use crate::memory::Buffer;
use crate::training::testing::{Random, Stored, gpu, rounded};

/// Of f32 against the magnitude of all terms: roundings of sums of up to 150 terms, and of scores before their exponentials.
const ERROR_F32: f64 = 1e-5;
/// Probabilities are rounded to bf16 as factors, and so is what is stored: 2^-8 each.
const ERROR_BF16: f64 = 2.02 / 256.0;
/// Of gradients of queries and keys: besides, the output that their scores' gradients are relative to was rounded.
const ERROR_BF16_SCORES: f64 = 3.05 / 256.0;

/// A problem: what is stored, as numbers, after rounding.
struct Case {
    n_row: usize,
    n_col: usize,
    n_head: usize,
    head_dim: usize,
    element: Element,
    qkv: Vec<f32>,  // [n_token, 3 n_embd]
    dout: Vec<f32>, // [n_token, n_embd]
    mask: Option<Vec<u8>>,
    first: Option<Vec<u32>>,
    bits: Option<Vec<u32>>,
}

const DROP_SCALE: f32 = 1.25;

impl Case {
    fn random(
        random: &mut Random,
        element: Element,
        [n_row, n_col, n_head, head_dim]: [usize; 4],
        [masks, begins, drops]: [bool; 3],
    ) -> Case {
        let (n_token, n_embd) = (n_row * n_col, n_head * head_dim);
        let qkv = rounded(&random.floats(n_token * 3 * n_embd, 1.0), element);
        let dout = rounded(&random.floats(n_token * n_embd, 1.0), element);
        // Sequences begin with padding, so that some queries see nothing else.
        let mut mask = Vec::new();
        let mut first = Vec::new();
        for _ in 0..n_row {
            let n_pad = random.below(n_col + 1);
            mask.extend((0..n_col).map(|i| u8::from(i >= n_pad && random.below(8) > 0)));
            // Documents that follow each other, or any key.
            let is_packed = random.below(3) > 0;
            let mut begin = 0;
            for query in 0..n_col {
                if is_packed && random.below(n_col / 3 + 1) == 0 {
                    begin = query;
                } else if !is_packed {
                    begin = random.below(query + 1);
                }
                first.push(begin as u32);
            }
        }
        let n_word = Dropped::n_word((n_row * n_head * n_col * n_col) as u64);
        let bits = (0..n_word).map(|_| (random.below(1 << 16) << 16 | random.below(1 << 16)) as u32).collect();
        Case {
            n_row,
            n_col,
            n_head,
            head_dim,
            element,
            qkv,
            dout,
            mask: masks.then_some(mask),
            first: begins.then_some(first),
            bits: drops.then_some(bits),
        }
    }

    fn n_embd(&self) -> usize {
        self.n_head * self.head_dim
    }
}

/// Sums, and those of their terms' magnitudes.
#[derive(Clone)]
struct Sums {
    value: Vec<f64>,
    magnitude: Vec<f64>,
}

impl Sums {
    fn new(n: usize) -> Sums {
        Sums { value: vec![0.0; n], magnitude: vec![0.0; n] }
    }

    fn add(&mut self, i: usize, value: f64, magnitude: f64) {
        self.value[i] += value;
        self.magnitude[i] += magnitude;
    }

    /// The largest difference as a part of the magnitude.
    fn error(&self, got: impl Iterator<Item = f32>) -> f64 {
        let each = self.value.iter().zip(&self.magnitude).zip(got);
        each.map(|((want, magnitude), got)| (f64::from(got) - want).abs() / (magnitude + 1e-6))
            .map(|e| if e.is_nan() { f64::INFINITY } else { e })
            .fold(0.0, f64::max)
    }
}

/// Output and gradients of queries, keys and values, [n_token, n_embd] each.
fn plain(case: &Case) -> (Sums, [Sums; 3]) {
    let &Case { n_row, n_col, n_head, head_dim, .. } = case;
    let n_embd = case.n_embd();
    let mut out = Sums::new(n_row * n_col * n_embd);
    let mut d = [0; 3].map(|_| Sums::new(n_row * n_col * n_embd));
    let scale = 1.0 / (head_dim as f64).sqrt();
    for number in 0..n_row * n_head {
        let (row, head) = (number / n_head, number % n_head);
        let x = |part: usize, i: usize, c: usize| {
            f64::from(case.qkv[(row * n_col + i) * 3 * n_embd + part * n_embd + head * head_dim + c])
        };
        let at = |i: usize, c: usize| (row * n_col + i) * n_embd + head * head_dim + c;
        for query in 0..n_col {
            let first = case.first.as_ref().map_or(0, |first| first[row * n_col + query] as usize);
            let score = |key: usize| {
                let score = (0..head_dim).map(|c| x(0, query, c) * x(1, key, c)).sum::<f64>() * scale;
                match &case.mask {
                    // Rounded as f32 is: where all keys are padded, little is left of what distinguishes them.
                    Some(mask) if mask[row * n_col + key] == 0 => f64::from(score as f32 - 1e9),
                    _ => score,
                }
            };
            let mut p: Vec<f64> = (first..=query).map(score).collect();
            let most = p.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            p.iter_mut().for_each(|p| *p = (*p - most).exp());
            let total: f64 = p.iter().sum();
            let factor = |key: usize| match &case.bits {
                None => 1.0,
                Some(bits) => {
                    let i = (number * n_col + query) * n_col + key;
                    f64::from(bits[i / 32] >> (i % 32) & 1) * f64::from(DROP_SCALE)
                }
            };
            let dout = |c: usize| f64::from(case.dout[at(query, c)]);
            for (key, p) in (first..).zip(&mut p) {
                *p /= total;
                for c in 0..head_dim {
                    let w = *p * factor(key);
                    out.add(at(query, c), w * x(2, key, c), (w * x(2, key, c)).abs());
                    d[2].add(at(key, c), w * dout(c), (w * dout(c)).abs());
                }
            }
            let delta: f64 = (0..head_dim).map(|c| dout(c) * out.value[at(query, c)]).sum();
            let delta_magnitude: f64 = (0..head_dim).map(|c| dout(c).abs() * out.magnitude[at(query, c)]).sum();
            for (key, p) in (first..).zip(&p) {
                let dp: f64 = (0..head_dim).map(|c| dout(c) * x(2, key, c)).sum::<f64>() * factor(key);
                let dp_magnitude = (0..head_dim).map(|c| (dout(c) * x(2, key, c)).abs()).sum::<f64>() * factor(key);
                let ds = p * (dp - delta) * scale;
                let magnitude = p * (dp_magnitude + delta_magnitude) * scale;
                for c in 0..head_dim {
                    d[0].add(at(query, c), ds * x(1, key, c), magnitude * x(1, key, c).abs());
                    d[1].add(at(key, c), ds * x(0, query, c), magnitude * x(0, query, c).abs());
                }
            }
        }
    }
    (out, d)
}

/// Both passes on the GPU, whose matrices are the last columns of wider ones: output and gradients [n_token, 3 n_embd].
fn computed(case: &Case) -> (Vec<f32>, Vec<f32>) {
    let gpu = gpu();
    let stream = Stream::new(&gpu).unwrap();
    let extra = case.element.per_copy();
    let wide = |x: &[f32], n_col: usize| {
        let rows = x.chunks_exact(n_col);
        let all: Vec<f32> = rows.flat_map(|row| vec![f32::NAN; extra].into_iter().chain(row.iter().copied())).collect();
        Stored::new(&gpu, &all, case.element, extra + n_col)
    };
    let n_embd = case.n_embd();
    let unset = vec![f32::NAN; case.qkv.len()];
    let (qkv, dqkv) = (wide(&case.qkv, 3 * n_embd), wide(&unset, 3 * n_embd));
    let (dout, out) = (wide(&case.dout, n_embd), wide(&unset[..case.dout.len()], n_embd));
    fn rows(stored: &Stored) -> Rows<'_> {
        stored.rows().cols(stored.element.per_copy()..stored.n_col)
    }
    fn upload<T: Pod>(gpu: &Arc<Gpu>, x: &Option<Vec<T>>) -> Option<Buffer<T>> {
        x.as_ref().map(|x| gpu.upload("", x).unwrap())
    }
    let (mask, first, bits) = (upload(&gpu, &case.mask), upload(&gpu, &case.first), upload(&gpu, &case.bits));
    let inputs = AttentionInputs {
        n_row: case.n_row,
        n_col: case.n_col,
        n_head: case.n_head,
        qkv: rows(&qkv),
        mask: mask.as_ref().map(Buffer::view),
        first: first.as_ref().map(Buffer::view),
        dropout: bits.as_ref().map(|bits| Dropped { bits: bits.view(), scale: DROP_SCALE }),
    };
    let softmax = gpu.upload("", &vec![f32::NAN; inputs.softmax_len()]).unwrap();
    let delta = gpu.upload("", &vec![f32::NAN; inputs.delta_len()]).unwrap();
    let attention = Attention::new(&gpu, case.element, case.head_dim).unwrap();
    attention
        .forward(&stream, &inputs, rows(&out), softmax.view())
        .and_then(|()| {
            attention.backward(&stream, &inputs, rows(&out), rows(&dout), softmax.view(), delta.view(), rows(&dqkv))
        })
        .and_then(|()| stream.synchronize())
        .unwrap_or_else(|e| panic!("{e}: {}", param_cuda_emulation::last_fault()));
    let narrow = |stored: &Stored| {
        let all = stored.to_vec();
        assert!(all.chunks_exact(stored.n_col).all(|row| row[..extra].iter().all(|x| x.is_nan())), "other columns");
        all.chunks_exact(stored.n_col).flat_map(|row| &row[extra..]).copied().collect()
    };
    (narrow(&out), narrow(&dqkv))
}

/// Panics where it is not what plain sums are.
fn check(case: &Case) -> (Vec<f32>, Vec<f32>) {
    let ((out, dqkv), (want_out, want)) = (computed(case), plain(case));
    let (sums, scores) = match case.element {
        Element::F32 => (ERROR_F32, ERROR_F32),
        Element::Bf16 => (ERROR_BF16, ERROR_BF16_SCORES),
    };
    let n_embd = case.n_embd();
    let error = want_out.error(out.iter().copied());
    assert!(error < sums, "output: {error:e}");
    for (part, (name, bound)) in [("queries", scores), ("keys", scores), ("values", sums)].into_iter().enumerate() {
        let got = dqkv.chunks_exact(3 * n_embd).flat_map(|row| &row[part * n_embd..][..n_embd]).copied();
        let error = want[part].error(got);
        assert!(error < bound, "gradient of {name}: {error:e}");
    }
    (out, dqkv)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn attention_in_f32_is_that_of_plain_sums(
        n_row in 1usize..3,
        n_col in 1usize..150,
        n_head in 1usize..4,
        fours in 1usize..33,
        options in any::<[bool; 3]>(),
        seed in any::<u64>(),
    ) {
        check(&Case::random(&mut Random::new(seed), Element::F32, [n_row, n_col, n_head, 4 * fours], options));
    }

    #[test]
    fn attention_in_bf16_is_that_of_plain_sums(
        n_row in 1usize..3,
        n_col in 1usize..200,
        n_head in 1usize..4,
        head_dim in proptest::sample::select(vec![8usize, 16, 24, 32, 48, 64, 96, 128]),
        options in any::<[bool; 3]>(),
        seed in any::<u64>(),
    ) {
        check(&Case::random(&mut Random::new(seed), Element::Bf16, [n_row, n_col, n_head, head_dim], options));
    }
}

#[test]
fn attention_does_not_depend_on_the_schedule() {
    for (element, head_dim) in [(Element::F32, 20), (Element::Bf16, 16), (Element::Bf16, 64), (Element::Bf16, 128)] {
        let case = Case::random(&mut Random::new(3), element, [2, 130, 1, head_dim], [true; 3]);
        let results = Schedule::ALL.map(|schedule| {
            param_cuda_emulation::schedule(Some(schedule));
            check(&case)
        });
        assert!(results.iter().all(|result| *result == results[0]), "{element:?}, {head_dim}");
    }
    param_cuda_emulation::schedule(None);
}

#[test]
fn one_position_sees_itself() {
    for element in [Element::F32, Element::Bf16] {
        let case = Case::random(&mut Random::new(1), element, [3, 1, 2, 16], [true, true, false]);
        let (out, dqkv) = check(&case);
        let vals = case.qkv.chunks_exact(96).flat_map(|row| &row[64..]).copied();
        assert!(vals.eq(out));
        assert!(dqkv.chunks_exact(96).zip(case.dout.chunks_exact(32)).all(|(d, dout)| d[64..] == *dout));
    }
}

#[test]
fn queries_that_see_only_padding_see_all_of_it_alike() {
    for element in [Element::F32, Element::Bf16] {
        let mut case = Case::random(&mut Random::new(2), element, [1, 70, 1, 32], [true, false, false]);
        case.mask = Some(vec![0; 70]);
        let (out, _) = check(&case);
        let mean = (0..70).map(|key| f64::from(case.qkv[key * 96 + 64])).sum::<f64>() / 70.0;
        assert!((f64::from(out[69 * 32]) - mean).abs() < 4e-3, "{} for {mean}", out[69 * 32]);
    }
}
