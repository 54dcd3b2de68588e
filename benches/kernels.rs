//! Kernels on one thread, in operations or bytes a second: `cargo bench --bench kernels -- FILTER`.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use param_kernels::{
    ActivationBlock, Factor, Inputs, Kernels, Matrix, Operand, Precision, Product, TILE_ROWS, TileFormat, Workspace,
};

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i * 7919 % 2000) as f32 / 1000.0 - 1.0).collect()
}

/// [rows, depth] by [depth, columns] as training multiplies them: tokens by weights, and both kinds of gradients. The `gemm`
/// crate beside ours.
fn products(c: &mut Criterion) {
    let kernels = Kernels::get();
    for (name, (m, depth, n), transposed) in [
        ("forward", (2048, 384, 1536), [false, true]),
        ("gradient of inputs", (2048, 1536, 384), [false, false]),
        ("gradient of weights", (1536, 2048, 384), [true, false]),
        ("one expert's forward", (512, 768, 3072), [false, false]),
    ] {
        let mut group = c.benchmark_group(format!("product/{name}"));
        group.throughput(Throughput::Elements(2 * (m * depth * n) as u64)).sample_size(10);
        let (left, right) = (numbers(m * depth), numbers(depth * n));
        let factor = |data, rows, cols, transposed| -> Factor<'_> {
            if transposed { Matrix::f32(data, cols, rows).t() } else { Matrix::f32(data, rows, cols).factor() }
        };
        let (a, b) = (factor(&left, m, depth, transposed[0]), factor(&right, depth, n, transposed[1]));
        let mut out = vec![0.0; m * n];
        for (kind, precision) in [("ours, f32", Precision::F32), ("ours, bf16", Precision::Bf16)] {
            let product = Product::new(precision, a, b);
            let mut workspace = Workspace::default();
            group.bench_function(kind, |bencher| {
                bencher.iter(|| {
                    if transposed[0] {
                        // As gradients are added up: wide strips, some of the depth at a time.
                        for first in (0..n).step_by(Product::WIDE_STRIP) {
                            let cols = first..n.min(first + Product::WIDE_STRIP);
                            let step = Product::short_step(precision);
                            product.compute_steps(kernels, 0..m, cols.clone(), step, &mut workspace, |row, _, sums| {
                                kernels.axpy(1.0, sums, &mut out[row * n + cols.start..row * n + cols.end]);
                            });
                        }
                    } else {
                        for first in (0..n).step_by(product.strip()) {
                            let cols = first..n.min(first + product.strip());
                            product.compute(kernels, 0..m, cols.clone(), &mut workspace, |row, sums| {
                                out[row * n + cols.start..row * n + cols.end].copy_from_slice(sums);
                            });
                        }
                    }
                    black_box(&mut out);
                });
            });
        }
        let strides = |rows: usize, cols: usize, transposed: bool| match transposed {
            false => (1isize, cols as isize),
            true => (rows as isize, 1),
        };
        let ((a_cs, a_rs), (b_cs, b_rs)) = (strides(m, depth, transposed[0]), strides(depth, n, transposed[1]));
        group.bench_function("the gemm crate, f32", |bencher| {
            bencher.iter(|| {
                // SAFETY: the strides describe the three matrices, each of which fills its vector; `out` overlaps neither other.
                unsafe {
                    gemm::gemm(
                        m,
                        n,
                        depth,
                        out.as_mut_ptr(),
                        1,
                        n as isize,
                        false,
                        left.as_ptr(),
                        a_cs,
                        a_rs,
                        right.as_ptr(),
                        b_cs,
                        b_rs,
                        0.0,
                        1.0,
                        false,
                        false,
                        false,
                        gemm::Parallelism::None,
                    );
                }
                black_box(&mut out);
            });
        });
        group.finish();
    }
}

/// Weights in tiles: bytes a second for one token, operations a second for 32.
fn tiles(c: &mut Criterion) {
    let (n_col, n_tile) = (768, 4);
    let kernels = Kernels::get();
    for (name, format) in [
        ("q8_0", TileFormat::Q8_0),
        ("q4_0", TileFormat::Q4_0),
        ("q4_k", TileFormat::Q4K),
        ("q6_k", TileFormat::Q6K),
        ("f32", TileFormat::F32),
        ("f16", TileFormat::F16),
        ("bf16", TileFormat::Bf16),
    ] {
        let weights = vec![0x21u8; n_tile * format.tile_bytes(n_col)];
        let mut group = c.benchmark_group(format!("tiles/{name}"));
        for n_token in [1, 8, 32] {
            let floats = numbers(n_token * n_col);
            let mut blocks = vec![ActivationBlock::default(); n_token * n_col / ActivationBlock::N_ELEMENT];
            kernels.quantize_row(&floats, &mut blocks);
            let mut pairs = vec![0; n_token * n_col / 2];
            kernels.pair_row(&floats, &mut pairs);
            let int8 = blocks.chunks(n_col / ActivationBlock::N_ELEMENT).collect::<Vec<_>>();
            let bf16 = pairs.chunks(n_col / 2).collect::<Vec<_>>();
            let f32s = floats.chunks(n_col).collect::<Vec<_>>();
            let x = match format.operand() {
                Operand::Int8 => Inputs::Int8(&int8),
                Operand::Bf16 => Inputs::Bf16(&bf16),
                Operand::F32 => Inputs::F32(&f32s),
            };
            let mut out = vec![0.0; n_token * n_tile * TILE_ROWS];
            group.throughput(match n_token {
                1 => Throughput::Bytes(weights.len() as u64),
                _ => Throughput::Elements((2 * n_token * n_col * n_tile * TILE_ROWS) as u64),
            });
            group.bench_function(BenchmarkId::from_parameter(n_token), |bencher| {
                bencher.iter(|| format.matmul(kernels, black_box(&weights), n_tile, x, &mut out));
            });
        }
        group.finish();
    }
}

#[allow(missing_docs, reason = "the macro's function")]
mod group {
    use super::*;
    criterion_group!(benches, products, tiles);
}
criterion_main!(group::benches);
