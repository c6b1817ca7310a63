#!/usr/bin/env bash
# Unpacks Debian's Prometheus (server and promtool) into .venv/prometheus, for the tests of dashboards and alerts; does
# nothing where both are installed. No root is needed unless the package lists are missing.
set -euo pipefail
cd "$(dirname "$0")/.."

target=.venv/prometheus
[ -x "$target/usr/bin/promtool" ] && exit 0
command -v prometheus >/dev/null && command -v promtool >/dev/null && exit 0
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || {
    echo "prometheus: install Prometheus (server and promtool) with your system's package manager" >&2
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
fetch() { (cd "$folder" && apt-get download --quiet=2 prometheus 2>/dev/null); }
fetch || { apt-get update --quiet=2 && fetch; } || {
    echo "prometheus: Debian's package could not be fetched; run apt-get update as root, or install it" >&2
    exit 1
}
dpkg-deb --extract "$folder"/prometheus_*.deb "$folder/unpacked"
mkdir -p "$target/usr/bin"
cp "$folder"/unpacked/usr/bin/prometheus "$folder"/unpacked/usr/bin/promtool "$target/usr/bin/"
