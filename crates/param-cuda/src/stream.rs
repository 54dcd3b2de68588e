//! Queues of work for the GPU, graphs that repeat a stretch of one at the cost of a single launch, and events that time it.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use std::cell::Cell;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use crate::error::{Named, Result};
use crate::gpu::Gpu;

/// Held while a stream records: the driver spoils the recording if another thread uses the default stream meanwhile.
static RECORDING: RwLock<()> = RwLock::new(());

thread_local! {
    static RECORDS: Cell<bool> = const { Cell::new(false) };
}

/// Waits until no other thread records. A thread that records itself is not stopped: the driver will refuse it.
pub(crate) fn not_recording() -> Option<RwLockReadGuard<'static, ()>> {
    (!RECORDS.get()).then(|| RECORDING.read().unwrap_or_else(PoisonError::into_inner))
}

/// A queue: what is given to it runs in order. Every stream of this crate waits for the default one and the other way round, so
/// that plain copies are in order with it.
#[derive(Debug)]
pub struct Stream {
    gpu: Arc<Gpu>,
    stream: sys::CUstream,
}

// SAFETY: the driver allows a stream to be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// The stream of plain copies.
    pub(crate) const DEFAULT: sys::CUstream = std::ptr::null_mut();

    /// A new queue.
    ///
    /// # Errors
    /// [`crate::Error::Call`].
    pub fn new(gpu: &Arc<Gpu>) -> Result<Stream> {
        gpu.bind()?;
        let stream = result::stream::create(result::stream::StreamKind::Default).named("cuStreamCreate")?;
        Ok(Stream { gpu: Arc::clone(gpu), stream })
    }

    /// The GPU it belongs to.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    pub(crate) fn raw(&self) -> sys::CUstream {
        self.stream
    }

    /// Waits until all of it has run.
    ///
    /// # Errors
    /// [`crate::Error::Call`]: a launch or a kernel that failed meanwhile.
    pub fn synchronize(&self) -> Result<()> {
        self.gpu.bind()?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.stream) }.named("cuStreamSynchronize")
    }

    /// Records what `queue` queues, without running it. Nothing may be allocated, freed or waited for meanwhile.
    ///
    /// # Errors
    /// [`crate::Error::Call`], and whatever `queue` fails with.
    pub fn capture(&self, queue: impl FnOnce(&Stream) -> Result<()>) -> Result<Graph> {
        let _alone = RECORDING.write().unwrap_or_else(PoisonError::into_inner);
        self.gpu.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives, and is not recording: that needs `&self` within `queue`, where the driver refuses it.
        unsafe { result::stream::begin_capture(self.stream, mode) }.named("cuStreamBeginCapture")?;
        RECORDS.set(true);
        let queued = queue(self);
        RECORDS.set(false);
        // SAFETY: it is recording. The graph is owned below.
        let graph = unsafe { result::stream::end_capture(self.stream) }.named("cuStreamEndCapture");
        queued?;
        let graph = graph?;
        let mut executable = std::ptr::null_mut();
        // SAFETY: a graph the driver just gave.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0) }
            .result()
            .named("cuGraphInstantiateWithFlags");
        // SAFETY: what can be launched does not need the graph it was made from.
        let _ = unsafe { result::graph::destroy(graph) };
        made.map(|()| Graph { gpu: Arc::clone(&self.gpu), graph: executable })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: created by `new`. The driver ends it once its work is done.
        let _ = self.gpu.bind().map(|()| unsafe { result::stream::destroy(self.stream) });
    }
}

/// A recorded stretch of work. What it uses must outlive its launches.
#[derive(Debug)]
pub struct Graph {
    gpu: Arc<Gpu>,
    graph: sys::CUgraphExec,
}

// SAFETY: launches are ordered by their stream.
unsafe impl Send for Graph {}

impl Graph {
    /// Queues it again.
    ///
    /// # Errors
    /// [`crate::Error::Call`].
    ///
    /// # Safety
    /// As for the launches it recorded: every buffer they were given must still live.
    pub unsafe fn launch(&self, stream: &Stream) -> Result<()> {
        self.gpu.bind()?;
        // SAFETY: both live; the rest is the caller's promise.
        unsafe { result::graph::launch(self.graph, stream.raw()) }.named("cuGraphLaunch")
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `Stream::capture`.
        let _ = self.gpu.bind().map(|()| unsafe { result::graph::exec_destroy(self.graph) });
    }
}

/// A point in a stream, for timing.
#[derive(Debug)]
pub struct Event {
    gpu: Arc<Gpu>,
    event: sys::CUevent,
}

// SAFETY: the driver allows an event to be used from any thread.
unsafe impl Send for Event {}

impl Event {
    /// Marks where `stream` is now.
    ///
    /// # Errors
    /// [`crate::Error::Call`].
    pub fn record(stream: &Stream) -> Result<Event> {
        stream.gpu.bind()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).named("cuEventCreate")?;
        let event = Event { gpu: Arc::clone(&stream.gpu), event };
        // SAFETY: both live.
        unsafe { result::event::record(event.event, stream.stream) }.named("cuEventRecord")?;
        Ok(event)
    }

    /// Waits until the GPU has passed it.
    ///
    /// # Errors
    /// [`crate::Error::Call`].
    pub fn synchronize(&self) -> Result<()> {
        self.gpu.bind()?;
        // SAFETY: it lives and was recorded.
        unsafe { result::event::synchronize(self.event) }.named("cuEventSynchronize")
    }

    /// Seconds from `earlier` to this one, once the GPU has passed both.
    ///
    /// # Errors
    /// [`crate::Error::Call`].
    pub fn seconds_since(&self, earlier: &Event) -> Result<f64> {
        self.synchronize()?;
        // SAFETY: both live and were recorded.
        let milliseconds = unsafe { result::event::elapsed(earlier.event, self.event) }.named("cuEventElapsedTime")?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `record`.
        let _ = self.gpu.bind().map(|()| unsafe { result::event::destroy(self.event) });
    }
}
