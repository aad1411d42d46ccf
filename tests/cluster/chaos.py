"""Chaos: a cluster of real processes under faults, and 64 clients that must not notice more than a pause.

    sudo python3 tests/cluster/chaos.py --programs target/debug                                    # a chaos minute
    sudo python3 tests/cluster/chaos.py --programs target/release --long --model MODEL.gguf        # 100 faults and more
    sudo python3 tests/cluster/chaos.py --programs target/debug --seed 7                           # that schedule again
    sudo python3 tests/cluster/chaos.py --programs target/debug --schedule "leader:kill:3 w1:cut:5+gateway:freeze:2"

Three coordinators, three workers, two gateways, a model in two replicas, each process on a host of its own (a network
namespace; root, iproute2, /dev/net/tun; nftables where it is installed, else the relay does its part). Streams are read all the time while
processes are killed, frozen and cut off and links are made bad, by a schedule that follows from the seed. Checked:
every accepted request completes with the tokens of an undisturbed run, what is not accepted gets a typed error to come again with,
nobody waits longer than bounds, a new leader is there within 2 s and a lost replica within 10 s (times `--slack`, which a busy
machine needs), what the cluster said it did stays done, and no process ends by itself. Needs Python 3.11. Exit code 0: everything held.
"""

import argparse
import asyncio
import http.client
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

from clients import Bounds, Load, Watch
from cluster import COORDINATORS, GATEWAYS, WORKERS, Cluster
from faults import Hands, parse, schedule
from network import Failed, Loopback, why_no_namespaces
from relay import Relayed, check, why_no_tun
import report
import small_model

LEADER_S, REPLICA_S, SETTLED_S = 2, 10, 30
REPLICAS = 2


class Background:
    """Coroutines in a thread on the operator's host."""

    def __init__(self, network):
        self.network, self.running = network, []

    def start(self, coroutine):
        result = {}

        def work():
            try:
                result["value"] = self.network.call(lambda: asyncio.run(coroutine))
            except BaseException as error:  # noqa: BLE001 (raised where it is waited for)
                result["error"] = error

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread, result

    @staticmethod
    def wait(started, seconds):
        thread, result = started
        thread.join(seconds)
        if thread.is_alive():
            raise Failed(f"a hang: clients or the watch still wait after {seconds:.0f} s")
        if "error" in result:
            raise result["error"]
        return result["value"]


class Clerk:
    """Gives the cluster commands all the time; what it was told is done must stay done."""

    def __init__(self, cluster):
        self.cluster, self.is_over, self.done, self.lost, self.wrong = cluster, False, [], 0, []
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self):
        number = 0
        while not self.is_over:
            number += 1
            code, message = self.cluster.refused("keys", "create", f"clerk-{number}", "--cluster")
            if code == 0:
                self.done.append(f"clerk-{number}")
            elif code == 4:
                self.lost += 1
            else:
                self.wrong.append(f"keys create clerk-{number}: exit code {code}: {message.strip()}")
            time.sleep(1)

    def end(self):
        self.is_over = True
        self.thread.join(130)
        if self.thread.is_alive():
            self.wrong.append("a hang: a command of forgectl did not end")
        there = self.cluster.forgectl("get", "keys", "-o", "json")
        return self.wrong + [f"{name} was made, and is gone" for name in self.done if f'"{name}"' not in there]


class Chaos:
    def __init__(self, cluster, network, options, seed):
        self.cluster, self.network, self.options, self.slack = cluster, network, options, options.slack
        self.hands = Hands(cluster, network, random.Random(f"hands-{seed}"))
        self.watch = Watch(cluster, [*COORDINATORS, *WORKERS])
        self.background, self.began = Background(network), time.monotonic()

    def say(self, text):
        print(f"[{time.monotonic() - self.began:6.1f}] {time.strftime('%H:%M:%S')} {text}", flush=True)

    def found(self):
        cluster = self.cluster
        cluster.found()
        cluster.add_workers()
        cluster.add_gateways()
        cluster.apply(batch=self.options.clients)
        key = cluster.forgectl("keys", "create", "chaos", "--cluster").strip()
        for host in GATEWAYS:
            address, headers = cluster.address(host, 8000), {"authorization": f"Bearer {key}"}
            knows = lambda: cluster.http(address, "GET", "/v1/models")[0] == 401 and cluster.http(address, "GET", "/v1/models", None, headers)[0] == 200  # noqa: E731, B023
            cluster.until(f"{host} knows the key", 30, knows)
        self.load = Load(cluster, key, self.options.clients, self.options.tokens, Bounds(self.slack))

    def undisturbed(self):
        self.say(f"{len(self.load.orders)} answers undisturbed")
        seconds, pauses = self.background.wait(self.background.start(self.load.undisturbed()), 2 * self.load.bounds.whole_s)
        tokens = sum(order.body["max_tokens"] for order in self.load.orders)
        self.say(f"{tokens} tokens in {seconds:.1f} s, longest pause {max(pauses):.2f} s; {dict(self.load.refusals) or 'nothing'} refused")
        self.load.counts.clear()
        self.load.refusals.clear()
        self.load.long_pauses.clear()
        return pauses

    def run(self, groups):
        load, watch = self.load, self.watch
        load.hands = self.hands
        looking, reading = self.background.start(watch.run()), self.background.start(load.disturbed())
        clerk = Clerk(self.cluster)
        try:
            time.sleep(2)
            for number, group in enumerate(groups, 1):
                self.group(f"{number}/{len(groups)}", group)
        finally:
            self.hands.end_all()
            load.is_over = True
        self.say("faults are over; the last answers")
        self.background.wait(reading, 2 * load.bounds.whole_s)
        for wrong in clerk.end():
            load.wrong(wrong)
        watch.is_over = True
        self.background.wait(looking, 30)
        self.clerk = clerk

    def group(self, title, group):
        self.say(f"{title}: {'+'.join(map(str, group))}")
        replicas = self.cluster.serving_on()
        held = []
        for fault in group:
            self.hands.begin(fault)
            fault.figures["streams"] = self.load.going_on
            self.say(f"  {fault.how} {' '.join(fault.hosts) or 'nothing: it is broken already'}, {self.load.going_on} streams going on")
            held.append(fault)
        alone = group[0] if len(group) == 1 else None
        try:
            if alone and alone.is_severe and alone.whom == "leader":
                self.bounded(alone, "new leader", LEADER_S, lambda: self.leads(set(alone.hosts), alone.began))
            watches_replica = alone and alone.is_severe and alone.hosts[0] in replicas
            back = threading.Thread(target=self.replica_back, args=(alone,)) if watches_replica else None
            if back:
                back.start()
            for fault in sorted(held, key=lambda fault: fault.began + fault.seconds):
                time.sleep(max(0, fault.began + fault.seconds - time.monotonic()))
                self.hands.end(fault)
        finally:
            self.hands.end_all()
        if back:
            back.join()
        self.alive()
        settled = self.cluster.until("the cluster is whole again", SETTLED_S * self.slack, self.is_whole)
        pauses = [seconds for ended, seconds in list(self.load.long_pauses) if ended > group[0].began]
        for fault in group:
            fault.figures |= {"settled_s": settled, "pause_s": max(pauses, default=0)}
        self.say(f"  whole again {settled:.1f} s after it was mended; longest pause {max(pauses, default=0):.1f} s")
        if len(self.load.violations) >= 20:
            raise Failed("20 violations; the rest would say nothing new")
        time.sleep(1)

    def replica_back(self, fault):
        def ready():
            return sum(self.watch.ready(host) for host in set(WORKERS) - self.hands.broken() if self.watch.pages.get(host, (0,))[0] > fault.began)

        self.bounded(fault, "replicas back", REPLICA_S, lambda: ready() >= REPLICAS)

    def leads(self, without, since):
        return any(self.watch.leads(host, since) for host in set(COORDINATORS) - without)

    def bounded(self, fault, what, seconds, holds):
        """How long it took since the fault began, against its bound."""
        while not holds():
            took = time.monotonic() - fault.began
            if took > 5 * seconds * self.slack:
                break
            time.sleep(0.02)
        took = time.monotonic() - fault.began
        fault.figures[what] = took
        self.say(f"  {what} after {took:.2f} s")
        if took > seconds * self.slack:
            self.load.wrong(f"{fault}: {what} after {took:.1f} s, which is more than {seconds} s times the slack of {self.slack:g}")

    def is_whole(self):
        cluster = self.cluster
        leader = cluster.leader()
        return (
            leader is not None
            and cluster.ready("worker") == set(WORKERS)
            and cluster.ready("gateway") == set(GATEWAYS)
            and len(cluster.serving_on()) == REPLICAS
            and cluster.placed_on() == cluster.serving_on()
            and all(map(cluster.serves, GATEWAYS))
        )

    def alive(self):
        """No process ended by itself."""
        for host, process in self.cluster.processes.items():
            if process.poll() is not None:
                raise Failed(f"{host} ended by itself with exit code {process.returncode}")
        for log in self.cluster.folder.glob("*/log"):
            for line in log.read_text(errors="replace").splitlines():
                if "panicked at" in line:
                    raise Failed(f"{log.parent.name}: {line}")


def choose(options, seed):
    """The network to run in. Without namespaces it is an error, or, if that was allowed, the loopback without faults of links."""
    why = (why_no_namespaces() or why_no_tun()) if options.network != "loopback" else None
    if why and options.network == "namespaces":
        raise Failed(f"chaos needs network namespaces (root, iproute2): {why}; with --network any it only kills and freezes")
    if why or options.network == "loopback":
        print(f"NO NETWORK NAMESPACES: only kills, freezes and restarts, on the loopback{': ' + why if why else ''}", flush=True)
        return Loopback()
    network = Relayed(options.programs, seed)
    print(f"network: {network.title}" + ("" if network.has_nft else "; NO NFTABLES HERE: the relay cuts and loses instead"), flush=True)
    return network


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", default="target/debug", help="folder of the programs, relay among them")
    parser.add_argument("--model", help="a model file or folder; without it one of random weights, made for it")
    parser.add_argument("--seed", type=int, help="of the schedule; without it a new one, which is printed")
    parser.add_argument("--faults", type=int, help="how many at least (8; with --long 100)")
    parser.add_argument("--long", action="store_true", help="100 faults and more")
    parser.add_argument("--schedule", help="these faults instead: WHOM:HOW:SECONDS, `+` between faults that hold at once")
    parser.add_argument("--slack", type=float, default=1, help="times are judged by their bounds times this")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200, help="most tokens of an answer; the least is half of it")
    parser.add_argument("--network", choices=["namespaces", "loopback", "any"], default="namespaces")
    parser.add_argument("--report", help="file for the figures, in Markdown")
    parser.add_argument("--keep", help="folder for state and logs; without it they are removed when all held")
    return parser.parse_args()


def main():
    options = arguments()
    if sys.version_info < (3, 11):
        print("chaos.py needs Python 3.11", file=sys.stderr)
        return 1
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1_000_000)
    folder = pathlib.Path(options.keep or tempfile.mkdtemp(prefix="forge-chaos-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # So that an interrupted run leaves no process and no namespace behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    try:
        options.model = str(pathlib.Path(options.model).resolve()) if options.model else str(small_model.write(folder / "small"))
        with choose(options, seed) as network:
            if isinstance(network, Relayed):
                check(network)
            count = options.faults or (100 if options.long else 8)
            groups = parse(options.schedule) if options.schedule else schedule(seed, count, isinstance(network, Relayed))
            print(f"seed {seed}, slack {options.slack:g}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
            print(f"again: --seed {seed} --faults {count}, or --schedule \"{' '.join('+'.join(map(str, group)) for group in groups)}\"", flush=True)
            cluster = Cluster(options, folder, network)
            chaos = Chaos(cluster, network, options, seed)
            try:
                chaos.found()
                undisturbed = chaos.undisturbed()
                chaos.run(groups)
                chaos.alive()
                codes = cluster.stop()
                if any(codes.values()):
                    chaos.load.wrong(f"exit codes after SIGTERM: {codes}")
            finally:
                cluster.end()
            text = report.write(chaos, groups, undisturbed, seed, time.monotonic() - began)
        print(text)
        if options.report:
            pathlib.Path(options.report).write_text(text)
        if chaos.load.violations:
            raise Failed(f"{len(chaos.load.violations)} violations: " + "; ".join(chaos.load.violations[:5]))
        print(f"all held, in {time.monotonic() - began:.0f} s")
        if not options.keep:
            shutil.rmtree(folder)
        return 0
    except (Failed, OSError, http.client.HTTPException, subprocess.TimeoutExpired) as error:
        print(f"FAILED after {time.monotonic() - began:.0f} s (seed {seed}): {error}\nlogs: {folder}/*/log", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
