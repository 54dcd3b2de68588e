//! The driver's own manners: copies that leave an allocation, overwritten guards, graphs, settings, sources that are not understood.

use crate::args;
use crate::driver::{Driver, kernels, variant};
use crate::primitives::driver;
use param_cuda_emulation::{Schedule, build_variant};
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;

const INVALID_VALUE: i32 = 1;
const ILLEGAL_ADDRESS: i32 = 700;

#[test]
fn copies_stay_inside_allocations() {
    let d = driver();
    let p = d.upload(&[1u32; 16]);
    assert_eq!(d.write(p, &[2u32; 17]), INVALID_VALUE);
    assert_eq!(d.write(p + 4, &[2u32; 16]), INVALID_VALUE);
    assert_eq!(d.write(p - 4, &[2u32; 1]), INVALID_VALUE);
    assert_eq!(d.write(p + 60, &[2u32; 1]), 0);
    let fresh: Vec<f32> = d.read(d.alloc(64), 16);
    assert!(fresh.iter().all(|x| x.is_nan()));
    assert_eq!(d.free(p + 4), INVALID_VALUE);
    assert_eq!(d.free(p), 0);
    assert_eq!(d.free(p), INVALID_VALUE);
    assert_eq!(d.write(p, &[2u32; 1]), INVALID_VALUE);
}

#[test]
fn a_pointer_of_the_host_is_no_argument() {
    let (d, x) = (driver(), [0u32; 64]);
    let code = d.launch("barriers", [1, 1, 1], [32, 1, 1], 0, null_mut(), args![x.as_ptr() as u64, 1i32]);
    assert_eq!(code, ILLEGAL_ADDRESS);
}

#[test]
fn what_kills_a_process_ends_a_launch() {
    let d = driver();
    d.schedule(Schedule::Ascending);
    let out = d.upload(&[0u32; 64]);
    let misaligned = if cfg!(target_arch = "x86_64") { 716 } else { 0 };
    for (n, code, text) in [(0, ILLEGAL_ADDRESS, "address 0x54"), (1, misaligned, "vector"), (3u32, 0, "")] {
        assert_eq!(d.launch("wild", [1, 1, 1], [32, 1, 1], 0, null_mut(), args![out, n]), code);
        assert!(d.last_fault().contains(text), "{}", d.last_fault());
    }
    let zero = d.upload(&[0u32]);
    assert_eq!(d.launch("endless", [1, 1, 1], [32, 1, 1], 0, null_mut(), args![zero]), 702);
    assert!(d.last_fault().contains("for ever"));
    assert_eq!(d.launch("barriers", [1, 1, 1], [32, 1, 1], 0, null_mut(), args![out, 9i32]), 0);
}

#[test]
fn launches_beyond_limits_are_refused() {
    let d = driver();
    let out = d.alloc(4096);
    let launch = |name: &str, block: u32, shared: u32| {
        d.launch(name, [1, 1, 1], [block, 1, 1], shared, null_mut(), args![out, 0i32, 0i32, 0i32, 0i32])
    };
    assert_eq!(launch("barriers", 1025, 0), INVALID_VALUE);
    assert_eq!(launch("barriers", 0, 0), INVALID_VALUE);
    assert_eq!(launch("barriers", 32, (48 << 10) + 1), INVALID_VALUE);
    assert_eq!(launch("rotate_block", 256, 0), 701, "more threads than __launch_bounds__ promises");
    // SAFETY: cuFuncSetAttribute(CUfunction, CUfunction_attribute, int)
    let set = unsafe { d.get::<unsafe extern "C" fn(*mut c_void, c_int, c_int) -> c_int>("cuFuncSetAttribute") };
    // SAFETY: as above.
    let allow = |n| unsafe { set(d.function("shuffles"), 8, n) };
    assert_eq!((allow((227 << 10) + 1), allow(100 << 10)), (INVALID_VALUE, 0));
    assert_eq!(launch("shuffles", 32, 100 << 10), 0);
}

#[test]
fn shared_memory_has_an_end() {
    let d = variant("s[threadIdx.x] = 1.0f;", "s[threadIdx.x + 1] = 1.0f;");
    let out = d.alloc(128);
    let code = d.launch("overrun_shared", [1, 1, 1], [32, 1, 1], 0, null_mut(), args![out]);
    assert_eq!(code, ILLEGAL_ADDRESS);
    assert!(d.last_fault().contains("beyond its shared memory"));
}

#[test]
fn graphs_repeat_what_was_recorded() {
    let d = driver();
    d.schedule(Schedule::Ascending);
    let x: Vec<i32> = (0..128).collect();
    let (p, out) = (d.upload(&x), d.alloc(512));
    let (mut stream, mut graph, mut exec) = (null_mut(), null_mut(), null_mut());
    type Handle = *mut c_void;
    // SAFETY: the types are the driver API's, the handles those it gave.
    unsafe {
        assert_eq!(d.get::<unsafe extern "C" fn(*mut Handle, c_uint) -> c_int>("cuStreamCreate")(&mut stream, 1), 0);
        let begin = d.get::<unsafe extern "C" fn(Handle, c_int) -> c_int>("cuStreamBeginCapture_v2");
        let end = d.get::<unsafe extern "C" fn(Handle, *mut Handle) -> c_int>("cuStreamEndCapture");
        let synchronize = d.get::<unsafe extern "C" fn(Handle) -> c_int>("cuStreamSynchronize");
        let copy = d.get::<unsafe extern "C" fn(u64, u64, usize, Handle) -> c_int>("cuMemcpyDtoDAsync_v2");
        assert_eq!(begin(stream, 1), 0);
        assert_eq!(d.launch("rotate_block", [1, 1, 1], [128, 1, 1], 0, stream, args![p, out, 1i32]), 0);
        assert_eq!(copy(p, out, 512, stream), 0);
        assert_eq!(end(stream, &mut graph), 0);
        assert!(d.read::<f32>(out, 128).iter().all(|v| v.is_nan()), "recorded, not run");
        let instantiate =
            d.get::<unsafe extern "C" fn(*mut Handle, Handle, u64) -> c_int>("cuGraphInstantiateWithFlags");
        assert_eq!(instantiate(&mut exec, graph, 0), 0);
        assert_eq!(d.get::<unsafe extern "C" fn(Handle) -> c_int>("cuGraphDestroy")(graph), 0);
        for round in 1..=3 {
            assert_eq!(d.get::<unsafe extern "C" fn(Handle, Handle) -> c_int>("cuGraphLaunch")(exec, stream), 0);
            let got: Vec<i32> = d.read(out, 128);
            assert!((0..128).all(|i| got[i] == x[(i + round) % 128]));
        }
        assert_eq!(d.get::<unsafe extern "C" fn(Handle) -> c_int>("cuGraphExecDestroy")(exec), 0);

        // Waiting spoils a capture, and so does allocating.
        assert_eq!((begin(stream, 1), synchronize(stream), end(stream, &mut graph)), (0, 900, 901));
        assert_eq!(begin(stream, 1), 0);
        let mut address = 0u64;
        assert_eq!(d.get::<unsafe extern "C" fn(*mut u64, usize) -> c_int>("cuMemAlloc_v2")(&mut address, 4), 900);
        assert_eq!((end(stream, &mut graph), synchronize(stream)), (901, 0));

        // The default stream and a stream that waits for it.
        assert_eq!(d.get::<unsafe extern "C" fn(*mut Handle, c_uint) -> c_int>("cuStreamCreate")(&mut stream, 0), 0);
        assert_eq!((begin(stream, 1), copy(p, out, 4, null_mut()), end(stream, &mut graph)), (0, 906, 901));
        assert_eq!((copy(p, out, 4, null_mut()), synchronize(stream)), (0, 0));
    }
}

#[test]
fn modules_must_be_of_the_kernels_built_in() {
    let d = driver();
    // SAFETY: the types are the driver API's.
    let (load, function) = unsafe {
        (
            d.get::<unsafe extern "C" fn(*mut *mut c_void, *const c_char) -> c_int>("cuModuleLoadData"),
            d.get::<unsafe extern "C" fn(*mut *mut c_void, *mut c_void, *const c_char) -> c_int>("cuModuleGetFunction"),
        )
    };
    let get = |ptx: &str, name: &str| {
        let (mut module, mut f) = (null_mut(), null_mut());
        let (ptx, name) = (CString::new(ptx).unwrap(), CString::new(name).unwrap());
        // SAFETY: texts that end with a zero.
        unsafe {
            match load(&mut module, ptx.as_ptr()) {
                0 => function(&mut f, module, name.as_ptr()),
                code => code,
            }
        }
    };
    let head = "//\n.version 8.0\n.target sm_80\n.address_size 64\n";
    let entry = ".visible .entry words(\n\t.param .u64 words_param_0,\n\t.param .align 8 .b8 words_param_1[32],\n\t.param .u8 words_param_2,\n\t.param .f64 words_param_3,\n\t.param .u64 words_param_4\n)\n{ ret; }\n";
    assert_eq!(get(&format!("{head}{entry}"), "words"), 0);
    assert_eq!(get(&format!("{head}{entry}"), "nothing"), 500, "not in the PTX");
    assert_eq!(get(&format!("{head}{}", entry.replace("words", "other")), "other"), 500, "not compiled in");
    assert_eq!(get(&format!("{head}{}", entry.replace("[32]", "[24]")), "words"), 218, "another structure");
    assert_eq!(get(&format!("{head}{}", entry.replace(".f64", ".f32")), "words"), 218);
    assert_eq!(get(&format!("{}{entry}", head.replace("8.0", "8.1")), "words"), 222);
    assert_eq!(get(&format!("{}{entry}", head.replace("sm_80", "sm_100")), "words"), 209);
    assert_eq!(get(&format!("{}{entry}", head.replace("sm_80", "sm_90a")), "words"), 0);
    assert_eq!(get("no PTX", "words"), 200);
}

#[test]
fn what_the_source_pass_does_not_understand_is_named() {
    for (from, to, what) in [
        ("__shared__ int values[128];", "__shared__ int values[128], more[2];", "values[128], more[2]"),
        ("__shared__ int values[128];", "extern __shared__ int values[];", "DYNAMIC_SHARED"),
        ("__shared__ int values[128];", "__shared__ int values[128] = {};", "only `__shared__ type name[n]..;`"),
        ("const int TILE = 16;", "__shared__ int outside[4]; const int TILE = 16;", "outside of a function"),
    ] {
        let text = std::fs::read_to_string(kernels()).unwrap();
        let line = text.lines().position(|l| l.contains(from)).unwrap() + 1;
        let built = std::panic::catch_unwind(|| build_variant(kernels(), |t| t.replace(from, to), false));
        let error = *built.unwrap_err().downcast::<String>().unwrap();
        assert!(error.contains(what) && error.contains(&format!("kernels.cu:{line}")), "{error}");
    }
}

#[test]
fn settings_play_failures() {
    // A library of its own, as settings are.
    let d: Driver = variant("KERNEL void nothing() {}", "KERNEL void nothing_else() {}");
    // SAFETY: the library defines them with these types.
    let (configure, init, count, alloc) = unsafe {
        (
            d.get::<unsafe extern "C" fn(*const c_char) -> c_int>("param_emulation_configure"),
            d.get::<unsafe extern "C" fn(c_uint) -> c_int>("cuInit"),
            d.get::<unsafe extern "C" fn(*mut c_int) -> c_int>("cuDeviceGetCount"),
            d.get::<unsafe extern "C" fn(*mut u64, usize) -> c_int>("cuMemAlloc_v2"),
        )
    };
    let set = |text: &str| {
        let c = CString::new(text).unwrap();
        // SAFETY: a text that ends with a zero.
        unsafe { configure(c.as_ptr()) }
    };
    // SAFETY: pointers to numbers.
    let count = || unsafe {
        let mut n = -1;
        (count(&mut n), n)
    };
    // SAFETY: as above.
    let alloc = |n| unsafe {
        let mut p = 0;
        alloc(&mut p, n)
    };
    assert_eq!(count(), (0, 1));
    assert_eq!((set("no-device"), count()), (1, (0, 0)));
    // SAFETY: takes a number.
    assert_eq!((set("no-device-error"), unsafe { init(0) }), (1, 100));
    assert_eq!(set("memory=1000,version=11040"), 1);
    assert_eq!((alloc(600), alloc(401), alloc(400), alloc(1)), (0, 2, 0, 2));
    assert_eq!(set("fail=cuMemAlloc_v2"), 1);
    assert_eq!(alloc(4), 999);
    assert_eq!(set("fail=cuMemAlloc_v2:3"), 1);
    assert_eq!((alloc(4), alloc(4), alloc(4), alloc(4)), (0, 0, 999, 999));
    assert_eq!((set("schedule=seed:7"), set("schedule=none"), set("nonsense"), set("")), (1, 0, 0, 1));
}

#[test]
fn all_of_device_cuh_is_there() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap();
    let header = |name: &str| read(root.with_file_name("param-cuda").join("kernels").join(name));
    let emulation = read(root.join("cpp/emulation.h"));
    let device = header("device.cuh").split("#else\n").nth(1).unwrap().split("\n#endif").next().unwrap().to_owned();
    let warpgroup =
        header("warpgroup.cuh").split("#ifndef").nth(1).unwrap().split("\n#endif").next().unwrap().to_owned();
    for own in [device, warpgroup] {
        // `DEVICE type name(`
        let names: Vec<_> = own
            .split("DEVICE ")
            .skip(1)
            .filter_map(|text| text.split('(').next()?.split([' ', '*']).next_back())
            .collect();
        assert!(names.len() > 4);
        for name in names.into_iter().filter(|&name| name != "__device__") {
            assert!(emulation.contains(&format!(" {name}(")), "emulation.h has no `{name}`");
        }
    }
}
