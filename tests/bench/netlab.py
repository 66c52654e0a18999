"""A rate-limited network on one machine: hosts that are network namespaces, joined by a bridge.

::

    with Network(hosts=2, rate=150) as network:
        network.command(1)    # what starts a process on host 1
        network.set_rate(300)

Each host's outgoing link passes a token bucket (``tbf``), so bandwidth is limited as on a wire, and
in each direction by itself. The bucket must exceed 64 KiB, the largest segment that Linux hands to
a device: with less, every packet is cut up and the network's own work comes out of compute.

Needs root, ``ip`` and ``tc`` (Debian: iproute2) and a kernel with network namespaces and ``tbf``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from contextlib import ExitStack
from types import TracebackType

BURST = "256kb"
LATENCY = "400ms"


class Unavailable(Exception):
    """This machine cannot have such a network; the message says why and what to do."""


class Network:
    """``hosts`` hosts in a network of their own; each sends at most ``rate`` Mbit/s.

    Host ``i`` has the address ``address(i)`` on the interface ``interface(i)``. Names are unique to
    this object, and everything is removed on exit, whatever happened before.
    """

    def __init__(self, hosts: int = 2, rate: float = 150.0) -> None:
        self.hosts = hosts
        self.rate = rate
        self.name = f"moe{uuid.uuid4().hex[:6]}"
        self._cleanup = ExitStack()

    def namespace(self, host: int) -> str:
        return f"{self.name}h{host}"

    def interface(self, host: int) -> str:
        return f"{self.name}v{host}"

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def command(self, host: int) -> list[str]:
        """What to put before a command so that it runs on ``host``."""
        return ["ip", "netns", "exec", self.namespace(host)]

    def environment(self, host: int) -> dict[str, str]:
        """What torch.distributed needs to know on ``host``, rank ``host`` of as many as hosts."""
        return {
            "GLOO_SOCKET_IFNAME": self.interface(host),
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": "29500",
            "RANK": str(host),
            "WORLD_SIZE": str(self.hosts),
            "OMP_NUM_THREADS": "1",
        }

    def set_rate(self, rate: float) -> None:
        """From now on each host sends at most ``rate`` Mbit/s."""
        for host in range(self.hosts):
            self._limit(host, "replace", rate)
        self.rate = rate

    def __enter__(self) -> Network:
        require()
        try:
            self._set_up()
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def _set_up(self) -> None:
        switch = f"{self.name}sw"
        self._add_namespace(switch)
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        for host in range(self.hosts):
            here, inner, outer = self.namespace(host), self.interface(host), f"{self.name}s{host}"
            self._add_namespace(here)
            pair = ("type", "veth", "peer", "name", outer, "netns", switch)
            _run("ip", "link", "add", inner, "netns", here, *pair)
            _run("ip", "-n", here, "addr", "add", f"{self.address(host)}/24", "dev", inner)
            _run("ip", "-n", switch, "link", "set", outer, "master", "br0", "up")
            for device in ("lo", inner):
                _run("ip", "-n", here, "link", "set", device, "up")
            self._limit(host, "add", self.rate)

    def _add_namespace(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        self._cleanup.callback(_run, "ip", "netns", "del", name, check=False)

    def _limit(self, host: int, action: str, rate: float) -> None:
        bucket = ("tbf", "rate", f"{rate:g}mbit", "burst", BURST, "latency", LATENCY)
        device = ("dev", self.interface(host), "root")
        _run(*self.command(host), "tc", "qdisc", action, *device, *bucket)


def require() -> None:
    """Raise `Unavailable` unless the tools and rights that a `Network` needs are there."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise Unavailable(
            f"the two-host network needs {' and '.join(missing)}, not found here: install iproute2"
        )
    if os.geteuid() != 0:
        raise Unavailable(
            "the two-host network needs root, to make network namespaces: run it with sudo, or in "
            "a container with --privileged"
        )


def _run(*command: str, check: bool = True) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if check and done.returncode:
        said = done.stderr.strip()
        hint = ""
        if "tbf" in command and "No such file" in said:
            hint = " (the kernel lacks the token bucket: modprobe sch_tbf)"
        elif "not permitted" in said:
            hint = " (namespaces are not allowed here: a container needs --privileged)"
        raise Unavailable(f"{' '.join(command)}: {said}{hint}")
