//! Every way to multiply, in the emulation, against plain sums in f64.

use param_cuda_emulation::{Schedule, assert_noticed, is_real};
use proptest::prelude::*;

use super::super::testing::{Random, Stored, gpu, rounded};
use super::*;

/// Which matrices are multiplied: [`Groups`] without their starts.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    One,
    Rows,
    Sums,
    Stack,
}

/// [`Write`] without what it is given.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Then {
    Replace,
    Add,
    Biased,
    Activated,
    ActivationBackward,
    Residual,
    Symmetric,
}

#[derive(Clone, Debug)]
struct Case {
    arithmetic: Arithmetic,
    way: Way,
    n_group: usize,
    /// Rows of C, of one matrix of SUMS and STACK.
    m: usize,
    n: usize,
    k: usize,
    transposed: (bool, bool),
    gathers: bool,
    then: Then,
    out: Element,
    has_bias: bool,
    drops: bool,
    activation: Activation,
    /// Of [`TILES`], then of [`WGMMA_TILES`].
    tile: usize,
    n_part: usize,
    in_order: bool,
    seed: u64,
}

fn tf32(x: f32) -> f32 {
    f32::from_bits((x.to_bits() + 0x1000) & !0x1fff)
}

/// Phi(x), by its series: exact enough up to 6.
fn normal_cdf(x: f64) -> f64 {
    let (mut term, mut sum, mut n) = (x, x, 1.0);
    while term.abs() > 1e-18 {
        n += 2.0;
        term *= x * x / n;
        sum += term;
    }
    0.5 + normal_pdf(x) * sum
}

fn normal_pdf(x: f64) -> f64 {
    (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

/// The GELU and its slope.
fn gelu(kind: Activation, x: f64) -> (f64, f64) {
    match kind {
        Activation::GeluErf => (x * normal_cdf(x), normal_cdf(x) + x * normal_pdf(x)),
        Activation::GeluTanh => {
            let c = (2.0 / std::f64::consts::PI).sqrt();
            let t = (c * (x + 0.044715 * x * x * x)).tanh();
            (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * c * (1.0 + 3.0 * 0.044715 * x * x))
        }
    }
}

/// `n` ascending rows up to `most`, some groups of none, the last at `most` or before.
fn random_starts(random: &mut Random, n: usize, most: usize) -> Vec<u32> {
    let mut starts: Vec<u32> = (0..n).map(|_| random.below(most + 1) as u32).collect();
    if n > 1 && random.below(2) == 0 {
        starts[0] = starts[1];
    }
    if random.below(2) == 0 {
        starts[n - 1] = most as u32;
    }
    starts.push(0);
    starts.sort_unstable();
    starts
}

impl Case {
    /// What cannot be asked for becomes what can.
    fn legal(mut self) -> Self {
        match self.way {
            Way::One => self.n_group = 1,
            Way::Rows => self.transposed.0 = false,
            Way::Sums => self.transposed = (true, false),
            Way::Stack => self.gathers = false,
        }
        let is_rows = matches!(self.way, Way::One | Way::Rows);
        if !is_rows && matches!(self.then, Then::Biased | Then::Activated | Then::Residual) {
            self.then = Then::Replace;
        }
        if self.then == Then::Symmetric {
            if !matches!(self.way, Way::One | Way::Stack) {
                self.way = Way::Stack;
            }
            self.gathers = false;
            self.n = self.m;
            self.transposed.1 = !self.transposed.0;
        }
        if matches!(self.then, Then::Add | Then::Residual | Then::Symmetric) {
            self.out = Element::F32;
        }
        if self.way == Way::Rows || !matches!(self.then, Then::Replace | Then::Add) {
            self.n_part = 1;
        }
        if self.arithmetic != Arithmetic::Bf16 {
            self.tile %= TILES.len();
        }
        self
    }

    /// Computes it under every schedule and compares. Error bounds, of a sum: k 2^-23 of the absolute products, for what sums in f32
    /// round, and where factors are split 2^-20 of them; of a GELU 6e-7; of what is stored in bf16 2^-8.
    fn check(self) {
        let Case { arithmetic, way, n_group, m, n, k, transposed, then, out, activation, .. } = self.clone();
        let gpu = gpu();
        let (random, element) = (&mut Random::new(self.seed), arithmetic.element());
        let matmul = if self.tile < TILES.len() { Matmul::Mma } else { Matmul::Wgmma };
        if is_real() && matmul.check(&gpu, arithmetic).is_err() {
            return;
        }
        let products = Products::new(&gpu, arithmetic, matmul).unwrap();
        let products = if self.in_order { products } else { products.non_deterministic() };
        let stream = Stream::new(&gpu).unwrap();

        // Factors as stored.
        let n_matrix = if matches!(way, Way::Sums | Way::Stack) { n_group } else { 1 };
        let (n_a, n_b) = match way {
            Way::One | Way::Sums => (1, 1),
            Way::Rows => (1, n_group),
            Way::Stack => (n_group, n_group),
        };
        let (a_row, a_col) = if transposed.0 { (n_a * k, m) } else { (n_a * m, k) };
        let (b_row, b_col) = if transposed.1 { (n_b * n, k) } else { (n_b * k, n) };
        let n_a_row = if self.gathers { 1 + random.below(2 * a_row) } else { a_row };
        let a = rounded(&random.floats(n_a_row * a_col, 1.0), element);
        let b = if then == Then::Symmetric { a.clone() } else { rounded(&random.floats(b_row * b_col, 1.0), element) };
        let gather: Vec<u32> =
            (0..a_row).map(|i| if self.gathers { random.below(n_a_row) as u32 } else { i as u32 }).collect();
        let grouped = if way == Way::Sums { k } else { m };
        let starts = random_starts(random, n_group, grouped);
        let (a_stored, b_stored) = (Stored::new(&gpu, &a, element, a_col), Stored::new(&gpu, &b, element, b_col));
        let (gather_stored, starts_stored) = (gpu.upload("", &gather).unwrap(), gpu.upload("", &starts).unwrap());
        let mut factor_a = Factor { rows: a_stored.rows(), transposed: transposed.0, gather: None };
        if self.gathers {
            factor_a = factor_a.gathered(gather_stored.view());
        }
        let factor_b = Factor { rows: b_stored.rows(), transposed: transposed.1, gather: None };
        let starts_view = starts_stored.view();
        let groups = match way {
            Way::One => Groups::One,
            Way::Rows => Groups::Rows { starts: starts_view, n: n_group },
            Way::Sums => Groups::Sums { starts: starts_view, n: n_group },
            Way::Stack => Groups::Stack { n: n_group },
        };

        // What else there is.
        let rows = n_matrix * m;
        let before = rounded(&random.floats(rows * n, 2.0), out);
        let n_bias = if way == Way::Rows { n_group } else { 1 };
        let bias = random.floats(n_bias * n, 1.0);
        let bias = if self.has_bias { bias } else { vec![0.0; n_bias * n] };
        let bits: Vec<u32> = (0..(rows * n).div_ceil(32))
            .map(|_| (random.below(1 << 16) << 16 | random.below(1 << 16)) as u32)
            .collect();
        let with = rounded(&random.floats(rows * n, 4.0), out);
        let (bias_stored, bits_stored) = (gpu.upload("", &bias).unwrap(), gpu.upload("", &bits).unwrap());
        let with_stored = Stored::new(&gpu, &with, out, n);
        let bias_view = self.has_bias.then(|| bias_stored.view());
        let dropout = self.drops.then(|| Dropped { bits: bits_stored.view(), scale: 1.25 });
        let plan = Plan { tile: self.tile, n_part: self.n_part };
        let part_len = rows * n.next_multiple_of(4);
        let workspace = gpu.alloc::<f32>("", part_len * self.n_part).unwrap();
        let numbers = [0.75f32, -0.5, 3.0];

        let mut results = Vec::<[Vec<f32>; 2]>::new();
        for schedule in Schedule::ALL {
            param_cuda_emulation::schedule(Some(schedule));
            let (first, second) = (Stored::new(&gpu, &before, out, n), Stored::new(&gpu, &before, out, n));
            let write = match then {
                Then::Replace => Write::Replace(first.rows()),
                Then::Add => Write::Add(first.rows()),
                Then::Biased => Write::Biased { out: first.rows(), bias: bias_view, dropout },
                Then::Activated => {
                    Write::Activated { pre: first.rows(), hidden: second.rows(), bias: bias_view, activation }
                }
                Then::ActivationBackward => Write::ActivationBackward {
                    pre: with_stored.rows(),
                    dpre: first.rows(),
                    hidden: second.rows(),
                    activation,
                },
                Then::Residual => {
                    Write::Residual { out: first.rows(), residual: with_stored.rows(), bias: bias_view, dropout }
                }
                Then::Symmetric => Write::Symmetric {
                    out: first.rows(),
                    sum_scale: numbers[0],
                    with: self.has_bias.then(|| (with_stored.rows(), numbers[1])),
                    diagonal: numbers[2],
                },
            };
            let parts = Some(workspace.view());
            products.compute_as(&stream, factor_a, factor_b, groups, write, parts, plan).unwrap();
            stream.synchronize().unwrap_or_else(|e| panic!("{e}: {}", param_cuda_emulation::last_fault()));
            let got = [first.to_vec(), second.to_vec()];
            let bits =
                |[first, second]: &[Vec<f32>; 2]| first.iter().chain(second).map(|x| x.to_bits()).collect::<Vec<_>>();
            if results.iter().all(|results| bits(results) != bits(&got)) {
                results.push(got);
            }
            assert!(results.len() == 1 || !self.in_order, "{schedule:?}");
        }
        param_cuda_emulation::schedule(None);
        let [first, second] = results.pop().expect("a result");

        let factor = |x: f32| f64::from(if arithmetic == Arithmetic::Tf32 { tf32(x) } else { x });
        for i in 0..rows * n {
            let (row, col) = (i / n, i % n);
            // Of a matrix of B, and within its own.
            let (g, r) = match way {
                Way::Rows => (starts.iter().filter(|&&s| s as usize <= row).count() - 1, row),
                _ => (row / m, row % m),
            };
            let close = |what: &str, got: f32, want: f64, bound: f64| {
                let bound = bound + want.abs() * if out == Element::Bf16 { 2f64.powi(-8) } else { 2f64.powi(-22) };
                let error = (f64::from(got) - want).abs();
                assert!(error <= bound, "{what} ({row}, {col}): {got} for {want}, bound {bound}");
            };
            if way == Way::Rows && row >= starts[n_group] as usize {
                assert_eq!([first[i], second[i]], [before[i]; 2], "a row of no group was written");
                continue;
            }
            let (k_begin, k_end) = if way == Way::Sums { (starts[g] as usize, starts[g + 1] as usize) } else { (0, k) };
            let (mut sum, mut size) = (0.0, 0.0);
            // Below the diagonal a symmetric result is that from above it.
            let (r, col) = if then == Then::Symmetric { (r.min(col), r.max(col)) } else { (r, col) };
            for kk in k_begin..k_end {
                let of_a = if way == Way::Stack { g } else { 0 };
                let (ar, ac) = if transposed.0 { (of_a * k + kk, r) } else { (of_a * m + r, kk) };
                let of_b = if matches!(way, Way::Stack | Way::Rows) { g } else { 0 };
                let (br, bc) = if transposed.1 { (of_b * n + col, kk) } else { (of_b * k + kk, col) };
                let product = factor(a[gather[ar] as usize * a_col + ac]) * factor(b[br * b_col + bc]);
                sum += product;
                size += product.abs();
            }
            let split = if arithmetic == Arithmetic::F32 { 2f64.powi(-20) } else { 0.0 };
            let bound = size * (k as f64 * 2f64.powi(-23) + split) + 1e-9;
            let biased = sum + f64::from(bias[if way == Way::Rows { g * n + col } else { col }]);
            let scale = match (self.drops, bits[i / 32] >> (i % 32) & 1) {
                (false, _) => 1.0,
                (true, 1) => 1.25,
                _ => 0.0,
            };
            let (x, old) = (f64::from(with[i]), f64::from(before[i]));
            match then {
                Then::Replace => close("sums", first[i], sum, bound),
                Then::Add => close("added", first[i], old + sum, bound + 2f64.powi(-22) * old.abs()),
                Then::Biased => close("biased", first[i], scale * biased, 2.0 * bound + 1e-6),
                Then::Activated => {
                    close("pre", first[i], biased, bound + 1e-6);
                    close("hidden", second[i], gelu(activation, biased).0, 2.0 * bound + 6e-7 * biased.abs().max(2.0));
                }
                Then::ActivationBackward => {
                    let (value, slope) = gelu(activation, x);
                    close("dpre", first[i], sum * slope, 2.0 * bound + 1e-6 * sum.abs());
                    close("hidden", second[i], value, 6e-7 * x.abs().max(1.0));
                }
                Then::Residual => {
                    let bound = 2.0 * bound + 1e-6 + 2f64.powi(-22) * x.abs();
                    close("residual", first[i], x + scale * biased, bound);
                }
                Then::Symmetric => {
                    let [sum_scale, with_scale, diagonal] = numbers.map(f64::from);
                    let x = f64::from(with[(row / m * m + r) * n + col]);
                    let more = if self.has_bias { with_scale * x } else { 0.0 } + if r == col { diagonal } else { 0.0 };
                    close("symmetric", first[i], sum_scale * sum + more, bound + 1e-6);
                }
            }
        }
    }
}

fn case() -> impl Strategy<Value = Case> {
    let arithmetic = prop_oneof![1 => Just(Arithmetic::F32), 1 => Just(Arithmetic::Tf32), 2 => Just(Arithmetic::Bf16)];
    let way = prop_oneof![Just(Way::One), Just(Way::Rows), Just(Way::Sums), Just(Way::Stack)];
    let then = prop_oneof![
        Just(Then::Replace),
        Just(Then::Add),
        Just(Then::Biased),
        Just(Then::Activated),
        Just(Then::ActivationBackward),
        Just(Then::Residual),
        Just(Then::Symmetric),
    ];
    let n = prop_oneof![2 => 1usize..40, 2 => 60usize..150, 1 => 250usize..300];
    let sizes = (prop_oneof![1usize..40, 60usize..150], n, prop_oneof![3 => 1usize..200, 1 => 300usize..400]);
    let bools = (any::<[bool; 2]>(), any::<[bool; 6]>());
    let plan = (0usize..TILES.len() + WGMMA_TILES.len(), 1usize..4);
    (arithmetic, way, 1usize..4, sizes, then, bools, plan, any::<u64>()).prop_map(
        |(
            arithmetic,
            way,
            n_group,
            (m, n, k),
            then,
            ([a, b], [gathers, bf16, has_bias, drops, erf, in_order]),
            plan,
            seed,
        )| {
            let out = if bf16 { Element::Bf16 } else { Element::F32 };
            let activation = if erf { Activation::GeluErf } else { Activation::GeluTanh };
            let (transposed, (tile, n_part)) = ((a, b), plan);
            Case {
                arithmetic,
                way,
                n_group,
                m,
                n,
                k,
                transposed,
                gathers,
                then,
                out,
                has_bias,
                drops,
                activation,
                tile,
                n_part,
                in_order,
                seed,
            }
            .legal()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 60, ..ProptestConfig::default() })]

    #[test]
    fn products_are_sums_of_products(case in case()) {
        case.check();
    }
}

/// A case that is changed by whoever takes it.
fn plain(arithmetic: Arithmetic, [m, n, k]: [usize; 3]) -> Case {
    Case {
        arithmetic,
        way: Way::One,
        n_group: 1,
        m,
        n,
        k,
        transposed: (false, false),
        gathers: false,
        then: Then::Replace,
        out: Element::F32,
        has_bias: false,
        drops: false,
        activation: Activation::GeluErf,
        tile: 0,
        n_part: 1,
        in_order: true,
        seed: 1,
    }
}

/// Every kernel, at a size that is no multiple of anything and needs more stages than there are.
#[test]
fn every_kernel_multiplies() {
    for arithmetic in [Arithmetic::F32, Arithmetic::Tf32, Arithmetic::Bf16] {
        for transposed in [(false, false), (false, true), (true, false), (true, true)] {
            for tile in 0..TILES.len() {
                Case { transposed, tile, ..plain(arithmetic, [131, 67, 5 * arithmetic.tile_k() + 3]) }.check();
            }
        }
    }
}

/// The same by warpgroups, and columns of more than one of their tiles.
#[test]
fn every_kernel_by_warpgroups_multiplies() {
    for transposed in [(false, false), (false, true), (true, false), (true, true)] {
        for tile in TILES.len()..TILES.len() + WGMMA_TILES.len() {
            let arithmetic = Arithmetic::Bf16;
            Case { transposed, tile, ..plain(arithmetic, [131, 259, 6 * arithmetic.tile_k() + 3]) }.check();
        }
    }
}

/// Each way to end a product of the tiles that are not square, with rows of A gathered where it can be.
#[test]
fn every_end_of_a_product_by_warpgroups() {
    let thens = [Then::Add, Then::Biased, Then::Activated, Then::ActivationBackward, Then::Residual, Then::Symmetric];
    for (i, then) in thens.into_iter().enumerate() {
        for way in [Way::One, Way::Rows, Way::Sums, Way::Stack] {
            let case = Case {
                way,
                n_group: 2,
                then,
                tile: TILES.len() + 1,
                gathers: true,
                has_bias: true,
                drops: true,
                out: Element::Bf16,
                n_part: 1 + i % 2,
                ..plain(Arithmetic::Bf16, [150, 270, 70])
            };
            case.legal().check();
        }
    }
    // A symmetric matrix of more tiles of rows than of columns.
    Case { then: Then::Symmetric, tile: TILES.len() + 1, ..plain(Arithmetic::Bf16, [530, 530, 20]) }.legal().check();
}

/// Rows of tiles in more than a panel, and groups in more than a warp has lanes.
#[test]
fn tiles_of_many_rows_and_groups_are_all_found() {
    let arithmetic = Arithmetic::Bf16;
    Case { tile: 0, ..plain(arithmetic, [18 * 64 + 1, 130, 8]) }.check();
    Case {
        way: Way::Rows,
        n_group: 40,
        gathers: true,
        has_bias: true,
        then: Then::Biased,
        ..plain(arithmetic, [200, 12, 16])
    }
    .check();
    Case { way: Way::Sums, n_group: 40, transposed: (true, false), gathers: true, ..plain(arithmetic, [9, 12, 300]) }
        .check();
}

/// Blocks that share sums and add them where they belong, whichever comes first; some have nothing to add.
#[test]
fn parts_of_sums_meet_where_they_belong() {
    for way in [Way::One, Way::Sums, Way::Stack] {
        for tile in 0..TILES.len() + WGMMA_TILES.len() {
            let base = plain(Arithmetic::Bf16, [70, 133, 300]);
            let case = Case { way, n_group: 3, then: Then::Add, tile, n_part: 7, in_order: false, ..base };
            case.legal().check();
        }
    }
}

/// A test of these tests: whatever wait, fence or barrier is left out of the products by warpgroups, they notice.
#[test]
fn a_kernel_that_does_not_wait_is_found_out() {
    if is_real() {
        return;
    }
    let edits = [
        ("        copy_async_wait<STAGES - 3>();\n", ""),
        ("        async_proxy_fence();\n", ""),
        ("        __syncthreads();\n        warpgroup_fence();", "        warpgroup_fence();"),
        // A stage that the products before still read.
        ("    warpgroup_wait<1>();\n", ""),
        ("t + 2 < STAGES; t++) copy();", "t + 1 < STAGES; t++) copy();"),
        ("    warpgroup_wait<0>();\n", ""),
        (
            "of_a = matrix_descriptor(shared_address(shared) + warpgroup * leading",
            "of_a = matrix_descriptor(shared_address(shared)",
        ),
    ];
    assert_noticed("train_product_wgmma.cu", &edits, "training::product::tests::every_kernel_by_warpgroups_multiplies");
}

fn shape(m: usize, n: usize, k: usize) -> Shape {
    Shape { m, n, k, n_matrix: 1, n_row_group: None, n_sum_group: 1 }
}

#[test]
fn plans_split_sums_where_few_tiles_would_leave_multiprocessors_idle() {
    let mut products = Products::new(&gpu(), Arithmetic::Bf16, Matmul::Mma).unwrap();
    products.n_multiprocessor = 132;
    let plan = |shape: Shape| products.plan(shape, shape.part_len() * MAX_PART, Wanted::Other);
    // The gradient of a weight, over many tokens.
    let split = plan(shape(768, 768, 8192));
    assert!(split.n_part > 1 && split.n_part * 36 >= 100, "{split:?}");
    assert_eq!(products.plan(shape(768, 768, 8192), 0, Wanted::Other).n_part, 1);
    // Tiles for all.
    assert_eq!(plan(shape(8192, 3072, 768)), Plan { tile: 1, n_part: 1 });
    assert_eq!(plan(shape(64, 64, 64)), Plan { tile: 0, n_part: 1 });
    let rows = Shape { n_row_group: Some(8), ..shape(24576, 3072, 768) };
    assert_eq!(plan(rows), Plan { tile: 1, n_part: 1 });
}

#[test]
fn sums_that_meet_in_any_order_need_no_workspace() {
    let mut products = Products::new(&gpu(), Arithmetic::Bf16, Matmul::Mma).unwrap().non_deterministic();
    products.n_multiprocessor = 132;
    assert!(products.plan(shape(768, 768, 8192), 0, Wanted::Add).n_part > 1);
    assert_eq!(products.plan(shape(768, 768, 8192), 0, Wanted::Other).n_part, 1);
    let rows = Shape { n_row_group: Some(8), ..shape(64, 768, 8192) };
    assert_eq!(products.plan(rows, 0, Wanted::Add).n_part, 1);
}

#[test]
fn large_products_are_by_warpgroups_where_that_is_asked_for() {
    let gpu = gpu();
    if is_real() && Matmul::Wgmma.check(&gpu, Arithmetic::Bf16).is_err() {
        return;
    }
    let mut products = Products::new(&gpu, Arithmetic::Bf16, Matmul::Wgmma).unwrap();
    products.n_multiprocessor = 132;
    let plan = |shape: Shape| products.plan(shape, shape.part_len() * MAX_PART, Wanted::Other);
    for large in [shape(8192, 3072, 768), shape(8192, 768, 3072), shape(16384, 2304, 768)] {
        assert!(plan(large).tile >= TILES.len(), "{large:?}: {:?}", plan(large));
    }
    assert_eq!(plan(shape(8192, 8192, 4096)).tile, TILES.len() + 1);
    assert_eq!(plan(shape(64, 64, 64)), Plan { tile: 0, n_part: 1 });
    for arithmetic in [Arithmetic::F32, Arithmetic::Tf32] {
        let refused = Products::new(&gpu, arithmetic, Matmul::Wgmma);
        assert!(matches!(refused, Err(Error::Matmul { .. })), "{arithmetic:?}");
    }
}

/// Of square tiles those on the diagonal and above it, of wide ones also those that reach it.
#[test]
fn tiles_of_a_symmetric_matrix_are_counted() {
    let [small, _] = TILES;
    let [_, wide] = WGMMA_TILES;
    assert_eq!(shape(5 * 64, 5 * 64, 8).tiles(small, true), 15);
    assert_eq!(shape(5 * 64, 5 * 64, 8).tiles(small, false), 25);
    assert_eq!(shape(512, 512, 8).tiles(wide, true), 2 + 4);
    assert_eq!(shape(530, 530, 8).tiles(wide, true), 2 + 4 + 5);
}

/// A workspace of the length that is said makes the plan, a shorter one a slower plan, and both the same sums but for rounding.
#[test]
fn a_workspace_of_any_length_will_do() {
    let gpu = gpu();
    let (m, n, k) = (20, 36, 64 * 40);
    let products = Products::new(&gpu, Arithmetic::Bf16, Matmul::Mma).unwrap();
    let stream = Stream::new(&gpu).unwrap();
    let random = &mut Random::new(5);
    let [a, b] = [m, n].map(|n| Stored::new(&gpu, &random.floats(k * n, 1.0), Element::Bf16, n));
    let (a, b) = (Factor::transposed(a.rows()), Factor::new(b.rows()));
    let len = products.workspace_len(a, b, Groups::One);
    assert!(len >= 2 * m * n, "{len}");
    let results = [len, len / 2, 0].map(|len| {
        let workspace = gpu.alloc::<f32>("", len).unwrap();
        let out = Stored::new(&gpu, &vec![0.0; m * n], Element::F32, n);
        products.compute(&stream, a, b, Groups::One, Write::Replace(out.rows()), Some(workspace.view())).unwrap();
        out.to_vec()
    });
    for result in &results {
        for (x, y) in result.iter().zip(&results[2]) {
            assert!((x - y).abs() < 1e-3, "{x} and {y}");
        }
    }
}

#[test]
#[should_panic(expected = "A [4, 8] times B [7, 8]")]
fn factors_that_do_not_fit_are_refused() {
    let gpu = gpu();
    let products = Products::new(&gpu, Arithmetic::F32, Matmul::Mma).unwrap();
    let [a, b, c] = [4, 7, 4].map(|n| Stored::new(&gpu, &vec![0.0; n * 8], Element::F32, 8));
    let stream = Stream::new(&gpu).unwrap();
    let (a, b) = (Factor::new(a.rows()), Factor::new(b.rows()));
    let _ = products.compute(&stream, a, b, Groups::One, Write::Replace(c.rows()), None);
}
