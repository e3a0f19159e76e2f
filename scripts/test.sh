#!/usr/bin/env bash
# Unit tests, the simulation, the scenarios (the real binary on real etcd and PostgreSQL, three clusters at a time), and a
# short chaos: each fault once, on hosts of their own.
# With arguments: the scenarios whose names match, for example scripts/test.sh switchover; with --long those that take too
# long for every change.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-target}
export PGHERD_TEST_GAPS=$PWD/target/write-gaps.txt
export RUST_LIB_BACKTRACE=0 # What a test waited for says more than where.
scripts/deps.sh tests
mkdir -p target
: > "$PGHERD_TEST_GAPS"

everything=no
[ $# -gt 0 ] || everything=yes
newer=no
which=()
if [ "${1:-}" = --long ]; then
    shift
    which=(--run-ignored only)
    [ $# -gt 0 ] || newer=yes
fi

if cargo nextest --version >/dev/null 2>&1; then
    unit=(cargo nextest run --locked --no-fail-fast)
    simulation=(cargo nextest run --locked --no-fail-fast --cargo-profile sim --success-output final)
    scenarios=(cargo nextest run --locked --no-fail-fast --config-file testkit/nextest.toml)
    filter=("${which[@]}" "$@")
else
    echo "cargo-nextest is not installed: tests run with cargo test, one file after another"
    unit=(cargo test --locked --no-fail-fast)
    simulation=(cargo test --locked --no-fail-fast --profile sim)
    scenarios=(cargo test --locked --no-fail-fast)
    [ ${#which[@]} -eq 0 ] || which=(--ignored)
    filter=(-- --test-threads 3 "${which[@]}" "$@")
fi

# Hosts are network namespaces, which need root.
chaos() {
    if [ "$(id -u)" = 0 ]; then
        scripts/chaos.sh --once --short
    elif sudo -n true 2>/dev/null; then
        sudo -E env "PATH=$PATH" scripts/chaos.sh --once --short
    else
        echo "chaos: skipped, since it needs root: run make chaos as root"
    fi
}

# Every client again, before servers that are newer than the machine's, and with their psql.
newer_servers() {
    local bin
    if ! command -v apt-get >/dev/null || ! bin=$(scripts/postgresql-trixie.sh); then
        echo "PostgreSQL 17: skipped, since Debian's cannot be had here"
        return 0
    fi
    PGHERD_TEST_PG_BIN=$bin "${scenarios[@]}" -p pgherd-testkit --test matrix
}

status=0
if [ "$everything" = yes ]; then
    "${unit[@]}" --workspace --exclude pgherd-testkit --exclude pgherd-simulator 2>&1 | tee target/unit-tests.log || status=$?
    "${simulation[@]}" -p pgherd-simulator 2>&1 | tee target/simulation.log || status=$?
fi
cargo build --locked -p pgherd
export PGHERD_BIN=${PGHERD_BIN:-$(realpath "$target")/debug/pgherd}
"${scenarios[@]}" -p pgherd-testkit "${filter[@]}" 2>&1 | tee target/scenarios.log || status=$?
if [ "$newer" = yes ]; then
    # What measures, and is not one of the scenarios.
    "${unit[@]}" -p pgherd-proxy "${filter[@]}" 2>&1 | tee -a target/scenarios.log || status=$?
    newer_servers 2>&1 | tee -a target/scenarios.log || status=$?
fi
if [ "$everything" = yes ]; then
    chaos 2>&1 | tee target/chaos.log || status=$?
fi

echo
echo "What clients felt, by fault:"
sort "$PGHERD_TEST_GAPS"
echo
if [ "$everything" = yes ]; then
    grep -hE '^ *Summary|^test result' target/unit-tests.log | sed 's/^ */unit tests: /' || true
    grep -hE '^ *Summary|^test result|schedules in|runs, ' target/simulation.log | sort -u | sed 's/^ */simulation: /' || true
fi
grep -hE '^ *(Summary|FAIL|TIMEOUT) |^test result' target/scenarios.log | sort -u | sed 's/^ */scenarios: /' || true
exit "$status"
