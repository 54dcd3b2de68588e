//! From what the user named (files, folders, globs) to a sorted list of text files.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::Metadata;
use std::path::{Component, Path, PathBuf};
use std::time::UNIX_EPOCH;

use globset::GlobBuilder;
use serde::{Deserialize, Serialize};
use walkdir::WalkDir;

use super::DataError;

/// How a file's bytes are packed, by its last extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// As they are.
    None,
    /// `.gz`, one or more members.
    Gzip,
    /// `.zst`, one or more frames.
    Zstd,
}

/// What a file's text is, by its extension below the compression's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// The whole file is one document.
    Text,
    /// `.jsonl` or `.ndjson`: each line is an object with one document in its text field.
    JsonLines,
    /// `.parquet`: each row has one document in its text column.
    Parquet,
}

/// One file of the data set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFile {
    /// Absolute, as named or found (symbolic links kept).
    pub path: PathBuf,
    /// Bytes on disk.
    pub size: u64,
    /// Nanoseconds since 1970 of the last change; 0 where the file system does not say.
    pub mtime: u64,
    /// How its text is laid out.
    pub format: Format,
    /// How its bytes are packed.
    pub compression: Compression,
    /// Named by itself rather than found in a folder or by a glob: then binary content is an error, not passed over.
    pub named: bool,
}

/// Lists the text files behind `inputs`, sorted by path, each file once however often it was named.
///
/// An input is a file, a folder or a glob (`*`, `?`, `[..]`, `{..}`, `**`; quote it from the shell). Folders are
/// searched recursively and, like globs, pass over names that start with a dot, dangling links and link loops.
/// `extensions` (with or without the leading dot, `jsonl` also matches `a.jsonl.zst`) filters folders; empty takes
/// all files. Binary files found here are recognised, and passed over, when they are read.
///
/// # Errors
/// [`DataError::Missing`], [`DataError::Pattern`], [`DataError::NoFiles`] (naming the extensions there were),
/// [`DataError::Read`] for a folder or file that cannot be looked at.
pub fn find(inputs: &[PathBuf], extensions: &[String]) -> Result<Vec<SourceFile>, DataError> {
    let wanted: Vec<String> = extensions.iter().map(|e| e.trim_start_matches('.').to_owned()).collect();
    let mut found = BTreeMap::new();
    let mut seen = BTreeMap::<String, u64>::new();
    for input in inputs {
        let path = std::path::absolute(input).map_err(|e| DataError::read(input, e))?;
        match path.metadata() {
            Ok(m) if m.is_dir() => walk(&path, false, &mut |file, metadata| {
                let name = file.file_name().unwrap_or_default();
                *seen.entry(extension_of(name)).or_default() += 1;
                if wanted.is_empty() || wanted.iter().any(|w| has_extension(name, w)) {
                    insert(&mut found, file, metadata, false);
                }
            })?,
            Ok(m) => insert(&mut found, &path, &m, true),
            Err(_) if is_pattern(input) => expand(input, &path, &mut |file, metadata| {
                insert(&mut found, file, metadata, false);
            })?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(DataError::Missing { path: input.clone() });
            }
            Err(e) => return Err(DataError::read(input, e)),
        }
    }
    let mut once = BTreeSet::new();
    let mut files: Vec<SourceFile> = found.into_values().collect();
    files.retain(|f| once.insert(f.path.canonicalize().unwrap_or_else(|_| f.path.clone())));
    if files.is_empty() {
        return Err(DataError::NoFiles { inputs: join(inputs), wanted, seen: describe(&seen) });
    }
    Ok(files)
}

/// The inputs as a person would list them.
pub(super) fn join<P: AsRef<Path>>(inputs: &[P]) -> String {
    const SHOWN: usize = 4;
    let mut text =
        inputs.iter().take(SHOWN).map(|p| format!("`{}`", p.as_ref().display())).collect::<Vec<_>>().join(", ");
    if inputs.len() > SHOWN {
        text += &format!(" and {} more", inputs.len() - SHOWN);
    }
    text
}

fn insert(found: &mut BTreeMap<PathBuf, SourceFile>, path: &Path, metadata: &Metadata, named: bool) {
    let mtime = metadata.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    let (compression, format) = kind_of(path);
    let file = SourceFile {
        path: path.to_owned(),
        size: metadata.len(),
        mtime: mtime.map_or(0, |t| t.as_nanos() as u64),
        format,
        compression,
        named,
    };
    found.entry(path.to_owned()).and_modify(|f| f.named |= named).or_insert(file);
}

fn kind_of(path: &Path) -> (Compression, Format) {
    let is = |path: &Path, names: &[&str]| {
        path.extension().and_then(OsStr::to_str).is_some_and(|e| names.contains(&e.to_ascii_lowercase().as_str()))
    };
    let compression = match () {
        () if is(path, &["gz"]) => Compression::Gzip,
        () if is(path, &["zst"]) => Compression::Zstd,
        () => Compression::None,
    };
    let inner = if compression == Compression::None { path.to_owned() } else { path.with_extension("") };
    let format = match () {
        () if is(&inner, &["jsonl", "ndjson"]) => Format::JsonLines,
        () if is(&inner, &["parquet"]) => Format::Parquet,
        () => Format::Text,
    };
    (compression, format)
}

fn has_extension(name: &OsStr, wanted: &str) -> bool {
    let name = name.to_string_lossy();
    let inner = name.strip_suffix(".gz").or(name.strip_suffix(".zst")).unwrap_or(&name);
    [&name, inner].iter().any(|n| n.strip_suffix(wanted).is_some_and(|stem| stem.ends_with('.') && stem.len() > 1))
}

fn extension_of(name: &OsStr) -> String {
    let name = name.to_string_lossy();
    let inner = name.strip_suffix(".gz").or(name.strip_suffix(".zst")).unwrap_or(&name);
    match inner.rsplit_once('.') {
        Some((stem, _)) => name[stem.len()..].to_owned(),
        None => "no extension".to_owned(),
    }
}

/// The extensions that were there, most frequent first, so that a wrong filter is seen at a glance.
fn describe(seen: &BTreeMap<String, u64>) -> String {
    if seen.is_empty() {
        return "there are no files at all (hidden ones are passed over)".to_owned();
    }
    let mut by_count: Vec<_> = seen.iter().collect();
    by_count.sort_by_key(|(name, count)| (std::cmp::Reverse(**count), *name));
    let shown: Vec<_> = by_count.iter().take(10).map(|(name, count)| format!("{name} ({count})")).collect();
    format!("extensions seen: {}", shown.join(", "))
}

fn walk(root: &Path, hidden: bool, take: &mut dyn FnMut(&Path, &Metadata)) -> Result<(), DataError> {
    let entries = WalkDir::new(root)
        .follow_links(true) // data sets kept as links into a store of blobs are common
        .into_iter()
        .filter_entry(|e| hidden || e.depth() == 0 || !is_hidden(e.file_name()));
    for entry in entries {
        let entry = match entry {
            Ok(entry) => entry,
            Err(e) if e.loop_ancestor().is_some() => continue,
            // A dangling link, or a file deleted while the folder is read.
            Err(e) if e.depth() > 0 && e.io_error().is_some_and(|e| e.kind() == std::io::ErrorKind::NotFound) => {
                continue;
            }
            Err(e) => {
                let path = e.path().unwrap_or(root).to_owned();
                return Err(DataError::Read { path, source: e.into() });
            }
        };
        if entry.file_type().is_file() {
            let metadata = entry.metadata().map_err(|e| DataError::read(entry.path(), e.into()))?;
            take(entry.path(), &metadata);
        }
    }
    Ok(())
}

fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

fn is_pattern(path: &Path) -> bool {
    path.to_string_lossy().contains(['*', '?', '[', '{'])
}

/// Walks from the last folder that the pattern names literally and takes the files that match as a whole.
fn expand(input: &Path, absolute: &Path, take: &mut dyn FnMut(&Path, &Metadata)) -> Result<(), DataError> {
    let bad = |e: globset::Error| DataError::Pattern { pattern: input.display().to_string(), problem: e.to_string() };
    let glob = GlobBuilder::new(&absolute.to_string_lossy()).literal_separator(true).build().map_err(bad)?;
    let matcher = glob.compile_matcher();
    let literal = |c: &Component| !is_pattern(Path::new(c));
    let root: PathBuf = absolute.components().take_while(literal).collect();
    // As in a shell, a dot at the start of a name is matched only by a dot in the pattern.
    let hidden = absolute.components().skip_while(literal).any(|c| is_hidden(c.as_os_str()));
    let mut any = false;
    if root.is_dir() {
        walk(&root, hidden, &mut |file, metadata| {
            if matcher.is_match(file) {
                any = true;
                take(file, metadata);
            }
        })?;
    }
    if any { Ok(()) } else { Err(DataError::Missing { path: input.to_owned() }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn tree() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b.txt", "a.md", "sub/c.rs", "sub/d.jsonl.zst", "sub/deep/e.txt.gz", ".hidden.txt", ".git/x.txt"] {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        folder
    }

    fn names(root: &Path, inputs: &[&str], extensions: &[&str]) -> Result<Vec<String>, DataError> {
        let inputs: Vec<_> = inputs.iter().map(|i| root.join(i)).collect();
        let extensions: Vec<_> = extensions.iter().map(|e| e.to_string()).collect();
        let files = find(&inputs, &extensions)?;
        Ok(files.iter().map(|f| f.path.strip_prefix(root).unwrap().display().to_string()).collect())
    }

    #[test]
    fn folder_is_listed_sorted_without_hidden_names() {
        let root = tree();
        let all = names(root.path(), &[""], &[]).unwrap();
        assert_eq!(all, ["a.md", "b.txt", "sub/c.rs", "sub/d.jsonl.zst", "sub/deep/e.txt.gz"]);
    }

    #[test]
    fn extension_filter_looks_below_the_compression() {
        let root = tree();
        assert_eq!(
            names(root.path(), &[""], &["jsonl", ".txt"]).unwrap(),
            ["b.txt", "sub/d.jsonl.zst", "sub/deep/e.txt.gz"]
        );
        assert_eq!(names(root.path(), &[""], &["jsonl.zst"]).unwrap(), ["sub/d.jsonl.zst"]);
    }

    #[test]
    fn file_named_twice_comes_once_and_stays_named() {
        let root = tree();
        let inputs = [root.path().join("b.txt"), root.path().to_owned(), root.path().join("sub/../b.txt")];
        let files = find(&inputs, &["txt".into()]).unwrap();
        assert_eq!(files.len(), 2);
        assert!(files[0].named && files[0].path.ends_with("b.txt"));
    }

    #[test]
    fn glob_matches_across_folders_but_not_hidden_names() {
        let root = tree();
        assert_eq!(names(root.path(), &["*.txt"], &[]).unwrap(), ["b.txt"]);
        assert_eq!(names(root.path(), &["**/*.{rs,md}"], &[]).unwrap(), ["a.md", "sub/c.rs"]);
        assert_eq!(names(root.path(), &[".git/*", ".h*"], &[]).unwrap(), [".git/x.txt", ".hidden.txt"]);
    }

    #[test]
    fn kinds_come_from_the_extensions() {
        let kind = |name: &str| kind_of(Path::new(name));
        assert_eq!(kind("a.jsonl.zst"), (Compression::Zstd, Format::JsonLines));
        assert_eq!(kind("a.JSONL"), (Compression::None, Format::JsonLines));
        assert_eq!(kind("a.txt.gz"), (Compression::Gzip, Format::Text));
        assert_eq!(kind("a.parquet"), (Compression::None, Format::Parquet));
        assert_eq!(kind("Makefile"), (Compression::None, Format::Text));
    }

    #[test]
    fn missing_path_and_unmatched_glob_are_named() {
        let root = tree();
        for input in ["nope.txt", "*.nope"] {
            let error = names(root.path(), &[input], &[]).unwrap_err();
            assert!(matches!(&error, DataError::Missing { path } if path.ends_with(input)), "{error}");
        }
    }

    #[test]
    fn unmatched_filter_says_which_extensions_there_were() {
        let root = tree();
        let error = names(root.path(), &[""], &["py"]).unwrap_err().to_string();
        assert!(
            error.contains("with extension py") && error.contains(".jsonl.zst (1)") && error.contains(".rs (1)"),
            "{error}"
        );
        let empty = tempfile::tempdir().unwrap();
        let error = names(empty.path(), &[""], &[]).unwrap_err().to_string();
        assert!(error.contains("no files at all"), "{error}");
    }

    #[test]
    fn bad_glob_is_a_named_error() {
        let root = tree();
        let error = names(root.path(), &["a[.txt"], &[]).unwrap_err();
        assert!(matches!(error, DataError::Pattern { .. }), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn link_loops_and_dangling_links_are_passed_over() {
        let root = tree();
        std::os::unix::fs::symlink(root.path(), root.path().join("loop")).unwrap();
        std::os::unix::fs::symlink("gone", root.path().join("dangling.txt")).unwrap();
        assert_eq!(names(root.path(), &[""], &["txt"]).unwrap(), ["b.txt", "sub/deep/e.txt.gz"]);
    }

    #[test]
    fn path_below_a_file_is_an_error_and_no_panic() {
        let root = tree();
        let error = names(root.path(), &["b.txt/below"], &[]).unwrap_err();
        assert!(matches!(error, DataError::Read { .. }), "{error}");
    }
}
