#!/usr/bin/env bash
# Runs the tests of param-kernels as code for aarch64 under qemu, so that its NEON kernels are tested on any machine. Installs what is
# missing; with --if-possible, says what it could not get and succeeds. Other arguments go to cargo test.
set -euo pipefail
cd "$(dirname "$0")/.."
target=aarch64-unknown-linux-gnu
sysroot=/usr/aarch64-linux-gnu # where Debian's cross packages put it
if_possible=false
if [ "${1:-}" = --if-possible ]; then
    if_possible=true
    shift
fi

have() { command -v "$1" >/dev/null 2>&1; }
cannot() {
    if $if_possible; then
        echo "neon: skipped: $*"
        exit 0
    fi
    echo "neon: $*" >&2
    exit 1
}

if [ "$(uname -m)" = aarch64 ]; then
    tools/setup.sh
    export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    exec cargo test --release -p param-kernels "$@"
fi

missing=()
have qemu-aarch64 || missing+=(qemu-user)
have aarch64-linux-gnu-gcc || missing+=(gcc-aarch64-linux-gnu)
[ -e "$sysroot/include/stdlib.h" ] || missing+=(libc6-dev-arm64-cross)
tools/setup.sh "${missing[@]}" || cannot "tools/setup.sh could not install ${missing[*]:-what building needs}"
export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
if ! [ -d "$(rustc --print target-libdir --target $target)" ]; then
    have rustup || cannot "Rust's standard library for $target is not installed, and there is no rustup to get it"
    rustup target add $target || cannot "rustup could not get Rust's standard library for $target"
fi

# For ggml, which the tests compare with: its C, and the bindings that libclang makes.
export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
export BINDGEN_EXTRA_CLANG_ARGS_aarch64_unknown_linux_gnu="-isystem $sysroot/include"
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L $sysroot -cpu max"
export PARAM_EXPECT_ISA=neon
exec cargo test --release -p param-kernels --target $target "$@"
