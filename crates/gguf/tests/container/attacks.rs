//! Headers made to overflow, to allocate without bound or to point outside the file: each is refused, at once.

use gguf::{Error, Gguf};

const U8: u32 = 0;
const U32: u32 = 4;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const F32: u32 = 0;
const Q4_K: u32 = 12;

/// A file put together by hand, with whatever numbers an attacker likes.
struct Raw(Vec<u8>);

impl Raw {
    fn new(n_tensor: u64, n_entry: u64) -> Raw {
        Raw(b"GGUF".to_vec()).u32(3).u64(n_tensor).u64(n_entry)
    }

    fn bytes(mut self, bytes: &[u8]) -> Raw {
        self.0.extend_from_slice(bytes);
        self
    }

    fn u32(self, n: u32) -> Raw {
        self.bytes(&n.to_le_bytes())
    }

    fn u64(self, n: u64) -> Raw {
        self.bytes(&n.to_le_bytes())
    }

    fn string(self, string: &str) -> Raw {
        self.u64(string.len() as u64).bytes(string.as_bytes())
    }

    fn tensor(self, name: &str, ne: &[u64], ty: u32, offset: u64) -> Raw {
        let raw = self.string(name).u32(ne.len() as u32);
        ne.iter().fold(raw, |raw, &dim| raw.u64(dim)).u32(ty).u64(offset)
    }

    /// Aligns, and adds tensor data.
    fn data(mut self, n: usize) -> Raw {
        self.0.resize(self.0.len().next_multiple_of(32) + n, 0);
        self
    }

    fn error(self) -> Error {
        Gguf::from_bytes(self.0).expect_err("an attack was let in")
    }
}

fn assert_truncated(raw: Raw) {
    let error = raw.error();
    assert!(matches!(error, Error::Truncated { .. }), "{error}");
}

fn assert_tensor(raw: Raw, expected: &str) {
    let error = raw.error();
    assert!(matches!(error, Error::Tensor { .. }) && error.to_string().contains(expected), "{error}");
}

#[test]
fn the_hand_made_file_without_an_attack_opens() {
    let raw = Raw::new(1, 1).string("key").u32(U32).u32(7).tensor("t", &[4, 2], F32, 0).data(32);
    let model = Gguf::from_bytes(raw.0).unwrap();
    assert_eq!(model.metadata().u32("key").unwrap(), 7);
    assert_eq!(model.tensor_data("t").unwrap().len(), 32);
}

#[test]
fn tensor_counts_beyond_the_file_are_refused_before_allocating() {
    for n in [2, 1 << 32, u64::MAX / 32, u64::MAX] {
        assert_truncated(Raw::new(n, 0).data(0));
    }
}

#[test]
fn metadata_counts_beyond_the_file_are_refused_before_allocating() {
    for n in [2, 1 << 32, u64::MAX / 32, u64::MAX] {
        assert_truncated(Raw::new(0, n).data(0));
    }
}

#[test]
fn string_lengths_beyond_the_file_are_refused_before_allocating() {
    for n in [100, 1 << 32, u64::MAX - 7, u64::MAX] {
        assert_truncated(Raw::new(0, 1).u64(n).bytes(b"key").data(0));
        assert_truncated(Raw::new(0, 1).string("key").u32(STRING).u64(n).data(0));
        assert_truncated(Raw::new(1, 0).u64(n).bytes(&[b'n'; 25]));
    }
}

#[test]
fn array_counts_beyond_the_file_are_refused_before_allocating() {
    for ty in [U8, U32, BOOL, STRING, ARRAY] {
        for n in [100, 1 << 32, u64::MAX / 4, u64::MAX / 8 + 1, u64::MAX] {
            assert_truncated(Raw::new(0, 1).string("key").u32(ARRAY).u32(ty).u64(n).data(0));
        }
    }
}

#[test]
fn token_lengths_beyond_the_file_are_refused() {
    let raw = Raw::new(0, 1).string("tokenizer.ggml.tokens").u32(ARRAY).u32(STRING).u64(2).string("ok");
    assert_truncated(raw.u64(i32::MAX as u64 + 1).bytes(b"short"));
}

#[test]
fn deep_nesting_is_refused_before_the_stack_ends() {
    let mut raw = Raw::new(0, 1).string("key").u32(ARRAY);
    for _ in 0..100_000 {
        raw = raw.u32(ARRAY).u64(1);
    }
    let error = raw.u32(U8).u64(0).error();
    assert!(error.to_string().contains("nested deeper than 4"), "{error}");
}

#[test]
fn dimensions_whose_product_overflows_are_refused() {
    for ne in [&[u64::MAX, 2][..], &[1 << 32, 1 << 32], &[1 << 16, 1 << 16, 1 << 16, 1 << 16], &[1 << 63]] {
        assert_tensor(Raw::new(1, 0).tensor("t", ne, F32, 0).data(32), "63 bits");
    }
}

#[test]
fn sizes_that_overflow_in_bytes_though_not_in_elements_are_refused() {
    assert_tensor(Raw::new(1, 0).tensor("t", &[1 << 61, 2], F32, 0).data(32), "63 bits");
    assert_tensor(Raw::new(1, 0).tensor("t", &[i64::MAX as u64 & !255], 28, 0).data(32), "63 bits");
}

#[test]
fn an_exabyte_in_a_small_file_is_refused() {
    assert_tensor(Raw::new(1, 0).tensor("t", &[1 << 40, 1 << 18], F32, 0).data(4 << 20), "pass the end");
}

#[test]
fn a_zero_that_hides_an_overflow_is_refused() {
    assert_tensor(Raw::new(1, 0).tensor("t", &[0, 1 << 62, 1 << 62, 8], F32, 0).data(32), "a dimension of zero");
}

#[test]
fn total_sizes_that_wrap_around_are_refused() {
    // Each fits 63 bits, their padded sum does not fit 64.
    let huge = 1 << 60;
    let mut raw = Raw::new(5, 0);
    for i in 0..5u64 {
        raw = raw.tensor(&format!("t{i}"), &[huge], F32, i.wrapping_mul(4 * huge));
    }
    assert_tensor(raw.data(32), "pass the end");
}

#[test]
fn data_past_the_end_of_the_file_is_refused() {
    assert_tensor(Raw::new(1, 0).tensor("t", &[8], F32, 0).data(31), "pass the end");
    assert_tensor(Raw::new(1, 0).tensor("t", &[8], F32, 0), "pass the end");
    let raw = Raw::new(2, 0).tensor("t", &[8], F32, 0).tensor("u", &[8], F32, 32);
    assert_tensor(raw.data(63), "tensor `u`: 32 bytes at offset 32 pass the end of the 63 bytes");
}

#[test]
fn offsets_that_overlap_leave_gaps_or_wrap_are_refused() {
    for offset in [0, 16, 31, 64, 1 << 40, u64::MAX, u64::MAX - 31] {
        let raw = Raw::new(2, 0).tensor("t", &[8], F32, 0).tensor("u", &[8], F32, offset).data(256);
        assert_tensor(raw, "expected at offset 32");
    }
    assert_tensor(Raw::new(1, 0).tensor("t", &[8], F32, u64::MAX - 31).data(256), "expected at offset 0");
}

#[test]
fn rows_that_are_not_whole_blocks_are_refused() {
    assert_tensor(Raw::new(1, 0).tensor("t", &[255], Q4_K, 0).data(512), "not whole blocks of 256 (Q4_K)");
}

#[test]
fn unknown_and_retired_tensor_types_are_refused() {
    for ty in [4, 5, 31, 36, 99, u32::MAX] {
        assert_tensor(Raw::new(1, 0).tensor("t", &[256], ty, 0).data(4096), "unknown or retired");
    }
}

#[test]
fn dimension_counts_beyond_four_or_of_none_are_refused() {
    for n in [0, 5, 1 << 16, u32::MAX] {
        assert_tensor(Raw::new(1, 0).string("t").u32(n).u64(1).u64(1).u32(F32).u64(0).data(32), "1 to 4 dimensions");
    }
}

#[test]
fn tensor_names_that_ggml_cannot_hold_are_refused() {
    let name = |n: usize| Raw::new(1, 0).tensor(&"n".repeat(n), &[8], F32, 0).data(32);
    assert!(Gguf::from_bytes(name(64).0).is_ok());
    for n in [0, 65, 10_000] {
        let error = name(n).error();
        assert!(error.to_string().contains("expected 1 to 64 bytes"), "{error}");
    }
}

#[test]
fn keys_of_no_length_or_beyond_the_format_are_refused() {
    for n in [0, gguf::MAX_KEY + 1] {
        let error = Raw::new(0, 1).string(&"k".repeat(n)).u32(U8).bytes(&[1]).data(0).error();
        assert!(error.to_string().contains("key"), "{error}");
    }
}

#[test]
fn duplicate_keys_and_tensors_are_refused() {
    let error = Raw::new(0, 2).string("k").u32(U32).u32(1).string("k").u32(U32).u32(2).error();
    assert!(matches!(error, Error::DuplicateKey { ref key } if key == "k"), "{error}");
    let error = Raw::new(2, 0).tensor("t", &[8], F32, 0).tensor("t", &[8], F32, 32).data(64).error();
    assert!(matches!(error, Error::DuplicateTensor { ref name } if name == "t"), "{error}");
}

#[test]
fn alignments_that_are_no_power_of_two_are_refused() {
    for alignment in [0, 1, 12, 33, u32::MAX] {
        let error = Raw::new(0, 1).string("general.alignment").u32(U32).u32(alignment).data(0).error();
        assert!(matches!(error, Error::Key { .. }), "{alignment}: {error}");
    }
    let error = Raw::new(0, 1).string("general.alignment").u32(STRING).string("32").data(0).error();
    assert!(matches!(error, Error::KeyType { .. }), "{error}");
    // The largest that is one leaves no room for data.
    let raw = Raw::new(1, 1).string("general.alignment").u32(U32).u32(1 << 31).tensor("t", &[8], F32, 0).data(64);
    assert_tensor(raw, "pass the end");
}

#[test]
fn unknown_value_types_and_bad_truth_values_are_refused() {
    for ty in [13, 255, u32::MAX] {
        let error = Raw::new(0, 1).string("k").u32(ty).u64(0).error();
        assert!(error.to_string().contains("expected 0 to 12"), "{error}");
        let error = Raw::new(0, 1).string("k").u32(ARRAY).u32(ty).u64(0).error();
        assert!(error.to_string().contains("expected 0 to 12"), "{error}");
    }
    let error = Raw::new(0, 1).string("k").u32(BOOL).bytes(&[2]).error();
    assert!(error.to_string().contains("expected 0 or 1, found 2"), "{error}");
}

#[test]
fn text_that_is_not_utf8_is_refused() {
    let error = Raw::new(0, 1).string("k").u32(STRING).u64(2).bytes(&[0xff, 0xfe]).error();
    assert!(error.to_string().contains("not UTF-8"), "{error}");
}

#[test]
fn other_versions_and_byte_orders_say_so() {
    let version = |version: u32| Raw(b"GGUF".to_vec()).u32(version).data(64).error();
    for n in [0, 1, 4, u32::MAX] {
        assert!(matches!(version(n), Error::Version { found } if found == n));
    }
    assert!(matches!(version(3u32.swap_bytes()), Error::BigEndian));
    assert!(matches!(Raw(b"ggjt".to_vec()).u32(3).error(), Error::Magic { .. }));
    assert!(matches!(Raw(b"GG".to_vec()).error(), Error::Magic { .. }));
    let mut second = Raw::new(0, 0).0;
    second[4] = 2;
    assert!(Gguf::from_bytes(second).is_ok());
}
