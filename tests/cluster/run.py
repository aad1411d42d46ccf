"""A real cluster in network namespaces, and what `kill -9` does to it.

    python3 tests/cluster/run.py --programs target/debug --model MODEL.gguf [--keep FOLDER] [--streams 6]

Starts 3 coordinators, 3 workers and 2 gateways as processes of their own, each in a network namespace (a host), with
certificates and join tokens as docs/cluster.md says; applies a model in two replicas; streams from it while the leader, a
worker and a gateway are killed; and checks tokens, times and what `forgectl` shows. Needs root and iproute2. Where
namespaces are not allowed it fails and says so. Exit code 0: everything held.
"""

import argparse
import concurrent.futures
import http.client
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time

PREFIX = f"fg{os.getpid() % 10000}"
NETWORK = "10.77.0"
HOSTS = {name: f"{NETWORK}.{number}" for number, name in enumerate(["c1", "c2", "c3", "w1", "w2", "w3", "g1", "g2", "op"], 11)}
PROMPT = "Once upon a time in a small village there lived"
MAX_TOKENS = 160
KEY_SECONDS = 30


class Failed(Exception):
    pass


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    if done.returncode != 0:
        raise Failed(f"{' '.join(map(str, command))}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def namespace(host):
    return f"{PREFIX}-{host}"


def make_network():
    """One switch (a bridge in a namespace of its own) and a cable from it to every host."""
    switch = namespace("sw")
    try:
        run("ip", "netns", "add", switch)
    except (Failed, OSError) as error:
        raise Failed(f"network namespaces are not allowed here (root and iproute2 are needed): {error}") from error
    run("ip", "-n", switch, "link", "add", "name", "switch", "type", "bridge")
    run("ip", "-n", switch, "link", "set", "switch", "up")
    for host, address in HOSTS.items():
        name = namespace(host)
        run("ip", "netns", "add", name)
        run("ip", "-n", switch, "link", "add", "name", f"v{host}", "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "-n", switch, "link", "set", f"v{host}", "master", "switch", "up")
        run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        run("ip", "-n", name, "link", "set", "eth0", "up")
        run("ip", "-n", name, "link", "set", "lo", "up")


def remove_network():
    for host in [*HOSTS, "sw"]:
        subprocess.run(["ip", "netns", "del", namespace(host)], capture_output=True, check=False)


class Cluster:
    def __init__(self, options, folder):
        self.programs, self.folder, self.model = pathlib.Path(options.programs).resolve(), folder, options.model
        self.processes = {}
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "FORGE_HOME": str(folder / "op"),
            "FORGE_OFFLINE": "1",
            "NO_COLOR": "1",
        }
        (folder / "op").mkdir()

    def within(self, host, *command):
        return ["ip", "netns", "exec", namespace(host), *map(str, command)]

    def forgectl(self, *arguments):
        return run(*self.within("op", self.programs / "forgectl", *arguments), env=self.environment, cwd=self.folder)

    def objects(self, *arguments):
        text = self.forgectl(*arguments, "-o", "json")
        return json.loads(text)

    def start(self, host, program, *arguments):
        home = self.folder / host
        log = open(home / "log", "ab")  # noqa: SIM115 (the child keeps it)
        command = self.within(host, self.programs / program, "--config", home / "config.yaml", *arguments)
        environment = {**self.environment, "FORGE_HOME": str(home / "home")}
        self.processes[host] = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=home, start_new_session=True)

    def kill(self, host):
        # `ip netns exec` becomes the program, so this is the program itself.
        self.processes.pop(host).send_signal(signal.SIGKILL)

    def stop(self):
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 20
        codes = {}
        for host, process in self.processes.items():
            try:
                codes[host] = process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                codes[host] = "did not end"
        return codes

    def write(self, host, text, token=None):
        home = self.folder / host
        (home / "tls").mkdir(parents=True, exist_ok=True)
        (home / "config.yaml").write_text(text)
        if token:
            (home / "join-token").write_text(token)
            (home / "join-token").chmod(0o600)

    def found(self):
        address = f"{HOSTS['c1']}:7000"
        self.forgectl("cluster", "init", "--dir", self.folder / "c1", "--cluster", "test", "--name", "c1", "--listen", address)
        (self.folder / "c1" / "coordinator.yaml").rename(self.folder / "c1" / "config.yaml")
        self.start("c1", "forge-coordinator", "--bootstrap")
        self.until("the first coordinator leads", 30, lambda: "c1" in self.forgectl("cluster", "status"))
        for host in ["c2", "c3"]:
            token = self.forgectl("cluster", "members", "add")
            self.write(
                host,
                f"apiVersion: forge/v1\nkind: Coordinator\nname: {host}\ndataDir: data\nlisten: {HOSTS[host]}:7000\n"
                "membership:\n  directory: tls\n  tokenFile: join-token\n",
                token,
            )
            self.start(host, "forge-coordinator")
            self.until(f"{host} votes", 30, lambda host=host: host in self.voters())

    def voters(self):
        status = self.objects("cluster", "status")
        members = status["members"] if isinstance(status, dict) else status
        return {member["name"] for member in members if member.get("isVoter", member.get("role") in ("voter", "leader"))}

    def leader(self):
        status = self.objects("cluster", "status")
        if isinstance(status, dict) and "leaderId" in status:
            return next((member["name"] for member in status["members"] if member["id"] == status["leaderId"]), None)
        return next((member["name"] for member in status if member.get("isLeader") or member.get("role") == "leader"), None)

    def coordinators(self):
        return "[" + ", ".join(f"{HOSTS[host]}:7000" for host in ["c1", "c2", "c3"]) + "]"

    def add_workers(self):
        token = self.forgectl("cluster", "join-token", "--role", "worker", "--uses", "3")
        for host in ["w1", "w2", "w3"]:
            self.write(
                host,
                f"apiVersion: forge/v1\nkind: Worker\nname: {host}\ncoordinators: {self.coordinators()}\ndataDir: data\n"
                f"listen: {HOSTS[host]}:7100\nmetricsListen: 127.0.0.1:7101\n"
                "membership:\n  directory: tls\n  tokenFile: join-token\ndevices:\n- cores: 1\n  memory: 1GiB\n",
                token,
            )
            self.start(host, "forge-worker")
        self.until("three workers are ready", 60, lambda: len(self.ready("worker")) == 3)

    def add_gateways(self):
        token = self.forgectl("cluster", "join-token", "--role", "gateway", "--uses", "2")
        for host in ["g1", "g2"]:
            self.write(
                host,
                f"apiVersion: forge/v1\nkind: Gateway\nname: {host}\ncoordinators: {self.coordinators()}\n"
                f"gateway:\n  host: {HOSTS[host]}\n  port: 8000\n  insecure: true\n"
                "membership:\n  directory: tls\n  tokenFile: join-token\n",
                token,
            )
            self.start(host, "forge-gateway")
        self.until("two gateways are ready", 60, lambda: len(self.ready("gateway")) == 2)

    def ready(self, role):
        nodes = self.objects("get", "nodes")
        return {self.name(node) for node in nodes if self.role(node) == role and node.get("phase") == "ready"}

    @staticmethod
    def name(node):
        return node.get("name") or node["spec"]["id"]

    @staticmethod
    def role(node):
        return node.get("role") or node["spec"]["role"]

    def apply(self):
        document = self.folder / "model.yaml"
        document.write_text(
            "apiVersion: forge/v1\nkind: ModelService\nmetadata:\n  name: story\nspec:\n"
            f"  model: {self.model}\n  modelName: story\n  replicas: 2\n  maxModelLen: 512\n  threads: 1\n  maxBatchSize: 8\n"
        )
        print(self.forgectl("apply", "-f", document, "--dry-run"))
        self.forgectl("apply", "-f", document, "--wait", "running", "--timeout", "90")
        self.forgectl("apply", "-f", document)
        for host in ["g1", "g2"]:
            self.until(f"{host} serves the model", 60, lambda host=host: self.serves(host))

    def serves(self, host):
        try:
            status, _ = self.http(host, "GET", "/health/ready?model=story")
        except OSError:
            return False
        return status == 200

    def placed_on(self):
        """Nodes of the replicas that are in place."""
        text = self.forgectl("get", "placements", "-o", "json")
        return [node for node in ["w1", "w2", "w3"] if f'"{node}"' in text]

    def http(self, host, method, path, body=None, headers=None, on_line=None):
        """A request from the operator's host, whose network this process's thread enters."""
        return in_namespace(lambda: exchange(HOSTS[host], method, path, body, headers or {}, on_line))

    @staticmethod
    def until(what, seconds, holds):
        began, last = time.monotonic(), None
        while time.monotonic() - began < seconds:
            try:
                if holds():
                    return time.monotonic() - began
            except (Failed, OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
                last = error
            time.sleep(0.2)
        raise Failed(f"{what}: not within {seconds} s" + (f"; last: {last}" if last else ""))


def exchange(address, method, path, body, headers, on_line):
    connection = http.client.HTTPConnection(address, 8000, timeout=KEY_SECONDS)
    try:
        connection.request(method, path, body and json.dumps(body), {"content-type": "application/json", **headers})
        response = connection.getresponse()
        if on_line is None or response.status != 200:
            return response.status, response.read().decode()
        for line in response:
            on_line(line.decode().strip())
        return response.status, ""
    finally:
        connection.close()


OWN_NETWORK = os.open("/proc/self/ns/net", os.O_RDONLY)


def in_namespace(work):
    """Runs `work` in a thread of its own that is moved into the operator's network."""
    result = {}

    def target():
        import ctypes

        handle = os.open(f"/var/run/netns/{namespace('op')}", os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(handle, 0) != 0:
                raise OSError(ctypes.get_errno(), "setns")
            result["value"] = work()
        except BaseException as error:  # noqa: BLE001 (handed to the caller)
            result["error"] = error
        finally:
            os.close(handle)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if "error" in result:
        raise result["error"]
    return result["value"]


class Stream:
    """One streamed answer: its text, and the longest pause between two pieces."""

    def __init__(self, cluster, host, seed, key=None):
        self.pieces, self.pause_s, self.last, self.done, self.error = [], 0.0, time.monotonic(), False, None
        body = {"model": "story", "prompt": PROMPT, "max_tokens": MAX_TOKENS, "seed": seed, "temperature": 0.8, "stream": True}
        if key:
            del body["seed"]
        headers = {"idempotency-key": key} if key else {}
        try:
            status, text = cluster.http(host, "POST", "/v1/completions", body, headers, self.line)
            if status != 200:
                self.error = f"{status}: {text}"
        except (OSError, http.client.HTTPException) as error:
            self.error = repr(error)

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


def streams(cluster, hosts, seeds, disturb=None, after_s=1.0):
    """Answers at once from the given gateways; `disturb` happens in the middle of them."""
    with concurrent.futures.ThreadPoolExecutor(len(seeds) + 1) as pool:
        answers = [pool.submit(Stream, cluster, hosts[at % len(hosts)], seed) for at, seed in enumerate(seeds)]
        if disturb:
            time.sleep(after_s)
            disturb()
        return [answer.result() for answer in answers]


def check_equal(what, answers, expected):
    for seed, answer in answers.items():
        if answer.error or not answer.done:
            raise Failed(f"{what}: the answer of seed {seed} ended with {answer.error or 'no end'} after {len(answer.pieces)} pieces")
        if answer.text != expected[seed]:
            raise Failed(f"{what}: the answer of seed {seed} differs:\n  {answer.text!r}\n  {expected[seed]!r}")
    print(f"ok: {what}: {len(answers)} answers equal, longest pause {max(answer.pause_s for answer in answers.values()):.2f} s", flush=True)


def scenario(cluster, count):
    cluster.found()
    cluster.add_workers()
    cluster.add_gateways()
    cluster.apply()
    print(cluster.forgectl("cluster", "status"))
    print(cluster.forgectl("get", "nodes", "-o", "wide"))
    print(cluster.forgectl("get", "placements"))

    seeds = list(range(1, count + 1))
    began = time.monotonic()
    undisturbed = dict(zip(seeds, streams(cluster, ["g1", "g2"], seeds)))
    print(f"undisturbed: {count} streams of {MAX_TOKENS} tokens in {time.monotonic() - began:.1f} s", flush=True)
    expected = {seed: answer.text for seed, answer in undisturbed.items()}
    check_equal("undisturbed", undisturbed, expected)

    leader = cluster.leader()
    after = dict(zip(seeds, streams(cluster, ["g1", "g2"], seeds, lambda: cluster.kill(leader))))
    check_equal(f"the leader ({leader}) killed", after, expected)
    waited = cluster.until("another leader", 10, lambda: cluster.leader() not in (None, leader))
    print(f"ok: {cluster.leader()} leads; asked for {waited:.1f} s", flush=True)
    cluster.start(leader, "forge-coordinator")

    victim = cluster.placed_on()[0]
    after = dict(zip(seeds, streams(cluster, ["g1", "g2"], seeds, lambda: cluster.kill(victim))))
    check_equal(f"a worker ({victim}) killed", after, expected)
    waited = cluster.until("the lost replica is back elsewhere", 60, lambda: victim not in cluster.ready("worker") and cluster_serves(cluster))
    print(f"ok: two replicas serve again after {waited:.1f} s more", flush=True)
    print(cluster.forgectl("get", "nodes"))
    print(cluster.forgectl("get", "placements"))

    whole = Stream(cluster, "g2", None, key="order-1")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        broken = pool.submit(Stream, cluster, "g1", None, "order-2")
        time.sleep(1.0)
        cluster.kill("g1")
        broken = broken.result()
    if broken.done:
        raise Failed("the answer was over before its gateway was killed: ask for more tokens")
    again, other = Stream(cluster, "g2", None, key="order-2"), Stream(cluster, "g2", None, key="order-1")
    if again.error or not again.done or not again.text.startswith(broken.text):
        raise Failed(f"the retry at the other gateway: {again.error or again.text!r}, of which {broken.text!r} had been sent")
    if other.text != whole.text:
        raise Failed("the same idempotency key gave another text")
    print(f"ok: a gateway killed after {len(broken.pieces)} pieces; the retry gives the whole stream from its start", flush=True)
    cluster.until("forgectl shows the lost gateway", 20, lambda: cluster.ready("gateway") == {"g2"})
    print(cluster.forgectl("get", "events"))

    cluster.forgectl("delete", "story")
    cluster.until("the model is gone", 60, lambda: not cluster.placed_on())
    codes = cluster.stop()
    cluster.processes.clear()
    if any(code != 0 for code in codes.values()):
        raise Failed(f"exit codes after SIGTERM: {codes}")
    print(f"ok: all processes ended by themselves: {', '.join(codes)}", flush=True)


def cluster_serves(cluster):
    return len(cluster.placed_on()) == 2 and all(
        phase == "ready" for phase in phases(json.loads(cluster.forgectl("get", "placements", "-o", "json")))
    )


def phases(value):
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "phase":
                yield inner
            else:
                yield from phases(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from phases(inner)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", default="target/debug")
    parser.add_argument("--model", required=True)
    parser.add_argument("--keep", help="folder for state and logs; without it they are removed when all went well")
    parser.add_argument("--streams", type=int, default=6)
    options = parser.parse_args()
    options.model = str(pathlib.Path(options.model).resolve())
    folder = pathlib.Path(options.keep or tempfile.mkdtemp(prefix="forge-cluster-"))
    folder.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(options, folder)
    began = time.monotonic()
    try:
        make_network()
        scenario(cluster, options.streams)
        print(f"all held, in {time.monotonic() - began:.0f} s")
        return 0
    except (Failed, subprocess.TimeoutExpired) as error:
        print(f"FAILED after {time.monotonic() - began:.0f} s: {error}\nlogs: {folder}/*/log", file=sys.stderr)
        for log in sorted(folder.glob("*/log")):
            tail = log.read_text(errors="replace").splitlines()[-15:]
            print(f"--- {log.parent.name}\n" + "\n".join(tail), file=sys.stderr)
        return 1
    finally:
        for process in cluster.processes.values():
            process.kill()
        remove_network()


if __name__ == "__main__":
    sys.exit(main())
