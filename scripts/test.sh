#!/usr/bin/env bash
# Unit tests, then the scenarios: the real binary on real etcd and PostgreSQL, two clusters at a time.
# With arguments: the scenarios whose names match, for example scripts/test.sh switchover.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-target}
export PGHERD_TEST_GAPS=$PWD/target/write-gaps.txt
export RUST_LIB_BACKTRACE=0 # What a test waited for says more than where.
mkdir -p target
: > "$PGHERD_TEST_GAPS"

if cargo nextest --version >/dev/null 2>&1; then
    unit=(cargo nextest run --locked --no-fail-fast)
    scenarios=(cargo nextest run --locked --no-fail-fast --config-file testkit/nextest.toml)
    filter=("$@")
else
    echo "cargo-nextest is not installed: tests run with cargo test, one file after another"
    unit=(cargo test --locked --no-fail-fast)
    scenarios=(cargo test --locked --no-fail-fast)
    filter=(-- --test-threads 2 "$@")
fi

status=0
if [ $# -eq 0 ]; then
    "${unit[@]}" --workspace --exclude pgherd-testkit --exclude pgherd-benches 2>&1 | tee target/unit-tests.log || status=$?
fi
cargo build --locked -p pgherd
export PGHERD_BIN=${PGHERD_BIN:-$(realpath "$target")/debug/pgherd}
"${scenarios[@]}" -p pgherd-testkit "${filter[@]}" 2>&1 | tee target/scenarios.log || status=$?

echo
echo "What clients felt, by fault:"
sort "$PGHERD_TEST_GAPS"
echo
[ $# -gt 0 ] || grep -hE '^ *Summary|^test result' target/unit-tests.log | sed 's/^ */unit tests: /' || true
grep -hE '^ *(Summary|FAIL|TIMEOUT) |^test result' target/scenarios.log | sort -u | sed 's/^ */scenarios: /' || true
exit "$status"
