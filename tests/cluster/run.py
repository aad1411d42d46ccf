"""A real cluster of real processes, what its operator sees, and what `kill -9` does to it.

    python3 tests/cluster/run.py --programs target/debug --model MODEL.gguf [--network namespaces|loopback|any] [--keep FOLDER]

Starts 3 coordinators, 3 workers and 2 gateways as processes of their own, with certificates and join tokens as
docs/cluster.md says; applies a model in two replicas; goes through an operator's commands, probes, metrics and traces; streams from
the model while a worker is drained and while the leader, a worker and a gateway are killed; and checks tokens, times and
what `forgectl` shows. Each process has a host of its own: a network namespace (root and iproute2), or an address of the
loopback. `any` takes namespaces where they can be made, and says which it took. Exit code 0: everything held.
"""

import argparse
import http.client
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from cluster import COORDINATORS, GATEWAYS, WORKERS, Cluster
from network import NETWORKS, Failed, why_no_namespaces
from streams import MAX_TOKENS, Stream, check_equal, disturbed, streams
import small_model
import views


def scenario(cluster, count):
    began = time.monotonic()

    def stage(title):
        print(f"== {title} (after {time.monotonic() - began:.0f} s)", flush=True)

    stage("founded")
    cluster.receive_traces()
    cluster.found()
    cluster.add_workers()
    cluster.add_gateways()
    stage("a model")
    cluster.apply()
    views.listings(cluster)

    stage("undisturbed")
    seeds = list(range(1, count + 1))
    started = time.monotonic()
    undisturbed = streams(cluster, GATEWAYS, seeds)
    print(f"{count} streams of {MAX_TOKENS} tokens in {time.monotonic() - started:.1f} s", flush=True)
    expected = {seed: answer.text for seed, answer in undisturbed.items()}
    check_equal("undisturbed", undisturbed, expected)
    views.pages(cluster)

    stage("everyday work")
    views.live(cluster, seeds, expected)
    views.scaling(cluster)
    views.draining(cluster, seeds, expected)
    views.backup(cluster)
    views.traces(cluster)
    views.refusals(cluster)

    stage("the leader is killed")
    leader = cluster.leader()
    after = streams(cluster, GATEWAYS, seeds, lambda: cluster.kill(leader))
    check_equal(f"the leader ({leader}) killed", after, expected)
    waited = cluster.until("another leader", 30, lambda: cluster.leader() not in (None, leader))
    print(f"ok: {cluster.leader()} leads; asked for {waited:.1f} s", flush=True)
    cluster.start_coordinator(leader)

    stage("a worker is killed")
    victims = []

    def kill():
        victims.append(views.busy(cluster))
        cluster.kill(victims[0])

    after = streams(cluster, GATEWAYS, seeds, kill)
    victim = victims[0]
    check_equal(f"a worker ({victim}) killed", after, expected)
    rest = set(WORKERS) - {victim}
    waited = cluster.until("the lost replica is back elsewhere", 90, lambda: cluster.ready("worker") == rest and cluster.is_settled_on(rest))
    print(f"ok: two replicas serve again after {waited:.1f} s more", flush=True)
    views.see(cluster, ["lost"], "get", "nodes")
    views.show(cluster, "get", "placements")

    stage("a gateway is killed")
    killed_gateway(cluster)

    stage("the end")
    views.keys(cluster)
    views.show(cluster, "get", "events")
    views.show(cluster, "delete", "story")
    cluster.until("the model is gone", 90, lambda: not cluster.placed_on() and not cluster.objects("get", "models"))
    top = cluster.following("top")
    cluster.until("top shows nodes", 30, lambda: "g2" in top.read_text())
    codes = cluster.stop()
    if any(code != 0 for code in codes.values()) or len(codes) != len(COORDINATORS) + 2 + 1:
        raise Failed(f"exit codes after SIGTERM: {codes}")
    print(f"ok: all processes ended by themselves: {', '.join(codes)}", flush=True)
    code = cluster.end_following(top, is_interrupted=False)
    if code != 4 or "fell silent" not in top.read_text():
        raise Failed(f"top without coordinators: exit code {code}: {top.read_text()}")
    print("ok: top without coordinators ends with exit code 4", flush=True)


def killed_gateway(cluster):
    """A retry with the same key, at another gateway, is the same answer from its beginning."""
    whole = Stream(key="order-1").read(cluster, "g2")
    [broken] = disturbed(cluster, [(Stream(key="order-2"), "g1")], lambda: cluster.kill("g1"))
    if broken.done:
        raise Failed("the answer was over before its gateway was killed: ask for more tokens")
    again, other = Stream(key="order-2").read(cluster, "g2"), Stream(key="order-1").read(cluster, "g2")
    if again.error or not again.done or not again.text.startswith(broken.text):
        raise Failed(f"the retry at the other gateway: {again.error or again.text!r}, of which {broken.text!r} had been sent")
    if other.error or other.text != whole.text:
        raise Failed(f"the same idempotency key: {other.error or 'gave another text'}")
    print(f"ok: a gateway killed after {len(broken.pieces)} pieces; the retry gives the whole stream from its start", flush=True)
    cluster.until("forgectl shows the lost gateway", 30, lambda: cluster.ready("gateway") == {"g2"})


def choose(wanted):
    """The network to run in; says loudly what it is and why."""
    if wanted == "any":
        why = why_no_namespaces()
        wanted = "loopback" if why else "namespaces"
        if why:
            print(f"NO NETWORK NAMESPACES HERE, running on the loopback instead: {why}", flush=True)
    network = NETWORKS[wanted]()
    print(f"network: {network.title}", flush=True)
    return network


def main(scenario, make=Cluster, about=None, count=6, needs_model=False):
    """One scenario over a cluster of its own; the process's exit code. One that disturbs single answers needs a slow model."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", default="target/debug", help="folder of the programs, otlp_receiver among them")
    parser.add_argument(
        "--model", required=needs_model, help="a model file or folder" + ("" if needs_model else "; without it one of random weights, made for it")
    )
    parser.add_argument("--network", choices=[*NETWORKS, "any"], default="any")
    parser.add_argument("--keep", help="folder for state and logs; without it they are removed when all held")
    parser.add_argument("--streams", type=int, default=count, help="answers at once")
    options = parser.parse_args()
    folder = pathlib.Path(options.keep or tempfile.mkdtemp(prefix="forge-cluster-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    options.model = str(pathlib.Path(options.model).resolve() if options.model else small_model.write(folder / "small"))
    # So that an interrupted run leaves no process and no namespace behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    try:
        with choose(options.network) as network:
            cluster = make(options, folder, network)
            try:
                scenario(cluster, options.streams)
            finally:
                cluster.end()
        print(f"all held, in {time.monotonic() - began:.0f} s")
        if not options.keep:
            shutil.rmtree(folder)
        return 0
    except (Failed, OSError, http.client.HTTPException, subprocess.TimeoutExpired) as error:
        print(f"FAILED after {time.monotonic() - began:.0f} s: {error}\nlogs: {folder}/*/log", file=sys.stderr)
        for log in sorted(folder.glob("*/log")):
            tail = log.read_text(errors="replace").splitlines()[-15:]
            print(f"--- {log.parent.name}\n" + "\n".join(tail), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(scenario, about=__doc__, needs_model=True))
