//! What this version of ggml does in its own way: threads are started for every graph, attention is plain, and the exact
//! GELU and biases by expert, which it lacks, are custom operations.

use std::ffi::{c_int, c_void};
use std::ptr;

use gguf::GgmlType;

use crate::attention::{PlainInputs, Span};
use crate::ops::{Context, Graph, Tensor};
use crate::weights::Reader;

/// Bindings: the crate's own cover ggml.h, while what ggml-alloc.h and ggml-backend.h declare is only linked.
#[allow(non_camel_case_types)] // ggml's names
pub mod sys {
    use std::ffi::{c_int, c_void};

    pub use ggml_sys_bleedingedge::*;

    pub type ggml_backend_t = *mut c_void;
    pub type ggml_backend_buffer_t = *mut c_void;
    pub type ggml_backend_buffer_type_t = *mut c_void;
    pub type ggml_gallocr_t = *mut c_void;

    // SAFETY: as declared in the headers of the version that Cargo.toml pins. GGML_CALL is empty outside of CUDA.
    unsafe extern "C" {
        pub fn ggml_gallocr_new(ty: ggml_backend_buffer_type_t) -> ggml_gallocr_t;
        pub fn ggml_gallocr_free(allocator: ggml_gallocr_t);
        pub fn ggml_gallocr_alloc_graph(allocator: ggml_gallocr_t, graph: *mut ggml_cgraph) -> bool;
        pub fn ggml_backend_alloc_ctx_tensors_from_buft(
            ctx: *mut ggml_context,
            ty: ggml_backend_buffer_type_t,
        ) -> ggml_backend_buffer_t;
        pub fn ggml_backend_buffer_free(buffer: ggml_backend_buffer_t);
        pub fn ggml_backend_buffer_clear(buffer: ggml_backend_buffer_t, value: u8);
        pub fn ggml_backend_tensor_set(tensor: *mut ggml_tensor, data: *const c_void, offset: usize, size: usize);
        pub fn ggml_backend_cpu_buffer_type() -> ggml_backend_buffer_type_t;
        pub fn ggml_backend_cpu_init() -> ggml_backend_t;
        pub fn ggml_backend_cpu_set_n_threads(backend: ggml_backend_t, n_threads: c_int);
        pub fn ggml_backend_graph_compute(backend: ggml_backend_t, graph: *mut ggml_cgraph) -> c_int;
        pub fn ggml_backend_free(backend: ggml_backend_t);
        pub fn erff(x: f32) -> f32;
    }
}

pub const NAME: &str = "ggml b2757";
pub type AttentionInputs = PlainInputs;

/// This version has nothing to choose.
#[derive(clap::Args)]
pub struct Options {}

impl Options {
    pub fn plain_attention(&self) -> bool {
        true
    }
}

/// Positions that attention looks at are a multiple of this.
pub fn n_kv_step(_plain_attention: bool) -> i64 {
    PlainInputs::N_KV_STEP
}

/// Where keys and values go is fixed in a graph, so every token has its own.
pub fn can_reuse(_built: Span, _wanted: Span, _plain_attention: bool) -> bool {
    false
}

pub fn attention_inputs(ctx: &Context, span: Span, _plain_attention: bool) -> AttentionInputs {
    PlainInputs::new(ctx, span)
}

/// The CPU.
pub struct Backend(sys::ggml_backend_t);

impl Backend {
    pub fn new(n_thread: usize, _: &Options) -> Backend {
        // SAFETY: the backend is alive; the number of threads is positive and fits.
        unsafe {
            let backend = sys::ggml_backend_cpu_init();
            sys::ggml_backend_cpu_set_n_threads(backend, n_thread as c_int);
            Backend(backend)
        }
    }

    pub fn host_buffer_type(&self) -> sys::ggml_backend_buffer_type_t {
        // SAFETY: it returns the address of a static.
        unsafe { sys::ggml_backend_cpu_buffer_type() }
    }

    pub fn buffer_type(&self, _: GgmlType, _: &[i64], _: Reader) -> sys::ggml_backend_buffer_type_t {
        self.host_buffer_type()
    }

    pub fn compute(&self, graph: Graph) -> bool {
        // SAFETY: backend and graph are alive, and every tensor of the graph has memory.
        unsafe { sys::ggml_backend_graph_compute(self.0, graph.raw()) == sys::ggml_status_GGML_STATUS_SUCCESS as c_int }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // SAFETY: the backend is alive until here.
        unsafe { sys::ggml_backend_free(self.0) };
    }
}

pub fn isa() -> String {
    // SAFETY: these return constants.
    let flags = unsafe {
        [
            ("avx2", sys::ggml_cpu_has_avx2()),
            ("avx512", sys::ggml_cpu_has_avx512()),
            ("vnni", sys::ggml_cpu_has_avx512_vnni()),
        ]
    };
    flags.iter().filter(|(_, has)| *has != 0).map(|(name, _)| *name).collect::<Vec<_>>().join(" ")
}

/// softmax(x · scale + mask) over rows.
pub fn masked_soft_max(ctx: &Context, x: Tensor, mask: Tensor, scale: f32) -> Tensor {
    // SAFETY: the context and the tensors are alive; positions, which ALiBi alone reads, may be null.
    Tensor::new(unsafe { sys::ggml_soft_max_ext(ctx.raw(), x.raw(), mask.raw(), ptr::null_mut(), scale, 0.0) })
}

/// Indices of the `k` largest of each row, largest first.
pub fn top_k(ctx: &Context, x: Tensor, k: i64) -> Tensor {
    // SAFETY: the context and the tensor are alive.
    Tensor::new(unsafe { sys::ggml_top_k(ctx.raw(), x.raw(), k as c_int) })
}

/// The exact GELU, in place.
pub fn gelu_erf(ctx: &Context, x: Tensor) -> Tensor {
    // SAFETY: the context and the tensor are alive; `gelu_rows` expects what `ggml_map_custom1` passes.
    Tensor::new(unsafe {
        sys::ggml_map_custom1_inplace(ctx.raw(), x.raw(), Some(gelu_rows), sys::GGML_N_TASKS_MAX, ptr::null_mut())
    })
}

/// x + bias[chosen]: x is [n, n_used, n_token], bias [n, n_expert], chosen [n_used, n_token]; in place.
pub fn add_chosen(ctx: &Context, x: Tensor, bias: Tensor, chosen: Tensor) -> Tensor {
    let (x, bias, chosen) = (x.raw(), bias.raw(), chosen.raw());
    // SAFETY: the context and the tensors are alive; `add_rows` expects what `ggml_map_custom3` passes.
    Tensor::new(unsafe {
        let all = sys::GGML_N_TASKS_MAX;
        sys::ggml_map_custom3_inplace(ctx.raw(), x, bias, chosen, Some(add_rows), all, ptr::null_mut())
    })
}

/// The rows of `x`, contiguous f32, that thread `ith` of `nth` takes: row numbers with their elements.
///
/// # Safety
/// `x` has memory, and no two threads pass the same `ith`.
unsafe fn share<'a>(x: *mut sys::ggml_tensor, ith: c_int, nth: c_int) -> impl Iterator<Item = (usize, &'a mut [f32])> {
    // SAFETY: the tensor is alive while the graph runs.
    let (ne, data) = unsafe { ((*x).ne, (*x).data.cast::<f32>()) };
    let n = ne[0] as usize;
    let n_row = (ne[1] * ne[2]) as usize;
    let (ith, nth) = (ith as usize, nth as usize);
    let rows = n_row * ith / nth..n_row * (ith + 1) / nth;
    // SAFETY: rows are within the tensor, and each is in the share of one thread.
    rows.map(move |row| (row, unsafe { std::slice::from_raw_parts_mut(data.add(row * n), n) }))
}

/// 0.5 x (1 + erf(x / √2)) with the C library's erff, as ggml has computed it since.
unsafe extern "C" fn gelu_rows(
    dst: *mut sys::ggml_tensor,
    _: *const sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    _: *mut c_void,
) {
    // SAFETY: ggml calls this once for each `ith` below `nth`, with `dst` in memory.
    for (_, row) in unsafe { share(dst, ith, nth) } {
        for x in row {
            // SAFETY: erff is defined for every number.
            *x *= 0.5 * (1.0 + unsafe { sys::erff(*x * std::f32::consts::FRAC_1_SQRT_2) });
        }
    }
}

/// Adds to each row of `dst` the row of `bias` that `chosen` names for it.
unsafe extern "C" fn add_rows(
    dst: *mut sys::ggml_tensor,
    _: *const sys::ggml_tensor,
    bias: *const sys::ggml_tensor,
    chosen: *const sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    _: *mut c_void,
) {
    // SAFETY: ggml calls this once for each `ith` below `nth`, with `dst` in memory.
    for (row, x) in unsafe { share(dst, ith, nth) } {
        // SAFETY: `chosen` has an index below bias's number of rows for each row of `dst`; its own rows may lie apart,
        // since it is a view of the sorted indices. `bias` is contiguous f32.
        let bias = unsafe {
            let n_used = (*chosen).ne[0] as usize;
            let at = (*chosen).data.cast::<u8>().add(row / n_used * (*chosen).nb[1] + row % n_used * (*chosen).nb[0]);
            let expert = at.cast::<i32>().read() as usize;
            std::slice::from_raw_parts((*bias).data.cast::<f32>().add(expert * x.len()), x.len())
        };
        for (x, bias) in x.iter_mut().zip(bias) {
            *x += bias;
        }
    }
}
