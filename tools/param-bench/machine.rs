//! What the machine can do at best: reading memory, and multiplying and adding with all operands in registers.

use std::hint::black_box;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result};
use memmap2::MmapMut;
use param_kernels::{Kernels, Team};

/// Larger than any cache, so that reading it is reading memory.
const BUFFER: usize = 512 << 20;
/// Pieces that each thread reads at once.
const PIECES: usize = 16;
/// Steps of a probe of arithmetic: some hundredths of a second.
const STEPS: usize = 3_000_000;

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
        let kernels = Kernels::get();
        let n_thread = self.team.n_thread();
        let start = Instant::now();
        let done = match probe {
            Probe::Read => {
                let piece = self.buffer.len() / (n_thread * PIECES);
                let buffer = &self.buffer;
                self.team.for_each(n_thread * PIECES, |_, i| {
                    black_box(kernels.probe_read(&buffer[i * piece..(i + 1) * piece]));
                });
                (piece * n_thread * PIECES) as f64
            }
            Probe::Int8 => self.repeat(|| kernels.probe_int8(STEPS)),
            Probe::Bf16 => self.repeat(|| kernels.probe_bf16(STEPS)),
            Probe::F32 => self.repeat(|| kernels.probe_f32(STEPS)),
        };
        done / start.elapsed().as_secs_f64() / 1e9
    }

    /// Sum of what `f` returns in every thread.
    fn repeat(&mut self, f: impl Fn() -> f64 + Sync) -> f64 {
        let sum = Mutex::new(0.0);
        self.team.for_each(self.team.n_thread(), |_, _| {
            let done = f();
            if let Ok(mut sum) = sum.lock() {
                *sum += done;
            }
        });
        sum.into_inner().unwrap_or_default()
    }
}
