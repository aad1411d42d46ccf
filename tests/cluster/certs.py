"""Certificates of a real cluster of real processes: short-lived ones, revoked ones, another CA; all under streams.

    python3 tests/cluster/certs.py --programs target/debug [--model MODEL] [--network namespaces|loopback|any] [--keep FOLDER]

3 coordinators, 3 workers and 2 gateways with certificates of LIFE_SECONDS, which renew themselves while streams run, but for
a worker that is off for too long; then a worker that answers is revoked and joins again with a new token, and the CA is
rotated. Every accepted request has the tokens of an undisturbed run. What is expired, revoked or of the old CA is refused
with the words of docs/certificates.md. Exit code 0: everything held.
"""

import hashlib
import json
import shutil
import signal
import ssl
import sys
import time

from cluster import COORDINATORS, GATEWAYS, WORKERS, Cluster
from load import Load
from network import Failed
from run import main
from streams import check_equal, streams

LIFE_SECONDS = 30
# Of each certificate, so that one that was renewed is renewed as well.
RENEWALS = 2
# For what is to come about, on a machine with other work.
SECONDS = 90


class ShortLived(Cluster):
    def start_coordinator(self, host, *arguments):
        super().start_coordinator(host, "--set", f"certificateLifeS={LIFE_SECONDS}", *arguments)

    def serials(self):
        """All serial numbers by holder, `role/name`."""
        found = {}
        for record in self.objects("cluster", "certs", "list", "--all"):
            found.setdefault(f"{record['role']}/{record['name']}", set()).add(record["serial"])
        return found

    def told(self, host, words):
        """Waits until a process says so in its log, using the operator's certificate, which is renewed by being used."""
        log = self.folder / host / "log"
        self.until(f"{host} is told {words!r}", SECONDS, lambda: self.voters() and words in log.read_text(errors="replace"))

    def join_again(self, host, role, token=None):
        """Starts a process that has no certificate any more, with a token. Its name is free once the old process is lost."""
        self.until(f"{host} is lost", SECONDS, lambda: host not in self.ready(role))
        (self.folder / host / "tls" / "node.pem").unlink(missing_ok=True)
        (self.folder / host / "join-token").write_text(token or self.forgectl("cluster", "join-token", "--role", role))
        self.restart(host)

    def end_one(self, host):
        """A process that was refused: it has ended by itself, with a failure, or goes on trying."""
        process = self.processes.pop(host)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait(20)
        elif process.returncode == 0:
            raise Failed(f"{host}, refused, ended with exit code 0")


def scenario(cluster, count):
    began = time.monotonic()

    def stage(title):
        print(f"== {title} (after {time.monotonic() - began:.0f} s)", flush=True)

    stage("founded")
    cluster.receive_traces()
    cluster.found()
    cluster.add_workers()
    cluster.add_gateways()
    cluster.apply()
    undisturbed = streams(cluster, GATEWAYS, list(range(1, count + 1)))
    expected = {seed: answer.text for seed, answer in undisturbed.items()}
    check_equal("undisturbed", undisturbed, expected)
    with Load(cluster, GATEWAYS, expected) as load:
        stage("renewed over and over")
        renewed(cluster, load)
        stage("revoked")
        revoked(cluster, load)
        stage("another CA")
        rotated(cluster, load, stage)
    print(
        f"ok: {load.answers} answers meanwhile, all with the undisturbed tokens; {load.refused} tries were refused and made again, "
        f"the longest pause was {load.longest_pause_s:.2f} s",
        flush=True,
    )
    stage("the end")
    codes = cluster.stop()
    if any(code != 0 for code in codes.values()):
        raise Failed(f"exit codes after SIGTERM: {codes}")


def renewed(cluster, load):
    """All renew by themselves and keep their sessions; one that is off for longer than its certificate lasts must join again."""
    off = next(host for host in WORKERS if host not in cluster.serving_on())
    off_since = stopped(cluster, off)
    there = [host for host in WORKERS if host != off] + GATEWAYS
    holders = [f"coordinator/{host}" for host in COORDINATORS[1:]]
    holders += [f"{'worker' if host in WORKERS else 'gateway'}/{host}" for host in there]
    since, before = {host: cluster.node(host)["sinceMs"] for host in there}, cluster.serials()

    def least():
        load.check()
        now = cluster.serials()
        return min(len(now[holder] - before[holder]) for holder in holders) >= RENEWALS

    # The first coordinator's, an operator's: made by hand, and of the usual life.
    cluster.until(f"every process renewed {RENEWALS} times", 8 * LIFE_SECONDS, least)
    for host, then in since.items():
        if cluster.node(host)["phase"] != "ready" or cluster.node(host)["sinceMs"] != then:
            raise Failed(f"{host} was lost over a renewal: {cluster.node(host)}")
    print(cluster.forgectl("cluster", "certs", "list"), flush=True)
    status = cluster.forgectl("cluster", "status")
    if "overdue" in status:
        raise Failed(f"a renewal is overdue:\n{status}")
    print(f"ok: every process renewed {RENEWALS} times, and no session was lost", flush=True)
    time.sleep(max(0, LIFE_SECONDS + 1 - (time.monotonic() - off_since)))
    cluster.restart(off)
    cluster.told(off, "has expired")
    cluster.end_one(off)
    cluster.join_again(off, "worker")
    cluster.until(f"{off} is back", SECONDS, lambda: off in cluster.ready("worker"))
    print(f"ok: {off}, off for longer than its certificate lasted, was refused, and let in again by a token", flush=True)


def stopped(cluster, host):
    process = cluster.processes.pop(host)
    process.send_signal(signal.SIGTERM)
    if process.wait(SECONDS) != 0:
        raise Failed(f"{host} ended with exit code {process.returncode}")
    return time.monotonic()


def revoked(cluster, load):
    """A worker in the middle of answers is cut, and its answers go on elsewhere."""
    code, message = cluster.refused("cluster", "certs", "revoke", "admin")
    if code == 0 or "no operator would have a certificate left" not in message:
        raise Failed(f"the last operator was revoked: {code} {message}")
    victim, running = cluster.busiest()
    print(f"{victim} answers {running} requests", flush=True)
    print(cluster.forgectl("cluster", "certs", "revoke", f"worker/{victim}"), flush=True)
    cluster.until(f"{victim} is lost", SECONDS, lambda: victim not in cluster.ready("worker"))
    cluster.told(victim, "was revoked")
    cluster.until("the replicas are elsewhere", SECONDS, lambda: cluster.is_settled_on(set(WORKERS) - {victim}))
    load.more(len(load.expected))
    cluster.end_one(victim)
    cluster.join_again(victim, "worker")
    cluster.until(f"{victim} is back", SECONDS, lambda: victim in cluster.ready("worker"))
    print(f"ok: {victim} was cut, refused, and let in again by a token", flush=True)


def digest(pem):
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()


def rotated(cluster, load, stage):
    """Another CA takes the old one's place under everybody; what the old one signed is worth nothing."""
    old_ca = (cluster.folder / "c1" / "tls" / "ca.pem").read_text()
    shutil.copytree(cluster.folder / "c1" / "tls", cluster.folder / "old-tls")
    old_token = cluster.forgectl("cluster", "join-token", "--role", "worker")
    if digest(old_ca) not in old_token:
        raise Failed("a join token does not carry the digest of the CA")
    print(cluster.forgectl("cluster", "certs", "rotate-ca", "--timeout", str(SECONDS)), flush=True)
    stage("rotated")
    for host in COORDINATORS + WORKERS + GATEWAYS:
        pem = cluster.folder / host / "tls" / "ca.pem"
        cluster.until(f"{host} believes the new CA alone", SECONDS, lambda pem=pem: old_ca.strip() not in pem.read_text())
    load.more(2 * len(load.expected))
    # Made with the old CA's key; and a token that pins it.
    cluster.forgectl("cluster", "admin", "late", "--ca", cluster.folder / "old-tls", "--out", cluster.folder / "late")
    cluster.forgectl("context", "add", "late", "--server", cluster.address("c1", 7000), "--credentials", cluster.folder / "late")
    code, message = cluster.refused("get", "nodes", "--context", "late")
    if code == 0 or "not of this cluster's CA" not in message:
        raise Failed(f"a certificate of the old CA: {code} {message}")
    host = next(host for host in WORKERS if host not in cluster.serving_on())
    cluster.kill(host)
    cluster.join_again(host, "worker", old_token)
    cluster.told(host, "is not of this cluster's CA")
    cluster.end_one(host)
    cluster.join_again(host, "worker")
    cluster.until(f"{host} is back", SECONDS, lambda: host in cluster.ready("worker"))
    # With the new CA's key, as docs/certificates.md says.
    new_ca = (cluster.folder / "c2" / "tls" / "ca.pem").read_text()
    if digest(new_ca) not in cluster.forgectl("cluster", "join-token", "--role", "worker"):
        raise Failed("a new join token does not carry the digest of the new CA")
    cluster.forgectl("cluster", "admin", "kim", "--ca", cluster.folder / "c2" / "tls", "--out", cluster.folder / "kim")
    cluster.forgectl("context", "add", "kim", "--server", cluster.address("c1", 7000), "--credentials", cluster.folder / "kim")
    if len(json.loads(cluster.forgectl("get", "nodes", "--context", "kim", "-o", "json"))) < len(WORKERS + GATEWAYS):
        raise Failed("the new operator sees too little")
    print("ok: the old CA's certificates and tokens are refused, the new one's are taken", flush=True)


if __name__ == "__main__":
    sys.exit(main(scenario, ShortLived, __doc__, count=4))
