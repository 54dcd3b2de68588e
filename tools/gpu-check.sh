#!/usr/bin/env bash
# What a GPU is needed for, on a machine that has one and nothing else: no Rust, no network. `tools/gpu-check.sh build` makes
# target/gpu-check: binaries, tests, golden cases and PyTorch's peers in one archive, and run.sh, which runs them there (run.sh --help).
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
limit=64 # MB

[ "${1:-}" = build ] || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
[ -d "${CARGO_HOME:-$HOME/.cargo}/bin" ] && PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
target=${CARGO_TARGET_DIR:-$root/target}
out=$target/gpu-check
files=$target/gpu-check-files
rm -rf "$out" "$files"
mkdir -p "$out" "$files"/{bin,tests,golden,torch,presets}

cargo build --release --bins
for tool in param-run param-bench param-train param-convert; do
    strip -o "$files/bin/$tool" "$target/release/$tool"
done

# Test binaries, each with what of it to run there: of the larger ones what names CUDA.
cargo test --release --no-run --message-format=json -p param-cuda -p param-runtime -p param-train -p param |
    python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["profile"]["test"]:
        target = message["target"]
        folder, name = message["package_id"].split("#")
        package = name.split("@")[0] if "@" in name else folder.rsplit("/", 1)[-1]
        print(message["executable"], package, target["kind"][0], target["name"])
' | while read -r executable package kind name; do
    case $kind/$package/$name in
        test/param-cuda/ptx) continue ;; # reads sources, which are not there
        test/param-cuda/driver) continue ;; # plays drivers that are not there
        # Apart, so that a kernel that brings the process down takes only its own kind along.
        lib/param-cuda/*) filters=("--skip training::" training::) ;;
        */param-cuda/*) filters=("") ;;
        lib/param-runtime/* | test/param-runtime/*) filters=(cuda) ;;
        lib/param-train/*) filters=(cuda::) ;;
        test/param/*) filters=(cuda golden) ;;
        *) continue ;;
    esac
    strip -o "$files/tests/$package-$kind-$name" "$executable"
    for filter in "${filters[@]}"; do
        echo "$package-$kind-$name $filter" >>"$files/tests.txt"
    done
done

cp -r tests/golden/*/ "$files/golden/"
cp benches/peers/torch/*.py "$files/torch/"
cp models/*.toml "$files/presets/"
cp tools/gpu-check.py "$files/"
revision=$(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)
printf '{"revision": "%s", "rustc": "%s"}\n' "$revision" "$(rustc --version)" >"$files/about.json"

tar -C "$files" -czf "$out/files.tar.gz" .
cat >"$out/run.sh" <<'RUN'
#!/usr/bin/env bash
# Unpacks what was built and runs it: --help says what there is.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${PARAM_GPU_CHECK:-/tmp/param-gpu-check}
# A second run finds the models that the first one made.
mkdir -p "$work"
tar -C "$work" -xzf "$here/files.tar.gz"
exec env PYTHONUNBUFFERED=1 "${PYTHON:-python3}" "$work/gpu-check.py" "$@"
RUN
chmod +x "$out/run.sh"
rm -rf "$files/work"
cat "$files/tests.txt"
du -h --apparent-size "$files"/bin/* "$files"/tests/* "$out/files.tar.gz"
size=$(($(stat -c %s "$out/files.tar.gz") / 1000000))
[ $size -le $limit ] || { echo "gpu-check: $size MB, more than $limit" >&2; exit 1; }
echo "gpu-check: $out, $size MB"
