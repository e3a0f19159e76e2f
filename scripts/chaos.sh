#!/usr/bin/env bash
# Runs the chaos table: three members, three etcd members, a proxy and clients, each on a host of its own (network
# namespaces; needs root), under faults. What was interrupted goes on where it was; each run is a line of
# target/chaos/results.jsonl, and the logs of what was not held are in target/chaos/logs.
#
#   scripts/chaos.sh                     the table: five runs asynchronous, two synchronous, two quorum
#   scripts/chaos.sh --once --short      each case once within six minutes, as make test does; fails on lost safety
#   CASE=partition MODE=quorum RUNS=1 scripts/chaos.sh
#   scripts/chaos.sh --table | --list    what has been run; the names of the cases
#   ETCD_BIN=$(scripts/etcd-trixie.sh) scripts/chaos.sh     with etcd 3.5 instead of what is installed
#
# PGHERD_BIN names another binary than the release build.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-target}

case " $* " in
*" --list "* | *" --table "* | *" --help "*) ;;
*)
    if [ "$(id -u)" != 0 ]; then
        echo "chaos: network namespaces need root; run this as root (sudo -E $0 $*)" >&2
        exit 69
    fi
    missing=()
    command -v ip >/dev/null || missing+=(iproute2)
    command -v nsenter >/dev/null || missing+=(util-linux)
    PATH=$PATH:/usr/sbin command -v nft >/dev/null || missing+=(nftables)
    if [ ${#missing[@]} -gt 0 ]; then
        echo "chaos: installing ${missing[*]}: hosts, cables and faults are made with these"
        apt-get update -q
        DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
    fi
    ;;
esac

case " $* " in
*" --list "* | *" --help "*) export PGHERD_BIN=unused ;;
*" --table "*) export PGHERD_BIN=${PGHERD_BIN:-$(realpath "$target/chaos/pgherd")} ;; # What was measured.
esac
if [ -z "${PGHERD_BIN:-}" ]; then
    cargo build --locked --release -p pgherd
    # Another build meanwhile must not change what is being measured.
    mkdir -p "$target/chaos"
    install -m 755 "$target/release/pgherd" "$target/chaos/pgherd"
    PGHERD_BIN=$(realpath "$target/chaos/pgherd")
    export PGHERD_BIN
fi
cargo build --locked -p pgherd-chaos
PATH=$PATH:/usr/sbin exec "$target/debug/pgherd-chaos" --dir "$target/chaos" "$@"
