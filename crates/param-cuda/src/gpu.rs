//! Opening a GPU, in the order in which nothing can panic: library, its version and symbols, device, context.

use std::ffi::c_int;
use std::sync::Arc;

use cudarc::driver::result::{self, ctx, device, primary_ctx};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use crate::error::{Error, Named, NoGpu, Result};

/// CUDA 12.0: the driver's interface that is used, and the newest PTX in the kernels.
const DRIVER_VERSION: i32 = 12_000;
/// bf16 products and asynchronous copies begin with it.
const CAPABILITY: (i32, i32) = (8, 0);

/// Whatever is called, so that an older driver is refused here and not by a panic later.
const SYMBOLS: [&str; 42] = [
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventElapsedTime",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuInit",
    "cuLaunchCooperativeKernel",
    "cuLaunchKernel",
    "cuMemAllocHost_v2",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuOccupancyMaxActiveBlocksPerMultiprocessor",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamSynchronize",
];

/// An open GPU: the first one the driver lists. Shared by all that allocates or runs on it.
#[derive(Debug)]
pub struct Gpu {
    device: sys::CUdevice,
    context: sys::CUcontext,
    name: String,
    capability: (i32, i32),
    n_multiprocessor: usize,
    max_shared: usize,
}

// SAFETY: a context may be used from any thread that has made it current, which `bind` does before every call.
unsafe impl Send for Gpu {}
// SAFETY: as above; the driver locks what threads share.
unsafe impl Sync for Gpu {}

/// Opens the first GPU, or says why there is none to use. Never panics, whatever is missing.
///
/// # Errors
/// [`NoGpu`]: no driver, one too old, no device, a device too old, or one that cannot be opened.
pub fn open() -> std::result::Result<Arc<Gpu>, NoGpu> {
    // SAFETY: loading the driver runs its initialisers, as in every program that uses it.
    if !unsafe { sys::is_culib_present() } {
        return Err(NoGpu::NoDriver);
    }
    // SAFETY: the library is there, so this cannot panic.
    let library = unsafe { sys::culib() };
    for symbol in SYMBOLS {
        // SAFETY: the address is looked up and not used.
        if unsafe { library.get::<*const ()>(symbol.as_bytes()) }.is_err() {
            return Err(NoGpu::MissingSymbol { symbol });
        }
    }
    let mut version: c_int = 0;
    // SAFETY: a valid pointer to write to.
    let asked = unsafe { sys::cuDriverGetVersion(&raw mut version) }.result();
    if asked.is_ok() && version < DRIVER_VERSION {
        return Err(NoGpu::OldDriver { version, needed: DRIVER_VERSION });
    }
    match result::init() {
        Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => return Err(NoGpu::NoDevice),
        other => usable(other.named("cuInit"))?,
    }
    if usable(device::get_count().named("cuDeviceGetCount"))? == 0 {
        return Err(NoGpu::NoDevice);
    }
    let device = usable(device::get(0).named("cuDeviceGet"))?;
    let name = usable(device::get_name(device).named("cuDeviceGetName"))?;
    let attribute = |attribute| {
        // SAFETY: `device` came from the driver.
        usable(unsafe { device::get_attribute(device, attribute) }.named("cuDeviceGetAttribute"))
    };
    let capability = (
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    if capability < CAPABILITY {
        return Err(NoGpu::OldDevice { name, capability, needed: CAPABILITY });
    }
    let n_multiprocessor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
    let max_shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize;
    // SAFETY: `device` came from the driver; the context is released when the last owner of the `Gpu` goes.
    let context = usable(unsafe { primary_ctx::retain(device) }.named("cuDevicePrimaryCtxRetain"))?;
    Ok(Arc::new(Gpu { device, context, name, capability, n_multiprocessor, max_shared }))
}

fn usable<T>(result: Result<T>) -> std::result::Result<T, NoGpu> {
    result.map_err(|error| NoGpu::Unusable(error.to_string()))
}

impl Gpu {
    /// What the driver calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Compute capability, such as (9, 0).
    pub fn capability(&self) -> (i32, i32) {
        self.capability
    }

    /// Multiprocessors, each of which runs blocks on its own.
    pub fn n_multiprocessor(&self) -> usize {
        self.n_multiprocessor
    }

    /// Bytes of shared memory that one block can have.
    pub fn max_shared(&self) -> usize {
        self.max_shared
    }

    /// Multiplications and additions a second of its tensor cores at their highest clock, in bf16 with sums in f32; 0 for a kind that is
    /// not known.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn peak_bf16(&self) -> Result<f64> {
        // A clock and multiprocessor, of what NVIDIA publishes for each kind.
        let per_clock = match self.capability {
            (8, 0) => 2048.0,
            (8, _) => 1024.0,
            (9, _) => 4096.0,
            (10, _) => 8192.0,
            _ => 0.0,
        };
        self.bind()?;
        let attribute = Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE;
        // SAFETY: `device` came from the driver.
        let kilohertz = unsafe { device::get_attribute(self.device, attribute) }.named("cuDeviceGetAttribute")?;
        Ok(per_clock * self.n_multiprocessor as f64 * f64::from(kilohertz) * 1e3)
    }

    /// Bytes of memory that are free, and that there are.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.bind()?;
        result::mem_get_info().named("cuMemGetInfo")
    }

    /// Makes the context current on this thread, as every call needs.
    pub(crate) fn bind(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        unsafe { ctx::set_current(self.context) }.named("cuCtxSetCurrent")
    }

    /// A refused allocation as the error that says what was asked for.
    pub(crate) fn refused(&self, what: &'static str, bytes: usize, error: Error) -> Error {
        match (&error, self.memory()) {
            (Error::Call { name, .. }, Ok((free, total))) if name == "CUDA_ERROR_OUT_OF_MEMORY" => {
                Error::OutOfMemory { what, bytes, free, total }
            }
            _ => error,
        }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: retained once by `open`; everything that used it held the `Arc` that is going. A failure leaves it to the driver.
        let _ = unsafe { primary_ctx::release(self.device) };
    }
}
