//! What the library is asked for, from the emulated one, beside the kernels that stand in for it.

use proptest::prelude::*;

use super::super::product::{Matmul, Products};
use super::super::testing::{Random, Stored, gpu, rounded};
use super::*;
use crate::training::Dropped;

/// The library, where there is one: a real GPU's machine may lack it.
fn open(arithmetic: Arithmetic) -> Option<CublasLt> {
    param_cuda_emulation::preload_cublaslt();
    let library = CublasLt::open(&gpu(), arithmetic).unwrap();
    assert!(library.is_some() || param_cuda_emulation::is_real(), "the emulated library was not found");
    library
}

/// Factors of a product [m, n] over k.
struct Factors {
    a: Stored,
    b: Stored,
    transposed: [bool; 2],
}

impl Factors {
    fn new(element: Element, (m, n, k): (usize, usize, usize), transposed: [bool; 2]) -> Self {
        let (gpu, random) = (gpu(), &mut Random::new((m * n + k) as u64));
        let mut stored = |n_row, n_col, turned| {
            let (n_row, n_col) = if turned { (n_col, n_row) } else { (n_row, n_col) };
            Stored::new(&gpu, &rounded(&random.floats(n_row * n_col, 1.0), element), element, n_col)
        };
        Self { a: stored(m, k, transposed[0]), b: stored(k, n, transposed[1]), transposed }
    }

    fn both(&self) -> (Factor<'_>, Factor<'_>) {
        let [a, b] = self.transposed;
        (Factor { transposed: a, ..Factor::new(self.a.rows()) }, Factor { transposed: b, ..Factor::new(self.b.rows()) })
    }
}

fn check(arithmetic: Arithmetic, (m, n, k): (usize, usize, usize), transposed: [bool; 2], out: Element, adds: bool) {
    let Some(library) = open(arithmetic) else { return };
    let (gpu, stream) = (gpu(), Stream::new(&gpu()).unwrap());
    let factors = Factors::new(arithmetic.element(), (m, n, k), transposed);
    let out = if adds { Element::F32 } else { out };
    let before = rounded(&Random::new(7).floats(m * n, 2.0), out);
    let ours = Products::new(&gpu, arithmetic, Matmul::Mma).unwrap();
    let workspace = gpu.alloc::<f32>("", 1000).unwrap();
    let run = |by_library: bool| {
        let stored = Stored::new(&gpu, &before, out, n);
        let write = if adds { Write::Add(stored.rows()) } else { Write::Replace(stored.rows()) };
        let (a, b) = factors.both();
        if by_library {
            // As passes are: recorded, then played.
            let graph = stream.capture(|stream| {
                let queued = library.compute(stream, (a, b), Groups::One, write, Some(workspace.view()))?;
                assert_eq!(queued, k.is_multiple_of(8) || param_cuda_emulation::is_real(), "k = {k}");
                if queued { Ok(()) } else { ours.compute(stream, a, b, Groups::One, write, None) }
            });
            // SAFETY: all that was recorded lives until the stream was waited for.
            unsafe { graph.unwrap().launch(&stream) }.unwrap();
        } else {
            ours.compute(&stream, a, b, Groups::One, write, None).unwrap();
        }
        stream.synchronize().unwrap();
        stored.to_vec()
    };
    // Sums in another order, and of what is stored in bf16 its last bit.
    let last = if out == Element::Bf16 { 2f32.powi(-8) } else { 0.0 };
    for (got, want) in run(true).into_iter().zip(run(false)) {
        assert!((got - want).abs() <= last * want.abs() + 2e-6 * k as f32, "{got} for {want}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn dense_products_are_the_kernels(
        tf32: bool, m in 1_usize..70, n in 1_usize..70, eighths in 1_usize..9, rest in 0_usize..2,
        transposed: [bool; 2], narrow: bool, adds: bool,
    ) {
        let arithmetic = if tf32 { Arithmetic::Tf32 } else { Arithmetic::Bf16 };
        let out = if narrow { Element::Bf16 } else { Element::F32 };
        check(arithmetic, (m, n, eighths * 8 + rest), transposed, out, adds);
    }
}

#[test]
fn what_is_not_a_plain_dense_product_is_left_to_the_kernels() {
    let Some(library) = open(Arithmetic::Bf16) else { return };
    let (gpu, stream) = (gpu(), Stream::new(&gpu()).unwrap());
    let (m, n, k) = (16, 8, 24);
    let factors = Factors::new(Element::Bf16, (m, n, k), [false, false]);
    let (a, b) = factors.both();
    let out = Stored::new(&gpu, &vec![0.0; m * n], Element::F32, n);
    let (out, bias) = (out.rows(), gpu.upload("", &vec![1.0_f32; n]).unwrap());
    let bits = gpu.upload("", &[0_u32; 16]).unwrap();
    let gather = gpu.upload("", &(0..m as u32).collect::<Vec<_>>()).unwrap();
    let starts = gpu.upload("", &[0, m as u32]).unwrap();
    let rows = Groups::Rows { starts: starts.view(), n: 1 };
    let (bias, dropout) = (Some(bias.view()), Some(Dropped { bits: bits.view(), scale: 2.0 }));
    let replace = Write::Replace(out);
    for (what, a, groups, write, takes) in [
        ("a plain one", a, Groups::One, replace, true),
        ("without a bias", a, Groups::One, Write::Biased { out, bias: None, dropout: None }, true),
        ("with a bias", a, Groups::One, Write::Biased { out, bias, dropout: None }, false),
        ("with dropout", a, Groups::One, Write::Biased { out, bias: None, dropout }, false),
        ("a residual", a, Groups::One, Write::Residual { out, residual: out, bias: None, dropout: None }, false),
        ("gathered", a.gathered(gather.view()), Groups::One, replace, false),
        ("in groups", a, rows, replace, false),
    ] {
        let queued = library.compute(&stream, (a, b), groups, write, None).unwrap();
        assert_eq!(queued, takes, "{what}");
    }
    stream.synchronize().unwrap();
}

#[test]
fn exact_products_are_not_the_librarys() {
    param_cuda_emulation::preload_cublaslt();
    assert!(CublasLt::open(&gpu(), Arithmetic::F32).unwrap().is_none());
}
