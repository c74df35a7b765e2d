//! Where files are read from: the disk, or memory where there is no disk, as in a browser.
//!
//! What reads a model's files asks a [`Store`] for them, so that a folder which a page was given is read by the same
//! code as one on a disk. Writing is to disks alone. Invariant: a path means the same file to every function here.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};

/// Files by their paths: those of the disk, or some in memory. Cloning shares them.
///
/// ```
/// use sparse24::io::Store;
/// let config = ("minilm/config.json".into(), b"{}".to_vec());
/// let store = Store::in_memory([config]);
/// assert!(store.exists("minilm/config.json") && store.is_dir("minilm") && !store.exists("minilm/tokenizer.json"));
/// assert_eq!(store.read("minilm/config.json")?, b"{}");
/// # Ok::<(), sparse24::Error>(())
/// ```
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Store(Option<Arc<BTreeMap<PathBuf, Arc<Vec<u8>>>>>);

impl Store {
    /// The disk.
    pub fn disk() -> Self {
        Self(None)
    }

    /// These files and no others. Their paths are relative, and folders are what they have in front of their names.
    pub fn in_memory(files: impl IntoIterator<Item = (PathBuf, Vec<u8>)>) -> Self {
        Self::disk().with(files)
    }

    /// The files of this store in memory and more, which take the place of those at the same paths. Of a disk, these
    /// alone.
    pub fn with(&self, files: impl IntoIterator<Item = (PathBuf, Vec<u8>)>) -> Self {
        let more = files.into_iter().map(|(path, bytes)| (plain(&path), Arc::new(bytes)));
        let mut all = self.0.as_deref().cloned().unwrap_or_default();
        all.extend(more);
        Self(Some(Arc::new(all)))
    }

    /// Whether there is a file or a folder.
    pub fn exists(&self, path: impl AsRef<Path>) -> bool {
        let path = path.as_ref();
        match &self.0 {
            None => path.exists(),
            Some(files) => files.contains_key(&plain(path)) || self.is_dir(path),
        }
    }

    /// Whether there is a file.
    pub fn is_file(&self, path: impl AsRef<Path>) -> bool {
        match &self.0 {
            None => path.as_ref().is_file(),
            Some(files) => files.contains_key(&plain(path.as_ref())),
        }
    }

    /// Whether there is a folder.
    pub fn is_dir(&self, path: impl AsRef<Path>) -> bool {
        match &self.0 {
            None => path.as_ref().is_dir(),
            Some(files) => {
                let folder = plain(path.as_ref());
                files.keys().any(|file| file.starts_with(&folder) && *file != folder)
            }
        }
    }

    /// All bytes of a file. An error names it.
    pub fn read(&self, path: impl AsRef<Path>) -> Result<Vec<u8>> {
        let path = path.as_ref();
        let bytes = match &self.0 {
            None => fs::read(path),
            Some(_) => self.held(path).map(|bytes| bytes.to_vec()),
        };
        bytes.map_err(|e| Error::io(path, e))
    }

    /// A file of text. An error names it.
    pub fn read_to_string(&self, path: impl AsRef<Path>) -> Result<String> {
        let path = path.as_ref();
        String::from_utf8(self.read(path)?).map_err(|_| Error::file(path, "is not text in UTF-8"))
    }

    /// A file, to be read at any place.
    pub(super) fn open(&self, path: &Path) -> io::Result<StoredFile> {
        match &self.0 {
            None => Ok(StoredFile::Disk(Mutex::new(File::open(path)?))),
            Some(_) => self.held(path).map(StoredFile::Memory),
        }
    }

    /// A file that is in memory.
    fn held(&self, path: &Path) -> io::Result<Arc<Vec<u8>>> {
        let found = self.0.as_ref().and_then(|files| files.get(&plain(path)));
        found.cloned().ok_or_else(|| io::Error::new(ErrorKind::NotFound, "there is no such file"))
    }
}

/// Names alone: files are megabytes.
impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            None => f.write_str("Disk"),
            Some(files) => f.debug_set().entries(files.keys()).finish(),
        }
    }
}

/// A path in memory, where `./` means nothing.
fn plain(path: &Path) -> PathBuf {
    path.components().filter(|part| !matches!(part, Component::CurDir)).collect()
}

/// An open file.
pub(super) enum StoredFile {
    /// Locked, because reading moves the one cursor that all users of the file share.
    Disk(Mutex<File>),
    Memory(Arc<Vec<u8>>),
}

impl StoredFile {
    /// Bytes of it.
    pub(super) fn len(&self) -> io::Result<u64> {
        match self {
            // A reader that panicked leaves the cursor anywhere, and every read sets it first.
            Self::Disk(file) => Ok(file.lock().unwrap_or_else(PoisonError::into_inner).metadata()?.len()),
            Self::Memory(bytes) => Ok(bytes.len() as u64),
        }
    }

    /// Fills `into` with the bytes from `start` on. An error if the file ends before that.
    pub(super) fn read_at(&self, start: u64, into: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Disk(file) => {
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                file.seek(SeekFrom::Start(start))?;
                file.read_exact(into)
            }
            Self::Memory(bytes) => {
                let rest = usize::try_from(start).ok().and_then(|start| bytes.get(start..));
                let from = rest.and_then(|rest| rest.get(..into.len()));
                into.copy_from_slice(from.ok_or_else(|| io::Error::from(ErrorKind::UnexpectedEof))?);
                Ok(())
            }
        }
    }
}

impl fmt::Debug for StoredFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk(file) => f.debug_tuple("Disk").field(file).finish(),
            Self::Memory(bytes) => f.debug_tuple("Memory").field(&bytes.len()).finish(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    /// What every function says of some paths.
    fn said(store: &Store, root: &Path) -> Vec<(bool, bool, bool, Option<Vec<u8>>)> {
        let paths = ["a/config.json", "a", "a/./config.json", "a/b", "a/b/weights", "a/b/weig", "a/config.json/x", "c"];
        let of = |path: &&str| {
            let path = root.join(path);
            (store.exists(&path), store.is_file(&path), store.is_dir(&path), store.read(&path).ok())
        };
        paths.iter().map(of).collect()
    }

    #[test]
    fn memory_is_read_as_a_disk_is() {
        let files = [("a/config.json", &b"{}"[..]), ("a/b/weights", b"0123456789")];
        let dir = tempfile::tempdir().unwrap();
        for (path, bytes) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        let memory = Store::in_memory(files.map(|(path, bytes)| (path.into(), bytes.to_vec())));
        assert_eq!(said(&memory, Path::new("")), said(&Store::disk(), dir.path()));
        assert_eq!(said(&memory, Path::new(".")), said(&memory, Path::new("")));

        for (store, root) in [(&memory, Path::new("")), (&Store::disk(), dir.path())] {
            let file = store.open(&root.join("a/b/weights")).unwrap();
            let mut three = [0; 3];
            file.read_at(6, &mut three).unwrap();
            assert_eq!((file.len().unwrap(), &three), (10, b"678"));
            for start in [8, 10, 11, u64::MAX >> 1] {
                assert!(file.read_at(start, &mut three).is_err(), "{start}");
            }
            let error = store.read(root.join("no.json")).unwrap_err().to_string();
            assert!(error.contains("no.json"), "{error}");
            assert!(store.open(&root.join("no.json")).is_err());
        }
        let more = memory.with([("a/./config.json".into(), b"[]".to_vec()), ("c".into(), Vec::new())]);
        assert_eq!(
            (more.read("a/config.json").unwrap(), more.exists("c"), memory.exists("c")),
            (b"[]".to_vec(), true, false)
        );
        assert_eq!(more.read("a/b/weights").unwrap(), memory.read("a/b/weights").unwrap());
        assert_eq!(format!("{memory:?}"), r#"{"a/b/weights", "a/config.json"}"#);
    }
}
