//! Files and folders while they are being written: under a temporary name beside their own, until they are complete.
//!
//! An error or a panic removes them. A process that is ended from outside cannot, and what it leaves may be as large as
//! a model. Two things keep that from adding up. A program that is told to end calls [`discard_temporaries`] first.
//! Where it was killed without a word, the next one that writes in the same folder removes what it finds: whoever
//! writes a temporary file or folder holds a lock on it (`flock`), which the system takes away from a process that
//! ends, however that happens, so that what is not locked was left behind. Without such locks (not on Unix, and on file
//! systems that have none) nothing of another process is touched.
//!
//! A network file system that is mounted with locks of each machine's own does not show which processes of another
//! machine live: two machines should not write in one folder there at the same time. What is lost by it is the result
//! that is being written, with an error, and nothing that was there before.
//!
//! Invariant: nothing appears under its own name before it is complete, and nothing that a living process is writing is
//! removed.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tempfile::{Builder, NamedTempFile, TempDir};

/// What temporary names start with. [`RANDOM`] letters and digits follow.
const PREFIX: &str = ".sparse24-unfinished-";
/// Letters and digits of a temporary name that are drawn at random.
const RANDOM: usize = 16;
/// How often something is tried again that another process or thread was in the way of.
const TRIES: usize = 100;

/// The absolute paths of what this process is writing. It is the one state that all of the process shares, because what
/// a process leaves behind when it ends is a matter of the whole process: whoever ends it knows none of its writers.
static WRITING: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// Locks [`WRITING`]. The set is right after a panic, too: each change is one call.
fn writing() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    WRITING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes every file and folder that this process has begun to write and not finished, for a program that is about to
/// end, from a thread that waits for signals, for example. The library itself handles no signals.
///
/// From then on every thread that begins or finishes a file waits forever: end the process after this.
pub fn discard_temporaries() {
    let writing = writing();
    for path in writing.iter() {
        // Other threads may be writing in a folder while it is removed, until they find out that it is gone.
        for _ in 0..TRIES {
            let _ = match fs::symlink_metadata(path) {
                Ok(found) if found.is_dir() => fs::remove_dir_all(path),
                Ok(_) => fs::remove_file(path),
                Err(_) => break,
            };
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    std::mem::forget(writing);
}

/// An entry of [`WRITING`], for as long as it lives.
#[derive(Debug)]
struct Entry(PathBuf);

impl Entry {
    fn new(writing: &mut BTreeSet<PathBuf>, path: &Path) -> Self {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
        writing.insert(path.clone());
        Self(path)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        writing().remove(&self.0);
    }
}

/// A file that is being written.
// Fields are dropped in this order: the file is gone before it is forgotten.
#[derive(Debug)]
pub(super) struct TemporaryFile {
    file: NamedTempFile,
    _entry: Entry,
}

impl TemporaryFile {
    /// A new file in the folder of `path`, to be renamed to it.
    pub(super) fn beside(path: &Path) -> io::Result<Self> {
        let folder = folder_of(path);
        remove_leftovers(folder);
        retry(|| {
            let mut writing = writing();
            let file = builder(0o666).tempfile_in(folder)?;
            if !hold(file.as_file(), file.path()) {
                return Ok(None);
            }
            let entry = Entry::new(&mut writing, file.path());
            Ok(Some(Self { file, _entry: entry }))
        })
    }

    pub(super) fn as_file_mut(&mut self) -> &mut File {
        self.file.as_file_mut()
    }

    /// Puts the file in place of any at `path`.
    pub(super) fn persist(self, path: &Path) -> io::Result<()> {
        let Self { file, _entry } = self;
        let writing = writing();
        let persisted = file.persist(path);
        drop(writing);
        persisted.map(drop).map_err(|e| e.error)
    }
}

/// A folder that is being written.
#[derive(Debug)]
pub(super) struct TemporaryFolder {
    folder: TempDir,
    /// Keeps the lock.
    _lock: Option<File>,
    _entry: Entry,
}

impl TemporaryFolder {
    /// A new folder in the folder of `path`, to be renamed to it.
    pub(super) fn beside(path: &Path) -> io::Result<Self> {
        let parent = folder_of(path);
        remove_leftovers(parent);
        retry(|| {
            let mut writing = writing();
            let folder = builder(0o777).tempdir_in(parent)?;
            // Folders cannot be opened everywhere; where they cannot, nothing locks.
            let lock = File::open(folder.path()).ok();
            if lock.as_ref().is_some_and(|lock| !hold(lock, folder.path())) {
                return Ok(None);
            }
            let entry = Entry::new(&mut writing, folder.path());
            Ok(Some(Self { folder, _lock: lock, _entry: entry }))
        })
    }

    pub(super) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Puts the folder at `path`, in place of any empty folder there.
    pub(super) fn persist(self, path: &Path) -> io::Result<()> {
        let Self { mut folder, _lock, _entry } = self;
        let writing = writing();
        // Not every system replaces an empty folder.
        let persisted = match path.is_dir() {
            true => fs::remove_dir(path),
            false => Ok(()),
        };
        let persisted = persisted.and_then(|()| fs::rename(folder.path(), path));
        folder.disable_cleanup(persisted.is_ok());
        drop(writing);
        persisted
    }
}

/// The folder that a file or folder of this path is in.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes names of this module.
fn builder(mode: u32) -> Builder<'static, 'static> {
    let mut builder = Builder::new();
    // Temporary files are private by default; these are to be like any others, as far as the umask allows.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
    #[cfg(not(unix))]
    let _ = mode;
    builder.prefix(PREFIX).rand_bytes(RANDOM);
    builder
}

/// Whether a file's name is one of this module.
#[cfg(unix)]
fn is_temporary(name: &str) -> bool {
    let random = name.strip_prefix(PREFIX);
    random.is_some_and(|random| random.len() == RANDOM && random.bytes().all(|c| c.is_ascii_alphanumeric()))
}

/// Calls `make` until it makes something.
fn retry<T>(make: impl Fn() -> io::Result<Option<T>>) -> io::Result<T> {
    for _ in 0..TRIES {
        if let Some(made) = make()? {
            return Ok(made);
        }
    }
    Err(io::Error::other("temporary files are removed as soon as they are made"))
}

/// Locks what was just made at `path`. False if another process took it for a leftover before that and removed it.
/// Where there are no locks nobody removes it.
#[cfg(unix)]
fn hold(file: &File, path: &Path) -> bool {
    file.lock().is_err() || is_at(file, path)
}

#[cfg(not(unix))]
fn hold(_: &File, _: &Path) -> bool {
    true
}

/// Whether an open file is the one at `path`.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let same = |a: fs::Metadata, b: fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    file.metadata().ok().zip(fs::symlink_metadata(path).ok()).is_some_and(|(a, b)| same(a, b))
}

/// Removes what processes that are gone left in a folder. What cannot be removed stays, as it hinders nobody.
#[cfg(unix)]
fn remove_leftovers(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        if !is_temporary(&entry.file_name().to_string_lossy()) || !(kind.is_file() || kind.is_dir()) {
            continue;
        }
        let path = entry.path();
        let Ok(file) = File::open(&path) else { continue };
        // Whoever made it in this moment looks again once it has the lock.
        if file.try_lock().is_ok() && is_at(&file, &path) {
            let _ = if kind.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }
}

#[cfg(not(unix))]
fn remove_leftovers(_: &Path) {}

#[cfg(all(test, unix))]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn leftovers_go_and_what_is_being_written_stays() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at(".sparse24-unfinished-aB3dE6aB3dE6aB3d/1_Pooling")).unwrap();
        fs::write(at(".sparse24-unfinished-aB3dE6aB3dE6aB3d/model.safetensors"), "left").unwrap();
        fs::write(at(".sparse24-unfinished-0000000000000000"), "left").unwrap();
        // Names that only look like it, and links, are somebody else's.
        fs::create_dir(at("elsewhere")).unwrap();
        fs::create_dir(at(".sparse24-tuning")).unwrap();
        fs::write(at(".sparse24-unfinished-abcdefgh-jklmnop"), "").unwrap();
        fs::write(at(".sparse24-unfinished-work"), "").unwrap();
        std::os::unix::fs::symlink(at("elsewhere"), at(".sparse24-unfinished-link000000000000")).unwrap();
        let theirs = [
            ".sparse24-tuning",
            ".sparse24-unfinished-abcdefgh-jklmnop",
            ".sparse24-unfinished-link000000000000",
            ".sparse24-unfinished-work",
            "elsewhere",
        ];
        let names = || {
            let mut names: Vec<_> =
                fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };

        let one = TemporaryFolder::beside(&at("out")).unwrap();
        let name = one.path().file_name().unwrap().to_str().unwrap().to_owned();
        let mut expected: Vec<_> = theirs.iter().map(|&n| n.to_owned()).chain([name.clone()]).collect();
        expected.sort();
        assert_eq!(names(), expected);
        // Others begin and end meanwhile, in any order.
        let two = TemporaryFile::beside(&at("file")).unwrap();
        let three = TemporaryFolder::beside(&at("other")).unwrap();
        assert!(one.path().is_dir() && two.file.path().is_file() && writing().len() >= 3);
        drop(three);
        two.persist(&at("file")).unwrap();
        let _ = TemporaryFile::beside(&at("third")).unwrap();
        fs::write(one.path().join("in it"), "").unwrap();
        one.persist(&at("out")).unwrap();
        assert!(at("out/in it").is_file() && at("file").is_file());
        assert!(!at(&name).exists() && !writing().contains(&at(&name)));
        assert_eq!(names().len(), theirs.len() + 2);
        // A folder that has something in it is not replaced, and nothing is left.
        let full = TemporaryFolder::beside(&at("out")).unwrap();
        assert!(full.persist(&at("out")).is_err() && at("out/in it").is_file());
        assert_eq!(names().len(), theirs.len() + 2);
    }
}
