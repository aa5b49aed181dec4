"""Slurm's daemons on the machines of a cluster: the packages they come from, their configuration, how they start.

Debian 12's Slurm 22.05, without systemd and without cgroups.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from machines import FIRST_NODE, PATH, CannotRun, Failed, Machine, sh, until

START_SECONDS = 60.0  # for each daemon, on a machine that does other things too
STOP_SECONDS = 20.0
SLURMD_PORT, SLURMDBD_PORT = 6818, 6819  # what Slurm takes unless told otherwise; every machine has all ports
USABLE = ("idle", "mixed", "allocated", "completing")  # with a * it does not answer
POLICY = Path("/usr/sbin/policy-rc.d")

# What is looked for, and the package that brings it.
PROGRAMS = {
    "ip": "iproute2",
    "munged": "munge",
    "sbatch": "slurm-wlm",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
}
ACCOUNTING_PROGRAMS = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server", "mariadb-install-db": "mariadb-server"}

# ReturnToService=2 and the short timeouts: what takes minutes on a real cluster takes half a minute here.
# config_overrides: a node has the CPUs that are written here, whatever this machine has.
SLURM_CONF = """\
ClusterName=devcluster
SlurmctldHost=control({control})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=10
KillWait=5
MinJobAge=300
GresTypes=gpu
{accounting}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=hi Nodes=ALL MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF
"""
ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={control}
AccountingStoragePass={folder}/run/munge.socket
AccountingStorageTRES=gres/gpu"""
SLURMDBD_CONF = """\
DbdHost=control
DbdAddr={control}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
StorageType=accounting_storage/mysql
StorageUser=root
StorageLoc=slurm_acct_db
PidFile={folder}/run/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
"""


@dataclass(frozen=True)
class Size:
    nodes: int
    gpus_per_node: int
    cpus_per_node: int
    accounting: bool


@dataclass(frozen=True)
class Cluster:
    folder: Path
    prefix: str  # the first three bytes of its addresses
    size: Size

    @property
    def control(self) -> Machine:
        return Machine(self.folder, "control", 1, self.prefix)

    @property
    def nodes(self) -> list[Machine]:
        return [Machine(self.folder, f"node{i + 1}", FIRST_NODE + i, self.prefix) for i in range(self.size.nodes)]

    def record(self) -> dict[str, object]:
        return {"prefix": self.prefix, **asdict(self.size)}

    def slurm(self, *command: str) -> str:
        """The output of one of Slurm's commands, "" if it fails; none waits longer than this."""
        environment = {"PATH": PATH, "SLURM_CONF": str(self.folder / "etc" / "slurm.conf")}
        with contextlib.suppress(subprocess.TimeoutExpired):
            result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=20)
            return "" if result.returncode else result.stdout
        return ""

    def node_states(self) -> dict[str, str]:
        """As sinfo says: idle, allocated, down; with a * where the node does not answer."""
        return dict(line.split() for line in self.slurm("sinfo", "-hNo", "%N %T").splitlines())

    def answers(self) -> bool:
        return " UP" in self.slurm("scontrol", "ping")


def missing(accounting: bool) -> list[str]:
    """The packages that are not there."""
    programs = PROGRAMS | (ACCOUNTING_PROGRAMS if accounting else {})
    return list(dict.fromkeys(package for name, package in programs.items() if not shutil.which(name, path=PATH)))


def apt_get(packages: list[str]) -> list[str]:
    return ["apt-get", "install", "--yes", "--no-install-recommends", *packages]


@contextlib.contextmanager
def no_services() -> Iterator[None]:
    """Within it no package starts its daemons: the cluster starts its own."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


def install(packages: list[str]) -> None:
    """With apt-get; the lists are fetched if need be."""
    if not shutil.which("apt-get", path=PATH):
        raise CannotRun(f"there is no apt-get here; install what Debian calls {' '.join(packages)}")
    options = ["-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20", "-o", "DPkg::Lock::Timeout=120"]
    environment = {**os.environ, "PATH": PATH, "DEBIAN_FRONTEND": "noninteractive"}
    command = [*apt_get(packages), *options]
    with no_services():
        for attempt in (command, ["apt-get", "update", *options], command):
            done = subprocess.run(attempt, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)
            if attempt is command and done.returncode == 0:
                return
    said = "\n".join((done.stdout + done.stderr).splitlines()[-8:])
    raise CannotRun(f"{' '.join(apt_get(packages))} failed:\n{said}")


def configure(cluster: Cluster) -> None:
    """Everything the daemons read. What holds the cluster's key or its accounts is for root alone."""
    folder, size = cluster.folder, cluster.size
    for name in ("etc", "log", "run", "state", "spool", "gpus"):
        (folder / name).mkdir(exist_ok=True)
    for path in (*(folder / "log").iterdir(), folder / "run" / "munge.socket", folder / "database" / "socket"):
        path.unlink(missing_ok=True)  # what is found afterwards is this start's
    for node in cluster.nodes:
        (folder / "spool" / node.name).mkdir(exist_ok=True)
    # To Slurm a GPU is a device, whose number it puts into CUDA_VISIBLE_DEVICES; any device does.
    for i in range(size.gpus_per_node):
        if not (gpu := folder / "gpus" / f"gpu{i}").is_symlink():
            gpu.symlink_to("/dev/null")
    gres = f" Gres=gpu:{size.gpus_per_node}" if size.gpus_per_node else ""
    nodes = [
        f"NodeName={node.name} NodeAddr={node.address} CPUs={size.cpus_per_node} RealMemory=16000{gres}"
        for node in cluster.nodes
    ]
    values = {"folder": folder, "control": cluster.control.address, "nodes": "\n".join(nodes)}
    accounting = ACCOUNTING.format(**values) if size.accounting else "AccountingStorageType=accounting_storage/none"
    hosts = "".join(f"{machine.address} {machine.name}\n" for machine in (cluster.control, *cluster.nodes))
    files = {
        "slurm.conf": SLURM_CONF.format(**values, accounting=accounting),
        "gres.conf": f"Name=gpu File={folder}/gpus/gpu[0-{size.gpus_per_node - 1}]\n" if size.gpus_per_node else "",
        "slurmdbd.conf": SLURMDBD_CONF.format(**values),
        "hosts": f"{hosts}127.0.0.1 localhost\n{Path('/etc/hosts').read_text()}",
    }
    for name, text in files.items():
        (folder / "etc" / name).write_text(text)
    (folder / "etc" / "slurmdbd.conf").chmod(0o600)
    key = folder / "etc" / "munge.key"
    if not key.exists():
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))


def launch(machine: Machine, name: str, command: list[str]) -> None:
    folder = machine.folder
    socket_of_database = str(folder / "database" / "socket")
    machine.run_daemon(name, command, SLURM_CONF=str(folder / "etc" / "slurm.conf"), MYSQL_UNIX_PORT=socket_of_database)


def wait_for(machines: list[Machine], name: str, serving: Callable[[], set[str]]) -> None:
    """Until this daemon serves on all of these machines; the first that does not is named, with what it said."""
    waited_for = {machine.name for machine in machines}
    served: set[str] = set()

    def done() -> bool:
        served.update(serving())
        return served >= waited_for or any(machine.exited(name).exists() for machine in machines)

    until(done, START_SECONDS)
    for machine in machines:
        exited = machine.exited(name)
        if exited.exists() or machine.name not in served:
            how = f"ended with exit code {exited.read_text().strip()}" if exited.exists() else "does not answer"
            said = machine.output(name).read_text(errors="replace").splitlines()[-15:]
            raise Failed("\n  ".join([f"{name} on {machine.name} {how}; it said last:", *(said or ["nothing"])]))


def start(machine: Machine, name: str, command: list[str], ready: Callable[[], bool]) -> None:
    """Starts one daemon and waits until it serves."""
    launch(machine, name, command)
    wait_for([machine], name, lambda: {machine.name} if ready() else set())


def start_database(cluster: Cluster) -> None:
    """MariaDB, for slurmdbd alone: its socket stands in a folder of root's, and it asks for no password."""
    folder = cluster.folder / "database"
    # Nothing here has to outlive a loss of power, so it never waits for the disk.
    options = [f"--datadir={folder}", "--user=root", "--innodb-flush-method=nosync", "--skip-sync-frm"]
    options += ["--innodb-log-file-size=8M", "--skip-innodb-doublewrite", "--skip-log-bin"]
    # In /tmp its files have names of its process's number, which in another cluster's namespace is the same.
    options.append(f"--tmpdir={cluster.folder}/run")
    if not (folder / "mysql").is_dir():
        folder.mkdir(mode=0o700, exist_ok=True)
        quick = ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"]
        sh([*cluster.control.enter(), "mariadb-install-db", "--no-defaults", *options, *quick])
    options += [f"--socket={folder}/socket", f"--pid-file={folder}/pid", "--skip-networking", "--skip-grant-tables"]
    ready = (folder / "socket").exists
    start(cluster.control, "mariadbd", ["mariadbd", "--no-defaults", *options], ready)


def start_control(cluster: Cluster) -> None:
    folder, control = cluster.folder, cluster.control
    munge = folder / "run" / "munge.socket"
    files = [f"--key-file={folder}/etc/munge.key", f"--socket={munge}", f"--pid-file={folder}/run/munged.pid"]
    files += [f"--seed-file={folder}/run/munge.seed", f"--log-file={folder}/log/munged.log"]
    # --force: the folder may stand where only root can look.
    start(control, "munged", ["munged", "--foreground", "--force", *files], munge.exists)
    if cluster.size.accounting:
        start_database(cluster)
        start(control, "slurmdbd", ["slurmdbd", "-D"], lambda: listens(control.address, SLURMDBD_PORT))
    start(control, "slurmctld", ["slurmctld", "-D"], cluster.answers)


def listens(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
        return True
    return False


def start_nodes(cluster: Cluster, nodes: list[Machine]) -> None:
    """A slurmd on each, if there is none, until Slurm can use them all; Slurm may have given them up."""
    for node in nodes:
        if not node.running("slurmd"):
            launch(node, "slurmd", ["slurmd", "-D"])

    def serving() -> set[str]:
        states = cluster.node_states()
        for node in nodes:
            if states.get(node.name, "").startswith("down"):
                cluster.slurm("scontrol", "update", f"NodeName={node.name}", "State=RESUME")
        # Slurm remembers an idle node as idle, before it has met it again.
        return {n.name for n in nodes if states.get(n.name) in USABLE and listens(n.address, SLURMD_PORT)}

    wait_for(nodes, "slurmd", serving)


def start_all(cluster: Cluster) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(Machine.start, (cluster.control, *cluster.nodes)))
    start_control(cluster)
    start_nodes(cluster, cluster.nodes)


def stop_control(cluster: Cluster) -> None:
    """Lets the daemons write down what they know; the one that the others write to goes last."""
    for name in ("slurmctld", "slurmdbd", "mariadbd"):
        end = time.monotonic() + STOP_SECONDS
        while (pids := cluster.control.running(name)) and time.monotonic() < end:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            time.sleep(0.2)
