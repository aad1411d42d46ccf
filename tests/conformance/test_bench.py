"""`forgectl bench serve` against the server under test: what it reports is what the server counted."""

import json
import os
import subprocess

import pytest

from conftest import MODEL

PROGRAM = os.environ.get("FORGE_TEST_PROGRAM")
pytestmark = pytest.mark.skipif(not PROGRAM, reason="needs FORGE_TEST_PROGRAM")


def bench(url, *arguments):
    command = [PROGRAM, "bench", "serve", "--url", f"{url}/v1", "--model", MODEL, *arguments, "-o", "json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=600).stdout)


@pytest.mark.parametrize("interface", ["completions", "chat"])
def test_lengths_and_totals_are_the_servers(url, http_server, interface):
    before = http_server.metric("forge_generation_tokens_total")
    report = bench(url, "--endpoint", interface, "--requests", "12", "--concurrency", "4", "--warmup", "0",
                   "--input-tokens", "64-96", "--output-tokens", "16", "--slo", "ttft:60s")  # fmt: skip
    point = report["points"][0]
    summary = point["summary"]
    assert summary["completed"] == 12 and not summary["failed"]
    assert summary["meanOutputTokens"] == 16 and summary["goodput"]["share"] == 1
    for request in point["requests"]:
        assert request["inputTokens"] == request["wantedInputTokens"]
    # Two requests of at most four tokens found out how the server counts.
    generated = http_server.metric("forge_generation_tokens_total") - before
    assert 12 * 16 < generated <= 12 * 16 + 8


def test_a_sweep_of_rates(url):
    report = bench(url, "--request-rate", "4,8", "--requests", "8", "--input-tokens", "32", "--output-tokens", "8")
    assert [point["load"]["requestRate"] for point in report["points"]] == [4, 8]
    for point in report["points"]:
        assert point["summary"]["completed"] == 8
        assert point["summary"]["ttftMs"]["p50"] <= point["summary"]["e2eMs"]["p50"]
