//! The executor: threads that stay and run one step after another together with the caller. Between steps they spin for
//! tens of microseconds, then sleep; a hot step costs no thread creation, no allocation and no system call.

use std::any::Any;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread without work spins before it sleeps: longer than the serial work between two steps, shorter than a
/// scheduler's time slice.
const SPIN: Duration = Duration::from_micros(50);

/// How much longer than the caller's own part of a step a worker may take before it counts as not running: beyond any task.
const LATE: Duration = Duration::from_micros(300);
/// Time for which a worker that was not running sits out steps, at first and at most: each time it is late again, twice as long. No more
/// than some of a scheduler's time slices, since a thread that wakes for a moment makes a worker late as well as one that stays.
const SIT_OUT: Range<Duration> = Duration::from_millis(2)..Duration::from_millis(64);
/// The longest that steps are taken to be apart: what is longer is a pause of the caller's.
const PAUSE: Duration = Duration::from_millis(100);

/// CPUs this process may run on: the sensible size of a [`Team`].
pub fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// A step's closure with its lifetime erased; it is valid while the step is open or a worker is inside it.
type Job = *const (dyn Fn(usize) + Sync);

/// Shares of different threads must not meet in one cache line (128: lines are fetched in pairs).
#[repr(align(128))]
struct Share {
    next: AtomicUsize,
}

/// What the caller knows of a worker.
#[derive(Default)]
struct Record {
    inside: AtomicBool,
    /// The first step it may take part in again.
    from: AtomicU64,
}

struct Shared {
    /// Epoch of the step in the upper half; below it the number of workers inside; bit 0 says whether more may enter.
    state: AtomicU64,
    /// Written by the caller only while the step is closed and nobody is inside.
    job: UnsafeCell<Option<Job>>,
    shares: Box<[Share]>,      // [n_thread]
    asleep: Box<[AtomicBool]>, // [n_thread - 1]
    records: Box<[Record]>,    // [n_thread - 1]
    quit: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

const OPEN: u64 = 1;
const INSIDE: u64 = 2;
const EPOCH: u64 = 1 << 32;

// SAFETY: `job` is the only part that is not Sync by itself. It is written by the one caller (`&mut Team`) while `state` is
// closed with nobody inside, and read by workers only after entering an open step, which `state` orders after the write.
unsafe impl Sync for Shared {}
// SAFETY: the erased closure is Sync, so a pointer to it may be used from any thread.
unsafe impl Send for Shared {}

/// A fixed group of threads that run steps together; the caller is rank 0 and works too. A worker that the operating system
/// does not run is not waited for: the others take its share of the step. One that stops in the middle of a task must be waited
/// for, and sits out the steps that follow, so that a CPU taken by another process does not halt the rest again and again.
///
/// A panic inside a step reaches the caller once every thread has left the step, and leaves the team usable.
/// Dropping the team ends its threads.
pub struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// What each worker sat out when it was last late.
    rests: Vec<Rest>, // [n_thread - 1]
    /// When the last step began, and the mean time from one to the next.
    last: Option<Instant>,
    pace: Duration,
}

/// What a late worker sits out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Rest {
    time: Duration,
    n_step: u64,
}

impl Team {
    /// A team of `n_thread` threads, the calling one included; 0 counts as 1. More than [`available_threads`] is slower, never
    /// wrong. If the system refuses a thread, the team is smaller.
    pub fn new(n_thread: usize) -> Team {
        let n_thread = n_thread.max(1);
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            shares: (0..n_thread).map(|_| Share { next: AtomicUsize::new(0) }).collect(),
            asleep: (1..n_thread).map(|_| AtomicBool::new(false)).collect(),
            records: (1..n_thread).map(|_| Record::default()).collect(),
            quit: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let start = |rank: usize| {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name(format!("team-{rank}")).spawn(move || work(&shared, rank))
        };
        let workers = (1..n_thread).map_while(|rank| start(rank).ok()).collect();
        Team { shared, workers, rests: vec![Rest::default(); n_thread - 1], last: None, pace: Duration::ZERO }
    }

    /// Threads in the team, the caller included.
    pub fn n_thread(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `f(rank, task)` once for every task in `0..n_task`, in no particular order. Each rank starts in its own contiguous
    /// share, so that it reads its own stretch of the weights, and then helps the others.
    pub fn for_each(&mut self, n_task: usize, f: impl Fn(usize, usize) + Sync) {
        let n_thread = self.n_thread();
        if n_thread == 1 || n_task <= 1 {
            return (0..n_task).for_each(|task| f(0, task));
        }
        let end = |rank: usize| (rank + 1) * n_task / n_thread;
        for rank in 0..n_thread {
            self.shared.shares[rank].next.store(rank * n_task / n_thread, Ordering::Relaxed);
        }
        let shares = &*Arc::clone(&self.shared);
        self.run(&|rank| {
            for victim in (rank..n_thread).chain(0..rank) {
                loop {
                    let task = shares.shares[victim].next.fetch_add(1, Ordering::Relaxed);
                    if task >= end(victim) {
                        break;
                    }
                    f(rank, task);
                }
            }
        });
    }

    /// Cuts `out` into chunks of `chunk_len` (the last may be shorter) and runs `f(chunk_index, chunk)` for each.
    ///
    /// # Panics
    /// If `chunk_len` is 0.
    pub fn for_each_chunk<T: Send>(&mut self, out: &mut [T], chunk_len: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        assert!(chunk_len > 0, "chunks of no elements");
        let n_chunk = out.len().div_ceil(chunk_len);
        let out = Disjoint::new(out);
        self.for_each(n_chunk, |_, chunk| {
            // SAFETY: chunks do not overlap and `for_each` runs each index once.
            f(chunk, unsafe { out.chunk(chunk, chunk_len) });
        });
    }

    /// Like [`Team::for_each_chunk`] over three slices at once, each cut into chunks of its own length, in as many as there are of
    /// `a`: `f(chunk_index, chunk of a, chunk of b, chunk of c)`. A chunk of a slice that has ended is empty.
    ///
    /// # Panics
    /// If the length of `a`'s chunks is 0.
    pub fn for_each_chunks<A: Send, B: Send, C: Send>(
        &mut self,
        (a, a_len): (&mut [A], usize),
        (b, b_len): (&mut [B], usize),
        (c, c_len): (&mut [C], usize),
        f: impl Fn(usize, &mut [A], &mut [B], &mut [C]) + Sync,
    ) {
        assert!(a_len > 0, "chunks of no elements");
        let n_chunk = a.len().div_ceil(a_len);
        let (a, b, c) = (Disjoint::new(a), Disjoint::new(b), Disjoint::new(c));
        self.for_each(n_chunk, |_, chunk| {
            // SAFETY: chunks of one slice do not overlap and `for_each` runs each index once.
            unsafe { f(chunk, a.chunk(chunk, a_len), b.chunk(chunk, b_len), c.chunk(chunk, c_len)) };
        });
    }

    /// Cuts the matrix `out` [n_row, n_col] into tiles, `tile_cols` columns wide (the last may be narrower) and as high as two
    /// neighbours of `row_starts` [n_group + 1] are apart, and runs `f(scratch, tile)` for each. Each rank owns one element of
    /// `scratch`. Empty groups are passed over.
    ///
    /// # Panics
    /// If `row_starts` does not ascend within the rows of `out`, `n_col` does not divide `out`, a size is 0, or `scratch` is
    /// shorter than the team.
    pub fn for_each_tile<T: Send, S: Send>(
        &mut self,
        scratch: &mut [S],
        out: &mut [T],
        n_col: usize,
        row_starts: &[usize],
        tile_cols: usize,
        f: impl Fn(&mut S, Tile<'_, T>) + Sync,
    ) {
        self.for_each_tiles(scratch, [out], n_col, row_starts, tile_cols, f);
    }

    /// Like [`Team::for_each_tile`] over several matrices of one shape, cut alike.
    ///
    /// # Panics
    /// As [`Team::for_each_tile`], or if the matrices differ in length.
    pub fn for_each_tiles<T: Send, S: Send, const N: usize>(
        &mut self,
        scratch: &mut [S],
        outs: [&mut [T]; N],
        n_col: usize,
        row_starts: &[usize],
        tile_cols: usize,
        f: impl Fn(&mut S, Tile<'_, T, N>) + Sync,
    ) {
        assert!(scratch.len() >= self.n_thread(), "scratch for {} of {} threads", scratch.len(), self.n_thread());
        let len = outs.first().map_or(0, |out| out.len());
        assert!(n_col > 0 && tile_cols > 0 && len.is_multiple_of(n_col), "{len} elements in rows of {n_col}");
        assert!(outs.iter().all(|out| out.len() == len), "matrices of different lengths");
        assert!(row_starts.is_sorted() && row_starts.last().is_none_or(|&end| end <= len / n_col));
        let n_group = row_starts.len().saturating_sub(1);
        let tiles_per_group = n_col.div_ceil(tile_cols);
        let outs = outs.map(Disjoint::new);
        let scratch = Disjoint::new(scratch);
        self.for_each(n_group * tiles_per_group, |rank, task| {
            let (group, tile) = (task / tiles_per_group, task % tiles_per_group);
            let rows = row_starts[group]..row_starts[group + 1];
            if rows.is_empty() {
                return;
            }
            let cols = tile * tile_cols..n_col.min((tile + 1) * tile_cols);
            // SAFETY: one thread has this rank, and holds the element only during this call.
            let scratch = unsafe { &mut scratch.slice(rank..rank + 1)[0] };
            f(scratch, Tile { outs: &outs, n_col, rows, cols, group });
        });
    }

    /// One step: every worker that comes in time, and the caller, run `job(rank)`.
    fn run(&mut self, job: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The step is closed and empty again before this function returns or unwinds, so no
        // worker uses the pointer after `job` is gone.
        let erased = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(job) };
        // SAFETY: the step is closed with nobody inside, so nobody reads the slot; `&mut self` excludes another writer.
        unsafe { *shared.job.get() = Some(erased) };
        let epoch = (shared.state.load(Ordering::Relaxed) & !(EPOCH - 1)).wrapping_add(EPOCH);
        // SeqCst pairs with the worker's: either it sees the step before it sleeps, or this sees it asleep.
        shared.state.store(epoch | OPEN, Ordering::SeqCst);
        let step = epoch / EPOCH;
        for ((asleep, record), worker) in shared.asleep.iter().zip(&shared.records).zip(&self.workers) {
            if asleep.load(Ordering::SeqCst) && record.from.load(Ordering::Relaxed) <= step {
                worker.thread().unpark();
            }
        }
        let start = Instant::now();
        if let Some(last) = self.last.replace(start) {
            let apart = (start - last).min(PAUSE);
            self.pace = if self.pace.is_zero() { apart } else { (self.pace * 7 + apart) / 8 };
        }
        let result = catch_unwind(AssertUnwindSafe(|| job(0)));
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let late = start.elapsed() * 2 + LATE;
        let mut idle = Idle::new();
        while shared.state.load(Ordering::Acquire) != epoch {
            // A worker that is inside but not running needs this CPU.
            if !idle.spin() {
                std::thread::yield_now();
                if start.elapsed() > late {
                    sit_out(&shared.records, &mut self.rests, step, self.pace);
                }
            }
        }
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(payload) = result.err().or(panic) {
            resume_unwind(payload);
        }
    }
}

/// Keeps the workers still inside step `step` out of the next ones, which are `pace` apart.
fn sit_out(records: &[Record], rests: &mut [Rest], step: u64, pace: Duration) {
    for (record, rest) in records.iter().zip(rests) {
        let from = record.from.load(Ordering::Relaxed);
        if from > step || !record.inside.load(Ordering::Relaxed) {
            continue;
        }
        // Late again soon after it came back: the CPU is not ours for longer.
        let is_again = step - from < 4 * rest.n_step;
        rest.time = if is_again { (2 * rest.time).min(SIT_OUT.end) } else { SIT_OUT.start };
        let n_step = rest.time.as_nanos().checked_div(pace.as_nanos()).unwrap_or(1);
        rest.n_step = n_step.max(1) as u64;
        record.from.store(step + rest.n_step, Ordering::Relaxed);
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker cannot panic: jobs are caught.
            let _ = worker.join();
        }
    }
}

/// Life of a worker.
fn work(shared: &Shared, rank: usize) {
    let mut done = 0;
    let mut idle = Idle::new();
    let record = &shared.records[rank - 1];
    let ready = |state: u64, done: u64| {
        let step = state / EPOCH;
        state & OPEN != 0 && step != done && record.from.load(Ordering::Relaxed) <= step
    };
    loop {
        let state = shared.state.load(Ordering::Acquire);
        if ready(state, done) {
            if shared.state.compare_exchange(state, state + INSIDE, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                done = state / EPOCH;
                record.inside.store(true, Ordering::Relaxed);
                // SAFETY: inside an open step the slot is not written, and holds what was written before it opened.
                let job = unsafe { *shared.job.get() };
                if let Some(job) = job {
                    // SAFETY: the caller keeps the closure alive until everyone inside has left.
                    let job = unsafe { &*job };
                    if let Err(payload) = catch_unwind(AssertUnwindSafe(|| job(rank))) {
                        *shared.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
                    }
                }
                record.inside.store(false, Ordering::Relaxed);
                shared.state.fetch_sub(INSIDE, Ordering::Release);
                idle = Idle::new();
            }
        } else if shared.quit.load(Ordering::SeqCst) {
            return;
        } else if !idle.spin() {
            let asleep = &shared.asleep[rank - 1];
            asleep.store(true, Ordering::SeqCst);
            if !ready(shared.state.load(Ordering::SeqCst), done) && !shared.quit.load(Ordering::SeqCst) {
                std::thread::park();
            }
            asleep.store(false, Ordering::SeqCst);
        }
    }
}

/// Spins until [`SPIN`] has passed, then says so.
struct Idle {
    pauses: u32,
    since: Option<Instant>,
}

impl Idle {
    fn new() -> Idle {
        Idle { pauses: 0, since: None }
    }

    /// One pause; false once the time is over (and from then on, without pausing).
    fn spin(&mut self) -> bool {
        // The clock is read once in 64 pauses, and not at all in the usual short wait.
        if self.pauses % 64 == 63 && self.since.get_or_insert_with(Instant::now).elapsed() > SPIN {
            return false;
        }
        self.pauses += 1;
        std::hint::spin_loop();
        true
    }
}

/// A slice handed to several threads, each of which takes parts no other takes.
struct Disjoint<'a, T> {
    base: *mut T,
    len: usize,
    _slice: PhantomData<&'a mut [T]>,
}

// SAFETY: parts are handed out through an unsafe method whose callers promise that no two overlap; T itself may be sent.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    fn new(slice: &'a mut [T]) -> Self {
        Disjoint { base: slice.as_mut_ptr(), len: slice.len(), _slice: PhantomData }
    }

    /// Chunk `index` of those that are `len` long, as much of it as there is.
    ///
    /// # Safety
    /// No overlapping part is in use.
    #[allow(clippy::mut_from_ref, reason = "the point of the type; callers promise disjointness")]
    unsafe fn chunk(&self, index: usize, len: usize) -> &mut [T] {
        let start = self.len.min(index * len);
        // SAFETY: the range is cut to the slice; the rest is as this function asks of its caller.
        unsafe { self.slice(start..self.len.min(start + len)) }
    }

    /// # Safety
    /// `range` lies within the slice, and no overlapping part is in use.
    #[allow(clippy::mut_from_ref, reason = "the point of the type; callers promise disjointness")]
    unsafe fn slice(&self, range: Range<usize>) -> &mut [T] {
        debug_assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: as this function asks of its caller.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(range.start), range.len()) }
    }
}

/// A rectangle of one or more row-major matrices, of which its holder has exclusive use.
pub struct Tile<'a, T, const N: usize = 1> {
    outs: &'a [Disjoint<'a, T>; N],
    n_col: usize,
    rows: Range<usize>,
    cols: Range<usize>,
    group: usize,
}

impl<T, const N: usize> Tile<'_, T, N> {
    /// Rows of the matrix this tile covers.
    pub fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// Columns of the matrix this tile covers.
    pub fn cols(&self) -> Range<usize> {
        self.cols.clone()
    }

    /// Which interval of `row_starts` the rows are.
    pub fn group(&self) -> usize {
        self.group
    }

    /// The tile's part of row `row` of each matrix.
    ///
    /// # Panics
    /// If the tile does not cover that row.
    pub fn rows_mut(&mut self, row: usize) -> [&mut [T]; N] {
        assert!(self.rows.contains(&row), "row {row} of a tile over {:?}", self.rows);
        let start = row * self.n_col;
        // SAFETY: rows and columns lie within the matrices (checked when tiles are cut), and tiles do not overlap.
        std::array::from_fn(|i| unsafe { self.outs[i].slice(start + self.cols.start..start + self.cols.end) })
    }
}

impl<T> Tile<'_, T> {
    /// The tile's part of row `row` of the matrix.
    ///
    /// # Panics
    /// If the tile does not cover that row.
    pub fn row_mut(&mut self, row: usize) -> &mut [T] {
        let [part] = self.rows_mut(row);
        part
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn every_task_runs_exactly_once(n_thread in 1usize..9, steps in prop::collection::vec(0usize..200, 1..30)) {
            let mut team = Team::new(n_thread);
            for n_task in steps {
                let counts: Vec<AtomicUsize> = (0..n_task).map(|_| AtomicUsize::new(0)).collect();
                team.for_each(n_task, |rank, task| {
                    assert!(rank < n_thread);
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
                prop_assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }

        #[test]
        fn chunks_cover_the_slice_in_order(n_thread in 1usize..5, len in 0usize..500, chunk_len in 1usize..70) {
            let mut out = vec![usize::MAX; len];
            Team::new(n_thread).for_each_chunk(&mut out, chunk_len, |chunk, part| {
                for (i, v) in part.iter_mut().enumerate() {
                    *v = chunk * chunk_len + i;
                }
            });
            prop_assert_eq!(out, (0..len).collect::<Vec<_>>());
        }

        #[test]
        fn tiles_cover_every_group_once(
            n_thread in 1usize..5, heights in prop::collection::vec(0usize..6, 0..6), n_col in 1usize..50, tile_cols in 1usize..20,
        ) {
            let mut row_starts = vec![1];
            for h in &heights {
                row_starts.push(row_starts[row_starts.len() - 1] + h);
            }
            let n_row = row_starts[heights.len()] + 1;
            let mut team = Team::new(n_thread);
            let mut out = vec![(usize::MAX, 0); n_row * n_col];
            let mut scratch = vec![0usize; n_thread];
            team.for_each_tile(&mut scratch, &mut out, n_col, &row_starts, tile_cols, |tiles, mut tile| {
                *tiles += 1;
                for row in tile.rows() {
                    let (group, cols) = (tile.group(), tile.cols());
                    for (v, col) in tile.row_mut(row).iter_mut().zip(cols) {
                        *v = (group, v.1 + 1 + row * n_col + col);
                    }
                }
            });
            let n_filled = heights.iter().filter(|&&h| h > 0).count();
            prop_assert_eq!(scratch.iter().sum::<usize>(), n_filled * n_col.div_ceil(tile_cols));
            for row in 0..n_row {
                let group = (0..heights.len()).find(|&g| (row_starts[g]..row_starts[g + 1]).contains(&row));
                for col in 0..n_col {
                    let want = group.map_or((usize::MAX, 0), |g| (g, 1 + row * n_col + col));
                    prop_assert_eq!(out[row * n_col + col], want);
                }
            }
        }
    }

    #[test]
    fn sleeping_workers_are_woken() {
        let mut team = Team::new(3);
        for _ in 0..5 {
            std::thread::sleep(4 * SPIN);
            let ranks = Mutex::new(HashSet::new());
            // Long enough a step that every worker comes in time.
            team.for_each(3, |rank, _| {
                ranks.lock().unwrap().insert(rank);
                while ranks.lock().unwrap().len() < 3 {
                    std::thread::yield_now();
                }
            });
            assert_eq!(ranks.into_inner().unwrap().len(), 3);
        }
    }

    #[test]
    fn a_late_worker_sits_out_and_longer_if_it_is_late_again() {
        let records = [Record::default(), Record::default()];
        records[1].inside.store(true, Ordering::Relaxed);
        let mut rests = [Rest::default(); 2];
        let from = |i: usize| records[i].from.load(Ordering::Relaxed);
        let pace = SIT_OUT.start / 8;
        let rest = |times: u32| Rest { time: times * SIT_OUT.start, n_step: 8 * u64::from(times) };
        sit_out(&records, &mut rests, 10, pace);
        assert_eq!((rests, from(0), from(1)), ([Rest::default(), rest(1)], 0, 10 + 8));
        // Noticed twice in one step, it is late once.
        sit_out(&records, &mut rests, 10, pace);
        assert_eq!(rests[1], rest(1));
        let again = from(1) + 5;
        sit_out(&records, &mut rests, again, pace);
        assert_eq!((rests[1], from(1)), (rest(2), again + 16));
        // After many steps in time it counts as the first time again.
        let later = from(1) + 1000;
        sit_out(&records, &mut rests, later, pace);
        assert_eq!(rests[1], rest(1));
        for _ in 0..20 {
            sit_out(&records, &mut rests, from(1), pace);
        }
        assert_eq!(rests[1].time, SIT_OUT.end);
        // Long steps: one, and not a minute of them.
        sit_out(&records, &mut rests, from(1), Duration::from_secs(1));
        assert_eq!(rests[1].n_step, 1);
        sit_out(&records, &mut rests, from(1), Duration::ZERO);
        assert_eq!(rests[1].n_step, 1);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_survives() {
        let mut team = Team::new(4);
        for bad in [0, 13, 99] {
            let step = AssertUnwindSafe(|| {
                team.for_each(100, |_, task| assert!(task != bad, "task {task} fails"));
            });
            let payload = catch_unwind(step).unwrap_err();
            assert_eq!(payload.downcast_ref::<String>().unwrap(), &format!("task {bad} fails"));
            let sum = AtomicUsize::new(0);
            team.for_each(100, |_, task| {
                sum.fetch_add(task, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 4950);
        }
    }

    #[test]
    fn dropping_the_team_ends_its_threads() {
        let team = Team::new(4);
        let shared = Arc::downgrade(&team.shared);
        drop(team);
        assert!(shared.upgrade().is_none());
    }
}
