"""What a chaos test breaks: a schedule that follows from a seed, and the hands that carry it out.

A fault is WHOM:HOW:SECONDS, such as `leader:kill:3`; `+` joins faults that hold at once. Who leads is looked up when the fault
begins. Invariant: what was begun is ended, in whatever way the test ends.
"""

import random
import signal
import time

from cluster import COORDINATORS, GATEWAYS, WORKERS
from network import Failed

# Everything that makes a host silent, for others or altogether. How: where it needs the relay.
SEVERE = {"kill": False, "freeze": False, "unplug": True, "cut": True, "deaf": True, "mute": True}
# Everything that makes a link bad.
BAD = {"lossy": True, "lossy-out": True, "lossy-in": True, "delayed": True, "reordered": True, "slow": True}
# An end and a new start in order: SIGTERM.
ORDERLY = {"restart": False}
HOWS = {**SEVERE, **BAD, **ORDERLY}
LINK = [how for how, needs_relay in HOWS.items() if needs_relay]
MOST_SECONDS = 60


class Fault:
    def __init__(self, whom, how, seconds):
        self.whom, self.how, self.seconds = whom, how, seconds
        self.hosts, self.began, self.ended, self.figures = [], None, None, {}

    def __str__(self):
        return f"{self.whom}:{self.how}:{self.seconds:g}"

    @property
    def is_severe(self):
        return self.how in SEVERE


def parse(text):
    """A schedule as it is printed: groups by spaces or commas, faults of a group by `+`."""
    groups = []
    for word in text.replace(",", " ").split():
        group = []
        for part in word.split("+"):
            try:
                whom, how, seconds = part.split(":")
                fault = Fault(whom, how, float(seconds))
            except ValueError:
                raise Failed(f"{part!r} is not WHOM:HOW:SECONDS") from None
            if how not in HOWS:
                raise Failed(f"there is no fault {how!r}; there are {', '.join(HOWS)}")
            if whom not in ["leader", "follower", "replica", "spare", "gateway", "coordinators", *COORDINATORS, *WORKERS, *GATEWAYS]:
                raise Failed(f"there is no {whom!r} to break")
            if not 0 <= fault.seconds <= MOST_SECONDS:
                raise Failed(f"{part!r}: a fault holds for 0 to {MOST_SECONDS} s")
            group.append(fault)
        groups.append(group)
    return groups


def schedule(seed, count, has_relay):
    """`count` faults at least, in rounds of random order in which everybody has a turn; all coordinators at the end."""
    chance = random.Random(seed)
    allowed = lambda hows: [how for how in hows if has_relay or not HOWS[how]]  # noqa: E731
    severe, every = allowed(SEVERE), allowed(HOWS)
    groups, faults = [], 0
    while faults < count - 1:
        # The first round is of the worst; a gateway's link has a turn of its own.
        hows = severe if not groups else every
        whom = ["leader", "follower", *WORKERS, "gateway"]
        turns = [Fault(name, chance.choice(hows), 0) for name in whom]
        turns.append(Fault("gateway", chance.choice(LINK if has_relay else every), 0))
        chance.shuffle(turns)
        for turn in turns[: max(1, count - 1 - faults)]:
            turn.seconds = round(chance.uniform(1, 6) if turn.is_severe else chance.uniform(2, 5), 1)
            # After the first round some begin while another holds, if it is of another kind of process.
            beside = groups[-1] if groups and faults >= len(turns) else None
            if beside and len(beside) == 1 and kind(beside[0]) != kind(turn) and chance.random() < 0.3:
                beside.append(turn)
            else:
                groups.append([turn])
            faults += 1
        if faults < count - 1 and chance.random() < 0.4:
            groups.append([Fault("coordinators", "kill", round(chance.uniform(1, 6), 1))])
            faults += 1
    groups.append([Fault("coordinators", "kill", round(chance.uniform(2, 6), 1))])
    return groups


def kind(fault):
    """Which kind of process it breaks."""
    for kind_, names in [("coordinator", ["leader", "follower", "coordinators", *COORDINATORS]), ("gateway", ["gateway", *GATEWAYS])]:
        if fault.whom in names:
            return kind_
    return "worker"


class Hands:
    """Begins and ends faults. `network` is a Relayed, or the loopback, which can do nothing to links."""

    def __init__(self, cluster, network, chance):
        self.cluster, self.network, self.chance, self.number = cluster, network, chance, 0
        # What is broken now, and by which hand it is mended.
        self.mend = {}
        # (host, from, to) of what was broken; `to` is None while it is.
        self.history = []

    def resolve(self, whom):
        cluster = self.cluster
        if whom == "coordinators":
            return COORDINATORS
        if whom in ("leader", "follower"):
            leader = cluster.leader()
            if leader is None:
                raise Failed("nobody leads")
            return [leader if whom == "leader" else self.chance.choice([host for host in COORDINATORS if host != leader])]
        if whom in ("replica", "spare"):
            serving = cluster.serving_on()
            return [self.chance.choice(sorted(serving if whom == "replica" else set(WORKERS) - serving))]
        return [self.chance.choice(GATEWAYS) if whom == "gateway" else whom]

    def begin(self, fault):
        fault.hosts = [host for host in self.resolve(fault.whom) if host not in self.broken()]
        fault.began = time.monotonic()
        for host in fault.hosts:
            self.history.append([host, time.monotonic(), None])
            self.mend[host] = getattr(self, "begin_" + fault.how.replace("-", "_"))(host)

    def end(self, fault):
        for host in fault.hosts:
            self.end_host(host)
        fault.ended = time.monotonic()

    def end_host(self, host):
        self.mend.pop(host)()
        for entry in self.history:
            if entry[0] == host and entry[2] is None:
                entry[2] = time.monotonic()

    def end_all(self):
        for host in list(self.mend):
            self.end_host(host)

    def broken(self):
        return set(self.mend)

    def was_broken(self, host, since, grace_s):
        """Whether the host was broken at any time since then, or shortly before."""
        return any(name == host and (ended is None or ended + grace_s > since) for name, _, ended in self.history)

    # Processes.

    def begin_kill(self, host):
        self.cluster.kill(host)
        return lambda: self.cluster.restart(host)

    def begin_freeze(self, host):
        process = self.cluster.processes[host]
        process.send_signal(signal.SIGSTOP)
        return lambda: process.send_signal(signal.SIGCONT)

    def begin_restart(self, host):
        process = self.cluster.processes.pop(host)
        process.send_signal(signal.SIGTERM)

        def start():
            code = process.wait(60)
            if code != 0:
                raise Failed(f"{host} ended with exit code {code} after SIGTERM")
            self.cluster.restart(host)

        return start

    # Links.

    def begin_unplug(self, host):
        self.network.unplug(host)
        return lambda: self.network.plug(host)

    def filtered(self, host, *conditions):
        self.network.filter(host, *conditions)
        return lambda: self.network.unfilter(host)

    def relayed(self, *rules):
        self.number += 1
        name = f"fault-{self.number}"
        for sender, receiver, settings in rules:
            self.network.fault(name, sender, receiver, **settings)
        return lambda: self.network.heal(name)

    def both(self, host, **settings):
        return self.relayed((host, "*", settings), ("*", host, settings))

    def begin_cut(self, host):
        return self.filtered(host) if self.network.has_nft else self.both(host, loss=1)

    def begin_deaf(self, host):
        return self.relayed(("*", host, {"loss": 1}))

    def begin_mute(self, host):
        return self.relayed((host, "*", {"loss": 1}))

    def begin_lossy(self, host):
        percent = self.chance.randint(5, 20)
        if self.network.has_nft:
            return self.filtered(host, "numgen", "random", "mod", "100", "<", str(percent))
        return self.both(host, loss=percent / 100)

    def begin_lossy_out(self, host):
        return self.relayed((host, "*", {"loss": self.chance.randint(10, 30) / 100}))

    def begin_lossy_in(self, host):
        return self.relayed(("*", host, {"loss": self.chance.randint(10, 30) / 100}))

    def begin_delayed(self, host):
        return self.both(host, delay_ms=self.chance.randint(20, 150), jitter_ms=self.chance.randint(0, 50))

    def begin_reordered(self, host):
        return self.both(host, delay_ms=self.chance.randint(10, 40), jitter_ms=20, reorder=0.25, duplicate=0.02)

    def begin_slow(self, host):
        return self.both(host, rate_kbps=self.chance.randint(500, 2000))
