//! Kernels for many rows, in the emulation, against plain sums in f64 of what ggml says the stored weights are.

use half::{bf16, f16};
use param_cuda_emulation::Schedule;
use param_ggml::{dequantize, quantize};
use proptest::prelude::*;

use super::*;
use crate::Gpu;
use crate::device_model::{BlockWeights, FeedForwardWeights, NormWeights, OuterWeights, Weights};
use crate::model::{Activation, Model};
use crate::planes::Planes;

const FORMATS: [Format; 6] = [Format::F32, Format::F16, Format::Bf16, Format::Q8_0, Format::Q4K, Format::Q6K];

fn gpu() -> Arc<Gpu> {
    param_cuda_emulation::preload();
    crate::open().unwrap()
}

/// xorshift64*, and numbers around zero from it.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }

    /// Uniform in -scale..scale.
    fn floats(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| (self.below(1 << 20) as f32 / (1 << 19) as f32 - 1.0) * scale).collect()
    }
}

/// A stack of matrices as stored, and the numbers that it stands for.
#[derive(Clone)]
struct Stored {
    format: Format,
    n_matrix: usize,
    n_row: usize,
    n_col: usize,
    bytes: Vec<u8>,
    values: Vec<f32>, // [n_matrix, n_row, n_col]
    bias: Vec<f32>,   // [n_matrix, n_row], or none
}

impl Stored {
    fn random(random: &mut Random, format: Format, [n_matrix, n_row, n_col]: [usize; 3], scale: f32) -> Stored {
        use gguf::GgmlType;
        let ty = match format {
            Format::F32 => GgmlType::F32,
            Format::F16 => GgmlType::F16,
            Format::Bf16 => GgmlType::BF16,
            Format::Q8_0 => GgmlType::Q8_0,
            Format::Q4K => GgmlType::Q4_K,
            Format::Q6K => GgmlType::Q6_K,
        };
        let exact = random.floats(n_matrix * n_row * n_col, scale);
        let planes = Planes { format, n_row, n_col };
        // Words, because ggml wants blocks at even addresses.
        let mut words = vec![0u64; (n_matrix * planes.stored_bytes()).div_ceil(8)];
        let bytes = &mut bytemuck::cast_slice_mut::<_, u8>(&mut words)[..n_matrix * planes.stored_bytes()];
        quantize(ty, &exact, n_col, None, bytes).unwrap();
        let mut values = vec![0.0; exact.len()];
        dequantize(ty, bytes, &mut values).unwrap();
        Stored { format, n_matrix, n_row, n_col, bytes: bytes.to_vec(), values, bias: Vec::new() }
    }

    fn with_bias(mut self, random: &mut Random) -> Stored {
        self.bias = random.floats(self.n_matrix * self.n_row, 0.3);
        self
    }

    fn weights(&self) -> Weights<'_> {
        Weights {
            format: self.format,
            n_matrix: self.n_matrix,
            n_row: self.n_row,
            n_col: self.n_col,
            stored: (&*self.bytes).into(),
            bias: &self.bias,
        }
    }

    /// Row `n` of matrix `i` times `x`, and the bias.
    fn dot(&self, i: usize, n: usize, x: &[f64]) -> f64 {
        let at = i * self.n_row + n;
        let w = &self.values[at * self.n_col..][..self.n_col];
        w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>()
            + self.bias.get(at).map_or(0.0, |bias| f64::from(*bias))
    }

    fn product(&self, i: usize, x: &[f64]) -> Vec<f64> {
        (0..self.n_row).map(|n| self.dot(i, n, x)).collect()
    }
}

fn gelu(x: f64, activation: Activation) -> f64 {
    match activation {
        Activation::GeluErf => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
        Activation::GeluTanh => 0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044_715 * x * x * x)).tanh()),
    }
}

/// The error function by its series, for what is below 6.
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI
}

fn stored_as(x: &[f32], element: Element) -> Vec<u8> {
    match element {
        Element::F32 => bytemuck::cast_slice(x).to_vec(),
        Element::F16 => x.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        Element::Bf16 => x.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
    }
}

fn numbers(bytes: &[u8], element: Element) -> Vec<f64> {
    let pair = |b: &[u8; 2]| u16::from_le_bytes(*b);
    match element {
        Element::F32 => bytes.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
        Element::F16 => bytes.as_chunks().0.iter().map(|b| f16::from_bits(pair(b)).to_f64()).collect(),
        Element::Bf16 => bytes.as_chunks().0.iter().map(|b| bf16::from_bits(pair(b)).to_f64()).collect(),
    }
}

/// A stack in device memory, with what must live as long.
fn place(gpu: &Arc<Gpu>, stored: &Stored) -> (Matrix, Buffer<u8>, Buffer<f32>) {
    let planes = Planes { format: stored.format, n_row: stored.n_row, n_col: stored.n_col };
    let mut bytes = vec![0; stored.n_matrix * planes.bytes()];
    for (from, to) in stored.bytes.chunks_exact(planes.stored_bytes()).zip(bytes.chunks_exact_mut(planes.bytes())) {
        planes.write(from, to);
    }
    let (data, bias) = (gpu.upload("", &bytes).unwrap(), gpu.upload("", &stored.bias).unwrap());
    let matrix = Matrix {
        data: data.address(),
        bias: if stored.bias.is_empty() { 0 } else { bias.address() },
        matrix_bytes: planes.bytes() as u64,
        n_row: stored.n_row as u32,
        n_col: planes.padded() as u32,
        format: stored.format as u32,
        unused: 0,
    };
    (matrix, data, bias)
}

/// A product with experts (or without, if there is one), whose rows are chosen at random; returns the largest error relative to the
/// sum of the terms' magnitudes.
fn product_error(
    format: Format,
    which: usize,
    n_split: u32,
    n_row: usize,
    n_out: usize,
    n_in: usize,
    seed: u64,
) -> f64 {
    let gpu = gpu();
    let stream = Stream::new(&gpu).unwrap();
    let random = &mut Random::new(seed);
    let n_expert = 1 + random.below(4);
    let n_used = if n_expert == 1 { 1 } else { 1 + random.below(n_expert.min(2)) };
    let stored = Stored::random(random, format, [n_expert, n_out, n_in], 0.5).with_bias(random);
    let (matrix, _data, _bias) = place(&gpu, &stored);
    let element = format.element();
    let stride = n_in.next_multiple_of(32);
    let output_stride = n_out.next_multiple_of(32);

    let choices: Vec<u32> = (0..n_row)
        .flat_map(|_| {
            let first = random.below(n_expert);
            (0..n_used).map(move |c| ((first + c) % n_expert) as u32)
        })
        .collect();
    let n_entry = choices.len();
    let mut x = vec![0.0f32; n_row * stride];
    for row in x.chunks_exact_mut(stride) {
        row[..n_in].copy_from_slice(&random.floats(n_in, 1.0));
    }
    let x = stored_as(&x, element);
    let rounded = numbers(&x, element);
    let factors: Vec<f32> = random.floats(n_entry, 1.0);
    let mut offsets = vec![0u32];
    let mut list = Vec::new();
    for e in 0..n_expert as u32 {
        list.extend((0..n_entry as u32).filter(|i| choices[*i as usize] == e));
        offsets.push(list.len() as u32);
    }

    let input = gpu.upload("", &x).unwrap();
    let (offsets, device_list) = (gpu.upload("", &offsets).unwrap(), gpu.upload("", &list).unwrap());
    let weights = gpu.upload("", &factors).unwrap();
    let partial = n_split > 1 || random.below(2) == 0;
    let is_grouped = n_expert > 1;
    // Kernels for few rows find an expert's rows by themselves, if told to.
    let finds = is_grouped && which > 3 && random.below(2) == 0;
    let chosen = gpu.upload("", &choices).unwrap();
    let output = gpu.alloc::<u8>("", n_split as usize * n_entry * output_stride * 4).unwrap();
    let activation = if random.below(2) == 0 { Activation::GeluErf } else { Activation::GeluTanh };
    let product = Product {
        w: [matrix; 3],
        input: input.address(),
        output: output.address(),
        choices: if finds { chosen.address() } else { 0 },
        offsets: if is_grouped && !finds { offsets.address() } else { 0 },
        list: if is_grouped && !finds { device_list.address() } else { 0 },
        weights: if is_grouped && partial { weights.address() } else { 0 },
        input_stride: stride as u32,
        output_stride: output_stride as u32,
        n_row: n_entry as u32,
        n_expert: n_expert as u32,
        n_used: n_used as u32,
        gathers: u32::from(is_grouped),
        output_kind: if partial { Output::Partial } else { Output::Activated } as u32,
        activation: activation as u32,
        element: Element::F32 as u32,
        ..Product::default()
    };
    let products = Products::new(&gpu, std::iter::once(format), 0).unwrap();
    let mut plan = products.plan_of(&product, which, n_split);
    let k_warps = [1, 2, 4, 8][random.below(4)];
    if which > 3 && (k_warps > 1 || !partial || is_grouped || n_split > 1 || n_in > 768) {
        plan = Plan { k_warps, blocks: plan.blocks * k_warps, ..plan };
    } else if which > 3 {
        plan.blocks = 1;
    }
    // SAFETY: every address is that of a buffer above, which has room for what the product reads or writes.
    unsafe { products.launch_as(&stream, product, 1, plan) }
        .unwrap_or_else(|e| panic!("{e}: {}", param_cuda_emulation::last_fault()));
    let output = numbers(&output.to_vec().unwrap(), Element::F32);

    let mut error = 0.0f64;
    for (i, listed) in list.iter().enumerate() {
        // Results of experts lie in the order of the list unless they are partial.
        let entry = if is_grouped { *listed as usize } else { i };
        let row = if partial || finds { entry } else { i };
        let expert = choices[entry] as usize;
        let x = &rounded[entry / n_used * stride..][..n_in];
        for n in 0..output_stride {
            let parts = (0..n_split as usize).map(|s| output[(row * n_split as usize + s) * output_stride + n]);
            let got: f64 = parts.sum();
            if n >= n_out {
                assert_eq!(got, 0.0, "beyond the matrix");
                continue;
            }
            let sum = stored.dot(expert, n, x);
            let want = match (partial, is_grouped) {
                (true, true) => sum * f64::from(factors[entry]),
                (true, false) => sum,
                (false, _) => gelu(sum, activation),
            };
            let at = expert * n_out + n;
            let magnitude: f64 =
                stored.values[at * n_in..][..n_in].iter().zip(x).map(|(w, x)| (f64::from(*w) * x).abs()).sum();
            error = error.max((got - want).abs() / (magnitude + 0.3));
        }
    }
    error
}

/// f32 sums up rounding only; a weight that is unpacked to f16 is within 2^-11 of itself, three times for the block's scale, that of its
/// sixteen and the product, and a Q4_K weight is a difference, whose terms can be larger than itself.
fn product_bound(format: Format) -> f64 {
    match format {
        Format::F32 | Format::F16 | Format::Bf16 => 1e-5,
        Format::Q8_0 | Format::Q6K => 1.5e-3,
        Format::Q4K => 3e-3,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn products_are_those_of_plain_sums(
        format in proptest::sample::select(FORMATS.to_vec()),
        which in 0usize..7,
        n_split in 1u32..4,
        n_row in 1usize..70,
        n_out in 1usize..140,
        pieces in 1usize..4,
        seed in any::<u64>(),
    ) {
        let n_in = match format {
            Format::Q4K | Format::Q6K => 256 * (1 + pieces % 2),
            Format::Q8_0 => 32 * pieces,
            _ => 32 * pieces - seed as usize % 4 * 8,
        };
        let which = if format == Format::F32 { which.min(2) } else { which };
        let error = product_error(format, which, n_split, n_row, n_out, n_in, seed);
        prop_assert!(error < product_bound(format), "{format:?}: {error}");
    }
}

#[test]
fn products_do_not_depend_on_the_schedule() {
    for schedule in Schedule::ALL {
        param_cuda_emulation::schedule(Some(schedule));
        for format in FORMATS {
            for which in if format == Format::F32 { vec![2] } else { vec![2, 5, 6] } {
                let error = product_error(format, which, 2, 65, 66, 512, 7);
                assert!(error < product_bound(format), "{format:?}, {schedule:?}: {error}");
            }
        }
    }
    param_cuda_emulation::schedule(None);
}

#[test]
fn unpacked_weights_are_those_of_ggml() {
    let gpu = gpu();
    let stream = Stream::new(&gpu).unwrap();
    let random = &mut Random::new(5);
    for (format, n_in) in [(Format::Q8_0, 96), (Format::Q8_0, 64), (Format::Q4K, 512), (Format::Q6K, 256)] {
        let stored = Stored::random(random, format, [3, 131, n_in], 0.5);
        let (matrix, _data, _bias) = place(&gpu, &stored);
        let products = Products::new(&gpu, std::iter::once(format), stored.values.len()).unwrap();
        let mut product = Product { w: [matrix; 3], choices: 1, n_expert: 3, ..Product::default() };
        // SAFETY: nothing but the weights is used.
        unsafe { products.expand(&stream, &mut product, 1) }.unwrap();
        assert_eq!((product.w[0].format, product.w[0].matrix_bytes), (Format::F16 as u32, 2 * 131 * n_in as u64));
        let unpacked = numbers(&products.expanded().to_vec().unwrap(), Element::F16);
        for (got, want) in unpacked.iter().zip(&stored.values) {
            assert!((got - f64::from(*want)).abs() < product_bound(format), "{format:?}: {got} for {want}");
        }
    }
}

#[test]
fn entries_are_listed_by_expert_in_their_order() {
    let gpu = gpu();
    let stream = Stream::new(&gpu).unwrap();
    let kernel = Module::load(&gpu, include_str!("../../ptx/group.ptx")).unwrap().kernel("group_by_expert").unwrap();
    let random = &mut Random::new(3);
    for (n_entry, n_expert, n_chosen) in [(1, 1, 1), (7, 3, 3), (600, 8, 8), (300, 5, 1), (257, 9, 2)] {
        // The last number stands for rows that pad.
        let choices: Vec<u32> =
            (0..n_entry).map(|i| if i % 11 == 10 { n_expert } else { random.below(n_chosen) as u32 }).collect();
        let (choice, offsets) =
            (gpu.upload("", &choices).unwrap(), gpu.alloc::<u32>("", n_expert as usize + 1).unwrap());
        let list = gpu.alloc::<u32>("", n_entry).unwrap();
        let grid = Grid { blocks: [n_expert, 1, 1], threads: 256, shared: 0 };
        // SAFETY: the kernel's arguments, with room for every entry.
        unsafe { kernel.launch(&stream, grid, &args![choice, n_entry as u32, n_expert, offsets, list]) }.unwrap();
        let (mut expected, mut starts) = (Vec::new(), vec![0]);
        for e in 0..n_expert {
            expected.extend((0..n_entry as u32).filter(|i| choices[*i as usize] == e));
            starts.push(expected.len() as u32);
        }
        assert_eq!(offsets.to_vec().unwrap(), starts);
        assert_eq!(list.to_vec().unwrap()[..expected.len()], expected);
    }
}

/// A model's tensors, and its forward pass in f64.
struct Tiny {
    dims: Model,
    token_embd: Stored,
    position_embd: Vec<f32>,
    output_norm: [Vec<f32>; 2],
    head: Option<Stored>,
    blocks: Vec<TinyBlock>,
}

struct TinyBlock {
    norms: [[Vec<f32>; 2]; 2],
    qkv: [Stored; 3],
    out: Stored,
    router: Vec<f32>,
    selection_bias: Vec<f32>,
    up: Stored,
    down: Stored,
}

impl Tiny {
    /// Even blocks are layers of experts, where there are any. `formats` in turn.
    fn random(seed: u64, dims: Model, formats: &[Format]) -> Tiny {
        let random = &mut Random::new(seed);
        let (n_embd, n_ff) = (dims.n_embd as usize, dims.n_ff as usize);
        let mut next = formats.iter().cycle().copied();
        let mut format = || next.next().unwrap();
        let norm = |random: &mut Random| {
            [random.floats(n_embd, 0.3).iter().map(|x| 1.0 + x).collect::<Vec<_>>(), random.floats(n_embd, 0.2)]
        };
        let s = 1.5 / (n_embd as f32).sqrt();
        let blocks = (0..dims.n_layer as usize)
            .map(|i| {
                let n_matrix = if dims.n_expert > 0 && i.is_multiple_of(2) { dims.n_expert as usize } else { 1 };
                let is_moe = dims.n_expert > 0 && i.is_multiple_of(2);
                // Of one format every other time, so that both ways of launching are met.
                let f = format();
                let qkv = [0, 1, 2].map(|j| {
                    let f = if i % 2 == 0 || j == 0 { f } else { format() };
                    Stored::random(random, f, [1, n_embd, n_embd], s)
                });
                TinyBlock {
                    norms: [norm(random), norm(random)],
                    qkv,
                    out: Stored::random(random, format(), [1, n_embd, n_embd], s).with_bias(random),
                    router: if is_moe { random.floats(n_matrix * n_embd, 0.7) } else { Vec::new() },
                    selection_bias: if is_moe && i == 0 { random.floats(n_matrix, 1.0) } else { Vec::new() },
                    up: Stored::random(random, format(), [n_matrix, n_ff, n_embd], s).with_bias(random),
                    down: Stored::random(random, format(), [n_matrix, n_embd, n_ff], 1.0 / (n_ff as f32).sqrt())
                        .with_bias(random),
                }
            })
            .collect();
        let n_vocab = dims.n_vocab as usize;
        Tiny {
            token_embd: Stored::random(random, format(), [1, n_vocab, n_embd], 1.0),
            position_embd: random.floats(dims.n_ctx as usize * n_embd, 0.5),
            output_norm: norm(random),
            head: seed.is_multiple_of(2).then(|| Stored::random(random, format(), [1, n_vocab, n_embd], s)),
            blocks,
            dims,
        }
    }

    fn upload(&self, gpu: &Arc<Gpu>) -> Arc<DeviceModel> {
        fn norm(of: &[Vec<f32>; 2]) -> NormWeights<'_> {
            NormWeights { scale: &of[0], shift: &of[1] }
        }
        let outer = OuterWeights {
            token_embd: self.token_embd.weights(),
            position_embd: &self.position_embd,
            output_norm: norm(&self.output_norm),
            head: self.head.as_ref().map(Stored::weights),
        };
        let mut upload = DeviceModel::begin(gpu, &self.dims, &outer).unwrap();
        for b in &self.blocks {
            let ffn = FeedForwardWeights {
                router: &b.router,
                selection_bias: &b.selection_bias,
                up: b.up.weights(),
                down: b.down.weights(),
            };
            let [q, k, v] = [0, 1, 2].map(|i| b.qkv[i].weights());
            let block = BlockWeights {
                norm1: norm(&b.norms[0]),
                q,
                k,
                v,
                out: b.out.weights(),
                norm2: norm(&b.norms[1]),
                ffn: Some(ffn),
            };
            upload.block(Some(&block)).unwrap();
        }
        Arc::new(upload.end().unwrap())
    }

    fn norm(&self, x: &[f64], [scale, shift]: &[Vec<f32>; 2]) -> Vec<f64> {
        let n = x.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
        let factor = 1.0 / (variance + f64::from(self.dims.norm_eps)).sqrt();
        let scaled = x.iter().zip(scale).map(|(x, scale)| (x - mean) * factor * f64::from(*scale));
        scaled.zip(shift).map(|(x, shift)| x + f64::from(*shift)).collect()
    }

    /// Logits of every position, and how close the router ever came to choosing otherwise.
    fn logits(&self, tokens: &[u32]) -> (Vec<Vec<f64>>, f64) {
        let d = &self.dims;
        let (n_embd, head_dim) = (d.n_embd as usize, d.head_dim as usize);
        let mut margin = f64::INFINITY;
        let mut x: Vec<Vec<f64>> = tokens
            .iter()
            .enumerate()
            .map(|(i, token)| {
                let at = |v: &[f32], row: usize, j: usize| f64::from(v[row * n_embd + j]);
                (0..n_embd)
                    .map(|j| at(&self.token_embd.values, *token as usize, j) + at(&self.position_embd, i, j))
                    .collect()
            })
            .collect();
        for b in &self.blocks {
            let h: Vec<Vec<f64>> = x.iter().map(|x| self.norm(x, &b.norms[0])).collect();
            let [q, k, v] = [0, 1, 2].map(|i| h.iter().map(|h| b.qkv[i].product(0, h)).collect::<Vec<_>>());
            for i in 0..x.len() {
                let mut attended = vec![0.0; n_embd];
                for head in 0..d.n_head as usize {
                    let dims = head * head_dim..(head + 1) * head_dim;
                    let scores: Vec<f64> = (0..=i)
                        .map(|j| dims.clone().map(|e| q[i][e] * k[j][e]).sum::<f64>() / (head_dim as f64).sqrt())
                        .collect();
                    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let total: f64 = scores.iter().map(|s| (s - most).exp()).sum();
                    for (j, s) in scores.iter().enumerate() {
                        dims.clone().for_each(|e| attended[e] += (s - most).exp() / total * v[j][e]);
                    }
                }
                let y = b.out.product(0, &attended);
                x[i].iter_mut().zip(y).for_each(|(x, y)| *x += y);
            }
            for x in &mut x {
                let h = self.norm(x, &b.norms[1]);
                let mut add = |expert: usize, weight: f64, activation: Activation| {
                    let hidden: Vec<f64> = b.up.product(expert, &h).iter().map(|x| gelu(*x, activation)).collect();
                    let y = b.down.product(expert, &hidden);
                    x.iter_mut().zip(y).for_each(|(x, y)| *x += weight * y);
                };
                if b.router.is_empty() {
                    add(0, 1.0, Activation::GeluTanh);
                    continue;
                }
                let logits: Vec<f64> = b
                    .router
                    .chunks_exact(n_embd)
                    .map(|w| w.iter().zip(&h).map(|(w, h)| f64::from(*w) * h).sum())
                    .collect();
                let score = |e: usize| logits[e] + b.selection_bias.get(e).map_or(0.0, |bias| f64::from(*bias));
                let mut order: Vec<usize> = (0..logits.len()).collect();
                order.sort_by(|a, b| score(*b).total_cmp(&score(*a)));
                let n_used = d.n_used as usize;
                if n_used < order.len() {
                    margin = margin.min(score(order[n_used - 1]) - score(order[n_used]));
                }
                let total: f64 = order[..n_used].iter().map(|e| logits[*e].exp()).sum();
                for &e in &order[..n_used] {
                    add(e, logits[e].exp() / total, Activation::GeluErf);
                }
            }
        }
        let head = self.head.as_ref().unwrap_or(&self.token_embd);
        (x.iter().map(|x| head.product(0, &self.norm(x, &self.output_norm))).collect(), margin)
    }
}

fn dims(n_head: u32, head_dim: u32, n_ff: u32, n_expert: u32, n_used: u32, cache_f32: bool) -> Model {
    Model {
        n_vocab: 37,
        n_ctx: 96,
        n_embd: n_head * head_dim,
        n_head,
        head_dim,
        n_layer: 3,
        n_ff,
        n_expert,
        n_used,
        expert_activation: Activation::GeluErf as u32,
        dense_activation: Activation::GeluTanh as u32,
        norm_eps: 1e-5,
        cache_f32: u32::from(cache_f32),
        ..Model::default()
    }
}

/// How a pass is run: at once, part by part, or, where every sequence goes on by one token, recorded the first time.
#[derive(Clone, Copy)]
enum Mode {
    Whole,
    Parts,
    Recorded,
}

/// Runs chunks (sequence, rows) of three sequences, one list of chunks a pass, and returns the largest error of a logit, as a part of
/// the row's largest. The tokens are such that no router's choice hangs by less than `margin`: where it does, another expert is as right.
fn model_error(tiny: &Tiny, passes: &[&[(usize, usize)]], mode: Mode, margin: f64) -> f64 {
    let gpu = gpu();
    let stream = Stream::new(&gpu).unwrap();
    let mut lengths = [0; 3];
    passes.iter().for_each(|chunks| chunks.iter().for_each(|(sequence, n)| lengths[*sequence] += n));
    let random = &mut Random::new(99);
    let (tokens, expected): (Vec<Vec<u32>>, Vec<Vec<Vec<f64>>>) = lengths
        .map(|n| {
            let tries = (0..500).map(|_| {
                let tokens: Vec<u32> = (0..n).map(|_| random.below(tiny.dims.n_vocab as usize) as u32).collect();
                let (logits, closest) = tiny.logits(&tokens);
                (closest > margin).then_some((tokens, logits))
            });
            tries.flatten().next().unwrap()
        })
        .into_iter()
        .unzip();

    let model = tiny.upload(&gpu);
    let caches = Arc::new(Caches::new(&model, 3, 90).unwrap());
    let n_row_max = passes.iter().map(|chunks| chunks.iter().map(|(_, n)| n + 1).sum::<usize>()).max().unwrap();
    let mut forward = Forward::new(&model, &caches, n_row_max, n_row_max).unwrap();
    let mut past = [0; 3];
    let mut recorded = None;
    let mut error = 0.0f64;
    for chunks in passes {
        let (mut rows, mut wanted) = (Vec::new(), Vec::new());
        for &(sequence, n) in *chunks {
            for _ in 0..n {
                let position = past[sequence];
                wanted.push((rows.len() as u32, sequence, position));
                let token = tokens[sequence][position];
                rows.push(Row { token, position: position as u32, sequence: sequence as u32 });
                past[sequence] += 1;
            }
            rows.push(Row::PADDING);
        }
        let of: Vec<u32> = wanted.iter().map(|w| w.0).collect();
        forward.set_rows(&rows, &of).unwrap();
        match mode {
            Mode::Parts => {
                forward.embed(&stream).unwrap();
                for i in 0..tiny.blocks.len() {
                    if i == 1 {
                        forward.blocks(&stream, i..i + 1).unwrap();
                        continue;
                    }
                    forward.attention_part(&stream, i).unwrap();
                    forward.ffn_part(&stream, i).unwrap();
                }
                forward.head(&stream).unwrap();
            }
            Mode::Recorded if chunks.iter().all(|(_, n)| *n == 1) => {
                let graph = recorded.get_or_insert_with(|| stream.capture(|stream| forward.run(stream)).unwrap());
                // SAFETY: `forward`, the model and the caches live.
                unsafe { graph.launch(&stream) }.unwrap();
            }
            _ => forward.run(&stream).unwrap_or_else(|e| panic!("{e}: {}", param_cuda_emulation::last_fault())),
        }
        let logits = forward.logits().to_vec().unwrap();
        for ((_, sequence, position), got) in wanted.iter().zip(logits.chunks_exact(tiny.dims.n_vocab as usize)) {
            let want = &expected[*sequence][*position];
            let largest = want.iter().fold(1.0f64, |largest, logit| largest.max(logit.abs()));
            got.iter().zip(want).for_each(|(got, want)| {
                let e = (f64::from(*got) - want).abs() / largest;
                error = if e.is_nan() { f64::INFINITY } else { error.max(e) };
            });
        }
        assert_eq!(forward.not_finite().to_vec().unwrap(), [0]);
    }
    error
}

/// Chunks that begin and go on, of one row and of more than a tile has.
const PASSES: [&[(usize, usize)]; 4] =
    [&[(0, 5), (1, 1)], &[(1, 17), (0, 2), (2, 3)], &[(0, 1), (1, 1), (2, 1)], &[(2, 66)]];

#[test]
fn a_model_in_f32_gives_the_logits_of_plain_sums() {
    for (seed, d) in
        [(1, dims(2, 16, 40, 4, 2, true)), (2, dims(1, 40, 64, 0, 0, true)), (3, dims(3, 32, 96, 5, 5, true))]
    {
        let error = model_error(
            &Tiny::random(seed, d, &[Format::F32]),
            &PASSES,
            if seed == 1 { Mode::Parts } else { Mode::Whole },
            1e-5,
        );
        assert!(error < 1e-4, "{seed}: {error}");
    }
}

/// Activations are rounded to f16 before every product, keys, values and probabilities too: 2^-11 of numbers around 1, of which the
/// logits sum many. bf16 keeps three bits less.
const F16_ERROR: f64 = 8e-3;
const BF16_ERROR: f64 = 2e-2;

#[test]
fn models_of_every_format_give_the_logits_of_plain_sums() {
    use Format::*;
    let cases: [(u64, Model, &[Format], f64); 7] = [
        (1, dims(2, 32, 40, 4, 2, false), &[F16], F16_ERROR),
        (2, dims(3, 64, 64, 3, 1, false), &[F16, F32, Q8_0], F16_ERROR),
        (3, dims(2, 32, 64, 3, 3, false), &[Bf16], BF16_ERROR),
        (4, dims(2, 128, 256, 4, 3, false), &[Q4K], F16_ERROR),
        (5, dims(4, 64, 512, 2, 2, false), &[Q6K, Q4K], F16_ERROR),
        (6, dims(2, 32, 96, 8, 3, false), &[Q8_0], F16_ERROR),
        (7, dims(4, 24, 40, 4, 2, true), &[F16], F16_ERROR),
    ];
    for (seed, d, formats, bound) in cases {
        let error = model_error(
            &Tiny::random(seed, d, formats),
            &PASSES,
            if seed.is_multiple_of(2) { Mode::Parts } else { Mode::Whole },
            bound / 2.0,
        );
        println!("{formats:?}: {error:.1e}");
        assert!(error < bound, "{seed}: {formats:?}: {error}");
    }
}

#[test]
fn a_recorded_pass_goes_on_with_other_rows() {
    const ONE_EACH: &[(usize, usize)] = &[(0, 1), (1, 1), (2, 1)];
    let passes = [&[(0, 4), (1, 9)], ONE_EACH, ONE_EACH, ONE_EACH];
    let tiny = Tiny::random(8, dims(2, 32, 64, 4, 2, false), &[Format::Q8_0]);
    for schedule in Schedule::ALL {
        param_cuda_emulation::schedule(Some(schedule));
        let error = model_error(&tiny, &passes, Mode::Recorded, F16_ERROR / 2.0);
        assert!(error < F16_ERROR, "{schedule:?}: {error}");
    }
    param_cuda_emulation::schedule(None);
}

#[test]
fn rows_become_spans_of_consecutive_positions() {
    let row = |sequence, position| Row { token: 0, position, sequence };
    let mut rows: Vec<Row> = (5..75).map(|position| row(0, position)).collect();
    rows.extend([row(1, 0), row(1, 1), row(2, 2), Row::PADDING, Row::PADDING]);
    let none = Row::NO_SEQUENCE;
    let expected = [(0, 64, 0, 5), (64, 6, 0, 69), (70, 2, 1, 0), (72, 1, 2, 2), (73, 1, none, 0), (74, 1, none, 0)];
    let expected = expected.map(|(row, n_row, slot, position)| Span { row, n_row, slot, position });
    assert_eq!(spans(&rows), expected);
}
