#!/usr/bin/env python3
"""Shows that the simulator's checks can fail: breaks the code in ten ways, one at a time, in a copy of the repository, and
runs seeds until one fails.

    python3 tests/simulator/mutations.py            all of them (a build each: take a machine with cores to spare)
    python3 tests/simulator/mutations.py --only skip-fsync
    python3 tests/simulator/mutations.py --check    only whether each still finds the code that it breaks

Ends with 1 where one is not caught, or no longer fits the code.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Name, what it breaks, file, code, what stands there instead.
MUTATIONS = [
    (
        "skip-fsync",
        "entries and votes are not made durable before they count",
        "coordinator/src/raft/log/mod.rs",
        '        self.disk.sync(&name).map_err(|error| LogError::of("sync", &name, error))?;\n        self.is_dirty = false;\n        self.active_bytes',
        "        self.is_dirty = false;\n        self.active_bytes",
    ),
    (
        "forget-vote",
        "a term and a vote without entries are not written down",
        "coordinator/src/raft/log/mod.rs",
        "if must_sync || !entries.is_empty() {",
        "let _ = must_sync;\n        if !entries.is_empty() {",
    ),
    (
        "apply-twice",
        "a request that is asked again takes effect again",
        "coordinator/src/state/mod.rs",
        "known.get(&envelope.request_id, &digest) {",
        "known.get(&envelope.request_id, &digest).filter(|_| false) {",
    ),
    (
        "read-without-index",
        "reads are answered without asking whether this member still leads",
        "coordinator/src/raft/member.rs",
        "        self.unasked.extend(ids);\n",
        "        self.confirmed.push_back((0, ids));\n",
    ),
    (
        "epoch-again",
        "an epoch that was given out is given out again",
        "coordinator/src/state/plans.rs",
        "service.last_epoch = plan.epoch;",
        "let _ = plan.epoch;",
    ),
    (
        "serve-on",
        "a worker that the cluster gave up serves on",
        "worker/src/agent/mod.rs",
        "all.iter().flat_map(|run| self.end(run)).collect()",
        "all.iter().flat_map(|_| Vec::new()).collect()",
    ),
    (
        "lease-from-answer",
        "a node counts its lease from the answer instead of from its question",
        "shared/cluster/src/session.rs",
        "self.extend(sent_ms, lease_ms",
        "let _ = sent_ms;\n                    self.extend(now_ms, lease_ms",
    ),
    (
        "impatient-leader",
        "a new leader gives nodes no time to find it",
        "coordinator/src/control/lease.rs",
        "std::mem::take(&mut self.is_new) { 2 } else { 1 }",
        "std::mem::take(&mut self.is_new) { 0 } else { 1 }",
    ),
    (
        "forget-replies",
        "a snapshot does not hold which requests were answered",
        "coordinator/src/state/mod.rs",
        "    asked: Shared<Replies>,",
        "    #[serde(skip)]\n    asked: Shared<Replies>,",
    ),
    (
        "ignore-snapshot",
        "a member that lags does not take the state of the snapshot that it is sent",
        "coordinator/src/replicated.rs",
        "        *state = restored;\n",
        "        drop(restored);\n",
    ),
]


def mutated(text: str, name: str, code: str, instead: str) -> str:
    found = text.count(code)
    if found != 1:
        sys.exit(f"{name}: its code is there {found} times, and must be there once: adapt the mutation to the code of now")
    return text.replace(code, instead)


def check() -> None:
    for name, _, path, code, instead in MUTATIONS:
        mutated((ROOT / path).read_text(), name, code, instead)
    print(f"{len(MUTATIONS)} mutations fit the code")


def copy_repository(to: pathlib.Path) -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    for name in tracked.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def catch(copy: pathlib.Path, target: str, seeds: int, mutation) -> bool:
    name, what, path, code, instead = mutation
    file = copy / path
    whole = file.read_text()
    file.write_text(mutated(whole, name, code, instead))
    try:
        environment = {**os.environ, "CARGO_TARGET_DIR": target}
        command = ["cargo", "build", "--release", "-p", "forge-simulator"]
        subprocess.run(command, cwd=copy, env=environment, check=True)
        program = pathlib.Path(target) / "release" / "forge-sim"
        ran = subprocess.run([program, "--seeds", f"0..{seeds}", "--no-shrink"], capture_output=True, text=True, timeout=3600)
    finally:
        file.write_text(whole)
    breaks = re.search(r"^seed (\d+) breaks: (.*)$", ran.stdout, re.MULTILINE)
    print(f"{name} ({what}): " + (f"caught at seed {breaks[1]}: {breaks[2]}" if breaks else "NOT CAUGHT"), flush=True)
    return breaks is not None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one mutation by name")
    parser.add_argument("--check", action="store_true", help="build nothing")
    parser.add_argument("--seeds", type=int, default=2000, help="most seeds for each")
    parser.add_argument("--target", default=str(ROOT / "target" / "mutations"), help="folder of the builds")
    arguments = parser.parse_args()
    check()
    if arguments.check:
        return 0
    chosen = [mutation for mutation in MUTATIONS if arguments.only in (None, mutation[0])]
    if not chosen:
        sys.exit(f"there is no mutation {arguments.only!r}: {', '.join(mutation[0] for mutation in MUTATIONS)}")
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        copy_repository(copy)
        caught = [catch(copy, arguments.target, arguments.seeds, mutation) for mutation in chosen]
    print(f"{sum(caught)} of {len(caught)} caught")
    return 0 if all(caught) else 1


if __name__ == "__main__":
    sys.exit(main())
