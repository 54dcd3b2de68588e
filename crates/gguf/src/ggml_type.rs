//! The tensor types of ggml: their ids in a file, their names and the sizes of their blocks.

use std::fmt;
use std::str::FromStr;

use crate::Error;

/// How the elements of a tensor are stored. Discriminants are the ids in a file; gaps are ids that ggml has retired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
#[allow(non_camel_case_types, missing_docs)] // the field's own names
pub enum GgmlType {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q8_1 = 9,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    Q8_K = 15,
    IQ2_XXS = 16,
    IQ2_XS = 17,
    IQ3_XXS = 18,
    IQ1_S = 19,
    IQ4_NL = 20,
    IQ3_S = 21,
    IQ2_S = 22,
    IQ4_XS = 23,
    I8 = 24,
    I16 = 25,
    I32 = 26,
    I64 = 27,
    F64 = 28,
    IQ1_M = 29,
    BF16 = 30,
    TQ1_0 = 34,
    TQ2_0 = 35,
    MXFP4 = 39,
}

/// One row of the table: type, name, elements per block, bytes per block.
type Layout = (GgmlType, &'static str, u64, u64);

// Sorted by id, so that a type is found by it.
const LAYOUTS: [Layout; 32] = {
    use GgmlType::*;
    [
        (F32, "F32", 1, 4),
        (F16, "F16", 1, 2),
        (Q4_0, "Q4_0", 32, 18),
        (Q4_1, "Q4_1", 32, 20),
        (Q5_0, "Q5_0", 32, 22),
        (Q5_1, "Q5_1", 32, 24),
        (Q8_0, "Q8_0", 32, 34),
        (Q8_1, "Q8_1", 32, 36),
        (Q2_K, "Q2_K", 256, 84),
        (Q3_K, "Q3_K", 256, 110),
        (Q4_K, "Q4_K", 256, 144),
        (Q5_K, "Q5_K", 256, 176),
        (Q6_K, "Q6_K", 256, 210),
        (Q8_K, "Q8_K", 256, 292),
        (IQ2_XXS, "IQ2_XXS", 256, 66),
        (IQ2_XS, "IQ2_XS", 256, 74),
        (IQ3_XXS, "IQ3_XXS", 256, 98),
        (IQ1_S, "IQ1_S", 256, 50),
        (IQ4_NL, "IQ4_NL", 32, 18),
        (IQ3_S, "IQ3_S", 256, 110),
        (IQ2_S, "IQ2_S", 256, 82),
        (IQ4_XS, "IQ4_XS", 256, 136),
        (I8, "I8", 1, 1),
        (I16, "I16", 1, 2),
        (I32, "I32", 1, 4),
        (I64, "I64", 1, 8),
        (F64, "F64", 1, 8),
        (IQ1_M, "IQ1_M", 256, 56),
        (BF16, "BF16", 1, 2),
        (TQ1_0, "TQ1_0", 256, 54),
        (TQ2_0, "TQ2_0", 256, 66),
        (MXFP4, "MXFP4", 32, 17),
    ]
};

impl GgmlType {
    /// Every type, by ascending id.
    pub fn all() -> impl Iterator<Item = GgmlType> {
        LAYOUTS.iter().map(|&(ty, ..)| ty)
    }

    /// The type's number in a file.
    pub fn id(self) -> u32 {
        self as u32
    }

    /// The type of a number in a file, if ggml has one.
    pub fn from_id(id: u32) -> Option<GgmlType> {
        LAYOUTS.binary_search_by_key(&id, |&(ty, ..)| ty.id()).ok().map(|i| LAYOUTS[i].0)
    }

    fn layout(self) -> Layout {
        let i = LAYOUTS.binary_search_by_key(&self.id(), |&(ty, ..)| ty.id());
        LAYOUTS[i.expect("the table has a row for every type: a test says so")]
    }

    /// Its name as ggml spells it, such as `Q4_K`.
    pub fn name(self) -> &'static str {
        self.layout().1
    }

    /// Elements in a block: rows are whole blocks.
    pub fn block_size(self) -> u64 {
        self.layout().2
    }

    /// Bytes in a block.
    pub fn type_size(self) -> u64 {
        self.layout().3
    }

    /// Bytes of a row of `n` elements; `None` if that is no whole number of blocks or exceeds 64 bits.
    pub fn row_size(self, n: u64) -> Option<u64> {
        let (_, _, block_size, type_size) = self.layout();
        n.is_multiple_of(block_size).then_some(())?;
        (n / block_size).checked_mul(type_size)
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for GgmlType {
    type Err = Error;

    /// By name, in any case.
    fn from_str(name: &str) -> Result<GgmlType, Error> {
        let known = || LAYOUTS.iter().map(|&(_, name, ..)| name).collect::<Vec<_>>().join(", ");
        GgmlType::all()
            .find(|ty| ty.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| Error::UnknownTypeName { name: name.to_owned(), known: known() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_found_by_its_id_and_by_its_name() {
        assert!(LAYOUTS.is_sorted_by_key(|&(ty, ..)| ty.id()));
        for ty in GgmlType::all() {
            assert_eq!(GgmlType::from_id(ty.id()), Some(ty));
            assert_eq!(ty.name().parse::<GgmlType>().unwrap(), ty);
            assert_eq!(ty.name().to_lowercase().parse::<GgmlType>().unwrap(), ty);
            assert_eq!(ty.name(), format!("{ty:?}"));
        }
        assert_eq!(GgmlType::all().filter(|ty| ty.id() <= GgmlType::MXFP4.id()).count(), LAYOUTS.len());
    }

    #[test]
    fn retired_and_unknown_ids_have_no_type() {
        for id in [4, 5, 31, 32, 33, 36, 37, 38, 1000, u32::MAX] {
            assert_eq!(GgmlType::from_id(id), None, "id {id}");
        }
    }

    #[test]
    fn rows_are_whole_blocks() {
        assert_eq!(GgmlType::Q4_K.row_size(768), Some(432));
        assert_eq!(GgmlType::Q4_K.row_size(96), None);
        assert_eq!(GgmlType::Q8_0.row_size(96), Some(102));
        assert_eq!(GgmlType::F32.row_size(u64::MAX), None);
    }

    #[test]
    fn unknown_names_list_the_known_ones() {
        let message = "q4_x".parse::<GgmlType>().unwrap_err().to_string();
        assert!(message.contains("`q4_x`") && message.contains("Q4_K") && message.contains("BF16"), "{message}");
    }
}
