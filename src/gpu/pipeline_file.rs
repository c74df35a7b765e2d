//! The file that keeps what a driver made of kernels, for the next process.
//!
//! A driver believes what it is given back, so that a file that was cut off, changed or made by something else must not
//! reach it: the data stand behind a number that is computed of them. It is that of the standard library's hasher,
//! which another release may compute in another way: then the file is made anew. What the data mean is the driver's and
//! wgpu's: both refuse those of another device or another version of themselves. Invariant: data that are read are
//! those that were written, under the same key.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::io::write_atomically;

/// More than a driver makes of all kernels of this crate; what is longer is not read.
const MAX_BYTES: u64 = 256 << 20;

/// Where in a folder the data of a key lie.
pub(super) fn path_in(folder: &Path, key: &str) -> PathBuf {
    folder.join(format!("{key}.bin"))
}

/// The number in front of data.
fn check(key: &str, data: &[u8]) -> [u8; 8] {
    let mut hasher = DefaultHasher::new();
    hasher.write(key.as_bytes());
    hasher.write_usize(data.len());
    hasher.write(data);
    hasher.finish().to_le_bytes()
}

/// The data of a file; `None` if there is none, or it is not one that [`write()`] made with this key.
pub(super) fn read(path: &Path, key: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
    let (number, data) = bytes.split_first_chunk::<8>()?;
    (*number == check(key, data)).then(|| data.to_vec())
}

/// Writes a file, which appears complete or not at all, in a folder that is made if need be.
pub(super) fn write(path: &Path, key: &str, data: &[u8]) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    }
    write_atomically(path, |out| {
        out.write_all(&check(key, data))?;
        out.write_all(data)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    #[test]
    fn what_was_written_is_read_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = path_in(&dir.path().join("new"), "a_1");
        assert_eq!(read(&path, "a_1"), None);
        for data in [&b"some pipelines"[..], b""] {
            write(&path, "a_1", data).unwrap();
            assert_eq!(read(&path, "a_1").as_deref(), Some(data));
            assert_eq!(read(&path, "a_2"), None, "of another device");
        }
        write(&path, "a_1", b"some pipelines").unwrap();
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            fs::write(&path, changed).unwrap();
            assert_eq!(read(&path, "a_1"), None, "byte {at}");
            fs::write(&path, &whole[..at]).unwrap();
            assert_eq!(read(&path, "a_1"), None, "{at} bytes");
        }
        fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
        assert_eq!(read(&path, "a_1"), None, "longer");
    }
}
