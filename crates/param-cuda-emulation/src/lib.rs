//! PARAM's CUDA kernels on the CPU, behind a `libcuda.so` of its own, so that the host code that drives a GPU runs in ordinary tests.
//!
//! [`preload`] puts the library where cudarc finds it; from then on the process has a GPU of 4 multiprocessors. A child process finds
//! it through `LD_LIBRARY_PATH` ([`folder`]). Every CUDA thread is a fiber; blocks of an ordinary launch run one after another, those of
//! a cooperative launch together. Shared memory is poisoned with `0xCD`, device memory with NaN; a `copy_async` happens at the wait that
//! covers it, or never; a product by a warpgroup at once or at the wait that covers it, by the schedule, and what it reads must have been
//! copied before an `async_proxy_fence` of who copied it (ordinary writes to shared memory are not followed). A launch whose threads wait
//! for each other for ever, or meet at different places, fails with `CUDA_ERROR_LAUNCH_TIMEOUT` and says on stderr who waits where
//! ([`last_fault`]).
//!
//! The environment variable `PARAM_EMULATED_CUDA` (or [`configure`]) plays failures, separated by commas:
//! `no-device` (there are none), `no-device-error` (`cuInit` says so), `version=11040` (an old driver), `memory=BYTES` (of the device),
//! `fail=cuLaunchKernel` or `fail=cuLaunchKernel:3` (that call fails, or fails from the third on), `capability=70`,
//! `schedule=ascending|reversed|seed:N` (which thread runs when several could).

#[allow(dead_code)]
mod source;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};
use std::ffi::{CStr, CString, c_char, c_int};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// The library, by its full path.
pub const LIBRARY: &str = concat!(env!("PARAM_EMULATION_OUT"), "/libcuda.so");

/// A driver too old to have more than `cuInit` and `cuDriverGetVersion`, by its full path.
pub const OLD_LIBRARY: &str = concat!(env!("PARAM_EMULATION_OUT"), "/old/libcuda.so");

const OUT: &str = env!("PARAM_EMULATION_OUT");

fn cxx() -> source::Compiler {
    env!("PARAM_EMULATION_CXX").split('\t').map(str::to_owned).collect()
}

/// The folder of [`LIBRARY`], for `LD_LIBRARY_PATH` of a child process.
pub fn folder() -> &'static Path {
    Path::new(OUT)
}

/// The folder of [`OLD_LIBRARY`].
pub fn old_folder() -> PathBuf {
    Path::new(OUT).join("old")
}

/// Whether a real GPU takes the emulation's place, as `PARAM_GPU=1` says: then nothing of the emulation is loaded, schedules change
/// nothing, and failures cannot be played.
pub fn is_real() -> bool {
    std::env::var_os("PARAM_GPU").is_some()
}

/// Loads the emulation into this process, unless a real GPU [takes its place](is_real), for good: whoever asks for `libcuda.so` afterwards gets it. Call it before anything looks for
/// a GPU; a second call does nothing. The environment variable `PARAM_EMULATION_LIBRARY` names another library to load instead, such as
/// one built for AddressSanitizer.
///
/// # Panics
/// If the library cannot be loaded.
pub fn preload() {
    if !is_real() {
        library();
    }
}

/// [`preload`]s, and loads an emulated `libcublasLt.so` besides, for good.
///
/// # Panics
/// If a library cannot be loaded.
pub fn preload_cublaslt() {
    static LOADED: OnceLock<Library> = OnceLock::new();
    preload();
    if !is_real() {
        let path = folder().join("libcublasLt.so");
        // SAFETY: the library has no constructors; what it calls of the driver was loaded before.
        let open = || unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) };
        LOADED.get_or_init(|| open().unwrap_or_else(|e| panic!("{}: {e}", path.display())));
    }
}

fn library() -> &'static Library {
    static LOADED: OnceLock<Library> = OnceLock::new();
    LOADED.get_or_init(|| {
        let path = std::env::var("PARAM_EMULATION_LIBRARY").unwrap_or_else(|_| LIBRARY.to_owned());
        // SAFETY: the library's constructors fill its table of kernels and read one environment variable.
        unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) }.unwrap_or_else(|e| panic!("{path}: {e}"))
    })
}

/// Plays these failures from now on in the whole process, instead of those of `PARAM_EMULATED_CUDA`.
///
/// # Panics
/// If the text is not understood.
pub fn configure(text: &str) {
    let c = CString::new(text).unwrap_or_default();
    // SAFETY: the library defines the function with this type.
    let done = unsafe {
        let f: Symbol<unsafe extern "C" fn(*const c_char) -> c_int> = symbol("param_emulation_configure");
        f(c.as_ptr())
    };
    assert!(done != 0, "PARAM_EMULATED_CUDA does not know `{text}`");
}

/// The order in which the threads of a kernel run, wherever they could run at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// The lowest thread of the lowest warp first.
    Ascending,
    /// The highest thread of the highest warp first, blocks too.
    Reversed,
    /// Another one for every seed.
    Seed(u64),
}

impl Schedule {
    /// Those that tests run a kernel under, unless they have reason for more.
    pub const ALL: [Schedule; 4] = [Schedule::Ascending, Schedule::Reversed, Schedule::Seed(1), Schedule::Seed(2)];
}

impl std::fmt::Display for Schedule {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Schedule::Ascending => f.write_str("ascending"),
            Schedule::Reversed => f.write_str("reversed"),
            Schedule::Seed(n) => write!(f, "seed:{n}"),
        }
    }
}

/// Runs what the calling thread launches by this schedule, from now on; `None` leaves it to the environment again.
pub fn schedule(schedule: Option<Schedule>) {
    if is_real() {
        return;
    }
    let text = schedule.map(|s| CString::new(s.to_string()).unwrap_or_default());
    // SAFETY: the library defines the function with this type; null is allowed.
    unsafe {
        let f: Symbol<unsafe extern "C" fn(*const c_char) -> c_int> = symbol("param_emulation_schedule");
        f(text.as_ref().map_or(std::ptr::null(), |t| t.as_ptr()));
    }
}

/// What was wrong with the calling thread's last launch; empty if nothing.
pub fn last_fault() -> String {
    if is_real() {
        return String::new();
    }
    // SAFETY: the library defines the function with this type; the text lives until the thread's next launch.
    unsafe {
        let f: Symbol<unsafe extern "C" fn() -> *const c_char> = symbol("param_emulation_last_fault");
        CStr::from_ptr(f()).to_string_lossy().into_owned()
    }
}

/// Bytes of device memory that are allocated now.
pub fn bytes_used() -> u64 {
    // SAFETY: the library defines the function with this type.
    unsafe {
        let f: Symbol<unsafe extern "C" fn() -> u64> = symbol("param_emulation_bytes_used");
        f()
    }
}

/// # Safety
/// `T` must be the type of the function.
unsafe fn symbol<T>(name: &str) -> Symbol<T> {
    // SAFETY: as this function's own contract says.
    unsafe { library().get(name.as_bytes()) }.unwrap_or_else(|e| panic!("{LIBRARY}: {e}"))
}

/// Builds the library anew with one kernel file changed, for tests of the tests: `edit` gets the text of `kernel_file` (a path, or the
/// name of a file of param-cuda's kernels) and gives what to compile. With `sanitize`, everything is compiled for AddressSanitizer, and
/// the process that loads it needs [`sanitizer`] in `LD_PRELOAD`. A file that is not among param-cuda's kernels stands for itself
/// alone.
///
/// # Panics
/// If the compiler refuses, or `edit` changed nothing in a file of param-cuda's.
pub fn build_variant(kernel_file: impl AsRef<Path>, edit: impl Fn(&str) -> String, sanitize: bool) -> PathBuf {
    let asked = kernel_file.as_ref();
    try_variant(asked, &edit, sanitize).unwrap_or_else(|e| panic!("{}: {e}", asked.display()))
}

/// Fails unless `test` of the calling test binary fails with each of `edits` to a kernel file alone: a text that stands there once, and what
/// takes its place. A test of the tests.
///
/// # Panics
/// If an edit goes unnoticed, its text stands there never or more than once, or the compiler refuses.
pub fn assert_noticed(kernel_file: &str, edits: &[(&str, &str)], test: &str) {
    for (with, without) in edits {
        let edit = |text: &str| {
            assert_eq!(text.matches(with).count(), 1, "{with}");
            text.replace(with, without)
        };
        let library = build_variant(kernel_file, edit, false);
        let binary = std::env::current_exe().unwrap_or_else(|e| panic!("the test binary: {e}"));
        let mut command = std::process::Command::new(binary);
        let output = command.args(["--exact", test]).env("PARAM_EMULATION_LIBRARY", library).output();
        let output = output.unwrap_or_else(|e| panic!("{test}: {e}"));
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success() && said.contains("1 failed"), "nothing was noticed without {with}: {said}");
    }
}

fn try_variant(asked: &Path, edit: &dyn Fn(&str) -> String, sanitize: bool) -> Result<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (cpp, kernels) = (root.join("cpp"), root.with_file_name("param-cuda").join("kernels"));
    let own = kernels.join(asked);
    let (file, ours) =
        if asked.components().count() == 1 && own.exists() { (own, true) } else { (asked.to_owned(), false) };
    let text = read(&file)?;
    let edited = edit(&text);
    if ours && edited == text && !sanitize {
        return Err("the edit changed nothing".into());
    }
    // What it is made of names its folder, so that it is made once.
    let mut hasher = std::hash::DefaultHasher::new();
    (sanitize, &file, &edited).hash(&mut hasher);
    let mut sources = files(&cpp)?;
    sources.extend(files(&kernels)?);
    for source in &sources {
        read(source)?.hash(&mut hasher);
    }
    include_str!("source.rs").hash(&mut hasher);
    let folder = Path::new(OUT).join(format!("variant-{:016x}", hasher.finish()));
    let library = folder.join("libcuda.so");
    if library.exists() {
        return Ok(library);
    }
    static N: AtomicU32 = AtomicU32::new(0);
    let n = N.fetch_add(1, Ordering::Relaxed);
    let new = Path::new(OUT).join(format!("new-{}-{n}", std::process::id()));
    std::fs::create_dir_all(&new).map_err(|e| e.to_string())?;
    let made = make_variant(&cpp, &kernels, &file, &edited, ours, sanitize, &new);
    // Another process may have been faster.
    let moved = made.is_ok() && std::fs::rename(&new, &folder).is_ok();
    if !moved {
        let _ = std::fs::remove_dir_all(&new);
    }
    made.map(|()| library)
}

fn make_variant(
    cpp: &Path,
    kernels: &Path,
    file: &Path,
    text: &str,
    ours: bool,
    sanitize: bool,
    folder: &Path,
) -> Result<(), String> {
    let cxx = cxx();
    let mut objects = vec![folder.join("variant.o")];
    source::compile_kernels(&cxx, cpp, kernels, file, text, &objects[0], sanitize)?;
    for stem in source::ENGINE {
        let object = match sanitize {
            true => folder.join(stem).with_extension("o"),
            false => Path::new(OUT).join("emulation").join(stem).with_extension("o"),
        };
        if sanitize {
            source::compile(&cxx, &cpp.join(stem).with_extension("cpp"), &object, true)?;
        }
        objects.push(object);
    }
    let others = files(kernels)?.into_iter().filter(|f| f.extension().is_some_and(|e| e == "cu") && f != file);
    for other in others.filter(|_| ours) {
        let Some(stem) = other.file_stem() else { continue };
        let object = match sanitize {
            true => folder.join(stem).with_extension("o"),
            false => Path::new(OUT).join("kernels").join(stem).with_extension("o"),
        };
        if sanitize {
            source::compile_kernels(&cxx, cpp, kernels, &other, &read(&other)?, &object, true)?;
        }
        objects.push(object);
    }
    source::link(&cxx, &objects, &folder.join("libcuda.so"), sanitize)
}

fn read(file: &Path) -> Result<String, String> {
    std::fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))
}

fn files(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    files.sort();
    Ok(files)
}

/// The run-time library of AddressSanitizer, which a process must have in `LD_PRELOAD` to load a variant built for it; `None` if the
/// compiler has none.
pub fn sanitizer() -> Option<PathBuf> {
    ["libasan.so", "libclang_rt.asan-x86_64.so", "libclang_rt.asan.so"].into_iter().find_map(|name| {
        let cxx = cxx();
        let output = std::process::Command::new(&cxx[0]).arg(format!("-print-file-name={name}")).output().ok()?;
        let path = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
        path.is_absolute().then_some(path)
    })
}
