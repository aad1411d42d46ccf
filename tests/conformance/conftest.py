"""Fixtures of the conformance suite: the server under test, raw HTTP, metrics."""

import http.client
import json
import os
import time
import urllib.parse

import openai
import pytest

MODEL = "forge"


def _variable(name):
    value = os.environ.get(name)
    if not value:
        pytest.exit(f"{name} is not set: start the suite with tests/conformance/run.sh", returncode=2)
    return value


@pytest.fixture(scope="session")
def url():
    """Address of the API, such as http://127.0.0.1:8000."""
    return _variable("FORGE_TEST_URL").rstrip("/")


@pytest.fixture(scope="session")
def client(url):
    """The openai SDK without retries, so that every answer is seen."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=300)


class Http:
    """Requests whose bytes the tests choose themselves."""

    def __init__(self, url):
        parts = urllib.parse.urlsplit(url)
        self.address = (parts.hostname, parts.port)

    def request(self, method, path, body=None, headers=None):
        """Status, headers and body."""
        connection = http.client.HTTPConnection(*self.address, timeout=120)
        try:
            headers = {"content-type": "application/json", **(headers or {})}
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def get(self, path):
        return self.request("GET", path)

    def post(self, path, body):
        """Posts bytes as they are, anything else as JSON; status and decoded answer."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, _, answer = self.request("POST", path, raw)
        return status, json.loads(answer)

    def metric(self, name):
        """Sum of a metric's samples over its labels."""
        status, _, body = self.get("/metrics")
        assert status == 200
        samples = [line.rsplit(" ", 1) for line in body.decode().splitlines() if not line.startswith("#")]
        values = [float(value) for series, value in samples if series.split("{")[0] == name]
        assert values, f"no metric {name}"
        return sum(values)

    def wait_for_metric(self, name, wanted, seconds=10):
        """Waits until a metric has a value, at most so long."""
        end = time.monotonic() + seconds
        while (value := self.metric(name)) != wanted:
            assert time.monotonic() < end, f"{name} is {value}, not {wanted}, after {seconds} s"
            time.sleep(0.05)


@pytest.fixture(scope="session")
def http_server(url):
    return Http(url)


@pytest.fixture(scope="session")
def chat_body():
    """Makes the body of a short greedy chat request."""

    def body(text="Say hello.", **fields):
        base = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0}
        return {**base, **fields}

    return body
