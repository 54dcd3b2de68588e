//! Files and folders that appear whole or not at all: written beside their place, flushed to disk, renamed.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Suffix of what is still being written; anything so named is left over from a process that was killed.
pub const PARTIAL_SUFFIX: &str = ".partial";

/// Writes a file through `write` and puts it at `path` only once it is complete and on disk. On any error the file
/// that stood at `path` is untouched and nothing else is left. What is no regular file (a folder, a device) is not replaced.
pub fn write_file<T, E: From<io::Error>>(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<&File>) -> Result<T, E>,
) -> Result<T, E> {
    if path.metadata().is_ok_and(|there| !there.is_file()) {
        return Err(
            io::Error::new(io::ErrorKind::InvalidInput, "is there and is no regular file: it is not replaced").into()
        );
    }
    let temp = tempfile::Builder::new()
        .prefix(&format!(".{}", path.file_name().unwrap_or_default().to_string_lossy()))
        .suffix(PARTIAL_SUFFIX)
        .permissions_for_everyone()
        .tempfile_in(folder_of(path))?;
    let mut out = BufWriter::with_capacity(1 << 20, temp.as_file());
    let value = write(&mut out)?;
    out.flush()?;
    drop(out);
    temp.as_file().sync_all()?;
    temp.persist(path).map_err(|e| e.error)?;
    sync_folder(folder_of(path))?;
    Ok(value)
}

/// Fills a folder through `fill` and puts it at `path`, which must not exist yet, once all of it is on disk.
pub fn write_folder<T, E: From<io::Error>>(path: &Path, fill: impl FnOnce(&Path) -> Result<T, E>) -> Result<T, E> {
    if path.exists() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "the folder is already there").into());
    }
    let partial = partial_path(path);
    if partial.exists() {
        std::fs::remove_dir_all(&partial)?;
    }
    std::fs::create_dir_all(&partial)?;
    let finish = || {
        let value = fill(&partial)?;
        for entry in std::fs::read_dir(&partial)? {
            File::open(entry?.path())?.sync_all()?;
        }
        sync_folder(&partial)?;
        std::fs::rename(&partial, path)?;
        sync_folder(folder_of(path))?;
        Ok(value)
    };
    finish().inspect_err(|_| {
        // The first error is the one to report; what cannot be removed is recognisable by its suffix.
        let _ = std::fs::remove_dir_all(&partial);
    })
}

/// Makes `link` a symbolic link to `target` (relative to the link's folder), replacing the link that stood there.
#[cfg(unix)]
pub fn replace_link(link: &Path, target: &Path) -> io::Result<()> {
    let partial = partial_path(link);
    if partial.symlink_metadata().is_ok() {
        std::fs::remove_file(&partial)?;
    }
    std::os::unix::fs::symlink(target, &partial)?;
    std::fs::rename(&partial, link)?;
    sync_folder(folder_of(link))
}

fn partial_path(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(PARTIAL_SUFFIX);
    path.with_file_name(name)
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A rename survives a power cut only once the folder that holds the name is on disk as well.
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Temporary files are private by default; what we write is meant to be read like any other output.
trait PermissionsForEveryone {
    fn permissions_for_everyone(&mut self) -> &mut Self;
}

impl PermissionsForEveryone for tempfile::Builder<'_, '_> {
    #[cfg(unix)]
    fn permissions_for_everyone(&mut self) -> &mut Self {
        use std::os::unix::fs::PermissionsExt;
        self.permissions(std::fs::Permissions::from_mode(0o666)) // less what the umask takes away
    }
    #[cfg(not(unix))]
    fn permissions_for_everyone(&mut self) -> &mut Self {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names = std::fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect::<Vec<_>>();
        names.sort();
        names
    }

    #[test]
    fn failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        write_file(&path, |out| out.write_all(b"old")).unwrap();
        let error = write_file::<(), _>(&path, |out| {
            out.write_all(b"half")?;
            Err(io::Error::other("disk full"))
        });
        assert_eq!(error.unwrap_err().to_string(), "disk full");
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["a"]);
    }

    #[test]
    fn folders_and_devices_are_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let write = |path: &Path| write_file(path, |out| out.write_all(b"x")).unwrap_err().kind();
        assert_eq!(write(folder.path()), io::ErrorKind::InvalidInput);
        #[cfg(unix)]
        assert_eq!(write(Path::new("/dev/null")), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn failed_folder_leaves_nothing_and_a_stale_partial_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("step");
        std::fs::create_dir(folder.path().join("step.partial")).unwrap();
        std::fs::write(folder.path().join("step.partial/stale"), b"x").unwrap();
        write_folder::<(), io::Error>(&path, |_| Err(io::Error::other("no"))).unwrap_err();
        assert!(names(folder.path()).is_empty());
        write_folder(&path, |p| std::fs::write(p.join("fresh"), b"y")).unwrap();
        assert_eq!(names(&path), ["fresh"]);
        assert_eq!(write_folder(&path, |_| Ok::<_, io::Error>(())).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }

    #[cfg(unix)]
    #[test]
    fn link_moves_from_one_target_to_another() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("last");
        for target in ["a", "b"] {
            replace_link(&link, Path::new(target)).unwrap();
            assert_eq!(std::fs::read_link(&link).unwrap(), Path::new(target));
        }
        assert_eq!(names(folder.path()), ["last"]);
    }
}
