#!/usr/bin/env bash
# Makes a Python environment with psycopg and patronictl in the directory given, once. Tests that use it are skipped,
# with the reason, where it cannot be made.
set -euo pipefail
venv=$1

mkdir -p "${venv%/*}"
exec 9> "$venv.lock"
flock 9 # Tests run side by side.
[ ! -e "$venv/complete" ] || exit 0
rm -rf "$venv"
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check 'psycopg[binary]>=3.2,<4' 'patroni[etcd3]==4.1.*'
touch "$venv/complete"
