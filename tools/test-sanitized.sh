#!/usr/bin/env bash
# Runs the tests of the CUDA kernels with the emulated GPU built for AddressSanitizer: reads and writes beyond a buffer end them.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh
export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
settings=$(cargo test --release -p param-cuda-emulation --test emulation sanitized_library -- --ignored --nocapture | grep '^export')
cargo test --release -p param-cuda --lib --test decode --no-run 2>&1 | sed -n 's/^ *Executable.*(\(.*\))$/\1/p' | while read -r tests; do
    # Tests that build variants of the kernels load other libraries.
    (eval "$settings" && "$tests" --skip a_kernel_that_does_not_wait)
done
