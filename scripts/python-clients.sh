#!/usr/bin/env bash
# Makes a Python environment in the directory given, once: with the packages that are named further, or with psycopg and
# Patroni. Tests that only look for patronictl are skipped, with the reason, where it cannot be made.
set -euo pipefail
venv=$1
shift
asked_for=$*
packages=("$@")
[ ${#packages[@]} -gt 0 ] || packages=('psycopg[binary]>=3.2,<4' 'patroni[etcd3]==4.1.*')

mkdir -p "${venv%/*}"
exec 9> "$venv.lock"
flock 9 # Tests run side by side.
if [ -e "$venv/complete" ] && [ "$(cat "$venv/complete")" = "$asked_for" ]; then exit 0; fi
rm -rf "$venv"
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
echo "$asked_for" > "$venv/complete"
