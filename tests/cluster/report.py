"""The figures of a chaos run, in Markdown."""

import collections
import os
import statistics

from clients import PAUSES, histogram


def write(chaos, groups, undisturbed, seed, seconds):
    load, options = chaos.load, chaos.options
    faults = [fault for group in groups for fault in group if fault.hosts]
    counts = load.counts
    parts = [
        f"Seed {seed}: {len(faults)} faults in {len(groups)} groups, {seconds:.0f} s, {len(load.orders)} clients, on average "
        f"{statistics.mean(fault.figures['streams'] for fault in faults):.0f} streams going on when a fault began, slack {options.slack:g}, "
        f"{os.cpu_count()} cores with a load of {os.getloadavg()[0]:.0f}.\n",
        f"{counts['completed']} answers with {counts['tokens']} tokens, all compared; {counts['tried again']} took more than one try, "
        f"{counts['accepted twice and more']} were accepted more than once (their gateway was broken). "
        f"{sum(load.refusals.values())} refusals with a typed error, {sum(load.breaks.values())} broken connections ({listed(load.breaks)}). "
        f"{len(chaos.clerk.done)} commands acknowledged and none of them lost; {chaos.clerk.lost} ended with `lost contact`. "
        f"**{len(load.violations)} violations.**\n",
        table(["fault", *sorted({fault.whom for fault in faults}, key=str)], by_kind(faults)),
        table(["what", "times", "median", "longest", "bound"], [*times(faults, "new leader", 2), *times(faults, "replicas back", 10), *times(faults, "settled_s", 30)]),
        table(["longest pause of an answer", "undisturbed", "under faults", "its gateway died, begun again"], pauses(undisturbed, load.pauses, load.retried_pauses)),
        f"Time to the first token: median {statistics.median(load.firsts or [0]):.2f} s, longest {max(load.firsts, default=0):.1f} s "
        f"(over all tries). Longest pause {max(load.pauses, default=0):.1f} s; of an answer begun again {max(load.retried_pauses, default=0):.1f} s.\n",
    ]
    if load.refusals:
        parts.append(table(["refused with", "times"], [[f"`{message}`", str(times_)] for message, times_ in load.refusals.most_common(8)]))
    if hasattr(chaos.network, "tell"):
        parts.append(f"The relay: `{chaos.network.tell('counts')}`.\n")
    parts += [f"- violation: {violation}" for violation in load.violations]
    return "\n".join(parts)


def listed(counter):
    return ", ".join(f"{name} {count}" for name, count in counter.most_common()) or "none"


def by_kind(faults):
    whoms = sorted({fault.whom for fault in faults}, key=str)
    table_ = collections.Counter((fault.how, fault.whom) for fault in faults)
    return [[how, *(str(table_[how, whom] or "") for whom in whoms)] for how in dict.fromkeys(sorted(fault.how for fault in faults))]


def times(faults, what, bound):
    found = [fault.figures[what] for fault in faults if what in fault.figures]
    name = {"settled_s": "all whole after the fault ended"}.get(what, what)
    return [[name, str(len(found)), f"{statistics.median(found):.2f} s", f"{max(found):.2f} s", f"{bound} s"]] if found else []


def pauses(*columns):
    names = [f"up to {bound:g} s" for bound in PAUSES] + [f"over {PAUSES[-1]} s"]
    rows = zip(names, *map(histogram, columns))
    return [[name, *(share(count, len(column)) for count, column in zip(counts, columns))] for name, *counts in rows if any(counts)]


def share(count, of):
    return f"{count} ({100 * count / max(1, of):.1f} %)" if count else ""


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
