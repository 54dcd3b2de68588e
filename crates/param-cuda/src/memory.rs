//! Memory on the GPU, and pinned memory of the host that copies to and from it can run beside.

use std::marker::PhantomData;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::{result, sys};

use crate::error::{Named, Result};
use crate::gpu::Gpu;
use crate::stream::{Stream, not_recording};
use crate::training::View;

/// `len` elements in the GPU's memory; freed when dropped.
#[derive(Debug)]
pub struct Buffer<T> {
    gpu: Arc<Gpu>,
    address: sys::CUdeviceptr,
    len: usize,
    element: PhantomData<T>,
}

impl Gpu {
    /// `n` zeros. `what` names them where memory runs out.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::Call`].
    pub fn alloc<T: Pod>(self: &Arc<Self>, what: &'static str, n: usize) -> Result<Buffer<T>> {
        let _turn = not_recording();
        self.bind()?;
        let bytes = n.saturating_mul(size_of::<T>());
        // The driver refuses an allocation of nothing.
        // SAFETY: the context is current; whatever the memory holds is overwritten next.
        let address = unsafe { result::malloc_sync(bytes.max(1)) }
            .named("cuMemAlloc")
            .map_err(|error| self.refused(what, bytes, error))?;
        let buffer = Buffer { gpu: Arc::clone(self), address, len: n, element: PhantomData };
        // SAFETY: within the allocation. On the default stream, which this waits for.
        unsafe { result::memset_d8_async(address, 0, bytes, Stream::DEFAULT) }.named("cuMemsetD8Async")?;
        // SAFETY: the default stream always exists.
        unsafe { result::stream::synchronize(Stream::DEFAULT) }.named("cuStreamSynchronize")?;
        Ok(buffer)
    }

    /// A copy of `data`.
    ///
    /// # Errors
    /// As [`Gpu::alloc`].
    pub fn upload<T: Pod>(self: &Arc<Self>, what: &'static str, data: &[T]) -> Result<Buffer<T>> {
        let mut buffer = self.alloc(what, data.len())?;
        buffer.write(0, data)?;
        Ok(buffer)
    }

    /// `n` zeros in the host's memory that the GPU can reach while the host goes on.
    ///
    /// # Errors
    /// As [`Gpu::alloc`].
    pub fn pinned<T: Pod>(self: &Arc<Self>, what: &'static str, n: usize) -> Result<Pinned<T>> {
        let _turn = not_recording();
        self.bind()?;
        let bytes = n.saturating_mul(size_of::<T>());
        let mut address = std::ptr::null_mut();
        // SAFETY: a valid pointer to write to; a failure is an error below.
        unsafe { sys::cuMemAllocHost_v2(&raw mut address, bytes.max(1)) }
            .result()
            .named("cuMemAllocHost")
            .map_err(|error| self.refused(what, bytes, error))?;
        let address = address.cast::<T>();
        // SAFETY: freshly allocated, page-aligned, of this size.
        unsafe { address.write_bytes(0, n) };
        Ok(Pinned { gpu: Arc::clone(self), address, len: n })
    }
}

impl<T> Buffer<T> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it starts on the GPU.
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl<T: Pod> Buffer<T> {
    /// Copies `data` to the elements from `at` on, after what the GPU was given before.
    ///
    /// # Errors
    /// [`crate::Error::Call`].
    ///
    /// # Panics
    /// Beyond the end.
    pub fn write(&mut self, at: usize, data: &[T]) -> Result<()> {
        assert!(at <= self.len && data.len() <= self.len - at, "{} elements at {at} of {}", data.len(), self.len);
        let _turn = not_recording();
        self.gpu.bind()?;
        let address = self.address + (at * size_of::<T>()) as u64;
        // SAFETY: checked to lie inside; `data` outlives the copy, which is waited for.
        unsafe { result::memcpy_htod_async(address, data, Stream::DEFAULT) }.named("cuMemcpyHtoDAsync")?;
        // SAFETY: the default stream always exists.
        unsafe { result::stream::synchronize(Stream::DEFAULT) }.named("cuStreamSynchronize")
    }

    /// Copies the elements from `at` on into `out`, after what the GPU was given before.
    ///
    /// # Errors
    /// [`crate::Error::Call`]: also where a kernel that ran before has failed.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn read(&self, at: usize, out: &mut [T]) -> Result<()> {
        assert!(at <= self.len && out.len() <= self.len - at, "{} elements at {at} of {}", out.len(), self.len);
        let _turn = not_recording();
        self.gpu.bind()?;
        let address = self.address + (at * size_of::<T>()) as u64;
        // SAFETY: checked to lie inside; `out` outlives the copy, which is waited for.
        unsafe { result::memcpy_dtoh_async(out, address, Stream::DEFAULT) }.named("cuMemcpyDtoHAsync")?;
        // SAFETY: the default stream always exists.
        unsafe { result::stream::synchronize(Stream::DEFAULT) }.named("cuStreamSynchronize")
    }

    /// All of it.
    ///
    /// # Errors
    /// As [`Buffer::read`].
    pub fn to_vec(&self) -> Result<Vec<T>> {
        let mut out = vec![T::zeroed(); self.len];
        self.read(0, &mut out)?;
        Ok(out)
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        let _turn = not_recording();
        // SAFETY: allocated by `Gpu::alloc`; the driver waits for kernels that use it. Nothing can be done about a failure.
        let _ = self.gpu.bind().map(|()| unsafe { result::free_sync(self.address) });
    }
}

/// `len` elements of pinned memory on the host.
#[derive(Debug)]
pub struct Pinned<T> {
    gpu: Arc<Gpu>,
    address: *mut T,
    len: usize,
}

// SAFETY: it owns its memory as a `Vec` does.
unsafe impl<T: Send> Send for Pinned<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Pinned<T> {}

impl<T: Pod> Pinned<T> {
    /// Where it starts, for the GPU as well.
    pub fn address(&self) -> u64 {
        self.address as u64
    }

    /// Element `i`, which a kernel may be writing.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn get(&self, i: usize) -> T {
        assert!(i < self.len, "element {i} of {}", self.len);
        // SAFETY: inside; volatile, as the GPU writes behind the compiler's back.
        unsafe { self.address.add(i).read_volatile() }
    }

    /// Writes element `i`, which a kernel may read.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn set(&mut self, i: usize, value: T) {
        assert!(i < self.len, "element {i} of {}", self.len);
        // SAFETY: as above.
        unsafe { self.address.add(i).write_volatile(value) }
    }
}

impl<T> std::ops::Deref for Pinned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: allocated with this length and zeroed.
        unsafe { std::slice::from_raw_parts(self.address, self.len) }
    }
}

impl<T> std::ops::DerefMut for Pinned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.len) }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        let _turn = not_recording();
        // SAFETY: allocated by `Gpu::pinned`.
        let _ = self.gpu.bind().map(|()| unsafe { result::free_host(self.address.cast()) });
    }
}

impl<T: Pod> View<'_, T> {
    /// Copies its first elements into `out`, after what `gpu` was given before.
    ///
    /// # Errors
    /// [`crate::Error::Call`]: also where a kernel that ran before has failed.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn read(self, gpu: &Gpu, out: &mut [T]) -> Result<()> {
        assert!(out.len() <= self.len(), "{} elements of {}", out.len(), self.len());
        let _turn = not_recording();
        gpu.bind()?;
        // SAFETY: a view lies in a buffer that lives; `out` outlives the copy, which is waited for.
        unsafe { result::memcpy_dtoh_async(out, self.address(), Stream::DEFAULT) }.named("cuMemcpyDtoHAsync")?;
        // SAFETY: the default stream always exists.
        unsafe { result::stream::synchronize(Stream::DEFAULT) }.named("cuStreamSynchronize")
    }
}

impl Stream {
    /// Queues a copy of `from` to the beginning of `to`, which the caller reads once the stream has come that far.
    ///
    /// # Errors
    /// [`crate::Error::Call`].
    ///
    /// # Panics
    /// If there is too little room.
    ///
    /// # Safety
    /// Both must live, and `to` be left alone, until the stream has been waited for.
    pub unsafe fn read_later<T: Pod>(&self, from: View<T>, to: &mut Pinned<T>) -> Result<()> {
        let to = &mut to[..from.len()];
        self.gpu().bind()?;
        // SAFETY: a view lies in its buffer; lifetimes are the caller's promise.
        unsafe { result::memcpy_dtoh_async(to, from.address(), self.raw()) }.named("cuMemcpyDtoHAsync")
    }

    /// Queues a copy of `from`'s first elements to `to`, as many as that has.
    ///
    /// # Errors
    /// [`crate::Error::Call`].
    ///
    /// # Panics
    /// If `from` has fewer.
    ///
    /// # Safety
    /// Both must live, and `from` be left alone, until the stream has been waited for.
    pub unsafe fn write_later<T: Pod>(&self, from: &Pinned<T>, to: View<T>) -> Result<()> {
        let from = &from[..to.len()];
        self.gpu().bind()?;
        // SAFETY: a view lies in its buffer; lifetimes are the caller's promise.
        unsafe { result::memcpy_htod_async(to.address(), from, self.raw()) }.named("cuMemcpyHtoDAsync")
    }

    /// Queues zeroing all of `view`.
    ///
    /// # Errors
    /// [`crate::Error::Call`].
    pub fn zero<T: Pod>(&self, view: View<T>) -> Result<()> {
        if view.is_empty() {
            return Ok(());
        }
        self.gpu().bind()?;
        let bytes = view.len() * size_of::<T>();
        // SAFETY: a view lies in a buffer; freeing that waits for the GPU.
        unsafe { result::memset_d8_async(view.address(), 0, bytes, self.raw()) }.named("cuMemsetD8Async")
    }
}
