//! Small steps between others: rows in the type that products read, and sums of counts.

use std::sync::Arc;

use super::dropout::Dropped;
use super::view::{Element, Rows, View};
use crate::args;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::kernel::{Grid, Kernel, Module};
use crate::stream::Stream;

/// The kernels of train_convert.cu.
#[derive(Debug)]
pub struct Convert {
    rows: Kernel,
    counts: Kernel,
    n_multiprocessor: u32,
}

impl Convert {
    /// Loads them.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(gpu: &Arc<Gpu>) -> Result<Convert> {
        let module = Module::load(gpu, include_str!("../../ptx/train_convert.ptx"))?;
        let n_multiprocessor = gpu.n_multiprocessor() as u32;
        Ok(Convert { rows: module.kernel("convert_rows")?, counts: module.kernel("add_counts")?, n_multiprocessor })
    }

    /// `y = drop(x)`, `x` in f32.
    ///
    /// # Errors
    /// The launch's.
    ///
    /// # Panics
    /// Unless both have one shape without padding.
    pub fn rows(&self, stream: &Stream, x: Rows, y: Rows, dropout: Option<Dropped>) -> Result<()> {
        assert_eq!((x.n_row(), x.n_col(), x.element()), (y.n_row(), y.n_col(), Element::F32), "of one shape");
        assert!(
            x.stride() == x.n_col() && y.stride() == y.n_col() && x.n_col().is_multiple_of(4),
            "rows without padding"
        );
        let n = x.n_row() * x.n_col();
        assert!(dropout.is_none_or(|d| d.bits.len() * 32 >= n), "a bit for each element");
        let blocks = (n / 4).div_ceil(256).clamp(1, 16 * self.n_multiprocessor as usize) as u32;
        let (bits, scale) = (dropout.map(|d| d.bits), dropout.map_or(1.0, |d| d.scale));
        let grid = Grid { blocks: [blocks, 1, 1], threads: 256, shared: 0 };
        let args = args![x, y, y.element() as u32, x.n_row() as u32, x.n_col() as u32, bits, scale];
        // SAFETY: the kernel's arguments; lengths were checked above.
        unsafe { self.rows.launch(stream, grid, &args) }
    }

    /// `sums += counts`.
    ///
    /// # Errors
    /// The launch's.
    ///
    /// # Panics
    /// Unless both have one length.
    pub fn add_counts(&self, stream: &Stream, sums: View<u32>, counts: View<u32>) -> Result<()> {
        assert_eq!(sums.len(), counts.len(), "as many sums as counts");
        let grid = Grid { blocks: [1, 1, 1], threads: 256, shared: 0 };
        // SAFETY: the kernel's arguments; lengths were checked above.
        unsafe { self.counts.launch(stream, grid, &args![sums, counts, sums.len() as u32]) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Random, gpu};
    use super::*;

    #[test]
    fn rows_are_dropped_and_rounded_to_the_nearest() {
        let gpu = gpu();
        let stream = Stream::new(&gpu).unwrap();
        let convert = Convert::new(&gpu).unwrap();
        let mut random = Random::new(3);
        let (n_row, n_col) = (5, 24);
        let x = random.floats(n_row * n_col, 2.0);
        let kept = [0x1234_5678u32, 0xdead_beef, 0x0f0f_3355, 0xffff_0000];
        let (x_gpu, bits) = (gpu.upload("x", &x).unwrap(), gpu.upload("bits", &kept).unwrap());
        let x_rows = Rows::new(x_gpu.view().cast(), Element::F32, n_row, n_col);
        for element in [Element::F32, Element::Bf16] {
            let y = gpu.alloc::<u8>("y", Rows::bytes(element, n_row, n_col)).unwrap();
            let rows = Rows::new(y.view(), element, n_row, n_col);
            convert.rows(&stream, x_rows, rows, Some(Dropped { bits: bits.view(), scale: 2.0 })).unwrap();
            stream.synchronize().unwrap();
            let bytes = y.to_vec().unwrap();
            for (i, x) in x.iter().enumerate() {
                let want = if kept[i / 32] >> (i % 32) & 1 == 1 { 2.0 * x } else { 0.0 };
                let (got, want) = match element {
                    Element::F32 => (f32::from_ne_bytes(bytes[4 * i..4 * i + 4].try_into().unwrap()), want),
                    Element::Bf16 => {
                        let bits = u16::from_ne_bytes([bytes[2 * i], bytes[2 * i + 1]]);
                        (half::bf16::from_bits(bits).to_f32(), half::bf16::from_f32(want).to_f32())
                    }
                };
                assert_eq!(got, want, "{element:?} element {i}");
            }
        }
    }

    #[test]
    fn counts_are_added() {
        let gpu = gpu();
        let stream = Stream::new(&gpu).unwrap();
        let convert = Convert::new(&gpu).unwrap();
        let counts = (0..300u32).collect::<Vec<_>>();
        let (sums, counts) = (gpu.upload("sums", &[7u32; 300]).unwrap(), gpu.upload("counts", &counts).unwrap());
        convert.add_counts(&stream, sums.view(), counts.view()).unwrap();
        stream.synchronize().unwrap();
        assert!(sums.to_vec().unwrap().iter().enumerate().all(|(i, &n)| n == 7 + i as u32));
    }
}
