//! Dropout: which elements of a site are kept is drawn before a pass, a bit each, and read forward and backward.

use std::sync::Arc;

use super::numbers::Numbers;
use super::view::View;
use crate::args;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::kernel::{Grid, Kernel, Module};
use crate::stream::Stream;

const THREADS: u64 = 256;
/// Elements that a thread draws: the words of a block of ChaCha.
const PER_THREAD: u64 = 16;

/// Dropout of a site's elements: number `row * n_col + col` of its matrix is kept where bit `number % 32` of word `number / 32` is set.
#[derive(Clone, Copy, Debug)]
pub struct Dropped<'a> {
    /// As many words as [`Dropped::n_word`] says.
    pub bits: View<'a, u32>,
    /// What kept elements are multiplied by.
    pub scale: f32,
}

impl<'a> Dropped<'a> {
    /// With probability `p`, of which `bits` were [drawn](Dropout::draw).
    pub fn new(bits: View<'a, u32>, p: f32) -> Self {
        Self { bits, scale: 1.0 / (1.0 - p) }
    }

    /// Words that hold the bits of `n` elements.
    pub fn n_word(n: u64) -> usize {
        n.div_ceil(32) as usize
    }
}

/// The kernels that draw.
#[derive(Debug)]
pub struct Dropout {
    draw: Kernel,
    draw_causal: Kernel,
}

impl Dropout {
    /// Loads them.
    ///
    /// # Errors
    /// [`crate::Error::Call`], [`crate::Error::Kernel`].
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let module = Module::load(gpu, include_str!("../../ptx/train_dropout.ptx"))?;
        Ok(Self { draw: module.kernel("dropout_draw")?, draw_causal: module.kernel("dropout_draw_causal")? })
    }

    /// Draws which of `n` elements are kept when each is dropped with probability `p`: bit `i` of `bits` is set where word `i` of
    /// ChaCha8 by `numbers.key`, stream `numbers.pass << 20 | block << 4 | site`, is at least `p * 2^32`.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// If `bits` has fewer words than [`Dropped::n_word`] says, `numbers` is empty, `p` is not below 1, or block or site are too large.
    pub fn draw(
        &self,
        stream: &Stream,
        numbers: View<Numbers>,
        block: usize,
        site: u32,
        p: f32,
        bits: View<u32>,
        n: u64,
    ) -> Result<()> {
        let (site, threshold) = check(numbers, block, site, p, bits, n);
        let n_half = Dropped::n_word(n) as u64 * 32 / PER_THREAD;
        let Some(grid) = grid(n_half) else { return Ok(()) };
        // SAFETY: the kernel's arguments; it writes as many halves of words as `bits` was checked to have.
        unsafe { self.draw.launch(stream, grid, &args![numbers, site, threshold, bits, n_half]) }
    }

    /// The same of attention's probabilities, `[n_head, n_col, n_col]` with the heads of all sequences, as far as queries see keys: bits
    /// of later keys may be left as they were.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// As [`Dropout::draw`] with `n = n_head * n_col * n_col`.
    pub fn draw_causal(
        &self,
        stream: &Stream,
        numbers: View<Numbers>,
        block: usize,
        site: u32,
        p: f32,
        bits: View<u32>,
        [n_head, n_col]: [usize; 2],
    ) -> Result<()> {
        let n = (n_head * n_col) as u64 * n_col as u64;
        // Otherwise queries share what a thread draws.
        if !(n_col as u64).is_multiple_of(PER_THREAD) {
            return self.draw(stream, numbers, block, site, p, bits, n);
        }
        let (site, threshold) = check(numbers, block, site, p, bits, n);
        let pairs = (n_head * n_col / 2) as u64;
        let Some(grid) = grid(pairs * (n_col as u64 / PER_THREAD + 1)) else { return Ok(()) };
        let [n_head, n_col] = [n_head, n_col].map(|n| u32::try_from(n).expect("fewer elements than 2^44"));
        // SAFETY: the kernel's arguments; it writes halves of the words of `n` elements, which `bits` was checked to have.
        unsafe { self.draw_causal.launch(stream, grid, &args![numbers, site, threshold, bits, n_head, n_col]) }
    }
}

/// Block and site in one, and what words are compared with.
fn check(numbers: View<Numbers>, block: usize, site: u32, p: f32, bits: View<u32>, n: u64) -> (u32, u32) {
    assert!((0.0..1.0).contains(&p), "probability {p}");
    assert!(block < 1 << 16 && site < 1 << 4, "block {block}, site {site}");
    assert!(!numbers.is_empty(), "no numbers");
    let n_word = Dropped::n_word(n);
    assert!(n_word <= bits.len(), "{n} elements: {n_word} words of {}", bits.len());
    ((block as u32) << 4 | site, (f64::from(p) * (1u64 << 32) as f64) as u32)
}

/// For so many threads; none for none.
fn grid(n: u64) -> Option<Grid> {
    let blocks = u32::try_from(n.div_ceil(THREADS)).expect("fewer elements than 2^44");
    (n > 0).then_some(Grid { blocks: [blocks, 1, 1], threads: THREADS as u32, shared: 0 })
}

#[cfg(test)]
mod tests {
    use param_cuda_emulation::Schedule;
    use proptest::prelude::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    use super::*;
    use crate::training::testing::gpu;

    /// Bits by `rand_chacha`: all of the words that hold `n`.
    fn expected(numbers: &Numbers, block: usize, site: u32, p: f32, n: usize) -> Vec<u32> {
        let mut rng = ChaCha8Rng::from_seed(bytemuck::cast(numbers.key));
        let pass = u64::from(numbers.pass[0]) | u64::from(numbers.pass[1]) << 32;
        rng.set_stream(pass << 20 | (block as u64) << 4 | u64::from(site));
        let threshold = (f64::from(p) * (1u64 << 32) as f64) as u32;
        let mut bits = vec![0; n.div_ceil(32)];
        for word in &mut bits {
            for i in 0..32 {
                *word |= u32::from(rng.next_u32() >= threshold) << i;
            }
        }
        bits
    }

    fn drawn(numbers: &Numbers, block: usize, site: u32, p: f32, n: usize) -> Vec<u32> {
        let gpu = gpu();
        let stream = Stream::new(&gpu).unwrap();
        let numbers = gpu.upload("", std::slice::from_ref(numbers)).unwrap();
        let bits = gpu.alloc::<u32>("", Dropped::n_word(n as u64)).unwrap();
        Dropout::new(&gpu).unwrap().draw(&stream, numbers.view(), block, site, p, bits.view(), n as u64).unwrap();
        bits.to_vec().unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

        #[test]
        fn bits_are_those_of_rand_chacha(
            key in any::<[u32; 8]>(),
            pass in 0u64..1 << 44,
            block in 0usize..1 << 16,
            site in 0u32..16,
            p in 0.0f32..0.99,
            n in 0usize..9000,
        ) {
            let numbers = Numbers { key, pass: [pass as u32, (pass >> 32) as u32], ..Numbers::default() };
            prop_assert_eq!(drawn(&numbers, block, site, p, n), expected(&numbers, block, site, p, n));
        }
    }

    #[test]
    fn bits_of_keys_that_queries_see_are_the_same() {
        let gpu = gpu();
        let stream = Stream::new(&gpu).unwrap();
        let numbers = Numbers { key: [7; 8], pass: [5, 0], ..Numbers::default() };
        let on_device = gpu.upload("", &[numbers]).unwrap();
        for (n_head, n_col) in [(2, 16), (3, 48), (1, 64), (2, 35), (1, 1), (0, 16)] {
            let n = n_head * n_col * n_col;
            let bits = gpu.alloc::<u32>("", Dropped::n_word(n as u64)).unwrap();
            let dropout = Dropout::new(&gpu).unwrap();
            dropout.draw_causal(&stream, on_device.view(), 3, 1, 0.3, bits.view(), [n_head, n_col]).unwrap();
            let (got, want) = (bits.to_vec().unwrap(), expected(&numbers, 3, 1, 0.3, n));
            for i in (0..n).filter(|i| i % n_col <= i / n_col % n_col) {
                assert_eq!(got[i / 32] >> (i % 32) & 1, want[i / 32] >> (i % 32) & 1, "{n_head}, {n_col}: {i}");
            }
            // What nobody sees costs nothing: at most 15 keys more than half of all.
            let drawn: u32 = got.iter().map(|word| word.count_ones()).sum();
            assert!(n_col % 16 > 0 || drawn as usize <= n_head * n_col * (n_col + 1) / 2 + n_head * n_col * 15);
        }
    }

    #[test]
    fn nothing_is_dropped_with_probability_zero_under_any_schedule() {
        for schedule in Schedule::ALL {
            param_cuda_emulation::schedule(Some(schedule));
            assert_eq!(drawn(&Numbers::default(), 1, 2, 0.0, 100), [u32::MAX; 4]);
        }
        param_cuda_emulation::schedule(None);
    }
}
