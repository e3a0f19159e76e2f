#!/usr/bin/env bash
# Installs what building and testing need and this machine lacks. Needs no network when nothing is missing.
set -euo pipefail

missing=()
need() { # PACKAGE WHY TEST...
    local package=$1 why=$2
    shift 2
    if ! "$@" >/dev/null 2>&1; then
        missing+=("$package")
        echo "deps: $package is missing: $why"
    fi
}
has_postgres_server() { compgen -G '/usr/lib/postgresql/*/bin/postgres' || command -v postgres || pg_config --bindir; }

need gcc "links the programs" command -v cc
need pkg-config "finds libraries" command -v pkg-config
need protobuf-compiler "etcd's API is generated from its description" command -v protoc
need libprotobuf-dev "that description refers to these" test -e /usr/include/google/protobuf/timestamp.proto
need etcd-server "the store of the demo and of the tests" command -v etcd
need etcd-client "etcdctl, with which tests look into the store" command -v etcdctl
need postgresql "the server of the demo and of the tests" has_postgres_server
need postgresql-client "psql and pgbench" command -v psql

if ! command -v cargo >/dev/null; then
    echo "deps: cargo is missing. Debian's is too old; install the current one: https://rustup.rs" >&2
    exit 69
fi
wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$(dirname "$0")/../Cargo.toml")
have=$(rustc --version | cut -d' ' -f2)
if [ "$(printf '%s\n' "$wanted" "$have" | sort -V | head -n 1)" != "$wanted" ]; then
    echo "deps: rustc is $have, at least $wanted is needed: rustup update" >&2
    exit 69
fi

[ ${#missing[@]} -gt 0 ] || exit 0
if ! command -v apt-get >/dev/null; then
    echo "deps: there is no apt-get here; install these, or what they are called here: ${missing[*]}" >&2
    exit 69
fi
as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo)
# Debian would make and start a cluster of its own on installation, which nobody here needs.
config=/etc/postgresql-common/createcluster.conf
if [[ " ${missing[*]} " == *" postgresql "* && ! -e $config ]]; then
    "${as_root[@]}" mkdir -p "${config%/*}"
    echo 'create_main_cluster = false' | "${as_root[@]}" tee "$config" >/dev/null
fi
echo "deps: installing ${missing[*]}"
"${as_root[@]}" apt-get update -q
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
