#!/usr/bin/env bash
# Fetches the etcd of Debian trixie (3.5), newer than older releases have, installs nothing, and prints where it is:
#   ETCD_BIN=$(scripts/etcd-trixie.sh) make chaos
# Takes the directory to keep it in, target/etcd-trixie unless given. Needs apt and the Debian mirror, the first time only.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$(realpath -m "${1:-${CARGO_TARGET_DIR:-target}/etcd-trixie}")
etcd=$dir/root/usr/bin/etcd

if [ ! -x "$etcd" ]; then
    for tool in apt-get dpkg-deb; do
        command -v "$tool" >/dev/null || { echo "etcd-trixie: $tool is missing; this works on Debian and Ubuntu" >&2; exit 69; }
    done
    # The mirror that this machine uses, or Debian's own.
    mirror=$(grep -rhoE 'https?://[^ ]*/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d/ 2>/dev/null | head -n 1 | tr -d ' ' || true)
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    [ -e "$keyring" ] || { echo "etcd-trixie: $keyring is missing: apt-get install debian-archive-keyring" >&2; exit 69; }
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial"
    echo "deb [signed-by=$keyring] ${mirror:-http://deb.debian.org/debian} trixie main" > "$dir/sources.list"
    # apt in a state of its own: what this machine has and may install stays as it is.
    apt=(-q -o "Dir::State::lists=$dir/lists" -o "Dir::Cache=$dir/cache" -o Dir::State::status=/dev/null
         -o "Dir::Etc::sourcelist=$dir/sources.list" -o Dir::Etc::sourceparts=- -o Acquire::Languages=none)
    if [ "$(id -u)" = 0 ]; then apt+=(-o APT::Sandbox::User=root); fi
    {
        apt-get "${apt[@]}" update
        (cd "$dir" && apt-get "${apt[@]}" download etcd-server)
        rm -rf "$dir/lists" "$dir/cache" "$dir/root"
        dpkg-deb --extract "$dir"/etcd-server_*.deb "$dir/unpacked"
        rm "$dir"/etcd-server_*.deb
        chmod -R go+rX "$dir/unpacked"
        mv "$dir/unpacked" "$dir/root" # Last, so that what is there is whole.
    } >&2
fi
"$etcd" --version | head -n 1 >&2
echo "$etcd"
