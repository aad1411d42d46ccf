#!/usr/bin/env bash
# The conformance suite: real clients against a real server that serves the real default model.
#
#   tests/conformance/run.sh [pytest arguments]
#
# Needs python3 with venv, and curl. What it installs and downloads stays below target/ and is used again:
# the Python environment in target/conformance-venv, the model in target/forge-home.
#   FORGE_TEST_PROGRAM        forgectl to test (default: target/release/forgectl, built if missing)
#   FORGE_TEST_DEBUG_PROGRAM  forgectl with fault injection (default: target/debug/forgectl, built if missing)
#   FORGE_TEST_SMOLLM2        the default model's file, if it is here already; else it is pulled
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$(cd "$here/../.." && pwd)"
target="${CARGO_TARGET_DIR:-$root/target}"
cd "$root"

program="${FORGE_TEST_PROGRAM:-$target/release/forgectl}"
debug_program="${FORGE_TEST_DEBUG_PROGRAM:-$target/debug/forgectl}"
[ -x "$program" ] || cargo build --release --bin forgectl
[ -x "$debug_program" ] || cargo build --bin forgectl

venv="$target/conformance-venv"
stamp="$venv/requirements.sha256"
wanted="$(sha256sum "$here/requirements.txt" | cut -d' ' -f1)"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
    echo "$wanted" >"$stamp"
fi

export FORGE_HOME="${FORGE_HOME:-$target/forge-home}"
model="${FORGE_TEST_SMOLLM2:-}"
if [ -z "$model" ]; then
    model="$("$root/tests/default_model.sh" "$program")"
fi

log="$target/conformance-server.log"
server=""
cleanup() {
    if [ -n "$server" ] && kill -0 "$server" 2>/dev/null; then
        kill -KILL "$server"
        wait "$server" 2>/dev/null || true
    fi
}
trap cleanup EXIT

read -r port metrics_port < <("$venv/bin/python" -c 'import sys; sys.path.insert(0, sys.argv[1]); from server import free_ports; print(*free_ports(2))' "$here")
# The default model as the README serves it; a file given by hand needs the name that the clients use.
named=(smollm2:135m)
[ -z "${FORGE_TEST_SMOLLM2:-}" ] || named=("$FORGE_TEST_SMOLLM2" --model-name forge)
"$program" serve "${named[@]}" --port "$port" --metrics-port "$metrics_port" >"$log" 2>&1 &
server=$!
for _ in $(seq 1 600); do
    if ! kill -0 "$server" 2>/dev/null; then
        echo "the server ended while starting:" >&2
        cat "$log" >&2
        exit 1
    fi
    if curl -fsS -o /dev/null "http://127.0.0.1:$metrics_port/readyz" 2>/dev/null; then
        ready=1
        break
    fi
    sleep 0.2
done
[ -n "${ready:-}" ] || { echo "the server was not ready within 120 s:" >&2; cat "$log" >&2; exit 1; }

export FORGE_TEST_URL="http://127.0.0.1:$port" FORGE_TEST_METRICS_URL="http://127.0.0.1:$metrics_port"
export FORGE_TEST_PROGRAM="$program" FORGE_TEST_DEBUG_PROGRAM="$debug_program" FORGE_TEST_MODEL="$model"
bash "$here/test_curl.sh"
"$venv/bin/python" -m pytest -q -p no:cacheprovider --durations=5 "$here" "$@"

kill -TERM "$server"
status=0
wait "$server" || status=$?
server=""
[ "$status" -eq 0 ] || { echo "the server exited with $status after SIGTERM:" >&2; tail -50 "$log" >&2; exit 1; }
echo "conformance: passed"
