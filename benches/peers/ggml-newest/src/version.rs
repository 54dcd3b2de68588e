//! What this version of ggml does in its own way: weights repacked for the CPU, flash attention, a graph that serves many
//! tokens, threads that live as long as the engine.

use std::ffi::{c_char, c_int, c_void};
use std::ptr;

use gguf::GgmlType;
use half::f16;
pub use llama_cpp_sys_2 as sys;

use crate::attention::{Cache, PlainInputs, Span, causal_mask};
use crate::ops::{Context, Graph, Tensor};
use crate::weights::Reader;

pub const NAME: &str = "ggml newest";

#[derive(clap::Args)]
pub struct Options {
    /// Keep weights as they are in the file, instead of repacking them where ggml can
    #[arg(long)]
    plain: bool,
    /// Attend with plain operations, instead of the fused one
    #[arg(long)]
    no_flash_attn: bool,
}

impl Options {
    pub fn plain_attention(&self) -> bool {
        self.no_flash_attn
    }
}

/// The CPU.
pub struct Backend {
    backend: sys::ggml_backend_t,
    threads: sys::ggml_threadpool_t,
    /// Types of buffers that repack, each only some weights.
    repacking: Vec<sys::ggml_backend_buffer_type_t>,
}

impl Backend {
    pub fn new(n_thread: usize, options: &Options) -> Backend {
        // SAFETY: the parameters are filled by ggml; backend and threads live until `drop`; `discard` reads nothing.
        let (backend, threads) = unsafe {
            sys::ggml_log_set(Some(discard), ptr::null_mut());
            let mut params = sys::ggml_threadpool_params_default(n_thread as c_int);
            let threads = sys::ggml_threadpool_new(&mut params);
            let backend = sys::ggml_backend_cpu_init();
            sys::ggml_backend_cpu_set_n_threads(backend, n_thread as c_int);
            sys::ggml_backend_cpu_set_threadpool(backend, threads);
            (backend, threads)
        };
        let repacking = if options.plain { Vec::new() } else { repacking_buffer_types() };
        Backend { backend, threads, repacking }
    }

    pub fn host_buffer_type(&self) -> sys::ggml_backend_buffer_type_t {
        // SAFETY: it returns the address of a static.
        unsafe { sys::ggml_backend_cpu_buffer_type() }
    }

    /// The first repacking type that can hold a weight of this type and shape for its reader, else host memory.
    pub fn buffer_type(&self, ty: GgmlType, ne: &[i64], reader: Reader) -> sys::ggml_backend_buffer_type_t {
        let can_hold = |buffer_type: &&sys::ggml_backend_buffer_type_t| is_supported(**buffer_type, ty, ne, reader);
        self.repacking.iter().find(can_hold).copied().unwrap_or_else(|| self.host_buffer_type())
    }

    pub fn compute(&self, graph: Graph) -> bool {
        // SAFETY: backend and graph are alive, and every tensor of the graph has memory.
        unsafe { sys::ggml_backend_graph_compute(self.backend, graph.raw()) == sys::GGML_STATUS_SUCCESS }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // SAFETY: both are alive until here; the backend, which uses the threads, goes first.
        unsafe {
            sys::ggml_backend_free(self.backend);
            sys::ggml_threadpool_free(self.threads);
        }
    }
}

/// ggml logs every tensor that it repacks.
unsafe extern "C" fn discard(_: sys::ggml_log_level, _: *const c_char, _: *mut c_void) {}

fn cpu_device() -> sys::ggml_backend_dev_t {
    // SAFETY: the registry is built on first use, and its devices live as long as the process.
    unsafe { sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU) }
}

/// The CPU's extra buffer types, in ggml's order of preference.
fn repacking_buffer_types() -> Vec<sys::ggml_backend_buffer_type_t> {
    type ExtraBufferTypes = unsafe extern "C" fn(sys::ggml_backend_dev_t) -> *mut sys::ggml_backend_buffer_type_t;
    // SAFETY: the registry has this name for a function of this type (ggml_backend_dev_get_extra_bufts_t of
    // ggml-backend.h), or null. The list it returns is static and ends with null.
    unsafe {
        let device = cpu_device();
        let registry = sys::ggml_backend_dev_backend_reg(device);
        let address = sys::ggml_backend_reg_get_proc_address(registry, c"ggml_backend_dev_get_extra_bufts".as_ptr());
        if address.is_null() {
            return Vec::new();
        }
        let list = std::mem::transmute::<*mut c_void, ExtraBufferTypes>(address)(device);
        (0..).map(|i| *list.add(i)).take_while(|ty| !ty.is_null()).collect()
    }
}

/// Whether the CPU runs the reader's operation on such a weight from such a buffer: asked as llama.cpp asks, on a
/// product with 512 tokens.
fn is_supported(buffer_type: sys::ggml_backend_buffer_type_t, ty: GgmlType, ne: &[i64], reader: Reader) -> bool {
    const N_TOKEN: i64 = 512;
    let ctx = Context::new(8);
    let weight = ctx.tensor(ty, ne);
    let product = match reader {
        Reader::Other => return false,
        Reader::MulMat => ctx.mul_mat(weight, ctx.tensor(GgmlType::F32, &[ne[0], N_TOKEN])),
        Reader::MulMatId => {
            let (x, ids) = (ctx.tensor(GgmlType::F32, &[ne[0], 1, N_TOKEN]), ctx.tensor(GgmlType::I32, &[1, N_TOKEN]));
            ctx.mul_mat_id(weight, x, ids)
        }
    };
    // SAFETY: the tensors are alive; the buffer of no bytes only says what type of buffer the weight would be in.
    unsafe {
        let buffer = sys::ggml_backend_buft_alloc_buffer(buffer_type, 0);
        (*weight.raw()).buffer = buffer;
        let supported = sys::ggml_backend_dev_supports_op(cpu_device(), product.raw());
        sys::ggml_backend_buffer_free(buffer);
        supported
    }
}

pub fn isa() -> String {
    // SAFETY: these return constants.
    let flags = unsafe {
        [
            ("avx2", sys::ggml_cpu_has_avx2()),
            ("avx512", sys::ggml_cpu_has_avx512()),
            ("vnni", sys::ggml_cpu_has_avx512_vnni()),
            ("bf16", sys::ggml_cpu_has_avx512_bf16()),
        ]
    };
    flags.iter().filter(|(_, has)| *has != 0).map(|(name, _)| *name).collect::<Vec<_>>().join(" ")
}

/// Positions that attention looks at are a multiple of this. With llama.cpp's step a graph serves 256 tokens; masked
/// positions cost little, since the fused operation skips them.
pub fn n_kv_step(plain_attention: bool) -> i64 {
    if plain_attention { PlainInputs::N_KV_STEP } else { 256 }
}

/// Whether a graph built for one span computes another.
pub fn can_reuse(built: Span, wanted: Span, plain_attention: bool) -> bool {
    !plain_attention && (built.n_token, built.n_kv) == (wanted.n_token, wanted.n_kv)
}

pub fn attention_inputs(ctx: &Context, span: Span, plain_attention: bool) -> AttentionInputs {
    if plain_attention {
        return AttentionInputs::Plain(PlainInputs::new(ctx, span));
    }
    let mask = ctx.tensor(GgmlType::F16, &[span.n_kv, span.n_token]).input();
    let rows = ctx.tensor(GgmlType::I64, &[span.n_token]).input();
    AttentionInputs::Flash { span, mask, rows }
}

/// What attention reads besides the cache.
pub enum AttentionInputs {
    Flash {
        span: Span,
        mask: Tensor, // f16 [n_kv, n_token]
        rows: Tensor, // i64 [n_token]: where keys and values go
    },
    Plain(PlainInputs),
}

impl AttentionInputs {
    pub fn fill(&self, now: Span) {
        match self {
            AttentionInputs::Plain(plain) => plain.fill(now),
            AttentionInputs::Flash { mask, rows, .. } => {
                mask.set(&causal_mask(now, f16::ZERO, f16::NEG_INFINITY));
                rows.set(&(now.n_past..now.n_past + now.n_token).collect::<Vec<i64>>());
            }
        }
    }

    /// Stores keys and values, each f32 [n_embd, n_token], and attends: [n_embd, n_token].
    pub fn attend(&self, ctx: &Context, graph: Graph, cache: &Cache, block: usize, qkv: [Tensor; 3]) -> Tensor {
        let (span, mask, rows) = match self {
            AttentionInputs::Plain(plain) => return plain.attend(ctx, graph, cache, block, qkv),
            AttentionInputs::Flash { span, mask, rows } => (span, mask, rows),
        };
        let [q, k, v] = qkv;
        let (k_cache, v_cache, n_head) = (cache.k[block], cache.v[block], cache.n_head);
        let (n_embd, row) = (k_cache.ne(0), k_cache.nb(1));
        graph.expand(set_rows(ctx, k_cache, k, *rows));
        graph.expand(set_rows(ctx, v_cache, v, *rows));
        let heads = |cache| ctx.split_heads(ctx.view_2d(cache, n_embd, span.n_kv, row, 0), n_head); // [head_dim, n_kv, n_head]
        let (q, keys, values) = (ctx.split_heads(q, n_head), heads(k_cache), heads(v_cache));
        let scale = 1.0 / ((n_embd / n_head) as f32).sqrt();
        // SAFETY: the context and the tensors are alive.
        let attended = Tensor::new(unsafe {
            let mask = mask.raw();
            sys::ggml_flash_attn_ext(ctx.raw(), q.raw(), keys.raw(), values.raw(), mask, scale, 0.0, 0.0)
        }); // [head_dim, n_head, n_token]
        ctx.reshape_2d(attended, n_embd, span.n_token)
    }
}

/// Writes row `i` of `from` over row `rows[i]` of `to`.
fn set_rows(ctx: &Context, to: Tensor, from: Tensor, rows: Tensor) -> Tensor {
    // SAFETY: the context and the tensors are alive.
    Tensor::new(unsafe { sys::ggml_set_rows(ctx.raw(), to.raw(), from.raw(), rows.raw()) })
}

/// softmax(x · scale + mask) over rows.
pub fn masked_soft_max(ctx: &Context, x: Tensor, mask: Tensor, scale: f32) -> Tensor {
    // SAFETY: the context and the tensors are alive.
    Tensor::new(unsafe { sys::ggml_soft_max_ext(ctx.raw(), x.raw(), mask.raw(), scale, 0.0) })
}

/// Indices of the `k` largest of each row, largest first.
pub fn top_k(ctx: &Context, x: Tensor, k: i64) -> Tensor {
    // SAFETY: the context and the tensor are alive.
    Tensor::new(unsafe { sys::ggml_argsort_top_k(ctx.raw(), x.raw(), k as c_int) })
}

/// The exact GELU.
pub fn gelu_erf(ctx: &Context, x: Tensor) -> Tensor {
    // SAFETY: the context and the tensor are alive.
    Tensor::new(unsafe { sys::ggml_gelu_erf(ctx.raw(), x.raw()) })
}

/// x + bias[chosen]: x is [n, n_used, n_token], bias [n, n_expert], chosen [n_used, n_token].
pub fn add_chosen(ctx: &Context, x: Tensor, bias: Tensor, chosen: Tensor) -> Tensor {
    // SAFETY: the context and the tensors are alive.
    Tensor::new(unsafe { sys::ggml_add_id(ctx.raw(), x.raw(), bias.raw(), chosen.raw()) })
}
