#!/usr/bin/env python3
"""Shows that the simulator's checks can fail: breaks the code in fifteen ways, one at a time, in a copy of the repository, and
runs seeds until one fails.

    python3 tests/simulator/mutations.py            all of them: a build of some minutes first, then one of the broken crate each
    python3 tests/simulator/mutations.py --only skip-fsync
    python3 tests/simulator/mutations.py --check    only whether each still finds the code that it breaks
    python3 tests/simulator/mutations.py --in-place breaks this very checkout and its build outputs, one at a time, and mends
                                                    them: for a checkout that nobody else uses, and that is built already

Ends with 1 where one is not caught, or no longer fits the code, or where the code as it is breaks something.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

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
    (
        "carry-twice",
        "an answer that had ended is asked for again when an engine is lost, and counted twice",
        "gateway/src/journal.rs",
        "            .filter(|(_, answer)| !answer.finished)\n",
        "",
    ),
    (
        "breaker-stays-open",
        "a replica that answers again is left alone for ever",
        "gateway/src/breaker.rs",
        "        *self = Breaker::default();\n",
        "",
    ),
    (
        "draw-anew",
        "an engine that takes an answer over draws as if it began with it",
        "worker/engine/src/active.rs",
        "(self.request.prompt_tokens.len() + answer.tokens) as u32",
        "(self.request.prompt_tokens.len() + answer.tokens - self.request.choices[self.answer_of[id.choice as usize]].emitted_tokens.len()) as u32",
    ),
    (
        "no-copy",
        "a block that two answers share is written to without its content being copied",
        "worker/engine/src/blocks.rs",
        "                copies.push((block, copy));\n",
        "",
    ),
    (
        "free-twice",
        "a sequence that ended or was put back lets its blocks go and keeps them",
        "worker/engine/src/blocks.rs",
        "in std::mem::take(&mut table.blocks).into_iter().rev()",
        "in table.blocks.clone().into_iter().rev()",
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


# Crates that mutations break are built fast, and all that they use is optimized once.
BROKEN_CRATES = ["forge-cluster", "forge-coordinator", "forge-worker", "forge-simulator"]


def copy_repository(to: pathlib.Path) -> None:
    """Copies what is tracked. What is there already and has not changed keeps its time, so that nothing is built again."""
    tracked = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True)
    names = {name for name in tracked.stdout.decode().split("\0") if name and (ROOT / name).is_file()}
    for name in names:
        if (to / name).is_file() and (to / name).read_bytes() == (ROOT / name).read_bytes():
            continue
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, to / name)
    for path in [path for path in to.rglob("*") if path.is_file() and str(path.relative_to(to)) not in names]:
        path.unlink()


def build(tree: pathlib.Path, target: str) -> pathlib.Path:
    command = ["cargo", "build", "--profile", "sim", "-p", "forge-simulator"]
    for crate in BROKEN_CRATES:
        command += ["--config", f"profile.sim.package.{crate}.opt-level=0"]
    built = subprocess.run(command, cwd=tree, env={**os.environ, "CARGO_TARGET_DIR": target}, capture_output=True, text=True)
    if built.returncode != 0:
        sys.exit(f"it does not build:\n{built.stderr[-4000:]}")
    return pathlib.Path(target) / "sim" / "forge-sim"


def first_failure(program: pathlib.Path, seeds: int, threads: int) -> tuple[str, str] | None:
    """The lowest seed that breaks something, and what it breaks."""
    command = [program, "--seeds", f"0..{seeds}", "--threads", str(threads), "--no-shrink"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    breaks = re.search(r"^seed (\d+) breaks: (.*)$", ran.stdout, re.MULTILINE)
    if breaks is None and ran.returncode != 0:
        sys.exit(f"forge-sim ended with {ran.returncode}:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    return (breaks[1], breaks[2]) if breaks else None


def catch(tree: pathlib.Path, arguments, mutation) -> bool:
    name, what, path, code, instead = mutation
    file = tree / path
    whole = file.read_text()
    began = time.monotonic()
    file.write_text(mutated(whole, name, code, instead))
    try:
        program = build(tree, arguments.target)
        built = time.monotonic()
        found = first_failure(program, arguments.seeds, arguments.threads)
    finally:
        file.write_text(whole)
    took = f"{built - began:.0f} s to build, {time.monotonic() - built:.0f} s to run"
    print(f"{name} ({what}): " + (f"caught at seed {found[0]}: {found[1]}" if found else "NOT CAUGHT") + f" [{took}]", flush=True)
    return found is not None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one mutation by name")
    parser.add_argument("--check", action="store_true", help="build nothing")
    parser.add_argument("--in-place", action="store_true", help="no copy")
    parser.add_argument("--seeds", type=int, default=2000, help="most seeds for each")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of forge-sim")
    parser.add_argument("--target", help="folder of the builds")
    arguments = parser.parse_args()
    check()
    if arguments.check:
        return 0
    chosen = [mutation for mutation in MUTATIONS if arguments.only in (None, mutation[0])]
    if not chosen:
        sys.exit(f"there is no mutation {arguments.only!r}: {', '.join(mutation[0] for mutation in MUTATIONS)}")
    # Always the same folder: cargo takes a crate elsewhere to be another one.
    tree = ROOT if arguments.in_place else ROOT / "target" / "mutations" / "tree"
    arguments.target = arguments.target or str(ROOT / "target" if arguments.in_place else ROOT / "target" / "mutations" / "build")
    if not arguments.in_place:
        copy_repository(tree)
    found = first_failure(build(tree, arguments.target), 20, arguments.threads)
    if found:
        sys.exit(f"the code as it is breaks something at seed {found[0]}: {found[1]}")
    caught = [catch(tree, arguments, mutation) for mutation in chosen]
    print(f"{sum(caught)} of {len(caught)} caught")
    return 0 if all(caught) else 1


if __name__ == "__main__":
    sys.exit(main())
