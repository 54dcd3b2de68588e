//! What device.cuh offers, against plain loops, under every schedule.

use crate::args;
use crate::driver::{Driver, TOO_LARGE, kernels};
use half::{bf16, f16};
use param_cuda_emulation::{Schedule, build_variant};
use std::ptr::null_mut;
use std::sync::OnceLock;

struct Shared(Driver);
// SAFETY: the driver's calls lock what they share.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

pub fn driver() -> &'static Driver {
    static BUILT: OnceLock<Shared> = OnceLock::new();
    let d = &BUILT.get_or_init(|| Shared(Driver::load(&build_variant(kernels(), str::to_owned, false)))).0;
    d.enter();
    d
}

pub fn schedules() -> Vec<Schedule> {
    let mut all = vec![Schedule::Ascending, Schedule::Reversed];
    all.extend((0..6).map(Schedule::Seed));
    all
}

pub fn rotated(d: &Driver) -> (i32, bool) {
    let x: Vec<i32> = (0..128).map(|i| i * 3).collect();
    let (p, out) = (d.upload(&x), d.alloc(512));
    let code = d.launch("rotate_block", [1, 1, 1], [128, 1, 1], 0, null_mut(), args![p, out, 5i32]);
    let got: Vec<i32> = d.read(out, 128);
    (code, (0..128).all(|i| got[i] == x[(i + 5) % 128]))
}

pub fn relaxed(d: &Driver, cooperative: bool) -> (i32, bool) {
    let (n, n_round) = (300, 7);
    let mut p: Vec<f32> = (0..n).map(|i| i as f32).collect();
    let (a, b, counter) = (d.upload(&p), d.alloc(n * 4), d.upload(&[0u32]));
    let arguments = args![a, b, n as i32, n_round, counter];
    let code = match cooperative {
        true => d.launch_cooperative("relax", [4, 1, 1], [64, 1, 1], 0, arguments),
        false => d.launch("relax", [4, 1, 1], [64, 1, 1], 0, null_mut(), arguments),
    };
    for _ in 0..n_round {
        p = (0..n).map(|i| 0.5 * (p[i] + p[(i + 1) % n])).collect();
    }
    (code, d.read::<f32>(if n_round % 2 == 1 { b } else { a }, n) == p)
}

/// The largest difference between a product by tensor cores and one by a loop.
pub fn multiplied(d: &Driver, bf: bool) -> (i32, f32) {
    let (n_row, n_col, k) = (16usize, 32usize, 96usize);
    let bits = |v: f32| if bf { bf16::from_f32(v).to_bits() } else { f16::from_f32(v).to_bits() };
    let value = |i: usize, m: usize| ((i * m % 23) as f32 - 11.0) * 0.25;
    let (pa, pb) = (
        d.upload(&(0..n_row * k).map(|i| bits(value(i, 37))).collect::<Vec<_>>()),
        d.upload(&(0..n_col * k).map(|i| bits(value(i, 17))).collect::<Vec<_>>()),
    );
    let c = d.alloc(n_row * n_col * 4);
    let name = if bf { "multiply_bf16" } else { "multiply_f16" };
    let code = d.launch(name, [1, 1, 1], [32, 1, 1], 0, null_mut(), args![pa, pb, c, k as i32, n_col as i32]);
    let got: Vec<f32> = d.read(c, n_row * n_col);
    let mut worst = 0f32;
    for (i, got) in got.iter().enumerate() {
        let want: f32 = (0..k).map(|j| value(i / n_col * k + j, 37) * value(i % n_col * k + j, 17)).sum();
        worst = worst.max(if got.is_nan() { f32::INFINITY } else { (got - want).abs() });
    }
    (code, worst)
}

/// The same of a product by a warpgroup, of factors as stored by `way`.
pub fn multiplied_by_warpgroup(d: &Driver, way: &str) -> (i32, f32) {
    let (n_row, n_col, k) = (64usize, 128usize, 256usize);
    let across = |at: usize| way.as_bytes()[at] == [b't', b'n'][at];
    // Small integers and halves: every sum is exact.
    let [a, b] = [(n_row, 37), (n_col, 17)].map(|(n, m)| {
        (0..n * k).map(|i| ((i * m % 23) as f32 - 11.0) * if i % 7 == 0 { 0.5 } else { 1.0 }).collect::<Vec<_>>()
    });
    // Of rows or columns `of`, [of, k].
    let stored = |x: &[f32], of: usize, across: bool| -> Vec<u16> {
        let place = |i: usize| if across { i % of * k + i / of } else { i };
        (0..of * k).map(|i| bf16::from_f32(x[place(i)]).to_bits()).collect()
    };
    let (pa, pb) = (d.upload(&stored(&a, n_row, across(0))), d.upload(&stored(&b, n_col, across(1))));
    let c = d.alloc(n_row * n_col * 4);
    let name = format!("multiply_wgmma_{way}");
    let code = d.launch(&name, [1, 1, 1], [128, 1, 1], 48 << 10, null_mut(), args![pa, pb, c, k as i32]);
    let mut worst = 0f32;
    for (i, got) in d.read::<f32>(c, n_row * n_col).into_iter().enumerate() {
        let want: f32 = (0..k).map(|j| a[i / n_col * k + j] * b[i % n_col * k + j]).sum();
        worst = worst.max(if got.is_nan() { f32::INFINITY } else { (got - want).abs() });
    }
    (code, worst)
}

#[test]
fn reduces() {
    let d = driver();
    let x: Vec<f32> = (0..1000).map(|i| (i % 7) as f32).collect();
    let p = d.upload(&x);
    for s in schedules() {
        d.schedule(s);
        let out = d.upload(&[0f32]);
        assert_eq!(d.launch("block_sum", [4, 1, 1], [256, 1, 1], 32, null_mut(), args![p, out, 1000i32]), 0);
        assert_eq!(d.read::<f32>(out, 1)[0], x.iter().sum::<f32>(), "{s}");
        assert_eq!(d.free(out), 0);
    }
}

#[test]
fn rotates_by_shared_memory() {
    for s in schedules() {
        driver().schedule(s);
        assert_eq!(rotated(driver()), (0, true), "{s}");
    }
}

#[test]
fn multiplies_by_tiles() {
    let d = driver();
    let n = 48;
    let (a, b): (Vec<f32>, Vec<f32>) =
        (0..n * n).map(|i| ((i * 37 % 11) as f32 - 5.0, (i * 17 % 13) as f32 - 6.0)).unzip();
    let (pa, pb, c) = (d.upload(&a), d.upload(&b), d.alloc(n * n * 4));
    for s in schedules() {
        d.schedule(s);
        assert_eq!(d.launch("matmul", [3, 3, 1], [16, 16, 1], 0, null_mut(), args![pa, pb, c, n as i32]), 0);
        for (i, got) in d.read::<f32>(c, n * n).iter().enumerate() {
            let want: f32 = (0..n).map(|k| a[i / n * n + k] * b[k * n + i % n]).sum();
            assert_eq!(*got, want, "{s}");
        }
    }
}

#[test]
fn blocks_wait_for_each_other() {
    let d = driver();
    for s in schedules() {
        d.schedule(s);
        assert_eq!(relaxed(d, true), (0, true), "{s}");
    }
    let z = d.alloc(4);
    let arguments = args![z, z, 0i32, 0i32, z];
    assert_eq!(d.launch_cooperative("relax", [5, 1, 1], [64, 1, 1], 0, arguments), TOO_LARGE);
}

#[test]
fn tensor_cores_multiply() {
    for s in schedules() {
        driver().schedule(s);
        assert_eq!(multiplied(driver(), false), (0, 0.0), "f16, {s}");
        assert_eq!(multiplied(driver(), true), (0, 0.0), "bf16, {s}");
    }
}

#[test]
fn warpgroups_multiply_factors_stored_either_way() {
    for s in schedules() {
        driver().schedule(s);
        for way in ["nt", "nn", "tt", "tn"] {
            assert_eq!(multiplied_by_warpgroup(driver(), way), (0, 0.0), "{way}, {s}: {}", driver().last_fault());
        }
    }
}

#[test]
fn tensor_cores_multiply_what_they_look_at() {
    let d = driver();
    // The twelfth bit of the mantissa rounds away from zero; then all products and sums are exact.
    let value = |i: usize, n: usize| ((i * n % 31 % 3) as f32 - 1.0) * (1.0 + 2f32.powi(-11));
    let rounded = |x: f32| f32::from_bits((x.to_bits() + 0x1000) & !0x1fff);
    let (a, b): (Vec<f32>, Vec<f32>) =
        ((0..128).map(|i| value(i, 37)).collect(), (0..64).map(|i| value(i, 17)).collect());
    let (pa, pb, c, pairs) = (d.upload(&a), d.upload(&b), d.alloc(128 * 4), d.alloc(64 * 4));
    for s in schedules() {
        d.schedule(s);
        assert_eq!(d.launch("multiply_tf32", [1, 1, 1], [32, 1, 1], 0, null_mut(), args![pa, pb, c, pairs]), 0);
        for (i, got) in d.read::<f32>(c, 128).into_iter().enumerate() {
            let want: f32 = (0..8).map(|k| rounded(a[i / 8 * 8 + k]) * rounded(b[i % 8 * 8 + k])).sum();
            assert_eq!(got, want, "{s}");
        }
        for (pair, a) in d.read::<u32>(pairs, 64).into_iter().zip(a.chunks_exact(2)) {
            let [low, high] = [a[0], a[1]].map(|x| u32::from(bf16::from_f32(x).to_bits()));
            assert_eq!(pair, low | high << 16);
        }
    }
}

#[test]
fn matrices_are_loaded_by_lanes() {
    let d = driver();
    let x: Vec<u16> = (0..256).collect();
    let (p, out) = (d.upload(&x), d.alloc(32 * 8 * 4));
    assert_eq!(d.launch("matrices", [1, 1, 1], [32, 1, 1], 0, null_mut(), args![p, out]), 0);
    let got: Vec<u32> = d.read(out, 256);
    for lane in 0..32 {
        for m in 0..4 {
            let (r, c) = (lane / 4, 2 * (lane % 4));
            let at = |r: usize, c: usize| u32::from(x[(m * 8 + r) * 8 + c]);
            assert_eq!(got[lane * 8 + m], at(r, c) | at(r, c + 1) << 16);
            assert_eq!(got[lane * 8 + 4 + m], at(c, r) | at(c + 1, r) << 16);
        }
    }
}

#[test]
fn warps_and_words() {
    let d = driver();
    let halves: Vec<u16> = (0..33u32)
        .map(|i| [0x3c00, 0x0001, 0xbbff, 0x7bf0, 0x6401, 0x2e66, 0x8400][i as usize % 7] + (i / 7) as u16)
        .collect();
    let p = d.upload(&halves);
    #[repr(C)]
    struct Weights {
        a: u32,
        b: u64,
        c: [f32; 3],
    }
    let w = Weights { a: 5, b: 70, c: [0.0, 0.0, 900.0] };
    // SAFETY: the structure's bytes are read as bytes, padding included, which the kernel does not look at.
    let w =
        unsafe { std::slice::from_raw_parts((&raw const w).cast::<std::mem::MaybeUninit<u8>>(), size_of::<Weights>()) };
    let w: Vec<u8> = w
        .iter()
        .enumerate()
        .map(|(i, b)| {
            if (4..8).contains(&i) || i >= 28 {
                0
            } else {
                // SAFETY: not padding.
                unsafe { b.assume_init() }
            }
        })
        .collect();
    for s in schedules() {
        d.schedule(s);
        let out = d.upload(&[0u32; 32 * 16 + 2]);
        let (out_bytes, small, large, p) = (out.to_ne_bytes(), [3u8], 20000f64.to_ne_bytes(), p.to_ne_bytes());
        let code = d.launch("words", [1, 1, 1], [32, 1, 1], 0, null_mut(), &[&out_bytes, &w, &small, &large, &p]);
        assert_eq!(code, 0);
        let got: Vec<u32> = d.read(out, 32 * 16 + 2);
        let h = |b: u16| f16::from_bits(b);
        let pair = |f: &dyn Fn(usize) -> f64| {
            u32::from(f16::from_f64(f(0)).to_bits()) | u32::from(f16::from_f64(f(1)).to_bits()) << 16
        };
        for lane in 0..32u32 {
            let g = &got[lane as usize * 16..][..16];
            let i = lane as usize;
            assert_eq!(g[0], 5 + 70 + 900 + 3 + 20000);
            assert_eq!(g[1], (0..32).filter(|l| l % 3 == 0).map(|l| 1u32 << l).sum::<u32>());
            assert_eq!(g[2], 3);
            assert_eq!(g[3], 15);
            assert_eq!(g[4], if lane + 4 < 32 { lane + 4 } else { lane });
            assert_eq!(g[5], lane ^ 8);
            assert_eq!(g[6], 6);
            assert_eq!(g[7], if lane < 16 { 0xaaaa } else { 0xcccc0000 });
            let ffs = if lane == 0 { 0 } else { lane.trailing_zeros() + 1 };
            assert_eq!(g[8], lane.count_ones() + lane.leading_zeros() * 100 + ffs * 10000);
            assert_eq!(g[9], ((lane * 77) & 0xf0f) | 0x6400);
            let fma = |e: usize| {
                let (b, c) = [(2.5, 1.0), (1.5, -0.5)][e];
                h(halves[i + e]).to_f64() * b + c
            };
            assert_eq!(g[10], pair(&fma), "{s}, lane {lane}");
            assert_eq!(g[11], pair(&|e| if e == 0 { h(halves[i]).to_f64() - 1024.0 } else { 0.0 }));
            assert_eq!(g[12], pair(&|e| if e == 0 { h(halves[i]).to_f64() * h(halves[i + 1]).to_f64() } else { 0.0 }));
            let same = h(halves[i]).to_f32();
            let finite = f16::from_f32(same.clamp(-65504.0, 65504.0)).to_bits();
            if !same.is_nan() {
                assert_eq!(g[13], u32::from(finite) | u32::from(bf16::from_f32(same).to_bits()) << 16);
            }
            assert_eq!(g[14], 1);
            let e = lane as f32 - 130.0;
            assert_eq!(f32::from_bits(g[15]), if e < -126.0 { 0.0 } else { e.exp2() });
        }
        assert_eq!(got[512..], [32, 31]);
        d.free(out);
    }
}

#[test]
fn short_copies_end_in_zeros() {
    let d = driver();
    let x: Vec<u8> = (0..512).map(|i| (i % 250 + 1) as u8).collect();
    let (p, out) = (d.upload(&x), d.alloc(512));
    assert_eq!(d.launch("copy_with_zeros", [1, 1, 1], [32, 1, 1], 0, null_mut(), args![p, out]), 0);
    for (i, got) in d.read::<u8>(out, 512).into_iter().enumerate() {
        assert_eq!(got, if i % 16 < i / 16 % 17 { x[i] } else { 0 });
    }
}

// Prints what a CUDA thread costs: `cargo test --release -p param-cuda-emulation speed -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn speed() {
    let d = driver();
    let out = d.alloc(1024 * 256 * 4);
    let time = |name: &str, what: &str, n_block: u32, n: i32, each: f64| {
        for _ in 0..2 {
            let start = std::time::Instant::now();
            let arguments: &[&[u8]] = args![out, n];
            let arguments = if name == "nothing" { &[] } else { arguments };
            assert_eq!(d.launch(name, [n_block, 1, 1], [256, 1, 1], 0, null_mut(), arguments), 0);
            let ns = start.elapsed().as_secs_f64() * 1e9 / f64::from(n_block) / 256.0;
            println!("{name}: {ns:.0} ns a thread, {:.1} ns {what}", ns / each);
        }
    };
    time("nothing", "each", 1024, 0, 1.0);
    time("barriers", "a thread's barrier", 64, 100, 100.0);
    time("shuffles", "a thread's shuffle", 64, 100, 100.0);
}
