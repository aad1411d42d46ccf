"""The clusters of cluster-configs/ that need no GPU, started from their files and asked for an answer.

    python3 tests/cluster/configs.py --programs target/debug --model MODEL.gguf

Each folder is copied with one change: 127.0.0.1 becomes another address of the loopback, so that a cluster on this machine is
not in the way. What is typed is what the files and docs/cluster.md say. Where two workers share a model, one of them is killed while
it answers, and the answer goes on with its tokens. Exit code 0: every cluster answered.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

from cluster import Cluster, exchange
from network import Failed, run

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = ["laptop", "one-host", "two-devices", "two-workers"]


class Copy:
    """A folder of configurations and the processes that were started from it."""

    def __init__(self, name, programs, folder):
        self.name = name
        self.programs, self.folder = pathlib.Path(programs).resolve(), folder
        self.host = f"127.78.{os.getpid() % 250 + 1}.{FOLDERS.index(name) + 1}"
        self.files, self.models = {}, []
        for file in sorted((ROOT / "cluster-configs" / name).iterdir()):
            (folder / file.name).write_text(file.read_text().replace("127.0.0.1", self.host))
            if file.stem.startswith("model-"):
                self.models.append(folder / file.name)
            else:
                self.files[file.stem] = file.name
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "FORGE_HOME": str(folder / "home"), "FORGE_OFFLINE": "1"}
        self.processes, self.by_stem = [], {}

    def forgectl(self, *arguments):
        return run(self.programs / "forgectl", *arguments, env=self.environment, cwd=self.folder)

    def start(self, stem, *arguments):
        role = stem.split("-")[0]
        with open(self.folder / f"{stem}.log", "ab") as log:
            command = [self.programs / f"forge-{role}", "--config", self.files[stem], *arguments]
            process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, cwd=self.folder, start_new_session=True)
        self.processes.append(process)
        self.by_stem[stem] = process

    def kill(self, stem):
        """Ends a process as a crash would."""
        process = self.by_stem[stem]
        process.kill()
        process.wait()
        self.processes.remove(process)

    def key(self, stem, name):
        """A value of a file, by its name and indentation."""
        return re.search(rf"^ *{name}: *(\S+)$", (self.folder / self.files[stem]).read_text(), re.MULTILINE)[1]

    def join(self, stem):
        """A process that comes in with a token where its file wants it."""
        file = self.folder / self.key(stem, "tokenFile")
        file.parent.mkdir(parents=True, exist_ok=True)
        role = stem.split("-")[0]
        token = self.forgectl("cluster", "members", "add") if role == "coordinator" else self.forgectl("cluster", "join-token", "--role", role)
        file.write_text(token)
        file.chmod(0o600)
        self.start(stem)

    def stop(self):
        for process in self.processes:
            process.terminate()
        deadline = time.monotonic() + 60
        codes = []
        for process in self.processes:
            try:
                codes.append(process.wait(max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append("did not end")
        return codes


def starts(copy, model):
    first, *others = [stem for stem in copy.files if stem.startswith("coordinator")]
    # As the first file's comment says.
    command = re.search(r"`forgectl (cluster init [^`]*)`", (copy.folder / copy.files[first]).read_text())[1]
    copy.forgectl(*command.split())
    copy.start(first, "--bootstrap")
    until = Cluster.until
    until("the first coordinator leads", 60, lambda: "leader" in copy.forgectl("cluster", "status"))
    for stem in others:
        copy.join(stem)
        until(f"{stem} votes", 60, lambda stem=stem: f"{copy.key(stem, 'name')} " in copy.forgectl("cluster", "status"))
    nodes = [stem for stem in copy.files if not stem.startswith("coordinator")]
    for stem in nodes:
        copy.join(stem)
    until("all nodes are ready", 90, lambda: copy.forgectl("get", "nodes").count(" ready ") == len(nodes))
    workers = sum(stem.startswith("worker") for stem in nodes)
    whole = copy.folder / "whole.yaml"
    whole.write_text(
        "apiVersion: forge/v1\nkind: ModelService\nmetadata:\n  name: demo\n"
        f"spec:\n  model: smollm2:135m\n  replicas: {workers}\n  maxModelLen: 256\n  threads: 1\n"
    )
    address, body = f"{copy.host}:{copy.key('gateway', 'port')}", {"model": "demo", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}

    answers = {}

    def answer(name):
        status, text = exchange(address, "POST", "/v1/completions", body, {}, None)
        if status != 200:
            raise Failed(f"{status}: {text}")
        answers[name] = json.loads(text)["choices"][0]["text"]
        return True

    for document in [whole, *copy.models]:
        document.write_text(document.read_text().replace("smollm2:135m", str(model)))
        copy.forgectl("apply", "-f", document, "--wait", "running", "--timeout", "120")
        until(f"an answer of {document.stem}", 60, lambda name=document.stem: answer(name))
        copy.forgectl("delete", "demo")
        until(f"{document.stem} is gone", 60, lambda: "demo" not in copy.forgectl("get", "models"))
    if len(set(answers.values())) != 1:
        raise Failed(f"layouts answer differently: {answers}")
    if copy.name == "two-workers":
        survives(copy, address)
    codes = copy.stop()
    if any(codes):
        raise Failed(f"exit codes after SIGTERM: {codes}")


def survives(copy, address):
    """A worker that has ranks of a model is killed while that answers, leading or not: the answer is the undisturbed one."""
    copy.forgectl("apply", "-f", copy.folder / "model-pipeline.yaml", "--wait", "running", "--timeout", "120")
    body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 64, "temperature": 0, "stream": True}

    def answer(on_token=lambda count: None):
        texts = []

        def on_line(line):
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise Failed(line)
                if chunk["choices"] and chunk["choices"][0]["text"]:
                    texts.append(chunk["choices"][0]["text"])
                    on_token(len(texts))

        status, text = exchange(address, "POST", "/v1/completions", body, {}, on_line)
        if status != 200:
            raise Failed(f"{status}: {text}")
        return "".join(texts)

    def placed():
        return re.findall(r"\bw[12]\b", copy.forgectl("get", "placements"))

    Cluster.until("the model answers", 60, lambda: exchange(address, "GET", "/health/ready", None, {}, None)[0] == 200)
    undisturbed = answer()
    for victim in ["worker-2", "worker-1"]:
        print(f"  ranks on {', '.join(placed())}; {victim} is killed", flush=True)
        if len(set(placed())) != 2:
            raise Failed(f"the ranks are not on two workers: {placed()}")

        def on_token(count, victim=victim):
            if count == 5:
                copy.kill(victim)
                # It is back before long.
                threading.Timer(1, copy.start, [victim]).start()

        began = time.monotonic()
        disturbed = answer(on_token)
        if disturbed != undisturbed:
            raise Failed(f"{victim} was killed, and the answer is {disturbed!r}, not {undisturbed!r}")
        print(f"  the answer went on with its tokens, in {time.monotonic() - began:.1f} s", flush=True)
        Cluster.until("both workers are ready", 60, lambda: copy.forgectl("get", "nodes").count(" ready ") == 3)
        copy.forgectl("delete", "demo")
        Cluster.until("the model is gone", 60, lambda: "demo" not in copy.forgectl("get", "models"))
        copy.forgectl("apply", "-f", copy.folder / "model-pipeline.yaml", "--wait", "running", "--timeout", "120")
        Cluster.until("the model answers", 60, lambda: answer() == undisturbed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", default="target/debug")
    parser.add_argument("--model", required=True)
    parser.add_argument("--only", choices=FOLDERS, help="one of the clusters")
    options = parser.parse_args()
    model = pathlib.Path(options.model).resolve()
    for name in [options.only] if options.only else FOLDERS:
        folder, began = pathlib.Path(tempfile.mkdtemp(prefix=f"forge-{name}-")), time.monotonic()
        copy = Copy(name, options.programs, folder)
        try:
            starts(copy, model)
        except (Failed, subprocess.TimeoutExpired) as error:
            print(f"FAILED: cluster-configs/{name}: {error}\nlogs: {folder}/*.log", file=sys.stderr)
            for log in sorted(folder.glob("*.log")):
                print(f"--- {log.stem}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:]), file=sys.stderr)
            return 1
        finally:
            for process in copy.processes:
                process.kill()
        shutil.rmtree(folder)
        print(f"ok: cluster-configs/{name}: {len(copy.files)} processes answered, in {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
