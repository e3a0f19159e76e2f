#!/usr/bin/env bash
# Runs the built binary's demo. PostgreSQL refuses to run as root, so root runs it as the user postgres.
set -euo pipefail
cd "$(dirname "$0")/.."
binary=${CARGO_TARGET_DIR:-target}/release/pgherd

if [ "$(id -u)" != 0 ]; then
    exec "$binary" demo "$@"
fi
# Where root builds, others often may not look.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
trap : INT TERM # The demo ends by itself, and then this does.
chmod 755 "$copy"
install -m 755 "$binary" "$copy/pgherd"
cd /
runuser -u postgres -- "$copy/pgherd" demo "$@"
