//! What ggml needs once per process, before its first use by any thread, and what it says about a type.

use std::sync::OnceLock;

use ggml_sys_bleedingedge as sys;
use gguf::GgmlType;

use crate::Result;

/// ggml's description of a type, or `None` where this version has none or does not compute with it. The first call
/// fills ggml's global tables.
pub(crate) fn traits(ty: GgmlType) -> Result<Option<sys::ggml_type_traits_t>> {
    static READY: OnceLock<Result<()>> = OnceLock::new();
    READY.get_or_init(initialize).clone()?;
    let known = ty.id() < sys::ggml_type_GGML_TYPE_COUNT;
    // SAFETY: the id is in the range of ggml's table, which the call only reads.
    Ok(known.then(|| unsafe { sys::ggml_internal_get_type_traits(ty.id()) }))
}

fn initialize() -> Result<()> {
    check_cpu()?;
    let params = sys::ggml_init_params { mem_size: 0, mem_buffer: std::ptr::null_mut(), no_alloc: true };
    // SAFETY: the first ggml_init fills the table of f16 values (read where the CPU has no conversion). The context it
    // returns is the only one of the process, is unused, and is given back at once; `READY` keeps other threads out.
    unsafe { sys::ggml_free(sys::ggml_init(params)) };
    Ok(())
}

/// The C code is compiled for the machine that builds it; on a lesser one it would fault.
fn check_cpu() -> Result<()> {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: these functions return constants.
        let compiled_in = unsafe {
            [
                ("AVX", sys::ggml_cpu_has_avx(), is_x86_feature_detected!("avx")),
                ("AVX2", sys::ggml_cpu_has_avx2(), is_x86_feature_detected!("avx2")),
                ("FMA", sys::ggml_cpu_has_fma(), is_x86_feature_detected!("fma")),
                ("F16C", sys::ggml_cpu_has_f16c(), is_x86_feature_detected!("f16c")),
                ("SSE3", sys::ggml_cpu_has_sse3(), is_x86_feature_detected!("sse3")),
            ]
        };
        for (feature, compiled, present) in compiled_in {
            if compiled != 0 && !present {
                return Err(crate::Error::Cpu { feature });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_are_those_of_ggml() {
        let mut n_known = 0;
        for ty in GgmlType::all() {
            if let Some(traits) = traits(ty).unwrap() {
                assert_eq!(traits.blck_size as u64, ty.block_size(), "{ty}");
                assert_eq!(traits.type_size as u64, ty.type_size(), "{ty}");
                n_known += 1;
            }
        }
        assert_eq!(n_known, 28);
    }
}
