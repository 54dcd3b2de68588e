//! Batches made by a thread of their own, one step ahead: reading from a slow disk never holds up the training.

use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use super::{Batch, Batches, DataError};

/// What a step trains on.
type Made = Result<Vec<Batch>, DataError>;

/// A thread that makes the batches asked for.
pub struct Prefetch {
    /// For what is needed without having been asked for.
    batches: Batches,
    /// Of batch numbers; `None` once the thread is to end.
    requests: Option<Sender<Range<u64>>>,
    made: Receiver<Made>,
    asked: Option<Range<u64>>,
    thread: Option<JoinHandle<()>>,
}

fn make(batches: &mut Batches, numbers: Range<u64>) -> Made {
    numbers.map(|number| batches.batch_at(number)).collect()
}

impl Prefetch {
    /// Starts the thread. Where the system refuses one, batches are made when they are needed.
    pub fn new(batches: Batches) -> Self {
        let (requests, requested) = channel::<Range<u64>>();
        let (done, made) = channel();
        let mut of_thread = batches.clone();
        let work = move || {
            while let Ok(numbers) = requested.recv() {
                if done.send(make(&mut of_thread, numbers)).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("batches".into()).spawn(work).ok();
        Self { batches, requests: Some(requests), made, asked: None, thread }
    }

    /// The batches it is about.
    pub fn batches(&self) -> &Batches {
        &self.batches
    }

    /// Batches `numbers`, and begins with `next`.
    ///
    /// # Errors
    /// As [`Batches::batch_at`].
    pub fn take(&mut self, numbers: Range<u64>, next: Range<u64>) -> Made {
        let ahead = self.asked.take().and_then(|asked| self.made.recv().ok().filter(|_| asked == numbers));
        if let Some(requests) = &self.requests
            && requests.send(next.clone()).is_ok()
        {
            self.asked = Some(next);
        }
        ahead.unwrap_or_else(|| make(&mut self.batches, numbers))
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            // It cannot panic: making batches does not.
            let _ = thread.join();
        }
    }
}
