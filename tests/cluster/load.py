"""Streams that go on while a cluster is worked on: what is accepted must end with the undisturbed tokens."""

import http.client
import json
import threading
import time

from network import Failed
from streams import Stream

# Of one request: to be accepted somewhere, tries included, and then to end.
ACCEPTED_WITHIN_S, ANSWER_SECONDS = 60, 120


class Load:
    """Clients that ask one gateway after the other, each for one seed again and again."""

    def __init__(self, cluster, gateways, expected):
        self.cluster, self.gateways, self.expected = cluster, gateways, expected
        self.answers, self.refused, self.longest_pause_s, self.failures = 0, 0, 0.0, []
        self.lock, self.ended, self.threads = threading.Lock(), threading.Event(), []

    def __enter__(self):
        for number, seed in enumerate(self.expected):
            self.threads.append(threading.Thread(target=self.ask, args=(number, seed), daemon=True))
            self.threads[-1].start()
        return self

    def __exit__(self, kind, *_):
        self.ended.set()
        deadline = time.monotonic() + ACCEPTED_WITHIN_S + ANSWER_SECONDS
        for thread in self.threads:
            thread.join(max(0, deadline - time.monotonic()))
            if thread.is_alive():
                self.fail("a hang: a client waits for longer than its bounds")
        if kind is None:
            self.check()

    def check(self):
        if self.failures:
            raise Failed(f"{len(self.failures)} of the accepted requests did not end as they should: {self.failures[0]}")

    def more(self, count, seconds=ANSWER_SECONDS):
        """Waits for so many answers more."""
        wanted = self.answers + count
        self.cluster.until(f"{count} answers more", seconds, lambda: self.answers >= wanted or bool(self.failures))
        self.check()

    def ask(self, number, seed):
        while not self.ended.is_set():
            stream, deadline = Stream(seed), time.monotonic() + ACCEPTED_WITHIN_S
            while not self.is_accepted(stream, self.gateways[number % len(self.gateways)]):
                number += 1
                with self.lock:
                    self.refused += 1
                if time.monotonic() > deadline:
                    self.fail(f"seed {seed}: no gateway accepted it within {ACCEPTED_WITHIN_S} s: {stream.error}")
                    return
                time.sleep(0.2)
            number += 1
            if stream.error or not stream.done or stream.text != self.expected[seed]:
                self.fail(f"seed {seed}: {stream.error or ('another text' if stream.done else 'no end')}: {stream.text!r}")
                return
            with self.lock:
                self.answers += 1
                self.longest_pause_s = max(self.longest_pause_s, stream.pause_s)

    def fail(self, text):
        with self.lock:
            self.failures.append(text)

    def is_accepted(self, stream, host):
        """Reads an answer to its end, whatever it is; false where the gateway did not take the request."""
        return self.cluster.network.call(lambda: self.exchange(stream, self.cluster.address(host, 8000)))

    @staticmethod
    def exchange(stream, address):
        connection, accepted = http.client.HTTPConnection(address, timeout=ANSWER_SECONDS), False
        stream.error = None
        try:
            connection.request("POST", "/v1/completions", json.dumps(stream.body), {"content-type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                stream.error = f"{response.status}: {response.read().decode()}"
                # A refusal says that it may be tried again; anything else is an answer, and a wrong one.
                return response.status not in (429, 503)
            accepted, stream.last = True, time.monotonic()
            for line in response:
                stream.line(line.decode().strip())
        except (OSError, http.client.HTTPException) as error:
            stream.error = repr(error)
        finally:
            connection.close()
        return accepted
