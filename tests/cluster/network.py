"""Where the processes of a test cluster live: a network namespace each, or an address of the loopback each.

Both give every host an address of its own, on which the same ports are free; what is different is that packets between
namespaces pass a switch, and that nothing but the operator's host reaches them. Namespaces need root and iproute2.
"""

import ctypes
import os
import subprocess
import threading

HOSTS = ["c1", "c2", "c3", "w1", "w2", "w3", "g1", "g2", "op"]


class Failed(Exception):
    """Something did not hold."""


def run(*command, **options):
    """A program's output; a program that fails or hangs raises."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=options.pop("timeout", 180), **options)
    if done.returncode != 0:
        raise Failed(f"{' '.join(map(str, command))}: exit code {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def why_no_namespaces():
    """Why namespaces cannot be used here, or nothing."""
    name = f"fg{os.getpid()}-try"
    try:
        run("ip", "netns", "add", name)
        try:
            run("ip", "netns", "exec", name, "true")
            run("ip", "-n", name, "link", "add", "name", "switch", "type", "bridge")
            run("ip", "-n", name, "link", "add", "name", "v0", "type", "veth", "peer", "name", "v1")
        finally:
            run("ip", "netns", "del", name)
    except (Failed, OSError) as error:
        return str(error)
    return None


class Namespaces:
    """One switch (a bridge in a namespace of its own) and a cable from it to every host."""

    title = "network namespaces: one per process, and a switch"

    def __init__(self):
        self.prefix = f"fg{os.getpid()}"
        self.addresses = {name: f"10.77.0.{number}" for number, name in enumerate(HOSTS, 11)}

    def name(self, host):
        return f"{self.prefix}-{host}"

    def __enter__(self):
        try:
            run("ip", "netns", "add", self.name("sw"))
        except (Failed, OSError) as error:
            raise Failed(f"network namespaces are not allowed here (they need root and iproute2; else --network loopback): {error}") from error
        try:
            for host in HOSTS:
                run("ip", "netns", "add", self.name(host))
            self.connect()
            for host, address in self.addresses.items():
                name = self.name(host)
                run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
                run("ip", "-n", name, "link", "set", "eth0", "up")
                run("ip", "-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def connect(self):
        """Gives every host its `eth0`."""
        switch = self.name("sw")
        run("ip", "-n", switch, "link", "add", "name", "switch", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "switch", "up")
        for host in HOSTS:
            run("ip", "-n", switch, "link", "add", "name", f"v{host}", "type", "veth", "peer", "name", "eth0", "netns", self.name(host))
            run("ip", "-n", switch, "link", "set", f"v{host}", "master", "switch", "up")

    def __exit__(self, *_):
        for host in [*HOSTS, "sw"]:
            subprocess.run(["ip", "netns", "del", self.name(host)], capture_output=True, check=False)

    def within(self, host, *command):
        """The command on a host. `ip netns exec` becomes the program, so the process is the program itself."""
        return ["ip", "netns", "exec", self.name(host), *map(str, command)]

    def call(self, work, host="op"):
        """Runs `work` on a host: in a thread of its own that is moved there."""
        result = {}

        def target():
            handle = os.open(f"/var/run/netns/{self.name(host)}", os.O_RDONLY)
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


class Loopback:
    """One address of 127/8 per host, in a network that depends on this process, so that two runs do not meet."""

    title = "the loopback: one address of 127/8 per process"

    def __init__(self):
        self.addresses = {name: f"127.77.{os.getpid() % 250 + 1}.{number}" for number, name in enumerate(HOSTS, 11)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    @staticmethod
    def within(_host, *command):
        return [str(part) for part in command]

    @staticmethod
    def call(work, _host="op"):
        return work()


NETWORKS = {"namespaces": Namespaces, "loopback": Loopback}
