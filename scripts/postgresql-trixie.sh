#!/usr/bin/env bash
# Fetches the PostgreSQL of Debian trixie (17), server and clients, installs nothing, and prints where its programs are:
#   PGHERD_TEST_PG_BIN=$(scripts/postgresql-trixie.sh) scripts/test.sh every_client
# Takes the directory to keep it in; without one that is where the tests look for a psql that is newer than the machine's.
# Needs apt and the Debian mirror, the first time only.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "$(id -u)" = 0 ]; then cache=/var/cache; else cache=${XDG_CACHE_HOME:-$HOME/.cache}; fi
dir=$(realpath -m "${1:-$cache/pgherd-tests/postgresql-17}")
bin=$dir/usr/lib/postgresql/17/bin

fetch() {
    for tool in apt-get dpkg-deb; do
        command -v "$tool" >/dev/null || { echo "postgresql-trixie: $tool is missing; this works on Debian and Ubuntu"; exit 69; }
    done
    # The mirror that this machine uses, or Debian's own.
    local mirror keyring=/usr/share/keyrings/debian-archive-keyring.gpg work=$dir.part
    mirror=$(grep -rhoE 'https?://[^ ]*/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d/ 2>/dev/null | head -n 1 | tr -d ' ' || true)
    [ -e "$keyring" ] || { echo "postgresql-trixie: $keyring is missing: apt-get install debian-archive-keyring"; exit 69; }
    rm -rf "$work"
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/packages" "$work/root"
    echo "deb [signed-by=$keyring] ${mirror:-http://deb.debian.org/debian} trixie main" > "$work/sources.list"
    # apt in a state of its own: what this machine has and may install stays as it is.
    local apt=(-q -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache" -o Dir::State::status=/dev/null
        -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=- -o Acquire::Languages=none)
    if [ "$(id -u)" = 0 ]; then apt+=(-o APT::Sandbox::User=root); fi
    apt-get "${apt[@]}" update
    # With every library that they need, since those of an older release will not do; the compiler of queries is not needed.
    local packages
    packages=$(apt-get "${apt[@]}" install --no-install-recommends --print-uris -y postgresql-17 patchelf |
        sed -n "s/^'[^']*' \([^_]*\)_.*/\1/p" | grep -E '^(lib|zlib1g|postgresql-(client-)?17|patchelf)' | grep -vE '^lib(llvm|perl|.*-perl$)')
    # shellcheck disable=SC2086
    (cd "$work/packages" && apt-get "${apt[@]}" download $packages)
    local package
    for package in "$work"/packages/*.deb; do dpkg-deb --extract "$package" "$work/root"; done
    chmod -R go+rX "$work/root"
    rm -rf "$dir"
    mv "$work/root" "$dir"
    rm -rf "$work"
}

# Programs look for their libraries beside themselves, by the loader that came with them.
bend() {
    local libraries loader program
    libraries=$(dirname "$(find "$dir/usr/lib" -name 'libpq.so.5' | head -n 1)")
    loader=$(find "$libraries" -name 'ld-linux*.so.*' | head -n 1)
    for program in "$bin"/*; do
        case $(head -c 4 "$program" | tr -d '\0') in
        *ELF*) "$loader" --library-path "$libraries" "$dir/usr/bin/patchelf" --set-interpreter "$loader" \
            --force-rpath --set-rpath "$libraries" "$program" ;;
        esac
    done
    touch "$dir/complete" # Last, so that what is there is whole.
}

if [ ! -e "$dir/complete" ]; then
    mkdir -p "${dir%/*}"
    umask 022
    # Not joined by &&, which would let them go on after what fails in them.
    {
        fetch
        bend
    } >&2
fi
"$bin/postgres" --version >&2
echo "$bin"
