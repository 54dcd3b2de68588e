#!/usr/bin/env bash
# Builds the toolkit and its peers, then measures them in turn and prints one table. --help lists what else there is.
# Needs what tools/setup.sh installs, a C++ compiler, and for the newest ggml cmake.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}

models=$root/runs/peers
tools=(cmake c++)
peers=(--workspace)
args=()
while [ $# -gt 0 ]; do
    case $1 in
        --models) models=${2:?--models needs a folder}; shift 2 ;;
        --models=*) models=${1#*=}; shift ;;
        # No ggml trains; torch.compile calls c++.
        --train) tools=(c++); peers=(-p compare); args+=("$1"); shift ;;
        *) args+=("$1"); shift ;;
    esac
done
mkdir -p "$models"

for tool in "${tools[@]}"; do
    if ! command -v "$tool" >/dev/null; then
        echo "run.sh: the peers need $tool: on Debian, apt-get install cmake g++" >&2
        exit 1
    fi
done
if [ -n "${RUSTFLAGS:-}${CARGO_ENCODED_RUSTFLAGS:-}" ]; then
    echo "run.sh: unset RUSTFLAGS: it hides the flags in .cargo/config.toml that build the peers for this CPU" >&2
    exit 1
fi

(cd "$root" && cargo build --release --target-dir "$target" >&2)
# From its folder, so that cargo finds .cargo/config.toml.
(cd "$here" && cargo build --release --target-dir "$target/peers" "${peers[@]}" >&2)
exec "$target/peers/release/compare" --models "$models" --param-bin "$target/release" "${args[@]}"
