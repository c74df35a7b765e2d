//! The threads that compute: the caller's own, and helpers that wait a moment for the next call before they sleep.
//!
//! A language model that makes one token at a time runs hundreds of calls in a row, of 5 to 100 µs each. The thread
//! that runs them takes tasks like all others, so that no call is handed over and none has to be waited for asleep;
//! helpers spin for [`SPIN`] after a call, so that the next one need not wake them. Each thread begins with its own
//! part of the tasks, which is the same in each call of as many: what it wrote and read for them, such as rows of
//! weights, is in its caches, and would cost another thread a trip to them. Who is done with its own takes from the
//! others': a helper that the system keeps from running delays nothing but what it has begun.
//!
//! Invariant: every task of [`Pool::each`] runs once, unless one before it in its share panics, and none after it has
//! returned.
#![allow(unsafe_code, reason = "tasks on the caller's stack, which other threads run")]

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use gemm_common::Parallelism;

use crate::error::{Error, Result};
use crate::simd::Simd;

/// How long a helper waits for work before it sleeps: longer than what one thread does alone between two calls.
const SPIN: Duration = Duration::from_micros(100);

/// Shares in a thread's part of a call's tasks, at most: few enough that taking one costs nothing.
const SHARES: usize = 64;

/// The threads that compute, and their vector instructions.
#[derive(Debug)]
pub(super) struct Pool {
    /// `None` for one thread: the caller's own.
    helpers: Option<Helpers>,
    /// As many threads, for what deals out its work by rayon.
    rayon: Option<rayon::ThreadPool>,
    simd: Simd,
}

impl Pool {
    pub(super) fn new(threads: usize, simd: Simd) -> Result<Self> {
        if threads == 1 {
            return Ok(Self { helpers: None, rayon: None, simd });
        }
        let failed = |e: &dyn std::fmt::Display| Error::invalid(format!("cannot start the CPU device's threads: {e}"));
        let rayon = rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(|e| failed(&e))?;
        let helpers = Helpers::new(threads - 1).map_err(|e| failed(&e))?;
        Ok(Self { helpers: Some(helpers), rayon: Some(rayon), simd })
    }

    pub(super) fn simd(&self) -> Simd {
        self.simd
    }

    pub(super) fn len(&self) -> usize {
        self.helpers.as_ref().map_or(1, |helpers| helpers.shared.helpers.len() + 1)
    }

    /// Threads of rayon; `None` for one, which is the caller's own.
    pub(super) fn rayon(&self) -> Option<&rayon::ThreadPool> {
        self.rayon.as_ref()
    }

    /// Does work of the crate `gemm`, which deals it out by rayon.
    pub(super) fn by_rayon(&self, work: impl FnOnce(Parallelism) + Send) {
        match &self.rayon {
            Some(threads) => threads.install(|| work(Parallelism::Rayon(self.len()))),
            None => work(Parallelism::None),
        }
    }

    /// Does so many tasks, in any order. Within a task, and while another thread's tasks run, it does them by itself.
    pub(super) fn each(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        match &self.helpers {
            Some(helpers) if tasks > 1 => helpers.each(tasks, &task),
            _ => (0..tasks).for_each(task),
        }
    }

    /// How many pieces each of some tasks is cut into, for all threads to have some; at most `max`.
    pub(super) fn cuts(&self, tasks: usize, max: usize) -> usize {
        match self.len() {
            1 => 1,
            threads => (4 * threads).div_ceil(tasks.max(1)).clamp(1, max),
        }
    }
}

#[derive(Debug)]
struct Helpers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What is written by one thread and read by others, on lines of its own: prefetchers take two at a time.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Apart<T>(T);

#[derive(Debug, Default)]
struct Shared {
    /// The present call and all its shares; see [`Shares`].
    state: Apart<AtomicU64>,
    /// Of each thread, the caller first, the shares of its part that nobody has taken.
    parts: Vec<Apart<AtomicU64>>,
    /// Shares of the present call that have been done.
    done: Apart<AtomicUsize>,
    /// The present call. Valid as long as not all of its shares are done.
    call: AtomicPtr<Call<'static>>,
    /// Whether there is a present call.
    busy: AtomicBool,
    stop: AtomicBool,
    /// What a task panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    helpers: Vec<Apart<Helper>>,
}

#[derive(Debug, Default)]
struct Helper {
    asleep: AtomicBool,
    thread: OnceLock<Thread>,
}

/// The tasks of a call.
struct Call<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    tasks: usize,
    shares: usize,
}

/// Some shares of a call: the call's number (40 bits, so that none has the number of another in days), the end of the
/// shares and the first of them (12 bits each).
#[derive(Clone, Copy, PartialEq, Eq)]
struct Shares(u64);

impl Shares {
    const BITS: u32 = 12;
    const MAX: usize = (1 << Self::BITS) - 1;

    fn new(call: u64, range: Range<usize>) -> Self {
        Self(call << (2 * Self::BITS) | (range.end as u64) << Self::BITS | range.start as u64)
    }

    fn call(self) -> u64 {
        self.0 >> (2 * Self::BITS)
    }

    fn end(self) -> usize {
        (self.0 >> Self::BITS) as usize & Self::MAX
    }

    fn first(self) -> usize {
        self.0 as usize & Self::MAX
    }

    fn is_empty(self) -> bool {
        self.first() == self.end()
    }

    /// The first, and the others.
    fn split_first(self) -> (usize, Self) {
        (self.first(), Self(self.0 + 1))
    }

    /// The last, and the others.
    fn split_last(self) -> (usize, Self) {
        (self.end() - 1, Self(self.0 - (1 << Self::BITS)))
    }
}

impl Helpers {
    fn new(count: usize) -> std::io::Result<Self> {
        let helpers = (0..count).map(|_| Apart::default()).collect();
        let parts = (0..=count).map(|_| Apart::default()).collect();
        let shared = Shared { helpers, parts, ..Shared::default() };
        let mut own = Self { shared: Arc::new(shared), threads: Vec::new() };
        for i in 0..count {
            let shared = Arc::clone(&own.shared);
            let thread = std::thread::Builder::new().name(format!("sparse24-{i}"));
            own.threads.push(thread.spawn(move || shared.help(i))?);
        }
        Ok(own)
    }

    fn each(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        if shared.busy.swap(true, Ordering::Acquire) {
            return (0..tasks).for_each(task);
        }
        let threads = shared.parts.len();
        let shares = tasks.min(SHARES * threads).min(Shares::MAX);
        let call = Call { task, tasks, shares };
        shared.done.0.store(0, Ordering::Relaxed);
        shared.call.store((&raw const call).cast_mut().cast(), Ordering::Relaxed);
        let number = Shares(shared.state.0.load(Ordering::Relaxed)).call() + 1;
        for (thread, Apart(part)) in shared.parts.iter().enumerate() {
            let own = shares * thread / threads..shares * (thread + 1) / threads;
            part.store(Shares::new(number, own).0, Ordering::Release);
        }
        // Sequentially consistent, as what helpers do before they sleep: they see the call or are seen asleep.
        shared.state.0.store(Shares::new(number, 0..shares).0, Ordering::SeqCst);
        shared.wake_below(0, shares);
        shared.take_shares(0, number);
        let start = Instant::now();
        while shared.done.0.load(Ordering::Acquire) < shares {
            // Whoever is at it may have no processor.
            if start.elapsed() < SPIN { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        shared.busy.store(false, Ordering::Release);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        let Shared { state, stop, helpers, .. } = &*self.shared;
        stop.store(true, Ordering::Relaxed);
        let number = Shares(state.0.load(Ordering::Relaxed)).call() + 1;
        state.0.store(Shares::new(number, 0..0).0, Ordering::SeqCst);
        for (thread, _) in self.threads.drain(..).zip(helpers) {
            thread.thread().unpark();
            // A helper panics in no task.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// What helper `i` does.
    fn help(&self, i: usize) {
        let mut last = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let state = self.wait(i, last);
            last = state.call();
            self.wake_below(i + 1, if self.has_shares(last) { state.end() } else { 0 });
            self.take_shares(i + 1, last);
        }
    }

    /// Waits for a call after `last`.
    fn wait(&self, i: usize, last: u64) -> Shares {
        let state = |order| Some(Shares(self.state.0.load(order))).filter(|state| state.call() != last);
        let start = Instant::now();
        while start.elapsed() < SPIN {
            for _ in 0..16 {
                if let Some(state) = state(Ordering::Acquire) {
                    return state;
                }
                std::hint::spin_loop();
            }
        }
        let Helper { asleep, thread } = &self.helpers[i].0;
        thread.get_or_init(std::thread::current);
        loop {
            asleep.store(true, Ordering::SeqCst);
            if let Some(state) = state(Ordering::SeqCst) {
                asleep.store(false, Ordering::Relaxed);
                return state;
            }
            std::thread::park();
        }
    }

    /// Wakes the two helpers that are thread `of`'s to wake (0 is the caller), if they sleep and there are shares for
    /// them: no thread wakes all.
    fn wake_below(&self, of: usize, shares: usize) {
        for Apart(helper) in self.helpers.iter().take(shares.saturating_sub(1)).skip(2 * of).take(2) {
            if helper.asleep.load(Ordering::SeqCst)
                && helper.asleep.swap(false, Ordering::SeqCst)
                && let Some(thread) = helper.thread.get()
            {
                thread.unpark();
            }
        }
    }

    /// Whether a call has shares that nobody has taken.
    fn has_shares(&self, call: u64) -> bool {
        let mut parts = self.parts.iter().map(|part| Shares(part.0.load(Ordering::Relaxed)));
        parts.any(|part| part.call() == call && !part.is_empty())
    }

    /// Does shares of a call until all are taken: those of a thread's own part, and then of those behind it, from their
    /// ends, to which their own threads would have come last.
    fn take_shares(&self, thread: usize, call: u64) {
        let threads = self.parts.len();
        for of in (thread..threads).chain(0..thread) {
            let Apart(part) = &self.parts[of];
            loop {
                let seen = Shares(part.load(Ordering::Acquire));
                // Of a later call, if all of this one are done.
                if seen.call() != call || seen.is_empty() {
                    break;
                }
                let (share, others) = if of == thread { seen.split_first() } else { seen.split_last() };
                let present = self.call.load(Ordering::Relaxed);
                if part.compare_exchange_weak(seen.0, others.0, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                    continue;
                }
                // SAFETY: the pointer was stored before the part that was seen, and a later call's is stored only after
                // all shares of this one are done, which this one is not. For as long, the call is on its caller's
                // stack.
                let Call { task, tasks, shares } = unsafe { &*present };
                let range = tasks * share / shares..tasks * (share + 1) / shares;
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| range.for_each(task))) {
                    self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
                }
                self.done.0.fetch_add(1, Ordering::Release);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use std::sync::Barrier;

    use super::*;

    fn pool(threads: usize) -> Pool {
        Pool::new(threads, Simd::new(None).unwrap()).unwrap()
    }

    /// Calls of all sizes, at once and after helpers have gone to sleep; tasks that call again.
    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 9] {
            let pool = pool(threads);
            assert_eq!(pool.len(), threads);
            for round in 0..2000 {
                let tasks = [0, 1, 2, 3, 7, 100, 5000][round % 7];
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.each(tasks, |task| {
                    if tasks <= 7 {
                        pool.each(2, |_| {
                            counts[task].fetch_add(1, Ordering::Relaxed);
                        });
                    } else {
                        counts[task].fetch_add(2, Ordering::Relaxed);
                    }
                });
                assert!(
                    counts.iter().all(|count| count.load(Ordering::Relaxed) == 2),
                    "{threads} threads, {tasks} tasks"
                );
                if round % 500 == 0 {
                    std::thread::sleep(2 * SPIN);
                }
            }
        }
    }

    /// Two threads that use one pool.
    #[test]
    fn callers_do_not_wait_for_each_other() {
        let (pool, sum) = (pool(3), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        pool.each(10, |task| {
                            sum.fetch_add(task, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 2 * 1000 * 45);
    }

    #[test]
    fn threads_begin_with_their_own_tasks() {
        let (pool, caller) = (pool(3), std::thread::current().id());
        for _ in 0..100 {
            // None is done before each has been begun, so that nobody takes another's.
            let (met, of_caller) = (Barrier::new(3), AtomicUsize::new(usize::MAX));
            pool.each(3, |task| {
                met.wait();
                if std::thread::current().id() == caller {
                    of_caller.store(task, Ordering::Relaxed);
                }
            });
            assert_eq!(of_caller.into_inner(), 0);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_when_all_tasks_are_done() {
        let pool = pool(2);
        for _ in 0..100 {
            let count = AtomicUsize::new(0);
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.each(8, |task| {
                    count.fetch_add(1, Ordering::Relaxed);
                    if task == 3 {
                        resume_unwind(Box::new("of task 3"));
                    }
                });
            }));
            assert_eq!(*result.unwrap_err().downcast::<&str>().unwrap(), "of task 3");
            assert_eq!(count.into_inner(), 8);
        }
    }
}
