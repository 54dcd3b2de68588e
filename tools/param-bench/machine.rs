//! What the machine can do at best: reading memory, and multiplying and adding with all operands in registers.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context, Result};
use memmap2::MmapMut;
use param_kernels::{Arithmetic, Kernels, Team, arithmetic_peak};

/// Larger than any cache, so that reading it is reading memory.
const BUFFER: usize = 512 << 20;
/// Pieces that each thread reads at once.
const PIECES: usize = 16;

/// Something to measure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Probe {
    Read,
    Int8,
    Bf16,
    F32,
}

impl Probe {
    pub const ALL: [Probe; 4] = [Probe::Read, Probe::Int8, Probe::Bf16, Probe::F32];

    /// Its name, and the unit of what it measures.
    pub fn name(self) -> (&'static str, &'static str) {
        match self {
            Probe::Read => ("read_bandwidth", "GB/s"),
            Probe::Int8 => ("int8_peak", "GOP/s"),
            Probe::Bf16 => ("bf16_peak", "GOP/s"),
            Probe::F32 => ("f32_peak", "GOP/s"),
        }
    }
}

/// Threads and a buffer to read.
pub struct Machine {
    team: Team,
    buffer: MmapMut,
}

impl Machine {
    pub fn new(n_thread: usize) -> Result<Machine> {
        let mut buffer = MmapMut::map_anon(BUFFER).context("memory to measure the bus with")?;
        // As the weights are kept. Where the advice is refused, it only costs address translation.
        #[cfg(target_os = "linux")]
        let _ = buffer.advise(memmap2::Advice::HugePage);
        // Pages never written would all be the same one.
        buffer.fill(1);
        Ok(Machine { team: Team::new(n_thread), buffer })
    }

    /// One measurement, in the probe's unit.
    pub fn measure(&mut self, probe: Probe) -> f64 {
        match probe {
            Probe::Read => self.read(),
            Probe::Int8 => arithmetic_peak(&mut self.team, Arithmetic::Int8) / 1e9,
            Probe::Bf16 => arithmetic_peak(&mut self.team, Arithmetic::Bf16) / 1e9,
            Probe::F32 => arithmetic_peak(&mut self.team, Arithmetic::F32) / 1e9,
        }
    }

    fn read(&mut self) -> f64 {
        let kernels = Kernels::get();
        let n_thread = self.team.n_thread();
        let piece = self.buffer.len() / (n_thread * PIECES);
        let buffer = &self.buffer;
        let start = Instant::now();
        self.team.for_each(n_thread * PIECES, |_, i| {
            black_box(kernels.probe_read(&buffer[i * piece..(i + 1) * piece]));
        });
        (piece * n_thread * PIECES) as f64 / start.elapsed().as_secs_f64() / 1e9
    }
}
