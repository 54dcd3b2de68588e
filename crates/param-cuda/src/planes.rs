//! Weights as a GGUF file holds them, taken apart into the planes that kernels read (model.cuh says which): the same bits in an order in
//! which sixteen bytes of quants lie together.

use crate::model::Format;

/// A stored matrix that becomes planes.
#[derive(Clone, Copy, Debug)]
pub struct Planes {
    /// How it is stored.
    pub format: Format,
    /// Outputs.
    pub n_row: usize,
    /// Inputs as stored.
    pub n_col: usize,
}

impl Format {
    /// Elements of a block, and its bytes as stored.
    fn block(self) -> (usize, usize) {
        match self {
            Format::F32 => (1, 4),
            Format::F16 | Format::Bf16 => (1, 2),
            Format::Q8_0 => (32, 34),
            Format::Q4K => (256, 144),
            Format::Q6K => (256, 210),
        }
    }

    /// Where the parts of a stored block lie that belong to one plane each, in the order of the planes.
    fn parts(self) -> &'static [std::ops::Range<usize>] {
        match self {
            // One plane, written row by row.
            Format::F32 | Format::F16 | Format::Bf16 => &[],
            Format::Q8_0 => &[2..34, 0..2],
            Format::Q4K => &[16..144, 0..16],
            Format::Q6K => &[0..128, 128..192, 192..208, 208..210],
        }
    }
}

impl Planes {
    /// Columns as kernels see them: whole pieces of 32, what is beyond the matrix zero.
    pub fn padded(&self) -> usize {
        self.n_col.next_multiple_of(32)
    }

    /// Bytes of the matrix as stored.
    pub fn stored_bytes(&self) -> usize {
        let (elements, bytes) = self.format.block();
        self.n_row * self.n_col / elements * bytes
    }

    /// Bytes of its planes, a multiple of 16 so that stacked matrices stay aligned.
    pub fn bytes(&self) -> usize {
        let (elements, bytes) = self.format.block();
        (self.n_row * self.padded() / elements * bytes).next_multiple_of(16)
    }

    /// Writes the planes of `stored` to `out` [[`Planes::bytes`]].
    ///
    /// # Panics
    /// If lengths are not what they say, or rows are no whole blocks.
    pub fn write(&self, stored: &[u8], out: &mut [u8]) {
        let (elements, block_bytes) = self.format.block();
        assert!(
            self.n_col.is_multiple_of(elements) && stored.len() == self.stored_bytes() && out.len() == self.bytes()
        );
        if elements == 1 {
            let (row, padded) = (self.n_col * block_bytes, self.padded() * block_bytes);
            for (stored, out) in stored.chunks_exact(row).zip(out.chunks_exact_mut(padded)) {
                out[..row].copy_from_slice(stored);
                out[row..].fill(0);
            }
            return;
        }
        let n_block = stored.len() / block_bytes;
        let mut at = 0;
        for part in self.format.parts() {
            let plane = &mut out[at..at + n_block * part.len()];
            for (block, out) in stored.chunks_exact(block_bytes).zip(plane.chunks_exact_mut(part.len())) {
                out.copy_from_slice(&block[part.clone()]);
            }
            at += n_block * part.len();
        }
        out[at..].fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_lands_once_in_its_plane() {
        for (format, n_col, first) in [(Format::Q8_0, 64, 2u8), (Format::Q4K, 256, 16), (Format::Q6K, 512, 0)] {
            let planes = Planes { format, n_row: 3, n_col };
            let stored: Vec<u8> = (0..planes.stored_bytes()).map(|i| i as u8).collect();
            let mut out = vec![0; planes.bytes()];
            planes.write(&stored, &mut out);
            assert_eq!(out[0], first);
            let (mut sorted, mut written) = (stored.clone(), out[..stored.len()].to_vec());
            sorted.sort_unstable();
            written.sort_unstable();
            assert_eq!(sorted, written);
        }
    }

    #[test]
    fn scales_follow_all_quants() {
        let planes = Planes { format: Format::Q8_0, n_row: 2, n_col: 32 };
        let stored: Vec<u8> = (0..68).collect();
        let mut out = vec![0xff; planes.bytes()];
        planes.write(&stored, &mut out);
        assert_eq!(out[..64], [&stored[2..34], &stored[36..68]].concat());
        assert_eq!(out[64..68], [0, 1, 34, 35]);
        assert!(out[68..].iter().all(|b| *b == 0));
    }

    #[test]
    fn plain_rows_are_padded_with_zeros() {
        let planes = Planes { format: Format::F16, n_row: 2, n_col: 3 };
        let mut out = vec![0xff; planes.bytes()];
        planes.write(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], &mut out);
        assert_eq!(out.len(), 128);
        assert_eq!((&out[..7], &out[64..70]), (&[1, 2, 3, 4, 5, 6, 0][..], &[7, 8, 9, 10, 11, 12][..]));
    }
}
