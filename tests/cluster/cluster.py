"""Three coordinators, three workers and two gateways as processes, founded as docs/cluster.md says, and an operator."""

import http.client
import json
import os
import pathlib
import signal
import subprocess
import time

from network import Failed, run

COORDINATORS, WORKERS, GATEWAYS = ["c1", "c2", "c3"], ["w1", "w2", "w3"], ["g1", "g2"]
ANSWER_SECONDS = 60
OTLP_PORT = 4317
METRICS_PORTS = {"c": 7001, "w": 7101, "g": 9000}


class Cluster:
    def __init__(self, options, folder, network):
        self.programs, self.folder, self.model = pathlib.Path(options.programs).resolve(), folder, options.model
        self.network, self.processes = network, {}
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "FORGE_HOME": str(folder / "op"),
            "FORGE_OFFLINE": "1",
            "NO_COLOR": "1",
        }
        self.receiver, self.followers = None, {}
        # Hosts whose processes stand for an older build, and its level.
        self.levels = {}
        (folder / "op").mkdir()

    def address(self, host, port):
        return f"{self.network.addresses[host]}:{port}"

    def metrics_address(self, host):
        return self.address(host, METRICS_PORTS[host[0]])

    # The operator.

    def forgectl(self, *arguments, environment=None, **options):
        command = self.network.within("op", self.programs / "forgectl", *arguments)
        return run(*command, env={**self.environment, **(environment or {})}, cwd=self.folder, **options)

    def refused(self, *arguments):
        """Exit code and message of a command that fails."""
        command = self.network.within("op", self.programs / "forgectl", *arguments)
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=self.environment, cwd=self.folder, check=False)
        return done.returncode, done.stderr

    def objects(self, *arguments):
        return json.loads(self.forgectl(*arguments, "-o", "json"))

    def following(self, *arguments):
        """A forgectl that goes on; its output is in the file that comes back with it."""
        file = self.folder / f"following-{len(list(self.folder.glob('following-*')))}"
        command = self.network.within("op", self.programs / "forgectl", *arguments)
        with open(file, "wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=self.environment, cwd=self.folder, start_new_session=True)
        self.followers[file.name] = process
        return file

    def end_following(self, file, is_interrupted=True):
        """Its exit code: after Ctrl-C, or when it ends by itself."""
        process = self.followers.pop(file.name)
        if is_interrupted:
            process.send_signal(signal.SIGINT)
        return process.wait(60)

    # The receiver of traces, on the operator's host.

    def receive_traces(self):
        command = self.network.within("op", self.programs / "otlp_receiver", self.address("op", OTLP_PORT))
        with open(self.folder / "spans", "wb") as out:
            self.receiver = subprocess.Popen(command, stdout=out, stderr=out, cwd=self.folder, start_new_session=True)

    def otlp_endpoint(self):
        return f"http://{self.address('op', OTLP_PORT)}"

    def spans(self, trace):
        """What arrived of a trace."""
        # The last piece is a line that is still being written, or nothing.
        lines = (self.folder / "spans").read_text().split("\n")[:-1]
        return [span for span in map(json.loads, lines) if span["trace"] == trace]

    # The processes.

    def start(self, host, program, *arguments):
        home = self.folder / host
        command = self.network.within(host, self.programs / program, "--config", home / "config.yaml", *arguments)
        if self.receiver:
            command += ["--set", f"telemetry.otlpEndpoint={self.otlp_endpoint()}"]
        environment = {**self.environment, "FORGE_HOME": str(home / "home")}
        if host in self.levels:
            environment["FORGE_TEST_LEVEL"] = str(self.levels[host])
        with open(home / "log", "ab") as log:
            self.processes[host] = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=home, start_new_session=True)

    def kill(self, host):
        process = self.processes.pop(host)
        process.send_signal(signal.SIGKILL)
        process.wait(20)

    def end(self):
        """Leaves no process behind."""
        for process in [*self.processes.values(), *self.followers.values(), *filter(None, [self.receiver])]:
            process.kill()

    def stop(self):
        """Asks all to end; their exit codes."""
        processes, self.processes = self.processes, {}
        for process in processes.values():
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 60
        codes = {}
        for host, process in processes.items():
            try:
                codes[host] = process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                codes[host] = "did not end"
        return codes

    def write(self, host, text, token):
        home = self.folder / host
        (home / "tls").mkdir(parents=True, exist_ok=True)
        (home / "config.yaml").write_text(text)
        (home / "join-token").write_text(token)
        (home / "join-token").chmod(0o600)

    def found(self):
        listen = self.address("c1", 7000)
        self.forgectl("cluster", "init", "--dir", self.folder / "c1", "--cluster", "test", "--name", "c1", "--listen", listen)
        (self.folder / "c1" / "coordinator.yaml").rename(self.folder / "c1" / "config.yaml")
        self.start_coordinator("c1", "--bootstrap")
        self.until("the first coordinator leads", 60, lambda: self.leader() == "c1")
        for host in ["c2", "c3"]:
            token = self.forgectl("cluster", "members", "add")
            self.write(
                host,
                f"apiVersion: forge/v1\nkind: Coordinator\nname: {host}\ndataDir: data\nlisten: {self.address(host, 7000)}\n"
                "membership:\n  directory: tls\n  tokenFile: join-token\n",
                token,
            )
            self.start_coordinator(host)
            self.until(f"{host} votes", 60, lambda host=host: host in self.voters())

    def start_coordinator(self, host, *arguments):
        self.start(host, "forge-coordinator", "--set", f"metricsListen={self.metrics_address(host)}", *arguments)

    def restart(self, host):
        """Starts a process that was there before."""
        if host in COORDINATORS:
            self.start_coordinator(host)
        else:
            self.start(host, "forge-worker" if host in WORKERS else "forge-gateway")

    def coordinators(self):
        return "[" + ", ".join(self.address(host, 7000) for host in COORDINATORS) + "]"

    def add_workers(self):
        token = self.forgectl("cluster", "join-token", "--role", "worker", "--uses", "3")
        for host in WORKERS:
            self.write(
                host,
                f"apiVersion: forge/v1\nkind: Worker\nname: {host}\ncoordinators: {self.coordinators()}\ndataDir: data\n"
                f"listen: {self.address(host, 7100)}\nmetricsListen: {self.metrics_address(host)}\n"
                "membership:\n  directory: tls\n  tokenFile: join-token\ndevices:\n- cores: 1\n  memory: 1GiB\n",
                token,
            )
            self.restart(host)
        self.until("three workers are ready", 90, lambda: len(self.ready("worker")) == 3)

    def add_gateways(self):
        token = self.forgectl("cluster", "join-token", "--role", "gateway", "--uses", "2")
        for host in GATEWAYS:
            address = self.network.addresses[host]
            self.write(
                host,
                f"apiVersion: forge/v1\nkind: Gateway\nname: {host}\ncoordinators: {self.coordinators()}\n"
                f"gateway:\n  host: {address}\n  port: 8000\n  metrics_host: {address}\n  metrics_port: 9000\n  insecure: true\n  timeouts:\n    keep_alive_s: 1\n"
                "membership:\n  directory: tls\n  tokenFile: join-token\n",
                token,
            )
            self.restart(host)
        self.until("two gateways are ready", 90, lambda: len(self.ready("gateway")) == 2)

    def apply(self, batch=8):
        document = self.folder / "model.yaml"
        document.write_text(
            "apiVersion: forge/v1\nkind: ModelService\nmetadata:\n  name: story\nspec:\n"
            f"  model: {self.model}\n  modelName: story\n  replicas: 2\n  maxModelLen: 512\n  threads: 1\n  maxBatchSize: {batch}\n"
        )
        plan = self.forgectl("apply", "-f", document, "--dry-run")
        print(plan)
        if "story would change" not in plan or "planned" not in plan:
            raise Failed("the dry run shows no plan")
        if self.objects("get", "models"):
            raise Failed("the dry run changed the cluster")
        self.forgectl("apply", "-f", document, "--wait", "running", "--timeout", "120")
        if "story unchanged" not in self.forgectl("apply", "-f", document):
            raise Failed("the same document, applied again, changed something")
        for host in GATEWAYS:
            self.until(f"{host} serves the model", 60, lambda host=host: self.serves(host))

    # What is so now.

    def voters(self):
        return {member["name"] for member in self.objects("cluster", "status")["members"] if member["isVoter"]}

    def leader(self):
        status = self.objects("cluster", "status")
        return next((member["name"] for member in status["members"] if member["id"] == status["leaderId"]), None)

    def node(self, name):
        return next(node for node in self.objects("get", "nodes") if node["spec"]["id"] == name)

    def ready(self, role):
        nodes = self.objects("get", "nodes")
        return {node["spec"]["id"] for node in nodes if node["spec"]["role"] == role and node["phase"] == "ready"}

    def placed_on(self):
        """Nodes of all replicas, those that leave included."""
        return {rank["node"] for rank in self.objects("get", "placements")}

    def serving_on(self):
        """Nodes of replicas that answer and stay."""
        return {
            rank["node"]
            for rank in self.objects("get", "placements")
            if rank["rank"] == 0 and rank["state"] == "ready" and not rank["isLeaving"]
        }

    def busiest(self):
        """The worker that answers most requests now, and how many."""
        running = {}
        for host in self.serving_on():
            _, page = self.http(self.metrics_address(host), "GET", "/metrics")
            running[host] = int(samples(page, "forge_requests_running{"))
        return max(running.items(), key=lambda item: item[1])

    def is_settled_on(self, nodes):
        return self.placed_on() == self.serving_on() == set(nodes)

    def serves(self, host):
        return self.http(self.address(host, 8000), "GET", "/health/ready?model=story")[0] == 200

    # HTTP, from the operator's host.

    def http(self, address, method, path, body=None, headers=None, on_line=None):
        return self.network.call(lambda: exchange(address, method, path, body, headers or {}, on_line))

    @staticmethod
    def until(what, seconds, holds):
        began, last = time.monotonic(), None
        while time.monotonic() - began < seconds:
            try:
                if holds():
                    return time.monotonic() - began
                last = None
            except (Failed, OSError, http.client.HTTPException, ValueError, KeyError, subprocess.TimeoutExpired) as error:
                last = error
            time.sleep(0.2)
        raise Failed(f"{what}: not within {seconds} s" + (f"; last: {last}" if last else ""))


def samples(page, start):
    """The sum over a metrics page's samples that begin so."""
    return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(start))


def exchange(address, method, path, body, headers, on_line):
    connection = http.client.HTTPConnection(address, timeout=ANSWER_SECONDS)
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
