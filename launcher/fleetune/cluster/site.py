"""A cluster as Slurm describes it: partitions, their nodes, reservations, and what this user may use."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fleetune.cluster import slurm

ACCOUNTING_SECONDS = 5.0


@dataclass(frozen=True)
class Partition:
    name: str
    values: dict[str, str]  # as scontrol has them: MaxTime, GraceTime, PreemptMode, AllowAccounts, ...

    @property
    def is_default(self) -> bool:
        return self.values.get("Default") == "YES"

    @property
    def most_minutes(self) -> float:
        seconds = slurm.seconds_of(self.values.get("MaxTime", "UNLIMITED"))
        return float("inf") if seconds is None else seconds / 60

    @property
    def most_nodes(self) -> float:
        text = self.values.get("MaxNodes", "UNLIMITED")
        return int(text) if text.isdigit() else float("inf")


@dataclass(frozen=True)
class Nodes:
    """Those of a partition that are alike."""

    partition: str
    count: int
    cpus: int
    megabytes: int
    gpus: dict[str, int]  # by type; "" where the cluster names none
    features: frozenset[str]

    def gpus_of(self, kind: str | None) -> int:
        return sum(self.gpus.values()) if kind is None else self.gpus.get(kind, 0)


@dataclass(frozen=True)
class Association:
    """That this user may use an account, in one partition or ("") in any, with these qos."""

    account: str
    partition: str
    qos: tuple[str, ...]


@dataclass(frozen=True)
class Cluster:
    config: dict[str, str]
    partitions: dict[str, Partition]
    nodes: list[Nodes]
    reservations: list[str]
    associations: list[Association] | None  # None where there is no accounting, it does not answer or was not asked

    @property
    def has_accounting(self) -> bool:
        return "slurmdbd" in self.config.get("AccountingStorageType", "")

    def enforces(self, what: str) -> bool:
        """Whether Slurm refuses a job for its `associations` or its `qos`."""
        enforced = set(self.config.get("AccountingStorageEnforce", "none").lower().split(","))
        return bool(enforced & ({"qos", "all"} if what == "qos" else {"associations", "limits", "safe", "qos", "all"}))


def ask(associations: bool, seconds: float = slurm.SECONDS) -> Cluster:
    """By two commands, and a third for `associations`: the accounting has a server of its own, which may be down.

    Raises SlurmFailed where the controller does not answer within so many seconds.
    """
    typed = "show config\nshow partition\nshow reservation\nquit\n"
    lines = [
        line.replace("scontrol: ", "").strip()  # its prompt
        for line in slurm.command("scontrol", "--all", "--oneliner", typed=typed, seconds=seconds).splitlines()
    ]
    config: dict[str, str] = dict(re.findall(r"^(\w+)\s+= (.*)$", "\n".join(lines), re.MULTILINE))
    partitions = [_fields(line) for line in lines if line.startswith("PartitionName=")]
    if not partitions:
        raise slurm.SlurmFailed("scontrol: names no partition")
    rows = slurm.command("sinfo", "--all", "--exact", "--noheader", "--format=%R|%D|%c|%m|%G|%f", seconds=seconds)
    cluster = Cluster(
        config,
        {values["PartitionName"]: Partition(values["PartitionName"], values) for values in partitions},
        [_nodes(row) for row in rows.splitlines()],
        [_fields(line)["ReservationName"] for line in lines if line.startswith("ReservationName=")],
        None,
    )
    if associations and cluster.has_accounting:
        with contextlib.suppress(slurm.SlurmFailed):
            return replace(cluster, associations=list(_associations(min(seconds, ACCOUNTING_SECONDS))))
    return cluster


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(\S*)", line))


def _nodes(row: str) -> Nodes:
    partition, count, cpus, megabytes, gres, features = row.split("|", 5)
    gpus: dict[str, int] = {}
    for kind, number in re.findall(r"(?:^|,)gpu(?::([^:,()]+))??(?::(\d+))?(?=[,(]|$)", gres):  # gpu:h100:8(S:0-1)
        gpus[kind] = gpus.get(kind, 0) + int(number or 1)
    words = frozenset(features.split(",")) - {"(null)", ""}
    return Nodes(partition, int(count), int(cpus.rstrip("+")), int(megabytes.rstrip("+")), gpus, words)


def _associations(seconds: float) -> Iterator[Association]:
    user = pwd.getpwuid(os.getuid()).pw_name
    words = ("sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={user}")
    for row in slurm.command(*words, "format=account,partition,qos", seconds=seconds).splitlines():
        account, partition, qos = row.split("|", 2)
        yield Association(account, partition, tuple(name for name in qos.split(",") if name))
