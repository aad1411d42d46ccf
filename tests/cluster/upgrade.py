"""A rolling upgrade of a real cluster under load, as docs/upgrade.md says.

    python3 tests/cluster/upgrade.py --programs target/debug [--model MODEL] [--network namespaces|loopback|any] [--keep FOLDER]

There is one build, and it stands for two: every process begins with FORGE_TEST_LEVEL=1, which makes it state that level,
keep to it, and stop before what is newer. While streams run, each process is then stopped and started as what it is: the
coordinators, the leader last, then the workers, the last of them without draining it, then the gateways; one worker goes
back to the old build in between. Every accepted request must end with the tokens of an undisturbed run. Until the last
process is upgraded nothing newer may be written, and what asks for it is refused by name; after it the level grows, a change
rolls and is taken back under the same load, and older processes are not let in. Without a model it is one of random weights,
whose answers take about a second. Exit code 0: everything held.
"""

import signal
import sys
import time

from cluster import COORDINATORS, GATEWAYS, WORKERS
from load import Load
from network import Failed
from run import main
from streams import check_equal, streams

OLD, NEW = 1, 2
# For one process to be there again, on a machine with other work.
SECONDS = 90
PROGRAMS = {"c": "forge-coordinator", "w": "forge-worker", "g": "forge-gateway"}


def scenario(cluster, count):
    began = time.monotonic()

    def stage(title):
        print(f"== {title} (after {time.monotonic() - began:.0f} s)", flush=True)

    cluster.receive_traces()
    cluster.levels = dict.fromkeys([*COORDINATORS, *WORKERS, *GATEWAYS], OLD)
    stage("founded, all old")
    cluster.found()
    cluster.add_workers()
    cluster.add_gateways()
    cluster.apply()
    seeds = list(range(1, count + 1))
    undisturbed = streams(cluster, GATEWAYS, seeds)
    expected = {seed: answer.text for seed, answer in undisturbed.items()}
    check_equal("undisturbed", undisturbed, expected)

    with Load(cluster, GATEWAYS, expected) as load:
        still_old(cluster)
        stage("coordinators")
        leader = cluster.leader()
        for host in [host for host in COORDINATORS if host != leader] + [leader]:
            if host == leader:
                heir = next(other for other in COORDINATORS if other != leader)
                cluster.forgectl("cluster", "members", "transfer-leader", heir)
            restart(cluster, host)
            cluster.until(f"{host} runs level {NEW} and votes", SECONDS, lambda host=host: member(cluster, host) == (NEW, True))
            still_old(cluster)
        load.more(count)
        stage("workers")
        first, *others, last = WORKERS
        worker(cluster, first, NEW)
        worker(cluster, first, OLD)
        for host in [first, *others]:
            worker(cluster, host, NEW)
        cluster.until(f"{last} answers", SECONDS, lambda: last in cluster.serving_on())
        worker(cluster, last, NEW, is_drained=False)
        load.more(count)
        stage("gateways")
        for host in GATEWAYS:
            restart(cluster, host)
            cluster.until(f"{host} serves at level {NEW}", SECONDS, lambda host=host: node(cluster, host) == (NEW, "ready") and cluster.serves(host))
            if host != GATEWAYS[-1]:
                still_old(cluster)
        waited = cluster.until("the cluster is at the new level", SECONDS, lambda: level(cluster) == NEW)
        print(f"ok: level {NEW}, {waited:.1f} s after the last process", flush=True)
        load.more(count)
        stage("what is new")
        rolls(cluster)
        load.more(count)
    print(
        f"ok: {load.answers} answers while everything was upgraded, all with the undisturbed tokens; {load.refused} tries were refused "
        f"and made again, the longest pause was {load.longest_pause_s:.2f} s",
        flush=True,
    )
    stage("older processes are not let in")
    too_old(cluster)
    codes = cluster.stop()
    if any(code != 0 for code in codes.values()):
        raise Failed(f"exit codes after SIGTERM: {codes}")


def worker(cluster, host, level, is_drained=True):
    """Gives a worker another build, and its work back."""
    if is_drained:
        cluster.forgectl("drain", host)
        cluster.until(f"{host} is empty", SECONDS, lambda: host not in cluster.placed_on())
    restart(cluster, host, level)
    cluster.until(f"{host} runs level {level}", SECONDS, lambda: node(cluster, host) == (level, "ready"))
    if is_drained:
        cluster.forgectl("uncordon", host)
    cluster.until("both replicas serve", SECONDS, lambda: len(cluster.serving_on()) == 2 and cluster.is_settled_on(cluster.serving_on()))
    still_old(cluster)


def restart(cluster, host, level=NEW):
    """Stops a process in order, and starts it as this build, or as one of an older level."""
    process = cluster.processes.pop(host)
    process.send_signal(signal.SIGTERM)
    if process.wait(SECONDS) != 0:
        raise Failed(f"{host} ended with exit code {process.returncode}")
    cluster.levels.pop(host, None)
    if level != NEW:
        cluster.levels[host] = level
    if host in COORDINATORS:
        cluster.start_coordinator(host)
    else:
        cluster.start(host, PROGRAMS[host[0]])


def level(cluster):
    return cluster.objects("cluster", "status")["level"]


def member(cluster, host):
    status = cluster.objects("cluster", "status")
    return next((member["level"], member["isVoter"]) for member in status["members"] if member["name"] == host)


def node(cluster, host):
    found = cluster.node(host)
    return found["spec"].get("level", OLD), found["phase"]


def still_old(cluster):
    """Nothing newer is written, and what asks for it is refused, naming who is old."""
    if level(cluster) != OLD:
        raise Failed(f"the level is {level(cluster)} while {cluster.levels} are old")
    code, message = cluster.refused("rollout", "undo", "model/story")
    if code == 4:
        # Whoever led is on its way down, and forgectl did not find the next in time.
        cluster.until("a leader", SECONDS, lambda: cluster.leader() is not None)
        code, message = cluster.refused("rollout", "undo", "model/story")
    if code != 1 or "takes level 2" not in message or not any(host in message for host in cluster.levels):
        raise Failed(f"a newer command: exit code {code}: {message}")
    for service in cluster.objects("get", "models"):
        newer = {"history", "changedMs", "stuck"} & set(service) | {"rollout"} & set(service["service"]["spec"])
        if newer:
            raise Failed(f"{newer} are written while {cluster.levels} are old")


def rolls(cluster):
    """A change rolls and is taken back."""
    document = cluster.folder / "model.yaml"
    document.write_text(document.read_text() + "  maxWaiting: 64\n  rollout:\n    maxUnavailable: 0\n")
    plan = cluster.forgectl("apply", "-f", document, "--dry-run")
    if "generation 2" not in plan or "rollout.maxSurge" not in plan:
        raise Failed(f"the dry run does not say how it rolls: {plan}")
    cluster.forgectl("apply", "-f", document)
    print(cluster.forgectl("rollout", "status", "model/story", "--timeout", "120").strip(), flush=True)
    print(cluster.forgectl("rollout", "undo", "model/story").strip(), flush=True)
    print(cluster.forgectl("rollout", "status", "model/story", "--timeout", "120").strip(), flush=True)
    history = cluster.objects("rollout", "history", "model/story")
    waiting = [wish["service"]["spec"]["maxWaiting"] for wish in history]
    if [wish["generation"] for wish in history] != [2, 3] or waiting[0] != 64 or waiting[1] == 64:
        raise Failed(f"the history after an undo: {history}")
    print(cluster.forgectl("rollout", "history", "model/story"), flush=True)


def too_old(cluster):
    for host, words in [("g2", "start a newer forge-gateway"), ("w3", "start a newer forge-worker"), ("c3", "start a newer one")]:
        restart(cluster, host, level=OLD)
        process = cluster.processes[host]
        log = cluster.folder / host / "log"
        cluster.until(f"{host} says that it is too old", SECONDS, lambda log=log, words=words: words in log.read_text(errors="replace"))
        cluster.until(f"{host} ends", SECONDS, lambda process=process: process.poll() is not None)
        if process.returncode == 0:
            raise Failed(f"{host}, too old, ended with exit code 0")
        cluster.processes.pop(host)
        print(f"ok: {host} of level {OLD} ended with exit code {process.returncode}", flush=True)


if __name__ == "__main__":
    sys.exit(main(scenario, about=__doc__, count=4))
