#!/usr/bin/env bash
# Format and lints, with no finding left.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo fmt --all --check
cargo clippy --locked --workspace --all-targets -- -D warnings
if command -v shellcheck >/dev/null; then
    shellcheck .ci/run scripts/*.sh
fi
