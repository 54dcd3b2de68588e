//! Steps of Muon in the emulation against whole products in f64, the matrix itself taken through every polynomial.

use half::bf16;
use param_cuda_emulation::Schedule;

use super::super::testing::{Random, gpu};
use super::*;

/// Of Jordan et al., rounded; any will do.
const POLYNOMIALS: [[f32; 3]; 3] = [[3.4445, -4.775, 2.0315], [3.0, -3.2, 1.2], [1.875, -1.25, 0.375]];
const MOMENTUM: f32 = 0.75;

fn naive(x: &[f64], (n_row, n_col): (usize, usize)) -> Vec<f64> {
    let (wide, m, n) = if n_row <= n_col { (true, n_row, n_col) } else { (false, n_col, n_row) };
    let at = |i: usize, j: usize| if wide { x[i * n_col + j] } else { x[j * n_col + i] };
    let mut y = (0..m).map(|i| (0..n).map(|j| at(i, j)).collect::<Vec<_>>()).collect::<Vec<_>>();
    let gram = |y: &[Vec<f64>]| {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        y.iter().map(|a| y.iter().map(|b| dot(a, b)).collect::<Vec<_>>()).collect::<Vec<_>>()
    };
    let by = |a: &[Vec<f64>], b: &[Vec<f64>]| {
        let mut out = vec![vec![0.0; b[0].len()]; a.len()];
        for (out, a) in out.iter_mut().zip(a) {
            for (a, b) in a.iter().zip(b) {
                out.iter_mut().zip(b).for_each(|(o, b)| *o += a * b);
            }
        }
        out
    };
    let norm = gram(&y).iter().flatten().map(|g| g * g).sum::<f64>().powf(0.25);
    if norm == 0.0 {
        return x.to_vec();
    }
    y.iter_mut().flatten().for_each(|v| *v /= norm);
    for p in POLYNOMIALS {
        let [a, b, c] = p.map(f64::from);
        let g = gram(&y);
        let (gy, ggy) = (by(&g, &y), by(&g, &by(&g, &y)));
        for (y, (gy, ggy)) in y.iter_mut().flatten().zip(gy.iter().flatten().zip(ggy.iter().flatten())) {
            *y = a * *y + b * gy + c * ggy;
        }
    }
    let from = |i: usize, j: usize| if wide { y[i][j] } else { y[j][i] };
    (0..n_row * n_col).map(|e| from(e / n_col, e % n_col)).collect()
}

/// Error bound: of an update 1e-4 of its size, of what is added up rounding.
fn check(shape: (usize, usize), n: usize, at_a_time: usize, grad_scale: f32, schedules: &[Schedule]) {
    let gpu = gpu();
    let (stream, muon) = (Stream::new(&gpu).unwrap(), Muon::new(&gpu).unwrap());
    let random = &mut Random::new((shape.0 * 1000 + shape.1) as u64);
    let size = shape.0 * shape.1;
    // Matrices lie apart, in another order in the running sums.
    let (distance, n_param) = (size + 8, n * (size + 8) + 4);
    let matrices: Vec<_> = (0..n)
        .map(|i| MuonMatrix {
            begin: (4 + i * distance) as u64,
            moment: ((n - 1 - i) * size) as u64,
            lr_scale: 1.0 + i as f32,
            decay: 0.125 * i as f32,
        })
        .collect();
    let (params, sums) = (random.floats(n_param, 1.0), random.floats(n * size, 1.0));
    let mut grads = random.floats(n_param, 1.0);
    if n > 1 {
        // A matrix of nothing, whose parameters only decay.
        let last = matrices[n - 1].begin as usize;
        grads[last..last + size].fill(0.0);
    }
    let mut sums = sums;
    if n > 1 {
        sums[..size].fill(0.0);
    }
    let numbers = Numbers { muon_lr: 0.5, ..Numbers::default() };
    let outcome = Outcome { grad_scale, ..Outcome::default() };
    let (numbers, outcome) = (gpu.upload("", &[numbers]).unwrap(), gpu.upload("", &[outcome]).unwrap());
    let table = gpu.upload("", &matrices).unwrap();
    let scratch = gpu.alloc::<f32>("", Muon::scratch_len(at_a_time, shape)).unwrap();

    let mut results: Option<[Vec<u32>; 4]> = None;
    for &schedule in schedules {
        param_cuda_emulation::schedule(Some(schedule));
        let [p, g, s] = [&params, &grads, &sums].map(|x| gpu.upload("", x).unwrap());
        let copies = gpu.upload("", &vec![7u16; n_param]).unwrap();
        let state = MuonState {
            params: p.view(),
            grads: g.view(),
            sums: s.view(),
            copies: Some(copies.view()),
            numbers: numbers.view(),
            outcome: outcome.view(),
        };
        muon.step(&stream, state, table.view(), shape, MOMENTUM, &POLYNOMIALS, scratch.view()).unwrap();
        stream.synchronize().unwrap_or_else(|e| panic!("{e}: {}", param_cuda_emulation::last_fault()));
        let bits = |x: Vec<f32>| x.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let [p, g, s] = [p, g, s].map(|x| bits(x.to_vec().unwrap()));
        let got = [p, g, s, copies.to_vec().unwrap().into_iter().map(u32::from).collect()];
        match &results {
            None => results = Some(got),
            Some(results) => assert!(got == *results, "{schedule:?}"),
        }
    }
    param_cuda_emulation::schedule(None);
    let Some([p, g, s, copies]) = results else { unreachable!() };
    let number = |x: &[u32], i: usize| f64::from(f32::from_bits(x[i]));

    let mut moved = vec![false; n_param];
    for matrix in &matrices {
        let (begin, moment) = (matrix.begin as usize, matrix.moment as usize);
        moved[begin..begin + size].fill(true);
        assert!(g[begin..begin + size].iter().all(|&g| g == 0), "gradients are zero afterwards");
        if grad_scale == 0.0 {
            for i in 0..size {
                assert_eq!(p[begin + i], params[begin + i].to_bits());
                assert_eq!(s[moment + i], sums[moment + i].to_bits());
                assert_eq!(copies[begin + i], 7);
            }
            continue;
        }
        let scaled: Vec<f64> = (0..size).map(|i| f64::from(grads[begin + i] * grad_scale)).collect();
        let sum: Vec<f64> = (0..size).map(|i| f64::from(MOMENTUM * sums[moment + i]) + scaled[i]).collect();
        let update: Vec<f64> = (0..size).map(|i| scaled[i] + f64::from(MOMENTUM) * sum[i]).collect();
        let step = naive(&update, shape);
        let lr = 0.5 * f64::from(matrix.lr_scale);
        let factor = lr * f64::from(RMS) * (shape.0.max(shape.1) as f64).sqrt();
        let (mut far, mut all) = (0.0, 1e-12);
        for i in 0..size {
            assert!((number(&s, moment + i) - sum[i]).abs() <= 1e-6, "sum {i}");
            let kept = (1.0 - lr * f64::from(matrix.decay)) * f64::from(params[begin + i]);
            let (got, want) = (number(&p, begin + i) - kept, -factor * step[i]);
            far += (got - want).powi(2);
            all += want * want;
            let copy = bf16::from_f32(f32::from_bits(p[begin + i])).to_bits();
            assert_eq!(copies[begin + i], u32::from(copy));
        }
        let (far, all) = (far.sqrt(), all.sqrt());
        assert!(far <= 1e-4 * all + 2e-7 * (size as f64).sqrt(), "{shape:?}: {far} of {all}");
    }
    for i in (0..n_param).filter(|&i| !moved[i]) {
        assert_eq!((p[i], g[i], copies[i]), (params[i].to_bits(), grads[i].to_bits(), 7), "beside the matrices");
    }
}

#[test]
fn a_step_is_that_of_whole_products() {
    check((24, 68), 2, 2, 0.5, &Schedule::ALL);
    check((68, 24), 3, 2, 1.0, &Schedule::ALL[..2]);
    check((72, 72), 2, 1, 1.0, &Schedule::ALL[..1]);
    check((132, 140), 1, 1, 1.0, &Schedule::ALL[2..3]);
}

#[test]
fn a_step_that_is_left_out_only_clears_gradients() {
    check((8, 12), 2, 2, 0.0, &Schedule::ALL[..2]);
}

#[test]
#[should_panic(expected = "scratch memory")]
fn too_little_scratch_memory_is_refused() {
    check((8, 12), 1, 0, 1.0, &Schedule::ALL[..1]);
}
