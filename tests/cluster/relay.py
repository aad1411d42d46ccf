"""Network namespaces that are joined by the relay (tests/src/bin/relay) instead of a switch, so that links can be bad.

    sudo python3 tests/cluster/relay.py --programs target/debug

checks the relay itself: what it is told is what two hosts measure. Exit code 0: it is.
"""

import argparse
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time

from network import HOSTS, Failed, Namespaces, run

PORT, COUNT = 5000, 100


def why_no_tun():
    """Why the relay cannot run here, or nothing."""
    try:
        with open("/dev/net/tun", "r+b", buffering=0):
            return None
    except OSError as error:
        return f"/dev/net/tun cannot be opened: {error}"


class Relayed(Namespaces):
    """Every packet between hosts passes one process of ours, which loses, delays and reorders as it is told."""

    title = "network namespaces: one per process, joined by the relay"

    def __init__(self, programs, seed):
        super().__init__()
        self.program, self.seed, self.relay, self.lock = pathlib.Path(programs).resolve() / "relay", seed, None, threading.Lock()
        self.has_nft = shutil.which("nft") is not None

    def connect(self):
        ends = [f"{host}={self.name(host)},{self.addresses[host]}" for host in HOSTS]
        self.relay = subprocess.Popen(
            [self.program, str(self.seed), *ends], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
        )
        if self.relay.stdout.readline().strip() != "ready":
            raise Failed(f"the relay ended with exit code {self.relay.wait(10)}: it needs /dev/net/tun")

    def __exit__(self, *_):
        if self.relay:
            self.relay.stdin.close()
            try:
                self.relay.wait(5)
            except subprocess.TimeoutExpired:
                self.relay.kill()
        super().__exit__()

    def tell(self, line):
        with self.lock:
            self.relay.stdin.write(line + "\n")
            answer = self.relay.stdout.readline().strip()
        if not answer or answer.startswith("error"):
            raise Failed(f"relay: {line!r}: {answer or 'it ended'}")
        return answer

    def fault(self, name, sender, receiver, **settings):
        """Between two hosts, or "*": loss, delay_ms, jitter_ms, reorder, duplicate, rate_kbps."""
        self.tell(f"fault {name} {sender} {receiver} " + " ".join(f"{key}={value}" for key, value in settings.items()))

    def heal(self, name):
        self.tell(f"heal {name}")

    def unplug(self, host):
        run("ip", "-n", self.name(host), "link", "set", "eth0", "down")

    def plug(self, host):
        run("ip", "-n", self.name(host), "link", "set", "eth0", "up")

    def filter(self, host, *conditions):
        """Drops packets in and out of a host by nftables, all or those that meet the conditions."""
        nft = lambda *words: run(*self.within(host, "nft", "add", *words))  # noqa: E731
        nft("table", "inet", "chaos")
        for chain, device in [("input", "iifname"), ("output", "oifname")]:
            nft("chain", "inet", "chaos", chain, f"{{ type filter hook {chain} priority 0; }}")
            nft("rule", "inet", "chaos", chain, device, "eth0", *conditions, "drop")

    def unfilter(self, host):
        run(*self.within(host, "nft", "delete", "table", "inet", "chaos"))


def measure(network, sender, receiver, every_s=0.002, quiet_s=0.3):
    """What arrives of numbered packets: [(number, seconds on the way)]."""
    arrived, is_open = [], threading.Event()
    sent = {}

    def receive():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
            end.bind((network.addresses[receiver], PORT))
            end.settimeout(quiet_s + COUNT * every_s)
            is_open.set()
            while True:
                try:
                    number = int(end.recv(100))
                except TimeoutError:
                    return
                arrived.append((number, time.monotonic() - sent[number]))
                end.settimeout(quiet_s)

    def send():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
            for number in range(COUNT):
                sent[number] = time.monotonic()
                try:
                    end.sendto(str(number).encode(), (network.addresses[receiver], PORT))
                except OSError:
                    pass  # An unplugged host has no way.
                time.sleep(every_s)

    receiving = threading.Thread(target=lambda: network.call(receive, receiver))
    receiving.start()
    if not is_open.wait(10):
        raise Failed("the receiver did not begin")
    network.call(send, sender)
    receiving.join()
    return arrived


def expect(what, holds, found):
    if not holds:
        raise Failed(f"the relay: {what}: {found}")
    print(f"ok: {what}: {found}", flush=True)


def check(network):
    """The relay does what it is told, between two hosts."""

    def told(title, *faults):
        for sender, receiver, settings in faults:
            network.fault("check", sender, receiver, **settings)
        try:
            there, back = measure(network, "c1", "w1"), measure(network, "w1", "c1")
        finally:
            if faults:
                network.heal("check")
        middle = sorted(seconds for _, seconds in there)[len(there) // 2] * 1000 if there else 0
        numbers = [number for number, _ in there]
        return title, len(there), len(back), middle, numbers == sorted(numbers)

    title, there, back, middle, _ = told("nothing is wrong")
    expect(title, there == COUNT and back == COUNT, f"{there} and {back} of {COUNT} arrived, {middle:.1f} ms on the way")
    title, there, back, middle, _ = told("one direction is cut", ("c1", "w1", {"loss": 1}))
    expect(title, there == 0 and back == COUNT, f"{there} and {back} of {COUNT} arrived")
    title, there, back, _, _ = told("one direction loses", ("c1", "*", {"loss": 0.4}))
    expect(title, 40 <= there <= 80 and back == COUNT, f"{there} and {back} of {COUNT} arrived")
    title, there, _, middle, in_order = told("delay", ("*", "w1", {"delay_ms": 80, "jitter_ms": 10}))
    expect(title, there == COUNT and in_order and 75 <= middle <= 200, f"{there} of {COUNT} arrived in order, {middle:.1f} ms on the way")
    title, there, _, _, in_order = told("reordering", ("c1", "w1", {"delay_ms": 20, "reorder": 0.3}))
    expect(title, there == COUNT and not in_order, f"{there} of {COUNT} arrived, out of order")
    network.unplug("w1")
    title, there, back, _, _ = told("a link is down")
    network.plug("w1")
    expect(title, there == back == 0, f"{there} and {back} of {COUNT} arrived")
    title, there, back, _, _ = told("it is up again")
    expect(title, there == COUNT and back == COUNT, f"{there} and {back} of {COUNT} arrived")
    if network.has_nft:
        network.filter("w1", "numgen", "random", "mod", "100", "<", "30")
        title, there, back, _, _ = told("nftables on a host")
        network.unfilter("w1")
        expect(title, 45 <= there <= 90 and 45 <= back <= 90, f"{there} and {back} of {COUNT} arrived")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", default="target/debug", help="folder of the program relay")
    try:
        with Relayed(parser.parse_args().programs, 1) as network:
            check(network)
        return 0
    except (Failed, OSError) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
