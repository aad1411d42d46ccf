"""Clients of a chaos test: streams that go on all the time, each bounded, each compared with an undisturbed run.

A client sends its order again and again, to one gateway and, if that breaks, to the other. What it may see is written in
`Load.judge`; everything else is a violation. All clients run in one thread, on the operator's host.
"""

import asyncio
import collections
import dataclasses
import json
import random
import time

from cluster import GATEWAYS, METRICS_PORTS, samples
from streams import WHO

# Refusals that say: nothing was accepted, come again. By status: type and code.
RETRYABLE = {503: ("service_unavailable_error", "model_unavailable"), 429: ("rate_limit_error", "overloaded")}
PAUSES = [0.1, 0.25, 0.5, 1, 2, 5, 10, 20]
# After a fault of its gateway a client's connection may still break for so long.
GRACE_S = 5


class Bounds:
    """Seconds that a client waits: for a connection, an answer's head, the next byte, the whole answer."""

    def __init__(self, slack):
        self.slack = slack
        # A gateway sends a comment each second while a stream has nothing to say.
        self.connect_s, self.head_s, self.silence_s, self.whole_s = (slack * seconds for seconds in (3, 15, 6, 90))


class Order:
    """One client's request. Every fourth draws its seed from its idempotency key, every fourth has both, the others a seed."""

    def __init__(self, number, tokens):
        chance = random.Random(number)
        self.number, self.kind = number, ["plain", "plain", "keyed", "bound"][number % 4]
        self.body = {
            "model": "story",
            "prompt": f"{number}: once upon a time there lived {WHO[number % len(WHO)]}",
            "max_tokens": chance.randint(tokens // 2, tokens),
            "temperature": 0.8,
            "stream": True,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        if self.kind != "bound":
            self.body["seed"] = 1000 + number
        self.expected = None

    def key(self, time_around):
        return {"plain": None, "keyed": f"keyed-{self.number}-{time_around}", "bound": f"bound-{self.number}"}[self.kind]


class Broken(Exception):
    """A connection that ended before its answer."""


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status, headers, body):
        super().__init__(f"{status}: {body}")
        self.status, self.headers, self.body = status, headers, body


class Wrong(Exception):
    """Something that must never be."""


@dataclasses.dataclass
class Progress:
    """What a client has of an answer, over all its tries."""

    began: float
    most: int = 0
    last: float = None
    pause_s: float = 0.0
    first_s: float = None
    accepted: int = 0
    tries: int = 0


class Load:
    """All clients, and what they saw."""

    def __init__(self, cluster, key, count, tokens, bounds):
        self.cluster, self.bounds = cluster, bounds
        self.key = key
        self.orders = [Order(number, tokens) for number in range(count)]
        self.hands, self.is_over, self.going_on = None, False, 0
        # Pauses of answers that one gateway gave, and of those that a client began again elsewhere.
        self.violations, self.pauses, self.retried_pauses, self.firsts = [], [], [], []
        # (when it ended, how long): the pauses that a fault may have made.
        self.long_pauses = []
        self.counts, self.refusals, self.breaks = collections.Counter(), collections.Counter(), collections.Counter()

    def wrong(self, what):
        self.violations.append(what)
        print(f"VIOLATION: {what}", flush=True)

    # One try.

    async def attempt(self, order, key, gateway, progress):
        headers = f"authorization: Bearer {self.key}\r\n" + (f"idempotency-key: {key}\r\n" if key else "")
        body = json.dumps(order.body).encode()
        address = self.cluster.network.addresses[gateway]
        what = f"order {order.number} ({order.kind}) at {gateway}"
        writer = None
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(address, 8000), self.bounds.connect_s)
            head = f"POST /v1/completions HTTP/1.1\r\nhost: {address}:8000\r\ncontent-type: application/json\r\nconnection: close\r\n"
            writer.write((head + headers + f"content-length: {len(body)}\r\n\r\n").encode() + body)
            status, answer = await asyncio.wait_for(read_head(reader), self.bounds.head_s)
            if status != 200:
                text = await asyncio.wait_for(reader.read(), self.bounds.silence_s)
                raise Refused(status, answer, text.decode(errors="replace"))
            progress.accepted += 1
            self.going_on += 1
            try:
                return await self.stream(order, reader, progress, what)
            finally:
                self.going_on -= 1
        except TimeoutError:
            raise Broken("silence") from None
        except (OSError, EOFError, asyncio.IncompleteReadError) as error:
            raise Broken(type(error).__name__) from None
        finally:
            if writer:
                writer.close()

    async def stream(self, order, reader, progress, what):
        """The answer's tokens, each compared as it comes."""
        tokens, texts, is_done = [], [], False
        async for line in lines(reader, self.bounds.silence_s):
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                is_done = True
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise Wrong(f"{what}: accepted, and given up after {len(tokens)} tokens: {event['error']}")
            for choice in event["choices"]:
                tokens += choice.get("token_ids") or []
                texts.append(choice["text"])
            self.saw(len(tokens), progress)
            if order.expected and order.expected[0][: len(tokens)] != tokens:
                raise Wrong(f"{what}: another token after {len(tokens)}: {tokens[-3:]} at the end")
        if not is_done:
            raise Broken("the stream ended early")
        if len(tokens) != order.body["max_tokens"]:
            raise Wrong(f"{what}: {len(tokens)} tokens of {order.body['max_tokens']}")
        return tokens, "".join(texts)

    def saw(self, count, progress):
        if count <= progress.most:
            return
        now = time.monotonic()
        if progress.last is None:
            progress.first_s = now - progress.began
        else:
            progress.pause_s = max(progress.pause_s, now - progress.last)
            if now - progress.last > 0.5:
                self.long_pauses.append((now, now - progress.last))
        progress.most, progress.last = count, now

    # One order.

    async def order(self, order, key, gateways):
        """Sends an order until it is answered; what is answered."""
        progress, chance = Progress(time.monotonic()), random.Random(f"{order.number}-{key}")
        while True:
            gateway = gateways[progress.tries % 2]
            began, progress.tries = time.monotonic(), progress.tries + 1
            left_s = progress.began + self.bounds.whole_s - began
            if left_s <= 0:
                raise Wrong(f"order {order.number} ({order.kind}): a hang: no answer within {self.bounds.whole_s:g} s, {progress}")
            try:
                # The sum of its waits is no bound for one that is fed a comment each second.
                return await asyncio.wait_for(self.attempt(order, key, gateway, progress), left_s), progress
            except TimeoutError:
                continue
            except Refused as refusal:
                self.judge_refusal(order, gateway, refusal)
                await asyncio.sleep(min(1, float(refusal.headers["retry-after"])) * chance.uniform(0.5, 1))
            except Broken as broken:
                self.breaks[str(broken)] += 1
                if not self.is_excused(gateway, began):
                    raise Wrong(f"order {order.number} ({order.kind}) at {gateway}, which was well: {broken} after {time.monotonic() - began:.1f} s") from None
                await asyncio.sleep(chance.uniform(0.05, 0.3))

    def is_excused(self, gateway, since):
        return self.hands is not None and self.hands.was_broken(gateway, since, GRACE_S * self.bounds.slack)

    def judge_refusal(self, order, gateway, refusal):
        try:
            error = json.loads(unchunked(refusal.body, refusal.headers))["error"]
        except (ValueError, KeyError, TypeError):
            raise Wrong(f"order {order.number} at {gateway}: an error without a type: {refusal}") from None
        self.refusals[f"{refusal.status} {error.get('code')}: {error.get('message')}"] += 1
        if (error.get("type"), error.get("code")) != RETRYABLE.get(refusal.status) or "retry-after" not in refusal.headers:
            raise Wrong(f"order {order.number} ({order.kind}) at {gateway}: not a typed error to retry: {refusal}")

    # All of them.

    async def undisturbed(self):
        """Every order once, which says what it is to give."""

        async def one(order):
            order.expected, progress = await self.order(order, order.key("first"), [GATEWAYS[order.number % 2]] * 2)
            return progress

        began = time.monotonic()
        done = await asyncio.gather(*map(one, self.orders), return_exceptions=True)
        for error in done:
            if isinstance(error, BaseException):
                raise error
        return time.monotonic() - began, [progress.pause_s for progress in done]

    async def client(self, order):
        chance, time_around = random.Random(order.number), 0
        while not self.is_over:
            gateways, time_around = chance.sample(GATEWAYS, 2), time_around + 1
            try:
                answer, progress = await self.order(order, order.key(time_around), gateways)
            except Wrong as wrong:
                self.wrong(str(wrong))
                await asyncio.sleep(1)
                continue
            if answer != order.expected:
                self.wrong(f"order {order.number}: the text differs: {answer[1]!r} instead of {order.expected[1]!r}")
            self.counts["completed"] += 1
            self.counts["tokens"] += len(answer[0])
            self.counts["tried again"] += progress.tries > 1
            self.counts["accepted twice and more"] += progress.accepted > 1
            (self.pauses if progress.accepted == 1 else self.retried_pauses).append(progress.pause_s)
            self.firsts.append(progress.first_s)
            await asyncio.sleep(chance.uniform(0, 0.2))

    async def disturbed(self):
        await asyncio.gather(*(self.client(order) for order in self.orders))


async def read_head(reader):
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *rest = head.split("\r\n")
    pairs = (line.split(":", 1) for line in rest if ":" in line)
    return int(first.split(" ")[1]), {name.lower(): value.strip() for name, value in pairs}


async def lines(reader, silence_s):
    """Lines of a chunked body, until its end."""
    rest, clock = b"", asyncio.get_running_loop().time
    async with asyncio.timeout(silence_s) as bound:
        while True:
            size = int((await reader.readline()).strip() or b"-1", 16)
            if size < 0:
                raise Broken("the stream ended early")
            rest += await reader.readexactly(size)
            await reader.readline()
            bound.reschedule(clock() + silence_s)
            *whole, rest = rest.split(b"\n")
            for line in whole:
                yield line.decode().strip()
            if size == 0:
                return


def unchunked(body, headers):
    """A short body, whichever way it was sent."""
    if "chunked" not in headers.get("transfer-encoding", ""):
        return body
    return body.split("\r\n", 1)[1].rsplit("\r\n0\r\n", 1)[0]


def histogram(seconds):
    """How many are at most so long, by bound; the last is without."""
    counts = [0] * (len(PAUSES) + 1)
    for value in seconds:
        counts[next((at for at, bound in enumerate(PAUSES) if value <= bound), len(PAUSES))] += 1
    return counts


class Watch:
    """What processes say of themselves on their metrics pages, looked at ten times a second."""

    def __init__(self, cluster, hosts):
        self.cluster, self.hosts, self.is_over = cluster, hosts, False
        # By host: when the page was asked for, and the page.
        self.pages = {}

    async def run(self):
        await asyncio.gather(*map(self.look, self.hosts))

    async def look(self, host):
        while not self.is_over:
            began, writer = time.monotonic(), None
            try:
                async with asyncio.timeout(1):
                    reader, writer = await asyncio.open_connection(self.cluster.network.addresses[host], METRICS_PORTS[host[0]])
                    writer.write(b"GET /metrics HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n")
                    page = (await reader.read(-1)).decode(errors="replace")
                self.pages[host] = (began, page)
            except (TimeoutError, OSError):
                pass
            finally:
                if writer:
                    writer.close()
            await asyncio.sleep(0.1)

    def leads(self, host, since):
        """Whether it said so, asked after that time."""
        asked, page = self.pages.get(host, (0, ""))
        return asked > since and samples(page, "forge_raft_is_leader") == 1

    def ready(self, host):
        """Replicas that are ready there, when it was asked last."""
        return samples(self.pages.get(host, (0, ""))[1], 'forge_replicas{phase="ready"')
