//! Kernels out of embedded PTX, and their launches.

use std::ffi::{CString, c_void};
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::{result, sys};

use crate::error::{Named, Result};
use crate::gpu::Gpu;
use crate::memory::Buffer;
use crate::stream::Stream;

/// PTX compiled for the GPU.
#[derive(Debug)]
pub struct Module {
    gpu: Arc<Gpu>,
    module: sys::CUmodule,
}

// SAFETY: the driver allows a module to be used from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Lets the driver compile `ptx`, which it remembers from one start of a program to the next.
    ///
    /// # Errors
    /// [`crate::Error::Call`].
    pub fn load(gpu: &Arc<Gpu>, ptx: &str) -> Result<Arc<Module>> {
        gpu.bind()?;
        let text = CString::new(ptx).unwrap_or_default();
        // SAFETY: text that ends with a zero, as PTX is to be given.
        let module = unsafe { result::module::load_data(text.as_ptr().cast()) }.named("cuModuleLoadData")?;
        Ok(Arc::new(Module { gpu: Arc::clone(gpu), module }))
    }

    /// The kernel of that name.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    pub fn kernel(self: &Arc<Self>, name: &'static str) -> Result<Kernel> {
        self.gpu.bind()?;
        let symbol = CString::new(name).unwrap_or_default();
        // SAFETY: the module lives as long as the kernel, which holds it.
        let function = unsafe { result::module::get_function(self.module, symbol) }
            .named("cuModuleGetFunction")
            .map_err(|error| error.in_kernel(name))?;
        Ok(Kernel { module: Arc::clone(self), function, name })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded by `load`; its kernels are gone.
        let _ = self.gpu.bind().map(|()| unsafe { result::module::unload(self.module) });
    }
}

/// Something to launch.
#[derive(Clone, Debug)]
pub struct Kernel {
    module: Arc<Module>,
    function: sys::CUfunction,
    name: &'static str,
}

// SAFETY: the driver allows a function to be used from any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// How many blocks of how many threads, and the bytes of dynamic shared memory of each.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct Grid {
    pub blocks: [u32; 3],
    pub threads: u32,
    pub shared: u32,
}

/// An argument of a kernel: a number, a buffer's address, or a structure by value.
#[derive(Clone, Debug)]
pub struct Arg(Vec<u64>);

impl Arg {
    /// A value as it lies in memory.
    pub fn value<T: Pod>(value: T) -> Arg {
        let mut words = vec![0u64; size_of::<T>().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut words)[..size_of::<T>()].copy_from_slice(bytemuck::bytes_of(&value));
        Arg(words)
    }
}

/// What [`args!`] turns into an argument.
pub trait IntoArg {
    /// The argument.
    fn arg(&self) -> Arg;
}

impl<T> IntoArg for Buffer<T> {
    fn arg(&self) -> Arg {
        Arg(vec![self.address()])
    }
}

macro_rules! numbers {
    ($($ty:ty),*) => {$(
        impl IntoArg for $ty {
            fn arg(&self) -> Arg {
                Arg::value(*self)
            }
        }
    )*};
}
numbers!(u32, i32, u64, f32, f64);

/// Arguments of a launch: numbers and addresses by value, [`Buffer`]s by address; anything else through [`Arg::value`].
#[macro_export]
macro_rules! args {
    ($($value:expr),* $(,)?) => { [$($crate::IntoArg::arg(&$value)),*] };
}

impl IntoArg for Arg {
    fn arg(&self) -> Arg {
        self.clone()
    }
}

impl Kernel {
    /// Allows blocks `bytes` of dynamic shared memory, beyond the 48 KiB that need no permission.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`]: more than the GPU has.
    pub fn allow_shared(&self, bytes: u32) -> Result<()> {
        self.module.gpu.bind()?;
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function lives.
        unsafe { result::function::set_function_attribute(self.function, attribute, bytes as i32) }
            .named("cuFuncSetAttribute")
            .map_err(|error| error.in_kernel(self.name))
    }

    /// Blocks of that size that a multiprocessor runs at once.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    pub fn blocks_per_multiprocessor(&self, threads: u32, shared: u32) -> Result<usize> {
        self.module.gpu.bind()?;
        // SAFETY: the function lives.
        unsafe {
            result::occupancy::max_active_block_per_multiprocessor(self.function, threads as i32, shared as usize)
        }
        .named("cuOccupancyMaxActiveBlocksPerMultiprocessor")
        .map(|n| n as usize)
        .map_err(|error| error.in_kernel(self.name))
    }

    /// Queues the kernel.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Safety
    /// `args` must be those of the kernel, in order and type, every address valid for what the kernel does with it until it has run.
    pub unsafe fn launch(&self, stream: &Stream, grid: Grid, args: &[Arg]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.start(stream, grid, args, false) }
    }

    /// The same, with all blocks at work at once, so that they can wait for each other.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`]: also more blocks than can be at work.
    ///
    /// # Safety
    /// As [`Kernel::launch`].
    pub unsafe fn launch_cooperative(&self, stream: &Stream, grid: Grid, args: &[Arg]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.start(stream, grid, args, true) }
    }

    unsafe fn start(&self, stream: &Stream, grid: Grid, args: &[Arg], cooperative: bool) -> Result<()> {
        self.module.gpu.bind()?;
        let mut pointers: Vec<*mut c_void> = args.iter().map(|arg| arg.0.as_ptr().cast_mut().cast()).collect();
        let [x, y, z] = grid.blocks;
        let (blocks, threads) = ((x, y, z), (grid.threads, 1, 1));
        let (function, stream, pointers) = (self.function, stream.raw(), &mut pointers);
        // SAFETY: the driver copies the arguments before it returns; the rest is the caller's promise.
        let launched = unsafe {
            if cooperative {
                result::launch_cooperative_kernel(function, blocks, threads, grid.shared, stream, pointers)
                    .named("cuLaunchCooperativeKernel")
            } else {
                result::launch_kernel(function, blocks, threads, grid.shared, stream, pointers).named("cuLaunchKernel")
            }
        };
        launched.map_err(|error| error.in_kernel(self.name))
    }
}
