//! What happens when the user or the system ends a command early: Ctrl-C, SIGTERM, or a terminal that is closed.
//!
//! What the command was writing is removed, and then the process ends by the signal, as it would have without this
//! module: shells see 128 + its number, and scripts that were interrupted stop. Where there are no such signals nothing
//! is done, and the next command that writes in the same folder removes what was left.
//!
//! Invariant: a signal that was ignored before stays ignored, so that `nohup` keeps its promise.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether a signal has come.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Waits for signals on a thread of its own, from now on.
#[cfg(unix)]
pub(super) fn watch() {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    use signal_hook::iterator::Signals;
    use signal_hook::low_level::emulate_default_handler;

    let ignored = ignored();
    let signals = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0);
    let signals: Vec<_> = signals.collect();
    // Files on a disk that is gone may never be removed: the second signal ends the process at once.
    let second = Arc::new(AtomicBool::new(false));
    for &signal in &signals {
        let _ = signal_hook::flag::register_conditional_default(signal, Arc::clone(&second));
    }
    // Without a handler the signals end the process, which is no reason not to run.
    let Ok(mut signals) = Signals::new(signals) else { return };
    // Without a thread they do nothing until the command ends.
    let _ = std::thread::Builder::new().spawn(move || {
        if let Some(signal) = signals.forever().next() {
            ENDING.store(true, Ordering::SeqCst);
            second.store(true, Ordering::SeqCst);
            sparse24::io::discard_temporaries();
            let _ = emulate_default_handler(signal);
            std::process::exit(128 + signal);
        }
    });
}

#[cfg(not(unix))]
pub(super) fn watch() {}

/// Waits for the end if a signal has come: what a command says after its files were taken away is no result.
pub(super) fn wait() {
    while ENDING.load(Ordering::SeqCst) {
        std::thread::park();
    }
}

/// The signals that this process was started to ignore, signal 1 in the lowest bit.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// Asking is unsafe code here. SIGHUP, signal 1, is taken to be ignored, as `nohup` is the common case.
#[cfg(all(unix, not(any(target_os = "linux", target_os = "android"))))]
fn ignored() -> u64 {
    1
}
