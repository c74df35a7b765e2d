//! What belongs to the process: which one it is, and the user's wish to stop.
//!
//! Threads do not survive a fork, and those of the crate's pools would be waited for without end. So the first call
//! that needs threads notes the process, and a later one in another process is an error instead of a hang. What has
//! threads behind it is [`Owned`] by that process.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use pyo3::PyResult;
use pyo3::Python;
use pyo3::exceptions::PyRuntimeError;

use crate::errors::to_py;

/// The process whose threads there are; 0 before there are any.
static OWNER: AtomicU32 = AtomicU32::new(0);
/// How long a key press may go unnoticed.
pub(crate) const PATIENCE: Duration = Duration::from_millis(50);

/// To be called before anything that needs threads. An error in a process that was forked from one that had them.
pub(crate) fn enter() -> PyResult<()> {
    let own = std::process::id();
    match OWNER.compare_exchange(0, own, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => Ok(()),
        Err(owner) if owner == own => Ok(()),
        Err(owner) => Err(PyRuntimeError::new_err(format!(
            "process {own} was forked from process {owner} after that had used sparse24, whose threads did not come \
             along: start processes by multiprocessing's \"spawn\" or \"forkserver\", or use sparse24 in children only"
        ))),
    }
}

/// What has threads behind it, or a driver's. A process that was forked has a copy without them, which it never drops:
/// the drop would wait for them.
pub(crate) struct Owned<T>(Arc<T>);

impl<T> Owned<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Arc::new(value))
    }
}

impl<T> Deref for Owned<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        if std::process::id() != OWNER.load(Ordering::Relaxed) {
            std::mem::forget(Arc::clone(&self.0));
        }
    }
}

/// Computes on a thread of its own while this one looks for signals, so that a key press is answered at once. What is
/// computed then goes on to its end in the background, and its result is dropped.
pub(crate) fn interruptible<T: Send + 'static>(
    py: Python<'_>,
    compute: impl FnOnce() -> sparse24::Result<T> + Send + 'static,
) -> PyResult<T> {
    enter()?;
    let (sender, receiver) = sync_channel(1);
    let thread = std::thread::Builder::new().name("sparse24".into()).spawn(move || {
        // Nobody waits any more after an interrupt.
        let _ = sender.send(compute());
    });
    thread.map_err(|e| PyRuntimeError::new_err(format!("cannot start a thread: {e}")))?;
    let mut receiver = receiver;
    loop {
        let (back, received) = py.detach(move || {
            let received = receiver.recv_timeout(PATIENCE);
            (receiver, received)
        });
        receiver = back;
        match received {
            Ok(result) => return result.map_err(to_py),
            Err(RecvTimeoutError::Timeout) => py.check_signals()?,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(PyRuntimeError::new_err("sparse24 panicked, see standard error"));
            }
        }
    }
}
