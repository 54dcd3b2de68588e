#!/usr/bin/env bash
# Installs what building PARAM needs and a bare Debian or Ubuntu lacks: a C compiler, libclang (for the bindings to ggml), a Rust
# toolchain; and the packages named as arguments, which the caller misses. Does nothing, and asks for no rights, where all of it is
# there.
set -euo pipefail

have() { command -v "$1" >/dev/null 2>&1; }
[ -d "${CARGO_HOME:-$HOME/.cargo}/bin" ] && PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"

missing=("$@")
have cc || missing+=(build-essential)
# bindgen loads libclang when it runs and needs clang's own headers, which come with the -dev package.
if [ -z "${LIBCLANG_PATH:-}" ] && ! ls /usr/lib/llvm-*/lib/libclang.so* >/dev/null 2>&1; then missing+=(libclang-dev); fi
have cargo || missing+=(rustup ca-certificates)

if [ ${#missing[@]} -gt 0 ]; then
    if ! have apt-get; then
        echo "setup: missing ${missing[*]}; install these (names are Debian's) and run this again" >&2
        exit 1
    fi
    as_root=()
    if [ "$(id -u)" != 0 ]; then
        have sudo || { echo "setup: installing ${missing[*]} needs root: run as root, or install sudo" >&2; exit 1; }
        as_root=(sudo)
    fi
    echo "setup: installing ${missing[*]}"
    "${as_root[@]}" apt-get update -qq
    if ! "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; then
        echo "setup: apt-get could not install ${missing[*]}; an older release has no rustup package: install Rust by hand" >&2
        exit 1
    fi
fi

if ! cargo --version >/dev/null 2>&1; then
    echo "setup: installing the stable Rust toolchain"
    rustup default stable
fi
