//! Kernels with one mistake each: the schedules that show it must show it.

use crate::args;
use crate::driver::{TIMEOUT, kernels, variant};
use crate::primitives::{driver, multiplied, multiplied_by_warpgroup, relaxed, rotated, schedules};
use param_cuda_emulation::{build_variant, sanitizer};
use std::path::Path;
use std::ptr::null_mut;

#[test]
fn a_barrier_before_reading_is_missed() {
    let d = variant("        __syncthreads(); // before reading\n", "");
    for s in schedules() {
        d.schedule(s);
        assert_eq!(rotated(&d), (0, false), "{s}");
    }
}

#[test]
fn a_barrier_before_writing_is_missed() {
    let d = variant("        __syncthreads(); // before writing\n", "");
    let wrong = schedules().into_iter().filter(|&s| {
        d.schedule(s);
        rotated(&d) != (0, true)
    });
    assert!(wrong.count() >= 4);
}

#[test]
fn a_wait_for_copies_is_missed() {
    for to in ["", "copy_async_wait<2>();"] {
        let d = variant("copy_async_wait<1>();", to);
        for s in schedules() {
            d.schedule(s);
            assert!(multiplied(&d, false).1 > 1.0, "{s}");
        }
    }
}

#[test]
fn a_copy_onto_what_others_read_is_noticed() {
    // Without the second buffer the next tile overwrites this one.
    let d = variant("next = 1 - now", "next = now");
    for s in schedules() {
        d.schedule(s);
        assert!(multiplied(&d, true).1 > 1.0, "{s}");
    }
}

#[test]
fn what_products_by_a_warpgroup_need_is_missed() {
    // Shown under every schedule, by a fault that says what or by sums that are wrong.
    for (line, fault) in [
        ("        copy_async_wait<0>(); // for this tile\n", ""),
        ("        async_proxy_fence();\n", "without an async_proxy_fence"),
        ("        warpgroup_fence();\n", "no warpgroup_fence"),
        ("    warpgroup_wait<0>(); // for the sums\n", "no warpgroup_wait covers"),
    ] {
        let d = variant(line, "");
        for s in schedules() {
            d.schedule(s);
            let (code, worst) = multiplied_by_warpgroup(&d, "nn");
            assert!(code != 0 || worst > 1.0, "{s}: without {line}");
            assert!(d.last_fault().contains(fault), "{s}: without {line}: {}", d.last_fault());
        }
    }
}

#[test]
fn a_product_that_runs_too_early_or_too_late_is_noticed() {
    for (from, to) in [
        ("        __syncthreads(); // for others' copies\n", ""),
        ("        if (t > 0) warpgroup_wait<1>(); // for what read the other stage\n", ""),
        ("warpgroup_wait<1>(); // for", "warpgroup_wait<2>(); // for"),
        (
            "if (t > 0) warpgroup_wait<1>(); // for what read the other stage\n        __syncthreads();",
            "__syncthreads(); if (t > 0) warpgroup_wait<1>();",
        ),
    ] {
        let d = variant(from, to);
        // Only where products run at once, or only where they run as late as they may.
        let wrong = schedules().into_iter().filter(|&s| {
            d.schedule(s);
            multiplied_by_warpgroup(&d, "tt") != (0, 0.0)
        });
        assert!(wrong.count() >= 6, "{from}");
    }
}

#[test]
fn matrices_elsewhere_than_a_descriptor_says_are_noticed() {
    for (from, to) in [
        ("SWIZZLED_SHARED(u8, shared)", "DYNAMIC_SHARED(u8, shared)"),
        ("(chunk ^ row % 8)", "(chunk)"),
        ("panel + step * (B_ACROSS ? 2048 : 32), panel, 1024)", "panel + step * (B_ACROSS ? 2048 : 32), 1024, panel)"),
    ] {
        let d = variant(from, to);
        for s in schedules() {
            d.schedule(s);
            for way in ["nn", "tt"] {
                assert_ne!(multiplied_by_warpgroup(&d, way), (0, 0.0), "{s}, {way}: {to}");
            }
        }
    }
}

#[test]
fn blocks_that_do_not_run_together_cannot_wait() {
    let d = driver();
    for s in schedules() {
        d.schedule(s);
        assert_eq!(relaxed(d, false).0, TIMEOUT, "{s}");
        assert!(d.last_fault().contains("not cooperative"), "{}", d.last_fault());
        assert_eq!(relaxed(d, true), (0, true), "the next launch is not harmed");
    }
}

#[test]
fn threads_apart_are_noticed() {
    let d = driver();
    let out = d.alloc(64 * 4);
    for s in schedules() {
        d.schedule(s);
        for name in ["divergent_barrier", "early_end"] {
            assert_eq!(d.launch(name, [1, 1, 1], [64, 1, 1], 0, null_mut(), args![out]), TIMEOUT, "{name}, {s}");
            assert!(d.last_fault().contains("kernels.cu:"), "{}", d.last_fault());
        }
        d.write(out, &[u32::MAX; 64]);
        assert_eq!(d.launch("half_shuffle", [1, 1, 1], [32, 1, 1], 0, null_mut(), args![out]), TIMEOUT);
    }
}

fn in_child(name: &str, library: &Path, runtime: &Path) -> std::process::Output {
    std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "mistakes::child", "--ignored", "--nocapture"])
        .env("PARAM_TEST_KERNEL", name)
        .env("PARAM_TEST_LIBRARY", library)
        .env("LD_PRELOAD", runtime)
        .env("ASAN_OPTIONS", "detect_leaks=0")
        .output()
        .unwrap()
}

#[test]
#[ignore = "runs in a child process of sanitizer_sees_reads_beyond"]
fn child() {
    let name = std::env::var("PARAM_TEST_KERNEL").unwrap();
    let d = crate::driver::Driver::load(std::env::var("PARAM_TEST_LIBRARY").unwrap().as_ref());
    match name.as_str() {
        "overrun_device" => {
            let (x, out) = (d.upload(&[1f32; 16]), d.alloc(128));
            d.launch(&name, [1, 1, 1], [32, 1, 1], 0, null_mut(), args![x, out, 16i32]);
        }
        "overrun_shared" => {
            let out = d.alloc(128);
            d.launch(&name, [1, 1, 1], [32, 1, 1], 0, null_mut(), args![out]);
        }
        _ => {
            assert_eq!(rotated(&d), (0, true));
            assert_eq!(relaxed(&d, true), (0, true));
            assert_eq!(relaxed(&d, false).0, TIMEOUT);
            assert_eq!(relaxed(&d, true), (0, true));
            assert_eq!(multiplied(&d, false), (0, 0.0));
        }
    }
    println!("went through");
}

#[test]
fn sanitizer_sees_reads_beyond() {
    let Some(runtime) = sanitizer() else {
        eprintln!("the compiler has no AddressSanitizer: not tested");
        return;
    };
    let library = build_variant(kernels(), str::to_owned, true);
    let output = in_child("right", &library, &runtime);
    let text = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("went through"), "{text}");
    for (name, what) in [("overrun_device", "heap-buffer-overflow"), ("overrun_shared", "heap-buffer-overflow")] {
        let output = in_child(name, &library, &runtime);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains(what) && text.contains(name), "{name}: {text}");
    }
}

// Prints how to run other tests with all kernels under AddressSanitizer:
// `cargo test --release -p param-cuda-emulation sanitized_library -- --ignored --nocapture`.
#[test]
#[ignore = "builds every kernel for AddressSanitizer"]
fn sanitized_library() {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("param-cuda").join("kernels");
    let mut files = std::fs::read_dir(kernels).unwrap().flatten().map(|e| e.file_name());
    let any = files.find(|f| Path::new(f).extension().is_some_and(|e| e == "cu")).expect("a kernel");
    let library = build_variant(Path::new(&any), str::to_owned, true);
    let runtime = sanitizer().expect("the compiler has an AddressSanitizer");
    println!("export PARAM_EMULATION_LIBRARY={}", library.display());
    println!("export LD_PRELOAD={} ASAN_OPTIONS=detect_leaks=0", runtime.display());
}
