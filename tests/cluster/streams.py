"""Streamed answers, and whether they are those of an undisturbed run."""

import concurrent.futures
import http.client
import json
import time

from network import Failed

MAX_TOKENS = 96
# Different beginnings, so that the router uses all replicas.
WHO = ["a fox", "an old king", "three sisters", "the last dragon", "a clever tailor", "one grey mouse", "a giant", "the miller"]
# Pieces that every answer has when the disturbance comes, or that one has, if the others wait.
EARLY_PIECES, LATE_PIECES = 8, 40


class Stream:
    """One streamed answer: its text, and the longest pause between two pieces."""

    def __init__(self, seed=None, key=None):
        prompt = f"Once upon a time in a small village there lived {WHO[(seed or 0) % len(WHO)]}"
        self.pieces, self.pause_s, self.last, self.done, self.error = [], 0.0, time.monotonic(), False, None
        self.body = {"model": "story", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0.8, "stream": True}
        if seed is not None:
            self.body["seed"] = seed
        self.headers = {"idempotency-key": key} if key else {}

    def read(self, cluster, host):
        try:
            status, text = cluster.http(cluster.address(host, 8000), "POST", "/v1/completions", self.body, self.headers, self.line)
            if status != 200:
                self.error = f"{status}: {text}"
        except (OSError, http.client.HTTPException) as error:
            self.error = repr(error)
        return self

    def line(self, line):
        now = time.monotonic()
        if not line.startswith("data: "):
            return
        self.pause_s, self.last = max(self.pause_s, now - self.last), now
        if line == "data: [DONE]":
            self.done = True
            return
        event = json.loads(line[6:])
        if "error" in event:
            self.error = event["error"]["message"]
            return
        self.pieces += [choice["text"] for choice in event["choices"]]

    @property
    def text(self):
        return "".join(self.pieces)


def disturbed(cluster, answers, disturb):
    """Reads (stream, gateway) pairs at once; `disturb` happens in the middle of all of them."""
    streams = [stream for stream, _ in answers]
    with concurrent.futures.ThreadPoolExecutor(len(answers)) as pool:
        reading = [pool.submit(stream.read, cluster, host) for stream, host in answers]
        if disturb:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and not is_middle(streams):
                time.sleep(0.02)
            going_on = sum(not stream.done and not stream.error for stream in streams)
            disturb()
            if going_on == 0:
                raise Failed("all answers were over before the disturbance: ask for more tokens")
        return [answer.result() for answer in reading]


def is_middle(streams):
    counts = [len(stream.pieces) for stream in streams]
    return min(counts) >= EARLY_PIECES or max(counts) >= LATE_PIECES


def streams(cluster, hosts, seeds, disturb=None):
    """Answers by seed, from the gateways by turns."""
    answers = [(Stream(seed), hosts[at % len(hosts)]) for at, seed in enumerate(seeds)]
    return dict(zip(seeds, disturbed(cluster, answers, disturb)))


def check_equal(what, answers, expected):
    for seed, answer in answers.items():
        if answer.error or not answer.done:
            raise Failed(f"{what}: the answer of seed {seed} ended with {answer.error or 'no end'} after {len(answer.pieces)} pieces")
        if answer.text != expected[seed]:
            raise Failed(f"{what}: the answer of seed {seed} differs:\n  {answer.text!r}\n  {expected[seed]!r}")
    print(f"ok: {what}: {len(answers)} answers equal, longest pause {max(answer.pause_s for answer in answers.values()):.2f} s", flush=True)
