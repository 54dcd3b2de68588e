//! Dense products by NVIDIA's cuBLASLt, where its library is found: it is loaded when asked for, and nothing is built against it.
//!
//! The library's matrices are stored by columns: what lies by rows is their transpose, so that of `C = A B` it is asked for
//! `C^T = B^T A^T`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CStr, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::product::{Arithmetic, Factor, Groups, Shape, Write};
use super::view::{Element, Rows, View};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::stream::Stream;

#[cfg(test)]
mod tests;

/// The first whose calls are as they are declared here: 12.0.
const OLDEST: usize = 120_000;
/// What is called, by names that are looked up before: a missing one would be a panic later.
const SYMBOLS: [&str; 14] = [
    "cublasLtGetVersion",
    "cublasLtGetStatusString",
    "cublasLtCreate",
    "cublasLtDestroy",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatmulDescDestroy",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatrixLayoutDestroy",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtMatmulPreferenceDestroy",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmul",
];
/// Of `cublasOperation_t`.
const AS_IT_IS: i32 = 0;
const TRANSPOSED: i32 = 1;
/// What the library takes an address to be a multiple of at most.
const ALIGNMENT: u64 = 256;

/// The version of cuBLASLt that is found: 120304 is 12.3.4.
pub fn cublaslt_version() -> Option<usize> {
    // SAFETY: the library is there, and may be asked at any time.
    is_found().then(|| unsafe { sys::cublasLtGetVersion() })
}

/// Whether there is a library that can be used.
fn is_found() -> bool {
    // SAFETY: the library's constructors run, as in every program that uses it.
    if !unsafe { sys::is_culib_present() } {
        return false;
    }
    // SAFETY: the library is there, so this cannot panic.
    let library = unsafe { sys::culib() };
    // SAFETY: the addresses are looked up and not used.
    let has = |symbol: &&str| unsafe { library.get::<*const ()>(symbol.as_bytes()) }.is_ok();
    // SAFETY: it may be asked for its version at any time.
    SYMBOLS.iter().all(has) && unsafe { sys::cublasLtGetVersion() } >= OLDEST
}

trait Named<T> {
    fn named(self, call: &'static str) -> Result<T>;
}

impl<T> Named<T> for std::result::Result<T, CublasError> {
    fn named(self, call: &'static str) -> Result<T> {
        self.map_err(|CublasError(status)| {
            // SAFETY: the library has been loaded, and the text is its own.
            let text = unsafe { CStr::from_ptr(sys::cublasLtGetStatusString(status)) };
            Error::Call { call, name: format!("{status:?}"), text: text.to_string_lossy().into_owned() }
        })
    }
}

/// A description that the library made, with what it gives it back by.
struct Description<T> {
    raw: *mut T,
    destroy: unsafe fn(*mut T) -> std::result::Result<(), CublasError>,
}

impl<T> Drop for Description<T> {
    fn drop(&mut self) {
        // SAFETY: made by the library and destroyed once. There is nothing to do about a failure.
        let _ = unsafe { (self.destroy)(self.raw) };
    }
}

type Layout = Description<sys::cublasLtMatrixLayoutOpaque_t>;
type Operation = Description<sys::cublasLtMatmulDescOpaque_t>;

/// A matrix as the library sees it: by columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Matrix {
    n_row: u64,
    n_col: u64,
    /// Elements from one column to the next.
    stride: i64,
    element: sys::cudaDataType,
    transposed: bool,
    alignment: u32,
}

impl Matrix {
    /// Of what lies by rows at `rows`.
    fn new(rows: Rows, transposed: bool) -> Self {
        let element = match rows.element() {
            Element::F32 => sys::cudaDataType_t::CUDA_R_32F,
            Element::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
        };
        let alignment = 1 << (rows.address() | ALIGNMENT).trailing_zeros();
        let (n_row, n_col) = (rows.n_col() as u64, rows.n_row() as u64);
        Self { n_row, n_col, stride: rows.stride() as i64, element, transposed, alignment }
    }

    fn layout(self) -> Result<Layout> {
        let raw = result::create_matrix_layout(self.element, self.n_row, self.n_col, self.stride);
        Ok(Layout { raw: raw.named("cublasLtMatrixLayoutCreate")?, destroy: result::destroy_matrix_layout })
    }
}

/// What the library chooses a kernel by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    /// Left and right factor, and the result.
    matrices: [Matrix; 3],
    n_workspace_byte: usize,
}

/// A product with the kernel that the library chose for it.
struct Planned {
    operation: Operation,
    layouts: [Layout; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// The library, open on a GPU.
pub(super) struct CublasLt {
    gpu: Arc<Gpu>,
    handle: sys::cublasLtHandle_t,
    arithmetic: sys::cublasComputeType_t,
    /// Of all products so far; `None` of those it has no kernel for.
    planned: Mutex<HashMap<Key, Option<Planned>>>,
}

// SAFETY: the library allows handles and descriptions to be used from any thread, and the table of them is locked.
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Sync for CublasLt {}

impl std::fmt::Debug for CublasLt {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("CublasLt").field("arithmetic", &self.arithmetic).finish_non_exhaustive()
    }
}

impl CublasLt {
    /// The library for products in `arithmetic`; `None` where it is not found, is too old, or has nothing of that kind.
    ///
    /// # Errors
    /// The library's own.
    pub(super) fn open(gpu: &Arc<Gpu>, arithmetic: Arithmetic) -> Result<Option<Self>> {
        let arithmetic = match arithmetic {
            Arithmetic::F32 => return Ok(None),
            Arithmetic::Tf32 => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            Arithmetic::Bf16 => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        if !is_found() {
            return Ok(None);
        }
        gpu.bind()?;
        let handle = result::create_handle().named("cublasLtCreate")?;
        Ok(Some(Self { gpu: Arc::clone(gpu), handle, arithmetic, planned: Mutex::default() }))
    }

    /// Queues `C = A B` or `C += A B`, if that is all that is to be done and the library has a kernel for it; whether it is queued.
    ///
    /// # Errors
    /// The library's own.
    ///
    /// # Panics
    /// Where shapes do not fit each other.
    pub(super) fn compute(
        &self,
        stream: &Stream,
        (a, b): (Factor, Factor),
        groups: Groups,
        write: Write,
        workspace: Option<View<f32>>,
    ) -> Result<bool> {
        let (out, adds) = match write {
            Write::Replace(out) | Write::Biased { out, bias: None, dropout: None } => (out, false),
            Write::Add(out) => (out, true),
            _ => return Ok(false),
        };
        if !matches!(groups, Groups::One) || a.gather.is_some() {
            return Ok(false);
        }
        let shape = Shape::new(&a, &b, groups);
        assert_eq!((out.n_row(), out.n_col()), (shape.m, shape.n), "shape of the output");
        if shape.m == 0 || shape.n == 0 || shape.k == 0 {
            return Ok(false);
        }
        let matrices = [Matrix::new(b.rows, b.transposed), Matrix::new(a.rows, a.transposed), Matrix::new(out, false)];
        let (workspace, n_workspace_byte) = workspace.map_or((0, 0), |w| (w.address(), w.len() * size_of::<f32>()));
        let key = Key { matrices, n_workspace_byte };
        self.gpu.bind()?;
        let mut planned = self.planned.lock().unwrap_or_else(PoisonError::into_inner);
        let planned = match planned.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(self.plan(key)?),
        };
        let Some(Planned { operation, layouts: [left, right, result], algorithm }) = planned else {
            return Ok(false);
        };
        let pointer = |address: u64| address as *mut c_void;
        let (one, beta) = (1.0_f32, if adds { 1.0_f32 } else { 0.0 });
        // SAFETY: the descriptions are those of the matrices, whose bounds were checked where they were made; the workspace is as
        // large as the kernel was chosen for, and what lies in it is nobody else's while the stream runs this; the factors of sums are
        // read before the call returns.
        unsafe {
            result::matmul(
                self.handle,
                operation.raw,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                pointer(b.rows.address()),
                left.raw,
                pointer(a.rows.address()),
                right.raw,
                pointer(out.address()),
                result.raw,
                pointer(out.address()),
                result.raw,
                algorithm,
                pointer(workspace),
                n_workspace_byte,
                stream.raw().cast(),
            )
        }
        .named("cublasLtMatmul")?;
        Ok(true)
    }

    /// The kernel that the library finds best for a product, if it has any.
    fn plan(&self, key: Key) -> Result<Option<Planned>> {
        use sys::cublasLtMatmulDescAttributes_t as Of;
        use sys::cublasLtMatmulPreferenceAttributes_t as Preferred;
        let [left, right, out] = key.matrices;
        let operation = result::create_matmul_desc(self.arithmetic, sys::cudaDataType_t::CUDA_R_32F);
        let operation =
            Operation { raw: operation.named("cublasLtMatmulDescCreate")?, destroy: result::destroy_matmul_desc };
        for (attribute, matrix) in [(Of::CUBLASLT_MATMUL_DESC_TRANSA, left), (Of::CUBLASLT_MATMUL_DESC_TRANSB, right)] {
            let turned = if matrix.transposed { TRANSPOSED } else { AS_IT_IS };
            // SAFETY: the attribute has this type, and is read before the call returns.
            unsafe {
                result::set_matmul_desc_attribute(
                    operation.raw,
                    attribute,
                    (&raw const turned).cast(),
                    size_of_val(&turned),
                )
            }
            .named("cublasLtMatmulDescSetAttribute")?;
        }
        let layouts = [left.layout()?, right.layout()?, out.layout()?];
        let preference = result::create_matmul_pref().named("cublasLtMatmulPreferenceCreate")?;
        let preference = Description { raw: preference, destroy: result::destroy_matmul_pref };
        let prefer = |attribute, value: &[u8]| {
            // SAFETY: as above.
            unsafe { result::set_matmul_pref_attribute(preference.raw, attribute, value.as_ptr().cast(), value.len()) }
                .named("cublasLtMatmulPreferenceSetAttribute")
        };
        let n_byte = (key.n_workspace_byte as u64).to_ne_bytes();
        prefer(Preferred::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &n_byte)?;
        for (attribute, matrix) in [
            (Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, left),
            (Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, right),
            (Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out),
            (Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out),
        ] {
            prefer(attribute, &matrix.alignment.to_ne_bytes())?;
        }
        // SAFETY: all of them were made above, and live.
        let found = unsafe {
            result::get_matmul_algo_heuristic(
                self.handle,
                operation.raw,
                layouts[0].raw,
                layouts[1].raw,
                layouts[2].raw,
                layouts[2].raw,
                preference.raw,
            )
        };
        match found {
            Ok(found) => Ok(Some(Planned { operation, layouts, algorithm: found.algo })),
            Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => Ok(None),
            Err(error) => Err(error).named("cublasLtMatmulAlgoGetHeuristic"),
        }
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        self.planned.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
        // SAFETY: made by the library and destroyed once, after all that was made from it.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
