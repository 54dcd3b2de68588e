//! Machines as users have them: without a driver, with an old one, without a GPU, with one that is full or fails. Each in a process of
//! its own, which must say what is wrong in a sentence, and never panic.

use std::path::{Path, PathBuf};
use std::process::Command;

use param_cuda::{Error, Event, Grid, Module, NoGpu, Stream, args, open};
use param_cuda_emulation::{build_variant, old_folder};

/// The emulated driver with one small kernel.
fn driver() -> PathBuf {
    let kernel = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/driver/add.cu");
    build_variant(kernel, str::to_owned, false).parent().map(Path::to_owned).unwrap_or_default()
}

/// What a process prints that finds its driver in `folder`, played as `settings` say; panics where it does.
fn said(folder: Option<&Path>, settings: &str) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "works", "--ignored", "--nocapture"]);
    command.env_remove("LD_LIBRARY_PATH").env_remove("LD_PRELOAD").env("PARAM_EMULATED_CUDA", settings);
    if let Some(folder) = folder {
        command.env("LD_LIBRARY_PATH", folder);
    }
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{settings}: {text}{}", String::from_utf8_lossy(&output.stderr));
    let said = text.lines().find_map(|line| line.split_once("said: ")).map(|(_, said)| said.to_owned());
    said.unwrap_or_else(|| panic!("{settings}: {text}"))
}

/// Everything the crate does with a GPU, once.
fn work() -> Result<(), String> {
    let gpu = open().map_err(|no: NoGpu| no.to_string())?;
    let used = || -> Result<(), Error> {
        let (_, total) = gpu.memory()?;
        assert!(total > 0);
        let stream = Stream::new(&gpu)?;
        let mut buffer = gpu.upload::<u32>("numbers", &[7; 1000])?;
        let module = Module::load(&gpu, "// emulation")?;
        let add = module.kernel("add")?;
        add.allow_shared(64 << 10)?;
        assert_eq!(add.blocks_per_multiprocessor(256, 0)?, 1);
        let grid = Grid { blocks: [4, 1, 1], threads: 256, shared: 0 };
        let start = Event::record(&stream)?;
        let args = args![buffer, 1000u32, 3u32];
        // SAFETY: the arguments are the kernel's; the buffer is as long as they say.
        unsafe { add.launch(&stream, grid, &args)? };
        // SAFETY: as above.
        unsafe { add.launch_cooperative(&stream, grid, &args)? };
        assert!(Event::record(&stream)?.seconds_since(&start)? >= 0.0);
        // SAFETY: as above.
        let graph = stream.capture(|stream| unsafe { add.launch(stream, grid, &args) })?;
        // SAFETY: the buffer lives.
        unsafe { graph.launch(&stream)? };
        stream.synchronize()?;
        assert!(buffer.to_vec()?.iter().all(|&x| x == 16));
        let mut pinned = gpu.pinned::<u32>("a few numbers", 10)?;
        // SAFETY: waited for before anything is touched.
        unsafe { stream.read_later(buffer.view().part(990..1000), &mut pinned)? };
        // SAFETY: as above.
        unsafe { stream.write_later(&pinned, buffer.view().part(0..10))? };
        stream.synchronize()?;
        stream.zero(buffer.view())?;
        buffer.write(5, &[1])?;
        assert_eq!((buffer.to_vec()?[5], pinned[0]), (1, 16));
        Ok(())
    };
    used().map_err(|error| error.to_string())
}

#[test]
#[ignore = "runs in processes of the other tests"]
fn works() {
    println!("said: {}", work().err().unwrap_or_else(|| "all is well".into()));
}

#[test]
fn a_gpu_works() {
    let driver = driver();
    for schedule in ["ascending", "reversed", "seed:1"] {
        assert_eq!(said(Some(&driver), &format!("schedule={schedule}")), "all is well");
    }
}

#[test]
fn without_a_driver() {
    let said = said(None, "");
    // A machine that has one may say anything else.
    let has_driver = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib/aarch64-linux-gnu", "/usr/lib/wsl/lib"]
        .iter()
        .any(|folder| Path::new(folder).join("libcuda.so.1").exists());
    assert!(has_driver || said == "no NVIDIA driver was found (libcuda is missing)", "{said}");
}

#[test]
fn with_a_driver_that_is_too_old() {
    let old = "the NVIDIA driver is too old: ";
    assert_eq!(said(Some(&old_folder()), ""), format!("{old}it lacks `cuCtxGetCurrent`"));
    let want = format!("{old}it supports CUDA 11.4, at least 12.0 is needed");
    assert_eq!(said(Some(&driver()), "version=11040"), want);
}

#[test]
fn without_a_gpu() {
    let driver = driver();
    for settings in ["no-device", "no-device-error"] {
        assert_eq!(said(Some(&driver), settings), "the NVIDIA driver finds no GPU");
    }
}

#[test]
fn with_a_gpu_that_is_too_old() {
    let want = "the GPU, Emulated GPU, is too old: its compute capability is 7.0, at least 8.0 is needed";
    assert_eq!(said(Some(&driver()), "capability=70"), want);
}

#[test]
fn with_a_gpu_that_is_full() {
    let driver = driver();
    let want = "out of memory on the GPU: numbers needs 4000 bytes, 3000 of 3000 are free";
    assert_eq!(said(Some(&driver), "memory=3000"), want);
}

#[test]
fn with_a_call_that_fails() {
    let driver = driver();
    let unknown = "failed: CUDA_ERROR_UNKNOWN: unknown error";
    let opening = [
        "cuInit",
        "cuDeviceGetCount",
        "cuDeviceGet",
        "cuDeviceGetName",
        "cuDeviceGetAttribute",
        "cuDevicePrimaryCtxRetain",
    ];
    for call in opening {
        assert_eq!(said(Some(&driver), &format!("fail={call}")), format!("the GPU cannot be opened: {call} {unknown}"));
    }
    let working = [
        "cuCtxSetCurrent",
        "cuMemGetInfo",
        "cuStreamCreate",
        "cuMemAlloc",
        "cuMemsetD8Async",
        "cuStreamSynchronize",
        "cuMemcpyHtoDAsync",
        "cuModuleLoadData",
        "cuEventCreate",
        "cuEventRecord",
        "cuEventSynchronize",
        "cuEventElapsedTime",
        "cuStreamBeginCapture",
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags",
        "cuGraphLaunch",
        "cuMemcpyDtoHAsync",
        "cuMemAllocHost",
    ];
    let v2 = ["cuMem", "cuStreamBegin"];
    for call in working {
        let new = v2.iter().any(|p| call.starts_with(p)) && call != "cuMemsetD8Async";
        let symbol = format!("{call}{}", if new { "_v2" } else { "" });
        assert_eq!(said(Some(&driver), &format!("fail={symbol}")), format!("{call} {unknown}"));
    }
    let of_kernel = [
        "cuModuleGetFunction",
        "cuFuncSetAttribute",
        "cuOccupancyMaxActiveBlocksPerMultiprocessor",
        "cuLaunchKernel",
        "cuLaunchCooperativeKernel",
    ];
    for call in of_kernel {
        assert_eq!(said(Some(&driver), &format!("fail={call}")), format!("kernel `add`: {call} {unknown}"));
    }
    let nothing_to_be_done = [
        "cuDevicePrimaryCtxRelease_v2",
        "cuMemFree_v2",
        "cuMemFreeHost",
        "cuStreamDestroy_v2",
        "cuEventDestroy_v2",
        "cuModuleUnload",
        "cuGraphDestroy",
        "cuGraphExecDestroy",
        "cuDriverGetVersion",
    ];
    for call in nothing_to_be_done {
        assert_eq!(said(Some(&driver), &format!("fail={call}")), "all is well", "{call}");
    }
}
