#!/usr/bin/env bash
# Looks for bytes that break a promise of any parser that reads some from outside: libFuzzer for MINUTES (1 unless set) on
# each target of proxy/fuzz, then CONNECTIONS malformed connections (a million unless set) to the real binary.
# With arguments: only these targets, and no connections. `scripts/fuzz.sh --build` only builds.
#
# New inputs are kept in target/fuzz/corpus; one worth keeping for good goes into proxy/fuzz/corpus, with a name that says
# what it is. An input that breaks a promise is left in target/fuzz/artifacts.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/deps.sh fuzz
all=no
build_only=no
[ $# -gt 0 ] || all=yes
if [ "${1:-}" = --build ]; then
    build_only=yes
    shift
fi

target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
host=$(rustc -vV | sed -n 's/^host: //p')
# The workspace's own versions, so that what is fuzzed is what is built. Only libFuzzer comes on top.
cp Cargo.lock proxy/fuzz/Cargo.lock
(cd proxy && cargo +nightly fuzz build --target-dir "$target/fuzz/build")
[ "$build_only" = no ] || exit 0

if [ "$all" = yes ]; then
    mapfile -t names < <(sed -n 's/^name = "\([a-z_]*\)"$/\1/p' proxy/fuzz/Cargo.toml)
else
    names=("$@")
fi
seconds=$((${MINUTES:-1} * 60))
failed=()
for name in "${names[@]}"; do
    corpus=$target/fuzz/corpus/$name
    artifacts=$target/fuzz/artifacts/$name
    mkdir -p "$corpus" "$artifacts"
    echo "fuzz: $name for $seconds s"
    if ! "$target/fuzz/build/$host/release/$name" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 -max_len=16384 \
        -print_final_stats=1 -artifact_prefix="$artifacts/" "$corpus" "proxy/fuzz/corpus/$name" >"$artifacts/log" 2>&1; then
        failed+=("$name")
        tail -n 40 "$artifacts/log"
    fi
    grep -E '^(Done|stat::number_of_executed_units|stat::new_units_added)' "$artifacts/log" || true
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "fuzz: a promise is broken in: ${failed[*]}; the inputs are in $target/fuzz/artifacts" >&2
    exit 1
fi
[ "$all" = yes ] || exit 0

export PGHERD_TEST_STRANGERS=${CONNECTIONS:-1000000}
scripts/test.sh strangers
