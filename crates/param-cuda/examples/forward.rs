//! How fast a GPU runs many rows through a model of param-0.5b's shape with random weights: prompts, and batches of sequences that go
//! on by one token each. `forward [FORMAT ..]`: f32, f16, bf16, q8_0, q4_k, q6_k, or q4_k_m, whose values and second matrices are Q6_K.

use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use param_cuda::model::{Activation, Format, Model};
use param_cuda::{
    BlockWeights, Caches, DeviceModel, Event, FeedForwardWeights, Forward, Gpu, NormWeights, OuterWeights, Row, Stream,
    Weights,
};

const N_EMBD: usize = 768;
const N_FF: usize = 3072;
const N_VOCAB: usize = 128_002;
const N_CTX: usize = 1024;
const N_LAYER: usize = 16;
const N_EXPERT: usize = 8;

fn main() -> Result<()> {
    let gpu = param_cuda::open()?;
    println!("{}, {} multiprocessors", gpu.name(), gpu.n_multiprocessor());
    let names: Vec<String> = std::env::args().skip(1).collect();
    let names = if names.is_empty() { vec!["f16".to_owned(), "q4_k_m".to_owned()] } else { names };
    for name in names {
        let (format, second) = match &*name {
            "f32" => (Format::F32, Format::F32),
            "f16" => (Format::F16, Format::F16),
            "bf16" => (Format::Bf16, Format::Bf16),
            "q8_0" => (Format::Q8_0, Format::Q8_0),
            "q4_k" => (Format::Q4K, Format::Q4K),
            "q6_k" => (Format::Q6K, Format::Q6K),
            "q4_k_m" => (Format::Q4K, Format::Q6K),
            _ => bail!("no format `{name}`"),
        };
        let model = model(&gpu, format, second)?;
        prompts(&model, &name, 8, 512)?;
        for n in [8, 64, 256] {
            decode(&model, &name, n, 255)?;
        }
    }
    Ok(())
}

/// Pseudorandom bytes that make small weights, one block after another.
fn stored(format: Format, n_element: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut byte = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    const PIECE: usize = 1 << 16;
    let mut piece = Vec::new();
    // Halves of 0.002 and less, positive, and whole blocks around them.
    let half = |b: u8| [b, 0x18];
    match format {
        Format::F32 => (0..PIECE).for_each(|_| piece.extend((f32::from(byte() as i8) / 4000.0).to_le_bytes())),
        Format::F16 => (0..PIECE).for_each(|_| piece.extend([byte(), 0x20 | byte() & 0x87])),
        Format::Bf16 => (0..PIECE).for_each(|_| piece.extend([byte(), 0x3c | byte() & 0x80])),
        Format::Q8_0 => (0..PIECE / 32).for_each(|_| {
            piece.extend([byte(), 0x0c]);
            piece.extend((0..32).map(|_| byte()));
        }),
        Format::Q4K => (0..PIECE / 256).for_each(|_| {
            piece.extend([byte(), 0x04]);
            piece.extend(half(byte()).map(|b| b & 0x07));
            piece.extend((0..140).map(|_| byte()));
        }),
        Format::Q6K => (0..PIECE / 256).for_each(|_| {
            piece.extend((0..192).map(|_| byte()));
            piece.extend((0..16).map(|_| byte() & 0x3f));
            piece.extend([byte(), 0x00]);
        }),
    }
    let n = n_element / 256 * (piece.len() / (PIECE / 256));
    piece.iter().copied().cycle().take(n).collect()
}

fn weights(format: Format, n_matrix: usize, n_row: usize, n_col: usize, bias: &[f32]) -> Weights<'_> {
    let stored = stored(format, n_matrix * n_row * n_col).into();
    let bias = &bias[..if bias.is_empty() { 0 } else { n_matrix * n_row }];
    Weights { format, n_matrix, n_row, n_col, stored, bias }
}

fn model(gpu: &Arc<Gpu>, format: Format, second: Format) -> Result<Arc<DeviceModel>> {
    let dims = Model {
        n_vocab: N_VOCAB as u32,
        n_ctx: N_CTX as u32,
        n_embd: N_EMBD as u32,
        n_head: 12,
        head_dim: 64,
        n_layer: N_LAYER as u32,
        n_ff: N_FF as u32,
        n_expert: N_EXPERT as u32,
        n_used: 3,
        expert_activation: Activation::GeluErf as u32,
        dense_activation: Activation::GeluTanh as u32,
        norm_eps: 1e-5,
        cache_f32: u32::from(format == Format::F32),
        ..Model::default()
    };
    let bias = vec![0.01; N_EXPERT * N_FF];
    let (scale, shift) = (vec![1.0; N_EMBD], vec![0.0; N_EMBD]);
    let norm = NormWeights { scale: &scale, shift: &shift };
    let position: Vec<f32> = (0..N_CTX * N_EMBD).map(|i| (i * 7919 % 1009) as f32 / 5000.0 - 0.1).collect();
    let outer = OuterWeights {
        token_embd: weights(second, 1, N_VOCAB, N_EMBD, &[]),
        position_embd: &position,
        output_norm: norm,
        head: None,
    };
    let mut upload = DeviceModel::begin(gpu, &dims, &outer)?;
    for i in 0..N_LAYER {
        // Different enough between experts that all are chosen about as often.
        let router: Vec<f32> = (0..N_EXPERT * N_EMBD).map(|j| ((j + i) * 6151 % 2003) as f32 / 1000.0 - 1.0).collect();
        let is_moe = i % 2 == 0;
        let n_matrix = if is_moe { N_EXPERT } else { 1 };
        let block = BlockWeights {
            norm1: norm,
            q: weights(format, 1, N_EMBD, N_EMBD, &[]),
            k: weights(format, 1, N_EMBD, N_EMBD, &[]),
            v: weights(second, 1, N_EMBD, N_EMBD, &[]),
            out: weights(format, 1, N_EMBD, N_EMBD, &bias),
            norm2: norm,
            ffn: Some(FeedForwardWeights {
                router: if is_moe { &router } else { &[] },
                selection_bias: &[],
                up: weights(format, n_matrix, N_FF, N_EMBD, &bias),
                down: weights(second, n_matrix, N_EMBD, N_FF, &bias),
            }),
        };
        upload.block(Some(&block))?;
    }
    Ok(Arc::new(upload.end()?))
}

fn token(i: usize) -> u32 {
    (i * 104_729 % N_VOCAB) as u32
}

/// Seconds on the GPU of what `queue` queues, the least of several times.
fn seconds(stream: &Stream, n: usize, mut queue: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut least = f64::INFINITY;
    for _ in 0..n {
        let start = Event::record(stream)?;
        queue()?;
        least = least.min(Event::record(stream)?.seconds_since(&start)?);
    }
    Ok(least)
}

fn prompts(model: &Arc<DeviceModel>, name: &str, n_sequence: usize, n_token: usize) -> Result<()> {
    let stream = Stream::new(model.gpu())?;
    let caches = Arc::new(Caches::new(model, n_sequence, N_CTX)?);
    let n = n_sequence * n_token;
    let mut forward = Forward::new(model, &caches, n, n_sequence)?;
    let rows: Vec<Row> = (0..n)
        .map(|i| Row { token: token(i), position: (i % n_token) as u32, sequence: (i / n_token) as u32 })
        .collect();
    let last: Vec<u32> = (0..n_sequence).map(|i| (i * n_token + n_token - 1) as u32).collect();
    forward.set_rows(&rows, &last)?;
    let all = seconds(&stream, 10, || Ok(forward.run(&stream)?))?;
    println!("{name}: {n_sequence} prompts of {n_token}: {:.2} ms, {:.0} tok/s", all * 1e3, n as f64 / all);
    if forward.not_finite().to_vec()? != [0] {
        return Err(anyhow!("something is not finite"));
    }
    forward.embed(&stream)?;
    let attention = seconds(&stream, 10, || Ok(forward.attention_part(&stream, 1)?))?;
    let moe = seconds(&stream, 10, || Ok(forward.ffn_part(&stream, 0)?))?;
    let dense = seconds(&stream, 10, || Ok(forward.ffn_part(&stream, 1)?))?;
    let head = seconds(&stream, 10, || Ok(forward.head(&stream)?))?;
    let (a, m, d, h) = (attention * 1e6, moe * 1e6, dense * 1e6, head * 1e6);
    println!("  attention {a:.0} us, experts {m:.0} us, dense {d:.0} us a block; head {h:.0} us");
    Ok(())
}

fn decode(model: &Arc<DeviceModel>, name: &str, n_sequence: usize, n_past: usize) -> Result<()> {
    let stream = Stream::new(model.gpu())?;
    let caches = Arc::new(Caches::new(model, n_sequence, n_past + 1)?);
    let mut forward = Forward::new(model, &caches, n_sequence, n_sequence)?;
    let rows: Vec<Row> =
        (0..n_sequence).map(|i| Row { token: token(i), position: n_past as u32, sequence: i as u32 }).collect();
    let all: Vec<u32> = (0..n_sequence as u32).collect();
    forward.set_rows(&rows, &all)?;
    forward.run(&stream)?;
    let graph = stream.capture(|stream| forward.run(stream))?;
    // SAFETY: what it uses lives.
    let step = seconds(&stream, 30, || Ok(unsafe { graph.launch(&stream) }?))?;
    let us = step * 1e6;
    println!("{name}: {n_sequence} sequences, {n_past} past: {us:.0} us, {:.0} tok/s", n_sequence as f64 / step);
    // Parts of it, each recorded ten times over.
    let mut part = |queue: &mut dyn FnMut(&mut Forward, &Stream) -> param_cuda::Result<()>| -> Result<f64> {
        let graph = stream.capture(|stream| (0..10).try_for_each(|_| queue(&mut forward, stream)))?;
        // SAFETY: what it uses lives.
        Ok(seconds(&stream, 10, || Ok(unsafe { graph.launch(&stream) }?))? * 1e5)
    };
    let attention = part(&mut |forward, stream| forward.attention_part(stream, 1))?;
    let moe = part(&mut |forward, stream| forward.ffn_part(stream, 0))?;
    let dense = part(&mut |forward, stream| forward.ffn_part(stream, 1))?;
    let head = part(&mut |forward, stream| forward.head(stream))?;
    println!("  attention {attention:.1} us, experts {moe:.1} us, dense {dense:.1} us a block; head {head:.1} us");
    Ok(())
}
