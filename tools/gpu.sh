#!/usr/bin/env bash
# Everything that a GPU can tell in nine minutes: `bash tools/gpu.sh OUT`; on a CPU, to see that it runs, with --tiny.
# tools/gpu.py has the parts and their flags. PYTHON: another one; COMMIT: of code that is no clone; WHEELS: a folder of
# wheels that are installed for this run alone, without a network (default tools/wheels, where it is).
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: bash tools/gpu.sh OUT [--tiny] [--only PART ...] [--seconds N]" >&2; exit 2; }
out=$1
case $out in -*) ;; *) mkdir -p "$out"; out=$(cd "$out" && pwd); set -- "$out" "${@:2}" ;; esac
cd "$(dirname "$0")/.."
: "${PYTHON:=python3}" "${WHEELS:=tools/wheels}"
if [ -d "$WHEELS" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONUNBUFFERED=1
"$PYTHON" -m tools.gpu "$@" &
trap 'kill -TERM $!; wait $!' TERM INT
wait $!
