//! Memory, asked for before it is taken.
//!
//! An allocation that fails ends a Rust process, with a message that names no tensor and no layer; and one that the
//! system grants on credit ends it later, when the pages are used. So whatever allocates by a size that a user or a
//! file gives asks here first, and fails as other operations do. Invariant: nothing is allocated here for longer than
//! the question takes.

use crate::error::{Error, Result, checked_mul};

/// What is granted without a question, in bytes: allocations of this size are everywhere.
const SMALL: usize = 1 << 20;

/// From this size on the system is asked what it has left. To ask takes some microseconds, to fill that much
/// milliseconds.
const LARGE: usize = 64 << 20;

/// An error that names what is too large, unless there are so many bytes: for this process (`ulimit -v`), and on Linux
/// in the machine and in the control group.
pub(crate) fn claim(bytes: usize, what: impl FnOnce() -> String) -> Result<()> {
    if bytes <= SMALL {
        return Ok(());
    }
    let left = if bytes >= LARGE { left() } else { None };
    let refused = left.is_some_and(|left| bytes as u64 > left) || Vec::<u8>::new().try_reserve_exact(bytes).is_err();
    match refused {
        false => Ok(()),
        true => {
            let of = left.filter(|left| *left < bytes as u64).map(|left| format!(", {} are left", size(left)));
            Err(Error::out_of_memory(format!("{} for {}{}", size(bytes as u64), what(), of.unwrap_or_default())))
        }
    }
}

/// [`claim`] for `rows * cols` elements of `element` bytes each.
pub(crate) fn claim_matrix(what: &str, rows: usize, cols: usize, element: usize) -> Result<()> {
    let bytes = checked_mul(&format!("{what} bytes"), checked_mul(what, rows, cols)?, element)?;
    claim(bytes, || format!("{what} of {rows} x {cols}"))
}

/// Bytes in words.
fn size(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{bytes} bytes"),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", bytes as f64 / 2f64.powi(20)),
        _ => format!("{:.1} GiB", bytes as f64 / 2f64.powi(30)),
    }
}

/// Bytes that the machine and the process's control group have left, swap included; `None` where the system does not
/// say.
fn left() -> Option<u64> {
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|info| in_machine(&info));
    let of_group = || {
        let group = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        let folder = format!("/sys/fs/cgroup{}", group.lines().find_map(|line| line.strip_prefix("0::"))?);
        let file = |name: &str| std::fs::read_to_string(format!("{folder}/{name}")).ok();
        in_group(&file("memory.max")?, &file("memory.stat")?)
    };
    [machine, of_group()].into_iter().flatten().min()
}

/// What `/proc/meminfo` says is left.
fn in_machine(info: &str) -> Option<u64> {
    let field = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
    };
    Some(field("MemAvailable:")? + field("SwapFree:").unwrap_or(0))
}

/// What a control group has left: its limit, less the memory that is not a cache of files.
fn in_group(limit: &str, stat: &str) -> Option<u64> {
    let limit: u64 = limit.trim().parse().ok()?;
    let used: u64 = stat.lines().find_map(|line| line.strip_prefix("anon "))?.trim().parse().ok()?;
    Some(limit.saturating_sub(used))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_there_is_not_is_refused_with_its_size() {
        assert!(claim(1 << 20, || unreachable!()).is_ok());
        let error = |bytes| claim(bytes, || "a test".into()).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error(1 << 50).starts_with("out of memory: 1048576.0 GiB for a test"), "{}", error(1 << 50));
        assert!(error(usize::MAX).contains("for a test"));
        let error = claim_matrix("mask", 1 << 40, 1 << 40, 4).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("mask overflows"), "{error}");
        assert_eq!([size(9), size(3 << 19), size(3 << 29)], ["9 bytes", "1.5 MiB", "1.5 GiB"]);
    }

    #[test]
    fn what_is_left_is_read_from_what_linux_says() {
        let info = "MemTotal:  100 kB\nMemFree:  1 kB\nMemAvailable:   50 kB\nSwapFree:    7 kB\n";
        assert_eq!((in_machine(info), in_machine("MemTotal: 1 kB\n")), (Some(57 * 1024), None));
        assert_eq!(in_group("1000\n", "file 900\nanon 300\n"), Some(700));
        assert_eq!(in_group("100\n", "anon 300\n"), Some(0));
        assert_eq!(in_group("max\n", "anon 300\n"), None);
    }
}
