"""What an operator sees of a running cluster, and the commands of everyday work."""

import json
import secrets

from network import Failed
from cluster import COORDINATORS, GATEWAYS, WORKERS, samples
from streams import check_equal, streams


def expect(what, text, *parts):
    for part in parts:
        if part not in text:
            raise Failed(f"{what}: no {part!r} in\n{text}")


def show(cluster, *arguments):
    """A command as the operator types it, with what it prints."""
    text = cluster.forgectl(*arguments)
    print(f"$ forgectl {' '.join(arguments)}\n{text}", flush=True)
    return text


def see(cluster, parts, *arguments):
    """As `show`, once all parts are in it: on a busy machine a node may be lost for a moment."""

    def holds():
        expect(" ".join(arguments), cluster.forgectl(*arguments), *parts)
        return True

    cluster.until(f"{' '.join(arguments)} shows {parts}", 60, holds)
    show(cluster, *arguments)


def listings(cluster):
    see(cluster, ["LEADER", *COORDINATORS], "cluster", "status", "-o", "wide")
    see(cluster, [*WORKERS, *GATEWAYS, "worker", "gateway", "ready", "1 cpu (1 cores)"], "get", "nodes", "-o", "wide")
    see(cluster, ["story", "2/2", "running"], "get", "models")
    see(cluster, ["story/0", "story/1", "ready", "EPOCH"], "get", "placements", "-o", "wide")
    see(cluster, ["WHEN", "node/w1", "story"], "get", "events")
    expect("models as YAML", cluster.forgectl("get", "models", "-o", "yaml"), "modelName: story", "phase: ready")
    see(cluster, ["NAME", "story", "REPLICAS", "EVENTS", "story/1"], "describe", "model", "story")
    node = sorted(cluster.serving_on())[0]
    see(cluster, ["INCARNATION", "DEVICES", "cpu", "EVENTS"], "describe", "node", node)
    see(cluster, ["story/0", "story/1", "model loaded"], "logs", "story", "--tail", "5")
    see(cluster, [node], "logs", node, "--node", "--tail", "5")


def pages(cluster):
    """Probes and metrics of all roles."""
    cluster.until("probes and metrics of all roles", 60, lambda: read_pages(cluster))


def read_pages(cluster):

    def page(host, path):
        status, text = cluster.http(cluster.metrics_address(host), "GET", path)
        if status != 200:
            raise Failed(f"{host} {path}: {status}: {text}")
        return text

    leading = 0
    for host in [*COORDINATORS, *WORKERS, *GATEWAYS]:
        page(host, "/livez"), page(host, "/readyz")
        metrics = page(host, "/metrics")
        expect(f"{host}'s metrics", metrics, "# EOF")
        if host in COORDINATORS:
            leading += samples(metrics, "forge_raft_is_leader")
            if samples(metrics, "forge_raft_applied_index") < 10:
                raise Failed(f"{host} applied nothing:\n{metrics}")
        elif host in GATEWAYS and samples(metrics, 'forge_generation_tokens_total{model_name="story"}') < 1:
            raise Failed(f"{host} counted no token")
    if leading != 1:
        raise Failed(f"{leading} coordinators say that they lead")
    steps = {host: samples(page(host, "/metrics"), 'forge_step_rows_count{model_name="story"') for host in cluster.serving_on()}
    if min(steps.values()) < 1:
        raise Failed(f"a worker counted no step: {steps}")
    print(f"ok: probes and metrics of all roles; steps so far: {steps}", flush=True)
    return True


def live(cluster, seeds, expected):
    """`top` while answers stream."""
    pictures = []
    picture = lambda: pictures.append(cluster.forgectl("top", "-n", "3", "--interval", "0.5"))  # noqa: E731
    check_equal("while `top` looks on", streams(cluster, GATEWAYS, seeds, picture), expected)
    print(f"$ forgectl top -n 3 --interval 0.5\n{pictures[0]}", flush=True)
    expect("top", pictures[0], "story/0", "story/1", "TOKENS/S", *WORKERS, *GATEWAYS)
    rates = [line.split()[4] for line in pictures[0].splitlines() if line.startswith("story/")]
    if not any(rate not in ("-", "0.0") for rate in rates):
        raise Failed(f"top saw no token though answers streamed: {rates}")


def scaling(cluster):
    """Out and back, followed by `get -w` and `logs -f`."""
    before = cluster.serving_on()
    free = (set(WORKERS) - before).pop()
    show(cluster, "cordon", free)
    see(cluster, ["ready,cordoned"], "get", "nodes")
    show(cluster, "uncordon", free)
    changes, log = cluster.following("get", "placements", "-w"), cluster.following("logs", free, "--node", "-f", "--tail", "1")
    cluster.until("the followers began", 30, lambda: "story/0" in changes.read_text() and log.read_text())
    show(cluster, "scale", "story", "--replicas", "3")
    waited = cluster.until("three replicas", 90, lambda: cluster.is_settled_on(WORKERS))
    print(f"ok: a third replica on {free}, asked for {waited:.1f} s", flush=True)
    cluster.until("the followers see the third replica", 30, lambda: "story/2" in changes.read_text() and "model loaded" in log.read_text())
    show(cluster, "scale", "story", "--replicas", "2")
    cluster.until("two replicas again", 90, lambda: len(cluster.placed_on()) == 2 and cluster.is_settled_on(cluster.placed_on()))
    for file in (changes, log):
        cluster.end_following(file)


def busy(cluster):
    """The worker with most requests; that there are some is what a test of its loss is about."""
    host, running = cluster.busiest()
    print(f"{host} answers {running} requests", flush=True)
    if running == 0:
        raise Failed("no worker answers a request: ask for more tokens")
    return host


def draining(cluster, seeds, expected):
    """A worker is emptied while it answers; nobody notices."""
    victims = []

    def drain():
        victims.append(busy(cluster))
        show(cluster, "drain", victims[0])

    after = streams(cluster, GATEWAYS, seeds, drain)
    victim = victims[0]
    check_equal(f"a worker ({victim}) drained", after, expected)
    rest = set(WORKERS) - {victim}
    waited = cluster.until(f"{victim} is empty", 90, lambda: cluster.is_settled_on(rest))
    print(f"ok: {victim} is empty, asked for {waited:.1f} s more", flush=True)
    see(cluster, ["ready,draining"], "get", "nodes")
    show(cluster, "uncordon", victim)


def refusals(cluster):
    """Exit codes and remedies."""
    large = cluster.folder / "large.yaml"
    large.write_text((cluster.folder / "model.yaml").read_text().replace("ame: story", "ame: large") + "  kvMemory: 8GiB\n")
    nowhere = cluster.address("op", 1)
    for what, code, says, arguments in [
        ("a model that is not there", 1, "there is no", ["describe", "model", "stroy"]),
        ("a node that is not there", 1, "w9", ["drain", "w9"]),
        ("a coordinator that is not a member", 1, "there are: c1", ["cluster", "members", "remove", "c9"]),
        ("a gateway that is to be cordoned", 2, "load balancer", ["cordon", "g1"]),
        ("a negative number of replicas", 2, "at least 1", ["scale", "story", "--replicas", "-1"]),
        ("a wrong file", 2, "replica", ["apply", "-f", cluster.folder / "model.yaml", "--set", "spec.replica=2"]),
        ("a model that fits nowhere", 3, "large", ["apply", "-f", large, "--dry-run"]),
        ("a wait that is over", 4, "does not run after 0 s", ["apply", "-f", cluster.folder / "model.yaml", "--wait", "running", "--timeout", "0"]),
        ("a coordinator that is not there", 4, nowhere, ["get", "nodes", "--server", nowhere]),
    ]:
        found, message = cluster.refused(*arguments)
        if found != code or says not in message or "error: " not in message:
            raise Failed(f"{what}: exit code {found} instead of {code}, or no {says!r}: {message}")
    print("ok: exit codes 1, 2, 3 and 4, each with a message", flush=True)


def traces(cluster):
    """One trace from a client to the engine, and one from a script to the entry that every coordinator applies."""
    body = {"model": "story", "prompt": "Once", "max_tokens": 4, "temperature": 0.5}
    trace, outside = secrets.token_hex(16), secrets.token_hex(8)
    headers = {"traceparent": f"00-{trace}-{outside}-01"}
    status, text = cluster.http(cluster.address("g1", 8000), "POST", "/v1/completions", body, headers)
    if status != 200:
        raise Failed(f"{status}: {text}")
    cluster.until("spans of the gateway and the worker", 30, lambda: len(cluster.spans(trace)) >= 2)
    gateway, worker = chain(cluster.spans(trace), outside, "text_completion story", "answer")
    about = gateway["attributes"]
    wanted = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "story",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.response.id": json.loads(text)["id"],
    }
    wrong = {key: about.get(key) for key, right in wanted.items() if about.get(key) != right}
    if wrong or gateway["instance"] != "g1" or worker["service"] != "forge-worker" or worker["attributes"]["gen_ai.usage.output_tokens"] != 4:
        raise Failed(f"spans of a request: {wrong}: {gateway} {worker}")

    trace, outside = secrets.token_hex(16), secrets.token_hex(8)
    environment = {"TRACEPARENT": f"00-{trace}-{outside}-01", "FORGE_OTLP_ENDPOINT": cluster.otlp_endpoint()}
    cluster.forgectl("cordon", "w1", environment=environment)
    cluster.forgectl("uncordon", "w1")
    # The command, its proposal, and the entry on each of three coordinators.
    cluster.until("spans of the command", 30, lambda: len(cluster.spans(trace)) >= 5)
    spans = cluster.spans(trace)
    chain(spans, outside, "forgectl cordon", "execute", "apply")
    appliers = sorted(span["instance"] for span in spans if span["name"] == "apply")
    if appliers != COORDINATORS:
        raise Failed(f"the entry's spans are of {appliers}")
    print("ok: traces: client, gateway, worker; script, forgectl, leader, the entry on all coordinators", flush=True)


def chain(spans, parent, *names):
    """The spans of these names, each below the one before."""
    found = []
    for name in names:
        span = next((span for span in spans if span["name"] == name and span["parent"] == parent), None)
        if span is None:
            raise Failed(f"no span {name!r} below {parent}: {[(span['name'], span['span'], span['parent']) for span in spans]}")
        found.append(span)
        parent = span["span"]
    return found


def keys(cluster):
    """A key that is made here is asked for there."""
    gateway = cluster.address("g2", 8000)
    key = cluster.forgectl("keys", "create", "tester", "--cluster").strip()
    cluster.until("the gateway asks for a key", 30, lambda: cluster.http(gateway, "GET", "/v1/models")[0] == 401)
    status, text = cluster.http(gateway, "GET", "/v1/models", headers={"authorization": f"Bearer {key}"})
    if status != 200:
        raise Failed(f"the new key: {status}: {text}")
    expect("keys", show(cluster, "get", "keys"), "tester", "active")
    show(cluster, "keys", "revoke", "tester", "--cluster")
    expect("keys", cluster.forgectl("get", "keys"), "revoked")


def backup(cluster):
    expect("backup", show(cluster, "cluster", "backup", "state.backup"), "wrote")
    if (cluster.folder / "state.backup").stat().st_size < 1000:
        raise Failed("the backup is too small to be one")
