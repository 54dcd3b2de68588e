#!/usr/bin/env bash
# Installs what is missing and runs every test. Arguments go to cargo test: tools/test.sh golden
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh
export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
exec cargo test --release --workspace "$@"
