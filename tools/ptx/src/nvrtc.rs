//! NVRTC through cudarc's bindings, because its safe face takes no headers.

use std::ffi::{CStr, CString, c_char};
use std::ptr;

use anyhow::{Context, Result, bail, ensure};
use cudarc::nvrtc::{result, sys};

use crate::stamp::{NVRTC, Source, Sources};

/// A program that compiled.
pub struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by nvrtcCreateProgram, destroyed once.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

/// Compiles a file of kernels. It sees the headers it includes, which its stamp covers, and no others.
pub fn compile(sources: &Sources, kernel: &Source, options: &[String]) -> Result<Program> {
    // SAFETY: the library that is found is the pinned one, or the next check says that it is another.
    ensure!(unsafe { sys::is_culib_present() }, "no libnvrtc: run this through tools/ptx.sh");
    let (mut major, mut minor) = (0, 0);
    // SAFETY: two live numbers to write.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result()?;
    ensure!((major, minor) == NVRTC, "NVRTC {major}.{minor}: expected {}.{}: run tools/ptx.sh", NVRTC.0, NVRTC.1);

    let c = |text: &str| CString::new(text).context("a source holds a zero byte");
    let (text, file) = (c(&kernel.text)?, c(&kernel.file)?);
    let headers = sources.headers_of(kernel);
    let texts = headers.iter().map(|h| c(&h.text)).collect::<Result<Vec<_>>>()?;
    let files = headers.iter().map(|h| c(&h.file)).collect::<Result<Vec<_>>>()?;
    let pointers = |of: &[CString]| of.iter().map(|c| c.as_ptr()).collect::<Vec<*const c_char>>();
    let (texts_at, files_at) = (pointers(&texts), pointers(&files));
    let mut program = ptr::null_mut();
    // SAFETY: every pointer is to a string, or to as many of them as stated, that lives until the function returns.
    let created = unsafe {
        sys::nvrtcCreateProgram(
            &mut program,
            text.as_ptr(),
            file.as_ptr(),
            texts.len() as i32,
            texts_at.as_ptr(),
            files_at.as_ptr(),
        )
    };
    created.result().with_context(|| format!("{}: nvrtcCreateProgram", kernel.file))?;
    let program = Program(program);
    // SAFETY: created above; the same for its log.
    let compiled = unsafe { result::compile_program(program.0, options) };
    // SAFETY: as above.
    let log = unsafe { result::get_program_log(program.0) }?;
    let log = text_of(&log)?;
    if let Err(error) = compiled {
        bail!("{}, {}: {error}\n{log}", kernel.file, options.join(" "));
    }
    if !log.trim().is_empty() {
        eprintln!("{log}");
    }
    Ok(program)
}

impl Program {
    pub fn ptx(&self) -> Result<String> {
        // SAFETY: compiled.
        Ok(text_of(&unsafe { result::get_ptx(self.0) }?)?.to_owned())
    }

    /// Machine code, where a real architecture was asked for.
    pub fn cubin(&self) -> Result<Vec<u8>> {
        let mut n_byte = 0;
        // SAFETY: compiled; a live number to write.
        unsafe { sys::nvrtcGetCUBINSize(self.0, &mut n_byte) }.result()?;
        ensure!(n_byte > 0, "no machine code");
        let mut bytes = vec![0u8; n_byte];
        // SAFETY: as many bytes as the library has just asked for.
        unsafe { sys::nvrtcGetCUBIN(self.0, bytes.as_mut_ptr().cast()) }.result()?;
        Ok(bytes)
    }
}

/// A C string that ends within `chars`, or before its first byte where there are none.
fn text_of(chars: &[c_char]) -> Result<&str> {
    let bytes = bytemuck::cast_slice(chars);
    if bytes.is_empty() {
        return Ok("");
    }
    Ok(CStr::from_bytes_until_nul(bytes)?.to_str()?)
}
