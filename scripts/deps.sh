#!/usr/bin/env bash
# Installs what building and testing need and this machine lacks. Needs no network when nothing is missing.
# With the argument "tests" also what only the tests need: the products that pgherd has to get along with; with "benches"
# the rivals that it is measured beside, with "fuzz" what libFuzzer needs.
set -euo pipefail
for_tests=no
for_benches=no
for_fuzz=no
case ${1:-} in
'') ;;
tests) for_tests=yes ;;
benches) for_benches=yes ;;
fuzz) for_fuzz=yes ;;
*)
    echo "usage: $0 [tests|benches|fuzz]" >&2
    exit 64
    ;;
esac

missing=()
need() { # PACKAGE WHY TEST...
    local package=$1 why=$2
    shift 2
    if ! "$@" >/dev/null 2>&1; then
        missing+=("$package")
        echo "deps: $package is missing: $why"
    fi
}
has_haproxy() { command -v haproxy || test -x /usr/sbin/haproxy; }
has_pgbouncer() { command -v pgbouncer || test -x /usr/sbin/pgbouncer; }
has_nft() { command -v nft || test -x /usr/sbin/nft; }
has_venv() { PATH=/usr/bin:$PATH python3 -c 'import ensurepip, venv'; }
# A program in one source file is compiled as it is started.
has_java() { java --list-modules | grep '^jdk.compiler@'; }
has_postgres_server() { compgen -G '/usr/lib/postgresql/*/bin/postgres' || command -v postgres || pg_config --bindir; }

need gcc "links the programs" command -v cc
need pkg-config "finds libraries" command -v pkg-config
need protobuf-compiler "etcd's API is generated from its description" command -v protoc
need libprotobuf-dev "that description refers to these" test -e /usr/include/google/protobuf/timestamp.proto
need etcd-server "the store of the demo and of the tests" command -v etcd
need etcd-client "etcdctl, with which tests look into the store" command -v etcdctl
need postgresql "the server of the demo and of the tests" has_postgres_server
need postgresql-client "psql and pgbench" command -v psql
if [ "$for_tests" = yes ]; then
    need python3 "runs Patroni" test -x /usr/bin/python3
    need python3-venv "keeps Patroni's packages apart" has_venv
    need haproxy "tests put an unmodified one before the agents" has_haproxy
    need iproute2 "chaos gives each member a host of its own" command -v ip
    need util-linux "it runs programs there" command -v nsenter
    need nftables "it cuts their cables" has_nft
    need e2fsprogs "tests freeze and fill a member's disk" test -x /usr/sbin/mkfs.ext4 -o -x /sbin/mkfs.ext4
    need bindfs "and stop another one from answering" command -v bindfs
    need default-jre-headless "runs PostgreSQL's JDBC driver" has_java
    need libpostgresql-jdbc-java "which is one of the clients that must work" test -e /usr/share/java/postgresql.jar
    need strace "tests count system calls" command -v strace
    need chromium "a browser opens the page (125 MB to fetch, 420 MB installed)" command -v chromium
fi
if [ "$for_benches" = yes ]; then
    need haproxy "the proxy is measured beside it" has_haproxy
    need pgbouncer "and beside this one" has_pgbouncer
    need strace "counts system calls" command -v strace
fi

if [ "$for_fuzz" = yes ]; then
    need g++ "compiles libFuzzer's driver" command -v c++
fi

# What looks for inputs that break a parser needs an unstable compiler for its instrumentation, and nothing else does.
install_fuzzer() {
    [ "$for_fuzz" = yes ] || return 0
    if ! cargo +nightly --version >/dev/null 2>&1; then
        if ! command -v rustup >/dev/null; then
            echo "deps: fuzzing needs a nightly toolchain, and there is no rustup to install it: https://rustup.rs" >&2
            exit 69
        fi
        echo "deps: installing the nightly toolchain: libFuzzer needs its instrumentation"
        rustup toolchain install nightly --profile minimal
    fi
    if ! cargo fuzz --version >/dev/null 2>&1; then
        echo "deps: installing cargo-fuzz with cargo install: it builds and runs what libFuzzer drives"
        cargo install --locked cargo-fuzz
    fi
}

# What comes from PyPI: Patroni, of which tests run members beside ours, and drivers that must work through the proxy. When
# tests run as root, Patroni runs as postgres, who can read neither root's cache nor a python3 that root has installed for
# itself.
install_python() {
    [ "$for_tests" = yes ] || return 0
    local cache
    if [ "$(id -u)" = 0 ]; then cache=/var/cache; else cache=${XDG_CACHE_HOME:-$HOME/.cache}; fi
    python_environment "${PGHERD_TEST_PYTHON:-$cache/pgherd-tests/python}" "Patroni and psycopg" \
        "tests run Patroni's members beside ours"
    python_environment "${PGHERD_TEST_DRIVERS:-$cache/pgherd-tests/drivers}" "drivers" \
        "each must work through the proxy" 'psycopg[binary]>=3.2,<4' 'psycopg2-binary>=2.9,<3' 'SQLAlchemy>=2,<3' 'asyncpg>=0.30,<1'
}
python_environment() { # DIRECTORY WHAT WHY PACKAGE...
    local python=$1 what=$2 why=$3
    shift 3
    if [ -e "$python/complete" ] && [ "$(cat "$python/complete")" = "$*" ]; then return 0; fi
    echo "deps: installing $what into $python: $why"
    (umask 022 && PATH=/usr/bin:$PATH "$(dirname "$0")/python-clients.sh" "$python" "$@")
}

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

if [ ${#missing[@]} -eq 0 ]; then
    install_python
    install_fuzzer
    exit 0
fi
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
install_python
install_fuzzer
