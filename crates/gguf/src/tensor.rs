//! The description of one tensor, checked: what its shape and type say fits 63 bits and whole blocks.

use crate::{Error, GgmlType, MAX_DIMS, Result};

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, unique in its file.
    pub name: String,
    /// Number of elements along each dimension, fastest first (ggml's order); 1 to 4 of them, none zero.
    pub ne: Vec<u64>,
    /// How its elements are stored.
    pub ty: GgmlType,
    /// Bytes from the start of its file's tensor data; [`crate::Writer`] assigns it.
    pub offset: u64,
    /// Bytes of its data.
    pub n_bytes: u64,
}

impl TensorInfo {
    /// A tensor at offset 0. An error where the number of dimensions, a dimension of zero, a row that is not whole
    /// blocks, or a size beyond 63 bits forbids it.
    pub fn new(name: impl Into<String>, ne: Vec<u64>, ty: GgmlType) -> Result<TensorInfo> {
        let name = name.into();
        match size(&ne, ty) {
            Ok(n_bytes) => Ok(TensorInfo { name, ne, ty, offset: 0, n_bytes }),
            Err(problem) => Err(Error::Tensor { name, problem }),
        }
    }

    /// Number of elements.
    pub fn n_elements(&self) -> u64 {
        self.ne.iter().product()
    }

    /// The shape slowest dimension first, as row-major arrays state it.
    pub fn shape(&self) -> Vec<u64> {
        self.ne.iter().rev().copied().collect()
    }
}

/// Bytes of a tensor's data, or what is wrong with its shape.
fn size(ne: &[u64], ty: GgmlType) -> std::result::Result<u64, String> {
    if ne.is_empty() || ne.len() > MAX_DIMS {
        return Err(format!("expected 1 to {MAX_DIMS} dimensions, found {}", ne.len()));
    }
    // A zero would let the product of the others overflow unseen.
    if ne.contains(&0) {
        return Err(format!("a dimension of zero in {ne:?}"));
    }
    let too_large = || format!("{ne:?} elements of {ty} are more bytes than 63 bits hold");
    let fits = |n: &u64| i64::try_from(*n).is_ok();
    let n_elements = ne.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim)).filter(fits).ok_or_else(too_large)?;
    if !ne[0].is_multiple_of(ty.block_size()) {
        return Err(format!("rows of {} elements are not whole blocks of {} ({ty})", ne[0], ty.block_size()));
    }
    (n_elements / ty.block_size()).checked_mul(ty.type_size()).filter(fits).ok_or_else(too_large)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_from_shape_and_type() {
        let info = TensorInfo::new("experts", vec![768, 3072, 8], GgmlType::Q4_K).unwrap();
        assert_eq!(info.n_bytes, 768 / 256 * 144 * 3072 * 8);
        assert_eq!(info.n_elements(), 768 * 3072 * 8);
        assert_eq!(info.shape(), [8, 3072, 768]);
    }

    #[test]
    fn impossible_shapes_are_refused_by_name() {
        for ne in [vec![], vec![1; 5], vec![0, 1 << 40, 1 << 40], vec![1 << 32, 1 << 32], vec![1 << 63], vec![33]] {
            let error = TensorInfo::new("t", ne.clone(), GgmlType::Q8_1).unwrap_err();
            assert!(error.to_string().starts_with("tensor `t`: "), "{ne:?}: {error}");
        }
    }
}
