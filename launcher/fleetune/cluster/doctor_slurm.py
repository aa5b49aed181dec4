"""What `fleetune doctor` says of Slurm: how it treats jobs, what this user may use, and how a profile fits it."""

from __future__ import annotations

import grp
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fleetune.cluster import preflight, slurm
from fleetune.cluster.file_systems import why_unshared
from fleetune.cluster.profile import Profile
from fleetune.cluster.site import Cluster, Partition, ask

COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "sinfo", "sacct", "sacctmgr")
NEEDED = ("sbatch", "srun", "squeue", "scontrol", "sinfo")
ANSWER_SECONDS = 3.0  # of each command
MOST_PARTITIONS = 12


@dataclass(frozen=True)
class Row:
    what: str
    found: str
    state: Literal["ok", "warning", "problem"] = "ok"
    todo: str = ""


def slurm_rows(profile: Profile | None, file: Path | None) -> Iterator[Row]:
    """Without a profile a machine without Slurm is as good as any other."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if set(NEEDED) & set(missing):
        found = "none here" if set(NEEDED) <= set(missing) else f"{', '.join(missing)} not found"
        yield Row("Slurm", found, "ok" if profile is None else "problem", "" if profile is None else "use a login node")
        return
    began = time.monotonic()
    try:
        cluster = ask(associations=True, seconds=ANSWER_SECONDS)
    except slurm.SlurmFailed as error:
        yield _unanswered(str(error), profile is not None)
        return
    milliseconds = 1000 * (time.monotonic() - began)
    name, version = cluster.config.get("ClusterName", ""), cluster.config.get("SLURM_VERSION", "")
    where = os.environ.get("SLURM_CONF") or cluster.config.get("SLURM_CONF", "")
    yield Row("Slurm", f"{version}, cluster {name}, answers in {milliseconds:.0f} ms; SLURM_CONF {where}")
    yield from _of_cluster(cluster)
    for partition in list(cluster.partitions.values())[:MOST_PARTITIONS]:
        yield _of_partition(partition, cluster)
    if len(cluster.partitions) > MOST_PARTITIONS:
        yield Row("partitions", f"{len(cluster.partitions) - MOST_PARTITIONS} more: sinfo")
    if profile is not None and file is not None:
        yield from _of_profile(profile, file, cluster)


def _unanswered(said: str, is_needed: bool) -> Row:
    found = said.splitlines()[0]
    if "configuration source" in said or "fetch config" in said:  # the commands alone
        todo = "set SLURM_CONF, or use a login node"
        return Row("Slurm", "its commands are here, and no configuration", "problem" if is_needed else "ok", todo)
    return Row("Slurm", found, "problem", "see whether slurmctld runs: scontrol ping")


# ---------------------------------------------------------------- the cluster


def _of_cluster(cluster: Cluster) -> Iterator[Row]:
    config = cluster.config
    killed = f"KillWait {config.get('KillWait', '?')}"
    if config.get("JobRequeue") == "1":
        yield Row("requeueing", f"by default; {killed}")
    else:
        yield Row("requeueing", f"off by default; Fleetune asks for it with every job; {killed}")
    yield Row("job arrays", f"of {config.get('MaxArraySize', '?')} at most (MaxArraySize)")
    yield _preemption(config)
    yield _accounting(cluster)
    if cluster.associations is not None:
        yield _accounts(cluster)
    for line in preflight.overriding():
        yield Row("environment", line, "warning", "unset it")


def _preemption(config: dict[str, str]) -> Row:
    kind, mode = config.get("PreemptType", "preempt/none"), config.get("PreemptMode", "OFF")
    if kind.endswith("/none"):
        return Row("preemption", "none")
    found = f"by {kind.partition('/')[2]}, {mode}"
    if "preempt_send_user_signal" in config.get("SlurmctldParameters", ""):
        return Row("preemption", f"{found}; jobs get the signal that they asked for")
    return Row("preemption", f"{found}; jobs get SIGTERM, on which ranks save as well")


def _accounting(cluster: Cluster) -> Row:
    config = cluster.config
    if cluster.has_accounting:
        enforced = config.get("AccountingStorageEnforce", "none")
        if cluster.associations is None:
            return Row("accounting", "on, and does not answer", "warning", "see whether slurmdbd runs: sacctmgr ping")
        refused = (
            "no job is refused for its account or qos" if enforced == "none" else f"jobs are refused by {enforced}"
        )
        return Row("accounting", f"on; {refused}")
    found = f"off: how a job ended is known for {config.get('MinJobAge', '300 sec')} (MinJobAge), and then no more"
    todo = "`fleetune status` goes by the run's folder then; a submit that was killed may not know whether it sent"
    return Row("accounting", found, "warning", todo)


def _accounts(cluster: Cluster) -> Row:
    each = []
    for one in cluster.associations or ():
        where = f" in {one.partition}" if one.partition else ""
        each.append(f"{one.account}{where}" + (f" (qos {', '.join(one.qos)})" if one.qos else ""))
    if each:
        return Row("accounts", "; ".join(each[:MOST_PARTITIONS]))
    if cluster.enforces("associations"):
        return Row("accounts", "none of yours", "problem", "ask the cluster's administrators for an account")
    return Row("accounts", "none of yours, and none is needed")


def _of_partition(partition: Partition, cluster: Cluster) -> Row:
    values, alike = partition.values, [nodes for nodes in cluster.nodes if nodes.partition == partition.name]
    kinds = ", ".join(
        f"{nodes.count} nodes of {nodes.cpus} CPUs, {nodes.megabytes / 1000:.0f} GB"
        + "".join(f", {number} GPUs{f' {kind}' if kind else ''}" for kind, number in nodes.gpus.items())
        for nodes in alike[:3]
    )
    mode, seconds = _preempted(partition, cluster)
    preempted = "not preempted" if mode == "OFF" else f"preempted: {mode.lower()} after {seconds:.0f} s"
    longest = preflight.spoken(partition.most_minutes)
    parts = [kinds or "no nodes", f"{longest} at most" if longest else "no time limit", preempted]
    if values.get("State", "UP") != "UP":
        parts.append(values["State"].lower())
    if (why := _not_yours(values, cluster)) is not None:
        parts.append(why)
    return Row(f"partition {partition.name}{'*' if partition.is_default else ''}", "; ".join(parts))


def _not_yours(values: dict[str, str], cluster: Cluster) -> str | None:
    """Why this user may not use a partition; None where nothing speaks against it."""
    groups = values.get("AllowGroups", "ALL")
    mine = {grp.getgrgid(number).gr_name for number in os.getgroups() if _is_known(number)}
    if groups != "ALL" and os.getuid() != 0 and not mine & set(groups.split(",")):
        return f"not for you: it is for groups {groups}"
    accounts = values.get("AllowAccounts", "ALL")
    own = {one.account for one in cluster.associations or ()}
    if accounts != "ALL" and cluster.associations is not None and not own & set(accounts.split(",")):
        return f"not for you: it is for accounts {accounts}"
    return None


def _is_known(group: int) -> bool:
    try:
        return bool(grp.getgrgid(group).gr_name)
    except KeyError:
        return False


def _preempted(partition: Partition, cluster: Cluster) -> tuple[str, float]:
    """How jobs of a partition are taken off their nodes (OFF: not at all), and how many seconds they get."""
    if cluster.config.get("PreemptType", "preempt/none") != "preempt/partition_prio":
        return "OFF", 0.0
    return partition.values.get("PreemptMode", "OFF"), float(partition.values.get("GraceTime", "0"))


# ---------------------------------------------------------------- a profile


def _of_profile(profile: Profile, file: Path, cluster: Cluster) -> Iterator[Row]:
    faults = preflight.lines(preflight.faults(profile, cluster), file)
    yield from (Row("profile", line, "problem", "correct it in the profile") for line in faults)
    yield from (Row("profile", line, "warning") for line in preflight.lines(preflight.warnings(profile, cluster), file))
    if not faults:
        yield Row("profile", f"{file} fits the cluster")
    if (why := why_unshared(Path.cwd())) is not None:
        yield Row("working folder", f"{Path.cwd()} {why}", "warning", "send runs from a folder that all nodes see")
    for name in preflight.partitions_of(profile, cluster):
        if name in cluster.partitions:
            yield from _grace(profile, cluster.partitions[name], cluster)


def _grace(profile: Profile, partition: Partition, cluster: Cluster) -> Iterator[Row]:
    """A grace that is shorter than a save loses what came after the last checkpoint."""
    if cluster.config.get("PreemptType") == "preempt/qos":
        mode, seconds = _of_qos(profile, cluster)
        whose = f"qos {profile.qos or 'normal'}"
    else:
        mode, seconds = _preempted(partition, cluster)
        whose = f"partition {partition.name}"
    if mode == "OFF":
        return
    found = f"a job of {whose} that is preempted gets {seconds:.0f} s to save; stop_seconds = {profile.stop_seconds}"
    if seconds < profile.stop_seconds:
        todo = (
            "lower checkpoint.save_steps, so that little is lost where a save takes longer; or ask for more GraceTime"
        )
        yield Row("grace", found, "warning", todo)
    else:
        yield Row("grace", found)
    if mode.startswith("CANCEL"):
        todo = "`fleetune submit` goes on with a run whose job is gone"
        yield Row("grace", "preempted jobs are cancelled, not requeued", "warning", todo)


def _of_qos(profile: Profile, cluster: Cluster) -> tuple[str, float]:
    """As `_preempted`, where it is a job's qos that decides: OFF unless another qos may preempt it."""
    words = ("sacctmgr", "--noheader", "--parsable2", "show", "qos", "format=name,preempt,preemptmode,gracetime")
    try:
        rows = [row.split("|") for row in slurm.command(*words, seconds=ANSWER_SECONDS).splitlines()]
    except slurm.SlurmFailed:
        return "OFF", 0.0
    own = profile.qos or "normal"
    is_prey = any(own in prey.split(",") for _, prey, _, _ in rows)
    for name, _, mode, grace in rows:
        if name == own and is_prey:
            usual = cluster.config.get("PreemptMode", "OFF")
            return usual if mode == "cluster" else mode.upper(), slurm.seconds_of(grace) or 0.0
    return "OFF", 0.0
