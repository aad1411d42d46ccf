#!/usr/bin/env bash
# Every check of the repository, from a clean checkout: formatting, lints, build, unit, property, parity and layering
# tests, a cluster of real processes, the same under faults, documentation, examples, and conformance with the real
# clients against a real server.
#
# Needs cargo, python3 (3.11) with venv, and curl (and uses root, iproute2 and nftables where they are); everything else it installs below the target directory. Stages can be
# named to run only them: tests/all.sh lint test. docs/testing.md says what each one checks.
set -euo pipefail
cd "$(dirname "$0")/.."
root="$PWD"
target="${CARGO_TARGET_DIR:-$root/target}"
mkdir -p "$target"
export CARGO_TERM_COLOR="${CARGO_TERM_COLOR:-never}" CARGO_INCREMENTAL="${CARGO_INCREMENTAL:-0}"
export FORGE_HOME="${FORGE_HOME:-$target/forge-home}"

stage_lint() {
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --locked -- -D warnings
}

stage_build() {
    cargo build --release --locked --bin forgectl --bin forge
}

# The default model's file: the parity and batch-invariance tests run on it, and CI must not pass without it.
default_model() {
    if [ -z "${FORGE_TEST_SMOLLM2:-}" ]; then
        FORGE_TEST_SMOLLM2="$(tests/default_model.sh "$target/release/forgectl")"
        export FORGE_TEST_SMOLLM2
    fi
}

stage_test() {
    default_model
    CI="${CI:-true}" cargo test --workspace --locked
}

# Every program as a process of its own; says whether in network namespaces or, where there are none, on the loopback.
stage_cluster() {
    default_model
    cargo build --workspace --bins --locked
    python3 tests/cluster/configs.py --programs "$target/debug" --model "$FORGE_TEST_SMOLLM2"
    python3 tests/cluster/run.py --programs "$target/debug" --model "$FORGE_TEST_SMOLLM2" --network "${FORGE_TEST_NETWORK:-any}"
    python3 tests/cluster/upgrade.py --programs "$target/debug" --network "${FORGE_TEST_NETWORK:-any}"
    python3 tests/cluster/certs.py --programs "$target/debug" --network "${FORGE_TEST_NETWORK:-any}"
}

# A chaos minute. Where there are no namespaces it says so and only kills and freezes.
stage_chaos() {
    cargo build --workspace --bins --locked
    python3 tests/cluster/chaos.py --programs "$target/debug" --network "${FORGE_TEST_NETWORK:-any}" --slack "${FORGE_TEST_SLACK:-3}"
}

stage_docs() {
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked
}

stage_examples() {
    default_model
    local tiny="tests/fixtures/model/llama"
    cargo build --locked -p forge-tests --examples
    local examples="$target/debug/examples"
    "$examples/generate" "$FORGE_TEST_SMOLLM2" "The capital of France is" | tee "$target/generate.out"
    grep -q Paris "$target/generate.out"
    printf 'Why is the sky blue?\n' | "$examples/chat" "$FORGE_TEST_SMOLLM2" | tee "$target/chat.out"
    grep -q light "$target/chat.out"
    echo '[1, 2, 3]' | "$examples/logits" "$tiny" "$target/logits.out"
    test -s "$target/logits.out"
    "$examples/bench_model" "$tiny" --prefill 32 --decode 8 --batch 4
}

stage_conformance() {
    default_model
    FORGE_TEST_PROGRAM="$target/release/forgectl" FORGE_TEST_DEBUG_PROGRAM="$target/debug/forgectl" tests/conformance/run.sh
}

stages=("$@")
[ "${#stages[@]}" -gt 0 ] || stages=(lint build test cluster chaos docs examples conformance)
began=$SECONDS
for stage in "${stages[@]}"; do
    declare -F "stage_$stage" >/dev/null || { echo "no stage $stage: lint build test cluster chaos docs examples conformance" >&2; exit 2; }
    echo "== $stage"
    start=$SECONDS
    "stage_$stage"
    echo "== $stage done in $((SECONDS - start)) s"
done
echo "all.sh: ${#stages[@]} stages passed in $((SECONDS - began)) s"
