// From kernels to a shared library: the preprocessor, a pass over what it leaves, the compiler, the linker. The build script and the
// crate both include this file.
use std::path::{Path, PathBuf};
use std::process::Command;

/// How the compiler is called: the program and its first arguments.
pub type Compiler = Vec<String>;

/// The emulation's own files.
pub const ENGINE: [&str; 4] = ["engine", "numbers", "device", "driver"];

const FLAGS: &[&str] = &[
    "-std=c++17",
    "-O2",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-fno-exceptions",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-parentheses",
    "-Wno-unused-function", // NVIDIA's compilers do not ask for them
];

fn run(command: &mut Command) -> Result<(Vec<u8>, String), String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok((output.stdout, text)) } else { Err(format!("{command:?} failed:\n{text}")) }
}

fn compiler(compiler: &Compiler, sanitize: bool) -> Command {
    let mut command = Command::new(&compiler[0]);
    command.args(&compiler[1..]).args(FLAGS);
    if sanitize {
        command.args(["-fsanitize=address", "-fno-omit-frame-pointer"]);
    }
    command
}

/// Compiles one of the emulation's own files; what the compiler warns of is returned.
pub fn compile(cxx: &Compiler, file: &Path, object: &Path, sanitize: bool) -> Result<String, String> {
    Ok(run(compiler(cxx, sanitize).arg("-c").arg(file).arg("-o").arg(object))?.1)
}

/// Compiles a kernel file whose text is `text`; `include` holds what it includes.
pub fn compile_kernels(
    cxx: &Compiler,
    cpp: &Path,
    include: &Path,
    file: &Path,
    text: &str,
    object: &Path,
    sanitize: bool,
) -> Result<String, String> {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let whole = object.with_extension("cc");
    // An unnamed namespace, as each file is a module of its own on a GPU.
    let wrapped = format!("#include \"engine.h\"\nnamespace {{\n#line 1 \"{}\"\n{text}\n}}\n", file.display());
    write(&whole, &wrapped)?;
    let mut preprocess = compiler(cxx, false);
    preprocess.args(["-E", "-DPARAM_EMULATION"]).arg("-I").arg(cpp).arg("-I").arg(include).arg(&whole);
    let (expanded, _) = run(&mut preprocess)?;
    let expanded = String::from_utf8(expanded).map_err(|_| format!("{name}: not UTF-8"))?;
    let rewritten = object.with_extension("ii");
    write(&rewritten, &rewrite(&expanded, &name)?)?;
    compile(cxx, &rewritten, object, sanitize)
}

/// Links objects into a library that the loader takes for the one of its name.
pub fn link(cxx: &Compiler, objects: &[PathBuf], library: &Path, sanitize: bool) -> Result<(), String> {
    let mut command = compiler(cxx, sanitize);
    // Not unloaded: destructors of what threads own lie in it.
    let name = library.file_name().unwrap_or_default().to_string_lossy();
    command
        .args(["-shared", "-Wl,-Bsymbolic", "-Wl,-z,nodelete", "-pthread"])
        .arg(format!("-Wl,-soname,{name}"))
        .args(objects)
        .arg("-o")
        .arg(library);
    run(&mut command).map(|_| ())
}

fn write(file: &Path, text: &str) -> Result<(), String> {
    std::fs::write(file, text).map_err(|e| format!("{}: {e}", file.display()))
}

/// Replaces what C++ has no word for in a preprocessed file: `__shared__` variables become references to memory of the block,
/// `__param_kernel__` enters the kernel into the table, with the bounds of `__launch_bounds__`.
pub fn rewrite(text: &str, name: &str) -> Result<String, String> {
    let bytes = text.as_bytes();
    let mut out = String::with_capacity(text.len() + 1024);
    let mut kernels: Vec<(String, String)> = Vec::new();
    let mut place = (name.to_owned(), 1usize);
    let (mut at, mut depth, mut n_shared) = (0, 0i32, 0);
    while at < bytes.len() {
        let c = bytes[at];
        if c == b'\n' {
            // From the largest number on where the preprocessor speaks of line 0.
            place.1 = place.1.wrapping_add(1);
            out.push('\n');
            at += 1;
            // `# 12 "file" flags`
            if bytes.get(at) == Some(&b'#') {
                let end = text[at..].find('\n').map_or(text.len(), |n| at + n);
                let line = &text[at..end];
                let mut parts = line[1..].trim_start_matches("line").trim().splitn(2, ' ');
                if let Some(Ok(number)) = parts.next().map(str::parse::<usize>) {
                    let file = parts.next().and_then(|s| s.split('"').nth(1)).unwrap_or(name);
                    place = (file.to_owned(), number.wrapping_sub(1));
                }
                out.push_str(line);
                at = end;
            }
            continue;
        }
        if c == b'"' || (c == b'\'' && !at.checked_sub(1).is_some_and(|i| bytes[i].is_ascii_alphanumeric())) {
            let end =
                literal_end(bytes, at).ok_or_else(|| format!("{}:{}: a literal without its end", place.0, place.1))?;
            out.push_str(&text[at..end]);
            at = end;
            continue;
        }
        if !is_word(c) {
            depth += i32::from(c == b'{') - i32::from(c == b'}');
            let n = text[at..].chars().next().map_or(1, char::len_utf8);
            out.push_str(&text[at..at + n]);
            at += n;
            continue;
        }
        let end = word_end(bytes, at);
        let word = &text[at..end];
        let fail = |what: String| Err(format!("{}:{}: {what}", place.0, place.1));
        match word {
            "__shared__" => {
                // The namespace around the file is one level.
                if depth < 2 {
                    return fail(
                        "`__shared__` outside of a function, or `extern`: DYNAMIC_SHARED has a name for that".into(),
                    );
                }
                if out.trim_end().ends_with("extern") {
                    return fail("`extern __shared__`: write DYNAMIC_SHARED(type, name)".into());
                }
                let Some(length) = text[end..].find(';') else {
                    return fail("`__shared__` without a semicolon".into());
                };
                let declaration = &text[end..end + length];
                match shared(declaration, n_shared) {
                    Ok(code) => out.push_str(&code),
                    Err(what) => return fail(what),
                }
                // Lines stay where they were.
                out.extend(declaration.bytes().filter(|&b| b == b'\n').map(|_| '\n'));
                place.1 += declaration.bytes().filter(|&b| b == b'\n').count();
                n_shared += 1;
                at = end + length + 1;
            }
            "__param_kernel__" => {
                let (kernel, bounds) = match kernel(&text[end..]) {
                    Ok(found) => found,
                    Err(what) => return fail(what),
                };
                if !kernels.iter().any(|k| k.0 == kernel) {
                    kernels.push((kernel, bounds));
                }
                at = end;
            }
            "__launch_bounds__" => {
                let Some((_, length)) = parenthesized(&text[end..]) else {
                    return fail("`__launch_bounds__` without its arguments".into());
                };
                at = end + length;
            }
            _ => {
                out.push_str(word);
                at = end;
            }
        }
    }
    // Before the brace that closes the file's namespace.
    let close = out.rfind('}').ok_or_else(|| format!("{name}: no namespace around the file"))?;
    let mut table = String::new();
    for (i, (kernel, bounds)) in kernels.iter().enumerate() {
        table.push_str(&format!(
            "static emulation::Register<decltype(&{kernel}), &{kernel}> param_kernel_{i}(\"{kernel}\", \"{name}\", {bounds});\n"
        ));
    }
    out.insert_str(close, &table);
    Ok(out)
}

fn is_word(c: u8) -> bool {
    c.is_ascii_alphanumeric() || c == b'_'
}

fn word_end(bytes: &[u8], at: usize) -> usize {
    bytes[at..].iter().position(|&c| !is_word(c)).map_or(bytes.len(), |n| at + n)
}

fn literal_end(bytes: &[u8], at: usize) -> Option<usize> {
    let mut i = at + 1;
    while i < bytes.len() {
        match bytes[i] {
            b'\\' => i += 1,
            b'\n' => return None,
            c if c == bytes[at] => return Some(i + 1),
            _ => {}
        }
        i += 1;
    }
    None
}

/// The first `(...)` of a text that begins with it, and where it ends.
fn parenthesized(text: &str) -> Option<(&str, usize)> {
    let open = text.len() - text.trim_start().len();
    let mut depth = 0;
    for (i, c) in text.char_indices().skip_while(|&(i, _)| i < open) {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return (c == ')').then(|| (&text[open + 1..i], i + 1));
        }
    }
    None
}

/// The name and the bounds of the kernel whose head `text` begins with.
fn kernel(text: &str) -> Result<(String, String), String> {
    let bytes = text.as_bytes();
    let (mut at, mut last, mut bounds) = (0, "", "1024".to_owned());
    while at < bytes.len() {
        match bytes[at] {
            b'"' => at = literal_end(bytes, at).ok_or("a literal without its end")?,
            b'(' if !last.is_empty() && last != "void" => return Ok((last.to_owned(), bounds)),
            b'(' | b';' | b'{' => break,
            c if is_word(c) => {
                let end = word_end(bytes, at);
                let word = &text[at..end];
                at = end;
                if word == "__launch_bounds__" || word == "alignas" {
                    let (inner, length) =
                        parenthesized(&text[end..]).ok_or("a kernel's bounds without their arguments")?;
                    if word == "__launch_bounds__" {
                        bounds = first_argument(inner).trim().to_owned();
                    }
                    at = end + length;
                } else {
                    last = word;
                }
            }
            _ => at += 1,
        }
    }
    Err("a KERNEL must read `KERNEL [__launch_bounds__(n)] void name(arguments)`".into())
}

fn first_argument(list: &str) -> &str {
    let mut depth = 0;
    for (i, c) in list.char_indices() {
        match c {
            '(' | '<' => depth += 1,
            ')' | '>' => depth -= 1,
            ',' if depth == 0 => return &list[..i],
            _ => {}
        }
    }
    list
}

/// A declaration between `__shared__` and its semicolon: `[alignas(n)] type name[n]..`.
fn shared(declaration: &str, n: usize) -> Result<String, String> {
    let wrong =
        || format!("`__shared__{declaration};`: only `__shared__ type name[n]..;` is understood, one variable in each");
    let mut rest = declaration.trim();
    let mut align = "alignof(".to_owned();
    if let Some(after) = rest.strip_prefix("alignas") {
        let (inner, length) = parenthesized(after).ok_or_else(wrong)?;
        align = format!("({inner}) + 0 * alignof(");
        rest = after[length..].trim();
    }
    let dims = {
        let (mut depth, mut found) = (0, rest.len());
        for (i, c) in rest.char_indices() {
            match c {
                '<' => depth += 1,
                '>' => depth -= 1,
                '[' if depth == 0 => {
                    found = i;
                    break;
                }
                ',' | '(' | ')' | '=' | '{' | '&' if depth == 0 => return Err(wrong()),
                _ => {}
            }
        }
        found
    };
    let (head, dims) = (rest[..dims].trim_end(), rest[dims..].trim());
    let name_at = head.rfind(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).map_or(0, |i| i + 1);
    let (ty, name) = (head[..name_at].trim(), &head[name_at..]);
    let mut inside = 0;
    for c in dims.chars() {
        match c {
            '[' => inside += 1,
            ']' => inside -= 1,
            _ if inside > 0 || c.is_whitespace() => {}
            _ => return Err(wrong()),
        }
    }
    if ty.is_empty() || name.is_empty() || inside != 0 || dims.replace(char::is_whitespace, "").contains("[]") {
        return Err(wrong());
    }
    let (dims, align) = (dims.replace('\n', " "), align.replace('\n', " "));
    let ty = ty.replace('\n', " ");
    Ok(format!(
        "typedef {ty} param_shared_{n} {dims}; static emulation::SharedSlot param_slot_{n}; \
         param_shared_{n}& {name} = *(param_shared_{n}*)param_slot_{n}.at(sizeof(param_shared_{n}), {align}param_shared_{n}));"
    ))
}
