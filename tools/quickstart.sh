#!/usr/bin/env bash
# From nothing to generated text: installs what is missing, builds, trains a model of a million parameters for a minute or a few,
# quantizes it and lets it write. tools/quickstart.sh FILE... trains on your own text.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
out="$root/runs/quickstart"
steps=900

say() { printf '\n== %s\n' "$*"; }

say "1/6 checking for a C compiler, libclang and Rust"
"$root/tools/setup.sh"
export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"

say "2/6 building (a few minutes the first time)"
cargo build --release --manifest-path "$root/Cargo.toml"
bin="${CARGO_TARGET_DIR:-$root/target}/release"

say "3/6 a model that comes with the project, trained on Shakespeare: models/README.md"
"$bin/param-run" -m "$root/models/shakespeare.gguf" -p "ROMEO:" -n 120 --temp 0.8 --seed 1

if [ $# -gt 0 ]; then
    # A folder of its own: what was trained on someone's text is not replaced.
    out="$root/runs/$(basename "$1")-$(date +%Y%m%d-%H%M%S)"
    data=("$@")
    prompt=""
else
    # Real text that the build has just downloaded: sources and documentation of some of the libraries we use.
    rm -rf "$out"
    registry="${CARGO_HOME:-$HOME/.cargo}/registry/src"
    data=("$registry"/*/{anyhow,clap,clap_builder,rayon,rayon-core,regex,regex-automata,serde,serde_json,tempfile}-[0-9]* --ext rs,md)
    prompt="    pub fn "
fi

say "4/6 training param-tiny for $steps steps, a minute or a few"
"$bin/param-train" --data "${data[@]}" --out "$out" --preset param-tiny \
    --steps "$steps" --eval-batches 20 --sample-prompt "$prompt" --log-every 50

say "5/6 quantizing"
"$bin/param-convert" "$out/best/model.safetensors" "$out/param.gguf"

say "6/6 generating from $out/param.gguf"
printf '%s' "$prompt"
"$bin/param-run" -m "$out/param.gguf" -p "$prompt" -n 120 --temp 0.8 --seed 1

say "done; try: $bin/param-run -m $out/param.gguf -p 'your prompt'"
