//! A thin face on ggml, the same for both versions: contexts, tensors and the operations of a graph.
//! Shapes stand in ggml's order, fastest first.

use std::ffi::{c_int, c_void};
use std::ptr::NonNull;

use gguf::GgmlType;

use crate::version::sys;

/// A tensor of some [`Context`]. It must not be used after that context is gone: the engine that owns both sees to it.
#[derive(Clone, Copy, Debug)]
pub struct Tensor(NonNull<sys::ggml_tensor>);

impl Tensor {
    /// # Panics
    /// On null, which ggml returns only where a context has no room left.
    pub fn new(raw: *mut sys::ggml_tensor) -> Tensor {
        Tensor(NonNull::new(raw).expect("room in the ggml context"))
    }

    pub fn raw(self) -> *mut sys::ggml_tensor {
        self.0.as_ptr()
    }

    /// Elements along dimension `i`.
    pub fn ne(self, i: usize) -> i64 {
        // SAFETY: the tensor's context is alive, and no other reference into it exists.
        unsafe { (*self.raw()).ne[i] }
    }

    /// Bytes from one element to the next along dimension `i`.
    pub fn nb(self, i: usize) -> usize {
        // SAFETY: as in `ne`.
        unsafe { (*self.raw()).nb[i] }
    }

    /// Bytes of one element; the types of views are never quantized.
    fn element_size(self) -> usize {
        // SAFETY: as in `ne`.
        unsafe { sys::ggml_element_size(self.raw()) as usize }
    }

    /// Marks it as written from outside before the graph runs.
    pub fn input(self) -> Tensor {
        // SAFETY: as in `ne`.
        unsafe { sys::ggml_set_input(self.raw()) };
        self
    }

    /// Keeps its memory from being reused within the graph.
    pub fn output(self) -> Tensor {
        // SAFETY: as in `ne`.
        unsafe { sys::ggml_set_output(self.raw()) };
        self
    }

    /// Copies `data`, all of the tensor's bytes, into its buffer (which repacks it where it is a buffer for that).
    pub fn set<T: Copy>(self, data: &[T]) {
        // SAFETY: as in `ne`.
        let n_bytes = unsafe { sys::ggml_nbytes(self.raw()) } as usize;
        assert_eq!(size_of_val(data), n_bytes, "bytes for a tensor");
        // SAFETY: the tensor has been given a buffer, and `data` is as long as the tensor.
        unsafe { sys::ggml_backend_tensor_set(self.raw(), data.as_ptr().cast(), 0, n_bytes) };
    }

    /// The contents of an f32 tensor in host memory.
    pub fn as_f32(&self) -> &[f32] {
        // SAFETY: ggml asserts the type; the graph that wrote the tensor has run, and the buffer outlives the borrow.
        unsafe {
            let n = sys::ggml_nelements(self.raw()) as usize;
            std::slice::from_raw_parts(sys::ggml_get_data_f32(self.raw()), n)
        }
    }
}

impl From<Tensor> for *mut sys::ggml_tensor {
    fn from(tensor: Tensor) -> Self {
        tensor.raw()
    }
}

/// Alignment that ggml asks of a context's memory.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code)] [u8; 64]);

/// Memory that describes tensors and graphs; their data lives in buffers.
pub struct Context {
    raw: NonNull<sys::ggml_context>,
    memory: Vec<Line>,
}

impl Context {
    /// Room for `n_tensor` tensors and a graph of as many nodes.
    pub fn new(n_tensor: usize) -> Context {
        // SAFETY: both only compute a size.
        let n_bytes = unsafe {
            sys::ggml_tensor_overhead() as usize * n_tensor + sys::ggml_graph_overhead_custom(n_tensor, false) as usize
        };
        Context::init(vec![Line([0; 64]); n_bytes.div_ceil(size_of::<Line>())])
    }

    fn init(mut memory: Vec<Line>) -> Context {
        let params = sys::ggml_init_params {
            mem_size: size_of_val(&memory[..]),
            mem_buffer: memory.as_mut_ptr().cast(),
            no_alloc: true,
        };
        // SAFETY: the memory is aligned, as long as said, and owned by the context that is returned.
        let raw = unsafe { sys::ggml_init(params) };
        Context { raw: NonNull::new(raw).expect("a ggml context"), memory }
    }

    /// The same memory with nothing in it.
    pub fn reset(mut self) -> Context {
        Context::init(std::mem::take(&mut self.memory))
    }

    pub fn raw(&self) -> *mut sys::ggml_context {
        self.raw.as_ptr()
    }

    /// A tensor of shape `ne`, without data.
    pub fn tensor(&self, ty: GgmlType, ne: &[i64]) -> Tensor {
        // SAFETY: the context is alive, `ne` has as many dimensions as said; type ids are those of GGUF files.
        Tensor::new(unsafe { sys::ggml_new_tensor(self.raw(), ty.id(), ne.len() as c_int, ne.as_ptr()) })
    }

    /// An empty graph of up to `n_node` nodes.
    pub fn graph(&self, n_node: usize) -> Graph {
        // SAFETY: the context is alive and has room: `new` took it into account.
        Graph(NonNull::new(unsafe { sys::ggml_new_graph_custom(self.raw(), n_node, false) }).expect("room for a graph"))
    }

    /// [n_embd, n] as [n_embd / n_head, n, n_head], without copying: heads take contiguous slices.
    pub fn split_heads(&self, x: Tensor, n_head: i64) -> Tensor {
        let (head_dim, size) = (x.ne(0) / n_head, x.element_size());
        self.view_3d(x, head_dim, x.ne(1), n_head, x.nb(1), head_dim as usize * size, 0)
    }

    /// x + bias where there is one.
    pub fn add_bias(&self, x: Tensor, bias: Option<Tensor>) -> Tensor {
        bias.map_or(x, |bias| self.add(x, bias))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context is alive until here. Its memory is ours, and freed after it.
        unsafe { sys::ggml_free(self.raw()) };
    }
}

/// Operations with the same signature in both versions.
macro_rules! operations {
    ($($name:ident($($arg:ident: $ty:ty),*) = $ffi:ident;)*) => {
        impl Context {$(
            pub fn $name(&self, $($arg: $ty),*) -> Tensor {
                // SAFETY: the context and the tensors' contexts are alive. ggml ends the process where shapes do not fit.
                Tensor::new(unsafe { sys::$ffi(self.raw(), $($arg.into()),*) })
            }
        )*}
    };
}

operations! {
    add(a: Tensor, b: Tensor) = ggml_add;
    mul(a: Tensor, b: Tensor) = ggml_mul;
    norm(x: Tensor, eps: f32) = ggml_norm;
    mul_mat(weight: Tensor, x: Tensor) = ggml_mul_mat;
    mul_mat_id(weights: Tensor, x: Tensor, ids: Tensor) = ggml_mul_mat_id;
    get_rows(x: Tensor, ids: Tensor) = ggml_get_rows;
    gelu(x: Tensor) = ggml_gelu;
    soft_max(x: Tensor) = ggml_soft_max;
    cpy(from: Tensor, to: Tensor) = ggml_cpy;
    transpose(x: Tensor) = ggml_transpose;
    permute(x: Tensor, a: c_int, b: c_int, c: c_int, d: c_int) = ggml_permute;
    cont_2d(x: Tensor, a: i64, b: i64) = ggml_cont_2d;
    reshape_2d(x: Tensor, a: i64, b: i64) = ggml_reshape_2d;
    reshape_3d(x: Tensor, a: i64, b: i64, c: i64) = ggml_reshape_3d;
    view_2d(x: Tensor, a: i64, b: i64, nb1: usize, offset: usize) = ggml_view_2d;
    view_3d(x: Tensor, a: i64, b: i64, c: i64, nb1: usize, nb2: usize, offset: usize) = ggml_view_3d;
}

/// Nodes in the order in which they are computed.
#[derive(Clone, Copy, Debug)]
pub struct Graph(NonNull<sys::ggml_cgraph>);

impl Graph {
    pub fn raw(self) -> *mut sys::ggml_cgraph {
        self.0.as_ptr()
    }

    /// Adds a tensor and whatever it is computed from, unless they are in already.
    pub fn expand(self, tensor: Tensor) {
        // SAFETY: the contexts of graph and tensor are alive, and the graph has room for every node of its context.
        unsafe { sys::ggml_build_forward_expand(self.raw(), tensor.raw()) };
    }
}

/// Memory for tensors' data.
pub struct Buffer(NonNull<c_void>);

impl Buffer {
    /// Gives every tensor of `context` memory of a type, all in one buffer; `None` where there are none.
    pub fn for_tensors(context: &Context, ty: sys::ggml_backend_buffer_type_t) -> Option<Buffer> {
        // SAFETY: the context is alive and its tensors have no data yet.
        NonNull::new(unsafe { sys::ggml_backend_alloc_ctx_tensors_from_buft(context.raw(), ty) }.cast()).map(Buffer)
    }

    /// Sets every byte to zero.
    pub fn clear(&self) {
        // SAFETY: the buffer is alive.
        unsafe { sys::ggml_backend_buffer_clear(self.0.as_ptr().cast(), 0) };
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the buffer is alive until here; whoever owns it owns the tensors in it.
        unsafe { sys::ggml_backend_buffer_free(self.0.as_ptr().cast()) };
    }
}

/// Memory for a graph's intermediate results, reused as soon as no later node reads them.
pub struct Allocator(NonNull<c_void>);

impl Allocator {
    pub fn new(ty: sys::ggml_backend_buffer_type_t) -> Allocator {
        // SAFETY: the buffer type is one of ggml's statics.
        Allocator(NonNull::new(unsafe { sys::ggml_gallocr_new(ty) }.cast()).expect("a ggml allocator"))
    }

    /// Gives every node memory, in place of the graph before.
    pub fn allocate(&mut self, graph: Graph) -> bool {
        // SAFETY: allocator and graph are alive.
        unsafe { sys::ggml_gallocr_alloc_graph(self.0.as_ptr().cast(), graph.raw()) }
    }
}

impl Drop for Allocator {
    fn drop(&mut self) {
        // SAFETY: the allocator is alive until here.
        unsafe { sys::ggml_gallocr_free(self.0.as_ptr().cast()) };
    }
}
