"""Several machines on one: each has network, UTS, mount and pid namespaces of its own, and all hang on one bridge.

Nothing is recorded of what runs. A machine is found by its holder, the shell that is pid 1 of its namespaces, whose
arguments name the cluster's folder and the machine; bridge and links bear names made from the folder. So what another
process left behind, or half made, is found and taken away all the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MARK = "fleetune-devcluster"
UNSHARE = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc"]
HOLDER = "while :; do sleep 100000; done"  # a shell waits for every orphan, as an init has to
FIRST_NODE = 11  # addresses: control has .1, the nodes .11 and up, this machine's end of the bridge .254
MAX_NODES = 200
PATH = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/local/sbin:/usr/sbin:/sbin"

# What a machine of its own has: a name, the cluster's hosts file, shared memory that dies with it, a network.
FURNISH = """
set -e
echo "$1" > /proc/sys/kernel/hostname
mount --bind "$2" /etc/hosts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
ip link set lo up
ip address add "$3/24" dev eth0
ip link set eth0 up
"""
# Runs a daemon so that it belongs to the machine's pid 1, and leaves word if it ends: its exit code.
DAEMON = '("$@" < /dev/null > "$OUT" 2>&1; echo $? > "$EXITED") > /dev/null 2>&1 &'


class CannotRun(Exception):
    """Nothing was started: the command is wrong, or this machine lacks what a cluster needs."""


class Failed(Exception):
    """Something was started and did not come up."""


def sh(command: list[str], text: str | None = None) -> str:
    """The output of a command that must succeed."""
    result = subprocess.run(command, input=text, capture_output=True, text=True, env={**os.environ, "PATH": PATH})
    if result.returncode:
        raise Failed(f"{' '.join(command)}: {result.stderr.strip() or f'exit code {result.returncode}'}")
    return result.stdout


def until(done: Callable[[], bool], seconds: float) -> bool:
    """Whether it was done in time."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.03)
    return True


def processes() -> Iterator[tuple[int, list[str]]]:
    """Every process of this user's, with its arguments."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # one that ends while it is looked at
            if entry.name.isdigit() and entry.stat().st_uid == os.geteuid():
                yield int(entry.name), (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]


@dataclass(frozen=True)
class Machine:
    folder: Path  # the cluster's
    name: str
    number: int  # the last byte of its address
    prefix: str  # the first three bytes of it: 198.18.37

    @property
    def address(self) -> str:
        return f"{self.prefix}.{self.number}"

    @property
    def link(self) -> str:
        """Our end of its cable."""
        return f"{bridge_name(self.folder)}-{self.number}"

    @property
    def mac(self) -> str:
        """Always the same, so that nobody has to learn it anew when the machine comes back."""
        return "02:f1:" + ":".join(f"{int(byte):02x}" for byte in self.address.split("."))

    def holder(self) -> int | None:
        """The pid, seen from here, of the machine's pid 1; None while the machine does not run."""
        for pid, arguments in processes():
            if arguments[:1] == ["sh"] and arguments[-3:] == [MARK, str(self.folder), self.name]:
                with contextlib.suppress(OSError):
                    status = Path(f"/proc/{pid}/status").read_text()
                    if status.split("NSpid:")[1].split("\n")[0].split()[-1] == "1":
                        return pid
        return None

    def inside(self) -> dict[int, str]:
        """What runs in it: pids, seen from here, and the names of their programs."""
        return {} if (holder := self.holder()) is None else in_namespace_of(holder)

    def running(self, program: str) -> list[int]:
        return [pid for pid, name in self.inside().items() if name == program]

    def enter(self) -> list[str]:
        """What a command starts with to run in this machine."""
        if (holder := self.holder()) is None:
            raise Failed(f"{self.name} does not run")
        return ["nsenter", f"--target={holder}", "--net", "--uts", "--mount", "--pid"]

    def start(self) -> None:
        """Its namespaces, its cable and what FURNISH says."""
        subprocess.Popen(
            [*UNSHARE, "sh", "-c", HOLDER, MARK, str(self.folder), self.name],
            stdin=subprocess.DEVNULL,  # a holder that kept our pipes would keep their readers waiting
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            env={"PATH": PATH},
        )
        if not until(lambda: self.holder() is not None, 20):
            raise Failed(f"{self.name}: its namespaces did not come up ({' '.join(UNSHARE)})")
        self.cut_off()
        sh(
            ["ip", "-batch", "-"],
            f"link add {self.link} type veth peer name eth0 address {self.mac} netns {self.holder()}\n"
            f"link set {self.link} master {bridge_name(self.folder)} up\n",
        )
        hosts = str(self.folder / "etc" / "hosts")
        sh([*self.enter(), "sh", "-c", FURNISH, "sh", self.name, hosts, self.address])

    def run_daemon(self, name: str, command: list[str], **environment: str) -> None:
        """Starts it in this machine, in no session of ours; see `exited`."""
        self.exited(name).unlink(missing_ok=True)
        environment |= {"PATH": PATH, "OUT": str(self.output(name)), "EXITED": str(self.exited(name))}
        subprocess.run(
            [*self.enter(), "sh", "-c", DAEMON, "sh", *command],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            check=True,
            cwd="/",
            env=environment,
        )

    def output(self, daemon: str) -> Path:
        return self.folder / "log" / f"{daemon}-{self.name}.out"

    def exited(self, daemon: str) -> Path:
        """Where its exit code stands once it has ended."""
        return self.folder / "run" / f"{daemon}-{self.name}.exit"

    def plugged(self) -> bool:
        result = subprocess.run(
            ["ip", "-json", "link", "show", self.link], capture_output=True, text=True, env={"PATH": PATH}
        )
        return result.returncode == 0 and "UP" in json.loads(result.stdout)[0]["flags"]

    def plug(self, state: str) -> None:
        sh(["ip", "link", "set", self.link, state])

    def cut_off(self) -> None:
        """Takes the cable away; the kernel does it too, but later, when a machine dies."""
        subprocess.run(["ip", "link", "delete", self.link], stderr=subprocess.DEVNULL, env={"PATH": PATH})

    def kill(self) -> None:
        """Kills everything in it at once, as a loss of power does."""
        if (holder := self.holder()) is not None:
            kill(holder)
        self.cut_off()


def in_namespace_of(holder: int) -> dict[int, str]:
    names = {}
    with contextlib.suppress(OSError):
        mine = Path(f"/proc/{holder}/ns/pid").readlink()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "ns" / "pid").readlink() == mine:
                    names[int(entry.name)] = (entry / "comm").read_text().strip()
    return names


def kill(holder: int) -> None:
    """The kernel kills everybody in a pid namespace when its pid 1 dies, and only then lets that one go."""

    def gone() -> bool:
        try:
            return "\nState:\tZ" in Path(f"/proc/{holder}/status").read_text()
        except OSError:
            return True

    with contextlib.suppress(ProcessLookupError):
        os.kill(holder, signal.SIGKILL)
    if not until(gone, 20):
        raise Failed(f"process {holder} cannot be killed")


def digest(folder: Path) -> str:
    return hashlib.sha256(str(folder).encode()).hexdigest()[:6]


def bridge_name(folder: Path) -> str:
    return f"flt{digest(folder)}"


def make_bridge(folder: Path) -> str:
    """Makes the cluster's bridge; returns the first three bytes of its network.

    The networks are those that are set apart for benchmarks, 198.18.0.0/15, which no real host has. The first guess
    comes from the folder; one that is in use here is passed over. Who chooses holds a socket's name meanwhile, which
    is only one's in a network namespace, as the addresses are, and leaves no file.
    """
    with socket.socket(socket.AF_UNIX) as lock:

        def locked() -> bool:
            with contextlib.suppress(OSError):
                lock.bind(f"\0{MARK}")
                return True
            return False

        if not until(locked, 60):
            raise Failed("another cluster has been choosing its network for a minute")
        interfaces = json.loads(sh(["ip", "-json", "-4", "address"]))
        used = {a["local"].rpartition(".")[0] for i in interfaces for a in i["addr_info"] if "local" in a}
        guess = int(digest(folder), 16)
        networks = (divmod((guess + i) % 512, 256) for i in range(512))
        prefix = next((p for high, low in networks if (p := f"198.{18 + high}.{low}") not in used), None)
        if prefix is None:
            raise CannotRun("all of 198.18.0.0/15 is in use on this machine")
        here = Machine(folder, "here", 254, prefix)
        bridge = bridge_name(folder)
        try:
            sh(["ip", "link", "add", bridge, "address", here.mac, "type", "bridge"])
            sh(["ip", "address", "add", f"{here.address}/24", "dev", bridge])
            sh(["ip", "link", "set", bridge, "up"])
        except Failed as error:
            raise CannotRun(f"no bridge can be made here: {error}") from error
    return prefix


def take_away(folder: Path) -> None:
    """Every machine, link and bridge of the cluster in this folder, whoever made them."""
    holders = []
    for pid, arguments in processes():
        if arguments[-3:-1] == [MARK, str(folder)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            holders.append(pid)
    for pid in holders:
        kill(pid)
    for interface in json.loads(sh(["ip", "-json", "link"])):
        if (name := interface["ifname"]) == bridge_name(folder) or name.startswith(f"{bridge_name(folder)}-"):
            subprocess.run(["ip", "link", "delete", name], stderr=subprocess.DEVNULL, env={"PATH": PATH})
