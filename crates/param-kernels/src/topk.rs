//! The `k` largest of a row, for routing.

/// Writes to `index` the positions of the `index.len()` largest values of `x`, largest first. Equal values go to the lowest
/// index first and NaN ranks below everything, so the choice is the same on every machine.
///
/// # Panics
/// If `index` is longer than `x`.
pub fn top_k(x: &[f32], index: &mut [u32]) {
    assert!(index.len() <= x.len(), "top-{} of {} values", index.len(), x.len());
    let rank = |v: f32| if v.is_nan() { f32::NEG_INFINITY } else { v };
    let mut filled = 0;
    for (i, &v) in x.iter().enumerate() {
        // Insertion into the sorted prefix: routers choose few of few, where this beats any sort.
        let mut at = filled;
        while at > 0 && rank(v) > rank(x[index[at - 1] as usize]) {
            at -= 1;
        }
        if at < index.len() {
            filled = (filled + 1).min(index.len());
            index.copy_within(at..filled - 1, at + 1);
            index[at] = i as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn equals_the_prefix_of_a_stable_descending_sort(x in prop::collection::vec((-3i8..3).prop_map(f32::from), 1..40), k in 1usize..40) {
            let k = k.min(x.len());
            let mut want: Vec<u32> = (0..x.len() as u32).collect();
            want.sort_by(|&a, &b| x[b as usize].total_cmp(&x[a as usize]));
            let mut got = vec![0; k];
            top_k(&x, &mut got);
            prop_assert_eq!(&got[..], &want[..k]);
        }
    }

    #[test]
    fn nan_is_chosen_last() {
        let mut index = [0; 2];
        top_k(&[f32::NAN, -1.0, f32::NAN, 5.0], &mut index);
        assert_eq!(index, [3, 1]);
    }
}
