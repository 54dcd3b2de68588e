//! Every tensor type through quantize, dequantize and dot product: error bounds, odd inputs, wrong arguments.

use std::f32::consts::TAU;

use gguf::GgmlType::{self, *};
use half::{bf16, f16};
use param_ggml::{DotKernel, Error, can_quantize, dequantize, quantize};
use proptest::prelude::*;

/// RMS error relative to the RMS of normally distributed weights that each format must stay under.
/// Measured on the rows of `normal(1, ..)` and rounded up by a tenth.
const RMS_BOUNDS: [(GgmlType, f64); 15] = [
    (F32, 0.0),
    (F16, 2.3e-4),
    (BF16, 1.85e-3),
    (Q8_0, 6.0e-3),
    (Q6_K, 0.020),
    (Q5_K, 0.041),
    (Q5_1, 0.043),
    (Q5_0, 0.048),
    (Q4_K, 0.080),
    (Q4_1, 0.088),
    (Q4_0, 0.096),
    (IQ4_NL, 0.085),
    (IQ4_XS, 0.085),
    (Q3_K, 0.169),
    (Q2_K, 0.329),
];

/// A stream of random bits (splitmix64): the same on every machine.
fn bits(seed: u64) -> impl Iterator<Item = u64> {
    (1..).map(move |i: u64| {
        let z = seed.wrapping_add(i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

/// N(0, 1) by Box and Muller's transform.
fn normal(seed: u64, n: usize) -> Vec<f32> {
    let mut uniform = bits(seed).map(|bits| ((bits >> 40) as f32 + 0.5) / (1 << 24) as f32);
    let mut next = || uniform.next().unwrap();
    (0..n).map(|_| (-2.0 * next().ln()).sqrt() * (TAU * next()).cos()).collect()
}

fn storable() -> impl Iterator<Item = GgmlType> {
    GgmlType::all().filter(|&ty| can_quantize(ty))
}

/// Types that have a dot product, grid formats included.
fn multipliable() -> impl Iterator<Item = GgmlType> {
    GgmlType::all().filter(|&ty| DotKernel::new(ty).is_ok())
}

fn n_bytes(ty: GgmlType, n: usize) -> usize {
    ty.row_size(n as u64).unwrap() as usize
}

fn round_trip(ty: GgmlType, row: &[f32], imatrix: Option<&[f32]>) -> Vec<f32> {
    let mut stored = vec![0; n_bytes(ty, row.len())];
    quantize(ty, row, row.len(), imatrix, &mut stored).unwrap();
    let mut restored = vec![f32::NAN; row.len()];
    dequantize(ty, &stored, &mut restored).unwrap();
    restored
}

fn relative_rms(expected: &[f32], found: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = expected.iter().zip(found).map(|(&a, &b)| square(a - b)).sum();
    (error / expected.iter().map(|&a| square(a)).sum::<f64>()).sqrt()
}

/// Rows of a type that cannot be quantized here: random blocks with an f16 scale of about 0.01 where each format has it.
fn random_blocks(ty: GgmlType, seed: u64, n: usize) -> Vec<u8> {
    let mut blocks: Vec<u8> = bits(seed).map(|bits| bits as u8).take(n_bytes(ty, n)).collect();
    let scale = f16::from_f32(0.01).to_le_bytes();
    for block in blocks.chunks_mut(ty.type_size() as usize) {
        if ty == IQ1_M {
            // Its scale is spread over the upper nibbles of the last four 16-bit words.
            let start = block.len() - 8;
            let nibbles = [scale[0] & 15, scale[0] >> 4, scale[1] & 15, scale[1] >> 4];
            nibbles.iter().enumerate().for_each(|(i, nibble)| {
                let byte = &mut block[start + 2 * i + 1];
                *byte = *byte & 15 | nibble << 4;
            });
        } else {
            block[..2].copy_from_slice(&scale);
        }
    }
    blocks
}

fn weight_rows(ty: GgmlType, seed: u64, n_row: usize, n: usize) -> Vec<u8> {
    if !can_quantize(ty) {
        return random_blocks(ty, seed, n_row * n);
    }
    let mut stored = vec![0; n_bytes(ty, n_row * n)];
    quantize(ty, &normal(seed, n_row * n), n, None, &mut stored).unwrap();
    stored
}

/// Bytes aligned as `DotKernel` asks.
fn activations(kernel: &DotKernel, row: &[f32]) -> Vec<u8> {
    let mut x = vec![0; kernel.activation_bytes(row.len()).unwrap()];
    kernel.quantize_row(row, &mut x).unwrap();
    x
}

#[test]
fn quantization_error_stays_under_each_formats_bound() {
    let weights = normal(1, 64 * 256);
    assert_eq!(storable().count(), RMS_BOUNDS.len());
    for (ty, bound) in RMS_BOUNDS {
        let found = relative_rms(&weights, &round_trip(ty, &weights, None));
        assert!(found <= bound, "{ty}: {found}, bound {bound}");
    }
}

#[test]
fn importance_lowers_the_error_of_the_columns_it_weighs() {
    let n = 1024;
    let weights = normal(2, n);
    let imatrix: Vec<f32> = (0..n).map(|i| if i % 8 == 0 { 1.0 } else { 0.0 }).collect();
    let important = |row: &[f32]| row.iter().step_by(8).copied().collect::<Vec<_>>();
    for ty in [Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS] {
        let error = |imatrix| relative_rms(&important(&weights), &important(&round_trip(ty, &weights, imatrix)));
        let (plain, weighted) = (error(None), error(Some(&imatrix)));
        assert!(weighted < plain, "{ty}: {weighted} with importance, {plain} without");
    }
}

#[test]
fn dot_product_is_that_of_the_dequantized_weights_and_activations() {
    // Odd and even numbers of blocks of 32, and a tail for the float types.
    for n in [32, 96, 256, 768, 37] {
        for ty in multipliable() {
            let kernel = DotKernel::new(ty).unwrap();
            let Ok(x_bytes) = kernel.activation_bytes(n) else { continue };
            let n_row = 5;
            let row = normal(3, n);
            let w = weight_rows(ty, 4, n_row, n);
            let x = activations(&kernel, &row);
            assert_eq!(x.len(), x_bytes);
            let mut found = vec![f32::NAN; n_row];
            kernel.dot_rows(&w, &x, &mut found).unwrap();

            let mut weights = vec![0.0; n_row * n]; // [n_row, n]
            dequantize(ty, &w, &mut weights).unwrap();
            for (i, (weights, found)) in weights.chunks(n).zip(found).enumerate() {
                let products = weights.iter().zip(&row).map(|(&w, &x)| f64::from(w) * f64::from(x));
                let expected: f64 = products.clone().sum();
                // The activations' 8 bits lose up to 1/254 of a block's largest; floats lose rounding only.
                let loss = if kernel.activation_type() == F32 { 1e-6 } else { 8e-3 };
                let bound = loss * products.map(|p| p * p).sum::<f64>().sqrt() * (1.0 + (n as f64).sqrt() / 8.0);
                let error = (f64::from(found) - expected).abs();
                assert!(error <= bound, "{ty}, n {n}, row {i}: expected {expected}, found {found}, bound {bound}");
            }
        }
    }
}

#[test]
fn every_type_of_the_command_line_has_a_dot_product() {
    storable().for_each(|ty| assert_eq!(DotKernel::new(ty).unwrap().weight_type(), ty));
}

#[test]
fn zero_constant_tiny_and_huge_rows_stay_finite() {
    let n = 512;
    let mut spike = vec![0.0; n];
    spike[77] = -32_768.0;
    let mut mixed = normal(5, n);
    mixed[..256].fill(1e-20);
    let rows = [
        vec![0.0; n],
        vec![-0.0; n],
        vec![0.25; n],
        vec![-3.0; n],
        vec![f32::MIN_POSITIVE; n],
        vec![1e-42; n],
        vec![2e-8; n],
        vec![-4e-8; n],
        vec![32_768.0; n],
        (0..n).map(|i| if i % 2 == 0 { 32_768.0 } else { -32_768.0 }).collect(),
        spike,
        mixed,
        normal(6, n).iter().map(|x| x * 1e-7).collect(),
        normal(6, n).iter().map(|x| x * 6_000.0).collect(),
    ];
    let imatrices = [None, Some(vec![0.0; n]), Some(vec![1e30; n]), Some((0..n).map(|i| (i % 2) as f32).collect())];
    for ty in storable() {
        for (i, row) in rows.iter().enumerate() {
            for imatrix in &imatrices {
                let restored = round_trip(ty, row, imatrix.as_deref());
                assert!(restored.iter().all(|x| x.is_finite()), "{ty}, row {i}: {restored:?}");
                let largest = row.iter().fold(0f32, |max, x| max.max(x.abs()));
                assert!(restored.iter().all(|x| x.abs() <= 1.6 * largest + 1e-6), "{ty}, row {i}: {restored:?}");
            }
            let kernel = DotKernel::new(ty).unwrap();
            let mut x = vec![0; kernel.activation_bytes(n).unwrap()];
            match kernel.quantize_row(row, &mut x) {
                Ok(()) => {
                    let mut out = [f32::NAN];
                    kernel.dot_rows(&weight_rows(ty, 7, 1, n), &x, &mut out).unwrap();
                    assert!(out[0].is_finite(), "{ty}, activations {i}");
                }
                // Its blocks carry their sum as f16.
                Err(error) => {
                    assert!(matches!(error, Error::TooLarge { ty: Q8_1, .. }), "{ty}, activations {i}: {error}")
                }
            }
        }
    }
}

#[test]
fn floats_round_to_nearest() {
    let row = normal(8, 300);
    for (restored, value) in round_trip(BF16, &row, None).into_iter().zip(&row) {
        assert_eq!(restored, bf16::from_f32(*value).to_f32());
    }
    for (restored, value) in round_trip(F16, &row, None).into_iter().zip(&row) {
        assert_eq!(restored, f16::from_f32(*value).to_f32());
    }
    assert_eq!(round_trip(F32, &row, None), row);
}

#[test]
fn numbers_that_a_type_cannot_hold_are_named() {
    for ty in storable() {
        let mut stored = vec![0; n_bytes(ty, 512)];
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut row = vec![1.0; 512];
            row[300] = bad;
            let error = quantize(ty, &row, 256, None, &mut stored).unwrap_err();
            assert!(matches!(error, Error::NotFinite { index: 300, .. }), "{ty}: {error}");
        }
        let mut row = vec![1.0; 512];
        row[300] = f32::MAX;
        match quantize(ty, &row, 256, None, &mut stored) {
            Ok(()) => assert_eq!(ty, F32),
            Err(error) => assert!(matches!(error, Error::TooLarge { index: 300, .. }), "{ty}: {error}"),
        }
    }
    let kernel = DotKernel::new(Q4_K).unwrap();
    let mut x = vec![0; kernel.activation_bytes(256).unwrap()];
    let error = kernel.quantize_row(&[f32::NAN; 256], &mut x).unwrap_err();
    assert_eq!(error.to_string(), "element 0 is NaN: only finite numbers can be stored as Q8_K");
}

#[test]
fn the_index_of_a_bad_number_counts_from_the_start_of_all_rows() {
    let mut rows = vec![0.5; 3 << 20];
    let index = (2 << 20) + 5;
    rows[index] = f32::NAN;
    let mut stored = vec![0; n_bytes(Q8_0, rows.len())];
    let error = quantize(Q8_0, &rows, 256, None, &mut stored).unwrap_err();
    assert!(matches!(error, Error::NotFinite { index: found, .. } if found == index), "{error}");
}

#[test]
fn wrong_lengths_are_errors() {
    for ty in storable() {
        let size = n_bytes(ty, 256);
        assert!(matches!(quantize(ty, &[0.0; 255], 256, None, &mut vec![0; size]), Err(Error::Length { .. })), "{ty}");
        assert!(matches!(quantize(ty, &[0.0; 256], 256, None, &mut vec![0; size - 1]), Err(Error::Length { .. })));
        assert!(matches!(quantize(ty, &[0.0; 256], 0, None, &mut []), Err(Error::RowLength { .. })));
        let imatrix = [1.0; 255];
        assert!(matches!(
            quantize(ty, &[0.0; 256], 256, Some(&imatrix), &mut vec![0; size]),
            Err(Error::Length { .. })
        ));
        assert!(matches!(dequantize(ty, &vec![0; size + 1], &mut [0.0; 256]), Err(Error::Length { .. })));

        let kernel = DotKernel::new(ty).unwrap();
        let x = activations(&kernel, &[1.0; 256]);
        assert!(matches!(kernel.dot_rows(&vec![0; 2 * size], &x, &mut [0.0; 3]), Err(Error::Length { .. })), "{ty}");
        assert!(kernel.dot_rows(&vec![0; size], &x[..x.len() - 1], &mut [0.0]).is_err(), "{ty}");
        assert!(matches!(kernel.dot_rows(&[], &[], &mut [0.0]), Err(Error::RowLength { .. })), "{ty}");
        assert!(matches!(kernel.quantize_row(&[1.0; 256], &mut [0; 7]), Err(Error::Length { .. })), "{ty}");
    }
    let error = quantize(Q4_K, &[0.0; 96], 96, None, &mut [0; 54]).unwrap_err();
    assert_eq!(error.to_string(), "rows of 96 elements: Q4_K needs a multiple of 256, from one block to 31 bits");
    assert!(matches!(dequantize(Q4_K, &[0; 54], &mut [0.0; 96]), Err(Error::RowLength { .. })));
}

#[test]
fn bad_importance_is_an_error() {
    for bad in [f32::NAN, f32::INFINITY, -1.0] {
        let mut imatrix = [1.0; 256];
        imatrix[9] = bad;
        let error = quantize(Q4_K, &[0.0; 256], 256, Some(&imatrix), &mut [0; 144]).unwrap_err();
        assert!(matches!(error, Error::Importance { index: 9, .. }), "{error}");
    }
}

#[test]
fn blocks_at_an_odd_address_are_errors() {
    let buffer = vec![0u8; 1024];
    let odd = &buffer[usize::from(buffer.as_ptr().addr().is_multiple_of(2))..];
    let mut row = [0.0; 256];
    assert!(matches!(dequantize(Q4_K, &odd[..144], &mut row), Err(Error::Misaligned { align: 2, .. })));
    let kernel = DotKernel::new(Q4_K).unwrap();
    let x = activations(&kernel, &row);
    assert!(matches!(kernel.dot_rows(&odd[..144], &x, &mut [0.0]), Err(Error::Misaligned { .. })));
}

#[test]
fn types_without_an_implementation_are_errors() {
    for ty in [I8, I16, I32, I64, F64, Q8_1, TQ1_0, TQ2_0, MXFP4] {
        let size = n_bytes(ty, 256);
        assert!(matches!(quantize(ty, &[0.0; 256], 256, None, &mut vec![0; size]), Err(Error::Unsupported { .. })));
        assert!(matches!(dequantize(ty, &vec![0; size], &mut [0.0; 256]), Err(Error::Unsupported { .. })), "{ty}");
        assert!(matches!(DotKernel::new(ty), Err(Error::Unsupported { .. })), "{ty}");
    }
}

#[test]
fn first_use_may_come_from_several_threads_at_once() {
    let weights = normal(9, 256);
    let stored: Vec<_> = std::thread::scope(|scope| {
        let convert = || {
            let mut stored = vec![0; n_bytes(Q4_K, 256)];
            quantize(Q4_K, &weights, 256, None, &mut stored).unwrap();
            stored
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(convert)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(stored.iter().all(|row| *row == stored[0]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_rows_come_back_close_and_rows_do_not_touch_each_other(
        seed: u64, n_row in 1usize..5, n_block in 1usize..4, log_scale in -12f32..9.0,
    ) {
        for (ty, bound) in RMS_BOUNDS {
            let n = n_block * (ty.block_size() as usize).max(32);
            let weights: Vec<f32> = normal(seed, n_row * n).iter().map(|x| x * log_scale.exp2()).collect();
            let mut stored = vec![0; n_bytes(ty, weights.len())];
            quantize(ty, &weights, n, None, &mut stored).unwrap();
            let mut restored = vec![f32::NAN; weights.len()];
            dequantize(ty, &stored, &mut restored).unwrap();
            // A few blocks scatter more than many, and their scales round coarsely where f16 is subnormal.
            let bound = 1.5 * bound + 2e-5 / f64::from(log_scale.exp2());
            let found = relative_rms(&weights, &restored);
            prop_assert!(found <= bound, "{}: {} over {}", ty, found, bound);
            let last = &weights[weights.len() - n..];
            prop_assert_eq!(&round_trip(ty, last, None), &restored[weights.len() - n..]);
        }
    }

    #[test]
    fn any_bytes_can_be_read_as_blocks(seed: u64, n_block in 1usize..6) {
        for ty in multipliable() {
            let n = n_block * (ty.block_size() as usize).max(32);
            let blocks: Vec<u8> = bits(seed).map(|bits| bits as u8).take(n_bytes(ty, n)).collect();
            prop_assert_eq!(dequantize(ty, &blocks, &mut vec![0.0; n]), Ok(()));
            let kernel = DotKernel::new(ty).unwrap();
            let x = activations(&kernel, &normal(seed, n));
            prop_assert_eq!(kernel.dot_rows(&blocks, &x, &mut [0.0]), Ok(()));
        }
    }

    #[test]
    fn any_finite_numbers_are_stored_or_refused(values in prop::collection::vec(any::<f32>(), 256)) {
        for ty in storable() {
            let mut stored = vec![0; n_bytes(ty, 256)];
            let mut restored = [f32::NAN; 256];
            if quantize(ty, &values, 256, None, &mut stored).is_ok() {
                dequantize(ty, &stored, &mut restored).unwrap();
                prop_assert!(restored.iter().all(|x| x.is_finite()), "{}: {:?}", ty, restored);
            }
            let small: Vec<f32> = values.iter().map(|x| if x.abs() <= 32_768.0 { *x } else { 0.0 }).collect();
            quantize(ty, &small, 256, None, &mut stored).unwrap();
            dequantize(ty, &stored, &mut restored).unwrap();
            prop_assert!(restored.iter().all(|x| x.is_finite()), "{}: {:?}", ty, restored);
        }
    }
}
