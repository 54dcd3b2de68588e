#!/usr/bin/env bash
# Makes crates/param-cuda/ptx/*.ptx, which are committed, from kernels/*.cu with a pinned NVRTC: so that neither building nor CUDA's
# absence changes them. --check compares instead, and compiles for each chip; --report prints registers, shared memory and spills. With
# --if-possible, says what it could not get and succeeds. A folder as the last argument stands for crates/param-cuda.
set -euo pipefail
start=$PWD
cd "$(dirname "$0")/.."

usage() {
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
}
action=write
if_possible=false
folder=crates/param-cuda
while [ $# -gt 0 ]; do
    case $1 in
        --check) action=check ;;
        --report) action=report ;;
        --if-possible) if_possible=true ;;
        -*) usage ;;
        *) folder=$(cd "$start" && cd "$1" && pwd) ;;
    esac
    shift
done

target=${CARGO_TARGET_DIR:-target}
cannot() {
    if $if_possible; then
        echo "ptx: skipped: $*"
        exit 0
    fi
    echo "ptx: $*" >&2
    exit 1
}
# A wheel from PyPI that is unpacked in $target/NAME-VERSION, once: fetch NAME VERSION SHA256
fetch() {
    local into=$target/$1-$2
    [ -e "$into/fetched" ] && return
    rm -rf "$into"
    python3 -m venv "$into/venv" || return
    "$into/venv/bin/pip" install -q --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes --target "$into" \
        -r <(echo "$1==$2 --hash=sha256:$3") || return
    rm -rf "$into/venv"
    touch "$into/fetched"
}

[ -d "${CARGO_HOME:-$HOME/.cargo}/bin" ] && PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
run() { cargo run -q --release -p ptx -- "$@"; }

if [ $action = report ]; then
    # Of the driver's own age: what it makes of the PTX on an H100 of today.
    fetch nvidia-cuda-nvcc 13.0.88 56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03 ||
        cannot "python3 with venv, or PyPI's nvidia-cuda-nvcc for this machine, is not there"
    run report "$folder" "$target/nvidia-cuda-nvcc-13.0.88/nvidia/cu13/bin/ptxas"
else
    fetch nvidia-cuda-nvrtc-cu12 12.0.140 8e94e991d85c422de4da87bdc7472fdc1364367bd4aace7000b559cd33122071 ||
        cannot "python3 with venv, or PyPI's nvidia-cuda-nvrtc-cu12 for this machine, is not there"
    libraries=$(cd "$target/nvidia-cuda-nvrtc-cu12-12.0.140/nvidia/cuda_nvrtc/lib" && pwd)
    # The name that is looked for first: otherwise the machine's own would be found.
    ln -sf libnvrtc.so.12 "$libraries/libnvrtc.so"
    LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" run $action "$folder"
fi
