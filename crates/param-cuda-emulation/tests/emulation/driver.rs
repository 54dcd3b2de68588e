//! The driver API of one built library, called without cudarc: several variants can be loaded beside each other.

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use param_cuda_emulation::{Schedule, build_variant};
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::ptr::null_mut;

pub const TIMEOUT: i32 = 702;
pub const TOO_LARGE: i32 = 720;

pub type Launch = unsafe extern "C" fn(
    *mut c_void,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    *mut c_void,
    *mut *mut c_void,
    *mut *mut c_void,
) -> c_int;

pub struct Driver {
    pub loaded: Library,
    module: *mut c_void,
}

pub fn kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulation/kernels.cu")
}

/// The tests' kernels with `from` replaced by `to`, which must occur.
pub fn variant(from: &str, to: &str) -> Driver {
    Driver::load(&build_variant(
        kernels(),
        |text| {
            assert!(text.contains(from), "no `{from}`");
            text.replace(from, to)
        },
        false,
    ))
}

impl Driver {
    pub fn load(path: &Path) -> Driver {
        // SAFETY: the library's constructors only fill tables.
        let loaded = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.unwrap_or_else(|e| panic!("{e}"));
        let mut driver = Driver { loaded, module: null_mut() };
        driver.enter();
        let image = c"// emulation";
        // SAFETY: cuModuleLoadData(CUmodule*, const void*)
        let code = unsafe {
            let f = driver.get::<unsafe extern "C" fn(*mut *mut c_void, *const c_char) -> c_int>("cuModuleLoadData");
            f(&mut driver.module, image.as_ptr())
        };
        assert_eq!(code, 0);
        driver
    }

    /// Makes the context the calling thread's.
    pub fn enter(&self) {
        let mut context = null_mut();
        // SAFETY: the types are the driver API's.
        unsafe {
            assert_eq!(self.get::<unsafe extern "C" fn(c_uint) -> c_int>("cuInit")(0), 0);
            let retain = self.get::<unsafe extern "C" fn(*mut *mut c_void, c_int) -> c_int>("cuDevicePrimaryCtxRetain");
            assert_eq!(retain(&mut context, 0), 0);
            assert_eq!(self.get::<unsafe extern "C" fn(*mut c_void) -> c_int>("cuCtxSetCurrent")(context), 0);
        }
    }

    /// # Safety
    /// `F` must be the function's type.
    pub unsafe fn get<F: Copy>(&self, name: &str) -> F {
        // SAFETY: the caller's promise.
        unsafe { *self.loaded.get::<F>(name.as_bytes()).unwrap_or_else(|e| panic!("{e}")) }
    }

    pub fn schedule(&self, schedule: Schedule) {
        let text = CString::new(schedule.to_string()).unwrap();
        // SAFETY: the library defines it with this type.
        let done = unsafe {
            self.get::<unsafe extern "C" fn(*const c_char) -> c_int>("param_emulation_schedule")(text.as_ptr())
        };
        assert_ne!(done, 0);
    }

    pub fn last_fault(&self) -> String {
        // SAFETY: the library defines it with this type.
        unsafe {
            let p = self.get::<unsafe extern "C" fn() -> *const c_char>("param_emulation_last_fault")();
            CStr::from_ptr(p).to_string_lossy().into_owned()
        }
    }

    pub fn alloc(&self, n: usize) -> u64 {
        let mut p = 0u64;
        // SAFETY: cuMemAlloc_v2(CUdeviceptr*, size_t)
        let code = unsafe { self.get::<unsafe extern "C" fn(*mut u64, usize) -> c_int>("cuMemAlloc_v2")(&mut p, n) };
        assert_eq!(code, 0, "cuMemAlloc_v2 of {n} bytes");
        p
    }

    pub fn free(&self, p: u64) -> i32 {
        // SAFETY: cuMemFree_v2(CUdeviceptr)
        unsafe { self.get::<unsafe extern "C" fn(u64) -> c_int>("cuMemFree_v2")(p) }
    }

    pub fn upload<T: Copy>(&self, data: &[T]) -> u64 {
        let p = self.alloc(size_of_val(data));
        assert_eq!(self.write(p, data), 0);
        p
    }

    pub fn write<T: Copy>(&self, p: u64, data: &[T]) -> i32 {
        // SAFETY: cuMemcpyHtoD_v2(CUdeviceptr, const void*, size_t), from a slice of that size.
        unsafe {
            let f = self.get::<unsafe extern "C" fn(u64, *const c_void, usize) -> c_int>("cuMemcpyHtoD_v2");
            f(p, data.as_ptr().cast(), size_of_val(data))
        }
    }

    pub fn read<T: Copy + Default>(&self, p: u64, n: usize) -> Vec<T> {
        let mut out = vec![T::default(); n];
        // SAFETY: cuMemcpyDtoH_v2(void*, CUdeviceptr, size_t), to a vector of that size of plain numbers.
        let code = unsafe {
            let f = self.get::<unsafe extern "C" fn(*mut c_void, u64, usize) -> c_int>("cuMemcpyDtoH_v2");
            f(out.as_mut_ptr().cast(), p, n * size_of::<T>())
        };
        assert_eq!(code, 0);
        out
    }

    pub fn function(&self, name: &str) -> *mut c_void {
        let (mut f, c) = (null_mut(), CString::new(name).unwrap());
        // SAFETY: cuModuleGetFunction(CUfunction*, CUmodule, const char*)
        let code = unsafe {
            let get = self.get::<unsafe extern "C" fn(*mut *mut c_void, *mut c_void, *const c_char) -> c_int>(
                "cuModuleGetFunction",
            );
            get(&mut f, self.module, c.as_ptr())
        };
        assert_eq!(code, 0, "no kernel {name}");
        f
    }

    /// `arguments` are the bytes of each.
    pub fn launch(
        &self,
        name: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        stream: *mut c_void,
        arguments: &[&[u8]],
    ) -> i32 {
        self.launch_as("cuLaunchKernel", name, grid, block, shared, stream, arguments)
    }

    pub fn launch_cooperative(
        &self,
        name: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        arguments: &[&[u8]],
    ) -> i32 {
        self.launch_as("cuLaunchCooperativeKernel", name, grid, block, shared, null_mut(), arguments)
    }

    fn launch_as(
        &self,
        call: &str,
        name: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        stream: *mut c_void,
        arguments: &[&[u8]],
    ) -> i32 {
        let function = self.function(name);
        let mut list: Vec<*mut c_void> = arguments.iter().map(|a| a.as_ptr().cast_mut().cast()).collect();
        // SAFETY: cuLaunchKernel's arguments; the cooperative call takes one less, which a caller of C may pass. The tests give each kernel
        // the arguments that it declares.
        unsafe {
            let f = self.get::<Launch>(call);
            let ([gx, gy, gz], [bx, by, bz]) = (grid, block);
            f(function, gx, gy, gz, bx, by, bz, shared, stream, list.as_mut_ptr(), null_mut())
        }
    }
}

/// The bytes of a number.
pub trait Bytes {
    fn bytes(self) -> Vec<u8>;
}
macro_rules! bytes {
    ($($t:ty)*) => { $(impl Bytes for $t { fn bytes(self) -> Vec<u8> { self.to_ne_bytes().to_vec() } })* };
}
bytes!(u8 i32 u32 u64 f32 f64);

/// `args![p, n]`: what a launch takes.
#[macro_export]
macro_rules! args {
    ($($e:expr),*) => { &[$(&$crate::driver::Bytes::bytes($e)[..]),*] };
}
