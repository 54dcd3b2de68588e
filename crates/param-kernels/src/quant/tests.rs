//! Every instruction set's products against the plain sum over weights as ggml reads them.

use super::{ActivationBlock, TILE_ROWS, TileFormat};
use crate::Kernels;
use gguf::GgmlType;
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const FORMATS: [(TileFormat, GgmlType); 2] = [(TileFormat::Q8_0, GgmlType::Q8_0), (TileFormat::Q4K, GgmlType::Q4_K)];

/// Random rows as stored, of any bytes but for finite scales: [n_row, row_bytes].
fn stored(ty: GgmlType, n_row: usize, n_block: usize, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut bytes = vec![0; n_row * n_block * ty.type_size() as usize];
    rng.fill(&mut bytes[..]);
    let n_half = if ty == GgmlType::Q8_0 { 1 } else { 2 };
    for block in bytes.chunks_exact_mut(ty.type_size() as usize) {
        for half in block[..2 * n_half].chunks_exact_mut(2) {
            half[1] &= !0x40; // exponents below 16: magnitudes below 2
        }
    }
    bytes
}

fn quantized(k: &Kernels, x: &[f32]) -> Vec<ActivationBlock> {
    let mut blocks = vec![ActivationBlock::default(); x.len() / ActivationBlock::N_ELEMENT];
    assert!(k.quantize_row(x, &mut blocks));
    blocks
}

proptest! {
    /// Error bound: integer sums are exact; each block adds at most 4 roundings of a product or sum of weight by
    /// activation, before minima cancel, so (4 n_block + 4) 2^-24 sum |w| |x| with |w| taken before the minimum is taken off.
    #[test]
    fn every_isa_multiplies_tiles_as_ggml_reads_them(
        (format, ty) in prop::sample::select(&FORMATS[..]), n_row in 1usize..=TILE_ROWS, n_block in 1usize..5, n_token in 0usize..20, seed: u64,
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let n_col = n_block * ty.block_size() as usize;
        let bytes = stored(ty, n_row, n_block, &mut rng);
        let row_bytes = bytes.len() / n_row;
        let mut weights = vec![0.0; n_row * n_col];
        param_ggml::dequantize(ty, &bytes, &mut weights).unwrap();
        let mut tile = vec![0; format.tile_bytes(row_bytes)];
        format.pack(&bytes, row_bytes, &mut tile);
        let x: Vec<f32> = (0..n_token * n_col).map(|_| rng.random_range(-3.0..3.0)).collect();
        for k in Kernels::supported() {
            let rows: Vec<_> = x.chunks_exact(n_col).map(|x| quantized(k, x)).collect();
            let rows: Vec<&[ActivationBlock]> = rows.iter().map(Vec::as_slice).collect();
            let mut out = vec![[f32::NAN; TILE_ROWS]; n_token];
            format.matmul(k, &tile, &rows, &mut out);
            for (x, out) in rows.iter().zip(&out) {
                for (row, weights) in weights.chunks_exact(n_col).enumerate() {
                    let x = |i: usize| f64::from(x[i / 32].value(i % 32));
                    let want: f64 = (0..n_col).map(|i| f64::from(weights[i]) * x(i)).sum();
                    let magnitude: f64 = weights
                        .chunks_exact(ActivationBlock::N_ELEMENT)
                        .enumerate()
                        .map(|(b, w)| {
                            let largest = w.iter().fold(0.0f32, |m, w| m.max(w.abs()));
                            (0..32).map(|i| 2.0 * f64::from(largest) * x(b * 32 + i).abs()).sum::<f64>()
                        })
                        .sum();
                    let bound = (4 * n_col / 32 + 4) as f64 * 2f64.powi(-24) * magnitude;
                    let got = f64::from(out[row]);
                    prop_assert!((got - want).abs() <= bound, "{ty} {}: {got} for {want}, bound {bound}", k.isa());
                }
                prop_assert!(out[n_row..].iter().all(|&v| v == 0.0), "rows of padding");
            }
            // Alone or in company, a token's result is the same to the bit.
            for (x, out) in rows.iter().zip(&out) {
                let mut alone = [[f32::NAN; TILE_ROWS]];
                format.matmul(k, &tile, &[x], &mut alone);
                prop_assert_eq!(&alone[0], out);
            }
        }
    }

    /// Error bound: half a step of 1/127 of the block's largest magnitude, and a rounding.
    #[test]
    fn every_isa_quantizes_to_the_nearest_step(x in prop::collection::vec(prop_oneof![-1e-3f32..1e-3, -30.0f32..30.0], 64)) {
        let want = quantized(Kernels::supported()[Kernels::supported().len() - 1], &x);
        for k in Kernels::supported() {
            for ((x, block), want) in x.chunks_exact(32).zip(quantized(k, &x)).zip(&want) {
                let step = x.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0;
                for (i, x) in x.iter().enumerate() {
                    prop_assert!((block.value(i) - x).abs() <= 0.5001 * step, "{}: {} for {x}", k.isa(), block.value(i));
                }
                prop_assert_eq!((block.q, block.scale, block.sum), (want.q, want.scale, want.sum));
                prop_assert_eq!(block.sum, block.q.iter().flatten().map(|&q| i32::from(q)).sum::<i32>());
                prop_assert_eq!(block.scaled_sum, block.scale * block.sum as f32);
            }
        }
    }
}

#[test]
fn numbers_that_are_not_finite_are_reported_and_tiny_ones_are_zero() {
    for k in Kernels::supported() {
        let mut blocks = [ActivationBlock::default(); 2];
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 17, 63] {
                let mut x = [1.0; 64];
                x[at] = bad;
                assert!(!k.quantize_row(&x, &mut blocks), "{}: {bad} at {at}", k.isa());
            }
        }
        assert!(k.quantize_row(&[1e-38; 64], &mut blocks));
        assert!((0..32).all(|i| blocks[0].value(i) == 0.0));
        assert!(k.quantize_row(&[f32::MAX; 64], &mut blocks));
        assert_eq!(blocks[0].q, [[127; 4]; 8]);
    }
}
