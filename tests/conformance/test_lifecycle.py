"""Start, drain, death and return of the server process.

FORGE_TEST_PROGRAM is a release build of forgectl, FORGE_TEST_DEBUG_PROGRAM one with debug assertions, in which
faults can be injected (FORGE_FAULT), and FORGE_TEST_MODEL what they serve.
"""

import os
import socket
import threading
import time

import openai
import pytest

from conftest import MODEL
from server import Server, free_ports

PROGRAM = os.environ.get("FORGE_TEST_PROGRAM")
DEBUG_PROGRAM = os.environ.get("FORGE_TEST_DEBUG_PROGRAM")
SERVED = os.environ.get("FORGE_TEST_MODEL")
SMALL = ("--model-name", MODEL, "--max-model-len", "2048", "--kv-memory", "256MiB", "--max-batch-size", "8")

pytestmark = pytest.mark.skipif(
    not (PROGRAM and DEBUG_PROGRAM and SERVED), reason="needs FORGE_TEST_PROGRAM, FORGE_TEST_DEBUG_PROGRAM and FORGE_TEST_MODEL"
)


def serve(*arguments, program=None, **options):
    return Server(program or PROGRAM, SERVED, *SMALL, *arguments, **options)


def sdk(server, retries=0):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=retries, timeout=120)


def stream(server, tokens, **fields):
    return sdk(server).completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=tokens, temperature=0, stream=True,
        extra_body={"ignore_eos": True}, **fields,
    )  # fmt: skip


class Reader(threading.Thread):
    """Reads a stream to its end in the background."""

    def __init__(self, chunks):
        super().__init__(daemon=True)
        self.chunks, self.text, self.count, self.error = chunks, "", 0, None
        self.started = threading.Event()
        self.start()

    def run(self):
        try:
            for chunk in self.chunks:
                for choice in chunk.choices:
                    self.text += choice.text
                    self.count += 1
                self.started.set()
        except Exception as error:
            self.error = error
        finally:
            self.started.set()


def test_probes_and_addresses():
    with serve() as server:
        server.wait_ready()
        for path in ("/livez", "/readyz", "/healthz", "/metrics"):
            assert server.status(path, server.metrics_port) == 200, path
        for path in ("/health", "/health/ready", "/health/full", "/metrics"):
            assert server.status(path) == 200, path
        log = server.log()
        assert server.url in log and "curl" in log
        server.terminate()
        assert server.wait(30) == 0, server.log()


def test_a_port_in_use_is_said_so():
    ports = free_ports(2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[0]))
        taken.listen()
        with serve(ports=ports) as server:
            assert server.wait(60) not in (0, None)
            log = server.log()
    assert str(ports[0]) in log and "in use" in log and "--port" in log
    assert "panicked" not in log


def test_another_address_needs_keys_or_insecure():
    with serve("--host", "0.0.0.0") as server:
        assert server.wait(60) not in (0, None)
        assert "keys create" in server.log() and "--insecure" in server.log()


def test_wrong_settings_are_refused_by_name():
    for arguments, word in [
        (("--max-model-len", "0"), "max"),
        (("--kv-cache-dtype", "int3"), "f16"),
        (("--set", "maxModelLne=5"), "maxModelLen"),
        (("--kv-memory=-5",), "kv-memory"),
        (("--max-model-len", "999999"), "8192"),
        (("--no-such-flag",), "no-such-flag"),
    ]:
        with Server(PROGRAM, SERVED, *arguments) as server:
            assert server.wait(60) not in (0, None), arguments
            log = server.log()
            assert word.lower() in log.lower() and "panicked" not in log, f"{arguments}: {log}"


def test_files_that_are_no_model(tmp_path):
    truncated = tmp_path / "cut.gguf"
    with open(SERVED, "rb") as file:
        truncated.write_bytes(file.read(1_000_000))
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"GGUF" + os.urandom(4096))
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (truncated, junk, empty, tmp_path / "missing"):
        with Server(PROGRAM, str(path)) as server:
            assert server.wait(60) not in (0, None), path
            log = server.log()
            assert "panicked" not in log and len(log.strip()) > 20, f"{path}: {log}"


def test_termination_drains_a_running_stream():
    with serve() as server:
        server.wait_ready()
        whole = "".join(c.choices[0].text for c in stream(server, 200) if c.choices)
        reader = Reader(stream(server, 200))
        assert reader.started.wait(60)
        server.terminate()
        deadline = time.monotonic() + 10
        while server.status("/readyz", server.metrics_port) == 200:
            assert time.monotonic() < deadline, "readiness goes first"
            time.sleep(0.02)
        with pytest.raises((openai.APIStatusError, openai.APIConnectionError)):
            sdk(server).completions.create(model=MODEL, prompt="x", max_tokens=1)
        reader.join(60)
        assert reader.error is None and reader.text == whole
        assert server.wait(30) == 0, server.log()


def test_a_second_termination_stops_at_once():
    with serve() as server:
        server.wait_ready()
        reader = Reader(stream(server, 1900))
        assert reader.started.wait(60)
        server.terminate()
        time.sleep(0.5)
        assert server.process.poll() is None, "the first one waits for the stream"
        server.terminate()
        server.wait(5)
        reader.join(10)
        assert reader.count < 1900


def test_draining_ends_in_time():
    with serve("--set", "gateway.drainTimeoutS=1") as server:
        server.wait_ready()
        reader = Reader(stream(server, 1900))
        assert reader.started.wait(60)
        server.terminate()
        server.wait(15)


def test_an_engines_death_is_a_pause_and_no_more():
    """The engine's thread panics at a step; its supervisor restarts it and the stream goes on with the same tokens."""
    with serve(program=DEBUG_PROGRAM) as server:
        server.wait_ready(300)
        whole = "".join(c.choices[0].text for c in stream(server, 60) if c.choices)
    fault = {"FORGE_FAULT": "engine-panic-at-step:30"}
    with serve(program=DEBUG_PROGRAM, environment=fault) as server:
        server.wait_ready(300)
        reader = Reader(stream(server, 60))
        reader.join(240)
        assert reader.error is None, f"{reader.error}\n{server.log()}"
        assert reader.text == whole
        assert "injected fault" in server.log()
        server.wait_ready(60)
        server.terminate()
        assert server.wait(60) == 0, server.log()


def test_an_engine_that_cannot_come_back_ends_the_process():
    fault = {"FORGE_FAULT": "engine-panic-every:2"}
    with serve(program=DEBUG_PROGRAM, environment=fault) as server:
        server.wait_ready(300)
        Reader(stream(server, 60))
        assert server.wait(240) not in (0, None), server.log()


def test_overload_is_429_with_retry_after():
    with serve("--max-waiting", "1", "--set", "maxBatchSize=1") as server:
        server.wait_ready()
        readers = [Reader(stream(server, 400))]
        assert readers[0].started.wait(60)
        answers = []

        def ask():
            try:
                sdk(server).completions.create(model=MODEL, prompt="x", max_tokens=1)
                answers.append(200)
            except openai.APIStatusError as error:
                answers.append((error.status_code, error.response.headers.get("retry-after")))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        refused = [answer for answer in answers if answer != 200]
        assert refused and all(status == 429 and int(after) >= 1 for status, after in refused), answers
        readers[0].join(60)
        assert readers[0].error is None


def test_keys_are_asked_for(tmp_path):
    import subprocess

    environment = {"FORGE_HOME": str(tmp_path)}
    made = subprocess.run(
        [PROGRAM, "keys", "create", "conformance", "--rpm", "3"], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    key = next(word for word in made.stdout.split() if len(word) >= 24)
    with serve(environment=environment) as server:
        server.wait_ready()
        wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.completions.create(model=MODEL, prompt="x", max_tokens=1)
        right = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        for _ in range(3):
            right.completions.create(model=MODEL, prompt="x", max_tokens=1)
        with pytest.raises(openai.RateLimitError) as caught:
            right.completions.create(model=MODEL, prompt="x", max_tokens=1)
        assert int(caught.value.response.headers["retry-after"]) >= 1
