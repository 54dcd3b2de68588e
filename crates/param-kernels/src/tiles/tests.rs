//! Every instruction set's products against the plain sum over weights as ggml reads them, which the scalar table is held to first.

use super::{ActivationBlock, Inputs, Operand, TILE_ROWS, TileFormat};
use crate::Kernels;
use gguf::GgmlType;
use half::bf16;
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const FORMATS: [(TileFormat, GgmlType); 8] = [
    (TileFormat::Q8_0, GgmlType::Q8_0),
    (TileFormat::Q4_0, GgmlType::Q4_0),
    (TileFormat::Q4K, GgmlType::Q4_K),
    (TileFormat::Q6K, GgmlType::Q6_K),
    (TileFormat::F32, GgmlType::F32),
    (TileFormat::F16, GgmlType::F16),
    (TileFormat::Bf16, GgmlType::BF16),
    (TileFormat::F16AsBf16, GgmlType::F16),
];

/// Random rows as stored, of any bytes but for finite scales: [n_row, row_bytes].
fn stored(ty: GgmlType, n_row: usize, n_block: usize, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let type_size = ty.type_size() as usize;
    let mut bytes = vec![0; n_row * n_block * type_size];
    rng.fill(&mut bytes[..]);
    for block in bytes.chunks_exact_mut(type_size) {
        // Upper bytes of the floats in a block: bit 6 is the highest of an exponent, so that magnitudes stay below 2.
        let floats: &[usize] = match ty {
            GgmlType::Q8_0 | GgmlType::Q4_0 | GgmlType::F16 | GgmlType::BF16 => &[1],
            GgmlType::Q4_K => &[1, 3],
            GgmlType::Q6_K => &[209],
            _ => &[3],
        };
        floats.iter().for_each(|&at| block[at] &= !0x40);
    }
    bytes
}

/// Rows of activations in every form.
struct Activations {
    blocks: Vec<Vec<ActivationBlock>>,
    pairs: Vec<Vec<u32>>,
    floats: Vec<Vec<f32>>,
}

impl Activations {
    fn new(k: &Kernels, x: &[f32], n_col: usize) -> Activations {
        let rows: Vec<&[f32]> = x.chunks_exact(n_col).collect();
        let quantized = |x: &&[f32]| {
            let mut blocks = vec![ActivationBlock::default(); x.len() / ActivationBlock::N_ELEMENT];
            assert!(!x.len().is_multiple_of(ActivationBlock::N_ELEMENT) || k.quantize_row(x, &mut blocks));
            blocks
        };
        let paired = |x: &&[f32]| {
            let mut pairs = vec![0; x.len().div_ceil(2)];
            k.pair_row(x, &mut pairs);
            pairs
        };
        Activations {
            blocks: rows.iter().map(quantized).collect(),
            pairs: rows.iter().map(paired).collect(),
            floats: rows.iter().map(|x| x.to_vec()).collect(),
        }
    }

    /// Element `i` of a row as the products read it.
    fn value(&self, operand: Operand, row: usize, i: usize) -> f64 {
        f64::from(match operand {
            Operand::Int8 => self.blocks[row][i / 32].value(i % 32),
            Operand::Bf16 => f32::from_bits(self.pairs[row][i / 2] >> (16 * (i % 2)) << 16),
            Operand::F32 => self.floats[row][i],
        })
    }

    fn multiply(
        &self,
        k: &Kernels,
        format: TileFormat,
        tiles: &[u8],
        n_tile: usize,
        rows: std::ops::Range<usize>,
    ) -> Vec<f32> {
        fn slices<T>(rows: &[Vec<T>]) -> Vec<&[T]> {
            rows.iter().map(Vec::as_slice).collect()
        }
        let mut out = vec![f32::NAN; rows.len() * n_tile * TILE_ROWS];
        match format.operand() {
            Operand::Int8 => format.matmul(k, tiles, n_tile, Inputs::Int8(&slices(&self.blocks[rows])), &mut out),
            Operand::Bf16 => format.matmul(k, tiles, n_tile, Inputs::Bf16(&slices(&self.pairs[rows])), &mut out),
            Operand::F32 => format.matmul(k, tiles, n_tile, Inputs::F32(&slices(&self.floats[rows])), &mut out),
        }
        out
    }
}

proptest! {
    /// Error bound: integer sums are exact and so are products of bf16; each block of 32 adds at most 4 roundings of a product or
    /// sum of weight by activation, before minima cancel, and float formats one per column: (4 n + 4) 2^-24 sum |w| |x|, n the
    /// number of roundings in a chain and |w| the largest of its block of 32, doubled for what a minimum takes off.
    #[test]
    fn every_isa_multiplies_tiles_as_ggml_reads_them(
        (format, ty) in prop::sample::select(&FORMATS[..]), n_row in 1usize..=3 * TILE_ROWS, n_block in 1usize..5, n_token in 0usize..28, seed: u64,
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let n_block = if ty.block_size() == 1 { n_block * 13 } else { n_block };
        let n_col = n_block * ty.block_size() as usize;
        let bytes = stored(ty, n_row, n_block, &mut rng);
        let row_bytes = bytes.len() / n_row;
        let mut weights = vec![0.0; n_row * n_col];
        param_ggml::dequantize(ty, &bytes, &mut weights).unwrap();
        if format == TileFormat::F16AsBf16 {
            weights.iter_mut().for_each(|w| *w = bf16::from_f32(*w).to_f32());
        }
        let n_tile = n_row.div_ceil(TILE_ROWS);
        let mut tiles = vec![0; n_tile * format.tile_bytes(n_col)];
        for (rows, tile) in bytes.chunks(TILE_ROWS * row_bytes).zip(tiles.chunks_exact_mut(format.tile_bytes(n_col))) {
            format.pack(rows, n_col, tile);
        }
        let floats: Vec<f32> = (0..n_token * n_col).map(|_| rng.random_range(-3.0..3.0)).collect();
        for k in Kernels::supported() {
            let x = Activations::new(k, &floats, n_col);
            let out = x.multiply(k, format, &tiles, n_tile, 0..n_token);
            for (token, out) in out.chunks_exact(n_tile * TILE_ROWS).enumerate() {
                for (row, weights) in weights.chunks_exact(n_col).enumerate() {
                    let x = |i: usize| x.value(format.operand(), token, i);
                    let want: f64 = (0..n_col).map(|i| f64::from(weights[i]) * x(i)).sum();
                    let magnitude: f64 = weights
                        .chunks(ActivationBlock::N_ELEMENT)
                        .enumerate()
                        .map(|(b, w)| {
                            let largest = w.iter().fold(0.0f32, |m, w| m.max(w.abs()));
                            (0..w.len()).map(|i| 2.0 * f64::from(largest) * x(b * 32 + i).abs()).sum::<f64>()
                        })
                        .sum();
                    let n_rounding = if ty.block_size() == 1 { n_col } else { n_col / 16 };
                    let bound = (4 * n_rounding + 4) as f64 * 2f64.powi(-24) * magnitude;
                    let got = f64::from(out[row]);
                    prop_assert!((got - want).abs() <= bound, "{format:?} {}: {got} for {want}, bound {bound}", k.isa());
                }
                prop_assert!(out[n_row..].iter().all(|&v| v == 0.0), "rows of padding");
            }
            // There the scalar table fuses its multiply-adds as well, so that both do the same operations.
            if let Some(&scalar) = Kernels::supported().last().filter(|_| cfg!(target_arch = "aarch64")) {
                prop_assert_eq!(&out, &Activations::new(scalar, &floats, n_col).multiply(scalar, format, &tiles, n_tile, 0..n_token));
            }
            // Alone or in company, and tile by tile, a token's result is the same to the bit.
            for (token, want) in out.chunks_exact(n_tile * TILE_ROWS).enumerate() {
                prop_assert_eq!(&x.multiply(k, format, &tiles, n_tile, token..token + 1)[..], want);
                for (tile, want) in tiles.chunks_exact(tiles.len() / n_tile).zip(want.chunks_exact(TILE_ROWS)) {
                    prop_assert_eq!(&x.multiply(k, format, tile, 1, token..token + 1)[..], want);
                }
            }
        }
    }

    /// Error bounds: half a step of 1/127 of the block's largest magnitude, and a rounding; with the rest half a step of 1/127 of
    /// that, and a rounding of what was rounded.
    #[test]
    fn every_isa_quantizes_to_the_nearest_step(x in prop::collection::vec(prop_oneof![-1e-3f32..1e-3, -30.0f32..30.0], 64)) {
        for k in Kernels::supported() {
            let mut blocks = [ActivationBlock::default(); 2];
            let mut rests = [ActivationBlock::default(); 2];
            prop_assert!(k.quantize_row(&x, &mut blocks));
            k.quantize_rest(&x, &blocks, &mut rests);
            for ((x, block), rest) in x.chunks_exact(32).zip(&blocks).zip(&rests) {
                let step = x.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0;
                for (i, x) in x.iter().enumerate() {
                    prop_assert!((block.value(i) - x).abs() <= 0.5001 * step, "{}: {} for {x}", k.isa(), block.value(i));
                    let both = block.value(i) + rest.value(i);
                    prop_assert!((both - x).abs() <= 0.26 / 127.0 * step + 2e-7 * x.abs(), "{}: {both} for {x}", k.isa());
                }
                let sum = |q: &[[i8; 4]]| q.iter().flatten().map(|&q| i32::from(q)).sum::<i32>();
                prop_assert_eq!(block.minus_sum, -sum(&block.q));
                prop_assert_eq!(block.minus_low_sum, -sum(&block.q[..4]));
                prop_assert_eq!(block.minus_scaled_sum, block.scale * block.minus_sum as f32);
            }
        }
    }

    #[test]
    fn every_isa_rounds_to_the_nearest_bf16(x in prop::collection::vec(any::<f32>().prop_filter("finite", |x| x.is_finite()), 0..70)) {
        for k in Kernels::supported() {
            let mut pairs = vec![0; x.len().div_ceil(2)];
            k.pair_row(&x, &mut pairs);
            for (i, &x) in x.iter().enumerate() {
                prop_assert_eq!((pairs[i / 2] >> (16 * (i % 2))) as u16, bf16::from_f32(x).to_bits(), "{}: {}", k.isa(), x);
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
                // Whoever does not ask sees it in the product.
                assert!(!blocks[at / 32].scale.is_finite());
            }
        }
        assert!(k.quantize_row(&[1e-38; 64], &mut blocks));
        assert!((0..32).all(|i| blocks[0].value(i) == 0.0));
        assert!(k.quantize_row(&[f32::MAX; 64], &mut blocks));
        assert_eq!(blocks[0].q, [[127; 4]; 8]);
    }
}
