"""Starts `forgectl serve` as a child process on free ports, for tests of its life and death."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import tempfile
import time

START_SECONDS = 120


def free_ports(count):
    """Ports that were free a moment ago, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Server:
    """A child process; use it in a `with`, which ends it in any case."""

    def __init__(self, program, *arguments, environment=None, ports=None):
        self.port, self.metrics_port = ports or free_ports(2)
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = tempfile.NamedTemporaryFile("w+", prefix="forge-server-", suffix=".log")
        command = [program, "serve", *arguments, "--port", str(self.port), "--metrics-port", str(self.metrics_port)]
        environment = {**os.environ, **(environment or {})}
        self.process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT, env=environment)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=30)
        self._log.close()

    def log(self):
        with open(self._log.name) as file:
            return file.read()

    def status(self, path, port=None):
        """Status of a GET, or None where nobody listens."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=10)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except OSError:
            return None
        finally:
            connection.close()

    def wait_ready(self, seconds=START_SECONDS):
        """Waits until the model can answer, at most so long."""
        end = time.monotonic() + seconds
        while self.status("/readyz", self.metrics_port) != 200:
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.log()}"
            assert time.monotonic() < end, f"not ready after {seconds} s:\n{self.log()}"
            time.sleep(0.1)
        return self

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds):
        """Exit status, or a failure with the log after so many seconds."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.log()}") from None
